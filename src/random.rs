//! Numbers that look random and are the same everywhere, for ever: libtorch's generator is shared by
//! all jobs, and stored artifacts name their images and weights by seed. And one that never is the
//! same, for what is not to happen everywhere at once.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};

/// Increment of SplitMix64: 2^64 divided by the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of SplitMix64: each bit of `z` moves about half of the result's.
#[inline]
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// 64-bit FNV-1a of the UTF-8 bytes.
pub(crate) fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// 1, give or take at most `share`: another number with each call and in each process.
pub(crate) fn around_one(share: f64) -> f64 {
    let random = RandomState::new().build_hasher().finish() as f64 / u64::MAX as f64;
    1.0 + share * (2.0 * random - 1.0)
}

/// SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub(crate) struct SplitMix64(pub(crate) u64);

impl SplitMix64 {
    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_around_one_differ_and_stay_near() {
        let numbers: Vec<f64> = (0..100).map(|_| around_one(0.1)).collect();
        assert!(numbers.iter().all(|number| (0.9..=1.1).contains(number)));
        assert!(numbers.iter().any(|number| *number != numbers[0]));
    }

    #[test]
    fn the_numbers_are_those_of_the_published_algorithms() {
        let mut generator = SplitMix64(1_234_567);
        let found: Vec<u64> = (0..3).map(|_| generator.bits()).collect();
        assert_eq!(
            found,
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
        );
        assert_eq!(fnv1a(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a("foobar"), 0x8594_4171_f739_67e8);
    }
}
