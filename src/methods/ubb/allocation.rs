//! Token-wise bit allocation (methods/ubb.md, section 5, steps 1–7).
//!
//! Tokens are ranked by range. The M tokens of largest range get n+1 bits, the M of smallest range
//! n−1, the rest n, so the mean is n. M counts how many leading pairs (k-th largest, k-th smallest)
//! gain from the swap: s_k = R_D·w_D − c·R_A·w_A > 0 with w = 1/N, N the density around the median.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::kernels::passes::ranking::{Density, Rules};
use crate::quant::cost::{OperandCost, elements};
use crate::quant::{BitWidth, QuantizerState};

/// Range factor that puts token 0 first in the ranking (the source's constant).
const PRIORITY_FACTOR: f64 = 1e8;

/// Smallest density, as a share of the channels (the source's constant).
const DENSITY_FLOOR: f64 = 0.1;

/// Bits that tell which of n−1, n and n+1 bits a token has.
const WIDTH_BITS: f64 = 2.0;

/// The static scalars of a quantizer: two statistics and two searched values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Scalars {
    /// μ: lower median of the calibration tensor.
    pub(super) mu: f64,
    /// κ = std / (max − min); 0 for a constant tensor.
    pub(super) kappa: f64,
    /// β ("constraint"): half width of the density window in units of κ·R.
    pub(super) beta: f64,
    /// c ("threshold"): how much more the large range must gain than the small one loses.
    pub(super) threshold: f64,
}

/// The rules that differ between linear inputs and attention operands, and between variants.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Allocation {
    /// Nominal bits n.
    pub(super) bits: BitWidth,
    /// Whether bits are mixed at all (not at n = 8 unless as released: n+1 does not fit a byte).
    pub(super) mixed: bool,
    /// Whether token 0 is always among the n+1 tokens.
    pub(super) token0_priority: bool,
    /// Smallest M: 1 for linear inputs, 0 for attention operands.
    pub(super) min_swaps: i64,
}

impl Allocation {
    /// Token ranges for the ranking: [images, tokens, features] → [images, tokens].
    pub(super) fn ranges(&self, tokens: &Tensor) -> Result<Tensor> {
        let dim = [-1i64];
        let range =
            tokens.f_amax(dim.as_slice(), false)?.f_sub(&tokens.f_amin(dim.as_slice(), false)?)?;
        if self.token0_priority {
            let mut first = range.f_narrow(1, 0, 1)?;
            // `range` is a fresh tensor: scaling its first column in place touches nothing else.
            let _scaled = first.f_mul_scalar_(PRIORITY_FACTOR)?;
        }
        Ok(range)
    }

    /// Density weights w = 1/max(N, 0.1·C), [images, tokens]; all 0 for β = 0.
    pub(super) fn weights(
        &self,
        tokens: &Tensor,
        ranges: &Tensor,
        scalars: &Scalars,
    ) -> Result<Tensor> {
        if scalars.beta == 0.0 {
            return Ok(ranges.f_zeros_like()?);
        }
        let features = tokens.size()[2] as f64;
        let radius = ranges.f_mul_scalar(scalars.kappa * scalars.beta)?.f_unsqueeze(-1)?;
        let above = tokens.f_ge_tensor(&radius.f_neg()?.f_add_scalar(scalars.mu)?)?;
        let inside =
            above.f_logical_and(&tokens.f_lt_tensor(&radius.f_add_scalar(scalars.mu)?)?)?;
        let count = inside.f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Float)?;
        Ok(count.f_clamp_min(DENSITY_FLOOR * features)?.f_reciprocal()?)
    }

    /// Bits of every token, float32 [images, tokens].
    pub(super) fn token_bits(&self, tokens: &Tensor, scalars: &Scalars) -> Result<Tensor> {
        let ranges = self.ranges(tokens)?;
        let nominal = ranges.f_full_like(f64::from(self.bits.get()))?;
        let count = ranges.size()[1];
        if !self.mixed || count < 2 {
            return Ok(nominal);
        }
        let order = ranges.f_argsort_stable(true, 1, true)?; // [images, tokens], largest first
        let gain =
            ranges.f_mul(&self.weights(tokens, &ranges, scalars)?)?.f_gather(1, &order, false)?;
        let loss = gain.f_flip([1i64].as_slice())?.f_mul_scalar(scalars.threshold)?;
        let profitable = gain.f_sub(&loss)?.f_gt(0.0)?.f_to_kind(Kind::Int64)?;
        let swaps = profitable
            .f_cumprod(1, Kind::Int64)?
            .f_sum_dim_intlist([1i64].as_slice(), true, Kind::Int64)?
            .f_clamp_min(self.min_swaps)?; // [images, 1]
        let rank = order.f_argsort_stable(true, 1, false)?; // inverse permutation
        let raised = rank.f_lt_tensor(&swaps)?.f_to_kind(Kind::Float)?;
        let lowered =
            rank.f_ge_tensor(&swaps.f_neg()?.f_add_scalar(count)?)?.f_to_kind(Kind::Float)?;
        Ok(nominal.f_add(&raised)?.f_sub(&lowered)?)
    }

    /// Largest code 2^b − 1 of every token, float32 [images, tokens].
    pub(super) fn max_codes(&self, tokens: &Tensor, scalars: &Scalars) -> Result<Tensor> {
        Ok(self.token_bits(tokens, scalars)?.f_exp2()?.f_sub_scalar(1.0)?)
    }

    /// The same rules for the one-pass kernels, for tokens of that many features.
    pub(super) fn rules(&self, scalars: &Scalars, features: usize) -> Rules {
        Rules {
            bits: self.bits.get(),
            mixed: self.mixed,
            first_factor: if self.token0_priority { PRIORITY_FACTOR as f32 } else { 1.0 },
            min_swaps: usize::try_from(self.min_swaps).unwrap_or(0),
            threshold: scalars.threshold as f32,
            density: density(scalars, features),
        }
    }

    /// Bits of the widest token.
    pub(super) fn code_bits(&self) -> u32 {
        u32::from(self.bits.get()) + u32::from(self.mixed)
    }

    /// What ranges and bits of the tokens of an operand of that shape cost, without their grids.
    ///
    /// Ranges take two comparisons per element. Mixed bits take two more for the density and a sort
    /// of the tokens, and two bits a token say which of the three widths it has.
    pub(super) fn cost(&self, shape: &[i64], tokens: f64) -> OperandCost {
        let cost = OperandCost::of_grid(self.bits);
        let elements = elements(shape);
        if !self.mixed {
            return OperandCost { operations: 2.0 * elements, ..cost };
        }
        OperandCost {
            metadata_bits: WIDTH_BITS * tokens,
            operations: 4.0 * elements + tokens * tokens.max(1.0).log2().ceil(),
            ..cost
        }
    }

    /// Adds rules and scalars to a state.
    pub(super) fn store(&self, scalars: &Scalars, state: QuantizerState) -> QuantizerState {
        state
            .scalar("mixed", f64::from(u8::from(self.mixed)))
            .scalar("token0_priority", f64::from(u8::from(self.token0_priority)))
            .scalar("min_swaps", self.min_swaps as f64)
            .scalar("mu", scalars.mu)
            .scalar("kappa", scalars.kappa)
            .scalar("beta", scalars.beta)
            .scalar("threshold", scalars.threshold)
    }

    /// Reads rules and scalars back.
    pub(super) fn restore(state: &QuantizerState) -> Result<(Self, Scalars)> {
        let rules = Self {
            bits: state.read_bits()?,
            mixed: state.read_scalar("mixed")? != 0.0,
            token0_priority: state.read_scalar("token0_priority")? != 0.0,
            min_swaps: state.read_scalar("min_swaps")? as i64,
        };
        let scalars = Scalars {
            mu: state.read_scalar("mu")?,
            kappa: state.read_scalar("kappa")?,
            beta: state.read_scalar("beta")?,
            threshold: state.read_scalar("threshold")?,
        };
        Ok((rules, scalars))
    }
}

