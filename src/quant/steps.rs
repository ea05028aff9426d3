//! Thresholds of functions that rise in steps, found in the tensor code that defines them.
//!
//! A logarithm that is rounded to an integer is a staircase. Its steps are wherever libtorch's
//! logarithm, on this machine, has them; so they are searched for in it, float by float, and a
//! comparison with them gives what the logarithm would.

use tch::Tensor;

use crate::error::Result;
use crate::tensor::to_vec_f32;

/// Floats on either side of a threshold that are checked for order.
const NEIGHBOURS: i64 = 64;

/// The smallest float of `low..=∞` at which `passed` (a whole number that never falls) reaches 1, 2,
/// …, at most `steps`. `None` where it does fall near a threshold.
///
/// # Errors
/// Whatever `passed` reports.
pub(crate) fn thresholds(
    low: f32,
    steps: usize,
    passed: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Option<Vec<f32>>> {
    let evaluate = |keys: &[i64]| -> Result<Vec<f32>> {
        let values: Vec<f32> = keys.iter().map(|key| float_of(*key)).collect();
        to_vec_f32(&passed(&Tensor::f_from_slice(&values)?)?)
    };
    let (first, last) = (key_of(low), key_of(f32::INFINITY));
    let reached = evaluate(&[last])?[0];
    let steps = steps.min(reached.max(0.0) as usize);
    // Below `below` a step is not passed, from `from` on it is.
    let (mut below, mut from) = (vec![first - 1; steps], vec![last; steps]);
    while below.iter().zip(&from).any(|(below, from)| from - below > 1) {
        let middle: Vec<i64> = below.iter().zip(&from).map(|(a, b)| b - (b - a) / 2).collect();
        for (step, count) in evaluate(&middle)?.into_iter().enumerate() {
            if count >= (step + 1) as f32 {
                from[step] = middle[step];
            } else {
                below[step] = middle[step];
            }
        }
    }
    for (step, threshold) in from.iter().enumerate() {
        let start = (threshold - NEIGHBOURS).max(first);
        let keys: Vec<i64> = (start..=(threshold + NEIGHBOURS).min(last)).collect();
        let in_order = evaluate(&keys)?
            .into_iter()
            .zip(&keys)
            .all(|(count, key)| (count >= (step + 1) as f32) == (key >= threshold));
        if !in_order {
            return Ok(None);
        }
    }
    Ok(Some(from.into_iter().map(float_of).collect()))
}

/// A whole number that rises by one from each float to the next; −0 and 0 are apart.
fn key_of(value: f32) -> i64 {
    let bits = i64::from(value.to_bits() & 0x7fff_ffff);
    if value.is_sign_negative() { -1 - bits } else { bits }
}

fn float_of(key: i64) -> f32 {
    let bits = if key < 0 { (-1 - key) | 0x8000_0000 } else { key };
    f32::from_bits(bits as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_count_floats() {
        for value in [0.0f32, -0.0, 1.0, -1.0, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -1e-45] {
            assert_eq!(float_of(key_of(value)).to_bits(), value.to_bits());
            assert!(float_of(key_of(value) + 1) >= value || value == f32::INFINITY);
        }
        assert_eq!(key_of(0.0) - key_of(-1e-45), 2);
    }

    #[test]
    fn steps_are_found_to_the_float() {
        let passed = |x: &Tensor| -> Result<Tensor> { Ok(x.f_floor()?.f_clamp(0.0, 3.0)?) };
        assert_eq!(thresholds(-5.0, 3, passed).unwrap().unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(thresholds(1.5, 3, passed).unwrap().unwrap(), [1.5, 2.0, 3.0]);
        // A function that ends below the last step has fewer.
        let passed = |x: &Tensor| -> Result<Tensor> { Ok(x.f_floor()?.f_clamp(0.0, 2.0)?) };
        assert_eq!(thresholds(-5.0, 3, passed).unwrap().unwrap(), [1.0, 2.0]);
        let hole = f64::from(f32::from_bits(2f32.to_bits() + 10));
        let falling =
            |x: &Tensor| -> Result<Tensor> { Ok(x.f_gt(2.0)?.f_logical_and(&x.f_ne(hole)?)?) };
        assert!(thresholds(0.0, 1, falling).unwrap().is_none());
    }
}
