//! The quantizer trait, its integer form, and the state that an artifact keeps.

use std::collections::BTreeMap;
use std::fmt::Debug;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::cuda::{Affine, GpuCodes, Rounded, Stairs};
use crate::kernels::fused::{HeadRows, RowEncoder};
use crate::kernels::passes::affine::Grid;
use crate::quant::BitWidth;
use crate::quant::cost::OperandCost;
use crate::quant::dynamic::{self, DynamicToken};
use crate::quant::encode;
use crate::quant::log2::{self, Log2Row};
use crate::quant::uniform::{self, Uniform};

/// Maps reals onto a finite grid. Static, or dynamic from `x` itself; always independent per image.
///
/// Several threads may use one at once: a quantizer reads its tensors, never writes to them, and changes
/// nothing of itself but behind a lock.
pub trait Quantizer: Debug + Send {
    /// Nominal bit width (the mean, where tokens differ).
    fn bits(&self) -> BitWidth;

    /// Rounds `x` to the grid: float32 in, float32 of the same shape out. Rounding has
    /// straight-through gradients.
    ///
    /// # Errors
    /// `Device` when libtorch refuses; `InvalidArgument` when the shape does not fit the state.
    fn fake_quantize(&self, x: &Tensor) -> Result<Tensor> {
        if x.requires_grad() {
            let source = x.f_detach()?;
            let x_hat = self.fake_quantize(&source)?;
            return match self.slope(&source, &x_hat)? {
                Some(slope) => slope.attach(x, &x_hat),
                None => self.fake_quantize_by_tensors(x),
            };
        }
        if let Some(rounded) = self.on_gpu(x)? {
            return rounded.values();
        }
        match self.fake_quantize_in_a_pass(x)? {
            Some(x_hat) => Ok(x_hat),
            None => self.fake_quantize_by_tensors(x),
        }
    }

