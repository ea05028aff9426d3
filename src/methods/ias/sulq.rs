//! The static shift-uniform-log2 quantizer of attention scores (methods/ias-vit.md, section 1):
//! y = log2(x + η), q = clamp(round((y − low)/δ), 0, n), E = round(q·δ + low), x̂ = 2^E − η.
//!
//! Codes are uniform in the logarithm, and each decodes to an integer exponent, so x̂ is a power of
//! two less a constant. Some codes share an exponent.

use std::sync::Arc;

use std::f64::consts::LN_2;

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::cuda::{Plane, Rounded, Stairs};
use crate::kernels::passes::staircase::{MAX_STEPS, Passed, Staircase, Values, values_of};
use crate::quant::cost::OperandCost;
use crate::quant::dense::Dense;
use crate::quant::once::Once;
use crate::quant::planes::Planes;
use crate::quant::steps::thresholds;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState, Slope};
use crate::tensor::{round_straight_through, to_vec_f32};

/// Kind name in artifacts.
pub(super) const KIND: &str = "shift_uniform_log2";

/// Shifts η that are tried, in this order (the released code's constants).
const SHIFTS: [f64; 11] = [0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0];

/// Error that the first shift has to beat (the released code's constant).
const FIRST_INCUMBENT: f64 = 1e10;

/// Powers of two that fit an integer term: 2^0..2^14, so products stay within 32 bits.
const TERM_EXPONENTS: f64 = 15.0;

/// Number of levels of the grid in use. The search scores 2^b levels in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Levels {
    /// 2^b, as scored: fits b bits.
    Corrected,
    /// 2^b + 1, on a finer grid than the scored one, as the released code infers.
    Released,
}

/// A grid that is uniform in log2(x + η).
#[derive(Clone, Debug)]
pub(super) struct ShiftUniformLog2 {
    bits: BitWidth,
    levels: Levels,
    /// η, a float32 value.
    shift: f64,
    /// Least log2(x + η) of the calibration, a float32 value.
    low: f64,
    /// Largest log2(x + η) of the calibration, a float32 value.
    high: f64,
    stairs: Arc<Once<(Staircase, Values)>>,
}

impl ShiftUniformLog2 {
    /// Searches η for scores `x`, all of them at least 0.
    pub(super) fn search(x: &Tensor, bits: BitWidth, levels: Levels) -> Result<Self> {
        let (mut best, mut least) = (None, FIRST_INCUMBENT);
        for shift in SHIFTS {
            let shift = f64::from(shift as f32);
            let logarithms = logarithms(x, shift)?;
            let (low, high) = (logarithms.f_min()?, logarithms.f_max()?);
            let (low, high) = (low.f_double_value(&[])?, high.f_double_value(&[])?);
            let stairs = Arc::default();
            let candidate = Self { bits, levels: Levels::Corrected, shift, low, high, stairs };
            let difference = candidate.fake_quantize(x)?.f_sub(x)?;
            let error = difference.f_square()?.f_mean(Kind::Double)?.f_double_value(&[])?;
            if error < least {
                (best, least) = (Some(candidate), error);
            }
        }
        let best = best.ok_or_else(|| Error::invalid("calibration", "scores are not finite"))?;
        Ok(Self { levels, stairs: Arc::default(), ..best })
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let levels = if state.read_scalar("levels_released")? == 0.0 {
            Levels::Corrected
        } else {
            Levels::Released
        };
        let (low, high) = (state.read_scalar("low")?, state.read_scalar("high")?);
        let shift = state.read_scalar("shift")?;
        if shift <= 0.0 || low > high {
            let reason = format!("a log2 grid from {low} to {high} with shift {shift}");
            return Err(Error::corrupt("artifact", reason));
        }
        let stairs = Arc::default();
        Ok(Self { bits: state.read_bits()?, levels, shift, low, high, stairs })
    }

    /// Largest code n.
    fn last_code(&self) -> f64 {
        match self.levels {
            Levels::Corrected => self.bits.max_code(),
            Levels::Released => self.bits.max_code() + 1.0,
        }
    }

