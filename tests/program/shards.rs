//! Evaluations on several workers: one database, one store, the same numbers.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::any::AnyRow;
use sqlx::{AnyPool, Row as _};
use tokio_stream::StreamExt as _;
use tonic::{Code, Streaming};
use vitq::grpc::proto::evaluate_event::Event;
use vitq::grpc::proto::evaluation_service_client::EvaluationServiceClient;
use vitq::grpc::proto::longrunning::operations_client::OperationsClient;
use vitq::grpc::proto::longrunning::{CancelOperationRequest, GetOperationRequest};
use vitq::grpc::proto::quantization_service_client::QuantizationServiceClient;
use vitq::grpc::proto::{EvaluateEvent, EvaluateRequest, EvaluationMetrics, JobMetadata};

use crate::program::{Process, Program, Stores};
use crate::{postgres, requests, s3};

/// Images that are evaluated.
const IMAGES: u32 = 200;
/// They are so many shards of one batch.
const SHARDS: usize = 7;
/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(300);
/// A lease that outlives the test.
const LONG: &str = "600";
/// Workers that are killed are missed soon.
const SHORT: &str = "3";

/// A shard as its row tells.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    attempt: i64,
    owner: Option<String>,
    done: bool,
}

/// A server that runs no jobs, and what workers beside it need.
struct Cluster {
    s3: s3::S3,
    database: String,
    rows: AnyPool,
    server: Program,
}

impl Cluster {
    async fn start() -> Self {
        let (s3, database) = (s3::S3::start().await, postgres::database().await);
        let server = Program::start(&stores(&s3, &database, &["--workers", "0"])).await;
        let rows = AnyPool::connect(&database).await.unwrap();
        let cluster = Self { s3, database, rows, server };
        let worker = cluster.worker(LONG, 1024);
        let request = requests::digits("m", "ubb", 8);
        let mut client = QuantizationServiceClient::new(cluster.server.channel.clone());
        let events = client.quantize(request).await.unwrap().into_inner();
        events.collect::<Result<Vec<_>, _>>().await.unwrap();
        drop(worker);
        cluster
    }

    fn worker(&self, lease: &str, shard_images: usize) -> Process {
        let shard_images = shard_images.to_string();
        let flags = ["--job-lease", lease, "--shard-images", &shard_images];
        Process(stores(&self.s3, &self.database, &flags).program("worker").spawn().unwrap())
    }

    /// Asks for an evaluation; its operation and what it tells.
    async fn evaluate(&self) -> (String, Streaming<EvaluateEvent>) {
        let request = EvaluateRequest {
            model: "m".to_owned(),
            dataset: "digits/val".to_owned(),
            limit: IMAGES,
            ..EvaluateRequest::default()
        };
        let mut client = EvaluationServiceClient::new(self.server.channel.clone());
        let mut events = client.evaluate(request).await.unwrap().into_inner();
        let operation = events.next().await.unwrap().unwrap().operation;
        (operation, events)
    }

    async fn metadata(&self, operation: &str) -> JobMetadata {
        let get = GetOperationRequest { name: operation.to_owned() };
        let mut client = OperationsClient::new(self.server.channel.clone());
        let operation = client.get_operation(get).await.unwrap().into_inner();
        operation.metadata.unwrap().to_msg().unwrap()
    }

    async fn shards(&self) -> BTreeMap<i64, Row> {
        let sql = "SELECT position, attempt, lease_owner, done FROM job_shards";
        let shard = |row: AnyRow| {
            let (owner, done) = (row.get(2), row.get::<i64, _>(3) == 1);
            (row.get(0), Row { attempt: row.get(1), owner, done })
        };
        sqlx::query(sql).fetch_all(&self.rows).await.unwrap().into_iter().map(shard).collect()
    }