    /// The same bits in a pass or two over memory on the CPU; `None` where there is no such way.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn fake_quantize_in_a_pass(&self, _x: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The slope at `x` (no gradient) of what rounds it to `x_hat`, the rounding itself left out;
    /// `None` where only the definition knows it.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn slope(&self, _x: &Tensor, _x_hat: &Tensor) -> Result<Option<Slope>> {
        Ok(None)
    }

    /// The definition of [`Quantizer::fake_quantize`], differentiable.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor>;

    /// The integer form of `x`: `x̂ = Σ scale·(codes − zero_point)`; `None` if there is none.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>>;

    /// The codes of a linear's or an attention product's operand for the integer kernels, rows being
    /// all axes but the last; `None` if there is no integer form in which a scale belongs to a row
    /// and a group of columns. Which of the two may depend on the shape of `x`, not on its values.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn encode(&self, x: &Tensor) -> Result<Option<Codes>> {
        match self.encode_in_a_pass(x)? {
            Some(codes) => Ok(Some(codes)),
            None => self.encode_by_tensors(x),
        }
    }

    /// The same codes without integer terms on the way; `None` where there is no such way.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn encode_in_a_pass(&self, _x: &Tensor) -> Result<Option<Codes>> {
        Ok(None)
    }

    /// The one grid of all values, whatever they are, where integer kernels take its codes: these can
    /// then be made wherever values come to be.
    fn static_grid(&self) -> Option<Grid> {
        None
    }

    /// The stairs of all values, whatever they are, with the terms of their integer form.
    fn static_stairs(&self) -> Option<Stairs<'_>> {
        None
    }

    /// The stairs of all values of an attention operand [windows, heads, free, reduce], whatever they are, in
    /// ratios to the largest of their token.
    ///
    /// # Errors
    /// `Internal` for axes beyond 32 bits.
    fn relative_stairs(&self, _shape: [i64; 4]) -> Result<Option<Stairs<'_>>> {
        Ok(None)
    }

    /// How the grids of an attention operand [windows, heads, free, reduce] follow from the extents of its tokens, for
    /// kernels that find them where the operand comes to be; `None` where they follow from something else.
    ///
    /// # Errors
    /// `Internal` for axes beyond 32 bits.
    fn token_grids(&self, _shape: [i64; 4]) -> Result<Option<Affine<'_>>> {
        Ok(None)
    }

    /// What makes the codes of [`Quantizer::encode`] of rows of `columns` values as they come to be,
    /// where those of a row depend on nothing else.
    fn row_encoder(&self, columns: usize) -> Option<Box<dyn RowEncoder>> {
        let grid = self.static_grid().filter(|_| encode::is_taken(columns, 1, self.code_bits()))?;
        Some(Box::new(grid))
    }

    /// The codes of [`Quantizer::encode`] of an operand of an attention whose heads lie side by side;
    /// `None` where there is no such way.
    fn encode_heads(&self, _x: &HeadRows<'_>) -> Option<Codes> {
        None
    }

    /// `x` on its grids, for the kernels of its GPU; `None` where there are none, or none of these
    /// grids.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn on_gpu(&self, _x: &Tensor) -> Result<Option<Rounded<'static>>> {
        Ok(None)
    }

    /// [`Quantizer::on_gpu`] on grids that do not depend on `x`, so that something may be done to it before it
    /// is rounded.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn fixed_on_gpu(&self, _x: &Tensor) -> Result<Option<Rounded<'static>>> {
        Ok(None)
    }

    /// [`Quantizer::encode`] on a GPU.
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn encode_on_gpu(&self, x: &Tensor) -> Result<Option<GpuCodes>> {
        if let Some(rounded) = self.on_gpu(x)?
            && let Some(codes) = rounded.codes()?
        {
            return Ok(Some(codes));
        }
        match self.quantize(x)? {
            Some(terms) => GpuCodes::of_terms(&terms, self.code_bits()),
            None => Ok(None),
        }
    }

    /// The definition of [`Quantizer::encode`].
    ///
    /// # Errors
    /// As [`Quantizer::fake_quantize`].
    fn encode_by_tensors(&self, x: &Tensor) -> Result<Option<Codes>> {
        match self.quantize(x)? {
            Some(terms) => encode::codes_of(&terms, self.code_bits()),
            None => Ok(None),
        }
    }

    /// Bits that every code of every integer term fits, whatever the input.
    fn code_bits(&self) -> u32 {
        self.bits().get().into()
    }

    /// What an artifact keeps of this quantizer.
    fn state(&self) -> QuantizerState;

    /// What the operand of one image, of that shape, costs in this form. The default is right for
    /// static grids of 2^bits codes with one scale along the summed axis.
    fn cost(&self, _shape: &[i64]) -> OperandCost {
        OperandCost::of_grid(self.bits())
    }
}

/// What a gradient is multiplied by on its way through a rounding.
#[derive(Debug)]
pub enum Slope {
    /// 1 from `low` to `high`, which broadcast to the operand, and 0 beyond.
    Between {
        /// float32.
        low: Tensor,
        /// float32.
        high: Tensor,
    },
    /// One number for every element, shape of the operand.
    Each(Tensor),
}

impl Slope {
    /// The values of `x_hat`, with this slope at `x`.
    ///
    /// # Errors
    /// `Device` when the shapes do not fit.
    fn attach(&self, x: &Tensor, x_hat: &Tensor) -> Result<Tensor> {
        let carrier = match self {
            Self::Between { low, high } => x.f_clamp_tensor(Some(low), Some(high))?,
            Self::Each(slope) => x.f_mul(slope)?,
        };
        // Neither operation needs its result to go back, so the result can become another one.
        carrier.f_detach()?.f_copy_(x_hat)?;
        Ok(carrier)
    }
}

/// One integer term: `scale · (codes − zero_point)`.
///
/// `scale` and `zero_point` have the codes' rank with every axis equal to the codes' or 1, except
/// that the last axis may also be the number of contiguous channel groups.
#[derive(Debug)]
pub struct IntTerm {
    /// int32, shape of the operand.
    pub codes: Tensor,
    /// float32, broadcastable (see above).
    pub scale: Tensor,
    /// int32, broadcastable (see above).
    pub zero_point: Tensor,
}

impl IntTerm {
    /// `scale · (codes − zero_point)` as float32 in the codes' shape.
    ///
    /// # Errors
    /// `Device` when the shapes do not fit.
    pub fn dequantize(&self) -> Result<Tensor> {
        let shape = self.codes.size();
        let channels = shape[shape.len() - 1];
        let scale = expand_groups(&self.scale, channels)?;
        let zero_point = expand_groups(&self.zero_point, channels)?;
        let centred = self.codes.f_sub(&zero_point)?.f_to_kind(tch::Kind::Float)?;
        Ok(centred.f_mul(&scale)?)
    }
}

