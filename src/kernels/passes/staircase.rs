//! Functions of one value that rise or fall in few steps: thresholds, and what lies between them.
//!
//! Logarithms, tangents and codebooks all come down to it. The thresholds are found once, so that no
//! element costs a logarithm.

use std::sync::atomic::{AtomicU8, Ordering};

use super::bins::Bins;
use super::{for_rows, rows_of, share, vectorized, vectorized_up_to_avx2};
use crate::kernels::codes::{buffer, recycle};
use crate::kernels::cpu::shuffle::{self, TABLE};

/// Elements whose steps are counted together.
const BLOCK: usize = 64;

/// Thresholds up to which each is compared with every element; more are searched by halving.
const COMPARED: usize = 32;

/// Largest number of thresholds: a count fits a byte.
pub const MAX_STEPS: usize = 255;

/// One more than thresholds.
const MAX_VALUES: usize = MAX_STEPS + 1;

/// What a staircase gives for every number of steps passed.
pub type Values = [f32; MAX_VALUES];

/// The values of a staircase of as many steps, the last repeated.
pub fn values_of(values: &[f32]) -> Values {
    let last = values.last().copied().unwrap_or(0.0);
    std::array::from_fn(|index| values.get(index).copied().unwrap_or(last))
}

/// Which steps a value has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passed {
    /// Thresholds t with x ≥ t; none for NaN.
    AtLeast,
    /// Thresholds t with not t > x; all for NaN.
    NotBelow,
    /// Thresholds t with not t ≥ x; all for NaN.
    Above,
}

impl Passed {
    #[inline(always)]
    #[allow(clippy::neg_cmp_op_on_partial_ord, reason = "NaN passes what is not below it")]
    pub(super) fn has(self, x: f32, threshold: f32) -> bool {
        match self {
            Self::AtLeast => x >= threshold,
            Self::NotBelow => !(threshold > x),
            Self::Above => !(threshold >= x),
        }
    }
}

/// Ascending thresholds, and a value for every number of steps passed.
#[derive(Clone, Debug)]
pub struct Staircase {
    /// At most [`MAX_STEPS`], ascending.
    thresholds: Vec<f32>,
    /// The same with infinities behind them.
    padded: Box<Values>,
    passed: Passed,
    /// Where a table holds them.
    bins: Option<Bins>,
}

impl Staircase {
    /// Steps at the given thresholds; `None` if they do not ascend or are more than 255.
    pub fn new(thresholds: Vec<f32>, passed: Passed) -> Option<Self> {
        if thresholds.len() > MAX_STEPS || !thresholds.is_sorted() {
            return None;
        }
        let mut padded = Box::new([f32::INFINITY; MAX_VALUES]);
        padded[..thresholds.len()].copy_from_slice(&thresholds);
        let bins = Bins::of(&thresholds, passed);
        Some(Self { thresholds, padded, passed, bins })
    }

    /// The thresholds, ascending.
    pub fn thresholds(&self) -> &[f32] {
        &self.thresholds
    }

    /// Which steps a value has passed.
    pub fn passed(&self) -> Passed {
        self.passed
    }

    /// Number of steps.
    pub fn len(&self) -> usize {
        self.thresholds.len()
    }

    /// Whether there are no steps.
    pub fn is_empty(&self) -> bool {
        self.thresholds.is_empty()
    }

    /// Number of steps that each of `x` has passed.
    pub fn count(&self, x: &[f32], out: &mut [u8]) {
        match &self.bins {
            Some(bins) => bins.count(x, &|x, out| self.count_by_comparison(x, out), out),
            None => self.count_by_comparison(x, out),
        }
    }

    fn count_by_comparison(&self, x: &[f32], out: &mut [u8]) {
        let (thresholds, padded) = (&self.thresholds[..], &self.padded);
        match (self.passed, thresholds.len() <= COMPARED) {
            (Passed::AtLeast, true) => at_least::compare(x, thresholds, out),
            (Passed::NotBelow, true) => not_below::compare(x, thresholds, out),
            (Passed::Above, true) => above::compare(x, thresholds, out),
            (Passed::AtLeast, false) => at_least::halve(x, padded, thresholds.len(), out),
            (Passed::NotBelow, false) => not_below::halve(x, padded, thresholds.len(), out),
            (Passed::Above, false) => above::halve(x, padded, thresholds.len(), out),
        }
    }

