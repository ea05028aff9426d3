//! Smallest and largest values, of rows, of groups within rows, and of columns.

#![allow(unsafe_code, reason = "registers, and their loads")]

use super::{Strided, for_parts, rows_of, vectorized};
use crate::kernels::cpu::lanes::{LANES, Lanes, for_lanes, registers};

/// Smallest and largest value; both NaN where a value is NaN.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Extent {
    /// Smallest value.
    pub low: f32,
    /// Largest value.
    pub high: f32,
}

impl Extent {
    /// The extent of nothing.
    pub const EMPTY: Self = Self { low: f32::INFINITY, high: f32::NEG_INFINITY };

    /// The extent of both.
    #[inline(always)]
    pub fn merge(self, other: Self) -> Self {
        Self { low: least(self.low, other.low), high: largest(self.high, other.high) }
    }
}

/// The smaller, NaN if one is.
#[inline(always)]
fn least(a: f32, b: f32) -> f32 {
    if a < b || a.is_nan() { a } else { b }
}

/// The larger, NaN if one is.
#[inline(always)]
fn largest(a: f32, b: f32) -> f32 {
    if a > b || a.is_nan() { a } else { b }
}

for_lanes!(
    /// The extent of `x`.
    pub fn extent, extent_of, (x: &[f32]) -> Extent
);

/// The body of [`extent`], for other functions of registers.
#[inline(always)]
pub(super) unsafe fn extent_of<L: Lanes>(x: &[f32]) -> Extent {
    let (whole, rest) = registers(x.len());
    let from = x.as_ptr();
    // SAFETY: registers are within the values; the caller has the instruction set.
    unsafe {
        let (mut low, mut high) = (L::splat(f32::INFINITY), L::splat(f32::NEG_INFINITY));
        let mut nan = false;
        for first in (0..whole).step_by(LANES) {
            let x = L::load(from.add(first));
            (low, high, nan) = (x.smaller(low), x.larger(high), nan | x.has_nan());
        }
        if let Some(&one) = x.get(whole) {
            let x = L::load_first(from.add(whole), rest, one);
            (low, high, nan) = (x.smaller(low), x.larger(high), nan | x.has_nan());
        }
        if nan {
            return Extent { low: f32::NAN, high: f32::NAN };
        }
        Extent { low: low.smallest(), high: high.largest() }
    }
}

for_lanes!(
    /// The extent of every run of `width` elements.
    fn extents, extents_of, (x: &[f32], width: usize, out: &mut [Extent])
);

#[inline(always)]
unsafe fn extents_of<L: Lanes>(x: &[f32], width: usize, out: &mut [Extent]) {
    for (run, found) in x.chunks_exact(width).zip(out) {
        // SAFETY: the caller has the instruction set.
        *found = unsafe { extent_of::<L>(run) };
    }
}

/// The extent of every row (or group of a row) of `width` elements.
pub fn of_rows(x: &[f32], width: usize) -> Vec<Extent> {
    let mut found = vec![Extent::EMPTY; x.len() / width.max(1)];
    for_parts(&mut found, 1, width, |first, part| {
        extents(rows_of(x, width, first, part.len()), width, part);
    });
    found
}

/// The extent of each of `count` rows.
pub fn of_strided_rows(rows: Strided<'_>, count: usize) -> Vec<Extent> {
    if rows.stride == rows.width {
        return of_rows(&rows.values[..count * rows.width], rows.width);
    }
    let mut found = vec![Extent::EMPTY; count];
    for_parts(&mut found, 1, rows.width, |first, part| {
        for (index, found) in part.iter_mut().enumerate() {
            *found = extent(rows.row(first + index));
        }
    });
    found
}

/// Columns seen at once: their extremes stay in registers.
const STRIP: usize = 2 * LANES;

/// Rows of a block that one task looks at.
const STRIP_ROWS: usize = 64;

