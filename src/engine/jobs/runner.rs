//! Worker threads that run jobs, and the handle through which calls reach them.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tch::Device;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;
use tracing::field::Empty;

use super::progress::{Hold, JobReporter, keep_alive};
use super::store::{Claimed, JobStore, Standing};
use super::{
    JobEvent, JobEventKind, JobId, JobOutput, JobRecord, JobSpec, JobState, NewJob, Novelty,
    Submitted, evaluate, quantize,
};
use crate::artifact::store::ArtifactStore;
use crate::data::DecodeLimits;
use crate::engine::device::{DeviceHandle, panic_text};
use crate::engine::garbage::Garbage;
use crate::engine::registry::{ModelRegistry, blocking};
use crate::engine::resources::Resources;
use crate::error::{Error, Result};
use crate::telemetry::{self, metrics};

/// Pause after a store that could not be read.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// How often a worker looks for jobs that other processes submitted or lost.
const POLL: Duration = Duration::from_secs(1);
/// How long a reader may leave an event before it counts as slow.
const PATIENCE: Duration = Duration::from_secs(1);
/// What metrics call the end of a job that another process goes on with.
const RELEASED: &str = "released";
/// Events between the store and a reader.
const STREAM_BUFFER: usize = 16;

/// What jobs work with.
#[derive(Debug)]
pub struct RunnerParts {
    /// Where jobs are kept.
    pub store: Arc<JobStore>,
    /// Where finished units of unfinished jobs are kept.
    pub artifacts: Arc<dyn ArtifactStore>,
    /// Removes what no job needs any more.
    pub garbage: Garbage,
    /// Where models go and come from.
    pub registry: Arc<ModelRegistry>,
    /// Where checkpoints and data sets are found.
    pub resources: Arc<Resources>,
    /// Where calibrations compute.
    pub device: Device,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
    /// Jobs that run at the same time.
    pub workers: usize,
    /// Images of an evaluation that a worker takes at a time.
    pub shard_images: usize,
}

/// What a worker does next.
#[derive(Debug)]
enum Work {
    /// A job that it holds from now on.
    Job(Claimed),
    /// Shards of a job that another process holds.
    Help(JobRecord),
}

/// Runs jobs on its own threads until it is stopped.
#[derive(Debug)]
pub struct JobRunner {
    pub(super) parts: RunnerParts,
    pub(super) runtime: Handle,
    running: Mutex<BTreeMap<JobId, Arc<Hold>>>,
    /// Names this process in the database.
    pub(super) name: String,
    wake: Notify,
    pub(super) stop: CancellationToken,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl JobRunner {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// `Io` when the operating system has no thread left.
    pub fn start(parts: RunnerParts, runtime: Handle) -> Result<Arc<Self>> {
        let workers = parts.workers;
        let runner = Arc::new(Self {
            parts,
            runtime,
            running: Mutex::default(),
            name: process_name(),
            wake: Notify::new(),
            stop: CancellationToken::new(),
            threads: Mutex::default(),
        });
        for index in 0..workers {
            let worker = Arc::clone(&runner);
            let thread = thread::Builder::new()
                .name(format!("job-{index}"))
                .spawn(move || worker.work())
                .map_err(|error| Error::io("job thread", error))?;
            lock(&runner.threads).push(thread);
        }
        Ok(runner)
    }

    /// The store, for reading.
    pub fn store(&self) -> &JobStore {
        &self.parts.store
    }

    /// Where models are made and read.
    pub fn registry(&self) -> &ModelRegistry {
        &self.parts.registry
    }

    /// Checks a request as [`JobRunner::submit`] does, and does nothing else; the request with its
    /// names pinned.
    ///
    /// # Errors
    /// As [`JobRunner::submit`].
    pub async fn check(self: &Arc<Self>, spec: JobSpec) -> Result<JobSpec> {
        // A model that another server made or deleted a moment ago counts, too.
        self.parts.registry.refresh().await?;
        let runner = Arc::clone(self);
        blocking(move || match spec {
            JobSpec::Quantize(job) => quantize::check(&runner.parts, job).map(JobSpec::Quantize),
            JobSpec::Evaluate(job) => evaluate::check(&runner.parts, job).map(JobSpec::Evaluate),
        })
        .await
    }

    /// Checks a request and queues it.
    ///
    /// # Errors
    /// `Draining`; `InvalidArgument` and `NotFound` for what the request names; `AlreadyExists`
    /// when the model id is taken; `Overloaded` when too many jobs wait; `QuotaExceeded` when too many are
    /// the principal's.
    pub async fn submit(self: &Arc<Self>, mut job: NewJob) -> Result<Submitted> {
        if self.stop.is_cancelled() {
            return Err(Error::Draining);
        }
        // A repeated call must find its job even when that job's own model is in the way by now.
        if let Some(request_id) = &job.request_id
            && let Some(id) =
                self.parts.store.find_request(request_id, &job.spec.fingerprint()?).await?
        {
            return Ok(Submitted { id, novelty: Novelty::Replayed });
        }
        job.spec = self.check(job.spec).await?;
        let submitted = self.parts.store.submit(&job).await?;
        self.wake.notify_one();
        Ok(submitted)
    }

    /// Asks a job to stop; returns before it has. A job that has ended is left alone.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn cancel(&self, id: &JobId) -> Result<()> {
        self.parts.store.request_cancel(id).await?;
        if let Some(hold) = lock(&self.running).get(id) {
            hold.stop.cancel();
        }
        Ok(())
    }

