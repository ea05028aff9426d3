//! From a calibration's result to an artifact, and from an artifact to weights and a plan.

use std::collections::BTreeMap;

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use crate::artifact::format::{Artifact, CalibrationSource, Header, PackedShape, RawTensor};
use crate::artifact::pack::{pack, packed_row_bytes, unpack};
use crate::calib::{Quantization, QuantizeSpec};
use crate::error::{Error, Result};
use crate::methods;
use crate::model::{Checkpoint, Model};
use crate::nn::{Operand, Site, Weights};
use crate::quant::quantizer::QuantizerHeader;
use crate::quant::{QuantPlan, Quantizer, QuantizerState};
use crate::tensor::to_vec_f32;

/// What an artifact is made from.
#[derive(Debug)]
pub struct Source<'a> {
    /// The float model.
    pub checkpoint: &'a Checkpoint,
    /// The request.
    pub request: &'a QuantizeSpec,
    /// sha256 (hex) over the calibration pixels.
    pub calibration_digest: &'a str,
    /// The method's result.
    pub quantization: &'a Quantization,
}

impl Artifact {
    /// Packs the weights that the plan quantizes and keeps everything else as it is.
    ///
    /// # Errors
    /// `Internal` when a weight quantizer has no single integer term; `Device` when libtorch refuses.
    pub fn build(source: &Source<'_>) -> Result<Self> {
        let Source { checkpoint, request, calibration_digest, quantization } = source;
        // Codes are made on the CPU, wherever the method ran: models are restored from them there.
        let weights = checkpoint.weights.with(&quantization.edits).to_device(Device::Cpu)?;
        let model = Model::build(&checkpoint.spec, &weights)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in weights.iter() {
            tensors.insert(name.to_owned(), float_tensor(tensor)?);
        }
        let mut sites: BTreeMap<String, BTreeMap<String, QuantizerHeader>> = BTreeMap::new();
        let mut packed = BTreeMap::new();
        for (id, operand, quantizer) in quantization.plan.iter() {
            let site = model.site(id)?;
            let name = site.operand_name(operand);
            let state = quantizer.state().to_device(Device::Cpu)?;
            let quantizer = methods::restore(&state)?;
            let QuantizerState { kind, bits, scalars, tensors: state } = state;
            for (key, tensor) in &state {
                tensors.insert(state_name(site, operand, key), float_tensor(tensor)?);
            }
            let entry = QuantizerHeader { kind, bits, scalars };
            sites.entry(site.path.clone()).or_default().insert(name.to_owned(), entry);
            if operand == Operand::Rhs && !site.role.is_matmul() {
                let name = format!("{}.weight", site.path);
                let weight = weights
                    .find(&name)
                    .ok_or_else(|| Error::internal(format!("{name} is missing")))?;
                let (tensor, shape) = pack_weight(weight, quantizer.as_ref())?;
                tensors.insert(name.clone(), tensor);
                packed.insert(name, shape);
            }
        }
        let header = Header {
            model: (*checkpoint.spec).clone(),
            request: (*request).clone(),
            calibration: CalibrationSource {
                images: quantization.report.images,
                digest: (*calibration_digest).to_owned(),
            },
            source_digest: checkpoint.digest.clone(),
            source_bytes: checkpoint.bytes,
            sites,
            packed,
            report: quantization.report.clone(),
            crate_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        Ok(Self { header, tensors })
    }

    /// The stored state of an operand's quantizer, if the operand is quantized.
    ///
    /// # Errors
    /// `CorruptArtifact` when a tensor is unusable.
    pub fn state(&self, site: &Site, operand: Operand) -> Result<Option<QuantizerState>> {
        let name = site.operand_name(operand);
        let Some(entry) = self.header.sites.get(&site.path).and_then(|site| site.get(name)) else {
            return Ok(None);
        };
        let prefix = state_name(site, operand, "");
        let mut state = QuantizerState {
            kind: entry.kind.clone(),
            bits: entry.bits,
            scalars: entry.scalars.clone(),
            tensors: BTreeMap::new(),
        };
        for (key, tensor) in self.tensors.range(prefix.clone()..) {
            let Some(key) = key.strip_prefix(&prefix) else { break };
            state.tensors.insert(key.to_owned(), self.tensor(tensor)?);
        }
        Ok(Some(state))
    }

    /// The restored plan of a model built from this artifact's weights.
    ///
    /// # Errors
    /// `CorruptArtifact` when a state is incomplete or belongs to no site.
    pub fn plan(&self, model: &Model, device: Device) -> Result<QuantPlan> {
        let mut plan = QuantPlan::default();
        for site in &model.sites {
            for operand in [Operand::Lhs, Operand::Rhs] {
                if let Some(state) = self.state(site, operand)? {
                    let quantizer = methods::restore(&state.to_device(device)?)?;
                    plan.insert(site.id, operand, quantizer);
                }
            }
        }
        let stored: usize = self.header.sites.values().map(BTreeMap::len).sum();
        if plan.len() != stored {
            return Err(Error::corrupt("artifact", "a quantizer belongs to no site of the model"));
        }
        Ok(plan)
    }

    /// The parameters as float32, packed ones decoded.
    ///
    /// # Errors
    /// `CorruptArtifact` when a packed parameter does not fit its shape.
    pub fn weights(&self) -> Result<Weights> {
        let mut weights = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            if let Some(shape) = self.header.packed.get(name) {
                weights.insert(name.clone(), self.unpack_weight(name, tensor, shape)?);
            } else if !self.is_state(name) {
                weights.insert(name.clone(), self.tensor(tensor)?);
            }
        }
        Ok(Weights::new(weights))
    }

