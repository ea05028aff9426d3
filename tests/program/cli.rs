//! The commands that need no server, as processes: results, errors, exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use safetensors::SafeTensors;
use serde_json::Value;

const FAILED: i32 = 1;
const USAGE: i32 = 2;
/// Relative to the largest logit: the bound for parity with timm.
const LOGIT_TOLERANCE: f32 = 1e-4;

fn demo(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(path)
}

fn vitq(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vitq"))
        .args(args)
        .env_remove("VITQ_SERVER")
        .output()
        .expect("the binary starts")
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", stderr(output));
    serde_json::from_slice(&output.stdout).expect("stdout is JSON")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// An artifact of digits-vit by minmax at 4 bits, as `bench` keeps it.
fn artifact(folder: &Path) -> PathBuf {
    let output = vitq(&[
        "bench",
        "--checkpoint",
        demo("checkpoints/digits-vit").to_str().unwrap(),
        "--calib",
        demo("datasets/digits/calib").to_str().unwrap(),
        "--val",
        demo("datasets/digits/val").to_str().unwrap(),
        "--methods",
        "minmax",
        "--bits",
        "4",
        "--calib-images",
        "4",
        "--limit",
        "10",
        "--save-artifacts",
        "--json",
        "--out",
        folder.to_str().unwrap(),
    ]);
    let json = json(&output);
    folder.join("artifacts").join(json["rows"][0]["artifact"].as_str().unwrap())
}

/// `logits` and the file names of a predict output.
fn read_logits(path: &Path) -> (Vec<f32>, Vec<usize>, Option<Vec<String>>) {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let names = metadata.metadata().as_ref().and_then(|fields| fields.get("files"));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let logits = file.tensor("logits").unwrap();
    let values = logits.data().chunks_exact(4);
    let values = values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    (values, logits.shape().to_vec(), names.map(|text| serde_json::from_str(text).unwrap()))
}

#[test]
fn predict_gives_the_float_models_logits_with_sorted_names() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("logits.safetensors");
    let checkpoint = demo("checkpoints/digits-vit");
    let output = vitq(&[
        "predict",
        "--checkpoint",
        checkpoint.to_str().unwrap(),
        "--images",
        demo("datasets/digits/val/3").to_str().unwrap(),
        "--output",
        out.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(json(&output)["images"], 45);
    let (logits, shape, names) = read_logits(&out);
    assert_eq!(shape, [45, 10]);

    // The checkpoint's own logits of the same images.
    let bytes = std::fs::read(checkpoint.join("val_logits.safetensors")).unwrap();
    let all = SafeTensors::deserialize(&bytes).unwrap();
    let files: Vec<String> =
        serde_json::from_slice(&std::fs::read(checkpoint.join("val_files.json")).unwrap()).unwrap();
    let first = files.iter().position(|name| name.starts_with("val/3/")).unwrap();
    let expected_names: Vec<&str> = files[first..first + 45].iter().map(|n| &n[6..]).collect();
    assert_eq!(names.unwrap(), expected_names);
    let rows = &all.tensor("logits").unwrap().data()[first * 40..(first + 45) * 40];
    let expected: Vec<f32> =
        rows.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let largest = expected.iter().fold(0f32, |max, value| max.max(value.abs()));
    for (ours, theirs) in logits.iter().zip(&expected) {
        assert!((ours - theirs).abs() <= LOGIT_TOLERANCE * largest, "{ours} {theirs}");
    }
}

#[test]
fn an_artifact_predicts_inspects_and_tells_a_flipped_byte() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path());
    let file = artifact.to_str().unwrap();
    let input = folder.path().join("input.safetensors");
    let values = vec![0u8; 2 * 3 * 32 * 32 * 4];
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![2, 3, 32, 32], &values)
            .unwrap();
    std::fs::write(&input, safetensors::serialize([("input", view)], None).unwrap()).unwrap();
    let out = folder.path().join("out.safetensors");
    let predict = |artifact: &str| {
        vitq(&[
            "predict",
            "--artifact",
            artifact,
            "--tensor",
            input.to_str().unwrap(),
            "--output",
            out.to_str().unwrap(),
        ])
    };
    assert!(predict(file).status.success());
    let (logits, shape, names) = read_logits(&out);
    assert_eq!((shape, names), (vec![2, 10], None));
    assert_eq!(logits[..10], logits[10..]); // equal images, whatever the batch

    let shown = json(&vitq(&["inspect", file, "--verify", "--json"]));
    assert_eq!(shown["header"]["request"]["method"], "minmax");
    assert_eq!(shown["bytes"], std::fs::metadata(&artifact).unwrap().len());
    let text = String::from_utf8(vitq(&["inspect", file]).stdout).unwrap();
    assert!(text.contains("minmax w4a4") && text.contains("blocks.0.attn.qkv"), "{text}");

    let mut bytes = std::fs::read(&artifact).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let broken = folder.path().join("broken.safetensors");
    std::fs::write(&broken, bytes).unwrap();
    for output in [
        vitq(&["inspect", broken.to_str().unwrap()]),
        vitq(&["inspect", broken.to_str().unwrap(), "--verify"]),
        predict(broken.to_str().unwrap()),
    ] {
        assert_eq!(output.status.code(), Some(FAILED));
        assert!(stderr(&output).contains("broken.safetensors"), "{}", stderr(&output));
        assert!(stderr(&output).contains("digest"), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn verify_finds_a_wrong_name_in_a_content_addressed_store() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = artifact(folder.path());
    let renamed = folder.path().join(format!("{}.safetensors", "0".repeat(64)));
    std::fs::copy(artifact, &renamed).unwrap();
    assert!(vitq(&["inspect", renamed.to_str().unwrap()]).status.success());
    let output = vitq(&["inspect", renamed.to_str().unwrap(), "--verify"]);
    assert_eq!(output.status.code(), Some(FAILED));
    assert!(stderr(&output).contains("the content's digest is"), "{}", stderr(&output));
}

#[test]
fn a_wrong_command_line_is_usage() {
    let out = tempfile::tempdir().unwrap();
    let out = out.path().to_str().unwrap();
    let bench = ["bench", "--checkpoint", "x", "--val", "x", "--out", out];
    for extra in [
        &["--methods", "gptq"][..],
        &["--methods", "ubb"],
        &["--methods", "ubb", "--bits", "2", "--calib", "x"],
        &["--methods", "ubb", "--bits", "4"],
        &["--methods", "ubb", "--bits", "4", "--calib", "x", "--executor", "int4"],
        &["--methods", "ubb", "--bits", "4", "--weight-bits", "4", "--activation-bits", "4"],
        &["--methods", "float", "--option", "groups"],
    ] {
        let output = vitq(&[&bench[..], extra].concat());
        assert_eq!(output.status.code(), Some(USAGE), "{extra:?}: {}", stderr(&output));
    }
    for args in [
        &["nothing"][..],
        &["predict", "--output", "x"],
        &["quantize", "--checkpoint", "x", "--method", "ubb", "--calib-dataset", "x"],
        &["classify", "--model", "x"],
        &["models", "get", "x", "--server", "no url"],
    ] {
        assert_eq!(vitq(args).status.code(), Some(USAGE), "{args:?}");
    }
}

#[test]
fn a_wrong_command_line_is_json_if_that_is_asked_for() {
    let quantize = ["quantize", "--checkpoint", "x", "--method", "ubb", "--calib-dataset", "x"];
    let empty = tempfile::NamedTempFile::new().unwrap();
    let empty = empty.path().to_str().unwrap();
    for (flags, words, field) in [
        (&["--bits", "9"][..], "invalid value '9' for '--bits <N>'", None),
        (&["--nothing"], "unexpected argument '--nothing'", None),
        (&[], "--bits, or --weight-bits", None),
        (&["--bits", "4", "--role-bits", "foo=4"], "foo", Some("role_bits")),
        (&["--bits", "4", "--label", "a=1", "--label", "a=2"], "given twice", Some("label")),
        (&["--bits", "4", "--option", "groups=8", "--groups", "4"], "given twice", Some("option")),
        (&["--bits", "4", "--calib-files", empty], "names no image", Some("calib-files")),
    ] {
        let args = [&quantize[..], flags, &["--json"]].concat();
        let output = vitq(&args);
        assert_eq!(output.status.code(), Some(USAGE), "{flags:?}: {}", stderr(&output));
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(words) && !message.contains("Usage:"), "{flags:?}: {message}");
        assert!(error["error"]["code"].is_null(), "{error}");
        let named = error["error"]["fields"][0]["field"].as_str();
        assert!(field.is_none_or(|field| named.unwrap().contains(field)), "{error}");
        let output = vitq(&[&quantize[..], flags].concat());
        assert_eq!(output.status.code(), Some(USAGE), "{flags:?}");
        assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
    }
}

