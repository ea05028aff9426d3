//! The twin uniform quantizer of post-GELU values (methods/ptq4vit.md, section 3; paper, section 3.1):
//! x̂ = Δ⁺·clamp(round(x/Δ⁺), 0, Q − 1) + Δ⁻·clamp(round(x/Δ⁻), −Q, 0), Q = 2^(b−1).
//!
//! A GELU's negatives end at a known minimum, so Δ⁻ is a constant of the bit width; Δ⁺ is searched.
//! One of the two terms is always zero: a code is a sign and b − 1 bits.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::passes::twin::{Signs, encode_signs, quantize_signs};
use crate::quant::cost::OperandCost;
use crate::quant::dense::Dense;
use crate::quant::planes::Planes;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::round_straight_through;

use super::grid::half_range;

/// Kind name in artifacts.
pub(super) const KIND: &str = "twin_gelu";

/// Magnitude of GELU's minimum (the released code's constant).
const GELU_MINIMUM: f64 = 0.169_971_242_547_035_22;

/// Δ⁻, the scale of the negatives.
pub(super) fn negative_scale(bits: BitWidth) -> f64 {
    GELU_MINIMUM / half_range(bits)
}

/// One grid above zero and one below.
#[derive(Debug)]
pub(super) struct TwinGelu {
    bits: BitWidth,
    /// Δ⁺, float32, broadcastable to the operand.
    scale: Tensor,
}

impl TwinGelu {
    /// A grid with the given Δ⁺.
    pub(super) fn new(bits: BitWidth, scale: Tensor) -> Self {
        Self { bits, scale }
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let scale = state.read_tensor("scale")?;
        let usable = scale.f_gt(0.0)?.f_logical_and(&scale.f_isfinite()?)?.f_all()?;
        if scale.numel() != 1 || usable.f_int64_value(&[])? == 0 {
            return Err(Error::corrupt("artifact", "a post-GELU scale is not one positive number"));
        }
        Ok(Self { bits: state.read_bits()?, scale })
    }

    /// The grids for a pass, unless there are several Δ⁺ (or one that learns).
    fn signs(&self) -> Result<Option<Signs>> {
        if self.scale.numel() != 1 || self.scale.requires_grad() {
            return Ok(None);
        }
        Ok(Some(Signs {
            positive: self.scale.f_view([1])?.f_double_value(&[0])? as f32,
            negative: negative_scale(self.bits) as f32,
            half: half_range(self.bits) as f32,
        }))
    }

    /// float32 codes of both terms: 0..Q − 1 and −Q..0. Each is taken of one side of zero, so that
    /// small values have the gradient of one term, not of both.
    fn codes(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let half = half_range(self.bits);
        let positive = round_straight_through(&x.f_relu()?.f_div(&self.scale)?)?;
        let negative = x.f_clamp_max(0.0)?.f_div_scalar(negative_scale(self.bits))?;
        Ok((
            positive.f_clamp_max(half - 1.0)?,
            round_straight_through(&negative)?.f_clamp_min(-half)?,
        ))
    }
}