    /// The shards, once they are as they should be.
    async fn until(&self, what: impl Fn(&BTreeMap<i64, Row>) -> bool) -> BTreeMap<i64, Row> {
        let found = async {
            loop {
                let shards = self.shards().await;
                if what(&shards) {
                    return shards;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, found).await.unwrap()
    }

    /// A worker that has begun with an evaluation by itself, and stands still in the middle.
    async fn stopped_leader(&self) -> (Process, String, Streaming<EvaluateEvent>) {
        let leader = self.worker(LONG, 32);
        let (operation, events) = self.evaluate().await;
        self.until(|shards| count_done(shards) >= 2).await;
        leader.signal("STOP");
        (leader, operation, events)
    }
}

fn stores(s3: &s3::S3, database: &str, more: &[&str]) -> Stores {
    let url = s3.url();
    let flags = ["--database", database, "--store", &url, "--data-dir", "/nowhere"];
    let flags = flags.iter().chain(more).map(|flag| (*flag).to_owned()).collect();
    Stores { flags, variables: s3.settings() }
}

fn count_done(shards: &BTreeMap<i64, Row>) -> usize {
    shards.values().filter(|shard| shard.done).count()
}

/// The numbers that an evaluation ends with, without its speed.
async fn result(events: Streaming<EvaluateEvent>) -> EvaluationMetrics {
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let images = events.iter().filter_map(|event| match &event.event {
        Some(Event::Progress(progress)) => progress.progress.as_ref().map(|p| p.images),
        _ => None,
    });
    let images: Vec<u32> = images.collect();
    assert!(images.is_sorted(), "progress went back: {images:?}");
    assert_eq!(images.last(), Some(&IMAGES), "the last progress tells of all images");
    match events.last().and_then(|event| event.event.clone()) {
        Some(Event::Result(result)) => {
            EvaluationMetrics { images_per_second: 0.0, ..result.metrics.unwrap() }
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_number_of_workers_gives_the_numbers_of_one() {
    let cluster = Cluster::start().await;
    let alone = cluster.worker(LONG, 1024);
    let expected = result(cluster.evaluate().await.1).await;
    assert_eq!(expected.images, u64::from(IMAGES));
    assert!(expected.sqnr_db.is_some_and(f64::is_finite), "{expected:?}");
    drop(alone);

    // A second worker does what the first one leaves.
    let (leader, operation, events) = cluster.stopped_leader().await;
    let helper = cluster.worker(LONG, 32);
    let shards = cluster.until(|shards| count_done(shards) >= SHARDS - 1).await;
    assert_eq!(shards.len(), SHARDS);
    leader.signal("CONT");
    assert_eq!(result(events).await, expected);
    assert_eq!(cluster.metadata(&operation).await.attempt, 1);
    assert!(cluster.shards().await.is_empty(), "they go with the end of the job");
    drop((leader, helper));

    // A helper that is killed: its shard is computed again by the worker of the job.
    let (leader, operation, events) = cluster.stopped_leader().await;
    let mine = cluster.shards().await.into_values().find_map(|shard| shard.owner);
    let helper = cluster.worker(SHORT, 32);
    let is_theirs = |shard: &Row| shard.owner.is_some() && shard.owner != mine;
    cluster.until(|shards| shards.values().any(is_theirs)).await;
    drop(helper);
    leader.signal("CONT");
    assert_eq!(result(events).await, expected);
    assert_eq!(cluster.metadata(&operation).await.attempt, 1);
    drop(leader);

    // The worker of the job is killed: the next one keeps what is done.
    let leader = cluster.worker(SHORT, 32);
    let (operation, events) = cluster.evaluate().await;
    cluster.until(|shards| count_done(shards) >= 3).await;
    drop(leader);
    let mut before = cluster.shards().await;
    before.retain(|_, shard| shard.done);
    // Its own size of shards is another one: what is planned stays.
    let _next = cluster.worker(LONG, 1024);
    let finished = tokio::spawn(result(events));
    while !finished.is_finished() {
        let shards = cluster.shards().await;
        if !shards.is_empty() {
            assert_eq!(shards.len(), SHARDS);
            for (position, shard) in &before {
                assert_eq!(shards[position], *shard, "a finished shard was computed again");
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(finished.await.unwrap(), expected);
    assert_eq!(cluster.metadata(&operation).await.attempt, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelling_stops_all_workers_of_an_evaluation() {
    let cluster = Cluster::start().await;
    let (leader, operation, events) = cluster.stopped_leader().await;
    let mine = cluster.shards().await.into_values().find_map(|shard| shard.owner);
    let _helper = cluster.worker(LONG, 32);
    let is_theirs = |shard: &Row| shard.owner.is_some() && shard.owner != mine;
    cluster.until(|shards| shards.values().any(is_theirs)).await;
    leader.signal("CONT");
    let mut client = OperationsClient::new(cluster.server.channel.clone());
    client.cancel_operation(CancelOperationRequest { name: operation }).await.unwrap();
    let events = events.collect::<Result<Vec<_>, _>>().await.unwrap();
    let Some(Event::Error(status)) = &events.last().unwrap().event else { panic!("{events:?}") };
    assert_eq!(status.code, i32::from(Code::Cancelled));
    assert!(cluster.shards().await.is_empty());
    // Whoever stopped takes the next job.
    drop(leader);
    assert_eq!(result(cluster.evaluate().await.1).await.images, u64::from(IMAGES));
}
