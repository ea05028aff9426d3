//! What holds of the queue whatever is done to it, told by a list that is searched naively.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use tokio::sync::oneshot;

use super::{Admission, Answer, BatchQueue, Entry, Image, Next, Payload, Priority, QueueLimits};
use crate::error::{Error, Result};

/// Age from which what can wait goes first.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
enum Step {
    /// An image comes in; its caller gives up after so many milliseconds, if ever.
    Push { model: u64, priority: Priority, patience: Option<u64> },
    /// The caller of one of the images leaves.
    Leave(prop::sample::Index),
    /// Milliseconds pass.
    Wait(u64),
    /// The device asks what to do, and takes so many milliseconds for it.
    Next(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let priority = prop_oneof![Just(Priority::Interactive), Just(Priority::Bulk)];
    let patience = prop::option::of(0_u64..2_000);
    prop_oneof![
        4 => (0_u64..3, priority, patience)
            .prop_map(|(model, priority, patience)| Step::Push { model, priority, patience }),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        1 => (0_u64..1_500).prop_map(Step::Wait),
        2 => (1_u64..200).prop_map(Step::Next),
    ]
}

/// An image that waits.
struct Waiting {
    number: usize,
    model: u64,
    priority: Priority,
    queued: Instant,
    deadline: Option<Instant>,
    /// None after the caller has left.
    reply: Option<oneshot::Receiver<Result<Answer>>>,
    payload: Payload,
}

impl Waiting {
    fn is_wanted(&self, now: Instant) -> bool {
        self.reply.is_some() && self.deadline.is_none_or(|deadline| deadline > now)
    }

    fn is_overdue(&self, now: Instant) -> bool {
        self.priority == Priority::Bulk && now.duration_since(self.queued) >= PATIENCE
    }

    fn is_urgent(&self, now: Instant) -> bool {
        self.priority == Priority::Interactive || self.is_overdue(now)
    }
}

struct Bench {
    queue: BatchQueue,
    admission: Admission,
    max_batch: usize,
    delay: Duration,
    now: Instant,
    waiting: Vec<Waiting>,
    pushed: usize,
}

impl Bench {
    fn new(max_batch: usize, delay: Duration) -> Self {
        let limits = QueueLimits { images: 10_000, bytes: 1 << 30 };
        Self {
            queue: BatchQueue::new(max_batch, delay),
            admission: Admission::new(limits, std::sync::Arc::default()),
            max_batch,
            delay,
            now: Instant::now(),
            waiting: Vec::new(),
            pushed: 0,
        }
    }

    fn push(&mut self, model: u64, priority: Priority, patience: Option<u64>) {
        let (reply, answer) = oneshot::channel();
        let (number, queued) = (self.pushed, self.now);
        let deadline = patience.map(|ms| queued + Duration::from_millis(ms));
        let payload = Payload::new(self.admission.admit("m", &[1]).unwrap().remove(0));
        payload.fill(vec![number as f32]);
        self.queue.push(Entry {
            model,
            priority,
            decode: Duration::ZERO,
            queued,
            deadline,
            span: tracing::Span::none(),
            payload: payload.clone(),
            reply,
        });
        let reply = Some(answer);
        self.waiting.push(Waiting { number, model, priority, queued, deadline, reply, payload });
        self.pushed += 1;
    }

    fn next(&mut self, cost: Duration) -> bool {
        match self.queue.next(self.now) {
            Next::Batch(batch) => {
                let model = batch[0].model;
                self.check_batch(model, batch);
                self.queue.charge(model, cost);
                self.now += cost;
                true
            }
            Next::Later(at) => {
                assert!(at > self.now, "the device would spin");
                let now = self.now;
                for image in self.waiting.iter().filter(|image| image.is_wanted(now)) {
                    assert!(at <= image.queued + self.delay, "held back for longer than allowed");
                }
                self.now = at;
                true
            }
            Next::Nothing => {
                let lost = self.waiting.iter().filter(|image| image.is_wanted(self.now)).count();
                assert_eq!(lost, 0, "images are forgotten");
                false
            }
        }
    }

    fn check_batch(&mut self, model: u64, batch: Vec<Image>) {
        assert!(batch.len() <= self.max_batch, "{} images", batch.len());
        let now = self.now;
        let wanted = |image: &&Waiting| image.model == model && image.is_wanted(now);
        // Who waits for them goes on waiting meanwhile.
        let mut taken = Vec::new();
        for entry in &batch {
            let of_entry = |image: &Waiting| image.number as f32 == entry.pixels[0];
            let index = self.waiting.iter().position(of_entry).expect("an image that waits");
            // The oldest of its priority that is still wanted.
            let priority = self.waiting[index].priority;
            let first = self.waiting.iter().filter(wanted).find(|i| i.priority == priority);
            let number = first.expect("an image that waits").number;
            assert_eq!((entry.model, entry.pixels[0]), (model, number as f32), "out of turn");
            let image = self.waiting.remove(index);
            if image.priority == Priority::Bulk && !image.is_overdue(now) {
                let mut others = self.waiting.iter().filter(wanted);
                let passed = others.any(|other| other.priority == Priority::Interactive);
                assert!(!passed, "it could have waited");
            }
            taken.push(image);
        }
        for entry in batch {
            assert!(entry.still_wanted(now).is_some(), "computed for nobody");
        }
    }