/// The window of a density count; none for β = 0.
pub(super) fn density(scalars: &Scalars, features: usize) -> Option<Density> {
    (scalars.beta != 0.0).then_some(Density {
        centre: scalars.mu as f32,
        radius: (scalars.kappa * scalars.beta) as f32,
        floor: (DENSITY_FLOOR * features as f64) as f32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;
    use crate::tensor::to_vec_f32;

    fn rules(priority: bool, min_swaps: i64) -> Allocation {
        Allocation {
            bits: BitWidth::new(4, "bits").unwrap(),
            mixed: true,
            token0_priority: priority,
            min_swaps,
        }
    }

    const SCALARS: Scalars = Scalars { mu: 0.01, kappa: 0.2, beta: 1.4, threshold: 2.3 };

    #[test]
    fn the_mean_is_exactly_n_for_every_length() {
        for count in 2..=40 {
            for (priority, min_swaps) in [(true, 1), (false, 0), (false, 1)] {
                let x = sample(&[3, count, 16], count);
                let bits = rules(priority, min_swaps).token_bits(&x, &SCALARS).unwrap();
                let sums = to_vec_f32(&bits.sum_dim_intlist([1i64].as_slice(), false, Kind::Float))
                    .unwrap();
                assert!(sums.iter().all(|sum| *sum == 4.0 * count as f32), "{count}: {sums:?}");
                assert!(bits.min().double_value(&[]) >= 3.0 && bits.max().double_value(&[]) <= 5.0);
            }
        }
    }

    #[test]
    fn token_zero_is_raised_in_linear_inputs_only() {
        // Token 0 has the smallest range: only the priority can raise it.
        let mut x = sample(&[2, 9, 16], 4);
        let _ = x.narrow(1, 0, 1).fill_(0.25);
        let _ = x.narrow(1, 0, 1).narrow(2, 0, 1).fill_(0.2501);
        x = x.contiguous();
        let first = |rules: Allocation| {
            to_vec_f32(&rules.token_bits(&x, &SCALARS).unwrap().select(1, 0)).unwrap()
        };
        assert_eq!(first(rules(true, 1)), [5.0, 5.0]);
        assert!(first(rules(false, 0)).iter().all(|bits| *bits <= 4.0));
    }

    #[test]
    fn beta_zero_means_no_swap_beyond_the_minimum() {
        let x = sample(&[1, 11, 8], 7);
        let scalars = Scalars { beta: 0.0, ..SCALARS };
        let plain = to_vec_f32(&rules(false, 0).token_bits(&x, &scalars).unwrap()).unwrap();
        assert!(plain.iter().all(|bits| *bits == 4.0));
        let linear = to_vec_f32(&rules(false, 1).token_bits(&x, &scalars).unwrap()).unwrap();
        assert_eq!(linear.iter().filter(|bits| **bits != 4.0).count(), 2);
    }

    #[test]
    fn a_single_token_keeps_its_bits() {
        let x = sample(&[2, 1, 8], 8);
        let bits = to_vec_f32(&rules(true, 1).token_bits(&x, &SCALARS).unwrap()).unwrap();
        assert_eq!(bits, [4.0, 4.0]);
    }
}
