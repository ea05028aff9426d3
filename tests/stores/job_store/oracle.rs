//! The store against a model of it in memory: random interleavings of clients and workers.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, TestRunner};
use vitq::Error;
use vitq::engine::jobs::{
    JobId, JobProgress, JobState, JobStore, Lease, NewJob, Novelty, Standing,
};

use super::{failure, limits, on_both, quantize};

/// What clients and workers do; numbers choose among what is there.
#[derive(Clone, Debug)]
enum Step {
    Submit {
        model: u8,
        seed: u64,
        request: Option<u8>,
        priority: i32,
    },
    Cancel(usize),
    Delete(usize),
    Claim,
    /// By any lease that was ever given, held or lost.
    Heartbeat(usize),
    Report(usize),
    Finish(usize),
    Release(usize),
    /// Every worker is thought dead: their clocks do not matter, the store's does.
    Expire,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..6_u8, 0..2_u64, prop::option::of(0..6_u8), -1..=1).prop_map(
            |(model, seed, request, priority)| Step::Submit { model, seed, request, priority }
        ),
        2 => any::<usize>().prop_map(Step::Cancel),
        1 => any::<usize>().prop_map(Step::Delete),
        4 => Just(Step::Claim),
        2 => any::<usize>().prop_map(Step::Heartbeat),
        3 => any::<usize>().prop_map(Step::Report),
        3 => any::<usize>().prop_map(Step::Finish),
        1 => any::<usize>().prop_map(Step::Release),
        1 => Just(Step::Expire),
    ]
}

#[derive(Clone, Debug, PartialEq)]
struct Job {
    model: u8,
    seed: u64,
    priority: i32,
    state: JobState,
    attempt: u64,
    left: u32,
    expired: bool,
    events: u64,
}

/// The model: what the store must do, in as few words as possible.
#[derive(Default)]
struct Oracle {
    jobs: BTreeMap<JobId, Job>,
    requests: BTreeMap<u8, (JobId, u8, u64)>,
    leases: Vec<Lease>,
}

impl Oracle {
    fn held(&mut self, lease: &Lease) -> Option<&mut Job> {
        let job = self.jobs.get_mut(&lease.id)?;
        let running = [JobState::Running, JobState::Cancelling].contains(&job.state);
        (running && job.attempt == lease.attempt).then_some(job)
    }

    fn standing(job: Option<&mut Job>) -> Standing {
        match job.map(|job| job.state) {
            None => Standing::Lost,
            Some(JobState::Cancelling) => Standing::CancelRequested,
            Some(_) => Standing::Held,
        }
    }

    /// Ends what claiming ends, then the job that it takes.
    fn claim(&mut self) -> Option<JobId> {
        loop {
            let mut order: Vec<_> = self
                .jobs
                .iter()
                .filter(|(_, job)| {
                    job.state == JobState::Queued || (!job.state.is_done() && job.expired)
                })
                .map(|(id, job)| (-job.priority, id.clone()))
                .collect();
            order.sort();
            let (_, id) = order.into_iter().next()?;
            let job = self.jobs.get_mut(&id)?;
            if job.state == JobState::Cancelling {
                (job.state, job.events) = (JobState::Cancelled, job.events + 1);
            } else if job.left == 0 {
                (job.state, job.events) = (JobState::Failed, job.events + 1);
            } else {
                (job.state, job.expired) = (JobState::Running, false);
                (job.attempt, job.left) = (job.attempt + 1, job.left - 1);
                return Some(id);
            }
        }
    }
}

/// Two clients, one of which is never in a hurry.
fn principal(priority: i32) -> &'static str {
    if priority < 0 { "patient" } else { "hasty" }
}

async fn submit(
    store: &JobStore,
    oracle: &mut Oracle,
    (model, seed, request, priority): (u8, u64, Option<u8>, i32),
) {
    let spec = quantize(&model.to_string(), seed);
    let found = store
        .submit(&NewJob {
            spec,
            request_id: request.map(|r| r.to_string()),
            priority,
            principal: principal(priority).to_owned(),
            trace: None,
        })
        .await;
    let known = request.and_then(|request| oracle.requests.get(&request));
    let active = oracle.jobs.iter().find(|(_, job)| job.model == model && !job.state.is_done());
    let queued = oracle.jobs.values().filter(|job| job.state == JobState::Queued).count();
    let theirs = |job: &&Job| principal(job.priority) == principal(priority);
    let theirs = oracle.jobs.values().filter(|job| !job.state.is_done()).filter(theirs).count();
    let expected = match (known, active) {
        (Some((id, m, s)), _) if (*m, *s) == (model, seed) => Ok(Some(id.clone())),
        (Some(_), _) => Err("request_id"),
        (None, Some((id, job))) if job.seed == seed => Ok(Some(id.clone())),
        (None, Some(_)) => Err("busy"),
        (None, None) if queued >= limits().queued => Err("full"),
        (None, None) if theirs >= limits().per_principal => Err("quota"),
        (None, None) => Ok(None),
    };
    match (found, expected) {
        (Ok(found), Ok(expected)) => {
            let novelty = if expected.is_some() { Novelty::Replayed } else { Novelty::New };
            assert_eq!(found.novelty, novelty);
            if let Some(expected) = expected {
                assert_eq!(found.id, expected);
            } else {
                let job = Job {
                    model,
                    seed,
                    priority,
                    state: JobState::Queued,
                    attempt: 0,
                    left: limits().attempts,
                    expired: false,
                    events: 1,
                };
                oracle.jobs.insert(found.id.clone(), job);
            }
            if let Some(request) = request {
                oracle.requests.entry(request).or_insert((found.id, model, seed));
            }
        }
        (Err(Error::InvalidArgument { field, .. }), Err("request_id")) => {
            assert_eq!(field, "request_id");
        }
        (Err(Error::Busy { .. }), Err("busy"))
        | (Err(Error::Overloaded { .. }), Err("full"))
        | (Err(Error::QuotaExceeded { .. }), Err("quota")) => {}
        (found, expected) => panic!("{found:?}, expected {expected:?}"),
    }
}

