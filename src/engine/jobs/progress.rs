//! From a calculation's steps to a job's events: at most five a second, and none of the sites lost.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tch::Tensor;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::store::{JobStore, Lease, Shard, ShardLease, Standing};
use super::{Figures, JobProgress};
use crate::artifact::store::{ArtifactStore, put_named};
use crate::calib::kept::{Tensors, from_bytes, to_bytes};
use crate::calib::{Progress, ProgressUpdate};
use crate::digest::sha256_hex;
use crate::error::{Error, Result};

/// Least time between two events of one stage.
const INTERVAL: Duration = Duration::from_millis(200);

/// Pause before a store that could not be reached is tried again.
const STORE_RETRY: Duration = Duration::from_secs(2);
/// Warnings that a job keeps.
const MAX_WARNINGS: usize = 16;
/// How long a job waits for a store to get what it starts from: what it loses by failing is little.
pub(super) const START: Duration = Duration::from_secs(300);

/// The [`Progress`] of a running job. Used on worker threads only: it waits for the store.
#[derive(Debug)]
pub(super) struct JobReporter {
    store: Arc<JobStore>,
    artifacts: Arc<dyn ArtifactStore>,
    hold: Arc<Hold>,
    runtime: Handle,
    throttle: Mutex<Throttle>,
    /// What the request's names stood for when the work began: a checkpoint or an image may be
    /// another one by the next attempt.
    inputs: OnceLock<String>,
}

/// The right to compute something, which heartbeats extend.
pub(super) trait Leased {
    /// One heartbeat.
    ///
    /// # Errors
    /// `Unavailable`.
    fn beat(&self, store: &JobStore) -> impl Future<Output = Result<Standing>> + Send;
}

impl Leased for Lease {
    fn beat(&self, store: &JobStore) -> impl Future<Output = Result<Standing>> + Send {
        store.heartbeat(self)
    }
}

impl Leased for ShardLease {
    fn beat(&self, store: &JobStore) -> impl Future<Output = Result<Standing>> + Send {
        store.heartbeat_shard(self)
    }
}

/// Keeps a lease alive, and learns from the store when the work is to stop.
pub(super) async fn keep_alive<L: Leased>(store: Arc<JobStore>, hold: Arc<Hold<L>>) {
    loop {
        match hold.lease.beat(&store).await {
            Ok(standing) => hold.note(standing),
            // The lease may still hold when the store answers again.
            Err(error) => tracing::warn!(%error, "a heartbeat failed"),
        }
        tokio::time::sleep(store.beat_pause()).await;
    }
}

/// A running job, or a shard of one, as everything that may stop it sees it.
#[derive(Debug)]
pub(super) struct Hold<L = Lease> {
    /// The right to run it.
    pub(super) lease: L,
    /// Asks the calculation to stop.
    pub(super) stop: CancellationToken,
    lost: AtomicBool,
}

impl<L> Hold<L> {
    pub(super) fn new(lease: L, stop: CancellationToken) -> Self {
        Self { lease, stop, lost: AtomicBool::new(false) }
    }

    /// Takes note of what the store said of the lease.
    pub(super) fn note(&self, standing: Standing) {
        match standing {
            Standing::Held => return,
            Standing::CancelRequested => {}
            Standing::Lost => self.lost.store(true, Ordering::Release),
        }
        self.stop.cancel();
    }

    /// Does something again while a store that it needs cannot be reached, for so long; `tell`
    /// hears of every failure.
    ///
    /// # Errors
    /// `Cancelled`; whatever `work` gives, `Unavailable` once the time is over.
    pub(super) fn wait_for<T>(
        &self,
        patience: Duration,
        tell: impl Fn(Error),
        mut work: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let began = Instant::now();
        loop {
            match work() {
                Err(error @ Error::Unavailable { .. }) if began.elapsed() < patience => {
                    tell(error);
                    std::thread::sleep(STORE_RETRY);
                    self.going_on()?;
                }
                result => return result,
            }
        }
    }

