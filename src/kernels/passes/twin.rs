//! Twin uniform grids: one for each sign, or one for small and one for large values.

use super::affine::{at_least, at_most, byte};
use super::{for_rows, vectorized};

/// A grid above zero and one below.
#[derive(Clone, Copy, Debug)]
pub struct Signs {
    /// Step above zero.
    pub positive: f32,
    /// Step below zero.
    pub negative: f32,
    /// Q: codes are 0..Q − 1 above and −Q..0 below zero.
    pub half: f32,
}

impl Signs {
    #[inline(always)]
    fn codes(self, x: f32) -> (f32, f32) {
        let positive = (at_least(x, 0.0) / self.positive).round_ties_even();
        let negative = (at_most(x, 0.0) / self.negative).round_ties_even();
        (at_most(positive, self.half - 1.0), at_least(negative, -self.half))
    }

    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        let (positive, negative) = self.codes(x);
        positive * self.positive + negative * self.negative
    }
}

/// A fine grid for small values and a coarse one for large ones.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Where large values begin.
    pub split: f32,
    /// Step of the fine grid.
    pub small: f32,
    /// Step of the coarse grid.
    pub large: f32,
    /// P, the largest code of either.
    pub largest: f32,
    /// Whether the two grids are added up for every value, each of a copy clamped to its range.
    pub overlap: bool,
}

impl Sizes {
    #[inline(always)]
    fn code(self, ratio: f32) -> f32 {
        at_most(at_least(ratio.round_ties_even(), 0.0), self.largest)
    }

    #[inline(always)]
    fn codes<const OVERLAP: bool>(self, x: f32) -> (f32, f32) {
        if OVERLAP {
            let (below, above) = (at_most(x, self.split), at_least(x, self.split));
            return (self.code(below / self.small), self.code(above * self.largest));
        }
        let (small, large) = (self.code(x / self.small), self.code(x * self.largest));
        if x < self.split { (small, 0.0) } else { (0.0, large) }
    }

    #[inline(always)]
    fn value<const OVERLAP: bool>(self, x: f32) -> f32 {
        let (small, large) = self.codes::<OVERLAP>(x);
        small * self.small + large * self.large
    }
}

vectorized! {
    fn signs(x: &[f32], grid: Signs, out: &mut [f32]) {
        for (value, x) in out.iter_mut().zip(x) {
            *value = grid.value(*x);
        }
    }
}

vectorized! {
    /// Magnitudes of both codes; the code of the negatives is Q less its magnitude.
    fn sign_codes(x: &[f32], grid: Signs, positive: &mut [u8], negative: &mut [u8]) {
        for ((positive, negative), x) in positive.iter_mut().zip(negative).zip(x) {
            let codes = grid.codes(*x);
            *positive = byte(codes.0);
            *negative = byte(codes.1 + grid.half);
        }
    }
}

vectorized! {
    fn apart(x: &[f32], grid: Sizes, out: &mut [f32]) {
        for (value, x) in out.iter_mut().zip(x) {
            *value = grid.value::<false>(*x);
        }
    }
}

vectorized! {
    fn added(x: &[f32], grid: Sizes, out: &mut [f32]) {
        for (value, x) in out.iter_mut().zip(x) {
            *value = grid.value::<true>(*x);
        }
    }
}

vectorized! {
    fn size_codes(x: &[f32], grid: Sizes, small: &mut [u8], large: &mut [u8]) {
        for ((small, large), x) in small.iter_mut().zip(large).zip(x) {
            let codes = if grid.overlap { grid.codes::<true>(*x) } else { grid.codes::<false>(*x) };
            *small = byte(codes.0);
            *large = byte(codes.1);
        }
    }
}

/// x̂ on the grids of both signs.
pub fn quantize_signs(x: &[f32], grid: Signs, out: &mut [f32]) {
    for_rows(out, 1, |first, part| signs(&x[first..first + part.len()], grid, part));
}

/// Codes of both signs: 0..Q − 1, and 0..Q with Q for zero.
pub fn encode_signs(x: &[f32], grid: Signs) -> [Vec<u8>; 2] {
    let (mut positive, mut negative) = (vec![0; x.len()], vec![0; x.len()]);
    sign_codes(x, grid, &mut positive, &mut negative);
    [positive, negative]
}

/// x̂ on the grids of small and large values.
pub fn quantize_sizes(x: &[f32], grid: Sizes, out: &mut [f32]) {
    let pass = if grid.overlap { added } else { apart };
    for_rows(out, 1, |first, part| pass(&x[first..first + part.len()], grid, part));
}

/// Codes of small and large values, 0..=P each.
pub fn encode_sizes(x: &[f32], grid: Sizes) -> [Vec<u8>; 2] {
    let (mut small, mut large) = (vec![0; x.len()], vec![0; x.len()]);
    size_codes(x, grid, &mut small, &mut large);
    [small, large]
}
