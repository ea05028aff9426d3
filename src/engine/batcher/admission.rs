//! Who comes in: a bound on images, one on their bytes, and what one model may take of them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{ClientShare, Pace, Priority};
use crate::error::{Error, Result};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes are counted in blocks of so many, each image by at least one.
const BLOCK: usize = 1 << 10;

/// A model may hold at most so many times the places that are still free, so that a flood of one
/// model's images leaves room for the others: the dynamic thresholds of shared-memory switches
/// (Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998, section III). One model
/// alone gets four fifths of all places this way, two under flood four ninths each.
const SHARE: usize = 4;

/// Bounds of what is in the server at once.
#[derive(Clone, Copy, Debug)]
pub struct QueueLimits {
    /// Images.
    pub images: usize,
    /// Bytes of their files.
    pub bytes: usize,
}

/// Limits the images that are in the server at once, and the bytes of their files.
#[derive(Clone, Debug)]
pub struct Admission {
    places: Arc<Places>,
    pace: Arc<Pace>,
}

#[derive(Debug)]
struct Places {
    images: usize,
    blocks: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    images: usize,
    blocks: usize,
    /// Images by model; models without any are not there.
    by_model: BTreeMap<Arc<str>, usize>,
    /// Images that wait for a device; lines without any are not there.
    lines: BTreeMap<(Arc<str>, Priority), BTreeSet<Turn>>,
    next_turn: u64,
}

/// When an image began to wait, and a number that makes it another than all others.
type Turn = (Instant, u64);

/// Images of one model and priority that wait for a device.
#[derive(Clone, Debug)]
pub struct WaitingLine {
    /// The model.
    pub model: Arc<str>,
    /// How urgent they are.
    pub priority: Priority,
    /// How many they are.
    pub images: usize,
    /// For how long the first of them has waited.
    pub age: Duration,
}

/// An image's place in the server; given back when it is dropped.
#[derive(Debug)]
pub struct Permit {
    places: Arc<Places>,
    model: Arc<str>,
    blocks: usize,
    turn: Option<(Priority, Turn)>,
    /// The client's share of the call, given back with the last of its images.
    _share: Option<Arc<ClientShare>>,
}

impl Admission {
    /// Room for so much; refused callers are told when to come back by the `pace` of answers.
    pub fn new(limits: QueueLimits, pace: Arc<Pace>) -> Self {
        let QueueLimits { images, bytes } = limits;
        let places =
            Places { images, blocks: bytes.div_ceil(BLOCK).max(1), taken: Mutex::default() };
        Self { places: Arc::new(places), pace }
    }

    /// Images that fit into an empty server, and so into one call.
    pub fn capacity(&self) -> usize {
        self.places.images
    }

    /// Images in the server.
    pub fn images(&self) -> usize {
        self.places.lock().images
    }

    /// The images that wait for a device, by model and priority.
    pub fn waiting(&self) -> Vec<WaitingLine> {
        let taken = self.places.lock();
        let line =
            |((model, priority), turns): (&(Arc<str>, Priority), &BTreeSet<Turn>)| WaitingLine {
                model: Arc::clone(model),
                priority: *priority,
                images: turns.len(),
                age: turns.first().map_or(Duration::ZERO, |(since, _)| since.elapsed()),
            };
        taken.lines.iter().map(line).collect()
    }

    /// Whether images of these sizes in bytes would fit into an empty server.
    ///
    /// # Errors
    /// `InvalidArgument` on `images`.
    pub fn check(&self, sizes: &[usize]) -> Result<()> {
        let (images, capacity) = (sizes.len(), self.places.images);
        if images > capacity {
            let reason = format!("{images} images in one call, at most {capacity} fit");
            return Err(Error::invalid("images", reason));
        }
        if blocks_of_all(sizes) > self.places.blocks {
            let most = self.places.blocks * BLOCK;
            let reason = format!("the call's images have more than {most} bytes");
            return Err(Error::invalid("images", reason));
        }
        Ok(())
    }

    /// Permits for a model's images of these sizes in bytes, all of a call or none.
    ///
    /// # Errors
    /// As [`Admission::check`]; `Overloaded` when they do not fit now.
    pub fn admit(&self, model: &str, sizes: &[usize]) -> Result<Vec<Permit>> {
        self.check(sizes)?;
        let (images, blocks) = (sizes.len(), blocks_of_all(sizes));
        let mut taken = self.places.lock();
        let held = taken.by_model.get(model).copied().unwrap_or(0);
        let free = self.places.images - taken.images;
        let fits = images <= free && blocks <= self.places.blocks - taken.blocks;
        if !fits || held >= SHARE * free {
            let waiting = taken.images;
            drop(taken);
            return Err(self.full(waiting));
        }
        let model: Arc<str> = match taken.by_model.get_key_value(model) {
            Some((name, _)) => Arc::clone(name),
            None => model.into(),
        };
        taken.images += images;
        taken.blocks += blocks;
        *taken.by_model.entry(Arc::clone(&model)).or_default() += images;
        drop(taken);
        let permit = |bytes: &usize| Permit {
            places: Arc::clone(&self.places),
            model: Arc::clone(&model),
            blocks: blocks_of(bytes),
            turn: None,
            _share: None,
        };
        Ok(sizes.iter().map(permit).collect())
    }

    fn full(&self, images: usize) -> Error {
        Error::Overloaded {
            reason: format!("the queue is full: {images} images are in the server"),
            retry_after: self.pace.retry_after(images),
        }
    }
}

fn blocks_of(bytes: &usize) -> usize {
    bytes.div_ceil(BLOCK).max(1)
}

