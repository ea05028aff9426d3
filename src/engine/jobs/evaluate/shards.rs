//! An evaluation on the workers of several processes.
//!
//! The images are split into shards: rows of the database, each with a lease of its own. The worker
//! that holds the job leads: it plans the shards, computes those that nobody has taken, adds up what
//! all have found and tells the job's watchers. Idle workers of other processes help. What a shard
//! gave stays when its worker dies, so the job's next attempt does not compute it again.
//!
//! Sums are exact ([`Metrics`]) and shards hold whole batches: who computed what, in which order and
//! in how many parts, leaves no trace in the numbers.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

use super::measure::{BATCH, Measurement};
use crate::calib::{Progress as _, ProgressUpdate};
use crate::engine::evaluator::Metrics;
use crate::engine::jobs::progress::{Hold, JobReporter, keep_alive};
use crate::engine::jobs::runner::JobRunner;
use crate::engine::jobs::store::{Shard, ShardLease, ShardWorker, Standing};
use crate::engine::jobs::{EvaluateJob, Figures, JobId};
use crate::error::{Error, Result};
use crate::telemetry::metrics as telemetry;

/// Most shards of a job: their rows are read again and again.
const MAX_SHARDS: usize = 256;
/// How often workers tell each other their numbers.
const LOOK: Duration = Duration::from_secs(1);
/// Pause of a leader who waits for the last shards of its helpers.
const PAUSE: Duration = Duration::from_millis(250);

/// Computes and adds up all shards of a job that this worker holds, with the help of others. `told`
/// are the numbers that watchers have seen of an earlier attempt.
///
/// # Errors
/// Whatever a shard reports; `Cancelled`.
pub(super) fn lead(
    runner: &JobRunner,
    measurement: &Measurement,
    told: Metrics,
    reporter: &JobReporter,
) -> Result<Figures> {
    let job = &reporter.lease().id;
    let inputs = measurement.inputs();
    let plan = plan(measurement.images(), runner.parts.shard_images);
    let planned = reporter.wait_for(Duration::MAX, || {
        runner.runtime.block_on(runner.store().plan_shards(reporter.lease(), &inputs, &plan))
    })?;
    reporter.hold().note(planned);
    let mut totals = Totals::new(reporter, measurement.images(), told);
    loop {
        reporter.check_cancelled()?;
        let claim = || claim(runner, job, &inputs, ShardWorker::Holder);
        if let Some(shard) = reporter.wait_for(Duration::MAX, claim)? {
            let position = shard.position;
            let step =
                &mut |_: &Hold<ShardLease>, own: &Metrics| totals.tell(Some((position, own)));
            compute(runner, measurement, shard, &reporter.hold().stop, step)?;
            // Its numbers are in the store from now on.
            totals.look_again();
            continue;
        }
        totals.look_again();
        totals.tell(None);
        if let Some(figures) = totals.complete() {
            return Ok(figures);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Computes shards of a job that another process leads, until none is free or a job waits. Whether
/// any could be computed here: its numbers might not fit.
///
/// # Errors
/// Whatever a shard reports; `Cancelled`.
pub(in crate::engine::jobs) fn help(
    runner: &JobRunner,
    job: &JobId,
    spec: &EvaluateJob,
) -> Result<bool> {
    let going_on = || if runner.stop.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) };
    let (measurement, _) = Measurement::prepare(runner, spec, &going_on)?;
    let inputs = measurement.inputs();
    let mut has_helped = false;
    while let Some(shard) = claim(runner, job, &inputs, ShardWorker::Helper)? {
        has_helped = true;
        let mut told = Instant::now();
        let mut step = |hold: &Hold<ShardLease>, own: &Metrics| {
            if told.elapsed() >= LOOK {
                told = Instant::now();
                match runner.runtime.block_on(runner.store().report_shard(&hold.lease, own)) {
                    Ok(standing) => hold.note(standing),
                    Err(error) => tracing::debug!(%error, "a shard's progress was not stored"),
                }
            }
        };
        compute(runner, &measurement, shard, &runner.stop, &mut step)?;
        if runner.runtime.block_on(runner.store().workload())?.queued > 0 {
            break;
        }
    }
    if !has_helped {
        tracing::info!("no shard is left that this process could compute with the same numbers");
    }
    Ok(has_helped)
}

/// Ranges of whole batches, all but the last of one size.
fn plan(images: usize, shard_images: usize) -> Vec<Range<usize>> {
    let size = shard_images.max(images.div_ceil(MAX_SHARDS)).next_multiple_of(BATCH);
    (0..images).step_by(size).map(|first| first..images.min(first + size)).collect()
}

fn claim(
    runner: &JobRunner,
    job: &JobId,
    inputs: &str,
    worker: ShardWorker,
) -> Result<Option<ShardLease>> {
    let worker = (worker, runner.name.as_str());
    runner.runtime.block_on(runner.store().claim_shard(job, inputs, worker))
}

/// Computes a shard and stores its numbers, unless its lease is lost meanwhile. A shard that fails
/// is given back.
fn compute(
    runner: &JobRunner,
    measurement: &Measurement,
    shard: ShardLease,
    stop: &CancellationToken,
    step: &mut dyn FnMut(&Hold<ShardLease>, &Metrics),
) -> Result<()> {
    let store = &runner.parts.store;
    let hold = Arc::new(Hold::new(shard, stop.child_token()));
    let heart = keep_alive(Arc::clone(store), Arc::clone(&hold));
    let _heart = AbortOnDropHandle::new(runner.runtime.spawn(heart.in_current_span()));
    let images = hold.lease.images.clone();
    let counted = measurement.count(images, &mut |metrics| {
        step(&hold, metrics);
        hold.going_on()
    });
    let left = match &counted {
        Ok(metrics) => {
            let tell = |error| tracing::warn!(%error, "a shard's numbers were not stored yet");
            hold.wait_for(Duration::MAX, tell, || {
                runner.runtime.block_on(store.finish_shard(&hold.lease, metrics))
            })
        }
        // Should the store be out of reach, the lease runs out.
        Err(_) => runner.runtime.block_on(store.release_shard(&hold.lease)),
    };
    // A heartbeat that comes after the end of the shard finds no lease: what was stored counts.
    let is_lost = left.as_ref().map_or(hold.is_lost(), |left| *left == Standing::Lost);
    if is_lost {
        telemetry::shard_left("lost");
        tracing::warn!(shard = hold.lease.position, "a shard's lease was lost, and its numbers");
        return Ok(());
    }
    let is_done = counted.is_ok() && left.is_ok();
    telemetry::shard_left(if is_done { "done" } else { "released" });
    counted?;
    left.map(drop)
}

/// What all workers have found so far.
struct Totals<'a> {
    reporter: &'a JobReporter,
    images: usize,
    shards: Vec<Shard>,
    looked: Option<Instant>,
    started: Instant,
    /// Images that an earlier attempt has counted.
    found: Option<u64>,
    /// The furthest numbers that watchers have seen, those of earlier attempts included: they stand
    /// until the sum is there again, when a shard is lost and has to be computed once more.
    told: Metrics,
}

