//! The exact fast search of (β, c[, τ]) (methods/ubb.md, section 4).
//!
//! A token's error depends only on its own bits (and τ), and the ranking of tokens on none of the
//! searched values. So per τ one quantization at n−1, n and n+1 bits gives every token's error,
//! prefix sums in rank order give an image's error as a function of its swap count M alone, and
//! each of the 441 (4,851 with τ) candidates is one look-up per image.

use tch::{Device, Kind, Tensor};

use super::allocation::{Allocation, Scalars, density};
use super::quantizers::{GridRules, GroupGrid, shift_steps};
use crate::error::Result;
use crate::kernels::passes::groups::{Grouped, Shift};
use crate::kernels::passes::ranking::{Rules, descending, profitable_swaps};
use crate::kernels::passes::search::{Questions, ask};
use crate::quant::dense::Dense;
use crate::quant::uniform::Range;
use crate::tensor::{to_vec_f32, to_vec_f64};

/// Steps of β and of c − c₀: 0, 0.2, …, 4.0.
pub(super) const STEPS: usize = 21;
/// Steps of τ: 0, 0.1, …, 1.0.
pub(super) const SHIFT_STEPS: usize = 11;

/// Elements quantized at once.
fn chunk_elements(device: Device) -> i64 {
    if device.is_cuda() {
        // An operation on fewer is over before the next one has begun; a dozen of so many fit any GPU.
        1 << 25
    } else {
        // The working set stays in a CPU's cache.
        1 << 18
    }
}

/// β of step i.
pub(super) fn beta(step: usize) -> f64 {
    step as f64 / 5.0
}

/// c of step j at n bits: c₀ + j/5 with c₀ = (2^(n+1) − 1)/(2^n − 2).
pub(super) fn threshold(step: usize, bits: u8) -> f64 {
    let n = i32::from(bits);
    step as f64 / 5.0 + (2f64.powi(n + 1) - 1.0) / (2f64.powi(n) - 2.0)
}

/// τ of step k.
pub(super) fn shift_threshold(step: usize) -> f64 {
    step as f64 / 10.0
}

/// The best grid point and its mean absolute error.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) beta: usize,
    pub(super) threshold: usize,
    pub(super) shift: usize,
    /// Mean |x − x̂| over the calibration tensor.
    pub(super) error: f64,
}

/// What the search looks at.
pub(super) struct Problem<'a> {
    /// Calibration tensor as [images, tokens, features].
    pub(super) tokens: &'a Tensor,
    /// Channel groups of a token (1 for attention operands).
    pub(super) groups: i64,
    /// Allocation rules.
    pub(super) allocation: Allocation,
    /// μ and κ; β and c are searched.
    pub(super) statistics: Scalars,
    /// Grid rules; `tau: Some(_)` means that τ is searched as well.
    pub(super) rules: GridRules,
}

/// Finds the grid point of least error; among equals the last in the order β, c, τ.
pub(super) fn search(problem: &Problem<'_>, stop: &dyn Fn() -> Result<()>) -> Result<Found> {
    let tables = Tables::measure(problem, stop)?;
    let best = tables.best();
    let elements = problem.tokens.numel() as f64;
    Ok(Found { error: best.error / elements, ..best })
}

/// Everything the candidates need, in rank order.
struct Tables {
    /// swaps[β·STEPS + c][image]
    swaps: Vec<Vec<usize>>,
    /// errors[τ][image][M]: summed |x − x̂| of the image with M swaps, M = 0..=tokens/2.
    errors: Vec<Vec<Vec<f64>>>,
}

impl Tables {
    fn measure(problem: &Problem<'_>, stop: &dyn Fn() -> Result<()>) -> Result<Self> {
        let size = problem.tokens.size();
        let (images, tokens, features) = (size[0], size[1], size[2]);
        let shifts = if problem.rules.tau.is_some() { SHIFT_STEPS } else { 1 };
        let mut tables =
            Self { swaps: vec![Vec::new(); STEPS * STEPS], errors: vec![Vec::new(); shifts] };
        let most = chunk_elements(problem.tokens.device());
        let chunk = (most / (tokens * features)).clamp(1, images);
        for first in (0..images).step_by(chunk as usize) {
            stop()?;
            let part = problem.tokens.f_narrow(0, first, chunk.min(images - first))?;
            tables.add_images(problem, &part)?;
        }
        Ok(tables)
    }