    /// The job's events after a sequence number, as they come; the channel closes after the last.
    /// A reader that goes away changes nothing for the job; a slow one misses progress, not the end; a
    /// server that stops ends the channel with `Draining`, and the job goes on elsewhere or later.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn watch(&self, id: &JobId, after: u64) -> Result<mpsc::Receiver<Result<JobEvent>>> {
        self.parts.store.get(id).await?;
        let (store, stop, id) = (Arc::clone(&self.parts.store), self.stop.clone(), id.clone());
        let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
        tokio::spawn(async move {
            let mut after = after;
            loop {
                let events = match store.events(&id, after).await {
                    Ok(events) => events,
                    Err(error) => {
                        let _ = sender.send(Err(error)).await; // nobody else to tell
                        return;
                    }
                };
                for event in events {
                    let (sequence, last) =
                        (event.sequence, matches!(event.kind, JobEventKind::Ended(_)));
                    match tokio::time::timeout(PATIENCE, sender.reserve()).await {
                        Ok(Ok(room)) => {
                            after = sequence;
                            room.send(Ok(event));
                        }
                        Ok(Err(_)) => return,
                        // What piled up in front of a slow reader is old by the time there is room
                        // again: it gets the newest event, and the gap in the numbers tells.
                        Err(_) => {
                            if sender.reserve().await.is_err() {
                                return;
                            }
                            if let Ok(job) = store.get(&id).await {
                                after = after.max(job.last_sequence.saturating_sub(1));
                            }
                            break;
                        }
                    }
                    if last {
                        return;
                    }
                }
                match store.get(&id).await {
                    Ok(job) if job.state.is_done() && after >= job.last_sequence => return,
                    Ok(_) | Err(_) => {}
                }
                let message = tokio::select! {
                    () = sender.closed() => return,
                    () = stop.cancelled() => Err(Error::Draining),
                    changed = store.changed(&id, after) => match changed {
                        Ok(()) => continue,
                        Err(error) => Err(error),
                    },
                    () = tokio::time::sleep(store.limits().heartbeat) => Ok(JobEvent {
                        sequence: after,
                        time: Timestamp::now(),
                        kind: JobEventKind::Heartbeat,
                    }),
                };
                let last = message.is_err();
                if sender.send(message).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(receiver)
    }

    /// Waits until a job has ended, the time is over or the server stops; its latest state.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable`.
    pub async fn wait(&self, id: &JobId, timeout: Option<Duration>) -> Result<JobRecord> {
        let ended = async {
            loop {
                let job = self.parts.store.get(id).await?;
                if job.state.is_done() {
                    return Ok::<(), Error>(());
                }
                self.parts.store.changed(id, job.last_sequence).await?;
            }
        };
        let timeout = async {
            match timeout {
                Some(timeout) => tokio::time::sleep(timeout).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            ended = ended => ended?,
            () = timeout => {}
            () = self.stop.cancelled() => {}
        }
        self.parts.store.get(id).await
    }

    /// Takes no more jobs and gives the running ones back, to be continued by another process or
    /// after a restart.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Returns once [`JobRunner::stop`] was called.
    pub async fn stopping(&self) {
        self.stop.cancelled().await;
    }

    /// Waits until the worker threads have ended after [`JobRunner::stop`].
    ///
    /// # Errors
    /// `Internal` when a thread died.
    pub async fn stopped(&self) -> Result<()> {
        let threads = std::mem::take(&mut *lock(&self.threads));
        blocking(move || {
            for thread in threads {
                thread.join().map_err(|_| Error::internal("a job thread died"))?;
            }
            Ok(())
        })
        .await
    }

    fn work(&self) {
        let mut declined = BTreeSet::new();
        while let Some(work) = self.runtime.block_on(self.next_work(&mut declined)) {
            match work {
                Work::Job(claimed) => {
                    let kind = claimed.record.spec.kind();
                    job_span(&claimed.record, kind).in_scope(|| self.run(&claimed));
                }
                Work::Help(job) => {
                    if !job_span(&job, "shards").in_scope(|| self.help(&job)) {
                        declined.insert(job.id);
                    }
                }
            }
        }
    }

    async fn next_work(&self, declined: &mut BTreeSet<JobId>) -> Option<Work> {
        loop {
            if self.has_lost_a_device() {
                // Whoever watches the process will end it; meanwhile others do the jobs.
                self.stop.cancelled().await;
            }
            if self.stop.is_cancelled() {
                return None;
            }
            match self.look_for_work(declined).await {
                Ok(Some(work)) => return Some(work),
                Ok(None) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = tokio::time::sleep(POLL) => {}
                    () = self.stop.cancelled() => {}
                },
                Err(error) => {
                    tracing::error!(%error, "no job could be claimed");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    /// A job; if none waits, one to help with that was not `declined`.
    async fn look_for_work(&self, declined: &mut BTreeSet<JobId>) -> Result<Option<Work>> {
        if let Some(claimed) = self.parts.store.claim(&self.name).await? {
            return Ok(Some(Work::Job(claimed)));
        }
        let jobs = self.parts.store.to_help_with(&self.name).await?;
        declined.retain(|id| jobs.iter().any(|job| job.id == *id));
        Ok(jobs.into_iter().find(|job| !declined.contains(&job.id)).map(Work::Help))
    }

    /// Helps with a job; whether there is a point in doing so again. What fails here is left to the
    /// job's own worker, which tells if it fails there, too.
    fn help(&self, job: &JobRecord) -> bool {
        let JobSpec::Evaluate(spec) = &*job.spec else { return false };
        let helped = catch_unwind(AssertUnwindSafe(|| evaluate::help(self, &job.id, spec)))
            .unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
        match helped {
            Ok(helped) => helped,
            Err(Error::Unavailable { what, reason }) => {
                tracing::warn!(what, reason, "could not help with a job");
                thread::sleep(STORE_RETRY);
                true
            }
            Err(Error::Cancelled) => false,
            Err(error) => {
                tracing::warn!(%error, "could not help with a job");
                false
            }
        }
    }

    fn run(&self, claimed: &Claimed) {
        let Claimed { record: job, lease } = claimed;
        let hold = Arc::new(Hold::new(lease.clone(), self.stop.child_token()));
        lock(&self.running).insert(job.id.clone(), Arc::clone(&hold));
        // Its first beat is at once: a cancellation may have come between the claim and the entry.
        let heart = keep_alive(Arc::clone(&self.parts.store), Arc::clone(&hold));
        let heart = self.runtime.spawn(heart.in_current_span());
        let store = Arc::clone(&self.parts.store);
        let artifacts = Arc::clone(&self.parts.artifacts);
        let reporter = JobReporter::new(store, artifacts, Arc::clone(&hold), self.runtime.clone());
        let started = Instant::now();
        tracing::info!(attempt = lease.attempt, "job started");
        let result = catch_unwind(AssertUnwindSafe(|| match &*job.spec {
            JobSpec::Quantize(spec) => quantize::run(self, spec, &reporter),
            JobSpec::Evaluate(spec) => evaluate::run(self, spec, job.progress.as_ref(), &reporter),
        }))
        .unwrap_or_else(|panic| Err(panicked(panic.as_ref())));
        reporter.flush();
        lock(&self.running).remove(&job.id);
        if let Err(error) = &result
            && self.has_lost_a_device_by(error)
        {
            // The lease runs out: another process takes the job, and the attempt counts, because the job
            // may be what the device failed of.
            tracing::error!(%error, "the job is left to others: the device is lost");
            heart.abort();
            return;
        }
        let ended = self.runtime.block_on(self.end(&hold, result));
        heart.abort();
        match ended {
            Some(result) => metrics::job_ended(job.spec.kind(), result, Some(started.elapsed())),
            None if hold.is_lost() => metrics::lease_lost(),
            None => {}
        }
    }

    /// Whether a device is lost for this process: that of calibrations, or one that evaluates.
    fn has_lost_a_device(&self) -> bool {
        self.parts.registry.devices().iter().any(DeviceHandle::is_lost)
    }

    /// The same, now that a job ended with `error`: that of a calibration may be the first sign.
    fn has_lost_a_device_by(&self, error: &Error) -> bool {
        let devices = self.parts.registry.devices().iter();
        for device in devices.filter(|device| device.device() == self.parts.device) {
            device.note(error);
        }
        self.has_lost_a_device()
    }

    /// Stores how a job ended. While the database cannot be reached the heart beats on, so that
    /// nobody else starts over. The result's name, if it was stored.
    async fn end(&self, hold: &Hold, result: Result<JobOutput>) -> Option<&'static str> {
        let lease = &hold.lease;
        if hold.is_lost() {
            tracing::warn!("the job's lease was lost, what it made is dropped");
            return None;
        }
        let interrupted = matches!(result, Err(Error::Cancelled)) && self.stop.is_cancelled();
        match &result {
            Ok(_) => tracing::info!("job succeeded"),
            Err(_) if interrupted => tracing::info!("job given back"),
            Err(error) => {
                // The id that clients get is the operation's.
                let error = error as &dyn std::error::Error;
                tracing::warn!(job = %lease.id, error, "job ended");
            }
        }
        let outcome = result.map(Arc::new).map_err(Arc::new);
        loop {
            let stored = if interrupted {
                self.parts.store.release(lease).await.map(|()| Standing::Held)
            } else {
                self.parts.store.finish(lease, &outcome).await
            };
            match stored {
                Ok(Standing::Lost) => {
                    tracing::warn!("the job's lease was lost, its end was not stored");
                    hold.note(Standing::Lost);
                    return None;
                }
                Ok(Standing::Held | Standing::CancelRequested) => {
                    // Units of a job that ended are nobody's.
                    self.parts.garbage.collect().await;
                    return Some(if interrupted {
                        RELEASED
                    } else {
                        JobState::of(&outcome).name()
                    });
                }
                // Another process finds the lease expired.
                Err(error) if self.stop.is_cancelled() => {
                    tracing::error!(%error, "the end of a job was not stored");
                    return None;
                }
                Err(error) => {
                    tracing::error!(%error, "the end of a job was not stored yet");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }
}

/// Names this process among the workers of a database: the machine, in a cluster the pod, and a
/// part that no other process has.
fn process_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("{}/{}", host.trim(), ulid::Ulid::generate())
}

/// The span of everything that a process does for a job.
fn job_span(job: &JobRecord, name: &'static str) -> tracing::Span {
    let JobRecord { id, spec, trace, .. } = job;
    // Of the level of errors, so that every line of the job has it, whatever is logged.
    let span = tracing::error_span!(
        "job",
        otel.name = Empty,
        trace_id = Empty,
        span_id = Empty,
        cause_trace_id = Empty,
        %id,
        kind = spec.kind(),
        model = %spec.model(),
    );
    // A trace of its own: the call that asked for it is long over.
    telemetry::adopt(&span, name, None);
    if let Some(call) = trace {
        telemetry::link(&span, call);
    }
    span
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    Error::internal(format!("panic: {}", panic_text(panic)))
}

/// No code panics while it holds one of these locks, so what they guard is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
