//! UBB's grids of linear inputs: one for every token and group of channels, perhaps with the post-GELU
//! stretch of negatives.

use super::affine::{self, Constants, Grid, encode_rows, quantize_rows};
use super::extent::{self, Extent};
use super::ranking::Rules;
use super::tokens::{allocate, count_within, within};
use super::{PARALLEL_ELEMENTS, PIECE_ELEMENTS, for_rows, rows_of, share, vectorized};
use crate::kernels::codes::buffer;

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
        let mut codes = buffer(x.len());
        encode_rows(x, &self.grids, self.shape.group, &mut codes);
        codes
    }

    /// Codes as bytes, with a stretch: terms whose sum is x̂.
    ///
    /// Positive values have codes `stretch` times as wide as negative ones. Where they fit a byte in
    /// steps of the latter and `fold` allows it, the first term is the whole and the second nothing; else
    /// they are the positive and the negative values.
    pub fn encode_signs(&self, x: &[f32], stretches: &[f32], fold: bool) -> [SignCodes; 2] {
        let group = self.shape.group;
        let pairs = || self.grids.iter().copied().zip(stretches.iter().copied());
        let folded: Vec<bool> =
            pairs().map(|(grid, stretch)| fold && folds(grid, stretch)).collect();
        let mut codes = [buffer(x.len()), buffer(x.len())];
        for (sign, codes) in codes.iter_mut().enumerate() {
            for_rows(codes, group, |first, part| {
                for (row, out) in part.chunks_exact_mut(group).enumerate() {
                    let row = first + row;
                    let (grid, stretch) = (self.grids[row], stretches[row]);
                    let (x, zeros) = (rows_of(x, group, row, 1), zero_points(grid));
                    match (folded[row], sign) {
                        (true, 0) => encode_folded(x, grid, stretch, out),
                        (true, _) => out.fill(0),
                        (false, 0) => {
                            encode_stretched(x, grid, (stretch, (zeros[0], grid.max_code)), out);
                        }
                        (false, _) => encode_stretched(x, grid, (stretch, (0.0, zeros[1])), out),
                    }
                }
            });
        }
        let mut sign = 0;
        codes.map(|codes| {
            let term = |((grid, stretch), folded): ((Grid, f32), &bool)| {
                let fine = *folded || sign == 1;
                let zero_point = if *folded && sign == 1 { 0.0 } else { zero_points(grid)[sign] };
                (if fine { grid.scale / stretch } else { grid.scale }, zero_point as i32)
            };
            let (scale, zero_point) = pairs().zip(&folded).map(term).unzip();
            sign += 1;
            SignCodes { codes, scale, zero_point }
        })
    }
}

/// A term of an operand with stretched negatives.
#[derive(Debug)]
pub struct SignCodes {
    /// As many as elements.
    pub codes: Vec<u8>,
    /// By token and group.
    pub scale: Vec<f32>,
    /// By token and group.
    pub zero_point: Vec<i32>,
}

/// Whether codes of both signs, in steps of the negative ones, fit a byte.
#[inline(always)]
fn folds(grid: Grid, stretch: f32) -> bool {
    let Grid { zero_point, max_code, .. } = grid;
    let is_inside = (0.0..=max_code).contains(&zero_point);
    is_inside && (max_code - zero_point) * stretch + zero_point <= f32::from(u8::MAX)
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

vectorized! {
    fn encode_folded(x: &[f32], grid: Grid, stretch: f32, out: &mut [u8]) {
        for (code, x) in out.iter_mut().zip(x) {
            let all = grid.code(if *x < 0.0 { *x * stretch } else { *x });
            let above = (all - grid.zero_point) * stretch + grid.zero_point;
            *code = affine::byte(if all > grid.zero_point { above } else { all });
        }
    }
}

/// Zero points of the codes of positive and of negative values. Where all values have one sign, the
/// grid's own may lie beyond the codes; the other sign's term is 0 with any.
fn zero_points(grid: Grid) -> [f32; 2] {
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
    let pieces = extents.chunks_mut(piece * per_token).zip(facts.chunks_mut(piece));
    share(pieces.enumerate(), visit);
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
