//! Which images run together.
//!
//! Batching is work-conserving: whatever has queued up for a model while the device was busy forms
//! the next batch; an optional delay lets small batches fill on an idle device. Between models the
//! device's time is shared fairly: the model that has had the least of it is next (start-time fair
//! queueing, Goyal, Vin and Cheng 1996: deficit round robin whose turns are whole batches).

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tracing::Span;

use super::Permit;
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Age from which an entry that can wait has waited long enough.
const PATIENCE: Duration = Duration::from_secs(1);

/// Who goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for the answer.
    #[default]
    Interactive,
    /// Whenever nothing interactive is there, or after a second.
    Bulk,
}

impl Priority {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];

    /// The priority as a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }
}

/// What an image's caller gets back.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Raw model outputs, one per class.
    pub logits: Vec<f32>,
    /// Time of decoding and resizing.
    pub decode: Duration,
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
    /// Whether it can wait.
    pub priority: Priority,
    /// What decoding and resizing took.
    pub decode: Duration,
    /// When it was queued.
    pub queued: Instant,
    /// When its caller gives up.
    pub deadline: Option<Instant>,
    /// The call that it belongs to.
    pub span: Span,
    /// What the caller takes back by leaving.
    pub payload: Payload,
    /// Where the answer goes; closed when the caller has left.
    pub reply: oneshot::Sender<Result<Answer>>,
}

/// An image's place in the server and its pixels, shared by the queue and by who waits for the
/// answer: who leaves takes both back at once, however long the device is busy.
#[derive(Clone, Debug)]
pub struct Payload(Arc<Mutex<Option<Held>>>);

#[derive(Debug)]
struct Held {
    /// Normalised [3, size, size]; empty until they are decoded.
    pixels: Vec<f32>,
    permit: Permit,
}

impl Payload {
    /// A place, for pixels to come.
    pub fn new(permit: Permit) -> Self {
        Self(Arc::new(Mutex::new(Some(Held { pixels: Vec::new(), permit }))))
    }

    /// Puts normalised pixels [3, size, size] there, unless the place was given back.
    pub fn fill(&self, pixels: Vec<f32>) {
        if let Some(held) = &mut *self.lock() {
            held.pixels = pixels;
        }
    }

    /// Notes that the image waits for a device from now on.
    pub fn wait(&self, priority: Priority, since: Instant) {
        if let Some(held) = &mut *self.lock() {
            held.permit.wait(priority, since);
        }
    }

    /// Gives the place and the pixels back.
    pub fn release(&self) {
        let held = self.lock().take();
        drop(held); // without the lock
    }

    /// Nothing panics while it holds the lock.
    fn lock(&self) -> MutexGuard<'_, Option<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An entry that the device has taken on.
#[derive(Debug)]
pub struct Image {
    /// Which loaded model is to answer.
    pub model: u64,
    /// Normalised pixels [3, size, size].
    pub pixels: Vec<f32>,
    /// What decoding and resizing took.
    pub decode: Duration,
    /// When it was queued.
    pub queued: Instant,
    /// When its caller gives up.
    pub deadline: Option<Instant>,
    /// Where the answer goes; closed when the caller has left.
    pub reply: oneshot::Sender<Result<Answer>>,
    /// The call that it belongs to.
    pub span: Span,
    /// Its place in the server, given back with the answer.
    permit: Permit,
}

impl Entry {
    /// What the device needs of it, if somebody still waits for it. Who waited too long is told so.
    fn claim(self, now: Instant) -> Option<Image> {
        let Held { pixels, mut permit } = self.payload.lock().take()?;
        permit.go();
        let Self { model, decode, queued, deadline, span, reply, priority: _, payload: _ } = self;
        Image { model, pixels, decode, queued, deadline, span, reply, permit }.still_wanted(now)
    }
}

impl Image {
    /// Name of the model that is to answer.
    pub fn model_name(&self) -> &Arc<str> {
        self.permit.model()
    }