async fn apply(store: &JobStore, oracle: &mut Oracle, step: Step) {
    let job_at = |oracle: &Oracle, index: usize| {
        let count = oracle.jobs.len();
        (count > 0).then(|| oracle.jobs.keys().nth(index % count).cloned()).flatten()
    };
    let lease_at = |oracle: &Oracle, index: usize| {
        let count = oracle.leases.len();
        (count > 0).then(|| oracle.leases[index % count].clone())
    };
    match step {
        Step::Submit { model, seed, request, priority } => {
            submit(store, oracle, (model, seed, request, priority)).await;
        }
        Step::Cancel(index) => {
            let Some(id) = job_at(oracle, index) else { return };
            store.request_cancel(&id).await.unwrap();
            let job = oracle.jobs.get_mut(&id).unwrap();
            match job.state {
                JobState::Queued => {
                    (job.state, job.events) = (JobState::Cancelled, job.events + 1);
                }
                JobState::Running => job.state = JobState::Cancelling,
                JobState::Cancelling
                | JobState::Succeeded
                | JobState::Failed
                | JobState::Cancelled => {}
            }
        }
        Step::Delete(index) => {
            let Some(id) = job_at(oracle, index) else { return };
            let deleted = store.delete(&id).await;
            if oracle.jobs[&id].state.is_done() {
                deleted.unwrap();
                oracle.jobs.remove(&id);
                oracle.requests.retain(|_, (job, _, _)| *job != id);
            } else {
                assert!(matches!(deleted, Err(Error::FailedPrecondition { .. })));
            }
        }
        Step::Claim => {
            let found = store.claim("worker").await.unwrap().map(|claimed| claimed.lease);
            let expected = oracle.claim();
            assert_eq!(found.as_ref().map(|lease| &lease.id), expected.as_ref());
            oracle.leases.extend(found);
        }
        Step::Heartbeat(index) => {
            let Some(lease) = lease_at(oracle, index) else { return };
            let found = store.heartbeat(&lease).await.unwrap();
            let mut job = oracle.held(&lease);
            if let Some(job) = &mut job {
                job.expired = false;
            }
            assert_eq!(found, Oracle::standing(job));
        }
        Step::Report(index) => {
            let Some(lease) = lease_at(oracle, index) else { return };
            let found = store.report(&lease, &JobProgress::default()).await.unwrap();
            let mut job = oracle.held(&lease);
            if let Some(job) = &mut job {
                (job.expired, job.events) = (false, job.events + 1);
            }
            assert_eq!(found, Oracle::standing(job));
        }
        Step::Finish(index) => {
            let Some(lease) = lease_at(oracle, index) else { return };
            let found = store.finish(&lease, &failure(Error::Deadline)).await.unwrap();
            let mut job = oracle.held(&lease);
            assert_eq!(found, Oracle::standing(job.as_deref_mut()));
            if let Some(job) = job {
                (job.state, job.events) = (JobState::Failed, job.events + 1);
            }
        }
        Step::Release(index) => {
            let Some(lease) = lease_at(oracle, index) else { return };
            store.release(&lease).await.unwrap();
            match oracle.held(&lease) {
                Some(job) if job.state == JobState::Cancelling => {
                    (job.state, job.events) = (JobState::Cancelled, job.events + 1);
                }
                Some(job) => (job.state, job.left) = (JobState::Queued, job.left + 1),
                None => {}
            }
        }
        Step::Expire => {
            store.forget_leases().await.unwrap();
            for job in oracle.jobs.values_mut().filter(|job| !job.state.is_done()) {
                job.expired = job.state != JobState::Queued;
            }
        }
    }
}

/// Every job is in the state that the oracle says, with as many events.
async fn compare(store: &JobStore, oracle: &Oracle) {
    let found = store.list(&vitq::engine::jobs::JobFilter::default(), None, 1000).await.unwrap();
    let found: BTreeMap<_, _> = found
        .into_iter()
        .map(|job| (job.id, (job.state, job.attempt, job.last_sequence, job.outcome.is_some())))
        .collect();
    let expected: BTreeMap<_, _> = oracle
        .jobs
        .iter()
        .map(|(id, job)| (id.clone(), (job.state, job.attempt, job.events, job.state.is_done())))
        .collect();
    assert_eq!(found, expected);
    for (id, job) in &oracle.jobs {
        let numbers = store.events(id, 0).await.unwrap().into_iter().map(|event| event.sequence);
        assert!(numbers.eq(1..=job.events));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_does_what_its_model_does() {
    let cases: u32 = std::env::var("STORE_CASES").ok().map_or(6, |n| n.parse().unwrap());
    on_both(async |store: Arc<JobStore>| {
        let mut runner = TestRunner::new_with_rng(
            Config::default(),
            prop::test_runner::TestRng::deterministic_rng(prop::test_runner::RngAlgorithm::ChaCha),
        );
        // One long history: what one case leaves, the next one meets.
        let mut oracle = Oracle::default();
        for _ in 0..cases {
            let steps = prop::collection::vec(step(), 60).new_tree(&mut runner).unwrap().current();
            for step in steps {
                apply(&store, &mut oracle, step).await;
            }
            compare(&store, &oracle).await;
        }
    })
    .await;
}
