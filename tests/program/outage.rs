//! Stores that are out of reach for a while: what clients see, and that nothing is lost.
//!
//! `OUTAGE=SECONDS` sets for how long (4 unless given).

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::WaitOperationRequest;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{
    ClassifyRequest, ClassifyResponse, Image, JobMetadata, JobState, ListModelsRequest,
    QuantizeRequest,
};

use crate::gate::{Gate, outage};
use crate::program::{Program, Stores};
use crate::s3::S3;
use crate::{postgres, requests};

fn quantize(model: &str, images: u32) -> QuantizeRequest {
    requests::digits(model, "ubb", images)
}

/// Submits a job; its operation once it calibrates.
async fn start(program: &Program, request: QuantizeRequest) -> String {
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let mut events = client.quantize(request).await.unwrap().into_inner();
    loop {
        let event = events.next().await.unwrap().unwrap();
        if matches!(&event.event, Some(Event::Progress(p)) if p.units > 0) {
            return event.operation;
        }
    }
}

async fn finish(program: &Program, operation: &str) -> JobMetadata {
    let mut client = OperationsClient::new(program.channel.clone());
    let wait = || WaitOperationRequest { name: operation.to_owned(), timeout: None };
    let operation = client.wait_operation(wait()).await.unwrap().into_inner();
    operation.metadata.unwrap().to_msg().unwrap()
}

async fn classify(program: &Program, model: &str) -> Result<ClassifyResponse, Status> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/3");
    let file = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let images = vec![Image { content: fs::read(file).unwrap().into() }];
    let request =
        ClassifyRequest { model: model.to_owned(), images, top_k: 1, ..Default::default() };
    let mut client = InferenceServiceClient::new(program.channel.clone());
    Ok(client.classify(request).await?.into_inner())
}

fn reason(status: &Status) -> (Code, String) {
    let info = status.get_error_details().error_info().map(|info| info.reason.clone());
    (status.code(), info.unwrap_or_default())
}

/// A server whose database is behind a gate.
async fn server(s3: &S3) -> (Gate, Program) {
    let (gate, database) = Gate::to_database(&postgres::database().await).await;
    let flags = ["--database", &database, "--store", &s3.url(), "--data-dir", "/nowhere"];
    let flags = flags.map(str::to_owned).to_vec();
    let program = Program::start(&Stores { flags, variables: s3.settings() }).await;
    (gate, program)
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_database_a_server_answers_what_it_can_and_loses_nothing() {
    let s3 = S3::start().await;
    let (gate, program) = server(&s3).await;
    let made = start(&program, quantize("made", 2)).await;
    assert_eq!(finish(&program, &made).await.state(), JobState::Succeeded);
    classify(&program, "made").await.unwrap();

    let running = start(&program, quantize("running", 24)).await;
    gate.set_open(false);
    let closed = Instant::now();
    let mut models = ModelServiceClient::new(program.channel.clone());
    while closed.elapsed() < outage() {
        // What is loaded answers; what needs the database says so, and that a retry is worthwhile.
        classify(&program, "made").await.unwrap();
        let status = models.list_models(ListModelsRequest::default()).await.unwrap_err();
        assert_eq!(reason(&status), (Code::Unavailable, "STORE_UNAVAILABLE".to_owned()));
        assert!(status.get_details_retry_info().is_some());
        assert!(!status.message().contains("127.0.0.1"), "{status}");
        let mut client = QuantizationServiceClient::new(program.channel.clone());
        let status = client.quantize(quantize("refused", 2)).await.unwrap_err();
        assert_eq!(reason(&status), (Code::Unavailable, "STORE_UNAVAILABLE".to_owned()));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    gate.set_open(true);
    let metadata = finish(&program, &running).await;
    assert_eq!((metadata.state(), metadata.attempt), (JobState::Succeeded, 1));
    classify(&program, "running").await.unwrap();
    let listed = models.list_models(ListModelsRequest::default()).await.unwrap().into_inner();
    let ids: Vec<&str> = listed.models.iter().map(|model| model.id.as_str()).collect();
    assert_eq!(ids, ["made", "running"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_a_bucket_that_refuses_writes() {
    let s3 = S3::start().await;
    let (_gate, program) = server(&s3).await;
    let objects = s3.objects();
    fs::create_dir_all(objects.parent().unwrap()).unwrap();
    // Where the objects' folder should be is a file: every write fails.
    fs::write(&objects, b"in the way").unwrap();
    let operation = start(&program, quantize("m", 2)).await;
    tokio::time::sleep(outage()).await;
    let status = classify(&program, "m").await.unwrap_err();
    assert_eq!(reason(&status), (Code::NotFound, "MODEL_NOT_FOUND".to_owned()), "not listed yet");
    fs::remove_file(&objects).unwrap();
    assert_eq!(finish(&program, &operation).await.state(), JobState::Succeeded);
    classify(&program, "m").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_not_ready_before_its_bucket_has_answered() {
    let s3 = S3::start().await;
    s3.accept(false);
    let data = tempfile::tempdir().unwrap();
    let flags = ["--store", &s3.url(), "--data-dir", data.path().to_str().unwrap()];
    let flags = flags.map(str::to_owned).to_vec();
    let program = Program::start(&Stores { flags, variables: s3.settings() }).await;
    let mut health = HealthClient::new(program.channel.clone());
    let whole = HealthCheckRequest::default;
    let mut changes = health.watch(whole()).await.unwrap().into_inner();
    assert_eq!(changes.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    tokio::time::sleep(outage()).await;
    let status = health.check(whole()).await.unwrap().into_inner().status();
    assert_eq!(status, ServingStatus::NotServing);
    s3.accept(true);
    assert_eq!(changes.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
}
