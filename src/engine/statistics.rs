//! What a model has done since this server knows it: calls, their times, and batches by their size.
//!
//! Counts are exact and only grow; who wants a rate takes the difference of two snapshots. Calls are
//! noted where they are answered, batches by the device.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::engine::batcher::Pace;
use crate::engine::classify::ClassifyReply;

/// What a device notes of a model: how fast it is now, and what it has done so far.
#[derive(Debug, Default)]
pub struct Meter {
    /// How fast the model answers where it is loaded.
    pub pace: Pace,
    /// What it has done, wherever it was loaded.
    pub statistics: Arc<ModelStatistics>,
}

impl Meter {
    /// A meter for a model that is being loaded.
    pub fn new(statistics: Arc<ModelStatistics>) -> Self {
        Self { pace: Pace::default(), statistics }
    }
}

/// Counts of one model, written by many threads.
#[derive(Debug, Default)]
pub struct ModelStatistics {
    success: Sum,
    failure: Sum,
    queue: Sum,
    decode: Sum,
    compute: Sum,
    /// Taken once per batch.
    batches: Mutex<Batches>,
}

#[derive(Debug, Default)]
struct Batches {
    by_size: BTreeMap<usize, Total>,
    last: Option<SystemTime>,
}

/// How often something was, and how long it took in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// How often.
    pub count: u64,
    /// All times together.
    pub time: Duration,
}

/// The counts at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Calls whose images were all answered, from their arrival to their answer.
    pub success: Total,
    /// Calls that were refused, given up, or had an image that was not answered.
    pub failure: Total,
    /// Waiting for the device; like all of a successful call, the longest of its images.
    pub queue: Total,
    /// Decoding and resizing.
    pub decode: Total,
    /// The batches' forward passes.
    pub compute: Total,
    /// Batches by their number of images, with the time of their forward passes.
    pub batches: BTreeMap<usize, Total>,
    /// When the last batch ended, in milliseconds since the Unix epoch; 0 before the first.
    pub last_batch_ms: u64,
}

impl Snapshot {
    /// Images in all batches.
    pub fn images(&self) -> u64 {
        self.batches.iter().map(|(size, total)| *size as u64 * total.count).sum()
    }

    /// Batches of any size.
    pub fn executions(&self) -> u64 {
        self.batches.values().map(|total| total.count).sum()
    }
}

impl ModelStatistics {
    /// Takes note of a batch of `images` whose forward pass took so long.
    pub fn note_batch(&self, images: usize, time: Duration) {
        let mut batches = self.batches();
        let total = batches.by_size.entry(images).or_default();
        total.count += 1;
        total.time += time;
        batches.last = Some(SystemTime::now());
    }

    /// A call that began at `started`. It has failed if it is dropped before it is answered.
    pub fn call(self: &Arc<Self>, started: Instant) -> CallNote {
        CallNote { statistics: Arc::clone(self), started, is_answered: false }
    }

    /// What was counted so far. Counts of calls in progress may be a call apart.
    pub fn snapshot(&self) -> Snapshot {
        let batches = self.batches();
        let last = batches.last.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        Snapshot {
            success: self.success.read(),
            failure: self.failure.read(),
            queue: self.queue.read(),
            decode: self.decode.read(),
            compute: self.compute.read(),
            batches: batches.by_size.clone(),
            last_batch_ms: last.map_or(0, |at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX)),
        }
    }

    /// Nothing panics while it holds the lock.
    fn batches(&self) -> MutexGuard<'_, Batches> {
        self.batches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call that is under way.
#[derive(Debug)]
pub struct CallNote {
    statistics: Arc<ModelStatistics>,
    started: Instant,
    is_answered: bool,
}

impl CallNote {
    /// Takes note of the call's answer.
    pub fn answered(mut self, reply: &ClassifyReply) {
        if reply.items.iter().any(Result::is_err) {
            return; // dropped as a failure
        }
        self.is_answered = true;
        let ModelStatistics { success, failure: _, queue, decode, compute, batches: _ } =
            &*self.statistics;
        success.add(self.started.elapsed());
        queue.add(reply.queue);
        decode.add(reply.decode);
        compute.add(reply.compute);
    }
}

impl Drop for CallNote {
    fn drop(&mut self) {
        if !self.is_answered {
            self.statistics.failure.add(self.started.elapsed());
        }
    }
}

#[derive(Debug, Default)]
struct Sum {
    count: AtomicU64,
    /// 584 years fit.
    nanoseconds: AtomicU64,
}

impl Sum {
    fn add(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    fn read(&self) -> Total {
        let time = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed));
        Total { count: self.count.load(Ordering::Relaxed), time }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::store::example_record;
    use crate::error::Error;

    const MS: Duration = Duration::from_millis(1);

    fn reply(items: Vec<crate::error::Result<Vec<f32>>>) -> ClassifyReply {
        ClassifyReply {
            cached: vec![false; items.len()],
            items,
            queue: MS,
            decode: 2 * MS,
            compute: 3 * MS,
            total: 6 * MS,
            batch_size: 1,
            model: Arc::new(example_record("m", "d")),
        }
    }

    #[test]
    fn a_call_succeeds_with_all_its_images_and_fails_otherwise() {
        let statistics = Arc::<ModelStatistics>::default();
        let began = Instant::now();
        statistics.call(began).answered(&reply(vec![Ok(vec![1.0]), Ok(vec![2.0])]));
        statistics.call(began).answered(&reply(vec![Ok(vec![1.0]), Err(Error::Deadline)]));
        drop(statistics.call(began));
        let Snapshot { success, failure, queue, decode, compute, .. } = statistics.snapshot();
        assert_eq!((success.count, failure.count), (1, 2));
        assert_eq!([queue.time, decode.time, compute.time], [MS, 2 * MS, 3 * MS]);
        assert_eq!([queue.count, decode.count, compute.count], [1; 3]);
    }

    #[test]
    fn batches_are_counted_by_size() {
        let statistics = ModelStatistics::default();
        assert_eq!(statistics.snapshot(), Snapshot::default());
        for images in [4, 1, 4] {
            statistics.note_batch(images, MS);
        }
        let snapshot = statistics.snapshot();
        assert_eq!((snapshot.images(), snapshot.executions()), (9, 3));
        assert_eq!(snapshot.batches[&4], Total { count: 2, time: 2 * MS });
        assert!(snapshot.last_batch_ms > 1_600_000_000_000);
    }
}