    /// δ in float32, as the released code computes it.
    fn step(&self) -> f64 {
        f64::from((self.high as f32 - self.low as f32) / self.last_code() as f32)
    }

    /// The only value of a grid without extent: scores that were all equal.
    fn constant(&self) -> Option<f64> {
        (self.step() == 0.0).then(|| self.low.exp2() - self.shift)
    }

    /// E of each element.
    fn exponents(&self, x: &Tensor) -> Result<Tensor> {
        let scaled =
            logarithms(x, self.shift)?.f_sub_scalar(self.low)?.f_div_scalar(self.step())?;
        let codes = round_straight_through(&scaled)?.f_clamp(0.0, self.last_code())?;
        round_straight_through(&codes.f_mul_scalar(self.step())?.f_add_scalar(self.low)?)
    }

    /// The values at which E rises by one, and what they decode to; below −η there is no logarithm.
    fn stairs(&self) -> Option<&(Staircase, Values)> {
        if self.constant().is_some() {
            return None;
        }
        self.stairs.get(|| {
            let bottom = -self.shift as f32;
            let least = to_vec_f32(&self.exponents(&Tensor::f_from_slice(&[bottom])?)?)?[0];
            let passed = |x: &Tensor| -> Result<Tensor> {
                Ok(self.exponents(x)?.f_sub_scalar(f64::from(least))?)
            };
            let Some(steps) = thresholds(bottom, MAX_STEPS, passed)? else {
                return Ok(None);
            };
            let points: Vec<f32> = std::iter::once(bottom).chain(steps).collect();
            let mut values = vec![f32::NAN];
            let decoded = self.fake_quantize_by_tensors(&Tensor::f_from_slice(&points)?)?;
            values.extend(to_vec_f32(&decoded)?);
            Ok(Staircase::new(points, Passed::AtLeast).map(|stairs| (stairs, values_of(&values))))
        })
    }

    /// Least and largest E.
    fn exponent_range(&self) -> (f64, f64) {
        let exponent = |code: f64| (code * self.step() + self.low).round_ties_even();
        (exponent(0.0), exponent(self.last_code()))
    }
}

/// log2(x + η) as the quotient of natural logarithms, which is how the released code rounds it.
fn logarithms(x: &Tensor, shift: f64) -> Result<Tensor> {
    Ok(x.f_add_scalar(shift)?.f_log()?.f_div_scalar(LN_2)?)
}

