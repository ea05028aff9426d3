//! UBB's dynamic grids (token-wise bits): ranges, density counts, ranking and values in two visits.

use super::affine::{
    ColumnGrids, Constants, Grid, encode_columns, encode_rows, quantize_columns, quantize_rows,
};
use super::extent::{self, Extent};
use super::ranking::Rules;
use super::{for_parts, rows_of, share, vectorized};

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

    /// The extent of every token.
    pub fn extents(&self, x: &[f32]) -> Vec<Extent> {
        let parts = match self.along {
            Along::Rows => extent::of_rows(x, self.width),
            Along::Columns => extent::of_columns(x, self.rows, self.width),
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
    fn counts(&self, x: &[f32], windows: &Windows) -> Vec<u32> {
        let per_set = self.tokens_per_set();
        let mut parts = vec![0u32; self.sets.len() * per_set];
        match self.along {
            Along::Rows => for_parts(&mut parts, 1, self.width, |first, part| {
                for (row, count) in part.iter_mut().enumerate() {
                    let (row, token) = (first + row, self.token(first + row));
                    let x = rows_of(x, self.width, row, 1);
                    *count = count_within(x, windows.low[token], windows.high[token]);
                }
            }),
            Along::Columns => {
                let block = self.rows * self.width;
                for_parts(&mut parts, self.width, block, |first, part| {
                    for (index, counts) in part.chunks_exact_mut(self.width).enumerate() {
                        let token = self.sets[first + index] * self.width;
                        let low = &windows.low[token..token + self.width];
                        let high = &windows.high[token..token + self.width];
                        count_columns(rows_of(x, block, first + index, 1), low, high, counts);
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

vectorized! {
    /// Values of a run within a window.
    pub(super) fn count_within(x: &[f32], low: f32, high: f32) -> u32 {
        within(x, low, high)
    }
}

#[inline(always)]
pub(super) fn within(x: &[f32], low: f32, high: f32) -> u32 {
    x.iter().map(|x| u32::from((*x >= low) & (*x < high))).sum()
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
        let extents = layout.extents(x);
        let max_codes = token_codes(x, layout, &extents, rules);
        let grids = extents
            .iter()
            .zip(max_codes)
            .map(|(extent, max_code)| Grid::over(*extent, max_code, constants))
            .collect();
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
        let rows = self.layout.rows * self.layout.sets.len();
        (0..rows).map(|row| self.grids[self.layout.token(row)]).collect()
    }
}

/// Largest code of every token.
fn token_codes(x: &[f32], layout: &Layout, extents: &[Extent], rules: &Rules) -> Vec<f32> {
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