    /// The image, if somebody still waits for it. Who waited too long is told so.
    pub fn still_wanted(self, now: Instant) -> Option<Self> {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            let _ = self.reply.send(Err(Error::Deadline)); // the caller may have left
            return None;
        }
        (!self.reply.is_closed()).then_some(self)
    }
}

/// What the device is to do.
#[derive(Debug)]
pub enum Next {
    /// Run these; all of one model, at least one.
    Batch(Vec<Image>),
    /// Look again at that time, or when something comes.
    Later(Instant),
    /// Nothing waits.
    Nothing,
}

/// Waiting entries by model. Bounded by [`super::Admission`].
#[derive(Debug, Default)]
pub struct BatchQueue {
    models: BTreeMap<u64, Line>,
    /// Device time, in seconds, that the model of the latest batch had had by then.
    clock: f64,
    max_batch: usize,
    delay: Duration,
}

/// The entries of one model.
#[derive(Debug, Default)]
struct Line {
    interactive: VecDeque<Entry>,
    bulk: VecDeque<Entry>,
    /// Device time that the model has had, in seconds, since it last had to wait for anything.
    served: f64,
}

impl Line {
    fn len(&self) -> usize {
        self.interactive.len() + self.bulk.len()
    }

    fn oldest(&self) -> Option<Instant> {
        let fronts = [self.interactive.front(), self.bulk.front()];
        fronts.into_iter().flatten().map(|entry| entry.queued).min()
    }

    fn is_urgent(&self, now: Instant) -> bool {
        !self.interactive.is_empty() || self.is_overdue(now)
    }

    fn is_overdue(&self, now: Instant) -> bool {
        self.bulk.front().is_some_and(|entry| now.duration_since(entry.queued) >= PATIENCE)
    }

    fn pop(&mut self, now: Instant) -> Option<Entry> {
        if self.is_overdue(now) {
            return self.bulk.pop_front();
        }
        self.interactive.pop_front().or_else(|| self.bulk.pop_front())
    }
}

impl BatchQueue {
    /// Batches of at most `max_batch` images; smaller ones are held back for `delay` if nothing else
    /// is there to be done.
    pub fn new(max_batch: usize, delay: Duration) -> Self {
        Self { max_batch: max_batch.max(1), delay, ..Self::default() }
    }

    /// Adds an entry behind those of its model and priority.
    pub fn push(&mut self, entry: Entry) {
        let line = self.models.entry(entry.model).or_default();
        if line.len() == 0 {
            // Time that it did not ask for is not owed to it.
            line.served = line.served.max(self.clock);
        }
        match entry.priority {
            Priority::Interactive => line.interactive.push_back(entry),
            Priority::Bulk => line.bulk.push_back(entry),
        }
    }

    /// Entries of a model that wait.
    pub fn waiting(&self, model: u64) -> usize {
        self.models.get(&model).map_or(0, Line::len)
    }

    /// What is to be done now.
    pub fn next(&mut self, now: Instant) -> Next {
        loop {
            let waiting = || self.models.iter().filter(|(_, line)| line.len() > 0);
            let is_ready = |line: &Line| {
                line.len() >= self.max_batch
                    || line.oldest().is_some_and(|at| now >= at + self.delay)
            };
            let ready = || waiting().filter(|(_, line)| is_ready(line));
            let urgent = ready().any(|(_, line)| line.is_urgent(now));
            let eligible = ready().filter(|(_, line)| !urgent || line.is_urgent(now));
            let first = eligible.min_by(|(_, a), (_, b)| {
                a.served.total_cmp(&b.served).then_with(|| a.oldest().cmp(&b.oldest()))
            });
            let Some((&model, _)) = first else {
                let at = waiting().filter_map(|(_, line)| line.oldest()).min();
                return at.map_or(Next::Nothing, |at| Next::Later(at + self.delay));
            };
            let batch = self.take(model, now);
            if !batch.is_empty() {
                return Next::Batch(batch);
            }
        }
    }

