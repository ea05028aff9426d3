//! UBB's dynamic grids (token-wise bits): ranges, density counts, ranking and values in two visits.

#![allow(unsafe_code, reason = "registers, and their loads")]

use std::iter;

use super::affine::{
    ColumnGrids, Constants, Grid, encode_columns, encode_rows, grids_over, quantize_columns,
    quantize_rows,
};
use super::extent::{self, Extent};
use super::ranking::Rules;
use super::{Strided, for_parts, rows_of, share, vectorized};
use crate::kernels::cpu::lanes::{LANES, Lanes, for_lanes, registers};

/// Where an operand's tokens are: blocks (a head of a window) of `rows` rows of `width` elements.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Elements of a row.
    pub width: usize,
    /// Rows of a block.
    pub rows: usize,
    /// Which set of tokens each block has; blocks may share one.
    pub sets: Vec<usize>,
    /// Number of sets.
    pub set_count: usize,
    /// Tokens of an image, which are ranked among themselves.
    pub tokens_per_image: usize,
    /// Whether a set's tokens are the rows or the columns of its blocks.
    pub along: Along,
}

/// What of a block is a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Along {
    /// Its rows.
    Rows,
    /// Its columns.
    Columns,
}

impl Layout {
    fn tokens_per_set(&self) -> usize {
        match self.along {
            Along::Rows => self.rows,
            Along::Columns => self.width,
        }
    }

    /// Values of a token.
    pub fn features(&self) -> usize {
        let tokens = self.set_count * self.tokens_per_set();
        (self.sets.len() * self.rows * self.width).checked_div(tokens).unwrap_or(0)
    }

    /// The token of a row (of a row's first column, where columns are tokens).
    pub fn token(&self, row: usize) -> usize {
        let set = self.sets[row / self.rows];
        match self.along {
            Along::Rows => set * self.rows + row % self.rows,
            Along::Columns => set * self.width,
        }
    }

    /// What each row has of its token (of its first column's, where columns are tokens).
    pub fn of_rows<T: Copy>(&self, tokens: &[T]) -> Vec<T> {
        let mut rows = Vec::with_capacity(self.sets.len() * self.rows);
        for set in &self.sets {
            match self.along {
                Along::Rows => rows.extend_from_slice(&tokens[set * self.rows..][..self.rows]),
                Along::Columns => rows.extend(iter::repeat_n(tokens[set * self.width], self.rows)),
            }
        }
        rows
    }

    /// The extent of every token; where columns are tokens, rows have to follow each other.
    pub fn extents(&self, x: Strided<'_>) -> Vec<Extent> {
        let parts = match self.along {
            Along::Rows => extent::of_strided_rows(x, self.sets.len() * self.rows),
            Along::Columns => extent::of_columns(x.values, self.rows, self.width),
        };
        let mut tokens = vec![Extent::EMPTY; self.set_count * self.tokens_per_set()];
        for (parts, set) in parts.chunks(self.tokens_per_set()).zip(&self.sets) {
            let tokens = &mut tokens[set * parts.len()..][..parts.len()];
            for (token, part) in tokens.iter_mut().zip(parts) {
                *token = token.merge(*part);
            }
        }
        tokens
    }

    /// How many values of each token are in its window.
    fn counts(&self, x: Strided<'_>, windows: &Windows) -> Vec<u32> {
        let per_set = self.tokens_per_set();
        let mut parts = vec![0u32; self.sets.len() * per_set];
        match self.along {
            Along::Rows => for_parts(&mut parts, 1, self.width, |first, part| {
                for (row, count) in part.iter_mut().enumerate() {
                    let (row, token) = (first + row, self.token(first + row));
                    *count = count_within(x.row(row), windows.low[token], windows.high[token]);
                }
            }),
            Along::Columns => {
                let block = self.rows * self.width;
                for_parts(&mut parts, self.width, block, |first, part| {
                    for (index, counts) in part.chunks_exact_mut(self.width).enumerate() {
                        let token = self.sets[first + index] * self.width;
                        let low = &windows.low[token..token + self.width];
                        let high = &windows.high[token..token + self.width];
                        let x = rows_of(x.values, block, first + index, 1);
                        count_columns(x, low, high, counts);
                    }
                });
            }
        }
        let mut tokens = vec![0; self.set_count * per_set];
        for (parts, set) in parts.chunks(per_set).zip(&self.sets) {
            for (token, part) in tokens[set * per_set..][..per_set].iter_mut().zip(parts) {
                *token += part;
            }
        }
        tokens
    }
}

/// The windows of a density count, of every token.
struct Windows {
    low: Vec<f32>,
    high: Vec<f32>,
}

for_lanes!(
    /// Values of a run within a window.
    pub(super) fn count_within, within_of, (x: &[f32], low: f32, high: f32) -> u32
);

