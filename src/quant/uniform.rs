//! The uniform affine quantizer with static scales:
//! q = clamp(round(x/δ) + z, 0, 2^b − 1), x̂ = (q − z)·δ.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::codes::buffer;
use crate::kernels::cuda::Rounded;
use crate::kernels::fused::codes_on;
use crate::kernels::passes::affine::{Grid, encode_whole};
use crate::quant::dense::Dense;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState, Slope, encode};
use crate::tensor::round_straight_through;

/// Kind name in artifacts.
pub const KIND: &str = "uniform";

/// Smallest scale of weights, from the platform's code (methods/ubb.md, section 1).
pub const MIN_WEIGHT_SCALE: f64 = 1e-10;

/// Largest zero point of integer forms, whose differences from codes then fit 32 bits. Others come from operands that
/// are nearly constant and far from zero.
const MAX_ZERO_POINT: f64 = (1 << 30) as f64;

/// Static affine grid, per tensor or per channel. Zero points are not clamped; a fractional one
/// (RepQ-ViT as released) runs in float and has no integer form.
#[derive(Debug)]
pub struct Uniform {
    bits: BitWidth,
    /// float32, broadcastable to the operand.
    scale: Tensor,
    /// float32, same shape.
    zero_point: Tensor,
    /// Whether every zero point is an integer, and one that kernels take.
    integral: bool,
}

/// A range to spread a grid over.
#[derive(Debug)]
pub struct Range {
    /// Smallest value, float32, broadcastable to the operand.
    pub low: Tensor,
    /// Largest value, same shape.
    pub high: Tensor,
}

impl Range {
    /// Minimum and maximum over the whole tensor, shape `[1]`.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn per_tensor(x: &Tensor) -> Result<Self> {
        Ok(Self { low: x.f_min()?.f_view([1])?, high: x.f_max()?.f_view([1])? })
    }

    /// Minimum and maximum over the last axis, which is kept with length 1.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn per_row(x: &Tensor) -> Result<Self> {
        Ok(Self {
            low: x.f_amin([-1i64].as_slice(), true)?,
            high: x.f_amax([-1i64].as_slice(), true)?,
        })
    }
}

impl Uniform {
    /// Spreads the 2^bits codes over `range`; no scale is smaller than `min_scale`.
    ///
    /// # Errors
    /// `InvalidArgument` when the range is not finite; `Device` when libtorch refuses.
    pub fn from_range(range: &Range, bits: BitWidth, min_scale: f64) -> Result<Self> {
        let scale =
            range.high.f_sub(&range.low)?.f_div_scalar(bits.max_code())?.f_clamp_min(min_scale)?;
        let zero_point = range.low.f_neg()?.f_div(&scale)?.f_round()?;
        Self::new(bits, scale, zero_point)
    }

    /// A grid with given parameters.
    ///
    /// # Errors
    /// `InvalidArgument` when a scale is not positive and finite or a zero point is not finite.
    pub fn new(bits: BitWidth, scale: Tensor, zero_point: Tensor) -> Result<Self> {
        let usable = scale
            .f_gt(0.0)?
            .f_logical_and(&scale.f_isfinite()?)?
            .f_logical_and(&zero_point.f_isfinite()?)?
            .f_all()?;
        if usable.f_int64_value(&[])? == 0 {
            return Err(Error::invalid("calibration", "a quantization range is not finite"));
        }
        let within = zero_point.f_abs()?.f_max()?.f_double_value(&[])? <= MAX_ZERO_POINT;
        let integral = within && zero_point.f_equal(&zero_point.f_round()?)?;
        Ok(Self { bits, scale, zero_point, integral })
    }

    /// Restores a stored grid.
    ///
    /// # Errors
    /// `CorruptArtifact` when the state is incomplete.
    pub fn restore(state: &QuantizerState) -> Result<Self> {
        let scale = state.read_tensor("scale")?;
        let zero_point = state.read_tensor("zero_point")?.f_to_kind(Kind::Float)?;
        Self::new(state.read_bits()?, scale, zero_point)
            .map_err(|e| Error::corrupt("artifact", e.to_string()))
    }

