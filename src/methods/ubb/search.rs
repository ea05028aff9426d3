//! The exact fast search of (β, c[, τ]) (methods/ubb.md, section 4).
//!
//! A token's error depends only on its own bits (and τ), and the ranking of tokens on none of the
//! searched values. So per τ one quantization at n−1, n and n+1 bits gives every token's error,
//! prefix sums in rank order give an image's error as a function of its swap count M alone, and
//! each of the 441 (4,851 with τ) candidates is one look-up per image.

use tch::{Kind, Tensor};

use super::allocation::{Allocation, Scalars};
use super::quantizers::{GridRules, GroupGrid};
use crate::error::Result;
use crate::quant::uniform::Range;
use crate::tensor::{to_vec_f32, to_vec_f64};

/// Steps of β and of c − c₀: 0, 0.2, …, 4.0.
pub(super) const STEPS: usize = 21;
/// Steps of τ: 0, 0.1, …, 1.0.
pub(super) const SHIFT_STEPS: usize = 11;

/// Elements quantized at once, so that the working set stays in a CPU's cache.
const CHUNK_ELEMENTS: i64 = 1 << 18;

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
        let mut tables = Self {
            swaps: vec![Vec::with_capacity(images as usize); STEPS * STEPS],
            errors: vec![Vec::with_capacity(images as usize); shifts],
        };
        let chunk = (CHUNK_ELEMENTS / (tokens * features)).clamp(1, images);
        for first in (0..images).step_by(chunk as usize) {
            stop()?;
            let part = problem.tokens.f_narrow(0, first, chunk.min(images - first))?;
            tables.add_images(problem, &part)?;
        }
        Ok(tables)
    }

    fn add_images(&mut self, problem: &Problem<'_>, part: &Tensor) -> Result<()> {
        let tokens = part.size()[1] as usize;
        let ranges = problem.allocation.ranges(part)?;
        let order =
            Vec::<i64>::try_from(&ranges.f_argsort_stable(true, 1, true)?.f_flatten(0, -1)?)?;
        let ranked = |values: &[f64]| -> Vec<f64> {
            let image = |i: usize| (i / tokens) * tokens;
            order.iter().enumerate().map(|(i, token)| values[image(i) + *token as usize]).collect()
        };
        self.count_swaps(problem, part, &ranges, &order)?;
        let grouped = part.f_reshape([part.size()[0], part.size()[1], problem.groups, -1])?;
        let range = Range::per_row(&grouped)?;
        for (step, errors) in self.errors.iter_mut().enumerate() {
            let rules = GridRules {
                tau: problem.rules.tau.map(|_| shift_threshold(step)),
                ..problem.rules
            };
            let mut by_bits = Vec::with_capacity(3);
            for change in [1i8, 0, -1] {
                let bits = f64::from(problem.allocation.bits.get()) + f64::from(change);
                let max_code =
                    Tensor::f_full([1], bits.exp2() - 1.0, (Kind::Float, part.device()))?;
                let grid = GroupGrid::new(&range, max_code, rules)?;
                let error = grid.fake_quantize(&grouped)?.f_sub(&grouped)?.f_abs()?;
                let error = error.f_sum_dim_intlist([2i64, 3].as_slice(), false, Kind::Double)?;
                by_bits.push(ranked(&to_vec_f64(&error)?));
            }
            let images = by_bits[0]
                .chunks(tokens)
                .zip(by_bits[1].chunks(tokens))
                .zip(by_bits[2].chunks(tokens));
            errors.extend(
                images
                    .map(|((raised, nominal), lowered)| errors_by_swaps(raised, nominal, lowered)),
            );
        }
        Ok(())
    }

    /// M(β, c) of every image of the part.
    fn count_swaps(
        &mut self,
        problem: &Problem<'_>,
        part: &Tensor,
        ranges: &Tensor,
        order: &[i64],
    ) -> Result<()> {
        let tokens = part.size()[1] as usize;
        for step in 0..STEPS {
            let scalars = Scalars { beta: beta(step), ..problem.statistics };
            // float32 products as in `Allocation::token_bits`, so that both find the same M.
            let gain =
                to_vec_f32(&ranges.f_mul(&problem.allocation.weights(part, ranges, &scalars)?)?)?;
            for (image, order) in order.chunks(tokens).enumerate() {
                let gain: Vec<f32> =
                    order.iter().map(|token| gain[image * tokens + *token as usize]).collect();
                for c in 0..STEPS {
                    let threshold = threshold(c, problem.allocation.bits.get()) as f32;
                    let swaps = profitable_swaps(&gain, threshold);
                    let least = if tokens < 2 { 0 } else { problem.allocation.min_swaps as usize };
                    self.swaps[step * STEPS + c].push(swaps.max(least));
                }
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

/// Number of leading pairs with s_k = gain_k − c·gain_{T−1−k} > 0.
fn profitable_swaps(gain: &[f32], threshold: f32) -> usize {
    let last = gain.len() - 1;
    (0..gain.len()).take_while(|k| gain[*k] - gain[last - k] * threshold > 0.0).count()
}

/// Error of an image for every M: the first M in rank order raised, the last M lowered.
fn errors_by_swaps(raised: &[f64], nominal: &[f64], lowered: &[f64]) -> Vec<f64> {
    let count = nominal.len();
    let prefix = |values: &[f64]| -> Vec<f64> {
        let mut sums = vec![0.0];
        for value in values {
            sums.push(sums[sums.len() - 1] + value);
        }
        sums
    };
    let (raised, nominal, lowered) = (prefix(raised), prefix(nominal), prefix(lowered));
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
        let errors = errors_by_swaps(&[1.0, 1.0, 1.0], &[2.0, 2.0, 2.0], &[4.0, 4.0, 4.0]);
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