    /// For every row: x over the row's largest, `values` of the steps passed, times the largest; 0
    /// below the first step.
    pub fn map_rows(&self, x: &[f32], rows: Rows<'_>, values: &Values, out: &mut [f32]) {
        for_rows(out, rows.width, |first, part| {
            let counts = self.counted(part.len(), rows.width, |row, found| {
                let row = first + row;
                let x = rows_of(x, rows.width, row, 1);
                ratios(x, rows.largest[row], rows.least_ratio, found);
            });
            let rows_of_counts = counts.chunks_exact(rows.width);
            let outs = part.chunks_exact_mut(rows.width);
            for (row, (counts, out)) in rows_of_counts.zip(outs).enumerate() {
                look_up_scaled(counts, values, rows.largest[first + row], out);
            }
            recycle(counts);
        });
    }

    /// As [`Staircase::map_rows`], the number of steps passed itself.
    pub fn count_rows(&self, x: &[f32], rows: Rows<'_>) -> Vec<u8> {
        let mut counts = buffer(x.len());
        for_rows(&mut counts, rows.width, |first, part| {
            let found = filled_rows(part.len(), rows.width, |row, found| {
                let row = first + row;
                let x = rows_of(x, rows.width, row, 1);
                ratios(x, rows.largest[row], rows.least_ratio, found);
            });
            self.count(&found, part);
        });
        counts
    }

    /// For every row of `width` elements: `values` of the steps passed by x times the row's factor.
    pub fn map_multiples(
        &self,
        x: &[f32],
        factors: &[f32],
        values: &Values,
        width: usize,
        out: &mut [f32],
    ) {
        for_rows(out, width, |first, part| {
            let counts = self.counted(part.len(), width, |row, found| {
                multiples(rows_of(x, width, first + row, 1), factors[first + row], found);
            });
            look_up(&counts, values, part);
            recycle(counts);
        });
    }

    /// Number of steps passed by x times the row's factor, for every row of `width` elements.
    pub fn count_multiples(&self, x: &[f32], factors: &[f32], width: usize) -> Vec<u8> {
        let mut counts = buffer(x.len());
        for_rows(&mut counts, width, |first, part| {
            let found = filled_rows(part.len(), width, |row, found| {
                multiples(rows_of(x, width, first + row, 1), factors[first + row], found);
            });
            self.count(&found, part);
        });
        counts
    }

    /// Number of steps passed by what `fill` makes of rows.
    fn counted(&self, len: usize, width: usize, fill: impl Fn(usize, &mut [f32])) -> Vec<u8> {
        let mut counts = buffer(len);
        self.count(&filled_rows(len, width, fill), &mut counts);
        counts
    }

    /// Number of steps that each of `x` has passed.
    pub fn count_all(&self, x: &[f32]) -> Vec<u8> {
        let mut counts = buffer(x.len());
        for_rows(&mut counts, 1, |first, part| self.count(&x[first..first + part.len()], part));
        counts
    }

    /// `values` of the steps that each of `x` has passed.
    pub fn map(&self, x: &[f32], values: &Values, out: &mut [f32]) {
        for_rows(out, 1, |first, part| {
            let mut counts = [0; BLOCK];
            for (block, out) in part.chunks_mut(BLOCK).enumerate() {
                let x = &x[first + block * BLOCK..][..out.len()];
                let counts = &mut counts[..out.len()];
                self.count(x, counts);
                look_up(counts, values, out);
            }
        });
    }
}

/// Makes 0 of counts that are more than `distance` below the largest of their row of `width`.
pub fn keep_near_largest(counts: &mut [u8], width: usize, distance: u8) {
    for_rows(counts, width, |_, part| {
        for row in part.chunks_exact_mut(width) {
            let largest = row.iter().fold(0, |largest, count| (*count).max(largest));
            let least = largest.saturating_sub(distance);
            row.iter_mut().for_each(|count| *count = if *count < least { 0 } else { *count });
        }
    });
}

