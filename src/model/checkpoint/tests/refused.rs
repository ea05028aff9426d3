//! What is refused, and with which words.

use super::*;

#[test]
fn what_is_missing_is_not_found() {
    let assert_not_found = |folder: &Path| {
        let error = Checkpoint::open(folder).unwrap_err();
        assert!(matches!(error, Error::NotFound { kind: "checkpoint", .. }), "{error}");
    };
    let folder = TempDir::new().unwrap();
    assert_not_found(&folder.path().join("absent"));
    assert_not_found(folder.path());
    let config = json!({"architecture": "vit_tiny_patch16_224"}).to_string();
    fs::write(folder.path().join(CONFIG), config).unwrap();
    assert_not_found(folder.path());
    // A file where the folder should be.
    assert_not_found(&folder.path().join(CONFIG));
    fs::create_dir(folder.path().join(MODEL)).unwrap();
    assert_mentions(&reason(Checkpoint::open(folder.path())), &["not a regular file"]);
}

#[test]
fn other_formats_are_refused_by_content() {
    let config = serde_json::to_vec(&Draft::vit().config).unwrap();
    let pickles = (2..=5).map(|protocol| vec![0x80, protocol, b'}', b'q', 0, 0, 0, 0, 0, 0]);
    for pickle in pickles {
        assert_mentions(&reason(open_bytes(&config, &pickle)), &["pickle", "safetensors"]);
    }
    // The length of a header, which happens to begin with the same two bytes.
    let start = 0x280u64.to_le_bytes();
    assert_eq!(Checkpoint::check_start(&start, 10_000).unwrap(), 0x280 + 8);
    assert_mentions(&reason(Checkpoint::check_start(&start, 600)), &["pickle"]);
    let zip = reason(open_bytes(&config, b"PK\x03\x04 and so on"));
    assert_mentions(&zip, &["zip", "safetensors"]);
    assert_mentions(&reason(open_bytes(&config, b"")), &["only 0 bytes"]);
    assert_mentions(&reason(open_bytes(&config, b"PK\x03\x04")), &["zip"]);
    assert_mentions(&reason(open_bytes(&config, b"{\"a\": 1, \"b\": 2}")), &["does not fit"]);
}

#[test]
fn bad_headers_are_refused() {
    let config = serde_json::to_vec(&Draft::vit().config).unwrap();
    let cases: [(&str, usize); 7] = [
        ("not json", 0),
        (r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#, 4),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8),
        (
            r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                "b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
            4,
        ),
        (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 5),
        (r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}"#, 4),
        (r#"{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#, 4),
    ];
    for (header, data) in cases {
        let text = reason(open_bytes(&config, &file_of(header, &vec![0; data])));
        assert_mentions(&text, &["not a safetensors file"]);
    }
    let mut huge = u64::MAX.to_le_bytes().to_vec();
    huge.extend_from_slice(b"{}");
    assert_mentions(&reason(open_bytes(&config, &huge)), &["does not fit"]);
    assert_mentions(&reason(open_bytes(&config, &file_of("{}", &[]))), &["missing"]);
}

/// No flipped bit of the header and no truncation may do more than return an error.
#[test]
fn damage_anywhere_never_panics() {
    let draft = Draft::vit();
    let config = serde_json::to_vec(&draft.config).unwrap();
    let whole = draft.model_bytes();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let folder = folder_of(&config, &whole);
    let path = folder.path().join(MODEL);
    let open_with = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Checkpoint::open(folder.path())
    };
    for position in 0..header {
        let mut damaged = whole.clone();
        damaged[position] ^= 1 << (position % 8);
        // A flip may leave a valid file (a space of the header, the case of an escape).
        if let Err(error) = open_with(&damaged) {
            assert!(matches!(error, Error::InvalidArgument { .. }), "{position}: {error}");
        }
        reason(open_with(&whole[..position]));
    }
    for length in (header..whole.len()).step_by(13) {
        reason(open_with(&whole[..length]));
    }
    open_with(&whole).unwrap();
}

#[test]
fn damaged_configs_never_panic() {
    for draft in [Draft::vit(), Draft::swin()] {
        let config = serde_json::to_vec(&draft.config).unwrap();
        let folder = folder_of(&config, &draft.model_bytes());
        for position in 0..config.len() {
            for replacement in [config[position] ^ (1 << (position % 7)), b'9', b'-'] {
                let mut damaged = config.clone();
                damaged[position] = replacement;
                fs::write(folder.path().join(CONFIG), damaged).unwrap();
                if let Err(error) = Checkpoint::open(folder.path()) {
                    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
                }
            }
        }
    }
}

#[test]
fn values_that_are_not_finite_are_refused_by_name() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut draft = Draft::vit();
        let raw = draft.tensors.get_mut("blocks.0.mlp.fc1.weight").unwrap();
        raw.bytes[8..12].copy_from_slice(&value.to_le_bytes());
        assert_mentions(&draft.refusal(), &["blocks.0.mlp.fc1.weight", "not finite"]);
    }
}

