//! `InferenceService.Classify`.

use std::fs;

use tonic::Code;
use vitq::artifact::Artifact;
use vitq::data::{DecodeLimits, Pixels, decode, preprocess};
use vitq::engine::QuantizedModel;
use vitq::engine::pipeline::image_batch;
use vitq::exec::Backend;
use vitq::grpc::proto::classify_item::Outcome;
use vitq::grpc::proto::{ClassifyItem, ClassifyRequest, Image, Label};

use crate::server::{Setup, TestServer, details, digit, refusal};

/// Labels by class index.
fn labels(item: &ClassifyItem) -> Vec<Label> {
    match &item.outcome {
        Some(Outcome::Result(result)) => {
            let mut labels = result.labels.clone();
            labels.sort_by_key(|label| label.index);
            labels
        }
        other => panic!("{other:?}"),
    }
}

fn logits(item: &ClassifyItem) -> Vec<f32> {
    labels(item).iter().map(|label| label.logit).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_what_the_stored_model_computes() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let model = server.make("m").await.model.unwrap();
    let response = server.classify("m", vec![digit(3, 0), digit(7, 1)]).await.unwrap();

    let file = data.path().join("objects/sha256").join(format!("{}.safetensors", model.digest));
    let artifact = Artifact::from_bytes("m", &fs::read(file).unwrap()).unwrap();
    let direct = QuantizedModel::load(&artifact, tch::Device::Cpu, Backend::Integer).unwrap();
    for (item, image) in response.items.iter().zip([digit(3, 0), digit(7, 1)]) {
        let decoded = decode(&image, &DecodeLimits::default(), "image").unwrap();
        let how = &artifact.header.model.preprocessing;
        let data = preprocess(&decoded, how).unwrap();
        let pixels = Pixels { count: 1, image_size: how.image_size, data };
        let expected = direct.forward(&image_batch(&pixels).unwrap()).unwrap().reshape([-1]);
        assert_eq!(logits(item), Vec::<f32>::try_from(expected).unwrap());
    }
    assert_eq!(response.model_version, model.digest);
    assert!((1..=2).contains(&response.batch_size));
    let timings = response.timings.unwrap();
    assert!(timings.compute.is_some_and(|t| t.seconds > 0 || t.nanos > 0));
    let top: Vec<_> = response.items.iter().map(labels).collect();
    for (labels, class) in top.iter().zip([3, 7]) {
        let best = labels.iter().max_by(|a, b| a.probability.total_cmp(&b.probability)).unwrap();
        assert_eq!(best.index, class);
        let sum: f32 = labels.iter().map(|label| label.probability).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_image_fails_alone() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let alone = server.classify("m", vec![digit(1, 0)]).await.unwrap();
    let truncated = digit(1, 0)[..200].to_vec();
    let images = vec![vec![], digit(1, 0), b"GIF89a not supported".to_vec(), truncated, huge_png()];
    let response = server.classify("m", images).await.unwrap();
    assert_eq!(logits(&response.items[1]), logits(&alone.items[0]));
    for bad in [0, 2, 3, 4] {
        let Some(Outcome::Error(error)) = &response.items[bad].outcome else {
            panic!("image {bad} was accepted")
        };
        assert_eq!(error.code, i32::from(Code::InvalidArgument));
        let violations = details(error).bad_request().unwrap().field_violations.clone();
        assert_eq!(violations[0].field, format!("images[{bad}].content"));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_calls_share_batches_and_change_nothing() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let mut alone = Vec::new();
    for class in 0..10 {
        alone.push(logits(&server.classify("m", vec![digit(class, 2)]).await.unwrap().items[0]));
    }
    let mut tasks = tokio::task::JoinSet::new();
    for class in 0..10 {
        let mut client = server.inference();
        let image = Image { content: digit(class, 2).into() };
        let request = ClassifyRequest {
            model: "m".to_owned(),
            images: vec![image; 4],
            top_k: 10,
            ..Default::default()
        };
        tasks.spawn(async move { (class, client.classify(request).await.unwrap().into_inner()) });
    }
    let mut largest = 0;
    while let Some(done) = tasks.join_next().await {
        let (class, response) = done.unwrap();
        largest = largest.max(response.batch_size);
        for item in &response.items {
            assert_eq!(logits(item), alone[class], "class {class}");
        }
    }
    assert!((2..=8).contains(&largest), "max_batch is 8, the largest was {largest}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusable_calls_are_refused_as_a_whole() {
    let data = tempfile::tempdir().unwrap();
    let setup = Setup { queue_images: 2, ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    let images = |count| vec![digit(0, 0); count];
    for (model, count, code, field, reason) in [
        ("absent", 1, Code::NotFound, "", "MODEL_NOT_FOUND"),
        ("../m", 1, Code::InvalidArgument, "model", "INVALID_ARGUMENT"),
        ("", 1, Code::InvalidArgument, "model", "INVALID_ARGUMENT"),
        ("m", 0, Code::InvalidArgument, "images", "INVALID_ARGUMENT"),
        ("m", 3, Code::InvalidArgument, "images", "INVALID_ARGUMENT"),
    ] {
        let status = server.classify(model, images(count)).await.unwrap_err();
        let expected = (code, field.to_owned(), reason.to_owned());
        assert_eq!(refusal(&status), expected, "{model} {count}");
    }
    let status = server.classify("m", vec![vec![0; 33 << 20]]).await.unwrap_err();
    let reason = "MESSAGE_TOO_LARGE".to_owned();
    assert_eq!(refusal(&status), (Code::ResourceExhausted, String::new(), reason), "{status}");
    assert!(status.message().contains("the limit is: 33554432 bytes"), "{status}");
    server.stop().await;
}

/// A PNG whose header promises 50,000 × 50,000 pixels, with correct checksums.
fn huge_png() -> Vec<u8> {
    let mut png = b"\x89PNG\r\n\x1a\n".to_vec();
    let header =
        [&50_000u32.to_be_bytes()[..], &50_000u32.to_be_bytes(), &[8, 2, 0, 0, 0]].concat();
    for (kind, content) in [(b"IHDR", header), (b"IDAT", vec![0x78, 0x9c]), (b"IEND", vec![])] {
        png.extend(u32::try_from(content.len()).unwrap().to_be_bytes());
        let body = [&kind[..], &content].concat();
        png.extend(&body);
        png.extend(crc32(&body).to_be_bytes());
    }
    png
}

/// CRC-32 as PNG defines it.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 }
        })
    })
}
