//! The Open Inference Protocol with a client of other people's: NVIDIA's `tritonclient`, from PyPI,
//! against the real program. `scripts/setup.sh test` installs it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use tokio_stream::StreamExt as _;
use vitq::data::{DecodeLimits, decode, preprocess};
use vitq::grpc::proto::classify_item::Outcome;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{ClassifyRequest, Image, Label, Model, QuantizeRequest};
use vitq::model::Checkpoint;

use crate::program::{Program, Stores};
use crate::{requests, root};

const MODEL: &str = "digits-vit-w8a8";

/// One image of each of these classes.
fn images() -> Vec<PathBuf> {
    let first = |class: &str| {
        let folder = root().join("demo/datasets/digits/val").join(class);
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).min().unwrap()
    };
    ["3", "7", "0"].map(first).to_vec()
}

async fn quantize(server: &Program) -> Model {
    let request = QuantizeRequest {
        weight_bits: 8,
        activation_bits: 8,
        ..requests::digits(MODEL, "minmax", 8)
    };
    let mut client = QuantizationServiceClient::new(server.channel.clone());
    let mut events = client.quantize(request).await.unwrap().into_inner();
    while let Some(event) = events.next().await {
        if let Some(Event::Result(result)) = event.unwrap().event {
            return result.model.unwrap();
        }
    }
    panic!("the job ended without a result")
}

/// Per image, the labels of all classes by their index.
async fn classify(server: &Program, images: &[PathBuf]) -> Vec<Vec<Label>> {
    let image = |path: &PathBuf| Image { content: fs::read(path).unwrap().into() };
    let request = ClassifyRequest {
        model: MODEL.to_owned(),
        images: images.iter().map(image).collect(),
        top_k: 1000,
        ..ClassifyRequest::default()
    };
    let mut client = InferenceServiceClient::new(server.channel.clone());
    let response = client.classify(request).await.unwrap().into_inner();
    let labels = response.items.into_iter().map(|item| {
        let Some(Outcome::Result(mut result)) = item.outcome else { panic!("an image failed") };
        result.labels.sort_by_key(|label| label.index);
        result.labels
    });
    labels.collect()
}

/// The images as the model sees them, float32 [n, 3, side, side], and the side.
fn pixels(images: &[PathBuf]) -> (Vec<u8>, i64) {
    let checkpoint = Checkpoint::open(&root().join("demo/checkpoints/digits-vit")).unwrap();
    let how = &checkpoint.spec.preprocessing;
    let values = images.iter().flat_map(|path| {
        let image = decode(&fs::read(path).unwrap(), &DecodeLimits::default(), "image").unwrap();
        preprocess(&image, how).unwrap()
    });
    (values.flat_map(f32::to_le_bytes).collect(), how.image_size)
}

#[tokio::test(flavor = "multi_thread")]
async fn tritonclient_works_unchanged() {
    let python = root().join(".venv-clients/bin/python");
    assert!(python.exists(), "tritonclient is not installed: run `scripts/setup.sh test`");
    let data = tempfile::tempdir().unwrap();
    let flags = vec!["--data-dir".to_owned(), data.path().to_str().unwrap().to_owned()];
    let server = Program::start(&Stores { flags, variables: vec![] }).await;
    let model = quantize(&server).await;
    let images = images();
    let classified = classify(&server, &images).await;
    let (pixels, side) = pixels(&images);
    fs::write(data.path().join("pixels"), pixels).unwrap();
    let logits = |labels: &Vec<Label>| labels.iter().map(|label| label.logit).collect::<Vec<_>>();
    let case = json!({
        "model": MODEL,
        "digest": model.digest,
        "side": side,
        "images": images,
        "pixels": data.path().join("pixels"),
        "logits": classified.iter().map(logits).collect::<Vec<_>>(),
        "labels": classified[0].iter().map(|label| &label.label).collect::<Vec<_>>(),
    });
    let path = data.path().join("case.json");
    fs::write(&path, case.to_string()).unwrap();

    let address = server.address.strip_prefix("http://").unwrap();
    let output = Command::new(python)
        .arg(root().join("tests/clients/tritonclient_check.py"))
        .args([address, path.to_str().unwrap()])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (done, problem) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{done}\n{problem}");
}

#[test]
fn the_documented_example_is_the_one_that_is_run() {
    let example = fs::read_to_string(root().join("tests/clients/tritonclient_example.py")).unwrap();
    let document = fs::read_to_string(root().join("docs/open-inference-protocol.md")).unwrap();
    let (_, code) = example.split_once("\n\n").unwrap(); // without the usage
    assert!(document.contains(&format!("```python\n{code}```")), "the document is out of date");
}