#[test]
fn unlisted_variants_need_what_the_table_would_give() {
    let other = |name: &str| Draft::vit().set("/architecture", json!(name));
    other("vit_atto_patch4_8").open().unwrap();
    let mut silent = other("deit_atto_patch4_8");
    silent.config.as_object_mut().unwrap().remove("pretrained_cfg");
    assert_mentions(&silent.refusal(), &["interpolation", "timm's table"]);
    let mut silent = other("vit_atto_patch4_8");
    silent.config["model_args"].as_object_mut().unwrap().remove("num_heads");
    assert_mentions(&silent.refusal(), &["num_heads"]);
}

/// What no tensor has to be there for.
#[test]
fn a_config_is_refused_by_itself() {
    let check =
        |draft: &Draft| Checkpoint::check_config(&serde_json::to_vec(&draft.config).unwrap());
    let vit: [(&str, Value, &str); 18] = [
        ("/architecture", json!("resnet50"), "resnet50"),
        ("/model_args/depth", json!(1e300), "depth"),
        ("/model_args/embed_dim", json!("4"), "embed_dim"),
        ("/model_args/num_heads", json!(0), "num_heads"),
        ("/model_args/patch_size", json!(-4), "patch_size"),
        ("/model_args/mlp_ratio", json!(0), "mlp_ratio"),
        ("/model_args/qkv_bias", json!(1), "qkv_bias"),
        ("/model_args/in_chans", json!(1), "in_chans"),
        ("/model_args/act_layer", json!("quick_gelu"), "act_layer"),
        ("/model_args/init_values", json!(1e-5), "init_values"),
        ("/pretrained_cfg/input_size", json!([3, 8, 16]), "input_size"),
        ("/pretrained_cfg/interpolation", json!("random"), "interpolation"),
        ("/pretrained_cfg/crop_pct", json!(2), "crop_pct"),
        ("/pretrained_cfg/crop_mode", json!("squash"), "crop_mode"),
        ("/pretrained_cfg/std", json!([1, 0, 1]), "std"),
        ("/label_names", json!(["one"]), "label_names"),
        ("/num_classes", json!(0), "0 classes"),
        ("/num_classes", json!("3"), "config.json"),
    ];
    for (pointer, value, word) in vit {
        assert_mentions(&reason(check(&Draft::vit().set(pointer, value))), &[word]);
    }
    for (key, value) in [("num_heads", json!([1, 0])), ("depths", json!([])), ("ape", json!(true))]
    {
        let draft = Draft::swin().set(&format!("/model_args/{key}"), value);
        assert_mentions(&reason(check(&draft)), &[key]);
    }
    for draft in [Draft::vit(), Draft::swin()] {
        check(&draft).unwrap();
        // What the tensors tell need not be there.
        check(&draft.set("/model_args", json!({}))).unwrap();
    }
}