impl Quantizer for ShiftUniformLog2 {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        Dense::climb(x, self.stairs())
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        if let Some(value) = self.constant() {
            return Ok(x.f_full_like(value)?);
        }
        Ok(self.exponents(x)?.f_exp2()?.f_sub_scalar(self.shift)?)
    }

    fn slope(&self, x: &Tensor, x_hat: &Tensor) -> Result<Option<Slope>> {
        if self.constant().is_some() {
            return Ok(None);
        }
        // x̂ + η is 2^(log2(x + η) + e) with e what the roundings change, between the ends of the grid.
        let shifted = x.f_add_scalar(self.shift)?;
        let end = |code: f64| (code * self.step() + self.low).exp2();
        let (first, last) = (end(-0.5), end(self.last_code() + 0.5));
        let inside = shifted.f_ge(first)?.f_logical_and(&shifted.f_le(last)?)?;
        let mut slope = x_hat.f_add_scalar(self.shift)?.f_div_(&shifted)?;
        Ok(Some(Slope::Each(slope.f_mul_(&inside)?)))
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        match self.static_stairs() {
            Some(stairs) => Rounded::stairs(x, &stairs),
            None => Ok(None),
        }
    }

    fn static_stairs(&self) -> Option<Stairs<'_>> {
        let (stairs, values) = self.stairs()?;
        let (least, largest) = self.exponent_range();
        let mut planes = Vec::new();
        if largest - least < TERM_EXPONENTS {
            let span = (largest - least) as i64;
            planes = Plane::powers(0..=span, largest.exp2(), |steps| {
                (steps > 0).then(|| span + 1 - i64::from(steps))
            });
            planes.push(Plane { codes: [1; 256], factor: -self.shift as f32 });
        }
        Some(Stairs { stairs, values, relative: None, planes })
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let (least, largest) = self.exponent_range();
        if self.constant().is_some() || largest - least >= TERM_EXPONENTS {
            return Ok(None);
        }
        let (Some(dense), Some((stairs, _))) = (Dense::rows(x)?, self.stairs()) else {
            return Ok(None);
        };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let counts = stairs.count_all(dense.values()?);
        let code = |steps: u8| if steps == 0 { 0 } else { 1 << (u32::from(steps - 1)).min(31) };
        planes.push_steps((&counts, stairs.len()), code, planes.repeated(least.exp2() as f32));
        let shift = planes.repeated(self.shift as f32);
        planes.push_constant(shift);
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let ones = vec![1i64; x.dim()];
        let parameter = |value: f64, kind: Kind| -> Result<Tensor> {
            Ok(Tensor::f_full(ones.as_slice(), value, (kind, x.device()))?)
        };
        // scale·(0 − 1) = −scale, for every element.
        let constant = |value: f64| -> Result<IntTerm> {
            Ok(IntTerm {
                codes: x.f_zeros_like()?.f_to_kind(Kind::Int)?,
                scale: parameter(-value, Kind::Float)?,
                zero_point: parameter(1.0, Kind::Int)?,
            })
        };
        if let Some(value) = self.constant() {
            return Ok(Some(vec![constant(value)?]));
        }
        let (least, largest) = self.exponent_range();
        if largest - least >= TERM_EXPONENTS {
            return Ok(None);
        }
        let powers = IntTerm {
            codes: self.exponents(x)?.f_sub_scalar(least)?.f_exp2()?.f_to_kind(Kind::Int)?,
            scale: parameter(least.exp2(), Kind::Float)?,
            zero_point: parameter(0.0, Kind::Int)?,
        };
        Ok(Some(vec![powers, constant(-self.shift)?]))
    }

    fn code_bits(&self) -> u32 {
        if self.constant().is_some() {
            return 1;
        }
        let (least, largest) = self.exponent_range();
        (largest - least) as u32 + 1
    }

    fn state(&self) -> QuantizerState {
        let released = f64::from(u8::from(self.levels == Levels::Released));
        QuantizerState::new(KIND, self.bits)
            .scalar("levels_released", released)
            .scalar("shift", self.shift)
            .scalar("low", self.low)
            .scalar("high", self.high)
    }

    fn cost(&self, _shape: &[i64]) -> OperandCost {
        match self.levels {
            Levels::Corrected => OperandCost::of_grid(self.bits),
            Levels::Released => OperandCost::with_extra_symbol(self.bits),
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::quant::uniform::laws;
    use crate::tensor::{to_vec_f32, to_vec_f64};

    const BOTH: [Levels; 2] = [Levels::Corrected, Levels::Released];

    fn width(bits: u32) -> BitWidth {
        BitWidth::new(bits, "bits").unwrap()
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        let x = (laws::sample(&[2, 3, 50, 50], 5) * 6.0).softmax(-1, Kind::Float);
        for levels in BOTH {
            for bits in [3, 4, 8] {
                let q = ShiftUniformLog2::search(&x, width(bits), levels).unwrap();
                let Some((stairs, _)) = q.stairs() else { panic!("no steps at {bits} bits") };
                let steps: Vec<f32> = stairs.thresholds().to_vec();
                let near = steps.iter().flat_map(|t| {
                    (0..512u32).map(|i| f32::from_bits((t.to_bits() + i).saturating_sub(256)))
                });
                let near = Tensor::from_slice(&near.collect::<Vec<f32>>());
                let (found, expected) = (q.fake_quantize(&near), q.fake_quantize_by_tensors(&near));
                let (found, expected) = (found.unwrap(), expected.unwrap());
                assert!(found.nan_to_num(7.0, 7.0, 7.0).equal(&expected.nan_to_num(7.0, 7.0, 7.0)));
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
            for levels in BOTH {
                let found = ShiftUniformLog2::search(&x, width(bits), levels).unwrap();
                laws::terms_add_up(&found, &x);
                laws::images_are_independent(&found, &x, 1);
                laws::state_round_trips(&found, &x);
                laws::planes_add_up(&found, &x);
            }
        }
    }

    #[test]
    fn it_is_monotone_and_its_levels_are_powers_less_the_shift() {
        let x = Tensor::linspace(0.0, 1.0, 4001, (Kind::Float, Device::Cpu));
        for (levels, most) in BOTH.into_iter().zip([8, 9]) {
            let grid = ShiftUniformLog2::search(&x, width(3), levels).unwrap();
            let y = grid.fake_quantize(&x).unwrap();
            assert!(y.diff::<Tensor>(1, -1, None, None).min().double_value(&[]) >= 0.0);
            let mut values = to_vec_f32(&y).unwrap();
            values.dedup();
            assert!(values.len() <= most, "{values:?}");
            for value in values {
                let exponent = (f64::from(value) + grid.shift).log2();
                assert!((exponent - exponent.round()).abs() < 1e-4, "{value}");
            }
        }
    }

    #[test]
    fn equal_scores_are_exact() {
        for value in [0.0, 1.0, 0.02] {
            let x = Tensor::full([1, 1, 2, 3], value, (Kind::Float, Device::Cpu));
            let found = ShiftUniformLog2::search(&x, width(4), Levels::Corrected).unwrap();
            assert!(found.fake_quantize(&x).unwrap().allclose(&x, 1e-5, 1e-8, false));
            laws::terms_add_up(&found, &x);
            laws::state_round_trips(&found, &x);
        }
    }

    /// Without its two roundings the quantizer is the identity between its ends, and constant beyond.
    #[test]
    fn gradients_are_those_of_the_smooth_part() {
        let grid = ShiftUniformLog2 {
            bits: width(4),
            levels: Levels::Corrected,
            shift: 0.01,
            low: -5.0,
            high: -0.5,
            stairs: Arc::default(),
        };
        let x = Tensor::from_slice(&[0.001f64, 0.03, 0.1, 0.35, 0.6, 0.99]).set_requires_grad(true);
        let y = grid.fake_quantize(&x).unwrap();
        y.sum(Kind::Double).backward();
        let (x_hat, gradient) = (to_vec_f64(&y.detach()).unwrap(), to_vec_f64(&x.grad()).unwrap());
        for (index, x) in to_vec_f64(&x.detach()).unwrap().into_iter().enumerate() {
            // x̂ as a function of x with both rounding errors frozen: 2^(log2(x + η) + e) − η.
            let error = (x_hat[index] + grid.shift).log2() - (x + grid.shift).log2();
            let smooth = |x: f64| ((x + grid.shift).log2() + error).exp2() - grid.shift;
            let inside = (-5.0..=-0.5).contains(&(x + grid.shift).log2());
            let slope = if inside { (smooth(x + 1e-6) - smooth(x - 1e-6)) / 2e-6 } else { 0.0 };
            assert!((gradient[index] - slope).abs() < 1e-5, "{x}: {} {slope}", gradient[index]);
        }
        assert_eq!(gradient.iter().filter(|slope| **slope == 0.0).count(), 2);
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        let x = (laws::sample(&[2, 3, 50, 50], 5) * 6.0).softmax(-1, Kind::Float);
        for levels in BOTH {
            // Fitted to the smaller half, so that some are beyond.
            let q = ShiftUniformLog2::search(&x.clamp_max(0.02), width(4), levels).unwrap();
            laws::gradients_agree(&q, &x);
        }
    }

    #[test]
    fn a_grid_upside_down_is_corrupt() {
        let x = Tensor::linspace(0.0, 1.0, 9, (Kind::Float, Device::Cpu));
        let mut state = ShiftUniformLog2::search(&x, width(4), Levels::Released).unwrap().state();
        state.scalars.insert("high".to_owned(), -100.0);
        assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
    }
}