/// What a table gives for every count, none of which is larger than `most`.
pub fn translate(counts: &[u8], most: usize, table: &[u8; MAX_VALUES]) -> Vec<u8> {
    let mut codes = buffer(counts.len());
    let reached = &table[..=most.min(MAX_STEPS)];
    let first = reached.iter().position(|code| *code > 0).unwrap_or(0);
    let last = reached.iter().rposition(|code| *code > 0).unwrap_or(0);
    let mut window = [0; TABLE];
    let is_narrow = last - first < TABLE;
    if is_narrow {
        window[..=last - first].copy_from_slice(&reached[first..=last]);
    }
    for_rows(&mut codes, 1, |from, part| {
        let counts = &counts[from..from + part.len()];
        if is_narrow {
            return shuffle::look_up(counts, (first as u8, &window), part);
        }
        for (code, count) in part.iter_mut().zip(counts) {
            *code = table[usize::from(*count)];
        }
    });
    codes
}

/// Counts that one task looks at.
const LOOK: usize = 1 << 16;

/// The smallest count above 0.
pub fn least_above_zero(counts: &[u8]) -> Option<u8> {
    let least = AtomicU8::new(u8::MAX);
    share(counts.chunks(LOOK), |part| {
        least.fetch_min(least_before(part), Ordering::Relaxed);
    });
    least.into_inner().checked_add(1)
}

vectorized! {
    /// One less than the smallest count above 0; 255 where there is none.
    fn least_before(counts: &[u8]) -> u8 {
        counts.iter().fold(u8::MAX, |least, count| least.min(count.wrapping_sub(1)))
    }
}

/// Rows whose elements are seen relative to the row's largest.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// Elements of a row.
    pub width: usize,
    /// Largest value of every row.
    pub largest: &'a [f32],
    /// Smallest ratio: lower ones count as this.
    pub least_ratio: f32,
}

/// `len` numbers in rows, which `fill` writes. Rows are counted together: one by one, the ends of short
/// ones would cost more than all the rest.
fn filled_rows(len: usize, width: usize, fill: impl Fn(usize, &mut [f32])) -> Vec<f32> {
    let mut numbers = vec![0.0; len];
    for (row, numbers) in numbers.chunks_exact_mut(width).enumerate() {
        fill(row, numbers);
    }
    numbers
}

vectorized! {
    fn ratios(x: &[f32], largest: f32, least: f32, out: &mut [f32]) {
        for (ratio, x) in out.iter_mut().zip(x) {
            *ratio = super::affine::at_least(x / largest, least);
        }
    }
}

vectorized! {
    fn multiples(x: &[f32], factor: f32, out: &mut [f32]) {
        for (multiple, x) in out.iter_mut().zip(x) {
            *multiple = x * factor;
        }
    }
}

vectorized_up_to_avx2! {
    fn look_up(counts: &[u8], values: &Values, out: &mut [f32]) {
        for (value, count) in out.iter_mut().zip(counts) {
            *value = values[usize::from(*count)];
        }
    }
}

vectorized_up_to_avx2! {
    fn look_up_scaled(counts: &[u8], values: &Values, scale: f32, out: &mut [f32]) {
        for (value, count) in out.iter_mut().zip(counts) {
            let scaled = values[usize::from(*count)] * scale;
            *value = if *count == 0 { 0.0 } else { scaled };
        }
    }
}

