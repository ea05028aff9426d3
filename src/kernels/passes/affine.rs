//! Affine grids: q = clamp(round(x/δ) + z, 0, L), x̂ = (q − z)·δ.

#![allow(unsafe_code, reason = "registers, and their loads")]

use super::extent::{Extent, extent_of};
use super::{for_rows, rows_of, vectorized};
use crate::kernels::cpu::lanes::{LANES, Lanes, for_lanes, registers};

/// 2^23: from here on, the last bits of a float32 count ones.
pub(super) const COUNTS_ONES: f32 = 8_388_608.0;

/// Smallest scale of a dynamic grid.
const MIN_SCALE: f32 = 1e-8;

/// One affine grid.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Grid {
    /// Step δ.
    pub scale: f32,
    /// Zero point z, an integer unless a static grid has a fractional one.
    pub zero_point: f32,
    /// Largest code L.
    pub max_code: f32,
}

/// Whether a grid over a range without width is the value itself, or the grid of smallest scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Constants {
    /// A single code that decodes to the value.
    Exact,
    /// The smallest scale.
    SmallestScale,
}

/// a unless it is below `least`; NaN stays.
#[inline(always)]
pub(super) fn at_least(a: f32, least: f32) -> f32 {
    if a < least { least } else { a }
}

/// a unless it is above `most`; NaN stays.
#[inline(always)]
pub(super) fn at_most(a: f32, most: f32) -> f32 {
    if a > most { most } else { a }
}

/// The low byte of an integer 0..=255 that is held as a float.
#[inline(always)]
pub(super) fn byte(code: f32) -> u8 {
    (code + COUNTS_ONES).to_bits() as u8
}

impl Grid {
    /// The dynamic grid over an extent: δ = max((hi − lo)/L, 1e-8), z = round(−lo/δ).
    #[inline(always)]
    pub fn over(extent: Extent, max_code: f32, constants: Constants) -> Self {
        let width = extent.high - extent.low;
        let mut scale = at_least(width / max_code, MIN_SCALE);
        if constants == Constants::Exact && width < MIN_SCALE {
            let magnitude = extent.low.abs();
            scale = if magnitude > 0.0 { magnitude } else { 1.0 };
        }
        let zero_point = (-extent.low / scale).round_ties_even();
        Self { scale, zero_point, max_code }
    }

    /// The code of `x`.
    #[inline(always)]
    pub fn code(self, x: f32) -> f32 {
        let code = (x / self.scale).round_ties_even() + self.zero_point;
        at_most(at_least(code, 0.0), self.max_code)
    }

    /// x̂.
    #[inline(always)]
    pub fn value(self, x: f32) -> f32 {
        (self.code(x) - self.zero_point) * self.scale
    }
}

for_lanes!(
    /// x̂ of all of `x` on one grid.
    pub fn quantize, quantize_of, (x: &[f32], grid: Grid, out: &mut [f32])
);

/// Codes are held as the last bits of this number plus a code: 1.5·2^23, to which a sum is rounded to ones.
const HELD: f32 = 12_582_912.0;

/// Largest zero point with which sums are rounded to ones.
const MAX_ZERO_POINT: f32 = 1_048_576.0; // 2^20

/// Scales whose reciprocal is a normal number.
const INVERTIBLE: std::ops::RangeInclusive<f32> = 1e-30..=1e30;

/// How far below and above 1/δ a factor is certain to be on its side of x/δ, relatively: 2^−21. Reciprocal, product
/// and quotient are each rounded by 2^−24 at most.
const MARGIN: f32 = 4.768_371_6e-7;

/// A grid for registers. Divisions take longer than all the rest of a code: two products that have the quotient
/// between them are rounded instead, and only where they differ does it have to be known.
#[derive(Clone, Copy)]
pub(super) struct GridOf<L> {
    grid: Grid,
    below: L,
    above: L,
    zero: L,
    least: L,
    most: L,
}

impl<L: Lanes> GridOf<L> {
    #[inline(always)]
    pub(super) unsafe fn new(grid: Grid) -> Self {
        let Grid { scale, zero_point, max_code } = grid;
        let rounds = zero_point.abs() <= MAX_ZERO_POINT && zero_point.fract() == 0.0;
        // With NaN they always differ.
        let inverse = if rounds && INVERTIBLE.contains(&scale) { 1.0 / scale } else { f32::NAN };
        // SAFETY: the caller has the instruction set.
        unsafe {
            Self {
                grid,
                below: L::splat(inverse * (1.0 - MARGIN)),
                above: L::splat(inverse * (1.0 + MARGIN)),
                zero: L::splat(HELD + zero_point),
                least: L::splat(HELD),
                most: L::splat(HELD + max_code),
            }
        }
    }