#[test]
fn a_header_is_refused_as_the_whole_file_is() {
    Draft::swin().check_header().unwrap();
    let mut other = Draft::vit();
    other.tensors.get_mut("norm.bias").unwrap().dtype = "I32";
    assert_mentions(&other.refusal(), &["norm.bias", "element type I32"]);
    // Lengths that do not add up.
    let (config, model) = (Draft::vit().config.to_string(), Draft::vit().model_bytes());
    let end = 8 + u64::from_le_bytes(model[..8].try_into().unwrap()) as usize;
    for size in [end, model.len() - 1, model.len() + 1] {
        let found = Checkpoint::check_header(config.as_bytes(), &model[..end], size as u64);
        assert_mentions(&reason(found), &["truncated"]);
    }
    let cut = Checkpoint::check_header(config.as_bytes(), &model[..end - 1], model.len() as u64);
    assert_mentions(&reason(cut), &["not a safetensors file"]);
    assert_mentions(&reason(Checkpoint::check_size(17 << 30)), &["17"]);
}

/// Every contradiction names both values.
#[test]
fn contradictions_are_refused() {
    let vit: [(&str, Value, &[&str]); 12] = [
        ("/num_classes", json!(4), &["num_classes = 4", "3"]),
        ("/model_args/embed_dim", json!(8), &["embed_dim = 8", "4"]),
        ("/model_args/depth", json!(2), &["depth = 2", "1"]),
        ("/model_args/patch_size", json!(2), &["patch_size = 2", "4"]),
        ("/model_args/img_size", json!(12), &["img_size = 12", "8"]),
        ("/model_args/mlp_ratio", json!(4.0), &["mlp_ratio = 4", "16", "8"]),
        ("/model_args/qkv_bias", json!(false), &["qkv_bias = false", "true"]),
        ("/model_args/class_token", json!(false), &["class_token = false", "true"]),
        ("/model_args/fc_norm", json!(true), &["fc_norm = true", "false"]),
        ("/model_args/in_chans", json!(1), &["in_chans = 1", "3"]),
        ("/pretrained_cfg/input_size", json!([3, 16, 16]), &["img_size = 8", "16"]),
        ("/global_pool", json!("avg"), &["global_pool", "token", "avg"]),
    ];
    for (pointer, value, parts) in vit {
        assert_mentions(&Draft::vit().set(pointer, value).refusal(), parts);
    }
    let swin: [(&str, Value, &[&str]); 5] = [
        ("/model_args/depths", json!([1, 1]), &["depths = [1,1]", "[2,1]"]),
        ("/model_args/num_heads", json!([2, 4]), &["num_heads = [2,4]", "[1,2]"]),
        ("/model_args/window_size", json!(2), &["bias_table", "[49, 1]", "[9, 1]"]),
        ("/model_args/window_size", json!([4]), &["window_size", "stages"]),
        ("/model_args/qkv_bias", json!(false), &["qkv_bias = false", "true"]),
    ];
    for (pointer, value, parts) in swin {
        assert_mentions(&Draft::swin().set(pointer, value).refusal(), parts);
    }
}

#[test]
fn the_image_size_must_fit_the_position_embedding() {
    let draft = Draft::vit().without_input_size();
    let reason = draft.set("/model_args/img_size", json!(12)).refusal();
    assert_mentions(&reason, &["img_size = 12", "tensors say 8"]);
}

