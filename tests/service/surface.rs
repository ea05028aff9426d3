//! Health, reflection, catalogue: what a client can find out without knowing anything.

use tokio_stream::StreamExt as _;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use vitq::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use vitq::grpc::proto::dataset_service_client::DatasetServiceClient;
use vitq::grpc::proto::method_option::Type;
use vitq::grpc::proto::{ListCheckpointsRequest, ListDatasetsRequest, ListMethodsRequest};
use vitq::methods::METHODS;

use crate::server::TestServer;

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_name_every_service() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let mut reflection = ServerReflectionClient::new(server.channel.clone());
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers =
        reflection.server_reflection_info(tokio_stream::once(ask)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(services)) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<String> = services.service.into_iter().map(|service| service.name).collect();
    for name in [
        "vitq.v1.QuantizationService",
        "vitq.v1.InferenceService",
        "inference.GRPCInferenceService",
        "vitq.v1.EvaluationService",
        "vitq.v1.ModelService",
        "vitq.v1.CatalogService",
        "vitq.v1.CheckpointService",
        "vitq.v1.DatasetService",
        "google.longrunning.Operations",
    ] {
        assert!(names.iter().any(|n| n == name), "{name} is not in {names:?}");
        let check = HealthCheckRequest { service: name.to_owned() };
        let mut health = HealthClient::new(server.channel.clone());
        let status = health.check(check).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{name}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogue_describes_methods_checkpoints_and_data_sets() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let methods = server.catalog().list_methods(ListMethodsRequest {}).await.unwrap().into_inner();
    let ids: Vec<&str> = methods.methods.iter().map(|method| method.id.as_str()).collect();
    assert_eq!(ids, METHODS.iter().map(|method| method.id).collect::<Vec<_>>());
    let options = methods.methods.iter().flat_map(|method| &method.options);
    for option in options {
        assert!(option.r#type.is_some() && !option.help.is_empty(), "{option:?}");
        if let Some(Type::ChoiceOption(choice)) = &option.r#type {
            assert!(choice.choices.contains(&option.default_value));
        }
    }
    let mut checkpoints = CheckpointServiceClient::new(server.channel.clone());
    let list = ListCheckpointsRequest::default();
    let found = checkpoints.list_checkpoints(list).await.unwrap().into_inner().checkpoints;
    let names: Vec<&str> = found.iter().map(|checkpoint| checkpoint.name.as_str()).collect();
    assert_eq!(names, ["digits-swin", "digits-vit"]);
    assert!(found.iter().all(|c| c.bytes > 0 && !c.architecture.is_empty()));
    let mut datasets = DatasetServiceClient::new(server.channel.clone());
    let list = ListDatasetsRequest { page_size: 1, page_token: String::new() };
    let first = datasets.list_datasets(list).await.unwrap().into_inner();
    assert_eq!((first.datasets[0].name.as_str(), first.datasets[0].images), ("digits/calib", 256));
    let list = ListDatasetsRequest { page_size: 1, page_token: first.next_page_token };
    let second = datasets.list_datasets(list).await.unwrap().into_inner();
    assert_eq!((second.datasets[0].name.as_str(), second.datasets[0].images), ("digits/val", 450));
    assert_eq!(second.next_page_token, "");
    server.stop().await;
}