    /// float32 scale.
    pub fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// float32 zero point.
    pub fn zero_point(&self) -> &Tensor {
        &self.zero_point
    }

    /// float32 codes 0..2^bits − 1.
    fn codes(&self, x: &Tensor) -> Result<Tensor> {
        let grid = round_straight_through(&x.f_div(&self.scale)?)?.f_add(&self.zero_point)?;
        Ok(grid.f_clamp(0.0, self.bits.max_code())?)
    }
}

impl Quantizer for Uniform {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match Dense::of(x)? {
            Some(dense) => dense.quantize((&self.scale, &self.zero_point), self.bits.max_code()),
            None => Ok(None),
        }
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.codes(x)?.f_sub(&self.zero_point)?.f_mul(&self.scale)?)
    }

    fn slope(&self, _x: &Tensor, _x_hat: &Tensor) -> Result<Option<Slope>> {
        // Beyond the first and the last code, which a fractional zero point moves inwards.
        let first = self.zero_point.f_neg()?.f_ceil()?.f_sub_scalar(0.5)?;
        let last = self.zero_point.f_neg()?.f_add_scalar(self.bits.max_code())?;
        let last = last.f_floor()?.f_add_scalar(0.5)?;
        let (low, high) = (first.f_mul(&self.scale)?, last.f_mul(&self.scale)?);
        Ok(Some(Slope::Between { low, high }))
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        self.fixed_on_gpu(x)
    }

    fn fixed_on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        let (parameters, max_code) = ((&self.scale, &self.zero_point), self.bits.max_code());
        Rounded::fixed(x, parameters, max_code as f32, self.integral)
    }

    fn static_grid(&self) -> Option<Grid> {
        if !self.integral || self.scale.numel() != 1 || self.zero_point.numel() != 1 {
            return None;
        }
        let value = |x: &Tensor| Some(x.f_view([1]).ok()?.f_double_value(&[0]).ok()? as f32);
        let (scale, zero_point) = (value(&self.scale)?, value(&self.zero_point)?);
        Some(Grid { scale, zero_point, max_code: self.bits.max_code() as f32 })
    }

    // Bytes on one grid for the whole; `None` for other grids.
    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let (Some(grid), Some(dense)) = (self.static_grid(), Dense::rows(x)?) else {
            return Ok(None);
        };
        if !encode::is_taken(dense.width(), 1, self.code_bits()) {
            return Ok(None);
        }
        let x = dense.values()?;
        let mut codes = buffer(x.len());
        encode_whole(x, grid, &mut codes);
        Ok(Some(codes_on(grid, dense.width(), codes)))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        if !self.integral {
            return Ok(None);
        }
        // A scale per tensor [1] or channel [channels]; a term's parameters have the operand's rank.
        let shape = |t: &Tensor| -> Result<Tensor> {
            let mut shape = vec![1i64; x.dim().saturating_sub(t.dim())];
            shape.extend(t.size());
            Ok(t.f_view(shape.as_slice())?)
        };
        Ok(Some(vec![IntTerm {
            codes: self.codes(x)?.f_to_kind(Kind::Int)?,
            scale: shape(&self.scale)?,
            zero_point: shape(&self.zero_point)?.f_to_kind(Kind::Int)?,
        }]))
    }

    fn state(&self) -> QuantizerState {
        QuantizerState::new(KIND, self.bits)
            .tensor("scale", &self.scale)
            .tensor("zero_point", &self.zero_point)
    }
}

