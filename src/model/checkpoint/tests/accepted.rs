//! Other layouts, element types and omissions that give the same model.

use super::*;

#[test]
fn saving_and_opening_gives_the_same_checkpoint() {
    for (architecture, args) in [
        ("vit_tiny", json!({"img_size": 32, "depth": 1})),
        ("swin_tiny", json!({"img_size": 56, "depths": [1, 1], "num_heads": [1, 2]})),
    ] {
        let model_args = args.as_object().unwrap().clone();
        let options = GeneratedOptions { num_classes: 3, model_args, seed: 0 };
        let mut made = generate(architecture, options).unwrap();
        Arc::get_mut(&mut made.spec).unwrap().labels = ["a", "b", "c"].map(str::to_owned).to_vec();
        let folder = TempDir::new().unwrap();
        made.save(&folder.path().join("new")).unwrap();
        let opened = Checkpoint::open(&folder.path().join("new")).unwrap();
        assert_eq!(opened.spec, made.spec);
        assert!(opened.weights.iter().eq(made.weights.iter()));
        assert_eq!(opened.bytes, made.bytes);
        let spec = Arc::unwrap_or_clone(made.spec);
        let again = Checkpoint::new(spec, made.weights).unwrap();
        assert_eq!((opened.digest, opened.bytes), (again.digest, again.bytes));
    }
}

#[test]
fn the_digest_covers_both_files() {
    let draft = Draft::vit();
    let config = serde_json::to_vec(&draft.config).unwrap();
    let model = draft.model_bytes();
    let expected = sha256_hex(&[config.as_slice(), &model].concat());
    let opened = draft.open().unwrap();
    assert_eq!((opened.digest, opened.bytes), (expected, model.len() as u64));
}

#[test]
fn half_precision_becomes_float32() {
    let plain = Draft::vit();
    let mut halves = Draft::vit();
    for (index, raw) in halves.tensors.values_mut().enumerate() {
        if index % 2 == 0 {
            raw.bytes = raw.values().flat_map(|v| f16::from_f32(v).to_le_bytes()).collect();
            raw.dtype = "F16";
        } else {
            raw.bytes = raw.values().flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect();
            raw.dtype = "BF16";
        }
    }
    let (plain, halves) = (plain.open().unwrap(), halves.open().unwrap());
    for ((name, a), (_, b)) in plain.weights.iter().zip(halves.weights.iter()) {
        assert_eq!(b.kind(), Kind::Float);
        assert!((a - b).abs().max().double_value(&[]) < 1e-2, "{name}");
    }
    let mut doubles = Draft::vit();
    let raw = doubles.tensors.get_mut("head.bias").unwrap();
    (raw.dtype, raw.bytes) = ("F64", vec![0; 24]);
    assert_mentions(&doubles.refusal(), &["head.bias", "F64"]);
}

#[test]
fn both_generations_of_swin_names_give_the_same_model() {
    let old = Draft::swin();
    let mut new = Draft::swin();
    for name in ["reduction.weight", "norm.weight", "norm.bias"] {
        new.rename(&format!("layers.0.downsample.{name}"), &format!("layers.1.downsample.{name}"));
    }
    for name in ["weight", "bias"] {
        new.rename(&format!("head.{name}"), &format!("head.fc.{name}"));
    }
    // Recomputed buffers, of any type, are not read.
    let index = Raw { dtype: "I64", shape: vec![16, 16], bytes: vec![9; 8 * 256] };
    new.tensors.insert("layers.0.blocks.1.attn.relative_position_index".to_owned(), index);
    new.tensors.insert("layers.0.blocks.1.attn_mask".to_owned(), Raw::zeros(&[4, 16, 16]));
    assert_eq!(old.logits(), new.logits());
    new.tensors.insert("head.weight".to_owned(), Raw::zeros(&[3, 8]));
    assert_mentions(&new.refusal(), &["head.weight", "head.fc.weight", "same"]);
}

#[test]
fn what_the_config_omits_comes_from_the_tensors_and_the_table() {
    for mut draft in [Draft::vit(), Draft::swin()] {
        let full = draft.open().unwrap().spec;
        let architecture = draft.config["architecture"].clone();
        // Only what no tensor tells: heads of a ViT, image size of a Swin.
        let kept = match full.family.as_str() {
            "vit" => json!({"num_heads": 2}),
            _ => json!({"img_size": [16, 16]}),
        };
        draft.config = json!({"architecture": architecture, "model_args": kept});
        let found = draft.open().unwrap().spec;
        assert_eq!(found.num_classes, 3);
        assert_eq!(found.preprocessing, full.preprocessing);
        for (key, value) in &full.model_args {
            match key.as_str() {
                "window_size" => assert_eq!(found.model_args[key], json!([4, 4])),
                _ => assert_eq!(&found.model_args[key], value, "{key}"),
            }
        }
        // The older name of the table, as in configs of timm 0.6.
        draft.config["default_cfg"] = json!({"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0});
        let older = draft.open().unwrap().spec;
        assert_eq!((older.preprocessing.mean[2], older.preprocessing.crop_pct), (0.3, 1.0));
    }
}

#[test]
fn settings_of_training_do_not_matter() {
    let draft = Draft::vit()
        .set("/model_args/drop_path_rate", json!(0.1))
        .set("/model_args/init_values", Value::Null)
        .set("/model_args/pre_norm", json!(false));
    assert_eq!(draft.open().unwrap().spec, Draft::vit().open().unwrap().spec);
}
