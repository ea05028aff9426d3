//! Servers that are killed in the middle of their work, and what the next one makes of it.
//!
//! `CRASHES=N` sets how often (10 unless given), `CRASH_SEED=N` at which moments.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the moments of the kills are shown with --nocapture")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
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

/// The real program; killed, without a chance to say goodbye, when dropped.
struct Program {
    child: Child,
    channel: Channel,
}

impl Program {
    async fn start(data: &Path) -> Self {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo");
        let mut child = Command::new(env!("CARGO_BIN_EXE_vitq"))
            .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
            .env("OMP_NUM_THREADS", "1")
            .args(["--device", "cpu", "--job-attempts", "1000", "--max-queued-jobs", "1000"])
            .arg("--data-dir")
            .arg(data)
            .arg("--checkpoints")
            .arg(demo.join("checkpoints"))
            .arg("--datasets")
            .arg(demo.join("datasets"))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on ").unwrap().to_owned();
        let channel = Channel::from_shared(address).unwrap().connect().await.unwrap();
        Self { child, channel }
    }

    /// Submits job `number`; its operation, if the server lived long enough to answer.
    async fn submit(&self, number: u64) -> Option<String> {
        let request = QuantizeRequest {
            checkpoint: "digits-vit".to_owned(),
            method: "minmax".to_owned(),
            weight_bits: 4,
            activation_bits: 4,
            calibration: Some(Calibration::Dataset(CalibrationDataset {
                name: "digits/calib".to_owned(),
                count: 8,
                files: vec![],
            })),
            model_id: format!("m{number}"),
            request_id: format!("request-{number}"),
            ..QuantizeRequest::default()
        };
        let mut client = QuantizationServiceClient::new(self.channel.clone());
        let mut events = client.quantize(request).await.ok()?.into_inner();
        Some(events.next().await?.ok()?.operation)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_loses_no_job_and_leaves_no_broken_model() {
    let data = tempfile::tempdir().unwrap();
    let crashes = number("CRASHES", 10);
    let mut moments = Moments(number("CRASH_SEED", 1));
    let mut accepted = BTreeSet::new();
    for crash in 0..crashes {
        let program = Program::start(data.path()).await;
        let moment = moments.next();
        let submitting = async {
            // A client repeats what the last crash may have swallowed, then goes on.
            for number in crash.saturating_sub(1)..=crash {
                if let Some(operation) = program.submit(number).await {
                    accepted.insert(operation);
                }
            }
            std::future::pending::<()>().await;
        };
        let _ = tokio::time::timeout(moment, submitting).await;
        drop(program);
        println!("kill {crash} after {} ms, {} jobs accepted", moment.as_millis(), accepted.len());
    }

    let program = Program::start(data.path()).await;
    for number in 0..crashes {
        accepted.insert(program.submit(number).await.unwrap());
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
    let undisturbed = program.submit(crashes).await.unwrap();
    let wait = WaitOperationRequest { name: undisturbed, timeout: None };
    assert!(operations.wait_operation(wait).await.unwrap().into_inner().done);
    let mut models = ModelServiceClient::new(program.channel.clone());
    let list = ListModelsRequest { page_size: 1000, ..Default::default() };
    let models = models.list_models(list).await.unwrap().into_inner().models;
    assert_eq!(models.len() as u64, crashes + 1);
    let digests: BTreeSet<&str> = models.iter().map(|model| model.digest.as_str()).collect();
    assert_eq!(digests.len(), 1);
    let image =
        fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/3"));
    let content = fs::read(image.unwrap().next().unwrap().unwrap().path()).unwrap();
    let mut inference = InferenceServiceClient::new(program.channel.clone());
    for model in &models {
        let images = vec![Image { content: content.clone().into() }];
        let request = ClassifyRequest { model: model.id.clone(), images, top_k: 1 };
        inference.classify(request).await.unwrap();
    }
    // Whatever carries a digest for a name has it.
    for entry in fs::read_dir(data.path().join("objects/sha256")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let digest = Sha256::digest(fs::read(&path).unwrap());
            let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(path.file_stem().unwrap().to_str().unwrap(), hex);
        }
    }
}