/// Repeats a per-group last axis to one value per channel.
fn expand_groups(x: &Tensor, channels: i64) -> Result<Tensor> {
    let groups = *x.size().last().unwrap_or(&1);
    if groups == 1 || groups == channels {
        return Ok(x.shallow_clone());
    }
    Ok(x.f_repeat_interleave_self_int(channels / groups, -1, channels)?)
}

/// The stored form of a quantizer: kind, scalars (in the header) and tensors.
#[derive(Debug, Default)]
pub struct QuantizerState {
    /// Which quantizer restores it: `uniform`, `ubb_linear`, ...
    pub kind: String,
    /// Nominal bit width.
    pub bits: u8,
    /// Named scalars; float32 values are stored exactly as float64.
    pub scalars: BTreeMap<String, f64>,
    /// Named tensors.
    pub tensors: BTreeMap<String, Tensor>,
}

/// The part of a [`QuantizerState`] that is text in an artifact's header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizerHeader {
    /// See [`QuantizerState::kind`].
    pub kind: String,
    /// See [`QuantizerState::bits`].
    pub bits: u8,
    /// See [`QuantizerState::scalars`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scalars: BTreeMap<String, f64>,
}

impl QuantizerState {
    /// A state without scalars and tensors.
    pub fn new(kind: &str, bits: BitWidth) -> Self {
        Self { kind: kind.to_owned(), bits: bits.get(), ..Self::default() }
    }

    /// Adds a scalar.
    #[must_use]
    pub fn scalar(mut self, name: &str, value: f64) -> Self {
        self.scalars.insert(name.to_owned(), value);
        self
    }

    /// Adds a tensor.
    #[must_use]
    pub fn tensor(mut self, name: &str, value: &Tensor) -> Self {
        self.tensors.insert(name.to_owned(), value.shallow_clone());
        self
    }

    /// The same state with its tensors on `device`.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub fn to_device(mut self, device: Device) -> Result<Self> {
        for tensor in self.tensors.values_mut() {
            *tensor = tensor.f_to_device(device)?;
        }
        Ok(self)
    }

    /// Reads a scalar back.
    ///
    /// # Errors
    /// `CorruptArtifact` when it is missing or not finite.
    pub fn read_scalar(&self, name: &str) -> Result<f64> {
        self.scalars
            .get(name)
            .copied()
            .filter(|v| v.is_finite())
            .ok_or_else(|| self.broken(&format!("scalar {name} is missing or not finite")))
    }

    /// Reads a tensor back.
    ///
    /// # Errors
    /// `CorruptArtifact` when it is missing.
    pub fn read_tensor(&self, name: &str) -> Result<Tensor> {
        self.tensors
            .get(name)
            .map(Tensor::shallow_clone)
            .ok_or_else(|| self.broken(&format!("tensor {name} is missing")))
    }

    /// Reads the bit width back.
    ///
    /// # Errors
    /// `CorruptArtifact` when it is out of range.
    pub fn read_bits(&self) -> Result<BitWidth> {
        BitWidth::new(u32::from(self.bits), "bits").map_err(|e| self.broken(&e.to_string()))
    }

    fn broken(&self, reason: &str) -> Error {
        Error::corrupt("artifact", format!("quantizer of kind {}: {reason}", self.kind))
    }
}

/// A restored quantizer of a known kind, as registries give it.
pub fn boxed<Q: Quantizer + 'static>(quantizer: Result<Q>) -> Option<Result<Box<dyn Quantizer>>> {
    Some(quantizer.map(|q| Box::new(q) as Box<dyn Quantizer>))
}

/// Restores the quantizer kinds that are not one method's own; `None` for other kinds.
pub fn restore_shared(state: &QuantizerState) -> Option<Result<Box<dyn Quantizer>>> {
    match state.kind.as_str() {
        uniform::KIND => boxed(Uniform::restore(state)),
        dynamic::KIND => boxed(DynamicToken::restore(state)),
        log2::KIND => boxed(Log2Row::restore(state)),
        _ => None,
    }
}
