//! `GRPCInferenceService` as the protocol has it; `tests/program/tritonclient.rs` has a real client.

use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Status};
use vitq::grpc::proto::SetAliasRequest;
use vitq::grpc::proto::classify_item::Outcome;
use vitq::grpc::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use vitq::grpc::proto::inference::infer_parameter::ParameterChoice;
use vitq::grpc::proto::inference::model_infer_request::InferInputTensor;
use vitq::grpc::proto::inference::{
    InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse, ModelReadyRequest,
    ModelRepositoryParameter, ModelStatisticsRequest, RepositoryIndexRequest,
    RepositoryModelLoadRequest, RepositoryModelUnloadRequest, ServerLiveRequest,
    ServerReadyRequest,
};

use crate::server::{TestServer, digit, refusal};

fn client(server: &TestServer) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(server.channel.clone())
}

/// Encoded images as typed contents.
fn request(model: &str, images: Vec<Vec<u8>>) -> ModelInferRequest {
    let input = InferInputTensor {
        name: "image".to_owned(),
        datatype: "BYTES".to_owned(),
        shape: vec![i64::try_from(images.len()).unwrap()],
        contents: Some(InferTensorContents {
            bytes_contents: images.into_iter().map(Into::into).collect(),
            ..InferTensorContents::default()
        }),
        ..InferInputTensor::default()
    };
    ModelInferRequest {
        model_name: model.to_owned(),
        id: "7".to_owned(),
        inputs: vec![input],
        ..ModelInferRequest::default()
    }
}

/// The same with raw contents.
fn raw(mut request: ModelInferRequest) -> ModelInferRequest {
    let contents = request.inputs[0].contents.take().unwrap();
    let mut raw = Vec::new();
    for image in contents.bytes_contents {
        raw.extend(u32::try_from(image.len()).unwrap().to_le_bytes());
        raw.extend(image);
    }
    request.raw_input_contents = vec![raw.into()];
    request
}

async fn infer(
    server: &TestServer,
    request: ModelInferRequest,
) -> Result<ModelInferResponse, Status> {
    Ok(client(server).model_infer(request).await?.into_inner())
}

