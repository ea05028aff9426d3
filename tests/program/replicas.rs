//! Two servers that run no jobs and a worker, on one PostgreSQL and one S3-compatible store.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use vitq::digest::sha256_hex;
use vitq::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use vitq::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::CancelOperationRequest;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::upload_request::Part;
use vitq::grpc::proto::upload_service_client::UploadServiceClient;
use vitq::grpc::proto::{
    CalibrationDataset, CalibrationImages, Checkpoint, ClassifyRequest, ClassifyResponse,
    DeleteAliasRequest, DeleteCheckpointRequest, DeleteModelRequest, EvaluateRequest,
    GetCheckpointRequest, Image, QuantizeEvent, QuantizeRequest, SetAliasRequest, UploadHeader,
    UploadKind, UploadRequest, WatchRequest, evaluate_event,
};

use crate::program::{Process, Program, Stores};
use crate::{postgres, s3};

/// The bytes of some validation images.
fn digits(count: usize) -> Vec<Image> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/3");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.iter().take(count).map(|f| Image { content: fs::read(f).unwrap().into() }).collect()
}

fn request(model: &str, calibration: Calibration) -> QuantizeRequest {
    QuantizeRequest {
        checkpoint: "digits-vit".to_owned(),
        method: "ubb".to_owned(),
        weight_bits: 4,
        activation_bits: 4,
        calibration: Some(calibration),
        model_id: model.to_owned(),
        ..QuantizeRequest::default()
    }
}

async fn classify(server: &Program, model: &str) -> Result<ClassifyResponse, Status> {
    let request = ClassifyRequest {
        model: model.to_owned(),
        images: digits(1),
        top_k: 3,
        ..Default::default()
    };
    let mut client = InferenceServiceClient::new(server.channel.clone());
    Ok(client.classify(request).await?.into_inner())
}

/// Everything that follows an event, as another server tells it.
async fn watch(server: &Program, name: &str, after_sequence: u64) -> Vec<QuantizeEvent> {
    let request = WatchRequest { name: name.to_owned(), after_sequence };
    let mut client = QuantizationServiceClient::new(server.channel.clone());
    let events = client.watch(request).await.unwrap().into_inner();
    events.collect::<Result<Vec<_>, _>>().await.unwrap()
}