#[test]
fn unusable_values_are_refused() {
    let vit: [(&str, Value, &[&str]); 21] = [
        ("/architecture", json!("resnet50"), &["resnet50", "not supported"]),
        ("/architecture", json!("swinv2_tiny_window8_256"), &["swinv2", "not supported"]),
        ("/architecture", json!("vit_base_patch16_rpn_224"), &["rpn", "not supported"]),
        ("/model_args/num_heads", json!(3), &["4", "3 heads"]),
        ("/model_args/num_heads", json!(0), &["num_heads is 0"]),
        ("/model_args/num_heads", json!("two"), &["num_heads is \"two\""]),
        ("/model_args/depth", json!(1e300), &["depth"]),
        ("/model_args/img_size", json!(10), &["10", "not a multiple", "4"]),
        ("/model_args/img_size", json!([8, 12]), &["[8,12]", "not square"]),
        ("/model_args/act_layer", json!("quick_gelu"), &["act_layer", "quick_gelu"]),
        ("/model_args/init_values", json!(1e-5), &["init_values"]),
        ("/model_args/global_pool", json!("map"), &["global_pool", "map"]),
        ("/pretrained_cfg/input_size", json!([3, 8, 16]), &["8 by 16", "not square"]),
        ("/pretrained_cfg/input_size", json!([1, 8, 8]), &["in_chans", "1"]),
        ("/pretrained_cfg/interpolation", json!("random"), &["interpolation", "random"]),
        ("/pretrained_cfg/crop_pct", json!(0.0), &["crop_pct is 0"]),
        ("/pretrained_cfg/crop_mode", json!("squash"), &["crop_mode", "squash"]),
        ("/pretrained_cfg/std", json!([1, 0, 1]), &["std"]),
        ("/pretrained_cfg/mean", json!([1, 0]), &["config.json"]),
        ("/label_names", json!(["one"]), &["1 label_names", "3 classes"]),
        ("/num_classes", json!("3"), &["config.json"]),
    ];
    for (pointer, value, parts) in vit {
        let draft = match pointer {
            "/model_args/img_size" => Draft::vit().without_input_size(),
            _ => Draft::vit(),
        };
        assert_mentions(&draft.set(pointer, value).refusal(), parts);
    }
    let swin: [(&str, Value, &[&str]); 4] = [
        ("/model_args/img_size", json!(14), &["7 by 7", "windows of 4"]),
        ("/model_args/window_size", json!(0), &["window_size is 0"]),
        ("/model_args/ape", json!(true), &["ape = true"]),
        ("/model_args/global_pool", json!("token"), &["global_pool", "token"]),
    ];
    for (pointer, value, parts) in swin {
        let draft = Draft::swin().without_input_size();
        assert_mentions(&draft.set(pointer, value).refusal(), parts);
    }
}

#[test]
fn unusable_shapes_are_refused() {
    let cases: [(&str, &[i64], &[&str]); 7] = [
        ("dist_token", &[1, 1, 4], &["distilled"]),
        ("patch_embed.proj.weight", &[4, 1, 4, 4], &["1 image channels"]),
        ("patch_embed.proj.weight", &[4, 3, 4, 2], &["4 by 2", "not square"]),
        ("pos_embed", &[1, 6, 4], &["5 patch tokens", "no square"]),
        ("norm.weight", &[5], &["norm.weight", "[5]", "[4]"]),
        ("blocks.0.ls1.gamma", &[4], &["1 parameters", "blocks.0.ls1.gamma"]),
        ("head.weight", &[0, 4], &["num_classes = 3", "0"]),
    ];
    for (name, shape, parts) in cases {
        assert_mentions(&Draft::vit().shape(name, shape).refusal(), parts);
    }
    let mut lacking = Draft::vit();
    lacking.tensors.remove("blocks.0.mlp.fc2.bias");
    assert_mentions(&lacking.refusal(), &["blocks.0.mlp.fc2.bias is missing"]);
    // A bias where methods add one is part of the architecture, but never required.
    let biased = Draft::swin().shape("layers.0.downsample.reduction.bias", &[8]);
    assert_eq!(biased.logits(), Draft::swin().logits());
}

#[test]
fn images_of_another_size_are_refused_by_the_forward() {
    let checkpoint = Draft::vit().open().unwrap();
    let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
    for shape in [vec![1, 3, 8, 12], vec![0, 3, 8, 8], vec![1, 1, 8, 8], vec![3, 8, 8]] {
        let images = Tensor::zeros(&shape, (Kind::Float, Device::Cpu));
        let error = model.forward(&mut Float, &images).unwrap_err();
        assert_mentions(&error.to_string(), &["images: ", &format!("{shape:?}")]);
    }
}
