//! The static log√2 quantizer of attention scores (methods/repq-vit.md, section 2):
//! e = round(−2·log2(x/Δ)), x̂ = Δ·2^(−e/2), 0 where e does not fit.
//!
//! With j = ⌈e/2⌉, x̂ = Δ·2^(−j)·(√2 if e is odd): powers of two with one of two scales, so even and
//! odd exponents are two integer terms. Scores that cannot move a float32 sum with the largest of their
//! row are left out of these.

use std::cell::LazyCell;
use std::f64::consts::SQRT_2;
use std::sync::Arc;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::codes::recycle;
use crate::kernels::cuda::{Plane, Rounded, Stairs};
use crate::kernels::fused::RowEncoder;
use crate::kernels::passes::staircase::{
    Passed, Staircase, Values, keep_near_largest, least_above_zero, values_of,
};
use crate::quant::cost::OperandCost;
use crate::quant::dense::Dense;
use crate::quant::encode::is_taken;
use crate::quant::log2::ZeroCode;
use crate::quant::once::Once;
use crate::quant::planes::Planes;
use crate::quant::search::{MIN_SCALE, percentile_range};
use crate::quant::steps::thresholds;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::{round_straight_through, to_vec_f32};

use super::PERCENTILES;

/// Kind name in artifacts.
pub(super) const KIND: &str = "log_sqrt2";

/// Powers of two covered by one integer term: 2^0..2^14 fit 15 bits, so products stay within 32.
const TERM_EXPONENTS: i64 = 15;

/// Smallest float32 above zero, 2^−149: below every level, and its logarithm is finite.
const TINY: f64 = 1.401_298_464_324_817e-45;

/// The exponent of 2^−126, the smallest normal float32: levels below it count as zero.
const LARGEST_EXPONENT: f64 = 252.0;

/// Exponents below the row's largest from which on scores are left out of integer products. A row of
/// 2^9 scores of 2^−30 of its largest adds less than the last bit of a float32 sum with it.
const NEGLIGIBLE: u8 = 60;

/// A logarithmic grid with base √2 below a static largest value.
#[derive(Clone, Debug)]
pub(super) struct LogSqrt2 {
    bits: BitWidth,
    zero_code: ZeroCode,
    /// Δ, a float32 value.
    largest: f64,
    stairs: Arc<Once<(Staircase, Values)>>,
}

impl LogSqrt2 {
    fn new(bits: BitWidth, zero_code: ZeroCode, largest: f64) -> Self {
        Self { bits, zero_code, largest, stairs: Arc::default() }
    }

    /// Searches Δ among the percentiles of `x`.
    pub(super) fn search(x: &Tensor, bits: BitWidth, zero_code: ZeroCode) -> Result<Self> {
        let rows = x.f_reshape([1, -1])?;
        let candidate = |high: &Tensor| -> Result<Self> {
            Ok(Self::new(bits, zero_code, high.f_double_value(&[0, 0])?))
        };
        let range = percentile_range(&rows, &PERCENTILES, |range| {
            candidate(&range.high)?.fake_quantize(&rows)
        })?;
        // Δ = 0 fits scores that are all zero; any other grid holds them as well.
        candidate(&range.high.f_clamp_min(MIN_SCALE)?)
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let zero_code = if state.read_scalar("zero_code_last")? == 0.0 {
            ZeroCode::Extra
        } else {
            ZeroCode::Last
        };
        let largest = state.read_scalar("largest")?;
        if largest <= 0.0 {
            return Err(Error::corrupt("artifact", format!("a log√2 grid ends at {largest}")));
        }
        Ok(Self::new(state.read_bits()?, zero_code, largest))
    }

    /// Largest exponent that is not zero.
    fn last_exponent(&self) -> f64 {
        self.zero_code.last_exponent(self.bits).min(LARGEST_EXPONENT)
    }

    /// Unclamped exponents e.
    fn exponents(&self, x: &Tensor) -> Result<Tensor> {
        let ratio = x.f_div_scalar(self.largest)?.f_clamp_min(TINY)?;
        round_straight_through(&ratio.f_log2()?.f_mul_scalar(-2.0)?)
    }
}

impl LogSqrt2 {
    /// Δ·2^(−e/2) of exponents 0, 1, ….
    fn power(&self, exponent: &Tensor) -> Result<Tensor> {
        // 2^(−j) is exact; 2^(−e/2) would not be, nor the same in every lane of a vector register.
        let factor = exponent.f_remainder(2.0)?.f_mul_scalar(SQRT_2 - 1.0)?.f_add_scalar(1.0)?;
        let power = exponent.f_mul_scalar(0.5)?.f_ceil()?.f_neg()?.f_exp2()?;
        Ok(power.f_mul(&factor)?.f_mul_scalar(self.largest)?)
    }

