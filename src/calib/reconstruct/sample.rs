//! Random batches that depend on nothing but a seed.

use crate::random::SplitMix64;

/// Draws indices without replacement; each draw is independent of the ones before.
#[derive(Debug)]
pub(super) struct Sampler {
    generator: SplitMix64,
    order: Vec<i64>,
}

impl Sampler {
    /// Draws from 0..count, by seed and stream (a unit's index).
    pub(super) fn new(count: i64, seed: u64, stream: usize) -> Self {
        let start = SplitMix64(seed).bits().wrapping_add(stream as u64);
        Self { generator: SplitMix64(start), order: (0..count).collect() }
    }

    /// `count` different indices, all of them if there are fewer: the start of a Fisher–Yates shuffle.
    pub(super) fn draw(&mut self, count: usize) -> &[i64] {
        let count = count.min(self.order.len());
        for place in 0..count {
            let left = (self.order.len() - place) as u64;
            let chosen = place + (((self.generator.bits() >> 32) * left) >> 32) as usize;
            self.order.swap(place, chosen);
        }
        &self.order[..count]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_draw_has_no_index_twice_and_reaches_all() {
        let mut sampler = Sampler::new(10, 1, 0);
        let mut counts = [0; 10];
        for _ in 0..1000 {
            let drawn = sampler.draw(4);
            assert_eq!(drawn.iter().collect::<BTreeSet<_>>().len(), 4);
            for index in drawn {
                counts[*index as usize] += 1;
            }
        }
        assert!(counts.iter().all(|count| (300..500).contains(count)), "{counts:?}");
        assert_eq!(sampler.draw(64).len(), 10);
    }

    #[test]
    fn seeds_and_streams_differ_and_repeat() {
        let draw = |seed, stream| Sampler::new(100, seed, stream).draw(20).to_vec();
        assert_eq!(draw(3, 1), draw(3, 1));
        assert_ne!(draw(3, 1), draw(3, 2));
        assert_ne!(draw(3, 1), draw(4, 1));
    }
}
