//! UBB's dynamic grids (token-wise bits): ranges, density counts, ranking and values in two visits.

use rayon::prelude::*;

use super::affine::{
    self, ColumnGrids, Constants, Grid, encode_columns, encode_rows, quantize_columns,
    quantize_rows,
};
use super::extent::{self, Extent};
use super::ranking::Rules;
use super::{PARALLEL_ELEMENTS, PIECE_ELEMENTS, for_parts, for_rows, rows_of, vectorized};

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
    fn count_within(x: &[f32], low: f32, high: f32) -> u32 {
        within(x, low, high)
    }
}

#[inline(always)]
fn within(x: &[f32], low: f32, high: f32) -> u32 {
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
        if index % tokens == 0 { range * rules.first_factor } else { range }
    };
    let range = |(index, extent): (usize, &Extent)| enlarge(index, extent.high - extent.low);
    extents.iter().enumerate().map(range).collect()
}

fn allocate(ranges: &[f32], counts: &[u32], tokens: usize, rules: &Rules) -> Vec<f32> {
    let mut max_codes = vec![0.0; ranges.len()];
    let tokens = tokens.max(1);
    max_codes
        .par_chunks_mut(tokens)
        .zip(ranges.par_chunks(tokens).zip(counts.par_chunks(tokens)))
        .for_each(|(out, (ranges, counts))| rules.max_codes(ranges, counts, out));
    max_codes
}

/// A linear input [images · tokens, channels], each token in groups of channels.
#[derive(Clone, Copy, Debug)]
pub struct Grouped {
    /// Channels of a token.
    pub channels: usize,
    /// Channels of a group.
    pub group: usize,
    /// Tokens of an image.
    pub tokens: usize,
}

/// What the first visit to a token finds.
#[derive(Clone, Copy, Debug, Default)]
struct TokenFacts {
    /// For the ranking.
    range: f32,
    /// Values in the window.
    count: u32,
}

/// A linear input with the grid, and perhaps the stretch of negatives, of every group.
#[derive(Debug)]
pub struct GroupGrids {
    shape: Grouped,
    /// Grids by token and group.
    pub grids: Vec<Grid>,
    /// 2^s by which negatives are stretched, by token and group.
    pub stretches: Option<Vec<f32>>,
}

/// The post-GELU shift.
#[derive(Clone, Copy, Debug)]
pub struct Shift<'a> {
    /// −τ.
    pub factor: f32,
    /// Ratios from which on the exponent is 1, 2, …
    pub steps: &'a [f32],
}

impl Shift<'_> {
    /// 2^s of a group.
    #[inline(always)]
    pub fn stretch(&self, extent: Extent) -> f32 {
        if !(extent.low < 0.0 && extent.high > 0.0) {
            return 1.0;
        }
        let ratio = affine::at_least(extent.high / extent.low * self.factor, 1.0);
        if ratio.is_nan() {
            return ratio;
        }
        let exponent = self.steps.iter().take_while(|step| ratio >= **step).count();
        (1u32 << exponent) as f32
    }
}