#[cfg(test)]
pub(crate) mod laws;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn laws_hold_per_tensor_and_per_channel() {
        let x = laws::sample(&[6, 5, 16], 1);
        for bits in 3..=8 {
            let bits = BitWidth::new(bits, "bits").unwrap();
            let q = Uniform::from_range(&Range::per_tensor(&x).unwrap(), bits, 1e-10).unwrap();
            laws::terms_add_up(&q, &x);
            laws::images_are_independent(&q, &x, 1);
            laws::state_round_trips(&q, &x);
            let once = q.fake_quantize(&x).unwrap();
            assert!(q.fake_quantize(&once).unwrap().allclose(&once, 1e-6, 1e-7, false));
            let worst = (&once - &x).abs().max().double_value(&[]);
            assert!(worst <= 0.5001 * q.scale().double_value(&[0]) + 1e-6, "{worst}");
        }
        // One grid per channel, shape [16]: the integer terms have the operand's rank all the same.
        let channels = x.reshape([-1, 16]).transpose(0, 1);
        let range = Range::per_row(&channels).unwrap();
        let range = Range { low: range.low.view([-1]), high: range.high.view([-1]) };
        let q = Uniform::from_range(&range, BitWidth::EIGHT, 1e-10).unwrap();
        laws::terms_add_up(&q, &x);
        laws::images_are_independent(&q, &x, 1);
        laws::state_round_trips(&q, &x);
        assert_eq!(q.quantize(&x).unwrap().unwrap()[0].scale.size(), [1, 1, 16]);
        let w = laws::sample(&[7, 12], 2);
        let q = Uniform::from_range(&Range::per_row(&w).unwrap(), BitWidth::EIGHT, 1e-10).unwrap();
        laws::terms_add_up(&q, &w);
        laws::state_round_trips(&q, &w);
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        let x = laws::sample(&[5, 7, 37], 3);
        for bits in [3, 4, 8] {
            let bits = BitWidth::new(bits, "bits").unwrap();
            let check = |q: &Uniform, shape: &[i64]| {
                let pass = |x: &Tensor| {
                    assert!(Dense::of(x)?.is_some());
                    q.fake_quantize(x)
                };
                laws::pass_is_exact(shape, pass, |x| q.fake_quantize_by_tensors(x));
            };
            let grid = |range: Range| Uniform::from_range(&range, bits, 1e-10).unwrap();
            let whole = grid(Range::per_tensor(&x).unwrap());
            for shape in [&[1i64, 1][..], &[5, 7, 37], &[3, 300, 65], &[2, 3, 5, 9]] {
                check(&whole, shape);
            }
            let by_channel = x.reshape([-1, 37]).transpose(0, 1);
            let range = Range::per_row(&by_channel).unwrap();
            check(
                &grid(Range { low: range.low.view([-1]), high: range.high.view([-1]) }),
                &[5, 7, 37],
            );
            check(&grid(range), &[37, 41]);
            // Several grids tried on one operand at once.
            let both = Tensor::from_slice(&[0.1f32, 0.2]).view([2, 1, 1]);
            let q = Uniform::new(bits, both.shallow_clone(), both.zeros_like()).unwrap();
            assert_eq!(q.fake_quantize(&x.narrow(0, 0, 1)).unwrap().size(), [2, 7, 37]);
            let high = x.narrow(0, 0, 1).abs().amax([-1i64].as_slice(), true); // [1, 7, 1]
            check(&grid(Range { low: -&high, high }), &[5, 7, 37]);
        }
        let parameter = |value: f32| Tensor::from_slice(&[value]);
        let q = Uniform::new(BitWidth::EIGHT, parameter(0.1), parameter(7.25)).unwrap();
        laws::pass_is_exact(&[3, 5, 8], |x| q.fake_quantize(x), |x| q.fake_quantize_by_tensors(x));
    }

    #[test]
    fn a_fractional_zero_point_has_no_integer_form() {
        let x = laws::sample(&[3, 5, 8], 6);
        let bits = BitWidth::new(4, "bits").unwrap();
        let parameter = |value: f32| Tensor::from_slice(&[value]);
        let q = Uniform::new(bits, parameter(0.1), parameter(7.25)).unwrap();
        assert!(q.quantize(&x).unwrap().is_none());
        laws::state_round_trips(&q, &x);
        laws::images_are_independent(&q, &x, 1);
        // Codes are clamped to 0..15 before the fraction is taken off again.
        let low = q.fake_quantize(&parameter(-9.0)).unwrap().double_value(&[0]);
        assert!((low + 0.725).abs() < 1e-6, "{low}");
        let q = Uniform::new(bits, parameter(0.1), parameter(7.0)).unwrap();
        laws::terms_add_up(&q, &x);
    }

    #[test]
    fn a_constant_far_from_zero_has_no_integer_form() {
        // A row of one value has the smallest scale and a zero point beyond 32 bits.
        let x = Tensor::stack(
            &[Tensor::full([8], 0.5, (Kind::Float, tch::Device::Cpu)), laws::sample(&[8], 7)],
            0,
        );
        let bits = BitWidth::new(4, "bits").unwrap();
        let grid = |x: &Tensor| {
            Uniform::from_range(&Range::per_row(x).unwrap(), bits, MIN_WEIGHT_SCALE).unwrap()
        };
        assert!(grid(&x).quantize(&x).unwrap().is_none());
        let x = x.narrow(0, 1, 1);
        assert!(grid(&x).quantize(&x).unwrap().is_some());
        let constant = Tensor::full([2, 8], 50.0, (Kind::Float, tch::Device::Cpu));
        let q = Uniform::from_range(&Range::per_tensor(&constant).unwrap(), bits, 1e-8).unwrap();
        assert!(q.static_grid().is_none());
    }

    #[test]
    fn it_is_monotone() {
        let x = Tensor::linspace(-3.0, 3.0, 101, (Kind::Float, tch::Device::Cpu));
        let bits = BitWidth::new(3, "bits").unwrap();
        let q = Uniform::from_range(&Range::per_tensor(&x).unwrap(), bits, 1e-10).unwrap();
        assert!(
            q.fake_quantize(&x).unwrap().diff::<Tensor>(1, -1, None, None).min().double_value(&[])
                >= 0.0
        );
    }

    #[test]
    fn gradients_vanish_outside_the_range() {
        let range =
            Range { low: Tensor::from_slice(&[-1.0f32]), high: Tensor::from_slice(&[1.0f32]) };
        let q = Uniform::from_range(&range, BitWidth::EIGHT, 1e-10).unwrap();
        let x = Tensor::from_slice(&[-2.0f32, 0.3, 2.0]).set_requires_grad(true);
        q.fake_quantize(&x).unwrap().sum(Kind::Float).backward();
        assert!(x.grad().allclose(&Tensor::from_slice(&[0.0f32, 1.0, 0.0]), 1e-6, 1e-6, false));
    }

    #[test]
    fn gradients_are_those_of_the_definition() {
        let x = laws::sample(&[6, 5, 16], 4);
        let bits = BitWidth::new(4, "bits").unwrap();
        let half = |range: Range| Range { low: range.low * 0.5, high: range.high * 0.5 };
        let whole = Uniform::from_range(&half(Range::per_tensor(&x).unwrap()), bits, 1e-10);
        laws::gradients_agree(&whole.unwrap(), &x);
        let channels = Range::per_row(&x.reshape([-1, 16]).transpose(0, 1)).unwrap();
        let channels = Range { low: channels.low.view([-1]), high: channels.high.view([-1]) };
        laws::gradients_agree(&Uniform::from_range(&half(channels), bits, 1e-10).unwrap(), &x);
        let weight = laws::sample(&[7, 12], 5);
        let rows = half(Range::per_row(&weight).unwrap());
        laws::gradients_agree(&Uniform::from_range(&rows, bits, 1e-10).unwrap(), &weight);
        let parameter = |value: f32| Tensor::from_slice(&[value]);
        let fractional = Uniform::new(bits, parameter(0.1), parameter(7.25)).unwrap();
        laws::gradients_agree(&fractional, &x);
    }

    #[test]
    fn a_non_finite_range_is_refused() {
        let x = Tensor::from_slice(&[1.0f32, f32::NAN]);
        assert!(
            Uniform::from_range(&Range::per_tensor(&x).unwrap(), BitWidth::EIGHT, 1e-10).is_err()
        );
    }
}