    /// The values at which the exponent falls by one, from beyond the last to 0, and what they decode
    /// to.
    fn stairs(&self) -> Option<&(Staircase, Values)> {
        self.stairs.get(|| {
            let last = self.last_exponent();
            let passed = |x: &Tensor| -> Result<Tensor> {
                Ok(self
                    .exponents(x)?
                    .f_neg()?
                    .f_add_scalar(last + 1.0)?
                    .f_clamp(0.0, last + 1.0)?)
            };
            let Some(steps) = thresholds(f32::NEG_INFINITY, last as usize + 1, passed)? else {
                return Ok(None);
            };
            let exponents: Vec<f32> = (0..=last as u32).rev().map(|e| e as f32).collect();
            let mut values = vec![0.0];
            values.extend(to_vec_f32(&self.power(&Tensor::f_from_slice(&exponents)?)?)?);
            Ok(Staircase::new(steps, Passed::AtLeast).map(|stairs| (stairs, values_of(&values))))
        })
    }

    /// Codes by comparison, without terms that are zero throughout; `None` where kernels take none.
    fn encode_rows(&self, x: &[f32], columns: usize) -> Option<Codes> {
        let (stairs, _) = self.stairs()?;
        let mut planes = Planes::new(x.len() / columns.max(1), columns, 1, self.code_bits())?;
        let mut counts = stairs.count_all(x);
        if stairs.len() > usize::from(NEGLIGIBLE) {
            keep_near_largest(&mut counts, columns, NEGLIGIBLE);
        }
        let beyond = self.last_exponent() as i64 + 1; // the exponent of no step
        let last = beyond / 2;
        let largest_exponent = LazyCell::new(|| {
            least_above_zero(&counts).map_or(0, |steps| beyond - i64::from(steps))
        });
        for (parity, factor) in [(0, 1.0), (1, SQRT_2)] {
            for first in (0..=last).step_by(TERM_EXPONENTS as usize) {
                let end = (first + TERM_EXPONENTS - 1).min(last);
                let inside = |steps: u8| {
                    let exponent = beyond - i64::from(steps);
                    let halved = (exponent + 1) / 2; // j
                    let here = exponent % 2 == parity && (first..=end).contains(&halved);
                    (steps > 0 && here).then_some(end - halved)
                };
                if first > 0 && 2 * first - parity > *largest_exponent {
                    break;
                }
                let power = 2f64.powi(-i32::try_from(end).unwrap_or(i32::MAX));
                let scale = planes.repeated((self.largest * factor * power) as f32);
                let code = |steps: u8| inside(steps).map_or(0, |power| 1 << power);
                planes.push_steps((&counts, stairs.len()), code, scale);
            }
        }
        recycle(counts);
        Some(planes.finish())
    }
}

impl RowEncoder for LogSqrt2 {
    fn encode(&self, rows: &[f32], columns: usize) -> Codes {
        // There is no encoder of rows that kernels do not take.
        self.encode_rows(rows, columns).unwrap_or_default()
    }
}