    /// Everything that is left comes out, and every place comes back.
    fn drain(mut self) {
        while self.next(Duration::from_millis(1)) {}
        assert_eq!(self.admission.images(), 0, "a permit was lost");
        for mut image in self.waiting {
            let Some(reply) = image.reply.as_mut() else { continue };
            let told = reply.try_recv().expect("whoever waits is told");
            assert!(matches!(told, Err(Error::Deadline)), "{told:?}");
        }
    }
}

proptest! {
    #[test]
    fn nothing_is_lost_doubled_or_out_of_turn(
        max_batch in 1_usize..6,
        delay in prop_oneof![Just(0_u64), 1_u64..50],
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut bench = Bench::new(max_batch, Duration::from_millis(delay));
        for step in steps {
            match step {
                Step::Push { model, priority, patience } => bench.push(model, priority, patience),
                Step::Leave(_) if bench.waiting.is_empty() => {}
                Step::Leave(which) => {
                    let which = which.index(bench.waiting.len());
                    bench.waiting[which].reply = None;
                    bench.waiting[which].payload.release();
                }
                Step::Wait(ms) => bench.now += Duration::from_millis(ms),
                Step::Next(ms) => _ = bench.next(Duration::from_millis(ms)),
            }
        }
        bench.drain();
    }

    #[test]
    fn models_that_always_ask_differ_by_one_batch_of_time_at_most(
        costs in prop::collection::vec((0_u64..4, 1_u64..500), 20..100),
    ) {
        const MODELS: u64 = 4;
        let mut bench = Bench::new(1, Duration::ZERO);
        for _ in 0..costs.len() {
            (0..MODELS).for_each(|model| bench.push(model, Priority::Interactive, None));
        }
        let mut served = [0_u64; MODELS as usize];
        // What a model costs changes from batch to batch.
        for (shift, cost) in costs {
            let Next::Batch(batch) = bench.queue.next(bench.now) else { panic!("all wait") };
            let model = batch[0].model;
            let cost = cost * (1 + (model + shift) % MODELS);
            bench.queue.charge(model, Duration::from_millis(cost));
            served[model as usize] += cost;
            let (most, least) = (served.iter().max().unwrap(), served.iter().min().unwrap());
            prop_assert!(most - least <= 500 * MODELS, "{served:?}");
        }
    }

    #[test]
    fn what_can_wait_is_taken_in_after_a_second_whatever_comes(
        flood in 1_u64..6, max_batch in 1_usize..4, cost in 10_u64..100,
    ) {
        let mut bench = Bench::new(max_batch, Duration::ZERO);
        bench.push(0, Priority::Bulk, None);
        let cost = Duration::from_millis(cost);
        let start = bench.now;
        // Two models flood the device with what cannot wait, one of them the same.
        while bench.waiting.iter().any(|image| image.number == 0) {
            for model in 0..2 {
                (0..flood).for_each(|_| bench.push(model, Priority::Interactive, None));
            }
            bench.next(cost);
            let waited = bench.now.duration_since(start);
            prop_assert!(waited <= PATIENCE + 4 * cost, "it waits for {waited:?}");
        }
    }

    #[test]
    fn a_batch_is_of_an_urgent_model_when_there_is_one(
        steps in prop::collection::vec(step(), 1..60),
    ) {
        let mut bench = Bench::new(4, Duration::ZERO);
        for step in steps {
            match step {
                Step::Push { model, priority, .. } => bench.push(model, priority, None),
                Step::Wait(ms) => bench.now += Duration::from_millis(ms),
                Step::Leave(_) => {}
                Step::Next(ms) => {
                    let urgent: Vec<u64> = bench.waiting.iter()
                        .filter(|image| image.is_urgent(bench.now))
                        .map(|image| image.model)
                        .collect();
                    if let Next::Batch(batch) = bench.queue.next(bench.now) {
                        let model = batch[0].model;
                        prop_assert!(urgent.is_empty() || urgent.contains(&model));
                        bench.check_batch(model, batch);
                        bench.queue.charge(model, Duration::from_millis(ms));
                    }
                }
            }
        }
        bench.drain();
    }
}