/// Logits of the images, as `Classify` has them.
async fn classified(server: &TestServer, model: &str, images: Vec<Vec<u8>>) -> Vec<f32> {
    let response = server.classify(model, images).await.unwrap();
    let logits = response.items.into_iter().flat_map(|item| {
        let Some(Outcome::Result(mut result)) = item.outcome else { panic!("an image failed") };
        result.labels.sort_by_key(|label| label.index);
        result.labels.into_iter().map(|label| label.logit)
    });
    logits.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_as_classify_does_in_the_form_of_the_request() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    let digest = server.make("m").await.model.unwrap().digest;
    let images = vec![digit(3, 0), digit(7, 1)];
    let expected = classified(&server, "m", images.clone()).await;

    let typed = infer(&server, request("m", images.clone())).await.unwrap();
    assert!(typed.raw_output_contents.is_empty());
    let [logits, probabilities] = &typed.outputs[..] else { panic!("{:?}", typed.outputs) };
    assert_eq!((logits.name.as_str(), &logits.shape[..]), ("logits", &[2, 10][..]));
    assert_eq!(logits.contents.as_ref().unwrap().fp32_contents, expected);
    let probabilities = &probabilities.contents.as_ref().unwrap().fp32_contents;
    assert!((probabilities[..10].iter().sum::<f32>() - 1.0).abs() < 1e-5);

    let answer = infer(&server, raw(request("m", images.clone()))).await.unwrap();
    assert!(answer.outputs.iter().all(|output| output.contents.is_none()));
    let floats: Vec<u8> = expected.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    assert_eq!(answer.raw_output_contents[0], floats);

    let set = SetAliasRequest { alias: "live".to_owned(), model: "m".to_owned() };
    server.models().set_alias(set).await.unwrap();
    let answer = infer(&server, request("live", images)).await.unwrap();
    let seen = (answer.model_name.as_str(), answer.model_version.as_str(), answer.id.as_str());
    assert_eq!(seen, ("live", "1", "7"));
    let text = |name: &str| answer.parameters[name].parameter_choice.clone().unwrap();
    assert_eq!(text("model"), ParameterChoice::StringParam("m".to_owned()));
    assert_eq!(text("digest"), ParameterChoice::StringParam(digest));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unusable_requests_are_refused_by_field() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let good = || request("m", vec![digit(0, 0), digit(1, 0)]);
    let timeout = InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(1)) };
    let invalid = Code::InvalidArgument;
    type Change = fn(&mut ModelInferRequest);
    let cases: [(Change, Code, &str); 8] = [
        (|r| r.model_name = "absent".to_owned(), Code::NotFound, ""),
        (|r| r.model_name = "../m".to_owned(), invalid, "model_name"),
        (|r| r.model_version = "2".to_owned(), Code::NotFound, ""),
        (|r| r.inputs.clear(), invalid, "inputs"),
        (|r| r.inputs[0].shape = vec![65], invalid, "inputs[0].shape"),
        (|r| r.raw_input_contents = vec![vec![0; 4].into()], invalid, "inputs[0].contents"),
        (
            |r| {
                let contents = r.inputs[0].contents.as_mut().unwrap();
                contents.bytes_contents[1] = b"GIF89a not supported"[..].into();
            },
            invalid,
            "image[1]",
        ),
        (
            |r| {
                r.parameters.insert("timeout".to_owned(), InferParameter::default());
            },
            invalid,
            "parameters.timeout",
        ),
    ];
    for (change, code, field) in cases {
        let mut request = good();
        change(&mut request);
        let status = infer(&server, request).await.unwrap_err();
        let (found, named, _) = refusal(&status);
        assert_eq!((found, named.as_str()), (code, field), "{status}");
    }
    let mut hasty = good();
    hasty.parameters.insert("timeout".to_owned(), timeout);
    let status = infer(&server, hasty).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(infer(&server, good()).await.is_ok());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_keeps_its_order_and_outlives_its_failures() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let requests: Vec<ModelInferRequest> = (0..40)
        .map(|number| {
            let model = if number % 4 == 1 { "absent" } else { "m" };
            let request = request(model, vec![digit(number % 10, 0)]);
            ModelInferRequest { id: number.to_string(), ..request }
        })
        .collect();
    let answers = client(&server).model_stream_infer(tokio_stream::iter(requests)).await.unwrap();
    let answers: Vec<_> = answers.into_inner().collect().await;
    assert_eq!(answers.len(), 40);
    for (number, answer) in answers.into_iter().enumerate() {
        let answer = answer.unwrap();
        let response = answer.infer_response.unwrap();
        assert_eq!(response.id, number.to_string());
        if number % 4 == 1 {
            assert!(answer.error_message.contains("`absent` does not exist"), "{number}");
            assert!(response.outputs.is_empty());
        } else {
            assert_eq!((answer.error_message.as_str(), response.outputs.len()), ("", 2));
            assert!(response.parameters.contains_key("triton_final_response"));
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_repository_loads_and_unloads_and_takes_no_files() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    let mut client = client(&server);
    assert!(client.server_live(ServerLiveRequest {}).await.unwrap().into_inner().live);
    assert!(client.server_ready(ServerReadyRequest {}).await.unwrap().into_inner().ready);
    for name in ["config", "file:1/model.plan"] {
        let parameters = [(name.to_owned(), ModelRepositoryParameter::default())].into();
        let load = RepositoryModelLoadRequest {
            model_name: "m".to_owned(),
            parameters,
            ..Default::default()
        };
        let (code, field, _) = refusal(&client.repository_model_load(load).await.unwrap_err());
        assert_eq!((code, field), (Code::InvalidArgument, format!("parameters.{name}")));
    }
    for is_loaded in [true, false, true] {
        let model_name = "m".to_owned();
        if is_loaded {
            let load = RepositoryModelLoadRequest { model_name, ..Default::default() };
            client.repository_model_load(load).await.unwrap();
        } else {
            let dependents = ("unload_dependents".to_owned(), ModelRepositoryParameter::default());
            let unload = RepositoryModelUnloadRequest {
                model_name,
                parameters: [dependents].into(),
                ..Default::default()
            };
            client.repository_model_unload(unload).await.unwrap();
        }
        let ready = ModelReadyRequest { name: "m".to_owned(), version: String::new() };
        assert_eq!(client.model_ready(ready).await.unwrap().into_inner().ready, is_loaded);
        let all = RepositoryIndexRequest::default();
        let models = client.repository_index(all).await.unwrap().into_inner().models;
        let state = if is_loaded { "READY" } else { "UNAVAILABLE" };
        assert_eq!((models.len(), models[0].state.as_str()), (1, state));
        let ready = RepositoryIndexRequest { ready: true, ..Default::default() };
        let models = client.repository_index(ready).await.unwrap().into_inner().models;
        assert_eq!(models.len(), usize::from(is_loaded));
    }
    let absent = ModelReadyRequest { name: "absent".to_owned(), version: String::new() };
    assert!(!client.model_ready(absent).await.unwrap().into_inner().ready);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_count_calls_images_and_batches() {
    let data = tempfile::tempdir().unwrap();
    let server = TestServer::start(&data).await;
    server.make("m").await;
    infer(&server, request("m", vec![digit(0, 0), digit(1, 0)])).await.unwrap();
    server.classify("m", vec![digit(2, 0)]).await.unwrap();
    infer(&server, request("m", vec![b"no image".to_vec()])).await.unwrap_err();
    let all = ModelStatisticsRequest::default();
    let models = client(&server).model_statistics(all).await.unwrap().into_inner().model_stats;
    let [statistics] = &models[..] else { panic!("{models:?}") };
    assert_eq!((statistics.name.as_str(), statistics.version.as_str()), ("m", "1"));
    assert_eq!(statistics.inference_count, 3, "warming up does not count");
    assert!((2..=3).contains(&statistics.execution_count));
    let calls = statistics.inference_stats.as_ref().unwrap();
    let (success, fail) = (calls.success.unwrap(), calls.fail.unwrap());
    assert_eq!((success.count, fail.count), (2, 1));
    assert!(success.ns >= calls.compute_infer.unwrap().ns && calls.compute_infer.unwrap().ns > 0);
    assert_eq!(statistics.memory_usage[0].r#type, "CPU");
    assert!(statistics.memory_usage[0].byte_size > 0);
    server.stop().await;
}