impl Quantizer for LogSqrt2 {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        Dense::climb(x, self.stairs())
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let exponent = self.exponents(x)?;
        let kept = exponent.f_le(self.last_exponent())?;
        let exponent = exponent.f_clamp(0.0, self.last_exponent())?;
        let mut value = self.power(&exponent)?;
        if x.requires_grad() {
            // The slope of Δ·2^(−e/2), which has no steps.
            let smooth = exponent.f_mul_scalar(-0.5)?.f_exp2()?.f_mul_scalar(self.largest)?;
            value = value.f_detach()?.f_add(&smooth.f_sub(&smooth.f_detach()?)?)?;
        }
        Ok(value.f_where_self(&kept, &value.f_zeros_like()?)?)
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        match self.static_stairs() {
            Some(stairs) => Rounded::stairs(x, &stairs),
            None => Ok(None),
        }
    }

    fn static_stairs(&self) -> Option<Stairs<'_>> {
        let (stairs, values) = self.stairs()?;
        let last = self.last_exponent() as i64;
        // Even exponents 2j and odd ones 2j − 1.
        let planes = [(0, 0..=last / 2, 1.0), (1, 1..=(last + 1) / 2, SQRT_2)];
        let planes = planes.into_iter().flat_map(|(parity, halved, factor)| {
            Plane::powers(halved, self.largest * factor, move |steps| {
                let exponent = last + 1 - i64::from(steps);
                (steps > 0 && exponent % 2 == parity).then_some((exponent + 1) / 2)
            })
        });
        Some(Stairs { stairs, values, relative: None, planes: planes.collect() })
    }

    fn row_encoder(&self, columns: usize) -> Option<Box<dyn RowEncoder>> {
        let taken = self.stairs().is_some() && is_taken(columns, 1, self.code_bits());
        taken.then(|| Box::new(self.clone()) as Box<dyn RowEncoder>)
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        match Dense::rows(x)? {
            Some(dense) => Ok(self.encode_rows(dense.values()?, dense.width())),
            None => Ok(None),
        }
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let exponent = self.exponents(x)?.f_clamp_min(0.0)?;
        let near =
            exponent.f_amin([-1i64].as_slice(), true)?.f_add_scalar(f64::from(NEGLIGIBLE))?;
        let kept =
            exponent.f_le(self.last_exponent())?.f_logical_and(&exponent.f_le_tensor(&near)?)?;
        let odd = exponent.f_remainder(2.0)?.f_gt(0.0)?;
        let halved = exponent.f_mul_scalar(0.5)?.f_ceil()?; // j
        let last = (self.last_exponent() as i64 + 1) / 2;
        let ones = vec![1i64; x.dim()];
        let mut terms = Vec::new();
        for (parity, factor) in [(odd.f_logical_not()?, 1.0), (odd, SQRT_2)] {
            let parity = parity.f_logical_and(&kept)?;
            // j in first..=end becomes the integer 2^(end − j), scaled by 2^−end.
            for first in (0..=last).step_by(TERM_EXPONENTS as usize) {
                let end = (first + TERM_EXPONENTS - 1).min(last);
                let inside = halved.f_ge(first)?.f_logical_and(&halved.f_le(end)?)?;
                let inside = inside.f_logical_and(&parity)?;
                if first > 0 && inside.f_any()?.f_int64_value(&[])? == 0 {
                    continue;
                }
                let code = halved.f_neg()?.f_add_scalar(end)?.f_exp2()?;
                let code = code.f_where_self(&inside, &code.f_zeros_like()?)?;
                let scale =
                    self.largest * factor * 2f64.powi(-i32::try_from(end).unwrap_or(i32::MAX));
                let scale = Tensor::f_full(ones.as_slice(), scale, (Kind::Float, x.device()))?;
                terms.push(IntTerm {
                    codes: code.f_to_kind(Kind::Int)?,
                    zero_point: scale.f_zeros_like()?.f_to_kind(Kind::Int)?,
                    scale,
                });
            }
        }
        Ok(Some(terms))
    }

    fn code_bits(&self) -> u32 {
        let last = (self.last_exponent() as u32).div_ceil(2);
        (last + 1).min(TERM_EXPONENTS as u32)
    }

    fn state(&self) -> QuantizerState {
        let last = f64::from(u8::from(self.zero_code == ZeroCode::Last));
        QuantizerState::new(KIND, self.bits)
            .scalar("zero_code_last", last)
            .scalar("largest", self.largest)
    }

    /// Even and odd exponents are summed apart.
    fn cost(&self, _shape: &[i64]) -> OperandCost {
        OperandCost { partial_sums: 2.0, ..self.zero_code.cost(self.bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;
    use crate::tensor::to_vec_f32;

    const BOTH: [ZeroCode; 2] = [ZeroCode::Extra, ZeroCode::Last];

    fn grid(bits: u32, zero_code: ZeroCode, largest: f64) -> LogSqrt2 {
        LogSqrt2::new(BitWidth::new(bits, "bits").unwrap(), zero_code, largest)
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for zero_code in BOTH {
            for (bits, largest) in [(3, 1.0), (4, f64::from(0.7f32)), (6, 0.031_25), (8, 0.9375)] {
                let q = grid(bits, zero_code, largest);
                let (stairs, _) = q.stairs().unwrap();
                let steps: Vec<f32> = stairs.thresholds().to_vec();
                let near = steps.iter().flat_map(|t| {
                    (0..512u32).map(|i| f32::from_bits((t.to_bits() + i).saturating_sub(256)))
                });
                let x = Tensor::from_slice(&near.collect::<Vec<f32>>());
                let (found, expected) = (q.fake_quantize(&x), q.fake_quantize_by_tensors(&x));
                assert!(found.unwrap().equal(&expected.unwrap()), "{bits}");
                for shape in [&[1i64, 1][..], &[2, 3, 7, 7], &[1, 3, 197, 197]] {
                    let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                    laws::pass_is_exact(shape, |x| q.fake_quantize(x), definition);
                }
            }
        }
    }

    #[test]
    fn laws_hold() {
        let x = (laws::sample(&[2, 3, 6, 6], 5) * 12.0).softmax(-1, Kind::Float);
        for bits in 3..=8 {
            for zero in BOTH {
                let found =
                    LogSqrt2::search(&x, BitWidth::new(bits, "bits").unwrap(), zero).unwrap();
                laws::terms_add_up(&found, &x);
                laws::images_are_independent(&found, &x, 1);
                laws::state_round_trips(&found, &x);
                if bits < 8 {
                    laws::planes_add_up(&found, &x); // more steps have no stairs
                }
                let once = found.fake_quantize(&x).unwrap();
                assert!(found.fake_quantize(&once).unwrap().equal(&once), "idempotent");
            }
        }
    }

    #[test]
    fn it_is_monotone_and_never_above_its_largest_value() {
        let x = Tensor::linspace(0.0, 1.0, 4001, (Kind::Float, tch::Device::Cpu));
        for zero in BOTH {
            let y = grid(4, zero, 0.75).fake_quantize(&x).unwrap();
            assert!(y.diff::<Tensor>(1, -1, None, None).min().double_value(&[]) >= 0.0);
            assert_eq!(y.max().double_value(&[]), 0.75);
        }
    }

    #[test]
    fn codes_in_a_pass_are_those_of_the_terms() {
        // Rows from level to steep, whose scores go down to nothing.
        let x = (laws::sample(&[2, 3, 9, 37], 5) * 100.0).softmax(-1, Kind::Float);
        let x = Tensor::cat(&[x.shallow_clone(), (x.log() * 0.01).softmax(-1, Kind::Float)], 0);
        for zero in BOTH {
            for bits in [3, 4, 6, 8] {
                let q = grid(bits, zero, 0.9);
                let found = q.encode_in_a_pass(&x).unwrap().unwrap();
                let expected = q.encode_by_tensors(&x).unwrap().unwrap();
                assert_eq!(found, expected, "{bits} bits");
            }
        }
    }

    #[test]
    fn odd_exponents_have_the_factor_and_zero_its_code() {
        let level = |e: i32| (0.5 * 2f64.powf(-0.5 * f64::from(e))) as f32;
        let x = [0.9f32, 0.5, level(1), level(2), level(6), level(7), level(8), 0.0];
        for (zero, last) in [(ZeroCode::Extra, level(7)), (ZeroCode::Last, 0.0)] {
            let q = grid(3, zero, 0.5);
            let y = to_vec_f32(&q.fake_quantize(&Tensor::from_slice(&x)).unwrap()).unwrap();
            let expected = [0.5, 0.5, level(1), 0.25, 0.0625, last, 0.0, 0.0];
            for (found, expected) in y.iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-7, "{y:?}");
            }
        }
    }

    #[test]
    fn gradients_are_those_of_the_identity_near_a_level() {
        let x = Tensor::from_slice(&[0.5f32, 0.25, 0.5 / SQRT_2 as f32, 0.0, 0.9])
            .set_requires_grad(true);
        grid(4, ZeroCode::Extra, 0.5).fake_quantize(&x).unwrap().sum(Kind::Float).backward();
        let gradient = to_vec_f32(&x.grad()).unwrap();
        for (found, expected) in gradient.iter().zip([1.0, 1.0, 1.0, 0.0, 0.0]) {
            assert!((found - expected).abs() < 1e-5, "{gradient:?}");
        }
    }

    #[test]
    fn scores_of_zero_have_a_grid() {
        let x = Tensor::zeros([1, 1, 2, 2], (Kind::Float, tch::Device::Cpu));
        let q = LogSqrt2::search(&x, BitWidth::EIGHT, ZeroCode::Extra).unwrap();
        assert!(q.fake_quantize(&x).unwrap().equal(&x));
        laws::state_round_trips(&q, &x);
    }

    #[test]
    fn a_grid_without_extent_is_corrupt() {
        let mut state = grid(4, ZeroCode::Last, 0.5).state();
        state.scalars.insert("largest".to_owned(), 0.0);
        assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
    }
}