impl<'a> Totals<'a> {
    fn new(reporter: &'a JobReporter, images: usize, told: Metrics) -> Self {
        let started = Instant::now();
        // More than there are: the data set was replaced between two attempts.
        let told = if told.images <= images as u64 { told } else { Metrics::default() };
        Self { reporter, images, shards: vec![], looked: None, started, found: None, told }
    }

    /// Makes the next telling read the shards.
    fn look_again(&mut self) {
        self.looked = None;
    }

    /// Tells the watchers; the numbers of the leader's own shard are not in the store yet.
    fn tell(&mut self, own: Option<(u64, &Metrics)>) {
        if self.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            match self.reporter.shards() {
                Ok(shards) => self.shards = shards,
                // What was seen last will do.
                Err(error) => tracing::debug!(%error, "the shards could not be read"),
            }
            self.looked = Some(Instant::now());
        }
        let found = self.merged(own);
        let mut figures = self.figures(found);
        if figures.metrics.images < self.told.images {
            figures.metrics = self.told.clone();
        } else {
            self.told = figures.metrics.clone();
        }
        let images = usize::try_from(figures.metrics.images).unwrap_or(usize::MAX);
        self.reporter.figures(figures);
        self.reporter.report(ProgressUpdate {
            stage: "evaluate".to_owned(),
            unit: images.div_ceil(BATCH),
            units: self.images.div_ceil(BATCH),
            images,
            images_total: self.images,
            ..ProgressUpdate::default()
        });
    }

    /// The figures, once all shards are done.
    fn complete(&mut self) -> Option<Figures> {
        let done = !self.shards.is_empty() && self.shards.iter().all(|shard| shard.done);
        done.then(|| {
            let metrics = self.merged(None);
            self.figures(metrics)
        })
    }

    fn merged(&self, own: Option<(u64, &Metrics)>) -> Metrics {
        let mut metrics = own.map_or_else(Metrics::default, |(_, own)| own.clone());
        let others =
            self.shards.iter().filter(|shard| Some(shard.position) != own.map(|own| own.0));
        others.for_each(|shard| metrics.merge(&shard.metrics));
        metrics
    }

    /// The speed is that of this attempt, of all its workers together.
    fn figures(&mut self, metrics: Metrics) -> Figures {
        let found = *self.found.get_or_insert(metrics.images);
        let counted = metrics.images.saturating_sub(found) as f64;
        let seconds = self.started.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        Figures { metrics, images_per_second: counted / seconds }
    }
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Runtime;

    use super::super::begin;
    use super::*;
    use crate::artifact::store::LocalArtifactStore;
    use crate::database::Database;
    use crate::engine::jobs::store::{Claimed, JobLimits, JobStore};
    use crate::engine::jobs::{JobEventKind, JobSpec, NewJob};
    use crate::engine::names::ModelId;

    /// The numbers of so many images.
    fn metrics(images: usize) -> Metrics {
        let mut metrics = Metrics::default();
        for image in 0..images {
            metrics.add(&[1.0, 0.0], image % 2, None);
        }
        metrics
    }

    #[test]
    fn what_watchers_were_told_stands_when_a_shard_or_a_worker_is_lost() {
        let runtime = Runtime::new().unwrap();
        let now = runtime.handle();
        let folder = tempfile::tempdir().unwrap();
        let database = now.block_on(Database::file(&folder.path().join("jobs.db"))).unwrap();
        let store = Arc::new(JobStore::new(database, JobLimits::default()));
        let model = ModelId::parse("m", "model").unwrap();
        let spec =
            EvaluateJob { model, alias: None, dataset: "d".to_owned(), limit: None, seed: 0 };
        let id = now
            .block_on(store.submit(&NewJob {
                spec: JobSpec::Evaluate(spec),
                request_id: None,
                priority: 0,
                principal: "somebody".to_owned(),
                trace: None,
            }))
            .unwrap()
            .id;
        let attempt = || {
            let Claimed { record, lease } = now.block_on(store.claim("leader")).unwrap().unwrap();
            let hold = Arc::new(Hold::new(lease, CancellationToken::new()));
            let artifacts = Arc::new(LocalArtifactStore::open(folder.path()).unwrap());
            let reporter = JobReporter::new(Arc::clone(&store), artifacts, hold, now.clone());
            let told = begin(record.progress.as_ref(), &reporter);
            (reporter, told)
        };
        let shard = |worker: ShardWorker| {
            let claimed = store.claim_shard(&id, "inputs", (worker, "worker"));
            now.block_on(claimed).unwrap().unwrap()
        };
        let tell = |totals: &mut Totals<'_>, own: Option<(u64, &Metrics)>| {
            totals.look_again();
            totals.tell(own);
            totals.reporter.flush();
        };

        let (reporter, told) = attempt();
        let plan = plan(64, 32);
        now.block_on(store.plan_shards(reporter.lease(), "inputs", &plan)).unwrap();
        let mut totals = Totals::new(&reporter, 64, told);
        let (first, second) = (shard(ShardWorker::Helper), shard(ShardWorker::Helper));
        now.block_on(store.finish_shard(&first, &metrics(32))).unwrap();
        now.block_on(store.report_shard(&second, &metrics(20))).unwrap();
        tell(&mut totals, None);

        // The second one's worker falls silent: its shard is begun again.
        now.block_on(store.forget_leases()).unwrap();
        let second = shard(ShardWorker::Holder);
        tell(&mut totals, Some((second.position, &metrics(8))));

        // So does the leader.
        now.block_on(store.forget_leases()).unwrap();
        let (reporter, told) = attempt();
        let mut totals = Totals::new(&reporter, 64, told);
        tell(&mut totals, None);
        let second = shard(ShardWorker::Holder);
        now.block_on(store.finish_shard(&second, &metrics(32))).unwrap();
        tell(&mut totals, None);

        let events = now.block_on(store.events(&id, 0)).unwrap();
        let told: Vec<_> = events
            .iter()
            .filter_map(|event| match &event.kind {
                JobEventKind::Progress(told) => {
                    let measured = told.figures.as_ref().map(|figures| figures.metrics.images);
                    Some((&*told.stage, told.images, measured))
                }
                JobEventKind::Accepted | JobEventKind::Ended(_) | JobEventKind::Heartbeat => None,
            })
            .collect();
        assert_eq!(
            told,
            [
                ("load", 0, None),
                ("evaluate", 52, Some(52)),
                ("evaluate", 52, Some(52)),
                ("load", 52, Some(52)),
                ("evaluate", 52, Some(52)),
                ("evaluate", 64, Some(64)),
            ]
        );
        // The result is the sum, whatever was told before.
        let mut whole = metrics(32);
        whole.merge(&metrics(32));
        assert_eq!(totals.complete().map(|figures| figures.metrics), Some(whole));
        // Numbers of a larger data set say nothing about what is there now.
        assert_eq!(Totals::new(&reporter, 10, metrics(11)).told, Metrics::default());
    }

    #[test]
    fn shards_are_whole_batches_and_cover_everything_once() {
        for (images, shard_images) in [(1, 1024), (450, 64), (450, 1), (1024, 1024), (50_000, 100)]
        {
            let shards = plan(images, shard_images);
            assert!(shards.len() <= MAX_SHARDS);
            let mut next = 0;
            for shard in &shards {
                assert_eq!(shard.start, next);
                assert!(shard.start % BATCH == 0 && !shard.is_empty());
                next = shard.end;
            }
            assert_eq!(next, images);
        }
        assert_eq!(plan(450, 64).len(), 8);
        assert_eq!(plan(1000, 1024), vec![Range { start: 0, end: 1000 }]);
        assert_eq!(plan(1_281_167, 1024).len(), 256);
    }
}
