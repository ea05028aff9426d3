//! Row-wise dynamic log2 quantization of attention scores (methods/ubb.md, section 8):
//! Δ = row maximum, e = round(−log2(max(x/Δ, 1e-8))), x̂ = Δ·2^(−e), 0 where e does not fit.

use std::cell::LazyCell;
use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::kernels::Codes;
use crate::kernels::codes::recycle;
use crate::kernels::cuda::{Plane, Rounded, Stairs};
use crate::kernels::passes::Strided;
use crate::kernels::passes::staircase::{
    Passed, Rows, Staircase, Values, least_above_zero, values_of,
};
use crate::quant::cost::{OperandCost, SCALE_BITS, elements};
use crate::quant::dense::Dense;
use crate::quant::once::Once;
use crate::quant::planes::Planes;
use crate::quant::steps::thresholds;
use crate::quant::tokens::{TokenLayout, shape4};
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::round_straight_through;

/// Kind name in artifacts.
pub const KIND: &str = "log2_row";

/// Smallest ratio x/Δ whose logarithm is taken (the source's constant).
const MIN_RATIO: f64 = 1e-8;

/// The exponent of [`MIN_RATIO`].
const LARGEST_EXPONENT: f64 = 27.0;

/// Ratios from which on the exponent is [`LARGEST_EXPONENT`], one less, …, 0.
static RATIOS: Once<Vec<f32>> = Once::new();

/// Exponents covered by one integer term: 2^0..2^14 fit 15 bits, so products stay within 32.
const TERM_EXPONENTS: i64 = 15;

/// How zero is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroCode {
    /// 2^b exponents and an extra symbol for zero, as in the released code.
    Extra,
    /// The last of 2^b codes means zero: fits b bits.
    Last,
}

impl ZeroCode {
    /// The static cost of 2^b codes, or one more.
    pub fn cost(self, bits: BitWidth) -> OperandCost {
        match self {
            Self::Extra => OperandCost::with_extra_symbol(bits),
            Self::Last => OperandCost::of_grid(bits),
        }
    }

    /// The largest exponent that is not zero.
    pub fn last_exponent(self, bits: BitWidth) -> f64 {
        match self {
            Self::Extra => bits.max_code(),
            Self::Last => bits.max_code() - 1.0,
        }
    }
}

/// Which rows share a maximum: rows over all heads, regrouped windows .
#[derive(Clone, Debug)]
pub struct Log2Row {
    bits: BitWidth,
    zero_code: ZeroCode,
    layout: TokenLayout,
    stairs: Arc<Once<(Staircase, Values)>>,
}

impl Log2Row {
    /// A log2 grid of `bits` bits over the rows of `layout`.
    pub fn new(bits: BitWidth, zero_code: ZeroCode, layout: TokenLayout) -> Self {
        Self { bits, zero_code, layout, stairs: Arc::default() }
    }

    /// Restores a stored quantizer.
    ///
    /// # Errors
    /// `CorruptArtifact` when the state is incomplete.
    pub fn restore(state: &QuantizerState) -> Result<Self> {
        let zero_code = if state.read_scalar("zero_code_last")? == 0.0 {
            ZeroCode::Extra
        } else {
            ZeroCode::Last
        };
        let layout = TokenLayout::restore(state)?;
        Ok(Self::new(state.read_bits()?, zero_code, layout))
    }

    /// Largest exponent that is not zero.
    fn last_exponent(&self) -> f64 {
        self.zero_code.last_exponent(self.bits)
    }

    /// Row maxima and unclamped exponents in token layout [images, tokens, features].
    fn exponents(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let tokens = self.layout.to_tokens(x)?;
        let delta = tokens.f_amax([-1i64].as_slice(), true)?;
        let ratio = tokens.f_div(&delta)?.f_clamp_min(MIN_RATIO)?;
        Ok((delta, exponent_of(&ratio)?))
    }

    /// Powers of two by the number of exponents that a ratio has left behind.
    fn stairs(&self) -> Option<&(Staircase, Values)> {
        self.stairs.get(|| Ok(self.new_stairs()))
    }

    fn new_stairs(&self) -> Option<(Staircase, Values)> {
        let thresholds = RATIOS.get(|| {
            let passed = |ratio: &Tensor| -> Result<Tensor> {
                let left = exponent_of(ratio)?.f_neg()?.f_add_scalar(LARGEST_EXPONENT + 1.0)?;
                Ok(left.f_clamp(0.0, LARGEST_EXPONENT + 1.0)?)
            };
            thresholds(MIN_RATIO as f32, LARGEST_EXPONENT as usize + 1, passed)
        })?;
        let last = self.last_exponent().min(LARGEST_EXPONENT) as usize;
        let kept = thresholds.get(thresholds.len().checked_sub(last + 1)?..)?;
        let powers = (0..=last + 1).map(|steps| (steps as f32 - (last + 1) as f32).exp2());
        let stairs = Staircase::new(kept.to_vec(), Passed::AtLeast)?;
        Some((stairs, values_of(&powers.collect::<Vec<f32>>())))
    }
}