impl GroupGrids {
    /// Ranks the tokens of `x` and makes the grids of their groups.
    pub fn new(
        x: &[f32],
        shape: Grouped,
        rules: &Rules,
        (constants, shift): (Constants, Option<Shift<'_>>),
    ) -> Self {
        let (extents, facts) = survey(x, shape, rules);
        let ranges: Vec<f32> = facts.iter().map(|facts| facts.range).collect();
        let counts: Vec<u32> = facts.iter().map(|facts| facts.count).collect();
        let max_codes = allocate(&ranges, &counts, shape.tokens, rules);
        let per_token = shape.channels / shape.group;
        let stretches: Option<Vec<f32>> =
            shift.map(|shift| extents.iter().map(|extent| shift.stretch(*extent)).collect());
        let grid = |(index, extent): (usize, &Extent)| {
            let stretch = stretches.as_ref().map(|stretches| stretches[index]);
            grid_of(*extent, stretch, max_codes[index / per_token], constants)
        };
        let grids = extents.iter().enumerate().map(grid).collect();
        Self { shape, grids, stretches }
    }

    /// x̂.
    pub fn quantize(&self, x: &[f32], out: &mut [f32]) {
        let group = self.shape.group;
        let Some(stretches) = &self.stretches else {
            return quantize_rows(x, &self.grids, group, out);
        };
        for_rows(out, group, |first, part| {
            for (row, out) in part.chunks_exact_mut(group).enumerate() {
                let row = first + row;
                let x = rows_of(x, group, row, 1);
                quantize_stretched(x, self.grids[row], stretches[row], out);
            }
        });
    }

    /// Codes as bytes, without a stretch.
    pub fn encode(&self, x: &[f32]) -> Vec<u8> {
        let mut codes = vec![0; x.len()];
        encode_rows(x, &self.grids, self.shape.group, &mut codes);
        codes
    }

    /// Codes of both signs as bytes, each equal to that sign's [`zero_points`] for values of the other.
    pub fn encode_signs(&self, x: &[f32], stretches: &[f32]) -> [Vec<u8>; 2] {
        let group = self.shape.group;
        let encode = |positive: bool| {
            let mut codes = vec![0; x.len()];
            for_rows(&mut codes, group, |first, part| {
                for (row, out) in part.chunks_exact_mut(group).enumerate() {
                    let row = first + row;
                    let (grid, zeros) = (self.grids[row], zero_points(self.grids[row]));
                    let bounds = if positive { (zeros[0], grid.max_code) } else { (0.0, zeros[1]) };
                    let x = rows_of(x, group, row, 1);
                    encode_stretched(x, grid, (stretches[row], bounds), out);
                }
            });
            codes
        };
        [encode(true), encode(false)]
    }
}

/// The grid of a group whose negatives are stretched.
#[inline(always)]
pub(super) fn grid_of(
    extent: Extent,
    stretch: Option<f32>,
    max_code: f32,
    constants: Constants,
) -> Grid {
    let low = stretch.map_or(extent.low, |stretch| extent.low * stretch);
    Grid::over(Extent { low, ..extent }, max_code, constants)
}

/// x̂ of a value on the grid of stretched negatives.
#[inline(always)]
pub(super) fn stretched_value(x: f32, grid: Grid, stretch: f32) -> f32 {
    let negative = x < 0.0;
    let value = grid.value(if negative { x * stretch } else { x });
    if negative { value / stretch } else { value }
}

vectorized! {
    fn quantize_stretched(x: &[f32], grid: Grid, stretch: f32, out: &mut [f32]) {
        for (value, x) in out.iter_mut().zip(x) {
            *value = stretched_value(*x, grid, stretch);
        }
    }
}

vectorized! {
    fn encode_stretched(x: &[f32], grid: Grid, stretched: (f32, (f32, f32)), out: &mut [u8]) {
        let (stretch, (least, most)) = stretched;
        for (code, x) in out.iter_mut().zip(x) {
            let all = grid.code(if *x < 0.0 { *x * stretch } else { *x });
            *code = affine::byte(affine::at_most(affine::at_least(all, least), most));
        }
    }
}

/// Zero points of the codes of positive and of negative values. Where all values have one sign, the
/// grid's own may lie beyond the codes; the other sign's term is 0 with any.
pub fn zero_points(grid: Grid) -> [f32; 2] {
    [affine::at_most(grid.zero_point, grid.max_code), affine::at_least(grid.zero_point, 0.0)]
}

/// Extents of groups, and what the ranking needs of tokens.
fn survey(x: &[f32], shape: Grouped, rules: &Rules) -> (Vec<Extent>, Vec<TokenFacts>) {
    let rows = x.len() / shape.channels.max(1);
    let per_token = shape.channels / shape.group;
    let mut extents = vec![Extent::EMPTY; rows * per_token];
    let mut facts = vec![TokenFacts::default(); rows];
    let piece = if x.len() < PARALLEL_ELEMENTS {
        rows.max(1)
    } else {
        (PIECE_ELEMENTS / shape.channels).max(1)
    };
    let visit = |(index, (extents, facts)): (usize, (&mut [Extent], &mut [TokenFacts]))| {
        let first = index * piece;
        for (row, (extents, facts)) in extents.chunks_exact_mut(per_token).zip(facts).enumerate() {
            let x = rows_of(x, shape.channels, first + row, 1);
            let range = survey_token(x, shape.group, extents);
            let is_first = (first + row) % shape.tokens == 0;
            facts.range = if is_first { range * rules.first_factor } else { range };
            if let Some(density) = rules.density.filter(|_| rules.counts()) {
                let (low, high) = density.window(facts.range);
                facts.count = count_within(x, low, high);
            }
        }
    };
    extents
        .par_chunks_mut(piece * per_token)
        .zip(facts.par_chunks_mut(piece))
        .enumerate()
        .for_each(visit);
    (extents, facts)
}

vectorized! {
    /// Extents of a token's groups, and the range of the whole.
    fn survey_token(x: &[f32], group: usize, extents: &mut [Extent]) -> f32 {
        let mut whole = Extent::EMPTY;
        for (x, found) in x.chunks_exact(group).zip(extents) {
            *found = extent::extent_of(x);
            whole = whole.merge(*found);
        }
        whole.high - whole.low
    }
}

/// Extents of groups and ranges of tokens alone.
pub(super) fn extents_and_ranges(
    x: &[f32],
    shape: Grouped,
    rules: &Rules,
) -> (Vec<Extent>, Vec<f32>) {
    let plain = Rules { density: None, ..*rules };
    let (extents, facts) = survey(x, shape, &plain);
    (extents, facts.into_iter().map(|facts| facts.range).collect())
}

vectorized! {
    /// Values of a token in each of several windows.
    pub(super) fn count_windows(x: &[f32], windows: &[(f32, f32)], counts: &mut [u32]) {
        for ((low, high), count) in windows.iter().zip(counts) {
            *count = within(x, *low, *high);
        }
    }
}