    /// Codes as they are held; `None` where a division has to decide.
    #[inline(always)]
    unsafe fn held(self, x: L) -> Option<L> {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let code = x.multiply_add(self.below, self.zero);
            if code.differs(x.multiply_add(self.above, self.zero)) {
                return None;
            }
            Some(self.most.smaller(self.least.larger(code)))
        }
    }

    /// Codes as [`Grid::code`] gives them.
    #[inline(always)]
    unsafe fn divided(self, x: L) -> L {
        let Grid { scale, zero_point, max_code } = self.grid;
        // SAFETY: the caller has the instruction set.
        unsafe {
            let code = x.divide(L::splat(scale)).round().add(L::splat(zero_point));
            L::splat(max_code).smaller(L::splat(0.0).larger(code)) // NaN stays
        }
    }

    /// Codes of 16 values as [`Grid::code`] gives them, or what has the same lowest byte when it is held.
    #[inline(always)]
    pub(super) unsafe fn codes(self, x: L) -> L {
        // SAFETY: the caller has the instruction set.
        unsafe {
            match self.held(x) {
                Some(code) => code.subtract(self.least),
                None => self.divided(x),
            }
        }
    }

    /// Numbers whose lowest bytes are the codes of 16 values.
    #[inline(always)]
    pub(super) unsafe fn bytes(self, x: L) -> L {
        // SAFETY: the caller has the instruction set.
        unsafe {
            match self.held(x) {
                Some(code) => code,
                None => self.divided(x).add(self.least),
            }
        }
    }

    /// x̂ of 16 values as [`Grid::value`] gives them.
    #[inline(always)]
    unsafe fn values(self, x: L) -> L {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let steps = match self.held(x) {
                Some(code) => code.subtract(self.zero),
                None => self.divided(x).subtract(L::splat(self.grid.zero_point)),
            };
            steps.multiply(L::splat(self.grid.scale))
        }
    }
}

#[inline(always)]
unsafe fn quantize_of<L: Lanes>(x: &[f32], grid: Grid, out: &mut [f32]) {
    let (whole, rest) = registers(x.len().min(out.len()));
    // SAFETY: registers are within both; the caller has the instruction set.
    unsafe {
        let grid = GridOf::<L>::new(grid);
        for first in (0..whole).step_by(LANES) {
            grid.values(L::load(x.as_ptr().add(first))).store(out.as_mut_ptr().add(first));
        }
        if rest > 0 {
            let value = grid.values(L::load_first(x.as_ptr().add(whole), rest, 0.0));
            value.store_first(out.as_mut_ptr().add(whole), rest);
        }
    }
}

for_lanes!(
    /// Codes of all of `x` on one grid, as bytes.
    pub fn encode, encode_of, (x: &[f32], grid: Grid, out: &mut [u8])
);

/// Writes the lowest bytes of what `$code` makes of 16 values of a slice at a time. It is no closure: that would
/// not be compiled for the instruction set.
macro_rules! encode_registers {
    ($lanes:ident, $from:ident, $out:ident, |$x:ident| $code:expr) => {{
        use $crate::kernels::cpu::lanes::{LANES, registers};
        let (whole, rest) = registers($from.len().min($out.len()));
        for first in (0..whole).step_by(LANES) {
            let $x = $lanes::load($from.as_ptr().add(first));
            $code.store_bytes($out.as_mut_ptr().add(first));
        }
        if rest > 0 {
            let $x = $lanes::load_first($from.as_ptr().add(whole), rest, 0.0);
            $code.store_first_bytes($out.as_mut_ptr().add(whole), rest);
        }
    }};
}
pub(super) use encode_registers;

#[inline(always)]
unsafe fn encode_of<L: Lanes>(x: &[f32], grid: Grid, out: &mut [u8]) {
    // SAFETY: registers are within both; the caller has the instruction set.
    unsafe {
        let grid = GridOf::<L>::new(grid);
        encode_registers!(L, x, out, |x| grid.bytes(x));
    }
}

for_lanes!(
    fn quantize_runs, quantize_runs_of, (x: &[f32], grids: &[Grid], width: usize, out: &mut [f32])
);

#[inline(always)]
unsafe fn quantize_runs_of<L: Lanes>(x: &[f32], grids: &[Grid], width: usize, out: &mut [f32]) {
    for ((x, out), grid) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(grids) {
        // SAFETY: the caller has the instruction set.
        unsafe { quantize_of::<L>(x, *grid, out) };
    }
}

for_lanes!(
    fn encode_runs, encode_runs_of, (x: &[f32], grids: &[Grid], width: usize, out: &mut [u8])
);