impl Quantizer for TwinGelu {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match (Dense::of(x)?, self.signs()?) {
            (Some(dense), Some(grid)) => dense.map(|x, out| quantize_signs(x, grid, out)).map(Some),
            _ => Ok(None),
        }
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (positive, negative) = self.codes(x)?;
        let negative = negative.f_mul_scalar(negative_scale(self.bits))?;
        Ok(positive.f_mul(&self.scale)?.f_add(&negative)?)
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let (Some(dense), Some(grid)) = (Dense::rows(x)?, self.signs()?) else { return Ok(None) };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let [positive, negative] = encode_signs(dense.values()?, grid);
        planes.push(positive, planes.repeated(grid.positive), planes.repeated(0));
        planes.push(negative, planes.repeated(grid.negative), planes.repeated(grid.half as i32));
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (positive, negative) = self.codes(x)?;
        let half = half_range(self.bits);
        let parameter = |value: f64, kind: Kind| -> Result<Tensor> {
            Ok(Tensor::f_full(vec![1i64; x.dim()].as_slice(), value, (kind, x.device()))?)
        };
        Ok(Some(vec![
            IntTerm {
                codes: positive.f_to_kind(Kind::Int)?,
                scale: self.scale.f_view(vec![1i64; x.dim()].as_slice())?,
                zero_point: parameter(0.0, Kind::Int)?,
            },
            // Offset binary: Q − |code| is 0..Q, with Q for zero.
            IntTerm {
                codes: negative.f_add_scalar(half)?.f_to_kind(Kind::Int)?,
                scale: parameter(negative_scale(self.bits), Kind::Float)?,
                zero_point: parameter(half, Kind::Int)?,
            },
        ]))
    }

    fn cost(&self, _shape: &[i64]) -> OperandCost {
        // A product keeps the sums of the two ranges apart.
        OperandCost { partial_sums: 2.0, ..OperandCost::of_grid(self.bits) }
    }

    fn state(&self) -> QuantizerState {
        QuantizerState::new(KIND, self.bits).tensor("scale", &self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;
    use crate::tensor::to_vec_f32;

    fn grid(bits: u32, scale: f32) -> TwinGelu {
        TwinGelu::new(BitWidth::new(bits, "bits").unwrap(), Tensor::from_slice(&[scale]))
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for (bits, scale) in [(3, 0.4), (4, 0.11), (8, 0.02)] {
            let q = grid(bits, scale);
            assert!(q.signs().unwrap().is_some());
            for shape in [&[1i64, 1][..], &[3, 7, 37], &[2, 197, 96]] {
                let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                laws::pass_is_exact(shape, |x| q.fake_quantize(x), definition);
            }
        }
    }

    #[test]
    fn laws_hold() {
        let x = laws::sample(&[4, 6, 16], 1).gelu("none");
        for bits in 3..=8 {
            for scale in [0.01, 0.3] {
                let q = grid(bits, scale);
                laws::terms_add_up(&q, &x);
                laws::images_are_independent(&q, &x, 1);
                laws::state_round_trips(&q, &x);
                let once = q.fake_quantize(&x).unwrap();
                assert!(q.fake_quantize(&once).unwrap().allclose(&once, 1e-6, 1e-7, false));
            }
        }
    }

    #[test]
    fn it_is_monotone_and_its_codes_fit_a_sign_and_the_other_bits() {
        let x = Tensor::linspace(-1.0, 3.0, 401, (Kind::Float, tch::Device::Cpu));
        for bits in 3..=8 {
            let q = grid(bits, 0.2);
            let y = q.fake_quantize(&x).unwrap();
            assert!(y.diff::<Tensor>(1, -1, None, None).min().double_value(&[]) >= 0.0);
            let terms = q.quantize(&x).unwrap().unwrap();
            let half = 1 << (bits - 1);
            for (term, largest) in terms.iter().zip([half - 1, half]) {
                assert_eq!(term.codes.min().int64_value(&[]), 0);
                assert!(term.codes.max().int64_value(&[]) <= largest);
            }
            // One of the two is zero.
            let negative = &terms[1].codes - half;
            assert_eq!((&terms[0].codes * negative).abs().max().int64_value(&[]), 0);
        }
    }

    #[test]
    fn both_sides_have_their_own_scale() {
        // Q = 4: Δ⁻ = 0.0425, codes −4..0; Δ⁺ = 0.5, codes 0..3.
        let x = Tensor::from_slice(&[-9.0f32, -0.17, -0.06, -0.02, 0.2, 0.3, 1.2, 9.0]);
        let found = to_vec_f32(&grid(3, 0.5).fake_quantize(&x).unwrap()).unwrap();
        let step = 0.042_492_81;
        let expected = [-4.0 * step, -4.0 * step, -step, 0.0, 0.0, 0.5, 1.0, 1.5];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }

    #[test]
    fn gradients_pass_straight_through() {
        let x = Tensor::from_slice(&[-0.05f32, 0.05, 9.0]).set_requires_grad(true);
        grid(4, 0.2).fake_quantize(&x).unwrap().sum(Kind::Float).backward();
        let gradient = to_vec_f32(&x.grad()).unwrap();
        for (found, expected) in gradient.iter().zip([1.0, 1.0, 0.0]) {
            assert!((found - expected).abs() < 1e-6, "{gradient:?}");
        }
    }

    #[test]
    fn an_unusable_scale_is_corrupt() {
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let state = grid(4, scale).state();
            assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
        }
    }
}