fn blocks_of_all(sizes: &[usize]) -> usize {
    sizes.iter().map(blocks_of).sum()
}

impl Places {
    /// Nothing panics while it holds the lock, so the counts are whole.
    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// The permit of an image that its client's share holds, too.
    #[must_use]
    pub fn within(mut self, share: Option<Arc<ClientShare>>) -> Self {
        self._share = share;
        self
    }

    /// The model whose image it is.
    pub fn model(&self) -> &Arc<str> {
        &self.model
    }

    /// Notes that the image waits for a device from now on.
    pub fn wait(&mut self, priority: Priority, since: Instant) {
        let mut taken = self.places.lock();
        let turn = (since, taken.next_turn);
        taken.next_turn += 1;
        taken.lines.entry((Arc::clone(&self.model), priority)).or_default().insert(turn);
        self.turn = Some((priority, turn));
    }

    /// Notes that the image waits no more.
    pub fn go(&mut self) {
        let turn = self.turn.take();
        self.places.lock().leave(&self.model, turn);
    }
}

impl Taken {
    fn leave(&mut self, model: &Arc<str>, turn: Option<(Priority, Turn)>) {
        let Some((priority, turn)) = turn else { return };
        let line = (Arc::clone(model), priority);
        if let Some(turns) = self.lines.get_mut(&line) {
            turns.remove(&turn);
            if turns.is_empty() {
                self.lines.remove(&line);
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.leave(&self.model, self.turn.take());
        taken.images -= 1;
        taken.blocks -= self.blocks;
        if let Some(held) = taken.by_model.get_mut(&self.model) {
            *held -= 1;
            if *held == 0 {
                taken.by_model.remove(&self.model);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(images: usize, bytes: usize) -> Admission {
        Admission::new(QueueLimits { images, bytes }, Arc::default())
    }

    fn refusal(admission: &Admission, model: &str, sizes: &[usize]) -> Duration {
        let error = admission.admit(model, sizes).unwrap_err();
        let Error::Overloaded { retry_after, .. } = error else { panic!("{error}") };
        retry_after
    }

    #[test]
    fn a_call_is_admitted_whole_or_not_at_all() {
        let admission = admission(4, 1 << 20);
        let held = admission.admit("a", &[1; 3]).unwrap();
        assert_eq!(admission.images(), 3);
        refusal(&admission, "a", &[1; 2]);
        let one = admission.admit("a", &[1]).unwrap();
        refusal(&admission, "b", &[1]);
        drop((held, one));
        assert_eq!(admission.admit("a", &[1; 4]).unwrap().len(), 4);
        let large = admission.admit("a", &[1; 5]).unwrap_err();
        assert!(matches!(large, Error::InvalidArgument { .. }), "{large}");
    }

    #[test]
    fn bytes_are_bounded_too_and_come_back_image_by_image() {
        let admission = admission(100, 10 << 10);
        let mut held = admission.admit("a", &[4 << 10, 5 << 10]).unwrap();
        refusal(&admission, "a", &[2 << 10]);
        assert_eq!(admission.images(), 2, "a refused call gives back what it had");
        held.pop();
        let _again = admission.admit("a", &[6 << 10]).unwrap();
        refusal(&admission, "a", &[0]);
        let large = admission.admit("a", &[11 << 10]).unwrap_err();
        assert!(matches!(large, Error::InvalidArgument { .. }), "{large}");
    }

    #[test]
    fn a_flood_leaves_room_for_other_models() {
        let admission = admission(100, 1 << 20);
        let mut held = Vec::new();
        while let Ok(more) = admission.admit("flood", &[1]) {
            held.extend(more);
        }
        assert_eq!(held.len(), 80);
        for _ in 0..10 {
            held.extend(admission.admit("light", &[1]).unwrap());
        }
        // Two floods share what there is.
        while let Ok(more) = admission.admit("light", &[1]) {
            held.extend(more);
        }
        held.retain(|permit| permit.model.as_ref() == "light");
        assert_eq!(held.len(), 16);
        drop(held);
        assert_eq!(admission.images(), 0);
        assert!(admission.places.lock().by_model.is_empty(), "names are forgotten");
    }

    #[test]
    fn who_waits_is_counted_until_it_goes_or_is_dropped() {
        let admission = admission(10, 1 << 20);
        let mut held = admission.admit("a", &[1; 3]).unwrap();
        assert!(admission.waiting().is_empty(), "images that are decoded do not wait");
        let earlier = Instant::now() - Duration::from_secs(60);
        held[0].wait(Priority::Interactive, Instant::now());
        held[1].wait(Priority::Interactive, earlier);
        held[2].wait(Priority::Bulk, earlier);
        let lines = admission.waiting();
        let seen: Vec<_> =
            lines.iter().map(|line| (&*line.model, line.priority, line.images)).collect();
        assert_eq!(seen, [("a", Priority::Interactive, 2), ("a", Priority::Bulk, 1)]);
        assert!(lines.iter().all(|line| line.age >= Duration::from_secs(60)));
        held[1].go();
        let lines = admission.waiting();
        assert!(lines[0].images == 1 && lines[0].age < Duration::from_secs(60), "{lines:?}");
        drop(held);
        assert!(admission.waiting().is_empty());
    }

    #[test]
    fn the_refused_learn_how_long_the_queue_is() {
        let pace = Arc::<Pace>::default();
        pace.note(1, Duration::from_millis(100));
        let limits = QueueLimits { images: 10, bytes: 1 << 20 };
        let admission = Admission::new(limits, pace);
        let _held = admission.admit("a", &[1; 10]).unwrap();
        assert!((0.8..=1.2).contains(&refusal(&admission, "a", &[1]).as_secs_f64()));
    }
}
