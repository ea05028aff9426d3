//! Jobs in memory: gone with the process.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;

use super::{
    JobEvent, JobEventKind, JobId, JobOutcome, JobProgress, JobRecord, JobState, JobStore, NewJob,
    Novelty, Submitted,
};
use crate::error::{Error, Result};

/// Jobs that may wait for a worker.
const MAX_QUEUED: usize = 64;
/// Jobs that are kept after their end.
const MAX_ENDED: usize = 1000;
/// Events that are kept per job: an hour and more at five a second.
const MAX_EVENTS: usize = 20_000;
/// When a caller who met a full queue should come back.
const RETRY_AFTER: std::time::Duration = std::time::Duration::from_secs(10);

/// A [`JobStore`] in memory.
#[derive(Debug, Default)]
pub struct MemoryJobStore {
    jobs: Mutex<Jobs>,
}

#[derive(Debug, Default)]
struct Jobs {
    by_id: BTreeMap<JobId, Job>,
    /// Order of arrival; ULIDs of one millisecond do not have one.
    arrival: Vec<JobId>,
}

#[derive(Debug)]
struct Job {
    record: JobRecord,
    request: Option<(String, String)>, // request id, fingerprint
    events: VecDeque<JobEvent>,
    changed: watch::Sender<u64>,
}

impl MemoryJobStore {
    /// No code panics while it holds the lock, so a poisoned map is still whole.
    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, id: &JobId, work: impl FnOnce(&mut Job) -> T) -> Result<T> {
        self.lock().by_id.get_mut(id).map(work).ok_or_else(|| not_found(id))
    }
}

impl Jobs {
    fn find_request(&self, request_id: &str, fingerprint: &str) -> Result<Option<JobId>> {
        let asked = |job: &&Job| job.request.as_ref().is_some_and(|(id, _)| id == request_id);
        let Some(job) = self.by_id.values().find(asked) else { return Ok(None) };
        if job.request.as_ref().is_some_and(|(_, known)| known == fingerprint) {
            return Ok(Some(job.record.id.clone()));
        }
        let reason = "an earlier call with this id asked for something else";
        Err(Error::invalid("request_id", reason))
    }

    /// Forgets the oldest ended jobs beyond the limit.
    fn trim(&mut self) {
        let ended = |jobs: &BTreeMap<JobId, Job>, id: &JobId| {
            jobs.get(id).is_some_and(|job| job.record.state.is_done())
        };
        let count = self.arrival.iter().filter(|id| ended(&self.by_id, id)).count();
        for _ in MAX_ENDED..count {
            let Some(at) = self.arrival.iter().position(|id| ended(&self.by_id, id)) else {
                return;
            };
            let id = self.arrival.remove(at);
            self.by_id.remove(&id);
        }
    }
}

impl Job {
    fn push(&mut self, kind: JobEventKind) {
        self.record.last_sequence += 1;
        let sequence = self.record.last_sequence;
        self.events.push_back(JobEvent { sequence, time: Timestamp::now(), kind });
        if self.events.len() > MAX_EVENTS {
            // The first event says that the job exists; the oldest progress behind it can go.
            self.events.remove(1);
        }
        self.changed.send_replace(sequence);
    }

    fn finish(&mut self, outcome: JobOutcome) {
        if self.record.state.is_done() {
            return;
        }
        self.record.state = match &outcome {
            Ok(_) => JobState::Succeeded,
            Err(error) if matches!(**error, Error::Cancelled) => JobState::Cancelled,
            Err(_) => JobState::Failed,
        };
        self.record.ended = Some(Timestamp::now());
        self.record.outcome = Some(outcome.clone());
        self.record.spec = Arc::new(self.record.spec.without_contents());
        self.push(JobEventKind::Ended(outcome));
    }
}

#[async_trait]
impl JobStore for MemoryJobStore {
    async fn find_request(&self, request_id: &str, fingerprint: &str) -> Result<Option<JobId>> {
        self.lock().find_request(request_id, fingerprint)
    }