vectorized! {
    /// The extent of every column of rows that are as wide as `found`.
    fn columns(x: &[f32], found: &mut [Extent]) {
        let width = found.len();
        for (strip, found) in found.chunks_mut(STRIP).enumerate() {
            let mut low = [f32::INFINITY; STRIP];
            let mut high = [f32::NEG_INFINITY; STRIP];
            let mut nan = [0u32; STRIP];
            let count = found.len();
            for row in x.chunks_exact(width) {
                let row = &row[strip * STRIP..];
                if let Some(row) = row.first_chunk::<STRIP>() {
                    for lane in 0..STRIP {
                        note(row[lane], &mut low[lane], &mut high[lane], &mut nan[lane]);
                    }
                } else {
                    for (lane, value) in row[..count].iter().enumerate() {
                        note(*value, &mut low[lane], &mut high[lane], &mut nan[lane]);
                    }
                }
            }
            for (lane, found) in found.iter_mut().enumerate() {
                *found = match nan[lane] {
                    0 => Extent { low: low[lane], high: high[lane] },
                    _ => Extent { low: f32::NAN, high: f32::NAN },
                };
            }
        }
    }
}

#[inline(always)]
fn note(value: f32, low: &mut f32, high: &mut f32, nan: &mut u32) {
    *low = if value < *low { value } else { *low };
    *high = if value > *high { value } else { *high };
    *nan |= u32::from(value.is_nan());
}

/// The extent of every column of each block of `rows` rows of `width` elements, [blocks · width].
pub fn of_columns(x: &[f32], rows: usize, width: usize) -> Vec<Extent> {
    if width == 0 || rows == 0 {
        return Vec::new();
    }
    let (blocks, strips) = (x.len() / (rows * width), rows.div_ceil(STRIP_ROWS));
    let mut parts = vec![Extent::EMPTY; blocks * strips * width];
    for_parts(&mut parts, width, rows.min(STRIP_ROWS) * width, |first, parts| {
        for (index, found) in parts.chunks_exact_mut(width).enumerate() {
            let (block, strip) = ((first + index) / strips, (first + index) % strips);
            let start = strip * STRIP_ROWS;
            let height = STRIP_ROWS.min(rows - start);
            columns(rows_of(x, width, block * rows + start, height), found);
        }
    });
    if strips == 1 {
        return parts;
    }
    let mut found = vec![Extent::EMPTY; blocks * width];
    for (block, parts) in found.chunks_exact_mut(width).zip(parts.chunks_exact(strips * width)) {
        for part in parts.chunks_exact(width) {
            for (found, part) in block.iter_mut().zip(part) {
                *found = found.merge(*part);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(x: &[f32]) -> Extent {
        x.iter().fold(Extent::EMPTY, |found, v| found.merge(Extent { low: *v, high: *v }))
    }

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + 13) % 1009) as f32 - 500.0).collect()
    }

    #[test]
    fn odd_lengths_and_nan() {
        for count in [1, 2, 3, 4, 7, 12, 15, 16, 31, 32, 33, 64, 100, 197] {
            let mut x = values(count);
            assert_eq!(extent(&x), plain(&x));
            for at in [0, count / 2, count - 1] {
                let kept = std::mem::replace(&mut x[at], f32::NAN);
                let found = extent(&x);
                assert!(found.low.is_nan() && found.high.is_nan(), "{count} {at}");
                x[at] = f32::INFINITY;
                assert_eq!(extent(&x).high, f32::INFINITY);
                x[at] = kept;
            }
        }
    }

    #[test]
    fn rows_and_columns() {
        for (blocks, rows, width) in [(5, 41, 192), (3, 197, 33), (1, 64, 7), (2, 65, 64)] {
            rows_and_columns_of(blocks, rows, width);
        }
    }

    fn rows_and_columns_of(blocks: usize, rows: usize, width: usize) {
        let mut x = values(blocks * rows * width);
        x[width * 3 + 5] = f32::NAN;
        let by_row = of_rows(&x, width);
        for (row, found) in x.chunks(width).zip(&by_row) {
            assert!(*found == plain(row) || found.low.is_nan() && plain(row).low.is_nan());
        }
        let by_column = of_columns(&x, rows, width);
        for (index, found) in by_column.iter().enumerate() {
            let (block, column) = (index / width, index % width);
            let all: Vec<f32> =
                (0..rows).map(|row| x[(block * rows + row) * width + column]).collect();
            assert!(*found == plain(&all) || found.low.is_nan() && plain(&all).low.is_nan());
        }
    }
}
