//! `ModelService`.

use std::fs;

use tonic::Code;
use vitq::grpc::proto::model::State;
use vitq::grpc::proto::{
    DeleteModelRequest, GetModelRequest, ListModelsRequest, LoadModelRequest, Model,
    UnloadModelRequest,
};

use crate::server::{TestServer, digit, refusal};

async fn list(server: &TestServer, page_size: i32, page_token: &str) -> (Vec<Model>, String) {
    let request = ListModelsRequest { page_size, page_token: page_token.to_owned() };
    let response = server.models().list_models(request).await.unwrap().into_inner();
    (response.models, response.next_page_token)
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