/// e of x/Δ.
fn exponent_of(ratio: &Tensor) -> Result<Tensor> {
    round_straight_through(&ratio.f_log2()?.f_neg()?)
}

impl Log2Row {
    /// Δ of every row in memory.
    fn row_maxima(&self, x: &Tensor, dense: &Dense) -> Result<Vec<f32>> {
        let layout = self.layout.in_memory(x, dense)?;
        let tokens: Vec<f32> = layout
            .extents(Strided::dense(dense.values()?, layout.width))
            .iter()
            .map(|extent| extent.high)
            .collect();
        Ok(layout.of_rows(&tokens))
    }
}

impl Quantizer for Log2Row {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    // By comparison with the ratios at which the exponent changes.
    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(dense) = Dense::in_order(x)? else { return Ok(None) };
        let Some((stairs, values)) = self.stairs() else { return Ok(None) };
        let largest = self.row_maxima(x, &dense)?;
        let (width, least_ratio) = (dense.width(), MIN_RATIO as f32);
        let rows = Rows { width, largest: &largest, least_ratio };
        Ok(Some(dense.map(|x, out| stairs.map_rows(x, rows, values, out))?))
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (delta, exponent) = self.exponents(x)?;
        let value =
            exponent.f_clamp(0.0, self.last_exponent())?.f_neg()?.f_exp2()?.f_mul(&delta)?;
        let kept = exponent.f_le(self.last_exponent())?;
        let value = value.f_where_self(&kept, &value.f_zeros_like()?)?;
        self.layout.from_tokens(&value, x)
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        match self.relative_stairs(shape4(x)?)? {
            Some(stairs) => Rounded::stairs(x, &stairs),
            None => Ok(None),
        }
    }

    fn relative_stairs(&self, shape: [i64; 4]) -> Result<Option<Stairs<'_>>> {
        let Some((stairs, values)) = self.stairs() else { return Ok(None) };
        let beyond = stairs.len() as i64; // the exponent of no step
        let exponent = |steps: u8| (steps > 0).then_some(beyond - i64::from(steps));
        Ok(Some(Stairs {
            stairs,
            values,
            relative: Some((self.layout.on_gpu(shape)?, MIN_RATIO as f32)),
            planes: Plane::powers(0..=beyond - 1, 1.0, exponent),
        }))
    }

    // Bytes by comparison, as [`Log2Row::fake_quantize_in_a_pass`].
    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let Some(dense) = Dense::rows(x)? else { return Ok(None) };
        let Some((stairs, _)) = self.stairs() else { return Ok(None) };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let (values, largest) = (dense.values()?, self.row_maxima(x, &dense)?);
        let (width, least_ratio) = (dense.width(), MIN_RATIO as f32);
        let counts = stairs.count_rows(values, Rows { width, largest: &largest, least_ratio });
        let beyond = stairs.len() as i64; // the exponent of no step
        let last = self.last_exponent() as i64;
        let largest_exponent = LazyCell::new(|| {
            least_above_zero(&counts).map_or(0, |steps| beyond - i64::from(steps))
        });
        for first in (0..=last).step_by(TERM_EXPONENTS as usize) {
            let end = (first + TERM_EXPONENTS - 1).min(last);
            let inside = |steps: u8| {
                let exponent = beyond - i64::from(steps);
                (steps > 0 && (first..=end).contains(&exponent)).then_some(end - exponent)
            };
            if first > 0 && first > *largest_exponent {
                break;
            }
            let factor = 2f64.powi(-i32::try_from(end).unwrap_or(i32::MAX)) as f32;
            let scale = largest.iter().map(|largest| largest * factor).collect();
            let code = |steps: u8| inside(steps).map_or(0, |power| 1 << power);
            planes.push_steps((&counts, stairs.len()), code, scale);
        }
        recycle(counts);
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (delta, exponent) = self.exponents(x)?;
        let exponent = exponent.f_clamp_min(0.0)?;
        let last = self.last_exponent() as i64;
        let mut terms = Vec::new();
        // Exponents first..=first + 14 become integers 2^(first + 14 − e), scaled by 2^−(first + 14).
        for first in (0..=last).step_by(TERM_EXPONENTS as usize) {
            let end = (first + TERM_EXPONENTS - 1).min(last);
            let inside = exponent.f_ge(first)?.f_logical_and(&exponent.f_le(end)?)?;
            if first > 0 && inside.f_any()?.f_int64_value(&[])? == 0 {
                continue;
            }
            let code = exponent.f_neg()?.f_add_scalar(end)?.f_exp2()?;
            let code = code.f_where_self(&inside, &code.f_zeros_like()?)?;
            let scale = delta.f_mul_scalar(2f64.powi(-i32::try_from(end).unwrap_or(i32::MAX)))?;
            let scale = self.layout.from_token_parameters(&scale, x)?;
            terms.push(IntTerm {
                codes: self.layout.from_tokens(&code, x)?.f_to_kind(Kind::Int)?,
                zero_point: scale.f_zeros_like()?.f_to_kind(Kind::Int)?,
                scale,
            });
        }
        Ok(Some(terms))
    }

    fn code_bits(&self) -> u32 {
        (self.last_exponent() as u32 + 1).min(TERM_EXPONENTS as u32)
    }

    fn state(&self) -> QuantizerState {
        let last = f64::from(u8::from(self.zero_code == ZeroCode::Last));
        self.layout.store(QuantizerState::new(KIND, self.bits).scalar("zero_code_last", last))
    }

    /// A float32 maximum per token, found by one comparison per element.
    fn cost(&self, shape: &[i64]) -> OperandCost {
        OperandCost {
            metadata_bits: SCALE_BITS * self.layout.token_count(shape),
            operations: elements(shape),
            ..self.zero_code.cost(self.bits)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;

    fn scores(shape: &[i64]) -> Tensor {
        (laws::sample(shape, 5) * 6.0).softmax(-1, Kind::Float)
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for (layout, shape) in [
            (TokenLayout::PLAIN, [2, 3, 9, 9]),
            (TokenLayout::PLAIN, [1, 3, 197, 197]),
            (TokenLayout::PER_HEAD, [2, 3, 7, 5]),
            (TokenLayout::regrouped(4), [8, 2, 6, 6]),
        ] {
            for bits in [3, 4, 5, 8] {
                for zero in [ZeroCode::Extra, ZeroCode::Last] {
                    let q = Log2Row::new(BitWidth::new(bits, "bits").unwrap(), zero, layout);
                    assert!(q.stairs().is_some());
                    // Scores are not negative. (Beside negative values it would matter which sign
                    // libtorch gives to a largest value of zero.)
                    let definition = |x: &Tensor| q.fake_quantize_by_tensors(&x.abs());
                    laws::pass_is_exact(&shape, |x| q.fake_quantize(&x.abs()), definition);
                }
            }
        }
    }

    /// Every float around every step, against the logarithm itself.
    #[test]
    fn steps_are_where_the_logarithm_has_them() {
        let q = Log2Row::new(BitWidth::EIGHT, ZeroCode::Extra, TokenLayout::PLAIN);
        for exponent in 0..28 {
            let step = (-0.5 - exponent as f32).exp2();
            let near: Vec<f32> =
                (0..4096u32).map(|i| f32::from_bits(step.to_bits() - 2048 + i)).collect();
            let x = Tensor::from_slice(&[&[1.0], &near[..]].concat()).view([1, 1, 1, -1]);
            let (found, expected) = (q.fake_quantize(&x), q.fake_quantize_by_tensors(&x));
            assert!(found.unwrap().equal(&expected.unwrap()), "{exponent}");
        }
    }

    #[test]
    fn planes_are_those_of_the_terms() {
        let x: Vec<f32> = (0..260).map(|i| (-0.1 * i as f32).exp2()).collect();
        let x = Tensor::from_slice(&x).view([1, 1, 1, -1]);
        for bits in 3..=8 {
            for zero in [ZeroCode::Extra, ZeroCode::Last] {
                let q =
                    Log2Row::new(BitWidth::new(bits, "bits").unwrap(), zero, TokenLayout::PLAIN);
                laws::planes_add_up(&q, &x);
            }
        }
    }

    #[test]
    fn laws_hold_with_and_without_windows() {
        for (windows, layout) in [(1, TokenLayout::PLAIN), (4, TokenLayout::regrouped(4))] {
            let x = scores(&[2 * windows, 3, 6, 6]);
            for bits in 3..=8 {
                for zero in [ZeroCode::Extra, ZeroCode::Last] {
                    let q = Log2Row::new(BitWidth::new(bits, "bits").unwrap(), zero, layout);
                    laws::terms_add_up(&q, &x);
                    laws::images_are_independent(&q, &x, windows);
                    laws::state_round_trips(&q, &x);
                }
            }
        }
    }

    #[test]
    fn small_scores_become_zero_and_the_maximum_is_exact() {
        let x = Tensor::from_slice(&[0.5f32, 0.5 * 2f32.powi(-7), 0.5 * 2f32.powi(-8), 0.0])
            .view([1, 1, 1, 4]);
        let bits = BitWidth::new(3, "bits").unwrap();
        let values = |zero| {
            let q = Log2Row::new(bits, zero, TokenLayout::PLAIN);
            crate::tensor::to_vec_f32(&q.fake_quantize(&x).unwrap()).unwrap()
        };
        assert_eq!(values(ZeroCode::Extra), [0.5, 0.5 * 2f32.powi(-7), 0.0, 0.0]);
        assert_eq!(values(ZeroCode::Last), [0.5, 0.0, 0.0, 0.0]);
    }
}
