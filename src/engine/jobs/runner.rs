//! Worker threads that run jobs, and the handle through which calls reach them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tch::Device;
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use super::progress::JobReporter;
use super::{
    JobEvent, JobEventKind, JobId, JobOutput, JobRecord, JobSpec, JobState, JobStore, NewJob,
    Novelty, Submitted, evaluate, quantize,
};
use crate::data::DecodeLimits;
use crate::engine::device::panic_text;
use crate::engine::names::NamedFolder;
use crate::engine::registry::{ModelRegistry, blocking};
use crate::error::{Error, Result};

/// Pause after a store that could not be read.
const STORE_RETRY: Duration = Duration::from_secs(1);
/// Events between the store and a slow reader.
const STREAM_BUFFER: usize = 16;

/// What jobs work with.
#[derive(Debug)]
pub struct RunnerParts {
    /// Where jobs are kept.
    pub store: Arc<dyn JobStore>,
    /// Where models go and come from.
    pub registry: Arc<ModelRegistry>,
    /// Where checkpoints are found.
    pub checkpoints: NamedFolder,
    /// Where data sets are found.
    pub datasets: NamedFolder,
    /// Where calibrations compute.
    pub device: Device,
    /// What is accepted as an image.
    pub limits: DecodeLimits,
    /// Jobs that run at the same time.
    pub workers: usize,
}

/// Runs jobs on its own threads until it is stopped.
#[derive(Debug)]
pub struct JobRunner {
    pub(super) parts: RunnerParts,
    pub(super) runtime: Handle,
    running: Mutex<BTreeMap<JobId, CancellationToken>>,
    wake: Notify,
    stop: CancellationToken,
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
    pub fn store(&self) -> &dyn JobStore {
        &*self.parts.store
    }

    /// Checks a request as [`JobRunner::submit`] does, and does nothing else.
    ///
    /// # Errors
    /// As [`JobRunner::submit`].
    pub async fn check(self: &Arc<Self>, spec: &JobSpec) -> Result<()> {
        let (runner, spec) = (Arc::clone(self), spec.clone());
        blocking(move || match &spec {
            JobSpec::Quantize(job) => quantize::check(&runner.parts, job),
            JobSpec::Evaluate(job) => evaluate::check(&runner.parts, job),
        })
        .await
    }

    /// Checks a request and queues it.
    ///
    /// # Errors
    /// `Draining`; `InvalidArgument` and `NotFound` for what the request names; `AlreadyExists`
    /// when the model id is taken; `Overloaded` when too many jobs wait.
    pub async fn submit(self: &Arc<Self>, job: NewJob) -> Result<Submitted> {
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
        self.check(&job.spec).await?;
        let submitted = self.parts.store.submit(job).await?;
        self.wake.notify_one();
        Ok(submitted)
    }

