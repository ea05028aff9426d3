//! Admission and batching: how many images may wait, and which of them run together.
//!
//! Batching is work-conserving: nothing waits for a batch to fill. Whatever has queued up for a
//! model while the device was busy forms the next batch.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::{Error, Result};

/// When a refused caller should come back: about the time of a few batches.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// Limits the images that are in the server at once, one permit each.
#[derive(Clone, Debug)]
pub struct Admission {
    permits: Arc<Semaphore>,
    capacity: usize,
}

impl Admission {
    /// Room for `capacity` images.
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.min(Semaphore::MAX_PERMITS);
        Self { permits: Arc::new(Semaphore::new(capacity)), capacity }
    }

    /// Permits for all images of a call, or none.
    ///
    /// # Errors
    /// `InvalidArgument` on `images` for more than would ever fit; `Overloaded` when they do not
    /// fit now.
    pub fn admit(&self, images: usize) -> Result<Vec<OwnedSemaphorePermit>> {
        if images > self.capacity {
            let reason = format!("{images} images in one call, at most {} fit", self.capacity);
            return Err(Error::invalid("images", reason));
        }
        let full = |_| Error::Overloaded {
            reason: format!("the queue of {} images is full", self.capacity),
            retry_after: RETRY_AFTER,
        };
        let count = u32::try_from(images)
            .map_err(|_| Error::invalid("images", "too many images in one call"))?;
        let mut all = Arc::clone(&self.permits).try_acquire_many_owned(count).map_err(full)?;
        Ok((0..images).filter_map(|_| all.split(1)).collect())
    }
}

/// What an image's caller gets back.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Raw model outputs, one per class.
    pub logits: Vec<f32>,
    /// Time spent waiting for the device.
    pub queue: Duration,
    /// Time of the batch's forward pass.
    pub compute: Duration,
    /// Images in the batch.
    pub batch_size: usize,
}

/// One preprocessed image on its way to a device.
#[derive(Debug)]
pub struct Entry {
    /// Which loaded model is to answer.
    pub model: u64,
    /// Normalised pixels [3, size, size].
    pub pixels: Vec<f32>,
    /// When it was queued.
    pub queued: Instant,
    /// Its place in the server, given back when the entry is dropped.
    pub permit: OwnedSemaphorePermit,
    /// Where the answer goes; closed when the caller has left.
    pub reply: oneshot::Sender<Result<Answer>>,
}

/// Waiting entries by model. Bounded by [`Admission`].
#[derive(Debug, Default)]
pub struct BatchQueue {
    models: BTreeMap<u64, VecDeque<Entry>>,
}

impl BatchQueue {
    /// Adds an entry behind those of its model.
    pub fn push(&mut self, entry: Entry) {
        self.models.entry(entry.model).or_default().push_back(entry);
    }

    /// Up to `max` entries of the model whose first entry has waited longest; entries whose caller
    /// has left are dropped. Empty when nothing waits.
    pub fn next_batch(&mut self, max: usize) -> Vec<Entry> {
        loop {
            let oldest = self.models.iter().filter_map(|(m, q)| Some((q.front()?.queued, *m)));
            let Some((_, model)) = oldest.min() else { return Vec::new() };
            let batch = self.take(model, max);
            if !batch.is_empty() {
                return batch;
            }
        }
    }

    /// Up to `max` entries of one model.
    pub fn take(&mut self, model: u64, max: usize) -> Vec<Entry> {
        let mut batch = Vec::new();
        if let Some(queue) = self.models.get_mut(&model) {
            while batch.len() < max.max(1) {
                let Some(entry) = queue.pop_front() else { break };
                if !entry.reply.is_closed() {
                    batch.push(entry);
                }
            }
            if queue.is_empty() {
                self.models.remove(&model);
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Reply = oneshot::Receiver<Result<Answer>>;

    fn push(queue: &mut BatchQueue, admission: &Admission, model: u64) -> Reply {
        let (reply, receiver) = oneshot::channel();
        let permit = admission.admit(1).unwrap().remove(0);
        queue.push(Entry { model, pixels: vec![], queued: Instant::now(), permit, reply });
        receiver
    }

    #[test]
    fn a_call_is_admitted_whole_or_not_at_all() {
        let admission = Admission::new(4);
        let held = admission.admit(3).unwrap();
        assert!(matches!(admission.admit(2).unwrap_err(), Error::Overloaded { .. }));
        let one = admission.admit(1).unwrap();
        assert!(matches!(admission.admit(1).unwrap_err(), Error::Overloaded { .. }));
        drop((held, one));
        assert_eq!(admission.admit(4).unwrap().len(), 4);
        assert!(matches!(admission.admit(5).unwrap_err(), Error::InvalidArgument { .. }));
    }

    #[test]
    fn batches_are_of_one_model_oldest_first_and_bounded() {
        let (admission, mut queue) = (Admission::new(10), BatchQueue::default());
        let _waiting: Vec<Reply> =
            [7, 3, 7, 7, 3].into_iter().map(|m| push(&mut queue, &admission, m)).collect();
        let batches: Vec<Vec<u64>> = std::iter::from_fn(|| {
            let batch = queue.next_batch(2);
            (!batch.is_empty()).then(|| batch.iter().map(|e| e.model).collect())
        })
        .collect();
        assert_eq!(batches, [vec![7, 7], vec![3, 3], vec![7]]);
    }

    #[test]
    fn entries_of_callers_that_left_are_skipped_and_give_their_permit_back() {
        let (admission, mut queue) = (Admission::new(3), BatchQueue::default());
        drop(push(&mut queue, &admission, 1));
        let _stays = push(&mut queue, &admission, 1);
        drop(push(&mut queue, &admission, 2));
        assert_eq!(queue.next_batch(8).len(), 1);
        assert!(queue.next_batch(8).is_empty());
        assert_eq!(admission.admit(3).unwrap().len(), 3);
    }
}