    /// Whether a tensor belongs to a quantizer: `<site>.<operand>_<key>`.
    fn is_state(&self, name: &str) -> bool {
        let Some((path, last)) = name.rsplit_once('.') else { return false };
        self.header.sites.get(path).is_some_and(|operands| {
            operands.keys().any(|operand| {
                last.strip_prefix(operand.as_str()).is_some_and(|rest| rest.starts_with('_'))
            })
        })
    }

    fn tensor(&self, raw: &RawTensor) -> Result<Tensor> {
        if raw.dtype != Dtype::F32 {
            return Err(Error::corrupt(
                "artifact",
                format!("unexpected element type {}", raw.dtype),
            ));
        }
        let shape: Vec<i64> = raw.shape.iter().map(|n| *n as i64).collect();
        let tensor = Tensor::f_from_data_size(&raw.data, &shape, Kind::Float)?;
        // A scale or a weight that is not finite would make every answer NaN.
        if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
            return Err(Error::corrupt("artifact", "a tensor holds values that are not finite"));
        }
        Ok(tensor)
    }

    /// (codes − zero_point)·scale, exactly as the quantizer's own fake quantization computes it.
    fn unpack_weight(&self, name: &str, raw: &RawTensor, shape: &PackedShape) -> Result<Tensor> {
        let misfit = || Error::corrupt("artifact", format!("{name} does not fit its shape"));
        let (rows, row) = rows_of(&shape.shape).ok_or_else(misfit)?;
        let fits = (3..=8).contains(&shape.bits)
            && raw.dtype == Dtype::U8
            && rows.checked_mul(packed_row_bytes(row, shape.bits)) == Some(raw.data.len());
        if !fits {
            return Err(misfit());
        }
        let codes = unpack(&raw.data, row, shape.bits);
        let codes = Tensor::f_from_data_size(&codes, &[rows as i64, row as i64], Kind::Uint8)?;
        let parameter = |key: &str| -> Result<Tensor> {
            let tensor = self.tensors.get(&format!("{name}_{key}")).ok_or_else(misfit)?;
            self.tensor(tensor)
        };
        let (scale, zero_point) = (parameter("scale")?, parameter("zero_point")?);
        let value = codes.f_to_kind(Kind::Float)?.f_sub(&zero_point)?.f_mul(&scale)?;
        let shape: Vec<i64> = shape.shape.iter().map(|n| *n as i64).collect();
        Ok(value.f_reshape(shape)?)
    }
}

/// Name of a quantizer's tensor: `blocks.0.attn.qkv.input_scale`.
fn state_name(site: &Site, operand: Operand, key: &str) -> String {
    format!("{}.{}_{key}", site.path, site.operand_name(operand))
}

/// Rows and codes per row of a parameter.
fn rows_of(shape: &[usize]) -> Option<(usize, usize)> {
    let (rows, rest) = shape.split_first()?;
    let row = rest.iter().try_fold(1usize, |product, n| product.checked_mul(*n))?;
    (row > 0).then_some((*rows, row))
}

fn pack_weight(weight: &Tensor, quantizer: &dyn Quantizer) -> Result<(RawTensor, PackedShape)> {
    let shape: Vec<usize> = weight.size().iter().map(|n| *n as usize).collect();
    let (rows, row) = rows_of(&shape).ok_or_else(|| Error::internal("a weight is empty"))?;
    let matrix = weight.f_reshape([rows as i64, row as i64])?;
    let terms = quantizer.quantize(&matrix)?.unwrap_or_default();
    let [term] = terms.as_slice() else {
        return Err(Error::internal("a weight quantizer must have exactly one integer term"));
    };
    let bits = quantizer.bits().get();
    let codes = Vec::<u8>::try_from(&term.codes.f_to_kind(Kind::Uint8)?.f_flatten(0, -1)?)?;
    let data = pack(&codes, row, bits)?;
    let stored = vec![rows, packed_row_bytes(row, bits)];
    Ok((RawTensor { dtype: Dtype::U8, shape: stored, data }, PackedShape { bits, shape }))
}

fn float_tensor(tensor: &Tensor) -> Result<RawTensor> {
    let shape = tensor.size().iter().map(|n| *n as usize).collect();
    let values = to_vec_f32(tensor)?;
    let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Ok(RawTensor { dtype: Dtype::F32, shape, data })
}
