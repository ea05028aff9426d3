//! Restarts: what is stored is served again, and what is damaged is found.

use std::fs;

use tonic::Code;
use vitq::grpc::proto::model::State;
use vitq::grpc::proto::{ClassifyItem, GetModelRequest, ListModelsRequest};

use crate::server::{Setup, TestServer, digit, refusal};

async fn classify(server: &TestServer, model: &str) -> Vec<ClassifyItem> {
    server.classify(model, vec![digit(4, 0), digit(9, 3)]).await.unwrap().items
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_answers_alike_without_the_checkpoint() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let made = server.make("m").await.model.unwrap();
    let before = classify(&server, "m").await;
    server.stop().await;
    // What a kill in the middle of a write leaves.
    fs::write(data.path().join("objects/sha256/.writing-y"), b"half").unwrap();

    let setup = Setup { checkpoints: None, datasets: None, ..Setup::default() };
    let server = TestServer::with(&data, setup).await;
    let listed = server.models().list_models(ListModelsRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().models, [made]);
    assert_eq!(classify(&server, "m").await, before);
    assert_eq!(fs::read_dir(data.path().join("objects/sha256")).unwrap().count(), 1);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_is_data_loss_for_its_model_alone() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let digest = server.make("damaged").await.model.unwrap().digest;
    let mut other = crate::server::quick("whole");
    other.weight_bits = 6;
    crate::server::result(server.quantize(other).await.unwrap());
    server.stop().await;
    let file = data.path().join("objects/sha256").join(format!("{digest}.safetensors"));
    let mut bytes = fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();

    let server = TestServer::start(&data).await;
    let status = server.classify("damaged", vec![digit(0, 0)]).await.unwrap_err();
    assert_eq!(refusal(&status), (Code::DataLoss, String::new(), "CORRUPT_ARTIFACT".to_owned()));
    let get = GetModelRequest { model: "damaged".to_owned() };
    let model = server.models().get_model(get).await.unwrap().into_inner().model.unwrap();
    assert_eq!(model.state(), State::Failed);
    assert_eq!(model.error.unwrap().code, i32::from(Code::DataLoss));
    classify(&server, "whole").await;
    server.stop().await;
}
