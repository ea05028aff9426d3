//! Loading, answering and unloading for a long time: memory stays where it is.
//!
//! `SOAK_CYCLES` says how often (200 unless given).

use std::fs;

use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::transport::Channel;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::{
    ClassifyRequest, Image, LoadModelRequest, QuantizeRequest, UnloadModelRequest,
};

use crate::memory::allocated;
use crate::server::{digit, quick, refusal, result};
use crate::shutdown::Program;

/// Cycles after which every kind of memory has been used once.
const WARM_UP: usize = 40;
/// How much more memory may be held at the end than after the warm-up.
const GROWTH: f64 = 0.02;

struct Client {
    channel: Channel,
}

impl Client {
    async fn make(&self, model: &str, bits: u32) -> String {
        let request = QuantizeRequest { weight_bits: bits, ..quick(model) };
        let mut client = QuantizationServiceClient::new(self.channel.clone());
        let events = client.quantize(request).await.unwrap().into_inner();
        let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
        result(events).model.unwrap().digest
    }

    async fn load(&self, model: &str) -> Result<(), tonic::Status> {
        let request = LoadModelRequest { model: model.to_owned() };
        ModelServiceClient::new(self.channel.clone()).load_model(request).await.map(drop)
    }

    async fn unload(&self, model: &str) {
        let request = UnloadModelRequest { model: model.to_owned() };
        ModelServiceClient::new(self.channel.clone()).unload_model(request).await.unwrap();
    }

    async fn classify(&self, model: &str) {
        let images = (0..4).map(|class| Image { content: digit(class, 0).into() }).collect();
        let request = ClassifyRequest { model: model.to_owned(), images, ..Default::default() };
        let answer = InferenceServiceClient::new(self.channel.clone()).classify(request).await;
        assert_eq!(answer.unwrap().into_inner().items.len(), 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_stays_where_it_is_when_models_come_and_go_and_half_of_them_fail() {
    let cycles: usize = std::env::var("SOAK_CYCLES").map_or(200, |text| text.parse().unwrap());
    assert!(cycles > WARM_UP);
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), "export VITQ_MAX_BATCH=4;");
    let client = Client { channel: program.channel().await };
    client.make("good", 8).await;
    let bad = client.make("bad", 6).await;
    let artifact = data.path().join(format!("objects/sha256/{bad}.safetensors"));
    let mut bytes = fs::read(&artifact).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::remove_file(&artifact).unwrap(); // it is read-only
    fs::write(&artifact, bytes).unwrap();

    let mut held = Vec::new();
    for _ in 0..cycles {
        client.load("good").await.unwrap();
        client.classify("good").await;
        client.unload("good").await;
        let status = client.load("bad").await.unwrap_err();
        assert_eq!(refusal(&status).0, Code::DataLoss, "{status}");
        held.push(allocated(&program));
    }
    let most = |range: &[u64]| range.iter().copied().max().unwrap() as f64;
    let (before, after) = (most(&held[WARM_UP - 10..WARM_UP]), most(&held[cycles - 10..]));
    println!("after {WARM_UP} cycles {before} bytes, after {cycles} {after}");
    assert!(after < before * (1.0 + GROWTH), "{before} bytes grew to {after}: {held:?}");
}