/// Brings the demo's checkpoint to a server.
async fn bring(server: &Program, name: &str) -> Checkpoint {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/checkpoints/digits-vit");
    let weights = fs::read(folder.join("model.safetensors")).unwrap();
    let header = UploadHeader {
        kind: UploadKind::Checkpoint.into(),
        name: name.to_owned(),
        config: fs::read_to_string(folder.join("config.json")).unwrap(),
        bytes: weights.len() as u64,
        sha256: sha256_hex(&weights),
        ..UploadHeader::default()
    };
    let chunks = weights.chunks(1 << 20).map(|chunk| Part::Chunk(chunk.to_vec().into()));
    let parts = std::iter::once(Part::Header(header)).chain(chunks);
    let messages = parts.map(|part| UploadRequest { part: Some(part) }).collect::<Vec<_>>();
    let mut client = UploadServiceClient::new(server.channel.clone());
    let answer = client.upload(tokio_stream::iter(messages)).await.unwrap().into_inner();
    assert!(answer.upload.unwrap().complete);
    let mut client = CheckpointServiceClient::new(server.channel.clone());
    let request = GetCheckpointRequest { name: name.to_owned() };
    client.get_checkpoint(request).await.unwrap().into_inner().checkpoint.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_and_workers_share_jobs_models_and_aliases() {
    let s3 = s3::S3::start().await;
    let (database, url) = (postgres::database().await, s3.url());
    let cache = tempfile::tempdir().unwrap();
    let cache = cache.path().to_str().unwrap();
    let flags = ["--database", database.as_str(), "--store", url.as_str(), "--cache-dir", cache];
    let with = |more: &[&str]| {
        let flags = flags.iter().chain(&["--data-dir", "/nowhere"]).chain(more);
        let flags = flags.map(|flag| (*flag).to_owned()).collect();
        Stores { flags, variables: s3.settings() }
    };
    let _worker = Process(with(&[]).program("worker").spawn().unwrap());
    let serving = with(&["--workers", "0"]);
    let (one, other) = (Program::start(&serving).await, Program::start(&serving).await);

    // Asked of one, with images that come along; run by the worker; told by the other.
    let images = Calibration::Images(CalibrationImages { images: digits(4) });
    let mut client = QuantizationServiceClient::new(one.channel.clone());
    let mut events = client.quantize(request("m", images)).await.unwrap().into_inner();
    let accepted = events.next().await.unwrap().unwrap();
    let told = watch(&other, &accepted.operation, accepted.sequence).await;
    let Some(Event::Result(result)) = &told.last().unwrap().event else { panic!("{told:?}") };
    let mut heard: Vec<QuantizeEvent> = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    heard.retain(|event| !matches!(event.event, Some(Event::Heartbeat(_))));
    let numbers = |events: &[QuantizeEvent]| events.iter().map(|e| e.sequence).collect::<Vec<_>>();
    assert_eq!(numbers(&heard), numbers(&told));

    let digest = result.model.clone().unwrap().digest;
    let (mine, yours) = (classify(&one, "m").await.unwrap(), classify(&other, "m").await.unwrap());
    assert_eq!(mine.items, yours.items);
    assert_eq!((mine.model_version, yours.model_version), (digest.clone(), digest));

    // Evaluated by the worker, which loads the model from the store.
    let evaluate = EvaluateRequest {
        model: "m".to_owned(),
        dataset: "digits/val".to_owned(),
        limit: 20,
        ..Default::default()
    };
    let mut client = EvaluationServiceClient::new(other.channel.clone());
    let events = client.evaluate(evaluate).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(evaluate_event::Event::Result(result)) = &events.last().unwrap().event else {
        panic!("{events:?}")
    };
    assert_eq!(result.metrics.as_ref().unwrap().images, 20);

    // An alias set by one is known to the other at once: it asks when it does not know a name.
    let mut models = ModelServiceClient::new(one.channel.clone());
    let alias = || SetAliasRequest { alias: "live".to_owned(), model: "m".to_owned() };
    models.set_alias(alias()).await.unwrap();
    assert_eq!(classify(&other, "live").await.unwrap().model, "m");

    // Cancelled through the server that did not accept it.
    let many = CalibrationDataset { name: "digits/calib".to_owned(), count: 256, files: vec![] };
    let slow = QuantizeRequest {
        checkpoint: "digits-swin".to_owned(),
        ..request("slow", Calibration::Dataset(many))
    };
    let mut client = QuantizationServiceClient::new(one.channel.clone());
    let mut events = client.quantize(slow).await.unwrap().into_inner();
    let name = loop {
        let event = events.next().await.unwrap().unwrap();
        if matches!(event.event, Some(Event::Progress(_))) {
            break event.operation;
        }
    };
    let mut operations = OperationsClient::new(other.channel.clone());
    operations.cancel_operation(CancelOperationRequest { name }).await.unwrap();
    let rest = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(Event::Error(status)) = &rest.last().unwrap().event else { panic!("{rest:?}") };
    assert_eq!(status.code, i32::from(Code::Cancelled));

    // Brought to one, checked and used by the worker, seen and deleted by the other.
    let brought = bring(&one, "brought").await;
    let images = Calibration::Images(CalibrationImages { images: digits(4) });
    let used =
        QuantizeRequest { checkpoint: "brought".to_owned(), ..request("of-brought", images) };
    let mut client = QuantizationServiceClient::new(other.channel.clone());
    let events = client.quantize(used).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(Event::Result(result)) = &events.last().unwrap().event else { panic!("{events:?}") };
    assert_eq!(result.model.as_ref().unwrap().source_digest, brought.digest);
    let mut checkpoints = CheckpointServiceClient::new(other.channel.clone());
    let delete = DeleteCheckpointRequest { name: "brought".to_owned() };
    checkpoints.delete_checkpoint(delete).await.unwrap();
    let get = GetCheckpointRequest { name: "brought".to_owned() };
    let mut checkpoints = CheckpointServiceClient::new(one.channel.clone());
    assert_eq!(checkpoints.get_checkpoint(get).await.unwrap_err().code(), Code::NotFound);
    models.delete_model(DeleteModelRequest { model: "of-brought".to_owned() }).await.unwrap();

    // Deleted by one, gone from the other within seconds, and from the store.
    models.delete_alias(DeleteAliasRequest { alias: "live".to_owned() }).await.unwrap();
    models.delete_model(DeleteModelRequest { model: "m".to_owned() }).await.unwrap();
    let forgotten = async {
        while classify(&other, "m").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), forgotten).await.unwrap();
    let status = classify(&other, "m").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status}");
    assert_eq!(fs::read_dir(s3.objects()).map_or(0, Iterator::count), 0);
}

#[test]
fn a_worker_without_a_database_and_a_second_server_on_a_folder_say_what_is_wrong() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().to_str().unwrap().to_owned();
    let stores = Stores { flags: vec!["--data-dir".to_owned(), folder], variables: vec![] };
    let refusal = |command: &str, code: i32| {
        let mut program = stores.program(command);
        let output = program.stderr(std::process::Stdio::piped()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{command}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refusal("worker", 2).contains("database: a worker needs the database"));
    let _claim = vitq::artifact::store::claim_folder(data.path()).unwrap();
    assert!(refusal("serve", 1).contains("is in use by another server"));
}
