//! The job store on SQLite and on PostgreSQL: the same tests on both.

mod oracle;
mod shards;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use vitq::Error;
use vitq::database::{self, Database};
use vitq::engine::jobs::{
    Afterwards, Claimed, EvaluateJob, Figures, ImageChoice, JobEventKind, JobFilter, JobId,
    JobLimits, JobOutcome, JobProgress, JobSpec, JobState, JobStore, NewJob, Novelty, QuantizeJob,
    Standing, Submitted, Workload,
};
use vitq::engine::names::ModelId;
use vitq::telemetry::{TraceContext, metrics};

use crate::postgres;

/// Few, so that a test meets them.
fn limits() -> JobLimits {
    JobLimits { queued: 8, per_principal: 3, attempts: 2, ..JobLimits::default() }
}

/// Runs a test on a fresh store of each kind.
async fn on_both<F, Done>(test: F)
where
    F: Fn(Arc<JobStore>) -> Done,
    Done: Future<Output = ()>,
{
    let folder = tempfile::tempdir().unwrap();
    let sqlite = Database::file(&folder.path().join("jobs.sqlite")).await.unwrap();
    test(Arc::new(JobStore::new(sqlite, limits()))).await;
    let postgres =
        Database::open(&postgres::database().await, database::CONNECTIONS).await.unwrap();
    test(Arc::new(JobStore::new(postgres, limits()))).await;
}

fn quantize(model: &str, seed: u64) -> JobSpec {
    JobSpec::Quantize(QuantizeJob {
        model: ModelId::parse(model, "model_id").unwrap(),
        checkpoint: "c".into(),
        pinned: None,
        request: serde_json::from_value(serde_json::json!({
            "method": "ubb", "weight_bits": 4, "activation_bits": 4, "stem_head": "float",
            "seed": seed
        }))
        .unwrap(),
        images: ImageChoice::inline(vec!["image".into(), "\0\u{ff}".into()]),
        labels: BTreeMap::new(),
        afterwards: Afterwards::Keep,
    })
}

fn evaluate(model: &str) -> JobSpec {
    let model = ModelId::parse(model, "model").unwrap();
    JobSpec::Evaluate(EvaluateJob { model, alias: None, dataset: "d".into(), limit: None, seed: 0 })
}

async fn try_submit(
    store: &JobStore,
    spec: JobSpec,
    request_id: Option<&str>,
) -> vitq::Result<Submitted> {
    let principal = spec.model().to_string();
    submit_as(store, spec, request_id, &principal).await
}

async fn submit_as(
    store: &JobStore,
    spec: JobSpec,
    request_id: Option<&str>,
    principal: &str,
) -> vitq::Result<Submitted> {
    let (request_id, principal) = (request_id.map(str::to_owned), principal.to_owned());
    store.submit(&NewJob { spec, request_id, priority: 0, principal, trace: None }).await
}

async fn submit(store: &JobStore, spec: JobSpec) -> JobId {
    try_submit(store, spec, None).await.unwrap().id
}

async fn claim(store: &JobStore) -> Claimed {
    store.claim("worker").await.unwrap().unwrap()
}

