//! Dynamic per-token affine quantization: range, scale and zero point come from each row itself.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::kernels::Codes;
use crate::kernels::codes::buffer;
use crate::kernels::cuda::{self, Rounded, Tokens};
use crate::kernels::passes::affine::{Constants, dynamic_grids, encode_rows, quantize_dynamic};
use crate::quant::cost::{OperandCost, RANGE_BITS, elements, rows};
use crate::quant::dense::Dense;
use crate::quant::planes::Planes;
use crate::quant::uniform::Range;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::round_straight_through;

/// Kind name in artifacts.
pub const KIND: &str = "dynamic_token";

/// Smallest scale of activations, from the platform's code (methods/ubb.md, section 1).
pub const MIN_ACTIVATION_SCALE: f64 = 1e-8;

/// What to do with a row whose values are all equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConstantRows {
    /// Reproduce the value exactly with a single code.
    Exact,
    /// Keep the smallest scale, as the released code of UBB does; large constants decode with noise.
    SmallestScale,
}

impl From<ConstantRows> for Constants {
    fn from(rows: ConstantRows) -> Self {
        match rows {
            ConstantRows::Exact => Self::Exact,
            ConstantRows::SmallestScale => Self::SmallestScale,
        }
    }
}

/// The affine parameters of rows: scale and zero point, float32, shaped as the range.
#[derive(Debug)]
pub struct Affine {
    /// Step δ.
    pub scale: Tensor,
    /// Integer zero point z, not clamped.
    pub zero_point: Tensor,
}

impl Affine {
    /// δ = max((hi − lo)/L, 1e-8), z = round(−lo/δ), with `max_code` L broadcastable to the range.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn from_range(range: &Range, max_code: &Tensor, constants: ConstantRows) -> Result<Self> {
        let width = range.high.f_sub(&range.low)?;
        let mut scale = width.f_div(max_code)?.f_clamp_min(MIN_ACTIVATION_SCALE)?;
        if constants == ConstantRows::Exact {
            // δ = |lo| makes round(lo/δ) = ±1 and the clamped code 0, so x̂ = lo exactly.
            let magnitude = range.low.f_abs()?;
            let single =
                magnitude.f_where_self(&magnitude.f_gt(0.0)?, &magnitude.f_ones_like()?)?;
            scale = single.f_where_self(&width.f_lt(MIN_ACTIVATION_SCALE)?, &scale)?;
        }
        let zero_point = range.low.f_neg()?.f_div(&scale)?.f_round()?;
        Ok(Self { scale, zero_point })
    }

    /// clamp(round(x/δ) + z, 0, L), float32.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn codes(&self, x: &Tensor, max_code: &Tensor) -> Result<Tensor> {
        let grid = round_straight_through(&x.f_div(&self.scale)?)?.f_add(&self.zero_point)?;
        Ok(grid.f_clamp_min(0.0)?.f_minimum(max_code)?)
    }

    /// (q − z)·δ.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn decode(&self, codes: &Tensor) -> Result<Tensor> {
        Ok(codes.f_sub(&self.zero_point)?.f_mul(&self.scale)?)
    }
}

/// One scale per index of all axes but the last, found anew for every input.
#[derive(Clone, Copy, Debug)]
pub struct DynamicToken {
    bits: BitWidth,
}

impl DynamicToken {
    /// A dynamic grid of 2^bits codes per token.
    pub fn new(bits: BitWidth) -> Self {
        Self { bits }
    }

    /// Restores a stored quantizer.
    ///
    /// # Errors
    /// `CorruptArtifact` when the state is incomplete.
    pub fn restore(state: &QuantizerState) -> Result<Self> {
        Ok(Self { bits: state.read_bits()? })
    }

    fn affine(self, x: &Tensor) -> Result<(Affine, Tensor)> {
        let max_code = Tensor::f_full([1], self.bits.max_code(), (Kind::Float, x.device()))?;
        let affine = Affine::from_range(&Range::per_row(x)?, &max_code, ConstantRows::Exact)?;
        let codes = affine.codes(x, &max_code)?;
        Ok((affine, codes))
    }
}

impl Quantizer for DynamicToken {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(dense) = Dense::in_order(x)? else { return Ok(None) };
        let (max_code, width) = (self.bits.max_code() as f32, dense.width());
        dense.map(|x, out| quantize_dynamic(x, max_code, width, out)).map(Some)
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (affine, codes) = self.affine(x)?;
        affine.decode(&codes)
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        let grids = cuda::Affine {
            tokens: Tokens::rows_of(x)?,
            groups: 1,
            max_code: self.bits.max_code() as f32,
            rules: None,
            exact_constants: true,
            stretch: None,
        };
        Rounded::affine(x, &grids)
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let Some(dense) = Dense::rows(x)? else { return Ok(None) };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let (x, width) = (dense.values()?, dense.width());
        let grids = dynamic_grids(x, self.bits.max_code() as f32, width);
        let mut codes = buffer(x.len());
        encode_rows(x, &grids, width, &mut codes);
        planes.push_grids(codes, &grids);
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (affine, codes) = self.affine(x)?;
        Ok(Some(vec![IntTerm {
            codes: codes.f_to_kind(Kind::Int)?,
            scale: affine.scale,
            zero_point: affine.zero_point.f_to_kind(Kind::Int)?,
        }]))
    }

    fn state(&self) -> QuantizerState {
        QuantizerState::new(KIND, self.bits)
    }

    /// A grid per row, found by two comparisons per element.
    fn cost(&self, shape: &[i64]) -> OperandCost {
        OperandCost {
            metadata_bits: RANGE_BITS * rows(shape),
            operations: 2.0 * elements(shape),
            ..OperandCost::of_grid(self.bits)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;

    #[test]
    fn laws_hold() {
        let x = laws::sample(&[4, 7, 12], 3);
        for bits in 3..=8 {
            let q = DynamicToken::new(BitWidth::new(bits, "bits").unwrap());
            laws::terms_add_up(&q, &x);
            laws::images_are_independent(&q, &x, 1);
            laws::state_round_trips(&q, &x);
        }
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for bits in [3, 8] {
            let q = DynamicToken::new(BitWidth::new(bits, "bits").unwrap());
            for shape in [&[1i64, 1][..], &[4, 7, 12], &[3, 197, 65], &[2, 3, 5, 9]] {
                let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                laws::pass_is_exact(shape, |x| q.fake_quantize(x), definition);
            }
        }
    }

    #[test]
    fn constant_rows_are_exact() {
        let x = Tensor::from_slice(&[7e4f32, 7e4, -3.25, -3.25, 0.0, 0.0]).view([3, 2]);
        let q = DynamicToken::new(BitWidth::new(4, "bits").unwrap());
        assert!(q.fake_quantize(&x).unwrap().equal(&x));
        laws::terms_add_up(&q, &x);
    }
}