#[test]
fn what_is_missing_fails_and_is_named() {
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("x.safetensors");
    let empty = tempfile::tempdir().unwrap();
    let (empty, image) = (empty.path().to_str().unwrap(), out.path().join("image.jpg"));
    std::fs::write(&image, "").unwrap();
    let image = image.to_str().unwrap();
    for (args, words) in [
        (vec!["inspect", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (vec!["datasets", "upload", empty], empty),
        (vec!["datasets", "upload", image], "image.jpg: is neither a folder nor a .tar file"),
        (vec!["models", "list", "--server", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
        (
            vec![
                "predict",
                "--checkpoint",
                "/nowhere",
                "--images",
                "/nowhere",
                "--output",
                file.to_str().unwrap(),
            ],
            "/nowhere",
        ),
    ] {
        let output = vitq(&args);
        assert_eq!(output.status.code(), Some(FAILED), "{args:?}");
        assert!(stderr(&output).starts_with("error: "), "{}", stderr(&output));
        assert!(stderr(&output).contains(words), "{}", stderr(&output));
        let output = vitq(&[&args[..], &["--json"]].concat());
        let error: Value = serde_json::from_slice(&output.stderr).unwrap();
        assert!(error["error"]["message"].as_str().unwrap().contains(words));
    }
}

#[test]
fn the_catalogue_names_methods_and_options() {
    let methods = json(&vitq(&["methods", "--json"]));
    let ids: Vec<&str> =
        methods.as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert!(ids.starts_with(&["float", "minmax", "ubb"]), "{ids:?}");
    let text = String::from_utf8(vitq(&["methods"]).stdout).unwrap();
    assert!(text.contains("--option groups="), "{text}");
}

#[test]
fn a_generated_checkpoint_can_be_run() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("deit");
    let output = vitq(&[
        "generate",
        "--architecture",
        "deit_tiny",
        "--classes",
        "10",
        "--out",
        checkpoint.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(json(&output)["architecture"], "deit_tiny_patch16_224");
    // What is there stays there, unless it is to be replaced.
    let generate = |extra: &[&str]| {
        let flags = ["generate", "--architecture", "deit_tiny", "--classes", "10", "--out"];
        vitq(&[&flags[..], &[checkpoint.to_str().unwrap()], extra].concat())
    };
    let refused = generate(&[]);
    assert_eq!(refused.status.code(), Some(USAGE));
    assert!(stderr(&refused).contains("--force replaces it"), "{}", stderr(&refused));
    assert!(generate(&["--force"]).status.success());
    let unknown = vitq(&["generate", "--architecture", "foo", "--out", "/nowhere"]);
    assert_eq!(unknown.status.code(), Some(USAGE));
    assert!(stderr(&unknown).contains("known are: "), "{}", stderr(&unknown));
    assert!(stderr(&unknown).contains("deit_small"), "{}", stderr(&unknown));
    let images = folder.path().join("images");
    std::fs::create_dir(&images).unwrap();
    std::fs::copy(demo("datasets/digits/val/0/0000.png"), images.join("a.png")).unwrap();
    let out = folder.path().join("logits.safetensors");
    let output = vitq(&[
        "predict",
        "--checkpoint",
        checkpoint.to_str().unwrap(),
        "--images",
        images.to_str().unwrap(),
        "--output",
        out.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let (logits, shape, _) = read_logits(&out);
    assert_eq!(shape, [1, 10]);
    assert!(logits.iter().all(|value| value.is_finite()));
}
