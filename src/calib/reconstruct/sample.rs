//! Random batches that depend on nothing but a seed: libtorch's generator is shared by all jobs.

/// Draws indices without replacement; each draw is independent of the ones before.
#[derive(Debug)]
pub(super) struct Sampler {
    state: u64,
    order: Vec<i64>,
}

impl Sampler {
    /// Draws from 0..count, by seed and stream (a unit's index).
    pub(super) fn new(count: i64, seed: u64, stream: usize) -> Self {
        let mut sampler = Self { state: seed, order: (0..count).collect() };
        sampler.state = sampler.next().wrapping_add(stream as u64);
        sampler
    }

    /// `count` different indices, all of them if there are fewer: the start of a Fisher–Yates shuffle.
    pub(super) fn draw(&mut self, count: usize) -> &[i64] {
        let count = count.min(self.order.len());
        for place in 0..count {
            let left = (self.order.len() - place) as u64;
            let chosen = place + (((self.next() >> 32) * left) >> 32) as usize;
            self.order.swap(place, chosen);
        }
        &self.order[..count]
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
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