    async fn submit(&self, job: NewJob) -> Result<Submitted> {
        let NewJob { spec, request_id } = job;
        let fingerprint = spec.fingerprint()?;
        let mut jobs = self.lock();
        if let Some(request_id) = &request_id
            && let Some(id) = jobs.find_request(request_id, &fingerprint)?
        {
            return Ok(Submitted { id, novelty: Novelty::Replayed });
        }
        let active = || jobs.by_id.values().map(|job| &job.record).filter(|r| !r.state.is_done());
        if let Some(target) = spec.target()
            && active().any(|record| record.spec.target() == Some(target))
        {
            return Err(Error::AlreadyExists { kind: "model", name: target.to_string() });
        }
        if active().filter(|record| record.state == JobState::Queued).count() >= MAX_QUEUED {
            return Err(Error::Overloaded {
                reason: format!("{MAX_QUEUED} jobs are waiting already"),
                retry_after: RETRY_AFTER,
            });
        }
        let id = JobId::new();
        let mut job = Job {
            record: JobRecord {
                id: id.clone(),
                spec: Arc::new(spec),
                state: JobState::Queued,
                created: Timestamp::now(),
                started: None,
                ended: None,
                progress: None,
                last_sequence: 0,
                outcome: None,
            },
            request: request_id.map(|request_id| (request_id, fingerprint)),
            events: VecDeque::new(),
            changed: watch::Sender::new(0),
        };
        job.push(JobEventKind::Accepted);
        jobs.arrival.push(id.clone());
        jobs.by_id.insert(id.clone(), job);
        jobs.trim();
        Ok(Submitted { id, novelty: Novelty::New })
    }

    async fn get(&self, id: &JobId) -> Result<JobRecord> {
        self.with(id, |job| job.record.clone())
    }

    async fn list(&self, before: Option<&JobId>, count: usize) -> Result<Vec<JobRecord>> {
        let jobs = self.lock();
        let end = before.map_or(jobs.arrival.len(), |before| {
            jobs.arrival.iter().position(|id| id == before).unwrap_or(0)
        });
        let newest_first = jobs.arrival[..end].iter().rev().take(count);
        Ok(newest_first.filter_map(|id| Some(jobs.by_id.get(id)?.record.clone())).collect())
    }

    async fn delete(&self, id: &JobId) -> Result<()> {
        let mut jobs = self.lock();
        let job = jobs.by_id.get(id).ok_or_else(|| not_found(id))?;
        if !job.record.state.is_done() {
            let reason = format!("operation `{id}` has not ended, cancel it first");
            return Err(Error::FailedPrecondition { reason });
        }
        jobs.by_id.remove(id);
        jobs.arrival.retain(|other| other != id);
        Ok(())
    }

    async fn claim(&self) -> Result<Option<JobRecord>> {
        let mut jobs = self.lock();
        let Jobs { by_id, arrival } = &mut *jobs;
        let queued =
            |id: &&JobId| by_id.get(*id).is_some_and(|job| job.record.state == JobState::Queued);
        let Some(id) = arrival.iter().find(queued) else { return Ok(None) };
        Ok(by_id.get_mut(id).map(|job| {
            job.record.state = JobState::Running;
            job.record.started = Some(Timestamp::now());
            job.record.clone()
        }))
    }

    async fn request_cancel(&self, id: &JobId) -> Result<()> {
        self.with(id, |job| match job.record.state {
            JobState::Queued => job.finish(Err(Arc::new(Error::Cancelled))),
            JobState::Running => job.record.state = JobState::Cancelling,
            JobState::Cancelling | JobState::Succeeded | JobState::Failed | JobState::Cancelled => {
            }
        })
    }

    async fn report(&self, id: &JobId, progress: JobProgress) -> Result<()> {
        self.with(id, |job| {
            // The latest state has no use for the sites of one step.
            job.record.progress = Some(JobProgress { sites: Vec::new(), ..progress.clone() });
            job.push(JobEventKind::Progress(progress));
        })
    }

    async fn finish(&self, id: &JobId, outcome: JobOutcome) -> Result<()> {
        self.with(id, |job| job.finish(outcome))
    }

    async fn events(&self, id: &JobId, after: u64) -> Result<Vec<JobEvent>> {
        self.with(id, |job| {
            job.events.iter().filter(|event| event.sequence > after).cloned().collect()
        })
    }

    async fn changes(&self, id: &JobId) -> Result<watch::Receiver<u64>> {
        self.with(id, |job| job.changed.subscribe())
    }
}

fn not_found(id: &JobId) -> Error {
    Error::NotFound { kind: "operation", name: format!("operations/{id}") }
}

#[cfg(test)]
mod tests {
    use super::super::{EvaluateJob, ImageChoice, JobSpec, QuantizeJob};
    use super::*;
    use crate::engine::jobs::Afterwards;
    use crate::engine::names::ModelId;

