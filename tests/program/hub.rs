//! Checkpoints of the Hugging Face hub, from a local server that speaks its routes.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as Route, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use sha1::{Digest as _, Sha1};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vitq::digest::{hex, sha256_hex};
use vitq::grpc::proto::checkpoint_service_client::CheckpointServiceClient;
use vitq::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::longrunning::{CancelOperationRequest, WaitOperationRequest, operation};
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::quantize_request::Calibration;
use vitq::grpc::proto::{
    CalibrationDataset, Checkpoint, EvaluateRequest, GetCheckpointRequest, Model, QuantizeRequest,
    evaluate_event,
};

use crate::program::{Program, Stores};

/// What the hub does instead of giving a repository's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fault {
    #[default]
    None,
    /// Says that it is overloaded.
    Overloaded,
    /// Gives other bytes than it announced.
    OtherBytes,
    /// Stops in the middle.
    Stalls,
}

/// One repository.
#[derive(Clone, Debug, Default)]
struct Repository {
    /// Commits by branch or tag.
    branches: HashMap<String, String>,
    /// Files by commit.
    commits: HashMap<String, BTreeMap<String, Bytes>>,
    /// Who does not give this word does not learn that it exists.
    token: Option<String>,
    is_gated: bool,
}

#[derive(Debug, Default)]
struct Content {
    repositories: HashMap<String, Repository>,
    fault: Fault,
    /// What was asked for: `GET me/digits main config.json`.
    asked: Vec<String>,
}

/// The hub.
struct Hub {
    endpoint: String,
    content: Arc<Mutex<Content>>,
}

impl Hub {
    async fn start() -> Self {
        let content = Arc::<Mutex<Content>>::default();
        let router = Router::new()
            .route("/{owner}/{name}/resolve/{*path}", get(resolve))
            .with_state(Arc::clone(&content));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { endpoint, content }
    }

    /// Makes a commit the head of a branch.
    fn push(&self, id: &str, branch: &str, commit: &str, files: &[(&str, Vec<u8>)]) {
        let files = files.iter().map(|(name, file)| ((*name).to_owned(), file.clone().into()));
        let mut content = self.content.lock().unwrap();
        let repository = content.repositories.entry(id.to_owned()).or_default();
        repository.branches.insert(branch.to_owned(), commit.to_owned());
        repository.commits.insert(commit.to_owned(), files.collect());
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Repository)) {
        change(self.content.lock().unwrap().repositories.get_mut(id).unwrap());
    }

    fn fault(&self, fault: Fault) {
        self.content.lock().unwrap().fault = fault;
    }

    /// What was asked for since the last time.
    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.content.lock().unwrap().asked)
    }
}

fn refuse(status: StatusCode, code: &str) -> Response {
    (status, [("x-error-code", code.to_owned())]).into_response()
}

