//! Servers that are killed in the middle of their work, and what the others make of it: one server
//! on a folder, and two servers and a worker on PostgreSQL and an S3-compatible store.
//!
//! `CRASHES=N` sets how often (10 unless given), `CRASH_SEED=N` at which moments.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use tokio_stream::StreamExt as _;
use tonic::Code;
use vitq::artifact::store::{ArtifactStore, LocalArtifactStore, RemoteArtifactStore};
use vitq::digest::{hex, sha256_hex};
use vitq::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::longrunning::{ListOperationsRequest, WaitOperationRequest};
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::upload_request::Part;
use vitq::grpc::proto::upload_service_client::UploadServiceClient;
use vitq::grpc::proto::{
    ClassifyRequest, GetUploadRequest, Image, JobMetadata, JobState, ListCheckpointsRequest,
    ListModelsRequest, QuantizeRequest, Upload, UploadHeader, UploadKind, UploadRequest,
};
use vitq::model::generated::{GeneratedOptions, generate};

use crate::program::{Process, Program, Stores};
use crate::{postgres, requests, s3};

/// Whether a part, and not all, of an upload has come.
async fn is_half_here(program: &Program, number: u64) -> bool {
    let name = format!("brought/{number}");
    let request = GetUploadRequest { kind: UploadKind::Checkpoint.into(), name };
    let mut client = UploadServiceClient::new(program.channel.clone());
    let upload = client.get_upload(request).await.map(|answer| answer.into_inner().upload.unwrap());
    upload.is_ok_and(|upload| !upload.complete && upload.received_bytes > 0)
}

fn request(number: u64) -> QuantizeRequest {
    QuantizeRequest {
        request_id: format!("request-{number}"),
        ..requests::digits(&format!("m{number}"), "minmax", 24)
    }
}

/// Submits job `number`; its operation, if the server lived long enough to answer.
async fn submit(program: &Program, number: u64) -> Option<String> {
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let mut events = client.quantize(request(number)).await.ok()?.into_inner();
    Some(events.next().await?.ok()?.operation)
}

/// A checkpoint that clients bring.
struct Brought {
    config: String,
    weights: Vec<u8>,
}

impl Brought {
    /// Large enough for several stored parts.
    fn new() -> Self {
        let checkpoint = generate("vit_tiny", GeneratedOptions::default()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        checkpoint.save(folder.path()).unwrap();
        Self {
            config: fs::read_to_string(folder.path().join("config.json")).unwrap(),
            weights: fs::read(folder.path().join("model.safetensors")).unwrap(),
        }
    }

    /// The weights of upload `number`: the last stored part is its own, the others are those of all.
    fn weights(&self, number: u64) -> Bytes {
        let mut bytes = self.weights.clone();
        let last = bytes.len() - 4;
        bytes[last..last + 2].copy_from_slice(&number.to_le_bytes()[..2]);
        bytes.into()
    }

    /// What the server tells of upload `number` once it is complete.
    fn digest(&self, number: u64) -> String {
        let mut hash = Sha256::new();
        hash.update(&self.config);
        hash.update(self.weights(number));
        hex(&hash.finalize())
    }

    /// Brings upload `number`, or what is missing of it, if the server lives long enough.
    async fn send(&self, program: &Program, number: u64) -> Option<Upload> {
        let mut client = UploadServiceClient::new(program.channel.clone());
        let (kind, name) = (UploadKind::Checkpoint.into(), format!("brought/{number}"));
        let known = client.get_upload(GetUploadRequest { kind, name: name.clone() }).await;
        let offset = match known {
            Ok(known) => {
                let upload = known.into_inner().upload.unwrap();
                if upload.complete {
                    return Some(upload);
                }
                upload.received_bytes
            }
            Err(status) if status.code() == Code::NotFound => 0,
            Err(_) => return None,
        };
        let weights = self.weights(number);
        let header = UploadHeader {
            kind,
            name,
            config: self.config.clone(),
            bytes: weights.len() as u64,
            sha256: sha256_hex(&weights),
            images: 0,
            offset,
        };
        let rest = weights.slice(offset as usize..);
        let chunks = (0..rest.len())
            .step_by(CHUNK)
            .map(move |start| Part::Chunk(rest.slice(start..rest.len().min(start + CHUNK))));
        let parts = std::iter::once(Part::Header(header)).chain(chunks);
        let messages = parts.map(|part| UploadRequest { part: Some(part) }).collect::<Vec<_>>();
        client.upload(tokio_stream::iter(messages)).await.ok()?.into_inner().upload
    }
}

/// Size of a message of an upload.
const CHUNK: usize = 512 << 10;

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
/// jobs and bring checkpoints; then looks at what is left.
async fn survives(
    stores: &Stores,
    (servers, workers): (usize, usize),
    artifacts: &dyn ArtifactStore,
) {
    let crashes = number("CRASHES", 10);
    let mut moments = Moments(number("CRASH_SEED", 1));
    let mut accepted = BTreeSet::new();
    let brought = Brought::new();
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
        // Clients repeat what the last crash may have swallowed, then go on.
        let numbers = || crash.saturating_sub(1)..=crash;
        let submitting = async {
            for number in numbers() {
                if let Some(operation) = submit(&programs[0], number).await {
                    accepted.insert(operation);
                }
            }
        };
        let bringing = async {
            for number in numbers() {
                brought.send(programs.last().unwrap(), number).await;
            }
        };
        let busy = async {
            tokio::join!(submitting, bringing);
            std::future::pending::<()>().await;
        };
        let _ = tokio::time::timeout(moment, busy).await;
        // The one that took the jobs, or another.
        match moments.next().as_millis() as usize % (servers + workers) {
            server if server < servers => drop(programs.remove(server)),
            worker => drop(helpers.remove(worker - servers)),
        }
        println!("kill {crash} after {} ms, {} jobs accepted", moment.as_millis(), accepted.len());
    }

    drop((programs, helpers));
    let program = Program::start(stores).await;
    let mut half = 0;
    for number in 0..crashes {
        accepted.insert(submit(&program, number).await.unwrap());
        half += u64::from(is_half_here(&program, number).await);
        assert!(brought.send(&program, number).await.unwrap().complete);
    }
    println!("{half} uploads of {crashes} had got half way");
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
        let request =
            ClassifyRequest { model: model.id.clone(), images, top_k: 1, ..Default::default() };
        inference.classify(request).await.unwrap();
    }
    // What was brought is what was sent, and can be used.
    let list = ListCheckpointsRequest { page_size: 1000, ..Default::default() };
    let mut checkpoints = CheckpointServiceClient::new(program.channel.clone());
    let listed = checkpoints.list_checkpoints(list).await.unwrap().into_inner().checkpoints;
    let uploaded: BTreeMap<_, _> =
        listed.into_iter().filter(|c| c.uploaded).map(|c| (c.name, c.digest)).collect();
    let expected: BTreeMap<_, _> =
        (0..crashes).map(|number| (format!("brought/{number}"), brought.digest(number))).collect();
    assert_eq!(uploaded, expected);
    let used = QuantizeRequest {
        checkpoint: format!("brought/{}", crashes - 1),
        model_id: "used".to_owned(),
        ..request(crashes + 1)
    };
    let mut client = QuantizationServiceClient::new(program.channel.clone());
    let events = client.quantize(used).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(Event::Result(result)) = &events.last().unwrap().event else { panic!("{events:?}") };
    assert_eq!(result.model.as_ref().unwrap().source_digest, brought.digest(crashes - 1));
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
    let cache = tempfile::tempdir().unwrap();
    let flags = [
        "--cache-dir",
        cache.path().to_str().unwrap(),
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