    fn add_images(&mut self, problem: &Problem<'_>, part: &Tensor) -> Result<()> {
        let facts = match Facts::in_a_pass(problem, part, self.errors.len())? {
            Some(facts) => facts,
            None => Facts::by_tensors(problem, part, self.errors.len())?,
        };
        let tokens = part.size()[1] as usize;
        let rules = problem.allocation;
        let least = if tokens < 2 { 0 } else { usize::try_from(rules.min_swaps).unwrap_or(0) };
        for image in 0..part.size()[0] as usize {
            let of_image = image * tokens..(image + 1) * tokens;
            let order = descending(&facts.ranges[of_image.clone()]);
            for (step, gains) in facts.gains.iter().enumerate() {
                let gains = &gains[of_image.clone()];
                let ranked: Vec<f32> = order.iter().map(|t| gains[*t as usize]).collect();
                for c in 0..STEPS {
                    let threshold = threshold(c, rules.bits.get()) as f32;
                    let swaps = profitable_swaps(&ranked, threshold).max(least);
                    self.swaps[step * STEPS + c].push(swaps);
                }
            }
            for (shift, errors) in self.errors.iter_mut().enumerate() {
                let of_token = |t: &u32| facts.errors[shift][of_image.start + *t as usize];
                errors.push(errors_by_swaps(&order.iter().map(of_token).collect::<Vec<_>>()));
            }
        }
        Ok(())
    }

    fn best(&self) -> Found {
        let mut best = Found { beta: 0, threshold: 0, shift: 0, error: f64::INFINITY };
        for (candidate, swaps) in self.swaps.iter().enumerate() {
            for (shift, errors) in self.errors.iter().enumerate() {
                let error: f64 = errors.iter().zip(swaps).map(|(by_swaps, m)| by_swaps[*m]).sum();
                if error <= best.error {
                    best = Found {
                        beta: candidate / STEPS,
                        threshold: candidate % STEPS,
                        shift,
                        error,
                    };
                }
            }
        }
        best
    }
}

/// What is known of the tokens of some images, image after image.
struct Facts {
    /// For the ranking.
    ranges: Vec<f32>,
    /// gains[β][token]: range × density weight, float32 as in `Allocation::token_bits`, so that both
    /// find the same M.
    gains: Vec<Vec<f32>>,
    /// errors[τ][token]: Σ|x − x̂| at n + 1, n and n − 1 bits.
    errors: Vec<Vec<[f64; 3]>>,
}

/// Largest codes at n + 1, n and n − 1 bits.
fn max_codes(problem: &Problem<'_>) -> [f64; 3] {
    let bits = f64::from(problem.allocation.bits.get());
    [1.0, 0.0, -1.0].map(|change: f64| (bits + change).exp2() - 1.0)
}

impl Facts {
    /// One visit of every token in memory; `None` where tensor code has to do it.
    fn in_a_pass(problem: &Problem<'_>, part: &Tensor, shifts: usize) -> Result<Option<Self>> {
        let Some(dense) = Dense::in_order(part)? else { return Ok(None) };
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let (tokens, channels) = (size(part.size()[1]), size(part.size()[2]));
        let shape = Grouped { channels, group: channels / size(problem.groups).max(1), tokens };
        let steps: &[f32] = match (problem.rules.tau, shift_steps()) {
            (Some(_), None) => return Ok(None),
            (Some(_), Some(steps)) => steps,
            (None, _) => &[],
        };
        let tried: Vec<Shift<'_>> = (0..shifts)
            .filter(|_| problem.rules.tau.is_some())
            .map(|step| Shift { factor: -shift_threshold(step) as f32, steps })
            .collect();
        let scalars = |step: usize| Scalars { beta: beta(step), ..problem.statistics };
        let densities: Vec<_> = (0..STEPS).map(|step| density(&scalars(step), channels)).collect();
        let rules = problem.allocation.rules(&problem.statistics, channels);
        let questions = Questions {
            shape,
            rules: &rules,
            max_codes: max_codes(problem).map(|code| code as f32),
            constants: problem.rules.constants.into(),
            shifts: &tried,
            densities: &densities,
        };
        let answers = ask(dense.values()?, &questions);
        let gains = densities.iter().enumerate().map(|(step, density)| {
            let counts: Vec<u32> =
                answers.counts.iter().skip(step).step_by(STEPS).copied().collect();
            Rules { density: *density, ..rules }.gains(&answers.ranges, &counts)
        });
        let errors =
            (0..shifts).map(|s| answers.errors.iter().skip(s).step_by(shifts).copied().collect());
        Ok(Some(Self { gains: gains.collect(), errors: errors.collect(), ranges: answers.ranges }))
    }