async fn resolve(
    State(content): State<Arc<Mutex<Content>>>,
    Route((owner, name, path)): Route<(String, String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Response {
    let mut content = content.lock().unwrap();
    let (revision, file) = path.rsplit_once('/').unwrap();
    let id = format!("{owner}/{name}");
    content.asked.push(format!("{method} {id} {revision} {file}"));
    let fault = content.fault;
    let sent = headers.get("authorization").and_then(|value| value.to_str().ok());
    let knows = |token: &String| sent == Some(format!("Bearer {token}").as_str());
    let repository = content.repositories.get(&id);
    let Some(repository) = repository.filter(|r| r.token.as_ref().is_none_or(knows)) else {
        return refuse(StatusCode::UNAUTHORIZED, "RepoNotFound");
    };
    if repository.is_gated {
        return refuse(StatusCode::FORBIDDEN, "GatedRepo");
    }
    let commit = repository.branches.get(revision).map_or(revision, String::as_str);
    let Some(files) = repository.commits.get(commit) else {
        return refuse(StatusCode::NOT_FOUND, "RevisionNotFound");
    };
    let Some(bytes) = files.get(file) else {
        return (
            StatusCode::NOT_FOUND,
            [("x-error-code", "EntryNotFound"), ("x-repo-commit", commit)],
        )
            .into_response();
    };
    // Small files are git's own, large ones lie beside git.
    let is_large = file == "model.safetensors";
    let tag = if is_large { sha256_hex(bytes) } else { git_hash(bytes) };
    let about = [("x-repo-commit", commit.to_owned()), ("etag", format!("\"{tag}\""))];
    if method == Method::HEAD {
        return (about, bytes.clone()).into_response();
    }
    match fault {
        Fault::OtherBytes | Fault::Stalls if !is_large => (about, bytes.clone()).into_response(),
        Fault::None => (about, bytes.clone()).into_response(),
        Fault::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "come back").into_response(),
        Fault::OtherBytes => {
            let mut other = bytes.to_vec();
            *other.last_mut().unwrap() ^= 1;
            (about, other).into_response()
        }
        Fault::Stalls => {
            let start = tokio_stream::once(Ok::<_, std::io::Error>(bytes.slice(..1000)));
            let body = Body::from_stream(start.chain(tokio_stream::pending()));
            (about, body).into_response()
        }
    }
}

/// What `git hash-object` gives.
fn git_hash(bytes: &[u8]) -> String {
    let header = format!("blob {}\0", bytes.len());
    hex(&Sha1::new().chain_update(header).chain_update(bytes).finalize())
}

const FIRST: &str = "0123456789abcdef0123456789abcdef01234567";
const SECOND: &str = "89abcdef0123456789abcdef0123456789abcdef";

fn demo(file: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/checkpoints/digits-vit");
    fs::read(folder.join(file)).unwrap()
}

fn config() -> (&'static str, Vec<u8>) {
    ("config.json", demo("config.json"))
}

fn weights() -> (&'static str, Vec<u8>) {
    ("model.safetensors", demo("model.safetensors"))
}

/// Weights of which one is a little different.
fn other_weights() -> (&'static str, Vec<u8>) {
    let mut bytes = demo("model.safetensors");
    let last = bytes.len() - 4; // low byte of the last value
    bytes[last] ^= 1;
    ("model.safetensors", bytes)
}

fn stores(data: &TempDir, hub: &Hub, more: &[(&str, &str)]) -> Stores {
    let flags = ["--data-dir", data.path().to_str().unwrap(), "--hub", "me, you"];
    let endpoint = ("HF_ENDPOINT", hub.endpoint.as_str());
    let variables = std::iter::once(&endpoint).chain(more);
    Stores {
        flags: flags.map(str::to_owned).to_vec(),
        variables: variables.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
    }
}

fn request(model: &str, checkpoint: &str) -> QuantizeRequest {
    let set =
        CalibrationDataset { name: "digits/calib".to_owned(), count: 4, ..Default::default() };
    QuantizeRequest {
        checkpoint: checkpoint.to_owned(),
        method: "minmax".to_owned(),
        weight_bits: 8,
        activation_bits: 8,
        calibration: Some(Calibration::Dataset(set)),
        model_id: model.to_owned(),
        request_id: format!("{model}-once"),
        ..QuantizeRequest::default()
    }
}

/// The operation of a job, and whether an earlier call had made it.
async fn submit(server: &Program, request: QuantizeRequest) -> Result<(String, bool), Status> {
    let mut client = QuantizationServiceClient::new(server.channel.clone());
    let event = client.quantize(request).await?.into_inner().next().await.unwrap()?;
    let Some(Event::Accepted(accepted)) = event.event else { panic!("{event:?}") };
    Ok((event.operation, accepted.replayed))
}

/// What becomes of a job.
async fn quantize(server: &Program, request: QuantizeRequest) -> Result<Model, Status> {
    let mut client = QuantizationServiceClient::new(server.channel.clone());
    let events = client.quantize(request).await?.into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await?;
    let last = events.into_iter().last().unwrap().event.unwrap();
    if let Event::Error(status) = last {
        return Err(Status::new(status.code.into(), status.message));
    }
    let Event::Result(result) = last else { panic!("{last:?}") };
    Ok(result.model.unwrap())
}

async fn look(server: &Program, name: &str) -> Result<Checkpoint, Status> {
    let mut client = CheckpointServiceClient::new(server.channel.clone());
    let request = GetCheckpointRequest { name: name.to_owned() };
    Ok(client.get_checkpoint(request).await?.into_inner().checkpoint.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_is_what_it_was_when_the_job_was_accepted() {
    let (hub, data) = (Hub::start().await, tempfile::tempdir().unwrap());
    hub.push("me/digits", "main", FIRST, &[config(), weights()]);
    let server = Program::start(&stores(&data, &hub, &[])).await;
    let seen = look(&server, "hf-hub:me/digits").await.unwrap();
    assert_eq!(seen.name, format!("hf-hub:me/digits@{FIRST}"));
    assert_eq!((seen.bytes, seen.uploaded), (weights().1.len() as u64, false));

    let first = quantize(&server, request("first", "hf-hub:me/digits")).await.unwrap();
    assert_eq!(first.checkpoint, format!("hf-hub:me/digits@{FIRST}"));
    let local = quantize(&server, request("local", "digits-vit")).await.unwrap();
    assert_eq!(
        (&first.digest, &first.source_digest),
        (&local.digest, &local.source_digest),
        "the name is not part of the artifact"
    );

    // The branch moves; a repeated call still finds its job.
    hub.push("me/digits", "main", SECOND, &[config(), other_weights()]);
    let (_, replayed) = submit(&server, request("first", "hf-hub:me/digits")).await.unwrap();
    assert!(replayed);
    let second = quantize(&server, request("second", "hf-hub:me/digits@main")).await.unwrap();
    assert_eq!(second.checkpoint, format!("hf-hub:me/digits@{SECOND}"));
    assert_ne!(second.source_digest, first.source_digest);
    let named = format!("hf-hub:me/digits@{FIRST}");
    hub.asked();
    let again = quantize(&server, request("again", &named)).await.unwrap();
    assert_eq!(again.digest, first.digest);
    assert_eq!(hub.asked(), Vec::<String>::new(), "a commit in the cache is not asked for");

    // The float model of an evaluation is that of the commit.
    let mut client = EvaluationServiceClient::new(server.channel.clone());
    let evaluate = EvaluateRequest {
        model: "first".to_owned(),
        dataset: "digits/val".to_owned(),
        limit: 10,
        ..Default::default()
    };
    let events = client.evaluate(evaluate).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(evaluate_event::Event::Result(result)) = &events.last().unwrap().event else {
        panic!("{events:?}")
    };
    assert!(result.warnings.is_empty(), "{result:?}");
    assert!(data.path().join("cache/.hub/models--me--digits").is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_server_uses_what_is_in_the_cache_and_asks_for_nothing() {
    let (hub, data) = (Hub::start().await, tempfile::tempdir().unwrap());
    let cache = tempfile::tempdir().unwrap();
    let cache = ("HF_HUB_CACHE", cache.path().to_str().unwrap());
    hub.push("me/digits", "main", FIRST, &[config(), weights()]);
    hub.push("me/digits", "v1", FIRST, &[config(), weights()]);
    {
        let server = Program::start(&stores(&data, &hub, &[cache])).await;
        quantize(&server, request("first", "hf-hub:me/digits")).await.unwrap();
    }
    hub.asked();
    let offline = [cache, ("HF_HUB_OFFLINE", "1")];
    let server = Program::start(&stores(&data, &hub, &offline)).await;
    let model = quantize(&server, request("second", "hf-hub:me/digits")).await.unwrap();
    assert_eq!(model.checkpoint, format!("hf-hub:me/digits@{FIRST}"));
    for absent in ["hf-hub:me/digits@v1", "hf-hub:me/other"] {
        let error = quantize(&server, request("x", absent)).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        assert!(error.message().contains("offline"), "{error:?}");
    }
    assert_eq!(hub.asked(), Vec::<String>::new());
    assert!(!data.path().join("cache/.hub").exists(), "the cache is where the variable says");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_used_is_refused_when_it_is_asked_for() {
    let (hub, data) = (Hub::start().await, tempfile::tempdir().unwrap());
    hub.push("me/bare", "main", FIRST, &[config()]);
    hub.push("me/text", "main", FIRST, &[("config.json", b"{}".to_vec()), weights()]);
    let large = format!("{{\"x\":\"{}\"}}", "x".repeat(5 << 20)).into_bytes();
    hub.push("me/large", "main", FIRST, &[("config.json", large), weights()]);
    hub.push("me/digits", "main", FIRST, &[config(), weights()]);
    hub.push("else/digits", "main", FIRST, &[config(), weights()]);
    hub.push("you/gated", "main", FIRST, &[config(), weights()]);
    hub.change("you/gated", |repository| repository.is_gated = true);
    hub.push("you/private", "main", FIRST, &[config(), weights()]);
    hub.change("you/private", |repository| repository.token = Some("sesame".to_owned()));
    let server = Program::start(&stores(&data, &hub, &[])).await;
    for (name, code, says) in [
        ("hf-hub:me", Code::InvalidArgument, "OWNER/NAME"),
        ("hf-hub:me/../digits", Code::InvalidArgument, "OWNER/NAME"),
        ("hf-hub:me/digits@", Code::InvalidArgument, "OWNER/NAME"),
        ("hf-hub:me/bare", Code::InvalidArgument, "no model.safetensors"),
        ("hf-hub:me/text", Code::InvalidArgument, "architecture"),
        ("hf-hub:me/large", Code::InvalidArgument, "config.json"),
        ("hf-hub:me/absent", Code::NotFound, "hf-hub:me/absent"),
        ("hf-hub:me/digits@absent", Code::NotFound, "digits@absent"),
        ("hf-hub:you/private", Code::NotFound, "hf-hub:you/private"),
        ("hf-hub:you/gated", Code::FailedPrecondition, "HF_TOKEN"),
        ("hf-hub:else/digits", Code::FailedPrecondition, "`else`"),
    ] {
        for error in [
            quantize(&server, request("x", name)).await.unwrap_err(),
            look(&server, name).await.unwrap_err(),
        ] {
            assert_eq!(error.code(), code, "{name}: {error:?}");
            assert!(error.message().contains(says), "{name}: {error:?}");
        }
        if code == Code::InvalidArgument {
            let error = quantize(&server, request("x", name)).await.unwrap_err();
            let fault = &error.get_details_bad_request().unwrap().field_violations[0];
            assert_eq!(fault.field, "checkpoint", "{name}");
        }
    }
    assert!(!hub.asked().iter().any(|line| line.contains("else/")), "it was not even asked for");

    // With the right to read it, and with a limit.
    let with_token = [("HF_TOKEN", "sesame"), ("VITQ_CACHE_BYTES", "1000000")];
    let data = tempfile::tempdir().unwrap();
    let server = Program::start(&stores(&data, &hub, &with_token)).await;
    let error = quantize(&server, request("x", "hf-hub:you/private")).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("at most 1000000"), "{error:?}");
    let data = tempfile::tempdir().unwrap();
    let server = Program::start(&stores(&data, &hub, &with_token[..1])).await;
    quantize(&server, request("x", "hf-hub:you/private")).await.unwrap();

    // Without the flag, whatever is named.
    let data = tempfile::tempdir().unwrap();
    let mut stores = stores(&data, &hub, &[]);
    stores.flags.truncate(2);
    let server = Program::start(&stores).await;
    let error = quantize(&server, request("x", "hf-hub:me/digits")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_outlives_what_the_hub_does_to_it() {
    let (hub, data) = (Hub::start().await, tempfile::tempdir().unwrap());
    hub.push("me/digits", "main", FIRST, &[config(), weights()]);
    let server = Program::start(&stores(&data, &hub, &[])).await;

    hub.fault(Fault::OtherBytes);
    let error = quantize(&server, request("a", "hf-hub:me/digits")).await.unwrap_err();
    assert_eq!(error.code(), Code::DataLoss, "{error:?}");

    // It can be stopped while it waits for bytes.
    hub.fault(Fault::Stalls);
    let (name, _) = submit(&server, request("b", "hf-hub:me/digits")).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !hub
        .asked()
        .iter()
        .any(|line| line == &format!("GET me/digits {FIRST} model.safetensors"))
    {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut operations = OperationsClient::new(server.channel.clone());
    operations.cancel_operation(CancelOperationRequest { name: name.clone() }).await.unwrap();
    let wait = WaitOperationRequest { name, timeout: None };
    let operation = operations.wait_operation(wait).await.unwrap().into_inner();
    let Some(operation::Result::Error(status)) = operation.result else { panic!("{operation:?}") };
    assert_eq!(Code::from(status.code), Code::Cancelled);
    assert!(Instant::now() < deadline, "cancelled at once");

    // It waits for a hub that is overloaded, whose excuse is not taken for the file.
    hub.fault(Fault::Overloaded);
    hub.push("me/new", "main", SECOND, &[config(), weights()]);
    let error = quantize(&server, request("new", "hf-hub:me/new")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    let (name, _) = submit(&server, request("c", "hf-hub:me/digits")).await.unwrap();
    tokio::time::sleep(Duration::from_secs(6)).await; // longer than the client's own attempts
    hub.fault(Fault::None);
    let wait = WaitOperationRequest { name, timeout: None };
    let operation = operations.wait_operation(wait).await.unwrap().into_inner();
    assert!(matches!(operation.result, Some(operation::Result::Response(_))), "{operation:?}");
    quantize(&server, request("new", "hf-hub:me/new")).await.unwrap();

    // A file that was damaged on the disk is fetched again.
    let blobs = data.path().join("cache/.hub/models--me--digits/blobs");
    let blob = blobs.join(sha256_hex(&weights().1));
    fs::write(&blob, other_weights().1).unwrap();
    let model = quantize(&server, request("d", "hf-hub:me/digits")).await.unwrap();
    let local = quantize(&server, request("e", "digits-vit")).await.unwrap();
    assert_eq!(model.digest, local.digest);

    // A hub that is gone is nobody's fault but a matter of time.
    drop(server);
    let gone = Hub { endpoint: "http://127.0.0.1:1".to_owned(), content: Arc::default() };
    let server = Program::start(&stores(&data, &gone, &[])).await;
    let error = quantize(&server, request("f", "hf-hub:me/digits")).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error:?}");
    assert!(!error.message().contains("127.0.0.1"), "{error:?}");
}
