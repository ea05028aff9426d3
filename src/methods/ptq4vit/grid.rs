//! The three grids and the scales that are tried for each (methods/ptq4vit.md, sections 1 to 5).

use tch::Tensor;

use crate::error::Result;
use crate::quant::uniform::Uniform;
use crate::quant::{BitWidth, Quantizer};

use super::twin_gelu::{TwinGelu, negative_scale};
use super::twin_softmax::{Overlap, TwinSoftmax};

/// Largest magnitude of an operand that is taken for zero.
const NEGLIGIBLE: f64 = 1e-12;

/// Number of split points tried, s = 1, 1/2, .., 2^−19.
const SPLITS: i32 = 20;

/// The split point before the search. The released code starts at 0.01; this is the power of two
/// next to it.
const FIRST_SPLIT: f64 = 0.007_812_5;

/// Q = 2^(b−1): symmetric codes are −Q..Q − 1.
pub(super) fn half_range(bits: BitWidth) -> f64 {
    (bits.max_code() + 1.0) / 2.0
}

/// How an operand is rounded, up to its scale.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    /// The form of the grid.
    pub(super) shape: GridShape,
    /// Its bits.
    pub(super) bits: BitWidth,
}

/// The forms of a grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GridShape {
    /// Δ·(−Q..Q − 1).
    Symmetric,
    /// One grid above and one below zero; the scale is Δ⁺.
    TwinGelu(Ratio),
    /// One grid below and one above a split point, which takes the place of the scale.
    TwinSoftmax(Overlap),
}

/// Which ratios Δ⁺/Δ⁻ are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ratio {
    /// Any, as released.
    Free,
    /// Powers of two, as in the paper: the ranges align by a shift.
    PowerOfTwo,
}

/// The factors by which an initial scale is multiplied.
#[derive(Clone, Copy, Debug)]
pub(super) struct Factors {
    /// Smallest factor, the paper's α.
    pub(super) low: f64,
    /// Upper end, the paper's β; itself not tried, as released.
    pub(super) high: f64,
    /// Number of factors.
    pub(super) count: i32,
}

/// The scales that are tried for one part of an operand.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidates {
    /// The scale before the search, Δ₀.
    pub(super) initial: f32,
    /// What is tried, in this order; a single scale is not searched.
    pub(super) scales: Vec<f32>,
}

impl Candidates {
    fn single(scale: f32) -> Self {
        Self { initial: scale, scales: vec![scale] }
    }
}

impl Grid {
    /// The quantizer with the given scales, which broadcast to the operand.
    ///
    /// # Errors
    /// `InvalidArgument` when a scale is not finite; `Device` when libtorch refuses.
    pub(super) fn quantizer(&self, scale: Tensor) -> Result<Box<dyn Quantizer>> {
        Ok(match self.shape {
            GridShape::Symmetric => {
                let zero_point = scale.f_full_like(half_range(self.bits))?;
                Box::new(Uniform::new(self.bits, scale, zero_point)?)
            }
            GridShape::TwinGelu(_) => Box::new(TwinGelu::new(self.bits, scale)),
            GridShape::TwinSoftmax(overlap) => {
                Box::new(TwinSoftmax::new(self.bits, overlap, scale))
            }
        })
    }

    /// What the quantizer with the given scales makes of `x`.
    ///
    /// # Errors
    /// As [`Grid::quantizer`].
    pub(super) fn round(&self, x: &Tensor, scale: Tensor) -> Result<Tensor> {
        if self.shape != GridShape::Symmetric {
            return self.quantizer(scale)?.fake_quantize(x);
        }
        // The same without zero points and in place: half the time of a search's larger part.
        let half = half_range(self.bits);
        Ok(x.f_div(&scale)?.f_round_()?.f_clamp_(-half, half - 1.0)?.f_mul_(&scale)?)
    }

    /// The scales to try for `x`: factors of Δ₀ = max|x| / (Q − 0.5), or the split points.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn candidates(&self, x: &Tensor, factors: &Factors) -> Result<Candidates> {
        let largest = match self.shape {
            GridShape::Symmetric => x.f_abs()?.f_max()?.f_double_value(&[])?,
            GridShape::TwinGelu(_) | GridShape::TwinSoftmax(_) => x.f_max()?.f_double_value(&[])?,
        };
        // Both numbers are float32 values: the quotient is the one of float32.
        let initial = (largest / (half_range(self.bits) - 0.5)) as f32;
        let free = || Candidates { initial, scales: factors.times(initial) };
        let negative = negative_scale(self.bits);
        Ok(match self.shape {
            GridShape::Symmetric if largest < NEGLIGIBLE => Candidates::single(1.0),
            GridShape::Symmetric => free(),
            GridShape::TwinGelu(_) if largest < NEGLIGIBLE => Candidates::single(negative as f32),
            GridShape::TwinGelu(Ratio::Free) => free(),
            GridShape::TwinGelu(Ratio::PowerOfTwo) => factors.aligned(f64::from(initial), negative),
            GridShape::TwinSoftmax(_) => Candidates {
                initial: FIRST_SPLIT as f32,
                scales: (0..SPLITS).map(|i| 2f32.powi(-i)).collect(),
            },
        })
    }
}

