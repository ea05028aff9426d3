//! Throughput of the job store on SQLite and on PostgreSQL (`cargo bench --bench job_store`): to
//! show that it is never the bottleneck of jobs that take seconds.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]
#![allow(clippy::print_stdout, reason = "the figures are its output")]

#[path = "../tests/support/postgres.rs"]
mod postgres;

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vitq::Error;
use vitq::database::{CONNECTIONS, Database};
use vitq::engine::jobs::{
    EvaluateJob, JobLimits, JobProgress, JobSpec, JobStore, NewJob, Standing,
};
use vitq::engine::names::ModelId;

/// How long each figure is measured.
const TIME: Duration = Duration::from_secs(3);
/// Names of the second figure's jobs begin here.
const SECOND_ROUND: usize = 1 << 40;
/// Clients, or workers, at once.
const CLIENTS: usize = 4;

fn job(number: usize) -> NewJob {
    let model = ModelId::parse(&format!("m{number}"), "model").unwrap();
    let spec = EvaluateJob { model, alias: None, dataset: "d".into(), limit: None, seed: 0 };
    let request_id = Some(format!("r{number}"));
    NewJob {
        spec: JobSpec::Evaluate(spec),
        request_id,
        priority: 0,
        principal: "somebody".to_owned(),
        trace: None,
    }
}

/// Times a call, made by several tasks over and over; calls per second.
async fn rate<F, Done>(call: F) -> f64
where
    F: Fn(usize) -> Done + Send + Sync + 'static,
    Done: Future<Output = ()> + Send,
{
    let call = Arc::new(call);
    let start = Instant::now();
    let tasks = (0..CLIENTS).map(|client| {
        let call = Arc::clone(&call);
        tokio::spawn(async move {
            let mut count = 0;
            while start.elapsed() < TIME {
                call(client + CLIENTS * count).await;
                count += 1;
            }
            count
        })
    });
    let mut total = 0;
    for task in tasks.collect::<Vec<_>>() {
        total += task.await.unwrap();
    }
    total as f64 / start.elapsed().as_secs_f64()
}

async fn measure(name: &str, database: Database) {
    let limits =
        JobLimits { queued: usize::MAX, per_principal: usize::MAX, ..JobLimits::default() };
    let store = Arc::new(JobStore::new(database, limits));
    let submits = {
        let store = Arc::clone(&store);
        rate(move |number| {
            let store = Arc::clone(&store);
            async move { store.submit(&job(number)).await.map(drop).unwrap() }
        })
        .await
    };
    let runs = {
        let store = Arc::clone(&store);
        rate(move |number| {
            let store = Arc::clone(&store);
            async move {
                store.submit(&job(SECOND_ROUND + number)).await.unwrap();
                let claimed = store.claim("worker").await.unwrap().unwrap();
                let outcome = Err(Arc::new(Error::Deadline));
                assert_eq!(store.finish(&claimed.lease, &outcome).await.unwrap(), Standing::Held);
            }
        })
        .await
    };
    let mut leases = Vec::new();
    for _ in 0..CLIENTS {
        leases.push(store.claim("worker").await.unwrap().unwrap().lease);
    }
    let events = rate(move |number| {
        let (store, lease) = (Arc::clone(&store), leases[number % CLIENTS].clone());
        async move {
            let progress = JobProgress { unit: number, ..JobProgress::default() };
            assert_eq!(store.report(&lease, &progress).await.unwrap(), Standing::Held);
        }
    })
    .await;
    println!("| {name} | {submits:.0} | {runs:.0} | {events:.0} |");
}

#[tokio::main]
async fn main() {
    println!("| database | submits/s | whole jobs/s (submit, claim, end) | events/s |");
    println!("|---|---|---|---|");
    let folder = tempfile::tempdir().unwrap();
    measure("SQLite", Database::file(&folder.path().join("jobs.sqlite")).await.unwrap()).await;
    let url = postgres::database().await;
    measure("PostgreSQL", Database::open(&url, CONNECTIONS).await.unwrap()).await;
}
