//! What UBB's search needs to know of every token: its error at three bit widths and at every stretch
//! of negatives, and its density at every width of the window.

use super::affine::{Constants, Grid};
use super::extent::Extent;
use super::groups::{Grouped, Shift, count_windows, extents_and_ranges, grid_of, stretched_value};
use super::ranking::{Density, Rules};
use super::{rows_of, share, vectorized};

/// Lanes of a running sum.
const LANES: usize = 8;

/// What is asked of the tokens.
#[derive(Clone, Copy, Debug)]
pub struct Questions<'a> {
    /// Where tokens and groups are.
    pub shape: Grouped,
    /// Allocation rules; their density is not looked at.
    pub rules: &'a Rules,
    /// Largest codes at n + 1, n and n − 1 bits.
    pub max_codes: [f32; 3],
    /// Treatment of constant groups.
    pub constants: Constants,
    /// The shifts that are tried; empty: none, as one candidate.
    pub shifts: &'a [Shift<'a>],
    /// The windows that are tried; `None`: tokens have no weight.
    pub densities: &'a [Option<Density>],
}

/// What is known of the tokens, in their order.
#[derive(Debug)]
pub struct Answers {
    /// Ranges for the ranking.
    pub ranges: Vec<f32>,
    /// Σ|x − x̂| at n + 1, n and n − 1 bits: by token and shift.
    pub errors: Vec<[f64; 3]>,
    /// Values in the window: by token and density.
    pub counts: Vec<u32>,
}

/// Looks at every token of `x` [images · tokens, channels].
pub fn ask(x: &[f32], questions: &Questions<'_>) -> Answers {
    let shape = questions.shape;
    let (extents, ranges) = extents_and_ranges(x, shape, questions.rules);
    let (shifts, densities) = (questions.shifts.len().max(1), questions.densities.len());
    let mut errors = vec![[0.0; 3]; ranges.len() * shifts];
    let mut counts = vec![0; ranges.len() * densities];
    let groups = shape.channels / shape.group;
    let tokens = errors.chunks_mut(shifts).zip(counts.chunks_mut(densities.max(1)));
    share(tokens.enumerate(), |(token, (errors, counts))| {
        let x = rows_of(x, shape.channels, token, 1);
        let window = |density: &Option<Density>| {
            density.map_or((0.0, 0.0), |density| density.window(ranges[token]))
        };
        let windows: Vec<_> = questions.densities.iter().map(window).collect();
        count_windows(x, &windows, counts);
        let extents = &extents[token * groups..(token + 1) * groups];
        for (x, extent) in x.chunks_exact(shape.group).zip(extents) {
            add_group(x, *extent, questions, errors);
        }
    });
    Answers { ranges, errors, counts }
}

/// Adds a group's errors to those of its token. Neighbouring shifts often stretch alike.
fn add_group(x: &[f32], extent: Extent, questions: &Questions<'_>, errors: &mut [[f64; 3]]) {
    let of_stretch = |stretch: Option<f32>| {
        questions.max_codes.map(|max_code| {
            let grid = grid_of(extent, stretch, max_code, questions.constants);
            match stretch {
                Some(stretch) => stretched_error(x, grid, stretch),
                None => plain_error(x, grid),
            }
        })
    };
    let mut known: Option<(Option<f32>, [f64; 3])> = None;
    for (index, sums) in errors.iter_mut().enumerate() {
        let stretch = questions.shifts.get(index).map(|shift| shift.stretch(extent));
        let error = match known {
            Some((of, error)) if of == stretch => error,
            _ => of_stretch(stretch),
        };
        known = Some((stretch, error));
        for (sum, error) in sums.iter_mut().zip(error) {
            *sum += error;
        }
    }
}

#[inline(always)]
fn summed_error(x: &[f32], value: impl Fn(f32) -> f32) -> f64 {
    let mut sums = [0f64; LANES];
    let mut blocks = x.chunks_exact(LANES);
    for block in &mut blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += f64::from((value(*x) - *x).abs());
        }
    }
    let rest: f64 = blocks.remainder().iter().map(|x| f64::from((value(*x) - *x).abs())).sum();
    sums.iter().sum::<f64>() + rest
}

vectorized! {
    fn plain_error(x: &[f32], grid: Grid) -> f64 {
        summed_error(x, |x| grid.value(x))
    }
}

vectorized! {
    fn stretched_error(x: &[f32], grid: Grid, stretch: f32) -> f64 {
        summed_error(x, |x| stretched_value(x, grid, stretch))
    }
}
