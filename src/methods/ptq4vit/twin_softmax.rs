//! The twin uniform quantizer of attention scores (methods/ptq4vit.md, section 4; paper, section 3.1).
//!
//! Split point s = 2^−i, P = 2^(b−1) − 1. One bit of a code chooses the range, the others count:
//! Δ_small = s/P below s, Δ_large = 1/P from s on.
//!
//! The released code adds both ranges for every score, each of a copy clamped to its range, so that a
//! score above s decodes to about x + s (option `sos_overlap`).

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::passes::twin::{Sizes, encode_sizes, quantize_sizes};
use crate::quant::cost::OperandCost;
use crate::quant::dense::Dense;
use crate::quant::planes::Planes;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::round_straight_through;

use super::grid::half_range;

/// Kind name in artifacts.
pub(super) const KIND: &str = "twin_softmax";

/// What the two ranges do with each other's scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Overlap {
    /// Each score belongs to one range, as the paper has it.
    Exclusive,
    /// Both ranges are added, as released.
    Released,
}

/// A fine grid for small scores and a coarse one for large scores.
#[derive(Debug)]
pub(super) struct TwinSoftmax {
    bits: BitWidth,
    overlap: Overlap,
    /// s, float32, broadcastable to the operand.
    split: Tensor,
}

impl TwinSoftmax {
    /// A grid with the given split point.
    pub(super) fn new(bits: BitWidth, overlap: Overlap, split: Tensor) -> Self {
        Self { bits, overlap, split }
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let split = state.read_tensor("split")?;
        let usable = split.f_gt(0.0)?.f_logical_and(&split.f_le(1.0)?)?.f_all()?;
        if split.numel() != 1 || usable.f_int64_value(&[])? == 0 {
            return Err(Error::corrupt("artifact", "a split point of scores is not within 0..1"));
        }
        let released = state.read_scalar("released")? != 0.0;
        let overlap = if released { Overlap::Released } else { Overlap::Exclusive };
        Ok(Self { bits: state.read_bits()?, overlap, split })
    }

    /// P, the largest code of a range.
    fn largest(&self) -> f64 {
        half_range(self.bits) - 1.0
    }

    /// Δ_small.
    fn small_scale(&self) -> Result<Tensor> {
        Ok(self.split.f_div_scalar(self.largest())?)
    }

    /// The grids for a pass, unless there are several split points (or one that learns).
    fn sizes(&self) -> Result<Option<Sizes>> {
        if self.split.numel() != 1 || self.split.requires_grad() {
            return Ok(None);
        }
        let value = |x: &Tensor| -> Result<f32> { Ok(x.f_view([1])?.f_double_value(&[0])? as f32) };
        Ok(Some(Sizes {
            split: value(&self.split)?,
            small: value(&self.small_scale()?)?,
            large: (1.0 / self.largest()) as f32,
            largest: self.largest() as f32,
            overlap: self.overlap == Overlap::Released,
        }))
    }

    /// float32 codes 0..P of the small and the large range.
    fn codes(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let largest = self.largest();
        let (below, above) = match self.overlap {
            Overlap::Exclusive => (x.shallow_clone(), x.shallow_clone()),
            Overlap::Released => (x.f_minimum(&self.split)?, x.f_maximum(&self.split)?),
        };
        let code = |ratio: &Tensor| -> Result<Tensor> {
            Ok(round_straight_through(ratio)?.f_clamp(0.0, largest)?)
        };
        let small = code(&below.f_div(&self.small_scale()?)?)?;
        let large = code(&above.f_mul_scalar(largest)?)?;
        if self.overlap == Overlap::Released {
            return Ok((small, large));
        }
        let is_small = x.f_lt_tensor(&self.split)?;
        let none = small.f_zeros_like()?;
        Ok((small.f_where_self(&is_small, &none)?, none.f_where_self(&is_small, &large)?))
    }
}

