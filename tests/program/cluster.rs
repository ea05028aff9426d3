//! A cluster on one machine through what happens to clusters: PostgreSQL, an S3-compatible store, two
//! servers and two workers, of which one is killed and one is replaced, and a database that goes away,
//! while clients classify without a pause. `--nocapture` shows the steps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use vitq::grpc::proto::evaluate_event;
use vitq::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use vitq::grpc::proto::inference_service_client::InferenceServiceClient;
use vitq::grpc::proto::longrunning::WaitOperationRequest;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::model_service_client::ModelServiceClient;
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::quantize_event::Event;
use vitq::grpc::proto::{
    ClassifyRequest, ClassifyResponse, EvaluateRequest, Image, JobMetadata, JobState,
    QuantizeEvent, QuantizeRequest, SetAliasRequest, WatchRequest,
};

use crate::admission::was_not_admitted;
use crate::gate::{Gate, outage};
use crate::program::{Process, Program, Stores};
use crate::{postgres, requests, s3};

/// The name that clients use.
const LIVE: &str = "live";
/// Clients that classify, one call after the other.
const CALLERS: usize = 3;
/// Their pause, so that two cores are enough for the rest.
const PAUSE: Duration = Duration::from_millis(20);
/// Images of the evaluation.
const EVALUATED: u32 = 128;
/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(300);

async fn quantize(server: &Program, request: QuantizeRequest) -> Streaming<QuantizeEvent> {
    let mut client = QuantizationServiceClient::new(server.channel.clone());
    client.quantize(request).await.unwrap().into_inner()
}

/// Reads on until so many units of a stage are done.
async fn until_unit(events: &mut Streaming<QuantizeEvent>, units: u32) -> String {
    loop {
        let event = events.next().await.unwrap().unwrap();
        if matches!(&event.event, Some(Event::Progress(p)) if p.units > units && p.unit >= units) {
            return event.operation;
        }
    }
}

async fn finish(server: &Program, operation: &str) -> JobMetadata {
    let mut client = OperationsClient::new(server.channel.clone());
    let ended = async {
        loop {
            // It may give the latest state before the end.
            let wait = WaitOperationRequest { name: operation.to_owned(), timeout: None };
            let operation = client.wait_operation(wait).await.unwrap().into_inner();
            if operation.done {
                return operation;
            }
        }
    };
    let operation = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    let metadata: JobMetadata = operation.metadata.unwrap().to_msg().unwrap();
    assert_eq!(metadata.state(), JobState::Succeeded, "{:?}", operation.result);
    metadata
}

async fn classify(channel: &Channel, model: &str) -> Result<ClassifyResponse, Status> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/datasets/digits/val/3");
    let file = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let images = vec![Image { content: fs::read(file).unwrap().into() }];
    let request =
        ClassifyRequest { model: model.to_owned(), images, top_k: 3, ..Default::default() };
    Ok(InferenceServiceClient::new(channel.clone()).classify(request).await?.into_inner())
}

/// Clients that know all servers and classify until they are told to stop.
struct Load {
    servers: Arc<Mutex<Vec<Channel>>>,
    stop: Arc<AtomicBool>,
    callers: JoinSet<Calls>,
}

/// What became of a client's calls.
#[derive(Default)]
struct Calls {
    answers: BTreeMap<String, usize>,
    /// Sent to another server, since the first one had certainly done nothing.
    moved: usize,
    failures: Vec<Status>,
}

impl Load {
    fn start(servers: [&Program; 2]) -> Self {
        let servers = servers.map(|server| server.channel.clone()).to_vec();
        let (servers, stop) = (Arc::new(Mutex::new(servers)), Arc::<AtomicBool>::default());
        let mut callers = JoinSet::new();
        for caller in 0..CALLERS {
            let (servers, stop) = (Arc::clone(&servers), Arc::clone(&stop));
            callers.spawn(async move {
                let mut calls = Calls::default();
                let mut next = caller;
                while !stop.load(Ordering::Relaxed) {
                    let server = {
                        let servers = servers.lock().unwrap();
                        servers[next % servers.len()].clone()
                    };
                    next += 1;
                    match classify(&server, LIVE).await {
                        Ok(answer) => *calls.answers.entry(answer.model).or_default() += 1,
                        Err(status) if was_not_admitted(&status) => calls.moved += 1,
                        Err(status) => calls.failures.push(status),
                    }
                    tokio::time::sleep(PAUSE).await;
                }
                calls
            });
        }
        Self { servers, stop, callers }
    }

    fn replace(&self, index: usize, server: &Program) {
        self.servers.lock().unwrap()[index] = server.channel.clone();
    }

    async fn end(self) -> Calls {
        self.stop.store(true, Ordering::Relaxed);
        self.callers.join_all().await.into_iter().fold(Calls::default(), |mut all, calls| {
            for (model, count) in calls.answers {
                *all.answers.entry(model).or_default() += count;
            }
            all.moved += calls.moved;
            all.failures.extend(calls.failures);
            all
        })
    }
}