    /// Asks a job to stop; returns before it has. A job that has ended is left alone.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn cancel(&self, id: &JobId) -> Result<()> {
        self.parts.store.request_cancel(id).await?;
        if let Some(token) = lock(&self.running).get(id) {
            token.cancel();
        }
        Ok(())
    }

    /// The job's events after a sequence number, as they come; the channel closes after the last.
    /// A reader that goes away changes nothing for the job.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn watch(&self, id: &JobId, after: u64) -> Result<mpsc::Receiver<Result<JobEvent>>> {
        let store = Arc::clone(&self.parts.store);
        let id = id.clone();
        let mut changes = store.changes(&id).await?;
        let (sender, receiver) = mpsc::channel(STREAM_BUFFER);
        tokio::spawn(async move {
            let mut after = after;
            loop {
                changes.mark_unchanged();
                let events = match store.events(&id, after).await {
                    Ok(events) => events,
                    Err(error) => {
                        let _ = sender.send(Err(error)).await; // nobody else to tell
                        return;
                    }
                };
                for event in events {
                    after = event.sequence;
                    let last = matches!(event.kind, JobEventKind::Ended(_));
                    if sender.send(Ok(event)).await.is_err() || last {
                        return;
                    }
                }
                if store
                    .get(&id)
                    .await
                    .is_ok_and(|job| job.state.is_done() && after >= job.last_sequence)
                {
                    return;
                }
                tokio::select! {
                    () = sender.closed() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(receiver)
    }

    /// Waits until a job has ended or the time is over; its latest state.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn wait(&self, id: &JobId, timeout: Option<Duration>) -> Result<JobRecord> {
        let mut changes = self.parts.store.changes(id).await?;
        let ended = async {
            loop {
                changes.mark_unchanged();
                if self.parts.store.get(id).await?.state.is_done() {
                    return Ok::<(), Error>(());
                }
                if changes.changed().await.is_err() {
                    return Ok(());
                }
            }
        };
        match timeout {
            Some(timeout) => tokio::time::timeout(timeout, ended).await.unwrap_or(Ok(()))?,
            None => ended.await?,
        }
        self.parts.store.get(id).await
    }

    /// Ends every job, running or queued, with `Draining`, and takes no more.
    pub async fn stop(&self) {
        self.stop.cancel();
        loop {
            match self.parts.store.claim().await {
                Ok(Some(job)) => self.finish(&job.id, Err(Error::Draining)).await,
                Ok(None) => return,
                Err(error) => {
                    tracing::error!(%error, "queued jobs could not be ended");
                    return;
                }
            }
        }
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
        while let Some(job) = self.runtime.block_on(self.next_job()) {
            let span = tracing::info_span!("job", id = %job.id, kind = job.spec.kind(), model = %job.spec.model());
            span.in_scope(|| self.run(&job));
        }
    }

    async fn next_job(&self) -> Option<JobRecord> {
        loop {
            if self.stop.is_cancelled() {
                return None;
            }
            match self.parts.store.claim().await {
                Ok(Some(job)) => return Some(job),
                Ok(None) => tokio::select! {
                    () = self.wake.notified() => {}
                    () = self.stop.cancelled() => {}
                },
                Err(error) => {
                    tracing::error!(%error, "the job store could not be read");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
    }

    fn run(&self, job: &JobRecord) {
        let token = self.stop.child_token();
        lock(&self.running).insert(job.id.clone(), token.clone());
        // A cancellation may have come between the claim and the token.
        let now = self.runtime.block_on(self.parts.store.get(&job.id));
        if now.is_ok_and(|now| now.state == JobState::Cancelling) {
            token.cancel();
        }
        let store = Arc::clone(&self.parts.store);
        let reporter = JobReporter::new(store, job.id.clone(), self.runtime.clone(), token);
        tracing::info!("job started");
        let result = catch_unwind(AssertUnwindSafe(|| match &*job.spec {
            JobSpec::Quantize(spec) => quantize::run(self, spec, &reporter),
            JobSpec::Evaluate(spec) => evaluate::run(self, spec, &reporter),
        }))
        .unwrap_or_else(|panic| {
            Err(Error::internal(format!("panic: {}", panic_text(panic.as_ref()))))
        });
        reporter.flush();
        lock(&self.running).remove(&job.id);
        let result = match result {
            Err(Error::Cancelled) if self.stop.is_cancelled() => Err(Error::Draining),
            result => result,
        };
        self.runtime.block_on(self.finish(&job.id, result));
    }

    async fn finish(&self, id: &JobId, result: Result<JobOutput>) {
        match &result {
            Ok(_) => tracing::info!("job succeeded"),
            Err(error) => {
                tracing::warn!(job = %id, error = error as &dyn std::error::Error, "job ended")
            }
        }
        let outcome = result.map(Arc::new).map_err(Arc::new);
        if let Err(error) = self.parts.store.finish(id, outcome).await {
            tracing::error!(%error, job = %id, "the end of a job was not stored");
        }
    }
}

/// No code panics while it holds one of these locks, so what they guard is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