    /// The definition.
    fn by_tensors(problem: &Problem<'_>, part: &Tensor, shifts: usize) -> Result<Self> {
        let ranges = problem.allocation.ranges(part)?;
        let mut gains = Vec::with_capacity(STEPS);
        for step in 0..STEPS {
            let scalars = Scalars { beta: beta(step), ..problem.statistics };
            let weights = problem.allocation.weights(part, &ranges, &scalars)?;
            gains.push(to_vec_f32(&ranges.f_mul(&weights)?)?);
        }
        let grouped = part.f_reshape([part.size()[0], part.size()[1], problem.groups, -1])?;
        let range = Range::per_row(&grouped)?;
        let mut errors = Vec::with_capacity(shifts);
        for step in 0..shifts {
            let tau = problem.rules.tau.map(|_| shift_threshold(step));
            let rules = GridRules { tau, ..problem.rules };
            let mut by_bits = Vec::with_capacity(3);
            for max_code in max_codes(problem) {
                let max_code = Tensor::f_full([1], max_code, (Kind::Float, part.device()))?;
                let grid = GroupGrid::new(&range, max_code, rules)?;
                let error = grid.fake_quantize(&grouped)?.f_sub(&grouped)?.f_abs()?;
                let error = error.f_sum_dim_intlist([2i64, 3].as_slice(), false, Kind::Double)?;
                by_bits.push(to_vec_f64(&error)?);
            }
            let of_token = |token: usize| [0, 1, 2].map(|bits: usize| by_bits[bits][token]);
            errors.push((0..by_bits[0].len()).map(of_token).collect());
        }
        Ok(Self { ranges: to_vec_f32(&ranges)?, gains, errors })
    }
}