#[inline(always)]
pub(super) unsafe fn within_of<L: Lanes>(x: &[f32], low: f32, high: f32) -> u32 {
    let (whole, rest) = registers(x.len());
    // SAFETY: registers are within the values; the caller has the instruction set.
    unsafe {
        // Exact: each lane counts up to 2^24.
        let (low, high, mut counts) = (L::splat(low), L::splat(high), L::splat(0.0));
        for first in (0..whole).step_by(LANES) {
            counts = L::load(x.as_ptr().add(first)).count_between(low, high, counts);
        }
        if rest > 0 {
            let last = L::load_first(x.as_ptr().add(whole), rest, f32::NAN);
            counts = last.count_between(low, high, counts);
        }
        counts.sum() as u32
    }
}

vectorized! {
    fn count_columns(x: &[f32], low: &[f32], high: &[f32], counts: &mut [u32]) {
        for row in x.chunks_exact(counts.len()) {
            let windows = low.iter().zip(high);
            for ((count, x), (low, high)) in counts.iter_mut().zip(row).zip(windows) {
                *count += u32::from((*x >= *low) & (*x < *high));
            }
        }
    }
}

/// An operand with the grid of every token.
#[derive(Debug)]
pub struct TokenGrids<'a> {
    /// Where the tokens are.
    pub layout: &'a Layout,
    /// Grids by token.
    pub grids: Vec<Grid>,
}

impl<'a> TokenGrids<'a> {
    /// Ranks the tokens of `x` and makes their grids.
    pub fn new(x: &[f32], layout: &'a Layout, rules: &Rules, constants: Constants) -> Self {
        Self::of(Strided::dense(x, layout.width), layout, rules, constants)
    }

    /// The same for rows that need not follow each other, if they are tokens.
    pub fn of(x: Strided<'_>, layout: &'a Layout, rules: &Rules, constants: Constants) -> Self {
        let extents = layout.extents(x);
        let max_codes = token_codes(x, layout, &extents, rules);
        let mut grids = vec![Grid::default(); extents.len()];
        grids_over(&extents, &max_codes, constants, &mut grids);
        Self { layout, grids }
    }

    /// x̂.
    pub fn quantize(&self, x: &[f32], out: &mut [f32]) {
        let layout = self.layout;
        match layout.along {
            Along::Rows => quantize_rows(x, &self.row_grids(), layout.width, out),
            Along::Columns => {
                let grids = self.grids.iter().copied().collect::<ColumnGrids>();
                let set = |row: usize| layout.sets[row / layout.rows];
                quantize_columns(x, &grids, layout.width, set, out);
            }
        }
    }

    /// Codes as bytes.
    pub fn encode(&self, x: &[f32], out: &mut [u8]) {
        let layout = self.layout;
        match layout.along {
            Along::Rows => encode_rows(x, &self.row_grids(), layout.width, out),
            Along::Columns => {
                let grids = self.grids.iter().copied().collect::<ColumnGrids>();
                let set = |row: usize| layout.sets[row / layout.rows];
                encode_columns(x, &grids, layout.width, set, out);
            }
        }
    }

    /// The grid of every row.
    pub fn row_grids(&self) -> Vec<Grid> {
        self.layout.of_rows(&self.grids)
    }
}

/// Largest code of every token.
fn token_codes(x: Strided<'_>, layout: &Layout, extents: &[Extent], rules: &Rules) -> Vec<f32> {
    let tokens = layout.tokens_per_image;
    let ranges = ranges(extents, tokens, rules);
    let counts = match rules.density {
        Some(density) if rules.counts() => {
            let (low, high) = ranges.iter().map(|range| density.window(*range)).unzip();
            layout.counts(x, &Windows { low, high })
        }
        _ => vec![0; ranges.len()],
    };
    allocate(&ranges, &counts, tokens, rules)
}

/// Ranges for the ranking, the first of an image enlarged.
fn ranges(extents: &[Extent], tokens: usize, rules: &Rules) -> Vec<f32> {
    let enlarge = |index: usize, range: f32| {
        if index.is_multiple_of(tokens) { range * rules.first_factor } else { range }
    };
    let range = |(index, extent): (usize, &Extent)| enlarge(index, extent.high - extent.low);
    extents.iter().enumerate().map(range).collect()
}

/// Largest code of every token, image by image.
pub(super) fn allocate(ranges: &[f32], counts: &[u32], tokens: usize, rules: &Rules) -> Vec<f32> {
    let mut max_codes = vec![0.0; ranges.len()];
    let tokens = tokens.max(1);
    let images = ranges.chunks(tokens).zip(counts.chunks(tokens));
    share(max_codes.chunks_mut(tokens).zip(images), |(out, (ranges, counts))| {
        rules.max_codes(ranges, counts, out);
    });
    max_codes
}
