//! How fast images are answered: what waiting times are estimated by.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::random;

/// Share of the newest observation in an average.
const NEWEST: f64 = 0.2;
/// Bounds of what callers are told to wait.
const WAIT: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(5));

/// Moving averages that any thread may read and one at a time writes.
#[derive(Debug, Default)]
pub struct Pace {
    /// Seconds per image, as the bits of a float; 0 before the first batch.
    per_image: AtomicU64,
    /// Seconds per batch, likewise.
    per_batch: AtomicU64,
}

impl Pace {
    /// Takes note of a batch of `images` that took so long.
    pub fn note(&self, images: usize, time: Duration) {
        let seconds = time.as_secs_f64();
        average(&self.per_image, seconds / images.max(1) as f64);
        average(&self.per_batch, seconds);
    }

    /// Seconds per image; 0 before the first batch.
    pub fn per_image(&self) -> f64 {
        f64::from_bits(self.per_image.load(Ordering::Relaxed))
    }

    /// The least that so many images take; zero before the first batch.
    pub fn for_images(&self, images: usize) -> Duration {
        Duration::try_from_secs_f64(self.per_image() * images as f64).unwrap_or_default()
    }

    /// Time of a batch; zero before the first.
    pub fn per_batch(&self) -> Duration {
        let seconds = f64::from_bits(self.per_batch.load(Ordering::Relaxed));
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }

    /// When a caller who met `ahead` images should come back: give or take a fifth, so that those who
    /// were refused together do not return together.
    pub fn retry_after(&self, ahead: usize) -> Duration {
        let seconds = self.per_image() * ahead as f64 * random::around_one(0.2);
        Duration::try_from_secs_f64(seconds).unwrap_or(WAIT.1).clamp(WAIT.0, WAIT.1)
    }
}

fn average(value: &AtomicU64, newest: f64) {
    let before = f64::from_bits(value.load(Ordering::Relaxed));
    let after = if before == 0.0 { newest } else { before + NEWEST * (newest - before) };
    value.store(after.to_bits(), Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_times_follow_the_pace() {
        let pace = Pace::default();
        assert_eq!((pace.per_image(), pace.retry_after(1000)), (0.0, WAIT.0));
        pace.note(8, Duration::from_millis(80));
        assert!((pace.per_image() - 0.01).abs() < 1e-9);
        for _ in 0..100 {
            let wait = pace.retry_after(100).as_secs_f64();
            assert!((0.8..=1.2).contains(&wait), "{wait}");
        }
        assert_eq!(pace.retry_after(1_000_000), WAIT.1);
        for _ in 0..50 {
            pace.note(1, Duration::from_millis(2));
        }
        assert!((pace.per_image() - 0.002).abs() < 1e-5);
        assert!(pace.per_batch() < Duration::from_millis(3));
    }
}
