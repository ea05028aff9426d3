//! `ModelService`.

use std::fs;

use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use vitq::engine::names::ModelId;
use vitq::grpc::ServerConfig;
use vitq::grpc::proto::model::State;
use vitq::grpc::proto::{
    DeleteAliasRequest, DeleteModelRequest, GetModelRequest, ListModelsRequest, LoadModelRequest,
    Model, QuantizeRequest, SetAliasRequest, UnloadModelRequest,
};

use crate::server::{Setup, TestServer, digit, quick, refusal, result};

async fn list(server: &TestServer, page_size: i32, page_token: &str) -> (Vec<Model>, String) {
    let request = ListModelsRequest { page_size, page_token: page_token.to_owned() };
    let response = server.models().list_models(request).await.unwrap().into_inner();
    (response.models, response.next_page_token)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alias_moves_traffic_from_model_to_model() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let first = server.make("first").await.model.unwrap();
    let request = QuantizeRequest { weight_bits: 6, ..quick("second") };
    let second = result(server.quantize(request).await.unwrap()).model.unwrap();
    assert_ne!(first.digest, second.digest);
    let mut models = server.models();
    let set = async |alias: &str, model: &str| {
        let request = SetAliasRequest { alias: alias.to_owned(), model: model.to_owned() };
        server.models().set_alias(request).await
    };
    for model in [&first, &second] {
        let answer = set("live", &model.id).await.unwrap().into_inner().model.unwrap();
        assert_eq!(
            (answer.id.as_str(), &answer.aliases[..]),
            (model.id.as_str(), &["live".to_owned()][..])
        );
        let answer = server.classify("live", vec![digit(0, 0)]).await.unwrap();
        assert_eq!((&answer.model, &answer.model_version), (&model.id, &model.digest));
        let get = GetModelRequest { model: "live".to_owned() };
        assert_eq!(models.get_model(get).await.unwrap().into_inner().model.unwrap().id, model.id);
    }
    let delete = |model: &str| DeleteModelRequest { model: model.to_owned() };
    let status = models.delete_model(delete("second")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "an alias names it");
    // An alias leads to its model, but stands for itself where something is removed.
    let status = models.delete_model(delete("live")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("`live` is an alias of model `second`"), "{status}");
    let unload = UnloadModelRequest { model: "live".to_owned() };
    let status = models.unload_model(unload).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("`live` is an alias of model `second`"), "{status}");
    // The two kinds of names do not mix.
    assert_eq!(refusal(&set("first", "second").await.unwrap_err()).2, "MODEL_ALREADY_EXISTS");
    assert_eq!(refusal(&set("new", "unknown").await.unwrap_err()).2, "MODEL_NOT_FOUND");
    assert_eq!(refusal(&set("Not An Id", "first").await.unwrap_err()).1, "alias");
    let error = failure(server.quantize(quick("live")).await);
    assert_eq!(error, "MODEL_ALREADY_EXISTS");
    server.stop().await;

    let server = TestServer::start(&data).await;
    let mut models = server.models();
    assert_eq!(server.classify("live", vec![digit(0, 0)]).await.unwrap().model, "second");
    let forget = || DeleteAliasRequest { alias: "live".to_owned() };
    models.delete_alias(forget()).await.unwrap();
    let status = models.delete_alias(forget()).await.unwrap_err();
    assert_eq!(refusal(&status).2, "ALIAS_NOT_FOUND");
    let status = server.classify("live", vec![digit(0, 0)]).await.unwrap_err();
    assert_eq!(refusal(&status).2, "MODEL_NOT_FOUND");
    models.delete_model(delete("second")).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_ready_without_a_model_that_nobody_made_and_loads_it_once_it_is_there() {
    let data = tempfile::tempdir().unwrap();
    let preload = vec![ModelId::parse("later", "preload").unwrap()];
    let config = ServerConfig { preload, ..ServerConfig::default() };
    let server = TestServer::with(&data, Setup { server: config, ..Setup::default() }).await;
    let serves = async |service: &str| {
        let watched = HealthCheckRequest { service: service.to_owned() };
        let mut health = HealthClient::new(server.channel.clone());
        let mut states = health.watch(watched).await.unwrap().into_inner();
        while states.message().await.unwrap().unwrap().status() != ServingStatus::Serving {}
    };
    serves("").await;
    let made = server.make("later").await.model.unwrap();
    assert_eq!(made.state(), State::Stored);
    serves("model/later").await;
    server.stop().await;
}

/// The reason of a call that was refused at once.
fn failure<T: std::fmt::Debug>(answer: Result<T, tonic::Status>) -> String {
    refusal(&answer.unwrap_err()).2
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_listed_loaded_unloaded_and_deleted() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let stored = server.make("b").await.model.unwrap();
    assert_eq!(stored.state(), State::Stored);
    server.make("a").await;
    server.make("c").await;
    let (page, token) = list(&server, 2, "").await;
    assert_eq!(page.iter().map(|m| m.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    let (page, end) = list(&server, 2, &token).await;
    assert_eq!((page[0].id.as_str(), page.len(), end.as_str()), ("c", 1, ""));

    let mut models = server.models();
    let model = || "b".to_owned();
    let loaded = models.load_model(LoadModelRequest { model: model() }).await.unwrap();
    let loaded = loaded.into_inner().model.unwrap();
    assert_eq!((loaded.state(), loaded.device.as_str()), (State::Ready, "cpu"));
    assert!(loaded.resident_bytes > 0);
    let unloaded = models.unload_model(UnloadModelRequest { model: model() }).await.unwrap();
    assert_eq!(unloaded.into_inner().model.unwrap().state(), State::Stored);
    models.unload_model(UnloadModelRequest { model: model() }).await.unwrap();
    server.classify("b", vec![digit(0, 0)]).await.unwrap();
    let full = models.get_model(GetModelRequest { model: model() }).await.unwrap().into_inner();
    assert_eq!(full.model.unwrap().state(), State::Ready, "a call loads what it needs");
    assert!(!full.report.unwrap().sites.is_empty());
    assert_eq!(full.class_labels.len(), 10);

    // The three were made alike, so they share one artifact until the last is gone.
    let objects = data.path().join("objects/sha256");
    for (model, left) in [("b", 1), ("a", 1), ("c", 0)] {
        models.delete_model(DeleteModelRequest { model: model.to_owned() }).await.unwrap();
        assert_eq!(fs::read_dir(&objects).unwrap().count(), left, "after {model}");
    }
    assert!(list(&server, 0, "").await.0.is_empty());
    let status = server.classify("b", vec![digit(0, 0)]).await.unwrap_err();
    assert_eq!(refusal(&status).2, "MODEL_NOT_FOUND");
    server.make("b").await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_models_and_foreign_tokens_are_refused() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let mut models = server.models();
    let absent = || "absent".to_owned();
    let statuses = [
        models.get_model(GetModelRequest { model: absent() }).await.unwrap_err(),
        models.load_model(LoadModelRequest { model: absent() }).await.unwrap_err(),
        models.unload_model(UnloadModelRequest { model: absent() }).await.unwrap_err(),
        models.delete_model(DeleteModelRequest { model: absent() }).await.unwrap_err(),
    ];
    assert!(statuses.iter().all(|status| status.code() == Code::NotFound), "{statuses:?}");
    for (page_size, page_token, field) in [(-1, "", "page_size"), (1, "abc", "page_token")] {
        let request = ListModelsRequest { page_size, page_token: page_token.to_owned() };
        let status = models.list_models(request).await.unwrap_err();
        assert_eq!(refusal(&status).1, field);
    }
    server.stop().await;
}