    /// # Errors
    /// `Cancelled` once the calculation is to stop.
    pub(super) fn going_on(&self) -> Result<()> {
        if self.stop.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Whether somebody else has the work by now.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl JobReporter {
    pub(super) fn new(
        store: Arc<JobStore>,
        artifacts: Arc<dyn ArtifactStore>,
        hold: Arc<Hold>,
        runtime: Handle,
    ) -> Self {
        let throttle = Mutex::new(Throttle::new(Instant::now()));
        Self { store, artifacts, hold, runtime, throttle, inputs: OnceLock::new() }
    }

    /// As [`Hold::wait_for`]; the failures become warnings of the job.
    ///
    /// # Errors
    /// `Cancelled`; whatever `work` gives, `Unavailable` once the time is over.
    pub(super) fn wait_for<T>(
        &self,
        patience: Duration,
        work: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        let tell = |error| {
            self.warn(error);
            self.flush();
        };
        self.hold.wait_for(patience, tell, work)
    }

    /// Says what the work is made of, by digests. Before this nothing is restored or kept.
    pub(super) fn made_of(&self, inputs: &[&str]) {
        let _ = self.inputs.set(sha256_hex(inputs.join(" ").as_bytes())); // the first call counts
    }

    async fn read_unit(&self, unit: &str) -> Result<Option<Tensors>> {
        let Some(digest) = self.store.kept_unit(&self.hold.lease.id, unit).await? else {
            return Ok(None);
        };
        from_bytes(&self.artifacts.get(&digest).await?).map(Some)
    }

    async fn write_unit(&self, unit: &str, result: &[(String, Tensor)]) -> Result<()> {
        let bytes = Bytes::from(to_bytes(result)?);
        let name = async |digest: String| {
            self.hold.note(self.store.keep_unit(&self.hold.lease, unit, &digest).await?);
            Ok(())
        };
        put_named(&*self.artifacts, bytes, name).await
    }

    /// The job as everything that may stop it sees it.
    pub(super) fn hold(&self) -> &Hold {
        &self.hold
    }

    /// The right to run the job.
    pub(super) fn lease(&self) -> &Lease {
        &self.hold.lease
    }

    /// The shards of the job, as all its workers have left them.
    ///
    /// # Errors
    /// `Unavailable`.
    pub(super) fn shards(&self) -> Result<Vec<Shard>> {
        self.runtime.block_on(self.store.shards(&self.hold.lease.id))
    }

    /// Starts a stage without units.
    pub(super) fn stage(&self, stage: &str) {
        self.report(ProgressUpdate { stage: stage.to_owned(), ..ProgressUpdate::default() });
    }

    /// Tells of something that went wrong without ending the job; it goes out with the next event.
    pub(super) fn warn(&self, error: Error) {
        tracing::warn!(%error, job = %self.hold.lease.id, "the job goes on");
        self.throttle(|throttle| throttle.warn(error));
    }

    /// Notes the figures so far; they go out with the next event.
    pub(super) fn figures(&self, figures: Figures) {
        self.throttle(|throttle| throttle.figures = Some(figures));
    }

    /// Sends what was held back.
    pub(super) fn flush(&self) {
        self.send(self.throttle(|throttle| throttle.flush(Instant::now())));
    }

    fn throttle<T>(&self, work: impl FnOnce(&mut Throttle) -> T) -> T {
        work(&mut self.throttle.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A store that refuses progress must not fail the work that progresses.
    fn send(&self, progress: Option<JobProgress>) {
        let Some(progress) = progress else { return };
        match self.runtime.block_on(self.store.report(&self.hold.lease, &progress)) {
            Ok(standing) => self.hold.note(standing),
            Err(error) => {
                tracing::warn!(%error, job = %self.hold.lease.id, "progress was not stored");
            }
        }
    }
}

impl Progress for JobReporter {
    fn report(&self, update: ProgressUpdate) {
        self.send(self.throttle(|throttle| throttle.step(update, Instant::now())));
    }

    fn restore(&self, unit: &str) -> Option<Tensors> {
        let unit = format!("{}/{unit}", self.inputs.get()?);
        match self.runtime.block_on(self.read_unit(&unit)) {
            Ok(found) => found,
            Err(error) => {
                tracing::warn!(%error, unit, "a finished unit is computed again");
                None
            }
        }
    }

    fn keep(&self, unit: &str, result: &[(String, Tensor)]) {
        let Some(inputs) = self.inputs.get() else { return };
        let unit = format!("{inputs}/{unit}");
        if let Err(error) = self.runtime.block_on(self.write_unit(&unit, result)) {
            tracing::warn!(%error, unit, "a finished unit is not kept");
        }
    }

    fn is_cancelled(&self) -> bool {
        self.hold.stop.is_cancelled()
    }
}

#[derive(Debug)]
struct Throttle {
    started: Instant,
    stage_started: Instant,
    last_sent: Instant,
    latest: JobProgress,
    figures: Option<Figures>,
    held_back: bool,
}

impl Throttle {
    fn new(now: Instant) -> Self {
        Self {
            started: now,
            stage_started: now,
            last_sent: now,
            latest: JobProgress::default(),
            figures: None,
            held_back: false,
        }
    }

    /// Tells it with the next event; more often than once it is no news.
    fn warn(&mut self, error: Error) {
        let warnings = &mut self.latest.warnings;
        if warnings.len() < MAX_WARNINGS
            && warnings.iter().all(|known| known.to_string() != error.to_string())
        {
            warnings.push(Arc::new(error));
            self.held_back = true;
        }
    }

    /// Takes a step; the event that is due, if one is.
    fn step(&mut self, update: ProgressUpdate, now: Instant) -> Option<JobProgress> {
        let ProgressUpdate { stage, unit, units, images, images_total, site, loss } = update;
        let new_stage = self.latest.stage != stage;
        if new_stage {
            self.stage_started = now;
        }
        let latest = &mut self.latest;
        (latest.stage, latest.unit, latest.units) = (stage, unit, units);
        (latest.images, latest.images_total) = (images, images_total);
        latest.sites.extend(site);
        latest.loss = loss;
        self.held_back = true;
        let due = new_stage || now.duration_since(self.last_sent) >= INTERVAL;
        if due { self.flush(now) } else { None }
    }

    /// The latest state, unless it was sent already.
    fn flush(&mut self, now: Instant) -> Option<JobProgress> {
        if !mem::take(&mut self.held_back) {
            return None;
        }
        self.last_sent = now;
        let latest = &mut self.latest;
        latest.elapsed = now.duration_since(self.started);
        latest.eta = eta(latest.unit, latest.units, now.duration_since(self.stage_started));
        latest.figures.clone_from(&self.figures);
        let sites = mem::take(&mut latest.sites);
        Some(JobProgress { sites, ..latest.clone() })
    }
}

/// The stage's remaining time if its units take equally long.
fn eta(unit: usize, units: usize, elapsed: Duration) -> Option<Duration> {
    let remaining = units.checked_sub(unit)?;
    (unit > 0).then(|| elapsed.mul_f64(remaining as f64 / unit as f64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calib::progress::SiteSqnr;

    fn update(stage: &str, unit: usize) -> ProgressUpdate {
        let site = SiteSqnr { path: format!("s{unit}"), operand: "input".into(), sqnr_db: 20.0 };
        ProgressUpdate {
            stage: stage.into(),
            unit,
            units: 10,
            images: 1,
            images_total: 4,
            site: Some(site),
            loss: None,
        }
    }

    #[test]
    fn steps_are_thinned_out_but_no_site_is_lost() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut throttle = Throttle::new(start);
        let events = [
            throttle.step(update("calibrate", 1), at(1)),
            throttle.step(update("calibrate", 2), at(50)),
            throttle.step(update("calibrate", 3), at(100)),
            throttle.step(update("calibrate", 4), at(201)),
            throttle.step(update("calibrate", 5), at(210)),
            throttle.step(update("store", 0), at(211)),
            throttle.flush(at(212)),
        ];
        let sent: Vec<_> = events.iter().flatten().map(|e| (&*e.stage, e.sites.len())).collect();
        assert_eq!(sent, [("calibrate", 1), ("calibrate", 3), ("store", 2)]);
    }

    #[test]
    fn warnings_stay_and_are_told_once() {
        let start = Instant::now();
        let mut throttle = Throttle::new(start);
        throttle.step(update("load", 0), start).unwrap();
        throttle.warn(Error::Draining);
        throttle.warn(Error::Draining);
        assert_eq!(throttle.flush(start).unwrap().warnings.len(), 1);
        throttle.warn(Error::Draining);
        assert!(throttle.flush(start).is_none());
        throttle.warn(Error::Deadline);
        let told = throttle.step(update("next", 0), start).unwrap();
        assert_eq!(told.warnings.len(), 2);
    }

    #[test]
    fn what_was_held_back_is_sent_at_the_end() {
        let start = Instant::now();
        let mut throttle = Throttle::new(start);
        throttle.step(update("calibrate", 1), start).unwrap();
        assert!(throttle.step(update("calibrate", 5), start + INTERVAL / 2).is_none());
        let last = throttle.flush(start + INTERVAL).unwrap();
        assert_eq!((last.unit, last.elapsed, last.eta), (5, INTERVAL, Some(INTERVAL)));
    }

    #[test]
    fn there_is_no_eta_before_the_first_unit() {
        assert_eq!(eta(0, 10, INTERVAL), None);
        assert_eq!(eta(10, 10, INTERVAL), Some(Duration::ZERO));
        assert_eq!(eta(3, 0, INTERVAL), None);
    }
}