/// Error of an image for every M, tokens in rank order: the first M raised, the last M lowered.
fn errors_by_swaps(errors: &[[f64; 3]]) -> Vec<f64> {
    let count = errors.len();
    let prefix = |bits: usize| -> Vec<f64> {
        let mut sums = vec![0.0];
        for error in errors {
            sums.push(sums[sums.len() - 1] + error[bits]);
        }
        sums
    };
    let (raised, nominal, lowered) = (prefix(0), prefix(1), prefix(2));
    (0..=count / 2)
        .map(|m| {
            raised[m] + (nominal[count - m] - nominal[m]) + (lowered[count] - lowered[count - m])
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::quantizers::UbbLinear;
    use super::*;
    use crate::quant::dynamic::ConstantRows;
    use crate::quant::uniform::laws::sample;
    use crate::quant::{BitWidth, Quantizer};

    fn problem(tokens: &Tensor, groups: i64, bits: u32, tau: Option<f64>) -> Problem<'_> {
        Problem {
            tokens,
            groups,
            allocation: Allocation {
                bits: BitWidth::new(bits, "bits").unwrap(),
                mixed: true,
                token0_priority: true,
                min_swaps: 1,
            },
            statistics: super::super::statistics(tokens).unwrap(),
            rules: GridRules { tau, constants: ConstantRows::Exact },
        }
    }

    /// Every candidate quantized as at inference, errors in f64, last of equals.
    fn brute_force(problem: &Problem<'_>) -> Found {
        let mut best = Found { beta: 0, threshold: 0, shift: 0, error: f64::INFINITY };
        let shifts = if problem.rules.tau.is_some() { SHIFT_STEPS } else { 1 };
        for b in 0..STEPS {
            for c in 0..STEPS {
                for shift in 0..shifts {
                    let scalars = Scalars {
                        beta: beta(b),
                        threshold: threshold(c, problem.allocation.bits.get()),
                        ..problem.statistics
                    };
                    let rules = GridRules {
                        tau: problem.rules.tau.map(|_| shift_threshold(shift)),
                        ..problem.rules
                    };
                    let q = UbbLinear {
                        allocation: problem.allocation,
                        scalars,
                        groups: problem.groups,
                        rules,
                    };
                    let difference = q.fake_quantize(problem.tokens).unwrap() - problem.tokens;
                    let error = difference.abs().mean(Kind::Double).double_value(&[]);
                    // Candidates with the same allocation differ by rounding of the sum only.
                    if error <= best.error * (1.0 + 1e-13) {
                        best = Found { beta: b, threshold: c, shift, error };
                    }
                }
            }
        }
        best
    }

    #[test]
    fn the_fast_search_equals_brute_force() {
        for (seed, bits) in [(1, 3), (2, 4), (3, 6)] {
            // Tokens of very different ranges, so that the allocation matters.
            let spread = Tensor::from_slice(&[1.0f32, 0.1, 5.0, 0.7, 2.0, 0.3, 9.0, 1.5, 0.2])
                .view([1, 9, 1]);
            let x = sample(&[3, 9, 16], seed) * spread;
            let problem_ = problem(&x, 4, bits, None);
            let (fast, brute) = (search(&problem_, &|| Ok(())).unwrap(), brute_force(&problem_));
            assert_eq!(
                (fast.beta, fast.threshold),
                (brute.beta, brute.threshold),
                "{fast:?} {brute:?}"
            );
            assert!((fast.error - brute.error).abs() <= 1e-9 * brute.error);
        }
        let x = sample(&[2, 5, 16], 4).gelu("none");
        let problem_ = problem(&x, 4, 4, Some(0.0));
        let (fast, brute) = (search(&problem_, &|| Ok(())).unwrap(), brute_force(&problem_));
        assert_eq!(
            (fast.beta, fast.threshold, fast.shift),
            (brute.beta, brute.threshold, brute.shift),
            "{fast:?} {brute:?}"
        );
    }

    #[test]
    fn a_pass_finds_the_facts_of_the_definition() {
        for (shape, groups, tau) in
            [([3, 9, 16], 4, None), ([2, 50, 96], 8, Some(0.0)), ([1, 33, 21], 1, None)]
        {
            let x = match tau {
                Some(_) => sample(&shape, 3).gelu("none"),
                None => sample(&shape, 3),
            };
            let problem = problem(&x, groups, 4, tau);
            let shifts = if tau.is_some() { SHIFT_STEPS } else { 1 };
            let pass = Facts::in_a_pass(&problem, &x, shifts).unwrap().unwrap();
            let definition = Facts::by_tensors(&problem, &x, shifts).unwrap();
            assert_eq!(pass.ranges, definition.ranges);
            assert_eq!(pass.gains, definition.gains);
            let errors = |facts: &Facts| facts.errors.concat().concat();
            for (a, b) in errors(&pass).iter().zip(errors(&definition)) {
                assert!((a - b).abs() <= 1e-12 * b, "{a} {b}"); // the order of float64 sums
            }
        }
    }

    #[test]
    fn among_equal_errors_the_last_candidate_wins() {
        let tables = Tables {
            swaps: vec![vec![0, 1]; STEPS * STEPS],
            errors: vec![vec![vec![2.0, 2.0]; 2]; SHIFT_STEPS],
        };
        let best = tables.best();
        assert_eq!((beta(best.beta), best.threshold, shift_threshold(best.shift)), (4.0, 20, 1.0));
        assert!((threshold(20, 4) - (31.0 / 14.0 + 4.0)).abs() < 1e-12);
    }

    #[test]
    fn prefix_sums_count_every_token_once() {
        let errors = errors_by_swaps(&[[1.0, 2.0, 4.0]; 3]);
        assert_eq!(errors, [6.0, 7.0]);
        assert_eq!(profitable_swaps(&[8.0, 4.0, 1.0], 2.0), 1);
        assert_eq!(profitable_swaps(&[0.0, 0.0], 2.0), 0);
    }

    #[test]
    fn a_search_can_be_stopped() {
        let x = sample(&[2, 5, 16], 4);
        let stopped = search(&problem(&x, 4, 4, None), &|| Err(crate::Error::Cancelled));
        assert!(matches!(stopped, Err(crate::Error::Cancelled)));
    }
}