impl Quantizer for TwinSoftmax {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match (Dense::of(x)?, self.sizes()?) {
            (Some(dense), Some(grid)) => dense.map(|x, out| quantize_sizes(x, grid, out)).map(Some),
            _ => Ok(None),
        }
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (small, large) = self.codes(x)?;
        Ok(small.f_mul(&self.small_scale()?)?.f_add(&large.f_mul_scalar(1.0 / self.largest())?)?)
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let (Some(dense), Some(grid)) = (Dense::rows(x)?, self.sizes()?) else { return Ok(None) };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let [small, large] = encode_sizes(dense.values()?, grid);
        planes.push(small, planes.repeated(grid.small), planes.repeated(0));
        planes.push(large, planes.repeated(grid.large), planes.repeated(0));
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (small, large) = self.codes(x)?;
        let ones = vec![1i64; x.dim()];
        let term = |codes: &Tensor, scale: Tensor| -> Result<IntTerm> {
            Ok(IntTerm {
                codes: codes.f_to_kind(Kind::Int)?,
                zero_point: scale.f_zeros_like()?.f_to_kind(Kind::Int)?,
                scale,
            })
        };
        let options = (Kind::Float, x.device());
        let large_scale = Tensor::f_full(ones.as_slice(), 1.0 / self.largest(), options)?;
        Ok(Some(vec![
            term(&small, self.small_scale()?.f_view(ones.as_slice())?)?,
            term(&large, large_scale)?,
        ]))
    }

    fn cost(&self, _shape: &[i64]) -> OperandCost {
        // A product keeps the sums of the two ranges apart.
        OperandCost { partial_sums: 2.0, ..OperandCost::of_grid(self.bits) }
    }

    fn state(&self) -> QuantizerState {
        let released = f64::from(u8::from(self.overlap == Overlap::Released));
        QuantizerState::new(KIND, self.bits)
            .scalar("released", released)
            .tensor("split", &self.split)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;
    use crate::tensor::to_vec_f32;

    const BOTH: [Overlap; 2] = [Overlap::Exclusive, Overlap::Released];

    fn grid(bits: u32, overlap: Overlap, split: f32) -> TwinSoftmax {
        let bits = BitWidth::new(bits, "bits").unwrap();
        TwinSoftmax::new(bits, overlap, Tensor::from_slice(&[split]))
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for (bits, overlap, split) in
            BOTH.into_iter().flat_map(|o| [(3, o, 1.0), (4, o, 0.125), (8, o, 0.031_25)])
        {
            let q = grid(bits, overlap, split);
            assert!(q.sizes().unwrap().is_some());
            for shape in [&[1i64, 1][..], &[2, 3, 7, 7], &[1, 3, 197, 197]] {
                let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                laws::pass_is_exact(shape, |x| q.fake_quantize(x), definition);
            }
        }
    }

    #[test]
    fn laws_hold() {
        let x = (laws::sample(&[3, 2, 6, 6], 5) * 6.0).softmax(-1, Kind::Float);
        for bits in 3..=8 {
            for overlap in BOTH {
                for split in [1.0, 0.125, 2f32.powi(-19)] {
                    let q = grid(bits, overlap, split);
                    laws::terms_add_up(&q, &x);
                    laws::images_are_independent(&q, &x, 1);
                    laws::state_round_trips(&q, &x);
                }
            }
        }
    }

    #[test]
    fn exclusive_ranges_are_monotone_and_round_to_the_nearest() {
        let x = Tensor::linspace(0.0, 1.0, 513, (Kind::Float, tch::Device::Cpu));
        for bits in 3..=8 {
            let y = grid(bits, Overlap::Exclusive, 0.0625).fake_quantize(&x).unwrap();
            let largest = 2f64.powi(bits as i32 - 1) - 1.0;
            // Where the ranges meet, the coarse one may round down below the fine one's end.
            for (first, count, step) in [(0, 32, 0.0625 / largest), (32, 481, 1.0 / largest)] {
                let (x, y) = (x.narrow(0, first, count), y.narrow(0, first, count));
                let rise = y.diff::<Tensor>(1, -1, None, None).min().double_value(&[]);
                let worst = (x - y).abs().max().double_value(&[]);
                assert!(rise >= 0.0 && worst <= 0.5 * step + 1e-6, "{bits} {worst}");
            }
        }
    }

    #[test]
    fn released_ranges_add_the_split_to_large_scores() {
        // P = 3, s = 1/4: Δ_small = 1/12, Δ_large = 1/3, and round(s·P) = 1 lifts small scores.
        let x = Tensor::from_slice(&[0.0f32, 0.1, 0.24, 0.25, 0.6, 1.0]);
        let values = |overlap| {
            let q = grid(3, overlap, 0.25);
            to_vec_f32(&q.fake_quantize(&x).unwrap()).unwrap()
        };
        let third = 1.0 / 3.0;
        let exclusive = [0.0, 0.25 * third, 0.25, third, 2.0 * third, 1.0];
        let released = [third, 0.25 * third + third, 0.25 + third, 0.25 + third];
        let released = [&released[..], &[2.0 * third + 0.25, 1.25]].concat();
        for (found, expected) in [
            (values(Overlap::Exclusive), exclusive.to_vec()),
            (values(Overlap::Released), released),
        ] {
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
    }

    #[test]
    fn gradients_pass_straight_through() {
        let x = Tensor::from_slice(&[0.01f32, 0.4]).set_requires_grad(true);
        let q = grid(4, Overlap::Exclusive, 0.125);
        q.fake_quantize(&x).unwrap().sum(Kind::Float).backward();
        assert!(x.grad().allclose(&x.ones_like(), 1e-6, 1e-6, false));
    }

    #[test]
    fn an_unusable_split_is_corrupt() {
        for split in [0.0, 1.5, f32::NAN] {
            let state = grid(4, Overlap::Exclusive, split).state();
            assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
        }
    }
}
