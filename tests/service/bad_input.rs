//! Unusable requests and checkpoints: each has its own answer, and none harms the server.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tonic::Code;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{CalibrationDataset, CalibrationImages, Image, QuantizeRequest, RoleBits};

use crate::server::{Setup, TestServer, demo, details, digit, drawn, failure, quick, refusal};

#[tokio::test(flavor = "multi_thread")]
async fn unusable_requests_name_the_field() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let with = |change: fn(&mut QuantizeRequest)| {
        let mut request = quick("m");
        change(&mut request);
        request
    };
    let option = |r: &mut QuantizeRequest, name: &str, value: &str| {
        r.options.insert(name.to_owned(), value.to_owned());
    };
    let mut unknown_option = quick("m");
    option(&mut unknown_option, "nonsense", "1");
    let inline = |count| {
        let images = vec![Image { content: digit(0, 0).into() }; count];
        Some(Calibration::Images(CalibrationImages { images }))
    };
    let followed = |content: &'static [u8]| {
        let images = vec![Image { content: digit(0, 0).into() }, Image { content: content.into() }];
        Some(Calibration::Images(CalibrationImages { images }))
    };
    let listed = |file: &str, count| {
        let (name, files) = ("digits/calib".to_owned(), vec![file.to_owned()]);
        Some(Calibration::Dataset(CalibrationDataset { name, count, files }))
    };
    let calibrated = |calibration| QuantizeRequest { calibration, ..quick("m") };
    let exception = |role: &str, weight_bits, activation_bits| {
        let entry = RoleBits { role: role.to_owned(), weight_bits, activation_bits };
        QuantizeRequest { role_bits: vec![entry], ..quick("m") }
    };
    let mut twice = exception("fc2", 4, 4);
    twice.role_bits.extend(exception("fc2", 8, 8).role_bits);
    let bad = Code::InvalidArgument;
    for (request, code, field) in [
        (with(|r| r.method = "magic".into()), bad, "method"),
        (unknown_option, bad, "options.nonsense"),
        (with(|r| r.weight_bits = 2), bad, "weight_bits"),
        (with(|r| r.activation_bits = 9), bad, "activation_bits"),
        (with(|r| r.weight_bits = 0), bad, "weight_bits"),
        (with(|r| r.stem_head = 77), bad, "stem_head"),
        (exception("attn", 4, 4), bad, "role_bits[0].role"),
        (exception("", 4, 4), bad, "role_bits[0].role"),
        (exception("fc2", 0, 4), bad, "role_bits[0].weight_bits"),
        (exception("fc2", 4, 16), bad, "role_bits[0].activation_bits"),
        (exception("query_key", 4, 4), bad, "role_bits[0].weight_bits"),
        (twice, bad, "role_bits[1].role"),
        (with(|r| r.model_id = "Not An Id".into()), bad, "model_id"),
        (with(|r| r.model_id = "../../etc/passwd".into()), bad, "model_id"),
        (with(|r| r.checkpoint = "absent".into()), Code::NotFound, ""),
        (with(|r| r.checkpoint = "../datasets".into()), bad, "checkpoint"),
        (with(|r| r.checkpoint = "/etc".into()), bad, "checkpoint"),
        (with(|r| r.checkpoint = "digits-vit\0".into()), bad, "checkpoint"),
        (with(|r| r.checkpoint = "digits-vit/config.json".into()), Code::NotFound, ""),
        (calibrated(drawn("absent", 8)), Code::NotFound, ""),
        (calibrated(drawn("digits/../../checkpoints", 8)), bad, "dataset.name"),
        (calibrated(drawn("digits/calib", 257)), bad, "dataset.count"),
        (calibrated(drawn("digits/calib", 0)), bad, "dataset.count"),
        (calibrated(listed("../val/0/x.png", 0)), bad, "dataset.files"),
        (calibrated(listed("0/absent.png", 0)), bad, "dataset.files"),
        (calibrated(listed("0/absent.png", 3)), bad, "dataset.count"),
        (calibrated(inline(0)), bad, "images.images"),
        (calibrated(followed(b"no image at all")), bad, "images.images[1].content"),
        (calibrated(followed(b"")), bad, "images.images[1].content"),
        (calibrated(None), bad, "calibration"),
        (with(|r| r.request_id = "has space".into()), bad, "request_id"),
        (with(|r| _ = r.labels.insert("k".into(), "v".repeat(300))), bad, "labels"),
    ] {
        let status = server.quantize(request.clone()).await.unwrap_err();
        let (found, found_field, _) = refusal(&status);
        assert_eq!((found, found_field.as_str()), (code, field), "{request:?}: {status}");
    }
    server.make("m").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unusable_calibration_image_fails_the_job_and_is_named() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let images = [digit(0, 0), digit(1, 0)[..100].to_vec()];
    let images = images.map(|content| Image { content: content.into() }).to_vec();
    let calibration = Some(Calibration::Images(CalibrationImages { images }));
    let events = server.quantize(QuantizeRequest { calibration, ..quick("m") }).await.unwrap();
    let error = failure(events);
    assert_eq!(error.code, i32::from(Code::InvalidArgument));
    let violations = details(&error).bad_request().unwrap().field_violations.clone();
    assert_eq!(violations[0].field, "images.images[1].content");
    server.make("m").await;
    server.stop().await;
}