    fn quantize(model: &str, seed: u64) -> JobSpec {
        JobSpec::Quantize(QuantizeJob {
            model: ModelId::parse(model, "model_id").unwrap(),
            checkpoint: "c".into(),
            request: serde_json::from_value(serde_json::json!({
                "method": "ubb", "weight_bits": 4, "activation_bits": 4, "stem_head": "float",
                "seed": seed
            }))
            .unwrap(),
            images: ImageChoice::inline(vec!["image".into()]),
            labels: BTreeMap::new(),
            afterwards: Afterwards::Keep,
        })
    }

    fn evaluate(model: &str) -> JobSpec {
        let model = ModelId::parse(model, "model").unwrap();
        JobSpec::Evaluate(EvaluateJob { model, dataset: "d".into(), limit: None, seed: 0 })
    }

    async fn submit(store: &MemoryJobStore, spec: JobSpec, id: Option<&str>) -> Result<Submitted> {
        store.submit(NewJob { spec, request_id: id.map(str::to_owned) }).await
    }

    #[tokio::test]
    async fn a_model_is_made_by_one_job_at_a_time() {
        let store = MemoryJobStore::default();
        let first = submit(&store, quantize("a", 0), None).await.unwrap();
        let error = submit(&store, quantize("a", 1), None).await.unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }));
        submit(&store, evaluate("a"), None).await.unwrap();
        submit(&store, quantize("b", 0), None).await.unwrap();
        store.request_cancel(&first.id).await.unwrap();
        submit(&store, quantize("a", 1), None).await.unwrap();
    }

    #[tokio::test]
    async fn a_request_id_finds_its_job_and_no_other() {
        let store = MemoryJobStore::default();
        let first = submit(&store, quantize("a", 0), Some("r")).await.unwrap();
        let again = submit(&store, quantize("a", 0), Some("r")).await.unwrap();
        assert_eq!((again.id, again.novelty), (first.id, Novelty::Replayed));
        let error = submit(&store, quantize("a", 1), Some("r")).await.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { field, .. } if field == "request_id"));
    }

    #[tokio::test]
    async fn events_are_numbered_replayed_and_end_once() {
        let store = MemoryJobStore::default();
        let id = submit(&store, quantize("a", 0), None).await.unwrap().id;
        let changes = store.changes(&id).await.unwrap();
        assert_eq!(store.claim().await.unwrap().unwrap().id, id);
        assert!(store.claim().await.unwrap().is_none());
        store.report(&id, JobProgress::default()).await.unwrap();
        store.request_cancel(&id).await.unwrap();
        assert_eq!(store.get(&id).await.unwrap().state, JobState::Cancelling);
        store.finish(&id, Err(Arc::new(Error::Cancelled))).await.unwrap();
        store.finish(&id, Err(Arc::new(Error::Deadline))).await.unwrap();
        store.request_cancel(&id).await.unwrap();
        assert_eq!(*changes.borrow(), 3);
        let later = store.events(&id, 1).await.unwrap();
        assert_eq!(later.iter().map(|e| e.sequence).collect::<Vec<_>>(), [2, 3]);
        let record = store.get(&id).await.unwrap();
        assert_eq!(record.state, JobState::Cancelled);
        let JobSpec::Quantize(QuantizeJob { images: ImageChoice::Inline { contents, .. }, .. }) =
            &*record.spec
        else {
            panic!()
        };
        assert!(contents.is_empty(), "an ended job keeps no images");
    }

    #[tokio::test]
    async fn only_ended_jobs_are_deleted_and_pages_go_back_in_time() {
        let store = MemoryJobStore::default();
        let mut ids = Vec::new();
        for model in ["a", "b", "c"] {
            ids.push(submit(&store, quantize(model, 0), None).await.unwrap().id);
        }
        let page = store.list(Some(&ids[2]), 5).await.unwrap();
        assert_eq!(page.iter().map(|r| &r.id).collect::<Vec<_>>(), [&ids[1], &ids[0]]);
        let error = store.delete(&ids[0]).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }));
        store.request_cancel(&ids[0]).await.unwrap();
        store.delete(&ids[0]).await.unwrap();
        assert!(matches!(store.get(&ids[0]).await.unwrap_err(), Error::NotFound { .. }));
        assert_eq!(store.list(None, 2).await.unwrap().len(), 2);
    }

    #[tokio::test]
    async fn a_full_queue_says_when_to_come_back() {
        let store = MemoryJobStore::default();
        for n in 0..MAX_QUEUED {
            submit(&store, evaluate(&n.to_string()), None).await.unwrap();
        }
        let error = submit(&store, evaluate("x"), None).await.unwrap_err();
        assert!(matches!(error, Error::Overloaded { .. }));
    }
}
