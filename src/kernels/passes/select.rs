//! Order statistics without sorting: the lower median by three counts over the values' bits.

use std::sync::atomic::{AtomicBool, Ordering};

use super::share;

/// Values counted by one task.
const PIECE: usize = 1 << 16;

/// Bits of a digit, most significant first.
const DIGITS: [u32; 3] = [11, 11, 10];

/// The lower median, as a sort would give it; NaN where a value is NaN, and of nothing.
pub fn lower_median(x: &[f32]) -> f32 {
    if x.is_empty() || has_nan(x) {
        return f32::NAN;
    }
    let mut rank = ((x.len() - 1) / 2) as u64;
    let (mut prefix, mut known) = (0u32, 0u32);
    for digit in DIGITS {
        let counts = count(x, prefix, known, digit);
        let mut value = 0;
        while rank >= counts[value] {
            rank -= counts[value];
            value += 1;
        }
        prefix = prefix << digit | value as u32;
        known += digit;
    }
    from_key(prefix)
}

fn has_nan(x: &[f32]) -> bool {
    let found = AtomicBool::new(false);
    share(x.chunks(PIECE), |part| {
        if part.iter().any(|v| v.is_nan()) {
            found.store(true, Ordering::Relaxed);
        }
    });
    found.into_inner()
}

/// How many keys that begin with the `known` bits of `prefix` go on with each value of a digit.
fn count(x: &[f32], prefix: u32, known: u32, digit: u32) -> Vec<u64> {
    let values = 1 << digit;
    let (shift, mask) = (32 - known - digit, (1u32 << digit) - 1);
    let mut counts = vec![0u64; values * x.len().div_ceil(PIECE)];
    share(x.chunks(PIECE).zip(counts.chunks_mut(values)), |(part, counts)| {
        for value in part {
            let key = key(*value);
            if known == 0 || key >> (32 - known) == prefix {
                counts[(key >> shift & mask) as usize] += 1;
            }
        }
    });
    let mut sums = vec![0; values];
    for counts in counts.chunks_exact(values) {
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    sums
}

/// A number that rises with the value.
fn key(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 { bits | 0x8000_0000 } else { !bits }
}

fn from_key(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 1 { key & 0x7fff_ffff } else { !key })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_a_sort_gives() {
        for count in [1, 2, 3, 10, 1001, 150_000] {
            let x: Vec<f32> =
                (0..count).map(|i: u64| ((i * 7919 + 3) % 10_007) as f32 * 0.01 - 40.0).collect();
            let mut sorted = x.clone();
            sorted.sort_by(f32::total_cmp);
            assert_eq!(lower_median(&x), sorted[(sorted.len() - 1) / 2], "{count}");
        }
        assert_eq!(lower_median(&[f32::INFINITY, 1.0, f32::NEG_INFINITY]), 1.0);
        assert!(lower_median(&[1.0, f32::NAN]).is_nan());
        assert!(lower_median(&[]).is_nan());
    }
}