/// A copy of the demo checkpoint with one of its files changed.
fn damaged(root: &Path, name: &str, file: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let (source, target) = (demo("checkpoints/digits-vit"), root.join(name));
    fs::create_dir_all(&target).unwrap();
    for part in ["config.json", "model.safetensors"] {
        fs::copy(source.join(part), target.join(part)).unwrap();
    }
    let path = target.join(file);
    let bytes = change(fs::read(&path).unwrap());
    fs::remove_file(&path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn with_config(config: Vec<u8>, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let mut config = serde_json::from_slice(&config).unwrap();
    change(&mut config);
    serde_json::to_vec(&config).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_checkpoints_fail_their_job_with_a_reason() {
    let (data, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (root, weights, config) = (folder.path(), "model.safetensors", "config.json");
    damaged(root, "truncated", weights, |bytes| bytes[..bytes.len() / 2].to_vec());
    damaged(root, "empty", weights, |_| vec![]);
    damaged(root, "flipped-header", weights, |mut bytes| {
        bytes[20] ^= 0x80;
        bytes
    });
    damaged(root, "absurd-header-length", weights, |mut bytes| {
        bytes[..8].fill(0x7f);
        bytes
    });
    damaged(root, "pickle", weights, |_| b"\x80\x02}q\x00(X\x06\x00\x00\x00weightq\x01.".to_vec());
    damaged(root, "zip", weights, |_| b"PK\x03\x04archive/data.pkl".to_vec());
    damaged(root, "no-json", config, |_| b"{".to_vec());
    damaged(root, "wrong-classes", config, |c| with_config(c, |c| c["num_classes"] = json!(7)));
    damaged(root, "wrong-depth", config, |c| {
        with_config(c, |c| c["model_args"]["depth"] = json!(99))
    });
    damaged(root, "wrong-width", config, |c| {
        with_config(c, |c| c["model_args"]["embed_dim"] = json!(97))
    });
    damaged(root, "unknown-architecture", config, |c| {
        with_config(c, |c| c["architecture"] = json!("resnet50"))
    });
    let setup = Setup { checkpoints: Some(root.to_path_buf()), ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    let mut names: Vec<String> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names.len(), 11);
    for name in names {
        let request = QuantizeRequest { checkpoint: name.clone(), ..quick("m") };
        let error = failure(server.quantize(request).await.unwrap());
        assert_eq!(error.code, i32::from(Code::InvalidArgument), "{name}: {error:?}");
        let violations = details(&error).bad_request().unwrap().field_violations.clone();
        assert!(violations[0].field.starts_with("checkpoint"), "{name}: {violations:?}");
    }
    server.stop().await;
}