    /// One batch of a model, however few wait; entries that nobody wants any more are dropped.
    pub fn take(&mut self, model: u64, now: Instant) -> Vec<Image> {
        let mut batch = Vec::new();
        let Some(line) = self.models.get_mut(&model) else { return batch };
        self.clock = self.clock.max(line.served);
        while batch.len() < self.max_batch {
            let Some(entry) = line.pop(now) else { break };
            batch.extend(entry.claim(now));
        }
        batch
    }

    /// Takes note of device time that a model has had.
    pub fn charge(&mut self, model: u64, time: Duration) {
        if let Some(line) = self.models.get_mut(&model) {
            line.served += time.as_secs_f64();
        }
    }

    /// Forgets a model; its entries are dropped.
    pub fn forget(&mut self, model: u64) {
        self.models.remove(&model);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::batcher::{Admission, QueueLimits};

    type Reply = oneshot::Receiver<Result<Answer>>;

    struct Bench {
        queue: BatchQueue,
        admission: Admission,
        start: Instant,
    }

    impl Bench {
        fn new(max_batch: usize, delay_ms: u64) -> Self {
            Self {
                queue: BatchQueue::new(max_batch, Duration::from_millis(delay_ms)),
                admission: Admission::new(
                    QueueLimits { images: 1000, bytes: 1 << 30 },
                    Arc::default(),
                ),
                start: Instant::now(),
            }
        }

        fn at(&self, ms: u64) -> Instant {
            self.start + Duration::from_millis(ms)
        }

        fn push(
            &mut self,
            model: u64,
            priority: Priority,
            at: u64,
            deadline: Option<u64>,
        ) -> Reply {
            let (reply, receiver) = oneshot::channel();
            let permit = self.admission.admit("m", &[1]).unwrap().remove(0);
            let (queued, deadline) = (self.at(at), deadline.map(|ms| self.at(ms)));
            self.queue.push(Entry {
                model,
                priority,
                decode: Duration::ZERO,
                queued,
                deadline,
                span: Span::none(),
                payload: Payload::new(permit),
                reply,
            });
            receiver
        }

        fn batch(&mut self, at: u64) -> Vec<Image> {
            match self.queue.next(self.at(at)) {
                Next::Batch(batch) => batch,
                Next::Later(_) | Next::Nothing => Vec::new(),
            }
        }

        fn models(&mut self, at: u64) -> Vec<u64> {
            self.batch(at).iter().map(|entry| entry.model).collect()
        }
    }

    use Priority::{Bulk, Interactive};

    #[test]
    fn batches_are_of_one_model_oldest_first_and_bounded() {
        let mut bench = Bench::new(2, 0);
        let _waiting: Vec<Reply> = [7, 3, 7, 7, 3]
            .into_iter()
            .zip(0..)
            .map(|(model, at)| bench.push(model, Interactive, at, None))
            .collect();
        let mut batches = Vec::new();
        while let Some(model) = batches.last().copied().unwrap_or(Some(0)) {
            let batch = bench.models(9);
            bench.queue.charge(model, Duration::ZERO);
            batches.push(batch.first().copied());
            let all_same = batch.windows(2).all(|pair| pair[0] == pair[1]);
            assert!(all_same && batch.len() <= 2, "{batch:?}");
        }
        assert_eq!(batches, [Some(7), Some(3), Some(7), None]);
    }

    #[test]
    fn models_share_the_devices_time_whatever_they_cost() {
        let mut bench = Bench::new(4, 0);
        // Model 1 takes ten times as long as model 2, and asks for much more.
        let cost = |model: u64| Duration::from_millis(if model == 1 { 100 } else { 10 });
        let mut time = [Duration::ZERO; 3];
        let mut waiting = Vec::new();
        for _ in 0..400 {
            waiting.push(bench.push(1, Interactive, 0, None));
        }
        for _ in 0..300 {
            waiting.push(bench.push(2, Interactive, 0, None));
        }
        for _ in 0..44 {
            let model = bench.models(1)[0];
            bench.queue.charge(model, cost(model));
            time[model as usize] += cost(model);
        }
        let (one, two) = (time[1].as_millis(), time[2].as_millis());
        assert!(one.abs_diff(two) <= 100, "{one} ms and {two} ms");
    }

    #[test]
    fn who_comes_back_has_no_claim_to_the_time_it_was_away() {
        let mut bench = Bench::new(1, 0);
        let mut waiting: Vec<Reply> =
            (0..20).map(|_| bench.push(1, Interactive, 0, None)).collect();
        waiting.push(bench.push(2, Interactive, 0, None));
        for _ in 0..10 {
            let model = bench.models(1)[0];
            bench.queue.charge(model, Duration::from_millis(10));
        }
        waiting.extend((0..4).map(|_| bench.push(2, Interactive, 1, None)));
        let turns: Vec<u64> = (0..6)
            .map(|_| {
                let model = bench.models(2)[0];
                bench.queue.charge(model, Duration::from_millis(10));
                model
            })
            .collect();
        assert!(turns.windows(2).all(|pair| pair[0] != pair[1]), "they alternate: {turns:?}");
    }

    #[test]
    fn what_can_wait_fills_up_batches_and_does_not_starve() {
        let mut bench = Bench::new(2, 0);
        let mut waiting = vec![bench.push(1, Bulk, 0, None), bench.push(2, Bulk, 0, None)];
        for at in 1..4 {
            waiting.push(bench.push(1, Interactive, at, None));
        }
        let start = bench.start;
        let queued = |batch: Vec<Image>| -> Vec<u128> {
            batch.iter().map(|image| (image.queued - start).as_millis()).collect()
        };
        assert_eq!(queued(bench.batch(5)), [1, 2]);
        assert_eq!(queued(bench.batch(5)), [3, 0], "the last interactive one, then bulk");
        waiting.push(bench.push(1, Interactive, 6, None));
        waiting.push(bench.push(1, Bulk, 6, None));
        // A second later model 2 has waited long enough.
        bench.queue.charge(1, Duration::from_millis(1));
        assert_eq!(bench.models(1005), [2]);
        assert_eq!(bench.models(1005), [1, 1]);
        assert!(bench.batch(1005).is_empty());
    }

    #[test]
    fn small_batches_wait_for_the_delay_and_full_ones_do_not() {
        let mut bench = Bench::new(2, 5);
        let _first = bench.push(1, Interactive, 0, None);
        let Next::Later(at) = bench.queue.next(bench.at(1)) else { panic!() };
        assert_eq!(at, bench.at(5));
        let _other = bench.push(2, Interactive, 2, None);
        let _second = bench.push(1, Interactive, 3, None);
        assert_eq!(bench.models(3), [1, 1]);
        assert!(bench.models(6).is_empty());
        assert_eq!(bench.models(7), [2]);
        assert!(matches!(bench.queue.next(bench.at(8)), Next::Nothing));
    }

    #[test]
    fn nobody_computes_for_who_has_left_or_given_up() {
        let mut bench = Bench::new(8, 0);
        drop(bench.push(1, Interactive, 0, None));
        let _stays = bench.push(1, Interactive, 0, Some(50));
        let mut late = bench.push(1, Interactive, 0, Some(10));
        drop(bench.push(2, Interactive, 0, None));
        assert_eq!(bench.admission.images(), 4);
        assert_eq!(bench.batch(10).len(), 1);
        assert!(bench.batch(10).is_empty());
        assert_eq!(bench.admission.images(), 0);
        assert!(matches!(late.try_recv().unwrap(), Err(Error::Deadline)));
    }

    #[test]
    fn who_leaves_frees_the_place_while_the_device_is_busy() {
        let mut bench = Bench::new(8, 0);
        let _reply = bench.push(1, Interactive, 0, None);
        let payload = bench.queue.models[&1].interactive[0].payload.clone();
        assert_eq!(bench.admission.images(), 1);
        payload.release();
        assert_eq!(bench.admission.images(), 0);
        assert!(bench.batch(1).is_empty());
    }
}