impl Factors {
    /// f_i·Δ₀, in float32 as the released code multiplies.
    fn times(&self, initial: f32) -> Vec<f32> {
        let step = |i| f64::from(i) * (self.high - self.low) / f64::from(self.count);
        (0..self.count).map(|i| (self.low + step(i)) as f32 * initial).collect()
    }

    /// The scales 2^m·`negative` in the range of factors, or the one next to Δ₀ if none is.
    fn aligned(&self, initial: f64, negative: f64) -> Candidates {
        let scale = |m: f64| (m.exp2() * negative) as f32;
        let exponent = |scale: f64| (scale / negative).log2();
        let nearest = exponent(initial).round();
        let last = exponent(self.high * initial).floor();
        let first = exponent(self.low * initial).ceil();
        let (first, last) = if first <= last { (first, last) } else { (nearest, nearest) };
        let scales = std::iter::successors(Some(first), |m| Some(m + 1.0));
        let scales = scales.take_while(|m| *m <= last).map(scale).collect();
        Candidates { initial: scale(nearest), scales }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;

    /// The published factors.
    const FACTORS: Factors = Factors { low: 0.01, high: 1.2, count: 100 };

    fn grid(shape: GridShape) -> Grid {
        Grid { shape, bits: BitWidth::new(4, "bits").unwrap() }
    }

    #[test]
    fn the_initial_scale_clips_half_a_step_of_the_largest_value() {
        let x = Tensor::from_slice(&[-15.0f32, 3.0, 7.5]);
        let symmetric = grid(GridShape::Symmetric).candidates(&x, &FACTORS).unwrap();
        assert_eq!(symmetric.initial, 2.0);
        assert_eq!(symmetric.scales.len(), 100);
        assert_eq!(symmetric.scales[0], 0.02);
        assert!((symmetric.scales[99] - 2.0 * 1.1881).abs() < 1e-6);
        // Only what lies above zero counts for a post-GELU grid.
        let gelu = grid(GridShape::TwinGelu(Ratio::Free)).candidates(&x, &FACTORS).unwrap();
        assert_eq!(gelu.initial, 1.0);
    }

    #[test]
    fn rounding_gives_what_the_quantizer_gives() {
        let x = sample(&[3, 1, 6, 8], 1);
        let scales = Tensor::from_slice(&[0.02f32, 0.3]).view([2, 1, 1]);
        for shape in [GridShape::Symmetric, GridShape::TwinGelu(Ratio::Free)] {
            let found = grid(shape).round(&x, scales.shallow_clone()).unwrap();
            let quantizer = grid(shape).quantizer(scales.shallow_clone()).unwrap();
            assert_eq!(found.size(), [3, 2, 6, 8]);
            assert!(found.equal(&quantizer.fake_quantize(&x).unwrap()));
        }
    }

    #[test]
    fn split_points_are_powers_of_two() {
        let shape = GridShape::TwinSoftmax(Overlap::Exclusive);
        let found = grid(shape).candidates(&Tensor::from_slice(&[1.0f32]), &FACTORS).unwrap();
        assert_eq!((found.scales.len(), found.scales[0], found.scales[3]), (20, 1.0, 0.125));
    }

    #[test]
    fn aligned_scales_are_powers_of_two_of_the_negative_one() {
        let x = Tensor::from_slice(&[-0.1f32, 7.5]);
        let shape = GridShape::TwinGelu(Ratio::PowerOfTwo);
        let found = grid(shape).candidates(&x, &FACTORS).unwrap();
        let negative = 0.169_971_24 / 8.0;
        // 0.01..1.2 over Δ⁻ = 0.0212: from 2^−1 to 2^5.
        let exponents: Vec<f32> = found.scales.iter().map(|s| (s / negative).log2()).collect();
        assert_eq!(exponents.len(), 7);
        for (found, expected) in exponents.iter().zip(-1i16..) {
            assert!((found - f32::from(expected)).abs() < 1e-4, "{exponents:?}");
        }
        // A range that holds none: the nearest.
        let narrow = Factors { low: 0.9, high: 1.1, count: 5 };
        assert_eq!(grid(shape).candidates(&x, &narrow).unwrap().scales.len(), 1);
    }

    #[test]
    fn an_operand_of_zeros_is_not_searched() {
        let zeros = Tensor::from_slice(&[0.0f32, -0.0]);
        let found = grid(GridShape::Symmetric).candidates(&zeros, &FACTORS).unwrap();
        assert_eq!(found, Candidates::single(1.0));
        let negatives = Tensor::from_slice(&[-0.1f32, 0.0]);
        let shape = GridShape::TwinGelu(Ratio::Free);
        let found = grid(shape).candidates(&negatives, &FACTORS).unwrap();
        assert_eq!(found.scales, [(negative_scale(grid(shape).bits)) as f32]);
    }
}