fn failure(error: Error) -> JobOutcome {
    Err(Arc::new(error))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_made_by_one_job_at_a_time() {
    on_both(async |store| {
        let first = submit(&store, quantize("a", 0)).await;
        let error = try_submit(&store, quantize("a", 1), None).await.unwrap_err();
        let Error::Busy { model, operation } = error else { panic!("{error}") };
        assert_eq!((model, operation), ("a".to_owned(), first.operation()));
        submit(&store, evaluate("a")).await;
        submit(&store, quantize("b", 0)).await;
        store.request_cancel(&first).await.unwrap();
        submit(&store, quantize("a", 1)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_tells_how_much_there_is_to_do_and_who_asked_in_which_trace() {
    on_both(async |store| {
        assert_eq!(store.workload().await.unwrap(), Workload::default());
        let trace = TraceContext::root();
        let (principal, request_id) = ("me".to_owned(), None);
        let spec = quantize("a", 0);
        let job = NewJob { spec, request_id, priority: 1, principal, trace: Some(trace.clone()) };
        let first = store.submit(&job).await.unwrap().id;
        submit(&store, quantize("b", 0)).await;
        submit(&store, evaluate("c")).await;
        let claimed = claim(&store).await;
        assert_eq!((&claimed.record.id, claimed.record.trace), (&first, Some(trace)));
        store.request_cancel(&first).await.unwrap();
        let second = claim(&store).await;
        assert_eq!(second.record.trace, None);
        let workload = store.workload().await.unwrap();
        let Workload { queued, running, cancelling, oldest } = workload;
        assert_eq!((queued, running, cancelling), (1, 1, 1));
        assert!(oldest < Duration::from_secs(60), "{oldest:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_more_jobs_under_way_than_the_quota_allows() {
    on_both(async |store| {
        let mine = [quantize("a", 0), quantize("b", 0), evaluate("a")];
        let mut ids = Vec::new();
        for spec in mine {
            ids.push(submit_as(&store, spec, None, "me").await.unwrap().id);
        }
        let error = submit_as(&store, quantize("c", 0), Some("r"), "me").await.unwrap_err();
        let Error::QuotaExceeded { subject, reason } = error else { panic!("{error}") };
        assert_eq!(subject, "me");
        assert!(reason.contains("3 jobs"), "{reason}");
        // What is under way already costs nothing; others have their own share.
        let again = submit_as(&store, quantize("a", 0), None, "me").await.unwrap();
        assert_eq!((again.id, again.novelty), (ids[0].clone(), Novelty::Replayed));
        submit_as(&store, quantize("d", 0), None, "you").await.unwrap();
        // A running job counts, an ended one does not.
        let Claimed { lease, .. } = claim(&store).await;
        assert!(submit_as(&store, quantize("c", 0), Some("r"), "me").await.is_err());
        store.finish(&lease, &failure(Error::Deadline)).await.unwrap();
        submit_as(&store, quantize("c", 0), Some("r"), "me").await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_finds_its_job_and_no_other() {
    on_both(async |store| {
        let first = try_submit(&store, quantize("a", 0), Some("r")).await.unwrap();
        assert_eq!(first.novelty, Novelty::New);
        // By its id, and, while the work is under way, by what is asked for.
        for request_id in [Some("r"), None, Some("s"), Some("s")] {
            let again = try_submit(&store, quantize("a", 0), request_id).await.unwrap();
            assert_eq!((&again.id, again.novelty), (&first.id, Novelty::Replayed));
        }
        for request_id in ["r", "s"] {
            let error = try_submit(&store, quantize("b", 1), Some(request_id)).await.unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { field, .. } if field == "request_id"));
        }
        store.request_cancel(&first.id).await.unwrap();
        let again = try_submit(&store, quantize("a", 0), Some("s")).await.unwrap();
        assert_eq!(again.id, first.id, "a request id is remembered as long as its job");
        let new = try_submit(&store, quantize("a", 0), None).await.unwrap();
        assert_eq!(new.novelty, Novelty::New);
        store.delete(&first.id).await.unwrap();
        let again = try_submit(&store, quantize("a", 0), Some("r")).await.unwrap();
        assert_eq!(again.id, new.id);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_numbered_replayed_and_end_once() {
    on_both(async |store| {
        let id = submit(&store, quantize("a", 0)).await;
        let Claimed { record, lease } = claim(&store).await;
        assert_eq!((&record.id, record.state, record.attempt), (&id, JobState::Running, 1));
        assert_eq!(record.worker.as_deref(), Some("worker"));
        assert!(store.claim("other").await.unwrap().is_none());
        let figures = Figures { images_per_second: 0.1, ..Figures::default() };
        let progress = JobProgress {
            stage: "calibrate".to_owned(),
            elapsed: Duration::from_nanos(1_500_000_001),
            figures: Some(figures),
            loss: Some(0.25),
            warnings: vec![Arc::new(Error::invalid("checkpoint", "reason"))],
            ..JobProgress::default()
        };
        assert_eq!(store.report(&lease, &progress).await.unwrap(), Standing::Held);
        store.request_cancel(&id).await.unwrap();
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Cancelling);
        assert_eq!(store.report(&lease, &progress).await.unwrap(), Standing::CancelRequested);
        assert_eq!(store.heartbeat(&lease).await.unwrap(), Standing::CancelRequested);
        store.finish(&lease, &failure(Error::Cancelled)).await.unwrap();
        for standing in [
            store.finish(&lease, &failure(Error::Deadline)).await.unwrap(),
            store.report(&lease, &progress).await.unwrap(),
            store.heartbeat(&lease).await.unwrap(),
        ] {
            assert_eq!(standing, Standing::Lost);
        }
        store.request_cancel(&id).await.unwrap();
        let events = store.events(&id, 1).await.unwrap();
        assert_eq!(events.iter().map(|e| e.sequence).collect::<Vec<_>>(), [2, 3, 4]);
        let JobEventKind::Progress(found) = &events[0].kind else { panic!("{events:?}") };
        assert_eq!(format!("{found:?}"), format!("{progress:?}"));
        let JobEventKind::Ended(Err(error)) = &events[2].kind else { panic!("{events:?}") };
        assert!(matches!(**error, Error::Cancelled));
        let record = store.get(&id).await.unwrap();
        assert_eq!((record.state, record.last_sequence), (JobState::Cancelled, 4));
        assert_eq!(record.worker, None);
        assert!(record.updated >= record.ended.unwrap());
        assert!(store.events(&JobId::given("unknown"), 0).await.is_err());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn images_travel_with_the_job_to_every_worker() {
    on_both(async |store| {
        submit(&store, quantize("a", 0)).await;
        for attempt in 1..=2 {
            let Claimed { record, lease } = claim(&store).await;
            assert_eq!(lease.attempt, attempt);
            let JobSpec::Quantize(job) = &*record.spec else { panic!() };
            let ImageChoice::Inline { contents, digests } = &job.images else { panic!() };
            assert_eq!(contents.as_slice(), ["image", "\0\u{ff}"].map(bytes::Bytes::from));
            assert_eq!(digests.len(), 2);
            store.release(&lease).await.unwrap();
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_ended_jobs_are_deleted_and_pages_go_back_in_time() {
    on_both(async |store| {
        let mut ids = Vec::new();
        for model in ["a", "b", "c"] {
            ids.push(submit(&store, quantize(model, 0)).await);
        }
        let list = async |filter: JobFilter, before: Option<&JobId>, count: usize| {
            let jobs = store.list(&filter, before, count).await.unwrap();
            jobs.into_iter().map(|job| job.id).collect::<Vec<_>>()
        };
        let all = JobFilter::default;
        assert_eq!(list(all(), Some(&ids[2]), 5).await, [ids[1].clone(), ids[0].clone()]);
        assert_eq!(list(all(), None, 1).await, [ids[2].clone()]);
        let error = store.delete(&ids[0]).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }));
        store.request_cancel(&ids[0]).await.unwrap();
        let state = |state| JobFilter { state: Some(state), ..all() };
        assert_eq!(list(state(JobState::Cancelled), None, 5).await, [ids[0].clone()]);
        assert_eq!(list(state(JobState::Running), None, 5).await, []);
        let done = |done| JobFilter { done: Some(done), ..all() };
        assert_eq!(list(done(true), None, 5).await, [ids[0].clone()]);
        assert_eq!(list(done(false), None, 5).await.len(), 2);
        let model = JobFilter { model: Some("b".to_owned()), ..all() };
        assert_eq!(list(model, None, 5).await, [ids[1].clone()]);
        let kind = JobFilter { kind: Some("evaluate".to_owned()), ..all() };
        assert_eq!(list(kind, None, 5).await, []);
        store.delete(&ids[0]).await.unwrap();
        assert!(matches!(store.get(&ids[0]).await.unwrap_err(), Error::NotFound { .. }));
        assert!(matches!(store.delete(&ids[0]).await.unwrap_err(), Error::NotFound { .. }));
        assert_eq!(list(all(), None, 9).await.len(), 2);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_says_when_to_come_back() {
    on_both(async |store| {
        for n in 0..limits().queued {
            submit(&store, evaluate(&n.to_string())).await;
        }
        let error = try_submit(&store, evaluate("x"), None).await.unwrap_err();
        assert!(matches!(error, Error::Overloaded { .. }));
        claim(&store).await;
        submit(&store, evaluate("x")).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn urgent_jobs_go_first_and_equal_ones_in_order() {
    on_both(async |store| {
        let mut ids = Vec::new();
        for (model, priority) in [("a", 0), ("b", 0), ("c", 7), ("d", -7), ("e", 7)] {
            let job = NewJob {
                spec: evaluate(model),
                request_id: None,
                priority,
                principal: model.to_owned(),
                trace: None,
            };
            ids.push(store.submit(&job).await.unwrap().id);
        }
        let mut found = Vec::new();
        while let Some(claimed) = store.claim("worker").await.unwrap() {
            found.push(claimed.lease.id);
        }
        assert_eq!(found, [2, 4, 0, 1, 3].map(|index: usize| ids[index].clone()));
    })
    .await;
}

/// What the metrics of this process say of jobs that were taken over, whatever the test.
fn takeovers() -> u64 {
    metrics::start();
    let text = metrics::render(metrics::Samples::default());
    let line = text.lines().find_map(|line| line.strip_prefix("vitq_job_takeovers_total "));
    line.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_workers_job_goes_on_elsewhere_and_the_dead_cannot_write() {
    on_both(async |store| {
        let before = takeovers();
        let id = submit(&store, quantize("a", 0)).await;
        let first = claim(&store).await.lease;
        store.forget_leases().await.unwrap();
        // Nobody has taken it: a late heartbeat still saves the lease.
        assert_eq!(store.heartbeat(&first).await.unwrap(), Standing::Held);
        assert!(store.claim("other").await.unwrap().is_none());
        store.forget_leases().await.unwrap();
        let second = claim(&store).await.lease;
        assert_eq!((&second.id, second.attempt), (&id, 2));
        assert_eq!(store.heartbeat(&first).await.unwrap(), Standing::Lost);
        let progress = JobProgress::default();
        assert_eq!(store.report(&first, &progress).await.unwrap(), Standing::Lost);
        let standing = store.finish(&first, &failure(Error::Deadline)).await.unwrap();
        assert_eq!(standing, Standing::Lost);
        store.release(&first).await.unwrap();
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Running);
        // It killed as many workers as it may.
        store.forget_leases().await.unwrap();
        assert!(store.claim("other").await.unwrap().is_none());
        let record = store.get(&id).await.unwrap();
        assert_eq!(record.state, JobState::Failed);
        let error = record.outcome.unwrap().unwrap_err();
        assert!(matches!(*error, Error::WorkersDied { workers: 2 }), "{error}");
        assert!(takeovers() >= before + 2, "those who take over tell, since the dead cannot");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn finished_units_are_found_by_the_next_attempt_and_gone_with_the_job() {
    on_both(async |store| {
        let id = submit(&store, quantize("a", 0)).await;
        let first = claim(&store).await.lease;
        assert_eq!(store.keep_unit(&first, "u1", "d1").await.unwrap(), Standing::Held);
        store.forget_leases().await.unwrap();
        let second = claim(&store).await.lease;
        assert_eq!(store.keep_unit(&first, "u2", "d2").await.unwrap(), Standing::Lost);
        assert_eq!(store.kept_unit(&id, "u1").await.unwrap().as_deref(), Some("d1"));
        assert_eq!(store.kept_unit(&id, "u2").await.unwrap(), None);
        store.keep_unit(&second, "u1", "d3").await.unwrap();
        assert_eq!(store.kept_unit(&id, "u1").await.unwrap().as_deref(), Some("d3"));
        store.finish(&second, &failure(Error::Deadline)).await.unwrap();
        assert_eq!(store.kept_unit(&id, "u1").await.unwrap(), None);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn given_back_jobs_start_again_and_cancelled_ones_end() {
    on_both(async |store| {
        let id = submit(&store, quantize("a", 0)).await;
        for attempt in 1..5 {
            let lease = claim(&store).await.lease;
            assert_eq!(lease.attempt, attempt, "giving back does not use up attempts");
            store.release(&lease).await.unwrap();
            assert_eq!(store.get(&id).await.unwrap().state, JobState::Queued);
        }
        let lease = claim(&store).await.lease;
        store.request_cancel(&id).await.unwrap();
        store.release(&lease).await.unwrap();
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Cancelled);
        // The same when its worker died instead.
        let id = submit(&store, quantize("a", 0)).await;
        claim(&store).await;
        store.request_cancel(&id).await.unwrap();
        store.forget_leases().await.unwrap();
        assert!(store.claim("other").await.unwrap().is_none());
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Cancelled);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn watchers_wake_at_changes_of_this_and_of_other_processes() {
    on_both(async |store| {
        let id = submit(&store, quantize("a", 0)).await;
        let wait = Duration::from_secs(30);
        store.changed(&id, 0).await.unwrap();
        let waiting = tokio::spawn({
            let (store, id) = (Arc::clone(&store), id.clone());
            async move { tokio::time::timeout(wait, store.changed(&id, 1)).await }
        });
        let lease = claim(&store).await.lease;
        store.report(&lease, &JobProgress::default()).await.unwrap();
        waiting.await.unwrap().unwrap().unwrap();
        store.finish(&lease, &failure(Error::Deadline)).await.unwrap();
        // It has ended: nothing will ever follow.
        tokio::time::timeout(wait, store.changed(&id, 99)).await.unwrap().unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn old_jobs_are_forgotten_and_running_ones_are_not() {
    on_both(async |store| {
        assert_eq!(store.expire().await.unwrap(), 0);
        let id = submit(&store, quantize("a", 0)).await;
        submit(&store, quantize("b", 0)).await;
        store.request_cancel(&id).await.unwrap();
        assert_eq!(store.expire().await.unwrap(), 0, "30 days are not over");
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Cancelled);
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let sqlite = Database::file(&folder.path().join("jobs.sqlite")).await.unwrap();
    let store = JobStore::new(sqlite, JobLimits { keep: Duration::ZERO, ..limits() });
    let id = submit(&store, quantize("a", 0)).await;
    let other = submit(&store, quantize("b", 0)).await;
    store.request_cancel(&id).await.unwrap();
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(store.expire().await.unwrap(), 1);
    assert!(matches!(store.get(&id).await.unwrap_err(), Error::NotFound { .. }));
    store.get(&other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn competing_workers_and_clients_share_without_loss() {
    on_both(async |store| {
        // The same request from several clients at once makes one job.
        let clients = (0..6).map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { submit(&store, quantize("a", 0)).await })
        });
        let mut ids = BTreeSet::new();
        for client in clients.collect::<Vec<_>>() {
            ids.insert(client.await.unwrap());
        }
        assert_eq!(ids.len(), 1);
        for n in 1..limits().queued {
            ids.insert(submit(&store, evaluate(&n.to_string())).await);
        }
        let workers = (0..4).map(|worker| {
            let store = Arc::clone(&store);
            tokio::spawn(async move {
                let mut taken = Vec::new();
                while let Some(claimed) = store.claim(&worker.to_string()).await.unwrap() {
                    taken.push(claimed.lease.id.clone());
                    store.finish(&claimed.lease, &failure(Error::Deadline)).await.unwrap();
                }
                taken
            })
        });
        let mut taken = Vec::new();
        for worker in workers.collect::<Vec<_>>() {
            taken.extend(worker.await.unwrap());
        }
        // A worker may find nothing while the others hold the last jobs.
        while let Some(claimed) = store.claim("last").await.unwrap() {
            taken.push(claimed.lease.id);
        }
        taken.sort();
        assert_eq!(taken, ids.into_iter().collect::<Vec<_>>());
    })
    .await;
}