#[inline(always)]
unsafe fn encode_runs_of<L: Lanes>(x: &[f32], grids: &[Grid], width: usize, out: &mut [u8]) {
    for ((x, out), grid) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(grids) {
        // SAFETY: the caller has the instruction set.
        unsafe { encode_of::<L>(x, *grid, out) };
    }
}

/// x̂ on one grid for the whole of `x`.
pub fn quantize_whole(x: &[f32], grid: Grid, out: &mut [f32]) {
    for_rows(out, 1, |first, part| quantize(&x[first..first + part.len()], grid, part));
}

/// Codes on one grid for the whole of `x`, as bytes.
pub fn encode_whole(x: &[f32], grid: Grid, out: &mut [u8]) {
    for_rows(out, 1, |first, part| encode(&x[first..first + part.len()], grid, part));
}

/// x̂ on a grid for every run of `width` elements.
pub fn quantize_rows(x: &[f32], grids: &[Grid], width: usize, out: &mut [f32]) {
    for_rows(out, width, |first, part| {
        let rows = part.len() / width;
        quantize_runs(rows_of(x, width, first, rows), &grids[first..first + rows], width, part);
    });
}

/// Codes on a grid for every run of `width` elements, as bytes.
pub fn encode_rows(x: &[f32], grids: &[Grid], width: usize, out: &mut [u8]) {
    for_rows(out, width, |first, part| {
        let rows = part.len() / width;
        encode_runs(rows_of(x, width, first, rows), &grids[first..first + rows], width, part);
    });
}

