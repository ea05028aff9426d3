//! Servers that are killed in the middle of their work, and what the others make of it: one server
//! on a folder, and two servers and a worker on PostgreSQL and an S3-compatible store.
//!
//! `CRASHES=N` sets how often (10 unless given), `CRASH_SEED=N` at which moments.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the moments of the kills are shown with --nocapture")]

mod postgres;
mod program;
mod s3;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use program::{Process, Program, Stores};
use tokio_stream::StreamExt as _;
use vitq::artifact::store::{ArtifactStore, LocalArtifactStore, RemoteArtifactStore};
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::longrunning::{ListOperationsRequest, WaitOperationRequest};
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{
    CalibrationDataset, ClassifyRequest, Image, JobMetadata, JobState, ListModelsRequest,
    QuantizeRequest,
};

/// Submits job `number`; its operation, if the server lived long enough to answer.
async fn submit(program: &Program, number: u64) -> Option<String> {
    let request = QuantizeRequest {
        checkpoint: "digits-vit".to_owned(),
        method: "minmax".to_owned(),
        weight_bits: 4,
        activation_bits: 4,
        calibration: Some(Calibration::Dataset(CalibrationDataset {
            name: "digits/calib".to_owned(),
            count: 24,
            files: vec![],
        })),
        model_id: format!("m{number}"),
        request_id: format!("request-{number}"),
        ..QuantizeRequest::default()
    };
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let mut events = client.quantize(request).await.ok()?.into_inner();
    Some(events.next().await?.ok()?.operation)
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().unwrap())
}

/// Equal for equal seeds (Knuth's linear congruence).
struct Moments(u64);

impl Moments {
    fn next(&mut self) -> Duration {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // From before the first job is accepted to behind its end.
        Duration::from_millis((self.0 >> 33) % 400)
    }
}

/// Kills one of the servers and workers at a random moment, again and again, while clients submit
/// jobs; then looks at what is left.
async fn survives(
    stores: &Stores,
    (servers, workers): (usize, usize),
    artifacts: &dyn ArtifactStore,
) {
    let crashes = number("CRASHES", 10);
    let mut moments = Moments(number("CRASH_SEED", 1));
    let mut accepted = BTreeSet::new();
    let mut programs: Vec<Program> = Vec::new();
    let mut helpers: Vec<Process> = Vec::new();
    for crash in 0..crashes {
        while programs.len() < servers {
            programs.push(Program::start(stores).await);
        }
        while helpers.len() < workers {
            helpers.push(Process(stores.program("worker").spawn().unwrap()));
        }
        let moment = moments.next();
        let submitting = async {
            // A client repeats what the last crash may have swallowed, then goes on.
            for number in crash.saturating_sub(1)..=crash {
                if let Some(operation) = submit(&programs[0], number).await {
                    accepted.insert(operation);
                }
            }
            std::future::pending::<()>().await;
        };
        let _ = tokio::time::timeout(moment, submitting).await;
        // The one that took the jobs, or another.
        match moments.next().as_millis() as usize % (servers + workers) {
            server if server < servers => drop(programs.remove(server)),
            worker => drop(helpers.remove(worker - servers)),
        }
        println!("kill {crash} after {} ms, {} jobs accepted", moment.as_millis(), accepted.len());
    }

    drop((programs, helpers));
    let program = Program::start(stores).await;
    for number in 0..crashes {
        accepted.insert(submit(&program, number).await.unwrap());
    }
    assert_eq!(accepted.len() as u64, crashes, "one job for every request id");
    let mut operations = OperationsClient::new(program.channel.clone());
    let mut attempts = 0;
    for name in &accepted {
        let wait = WaitOperationRequest { name: name.clone(), timeout: None };
        let operation = operations.wait_operation(wait).await.unwrap().into_inner();
        let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
        assert_eq!(metadata.state(), JobState::Succeeded, "{name}: {:?}", operation.result);
        attempts += metadata.attempt;
    }
    let list = ListOperationsRequest { page_size: 1000, ..Default::default() };
    let listed = operations.list_operations(list).await.unwrap().into_inner().operations;
    assert_eq!(listed.len(), accepted.len());
    println!("{} jobs in {attempts} attempts", accepted.len());

    // Every model is there, is the same as an undisturbed run's, and answers.
    let undisturbed = submit(&program, crashes).await.unwrap();
    let wait = WaitOperationRequest { name: undisturbed, timeout: None };
    assert!(operations.wait_operation(wait).await.unwrap().into_inner().done);
    let mut models = ModelServiceClient::new(program.channel.clone());
    let list = ListModelsRequest { page_size: 1000, ..Default::default() };
    let models = models.list_models(list).await.unwrap().into_inner().models;
    assert_eq!(models.len() as u64, crashes + 1);
    let digests: BTreeSet<&str> = models.iter().map(|model| model.digest.as_str()).collect();
    assert_eq!(digests.len(), 1);
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/3");
    let image = fs::read_dir(images).unwrap().next().unwrap().unwrap().path();
    let content = fs::read(image).unwrap();
    let mut inference = InferenceServiceClient::new(program.channel.clone());
    for model in &models {
        let images = vec![Image { content: content.clone().into() }];
        let request = ClassifyRequest { model: model.id.clone(), images, top_k: 1 };
        inference.classify(request).await.unwrap();
    }
    // Whatever carries a digest for a name has it.
    let stored = artifacts.older_than(Duration::ZERO).await.unwrap();
    assert!(stored.iter().any(|digest| digests.contains(digest.as_str())));
    for digest in stored {
        artifacts.get(&digest).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_no_job_and_leaves_no_broken_model() {
    let data = tempfile::tempdir().unwrap();
    let folder = data.path().to_str().unwrap().to_owned();
    let stores = Stores { flags: vec!["--data-dir".to_owned(), folder], variables: vec![] };
    let artifacts = LocalArtifactStore::shared(data.path()).unwrap();
    survives(&stores, (1, 0), &artifacts).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_go_on_where_a_killed_one_stopped() {
    let s3 = s3::S3::start().await;
    let flags = [
        "--database",
        &postgres::database().await,
        "--store",
        &s3.url(),
        "--job-lease",
        "1",
        "--data-dir",
        "/nowhere",
    ];
    let flags = flags.map(str::to_owned).to_vec();
    let stores = Stores { flags, variables: s3.settings() };
    let artifacts = RemoteArtifactStore::with_settings(&s3.url(), s3.settings()).unwrap();
    survives(&stores, (2, 1), &artifacts).await;
}