/// Both ways of counting, for one rule of what is passed.
macro_rules! counting {
    ($name:ident, $passed:expr) => {
        mod $name {
            use super::{BLOCK, Passed, Values, vectorized, vectorized_up_to_avx2};

            vectorized! {
                pub(super) fn compare(x: &[f32], thresholds: &[f32], out: &mut [u8]) {
                    let mut blocks = x.chunks_exact(BLOCK);
                    let mut results = out.chunks_exact_mut(BLOCK);
                    for (x, out) in (&mut blocks).zip(&mut results) {
                        let mut counts = [0i32; BLOCK];
                        for threshold in thresholds {
                            for (count, x) in counts.iter_mut().zip(x) {
                                *count += i32::from($passed.has(*x, *threshold));
                            }
                        }
                        for (out, count) in out.iter_mut().zip(counts) {
                            *out = count as u8;
                        }
                    }
                    for (x, out) in blocks.remainder().iter().zip(results.into_remainder()) {
                        let passed = thresholds.iter().filter(|t| $passed.has(*x, **t));
                        *out = passed.count() as u8;
                    }
                }
            }

            vectorized_up_to_avx2! {
                pub(super) fn halve(x: &[f32], padded: &Values, count: usize, out: &mut [u8]) {
                    let table = (count + 1).next_power_of_two();
                    for (x, out) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK)) {
                        let mut first = [0u32; BLOCK];
                        let mut half = table as u32 / 2;
                        while half > 0 {
                            for (first, x) in first.iter_mut().zip(x) {
                                let at = (*first + half - 1) as usize % padded.len();
                                // Without a branch: nobody can foresee which half it is.
                                *first += half * u32::from($passed.has(*x, padded[at]));
                            }
                            half /= 2;
                        }
                        for (out, first) in out.iter_mut().zip(first) {
                            *out = first.min(count as u32) as u8;
                        }
                    }
                }
            }
        }
    };
}
counting!(at_least, Passed::AtLeast);
counting!(not_below, Passed::NotBelow);
counting!(above, Passed::Above);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_count_is_found_wherever_it_is() {
        let mut counts = vec![0; 2 * LOOK + 3];
        assert_eq!((least_above_zero(&counts), least_above_zero(&[])), (None, None));
        for at in [0, LOOK - 1, LOOK, 2 * LOOK + 2] {
            for count in [255, 9, 1] {
                counts[at] = count;
                assert_eq!(least_above_zero(&counts), Some(count), "{at}");
            }
            counts[at] = 0;
        }
        counts.fill(7);
        counts[LOOK + 1] = 3;
        assert_eq!(least_above_zero(&counts), Some(3));
    }

    #[test]
    fn counts_are_translated_by_narrow_and_by_wide_tables() {
        let counts: Vec<u8> = (0..3000u32).map(|index| (index * 7 % 251) as u8).collect();
        for (first, last) in [(0, 0), (0, 15), (3, 18), (235, 250), (3, 19), (0, 255), (240, 255)] {
            let code = |count: usize| (count * 37 + 5) as u8 | 1;
            let table =
                std::array::from_fn(
                    |count| {
                        if (first..=last).contains(&count) { code(count) } else { 0 }
                    },
                );
            let expected: Vec<u8> = counts.iter().map(|count| table[usize::from(*count)]).collect();
            assert_eq!(translate(&counts, 250, &table), expected, "{first} {last}");
        }
        assert_eq!(translate(&counts, 250, &[0; MAX_VALUES]), vec![0; counts.len()]);
    }

    #[test]
    fn counts_far_below_the_largest_of_their_row_become_zero() {
        let mut counts = [1, 61, 60, 0, 255, 195, 194, 3, 0, 0, 0, 0];
        keep_near_largest(&mut counts, 4, 60);
        assert_eq!(counts, [1, 61, 60, 0, 255, 195, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn every_way_of_counting_gives_the_same() {
        let mut x: Vec<f32> = (0..300).map(|i| (i as f32 * 0.37).sin() * 40.0).collect();
        x.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 3.0]);
        for steps in [0usize, 1, 2, 15, 16, 31, 32, 33, 63, 64, 100, 255] {
            let thresholds: Vec<f32> =
                (0..steps).map(|i| i as f32 * 60.0 / steps as f32 - 30.0).collect();
            for passed in [Passed::AtLeast, Passed::NotBelow, Passed::Above] {
                let stairs = Staircase::new(thresholds.clone(), passed).unwrap();
                let mut counts = vec![0; x.len()];
                stairs.count(&x, &mut counts);
                for (x, count) in x.iter().zip(counts) {
                    let expected = thresholds.iter().filter(|t| passed.has(*x, **t)).count();
                    assert_eq!(usize::from(count), expected, "{x} {steps} {passed:?}");
                }
            }
        }
    }
}
