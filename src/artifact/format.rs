//! The artifact's schema: packed weight codes, quantizer states, float parameters, one header.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::calib::CalibrationReport;
use crate::calib::task::QuantizeSpec;
use crate::error::{Error, Result};
use crate::model::ModelSpec;
use crate::quant::quantizer::QuantizerHeader;

/// Value of the metadata field `format`.
pub const FORMAT: &str = "vitq";
/// Newest schema version; every older one stays readable.
pub const SCHEMA_VERSION: u32 = 1;

/// The text part of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Architecture, preprocessing, labels.
    pub model: ModelSpec,
    /// Method, options, bits, policy, seed.
    pub request: QuantizeSpec,
    /// Which images calibrated it.
    pub calibration: CalibrationSource,
    /// sha256 of the float checkpoint.
    pub source_digest: String,
    /// Size of the float checkpoint's `model.safetensors` in bytes.
    pub source_bytes: u64,
    /// Quantizers by site path and operand name (`input`, `weight`, `lhs`, `rhs`).
    pub sites: BTreeMap<String, BTreeMap<String, QuantizerHeader>>,
    /// Per-site errors and remarks.
    pub report: CalibrationReport,
    /// Version of the crate that wrote the file.
    pub crate_version: String,
}

/// The calibration images of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationSource {
    /// Number of images.
    pub images: usize,
    /// sha256 (hex) over the preprocessed pixels, in order.
    pub digest: String,
}

/// A quantized model as stored: a header and raw tensors.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// The text part.
    pub header: Header,
    /// Name → element type, shape, little-endian bytes.
    pub tensors: BTreeMap<String, RawTensor>,
}

/// A tensor as bytes.
#[derive(Clone, Debug, PartialEq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: safetensors::Dtype,
    /// Shape.
    pub shape: Vec<usize>,
    /// Little-endian row-major content.
    pub data: Vec<u8>,
}

impl Artifact {
    /// The file's bytes; equal artifacts give equal bytes.
    ///
    /// # Errors
    /// `Internal` when the tensors contradict each other.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Err(Error::internal("not built yet"))
    }

    /// Reads and verifies a file's bytes; `name` is used in errors.
    ///
    /// # Errors
    /// `CorruptArtifact` for anything but exactly what [`Artifact::to_bytes`] wrote.
    pub fn from_bytes(name: &str, _bytes: &[u8]) -> Result<Self> {
        Err(Error::corrupt(name, "not built yet"))
    }
}