vectorized! {
    /// Multiplies all of `values` by a factor.
    pub fn scale(values: &mut [f32], factor: f32) {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

vectorized! {
    fn scale_runs(scales: &[f32], width: usize, out: &mut [f32]) {
        for (run, scale) in out.chunks_exact_mut(width).zip(scales) {
            for value in run {
                *value *= scale;
            }
        }
    }
}

/// Multiplies every run of `width` elements by its scale.
pub fn scale_rows(scales: &[f32], width: usize, out: &mut [f32]) {
    for_rows(out, width, |first, part| scale_runs(&scales[first..], width, part));
}

/// The grids of columns.
#[derive(Clone, Debug, Default)]
pub struct ColumnGrids {
    /// δ of every column.
    pub scale: Vec<f32>,
    /// z of every column.
    pub zero_point: Vec<f32>,
    /// L of every column.
    pub max_code: Vec<f32>,
}

impl FromIterator<Grid> for ColumnGrids {
    fn from_iter<I: IntoIterator<Item = Grid>>(grids: I) -> Self {
        let mut columns = Self::default();
        for grid in grids {
            columns.scale.push(grid.scale);
            columns.zero_point.push(grid.zero_point);
            columns.max_code.push(grid.max_code);
        }
        columns
    }
}

impl ColumnGrids {
    fn columns(&self, first: usize, width: usize) -> [&[f32]; 3] {
        let range = first..first + width;
        [&self.scale[range.clone()], &self.zero_point[range.clone()], &self.max_code[range]]
    }
}

vectorized! {
    fn quantize_columns_of_row(x: &[f32], grids: [&[f32]; 3], out: &mut [f32]) {
        let [scale, zero_point, max_code] = grids;
        let grids = scale.iter().zip(zero_point).zip(max_code);
        for ((value, x), ((scale, zero_point), max_code)) in out.iter_mut().zip(x).zip(grids) {
            let grid = Grid { scale: *scale, zero_point: *zero_point, max_code: *max_code };
            *value = grid.value(*x);
        }
    }
}

vectorized! {
    fn encode_columns_of_row(x: &[f32], grids: [&[f32]; 3], out: &mut [u8]) {
        let [scale, zero_point, max_code] = grids;
        let grids = scale.iter().zip(zero_point).zip(max_code);
        for ((code, x), ((scale, zero_point), max_code)) in out.iter_mut().zip(x).zip(grids) {
            let grid = Grid { scale: *scale, zero_point: *zero_point, max_code: *max_code };
            *code = byte(grid.code(*x));
        }
    }
}

/// x̂ of rows of `width` elements on a grid for every column; `set_of_row` says which run of `width`
/// column grids a row has.
pub fn quantize_columns(
    x: &[f32],
    grids: &ColumnGrids,
    width: usize,
    set_of_row: impl Fn(usize) -> usize + Sync,
    out: &mut [f32],
) {
    for_rows(out, width, |first, part| {
        for (row, out) in part.chunks_exact_mut(width).enumerate() {
            let row = first + row;
            let grids = grids.columns(set_of_row(row) * width, width);
            quantize_columns_of_row(rows_of(x, width, row, 1), grids, out);
        }
    });
}

/// Codes of rows of `width` elements, as [`quantize_columns`].
pub fn encode_columns(
    x: &[f32],
    grids: &ColumnGrids,
    width: usize,
    set_of_row: impl Fn(usize) -> usize + Sync,
    out: &mut [u8],
) {
    for_rows(out, width, |first, part| {
        for (row, out) in part.chunks_exact_mut(width).enumerate() {
            let row = first + row;
            let grids = grids.columns(set_of_row(row) * width, width);
            encode_columns_of_row(rows_of(x, width, row, 1), grids, out);
        }
    });
}

for_lanes!(
    /// Every run of `width` elements on the dynamic grid over its own extent, in one visit.
    fn quantize_dynamic_runs, quantize_dynamic_runs_of,
    (x: &[f32], max_code: f32, width: usize, out: &mut [f32])
);

#[inline(always)]
unsafe fn quantize_dynamic_runs_of<L: Lanes>(
    x: &[f32],
    max_code: f32,
    width: usize,
    out: &mut [f32],
) {
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        // SAFETY: the caller has the instruction set.
        unsafe {
            let grid = Grid::over(extent_of::<L>(x), max_code, Constants::Exact);
            quantize_of::<L>(x, grid, out);
        }
    }
}

/// x̂ of every run of `width` elements on the dynamic grid over its own extent; constant runs exact.
pub fn quantize_dynamic(x: &[f32], max_code: f32, width: usize, out: &mut [f32]) {
    for_rows(out, width, |first, part| {
        let rows = part.len() / width;
        quantize_dynamic_runs(rows_of(x, width, first, rows), max_code, width, part);
    });
}

vectorized! {
    /// The grid over every extent, up to the largest code beside it.
    pub(super) fn grids_over(extents: &[Extent], max_codes: &[f32], constants: Constants, out: &mut [Grid]) {
        for ((grid, extent), max_code) in out.iter_mut().zip(extents).zip(max_codes) {
            *grid = Grid::over(*extent, *max_code, constants);
        }
    }
}

/// The dynamic grid of every run of `width` elements.
pub fn dynamic_grids(x: &[f32], max_code: f32, width: usize) -> Vec<Grid> {
    let grid = |extent: &Extent| Grid::over(*extent, max_code, Constants::Exact);
    super::extent::of_rows(x, width).iter().map(grid).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::lanes::Plain;

    /// Codes and values by registers.
    unsafe fn found<L: Lanes>(x: &[f32], grid: Grid) -> (Vec<u8>, Vec<u32>) {
        let (mut codes, mut values) = (vec![99; x.len()], vec![99.0; x.len()]);
        // SAFETY: the caller has the instruction set.
        unsafe {
            encode_of::<L>(x, grid, &mut codes);
            quantize_of::<L>(x, grid, &mut values);
        }
        (codes, values.into_iter().map(f32::to_bits).collect())
    }

    #[test]
    fn registers_give_the_bits_of_single_values() {
        let mut x: Vec<f32> = (0..83).map(|i| (i as f32 * 0.37).sin() * 6.0).collect();
        // Between two codes, at and beyond both ends.
        x.extend([0.05, 0.15, -0.25, 0.0, -0.0, 1e30, -1e30, f32::INFINITY, f32::NEG_INFINITY]);
        for (zero_point, max_code) in [(0.0, 15.0), (7.0, 15.0), (131.0, 255.0), (-3.0, 7.0)] {
            let grid = Grid { scale: 0.1, zero_point, max_code };
            for len in [0, 1, 15, 16, 49, x.len()] {
                let x = &x[..len];
                let codes: Vec<u8> = x.iter().map(|x| byte(grid.code(*x))).collect();
                let values: Vec<u32> = x.iter().map(|x| grid.value(*x).to_bits()).collect();
                let expected = (codes, values);
                // SAFETY: plain code is always available, the others were asked for.
                unsafe {
                    assert_eq!(found::<Plain>(x, grid), expected);
                    #[cfg(target_arch = "x86_64")]
                    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                        use crate::kernels::cpu::lanes::Avx2;
                        assert_eq!(found::<Avx2>(x, grid), expected);
                    }
                    #[cfg(target_arch = "x86_64")]
                    if crate::kernels::cpu::has_avx512() {
                        use crate::kernels::cpu::lanes::Avx512;
                        assert_eq!(found::<Avx512>(x, grid), expected);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let grid = Grid { scale: 0.1, zero_point: 3.0, max_code: 15.0 };
        let mut values = [0.0; 19];
        quantize(&[f32::NAN; 19], grid, &mut values);
        assert!(values.iter().all(|value| value.is_nan()));
    }
}