/// Waits for a process to end by itself.
async fn exit_code(server: Program) -> Option<i32> {
    let Program { mut process, .. } = server;
    tokio::task::spawn_blocking(move || process.0.wait().unwrap().code()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_goes_on_whatever_happens_to_its_parts() {
    let started = Instant::now();
    let step = |text: &str| println!("{:5.1} s  {text}", started.elapsed().as_secs_f64());
    let s3 = s3::S3::start().await;
    let (gate, database) = Gate::to_database(&postgres::database().await).await;
    let (cache, store) = (tempfile::tempdir().unwrap(), s3.url());
    let cache = cache.path().to_str().unwrap();
    let flags = ["--database", &database, "--store", &store, "--cache-dir", cache];
    let with = |more: &[&str]| {
        let flags = flags.iter().chain(&["--data-dir", "/nowhere"]).chain(more);
        let flags = flags.map(|flag| (*flag).to_owned()).collect();
        Stores { flags, variables: s3.settings() }
    };
    let serving = with(&["--workers", "0", "--drain-delay", "1"]);
    // Killed workers are missed soon; shards of one batch let two work on one evaluation.
    let working = with(&["--job-lease", "3", "--shard-images", "32"]);
    let worker = || Process(working.program("worker").spawn().unwrap());
    step("PostgreSQL and the store are there");
    let (one, two) = tokio::join!(Program::start(&serving), Program::start(&serving));
    let first = worker();
    step("two servers and a worker are there");

    let mut events = quantize(&one, requests::digits("first", "ubb", 4)).await;
    let accepted = events.next().await.unwrap().unwrap();
    let watch =
        WatchRequest { name: accepted.operation.clone(), after_sequence: accepted.sequence };
    let mut client = QuantizationServiceClient::new(two.channel.clone());
    let told = client.watch(watch).await.unwrap().into_inner();
    let told = told.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(Event::Result(result)) = &told.last().unwrap().event else { panic!("{told:?}") };
    let digest = result.model.as_ref().unwrap().digest.clone();
    step("quantized by the worker, asked of one server, watched on the other");

    let mut models = ModelServiceClient::new(one.channel.clone());
    let alias = |model: &str| SetAliasRequest { alias: LIVE.to_owned(), model: model.to_owned() };
    models.set_alias(alias("first")).await.unwrap();
    let mine = classify(&one.channel, LIVE).await.unwrap();
    let yours = classify(&two.channel, LIVE).await.unwrap();
    assert_eq!(mine.items, yours.items);
    assert_eq!((&mine.model_version, &yours.model_version), (&digest, &digest));
    step("both servers give the same answer under an alias");

    let load = Load::start([&one, &two]);
    let mut events = quantize(&one, requests::of_many_units("second")).await;
    let operation = until_unit(&mut events, 4).await;
    drop(first);
    let second = worker();
    step("clients classify all the time; the worker was killed within a job, another one came");
    let metadata = finish(&two, &operation).await;
    assert_eq!(metadata.attempt, 2);
    step("the other worker has finished the job");

    one.process.signal("TERM");
    assert_eq!(exit_code(one).await, Some(0));
    let one = Program::start(&serving).await;
    classify(&one.channel, LIVE).await.unwrap();
    load.replace(0, &one);
    step("a server was stopped under load, and replaced");

    let mut events = quantize(&two, requests::digits("third", "ubb", 24)).await;
    let operation = until_unit(&mut events, 1).await;
    gate.set_open(false);
    tokio::time::sleep(outage()).await;
    for server in [&one, &two] {
        assert_eq!(classify(&server.channel, LIVE).await.unwrap().model_version, digest);
    }
    gate.set_open(true);
    step("the database was out of reach for a while, both servers went on answering");
    finish(&one, &operation).await;
    step("the job that ran then is finished");

    let mut models = ModelServiceClient::new(two.channel.clone());
    models.set_alias(alias("second")).await.unwrap();
    let moved = async {
        for server in [&one, &two] {
            while classify(&server.channel, LIVE).await.unwrap().model != "second" {
                tokio::time::sleep(PAUSE).await;
            }
        }
    };
    tokio::time::timeout(PATIENCE, moved).await.unwrap();
    step("the alias has moved, on both servers");

    let third = worker();
    let evaluate = EvaluateRequest {
        model: LIVE.to_owned(),
        dataset: "digits/val".to_owned(),
        limit: EVALUATED,
        ..EvaluateRequest::default()
    };
    let mut client = EvaluationServiceClient::new(one.channel.clone());
    let events = client.evaluate(evaluate).await.unwrap().into_inner();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(evaluate_event::Event::Result(result)) = &events.last().unwrap().event else {
        panic!("{events:?}")
    };
    assert_eq!(result.metrics.as_ref().unwrap().images, u64::from(EVALUATED));
    step("two workers have evaluated the model");

    let Calls { answers, moved, failures } = load.end().await;
    step(&format!("{answers:?} calls answered, {moved} moved to another server"));
    assert!(failures.is_empty(), "{} admitted calls failed: {:?}", failures.len(), failures[0]);
    assert!(answers.contains_key("first") && answers.contains_key("second"));
    drop((second, third));
}
