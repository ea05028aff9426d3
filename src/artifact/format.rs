//! The artifact's schema: packed weight codes, quantizer states, float parameters, one header.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

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
    /// Parameters stored as packed codes, by full name.
    pub packed: BTreeMap<String, PackedShape>,
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

/// Shape of a packed parameter. Rows are axis 0, everything else is one row of codes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PackedShape {
    /// Bits of a code.
    pub bits: u8,
    /// Shape of the float parameter.
    pub shape: Vec<usize>,
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
    /// `Internal` when the header cannot be written as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let header = serde_json::to_string(&self.header)
            .map_err(|e| Error::internal(format!("an artifact header is not JSON: {e}")))?;
        let version = SCHEMA_VERSION.to_string();
        let digest = digest(&version, &header, &self.tensors);
        let mut entries = Map::new();
        entries.insert(
            "__metadata__".to_owned(),
            json!({"format": FORMAT, "schema_version": version, "digest": digest, "header": header}),
        );
        let mut offset = 0;
        for (name, tensor) in &self.tensors {
            let end = offset + tensor.data.len();
            entries.insert(
                name.clone(),
                json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        // Written here rather than by the safetensors crate, whose metadata order is random.
        let mut text = Value::Object(entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut bytes = Vec::with_capacity(8 + text.len() + offset);
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text);
        for tensor in self.tensors.values() {
            bytes.extend(&tensor.data);
        }
        Ok(bytes)
    }

    /// Reads and verifies a file's bytes; `name` is used in errors.
    ///
    /// # Errors
    /// `CorruptArtifact` for anything but what [`Artifact::to_bytes`] wrote, `FailedPrecondition`
    /// for an intact file of an unknown schema version.
    pub fn from_bytes(name: &str, bytes: &[u8]) -> Result<Self> {
        let corrupt = |reason: String| Error::corrupt(name, reason);
        let (_, metadata) = SafeTensors::read_metadata(bytes)
            .map_err(|e| corrupt(format!("not a safetensors file: {e}")))?;
        let file = SafeTensors::deserialize(bytes)
            .map_err(|e| corrupt(format!("not a safetensors file: {e}")))?;
        let fields = metadata.metadata().as_ref().filter(|fields| fields.len() == METADATA_FIELDS);
        let field = |key: &str| {
            fields.and_then(|f| f.get(key)).map(String::as_str).ok_or_else(|| {
                corrupt(format!("the metadata field {key} is missing: not a vitq artifact"))
            })
        };
        let (version, header) = (field("schema_version")?, field("header")?);
        if field("format")? != FORMAT {
            return Err(corrupt("not a vitq artifact".to_owned()));
        }
        let tensors: BTreeMap<String, RawTensor> = file
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let tensor = RawTensor {
                    dtype: view.dtype(),
                    shape: view.shape().to_vec(),
                    data: view.data().to_vec(),
                };
                (name, tensor)
            })
            .collect();
        if field("digest")? != digest(version, header, &tensors) {
            return Err(corrupt("the content does not have the recorded digest".to_owned()));
        }
        if version != SCHEMA_VERSION.to_string() {
            let reason = format!(
                "{name}: schema version {version} is unknown, this program reads {SCHEMA_VERSION}"
            );
            return Err(Error::FailedPrecondition { reason });
        }
        let header = serde_json::from_str(header)
            .map_err(|e| corrupt(format!("the header is unusable: {e}")))?;
        Ok(Self { header, tensors })
    }
}

/// Number of metadata fields: format, schema_version, digest, header.
const METADATA_FIELDS: usize = 4;

/// sha256 (hex) over version, header, and every tensor's name, type, shape and content, each part
/// preceded by its length.
fn digest(version: &str, header: &str, tensors: &BTreeMap<String, RawTensor>) -> String {
    let mut hasher = Sha256::new();
    let mut part = |bytes: &[u8]| {
        hasher.update((bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    part(version.as_bytes());
    part(header.as_bytes());
    for (name, tensor) in tensors {
        part(name.as_bytes());
        part(tensor.dtype.to_string().as_bytes());
        let shape: Vec<u8> = tensor.shape.iter().flat_map(|n| (*n as u64).to_le_bytes()).collect();
        part(&shape);
        part(&tensor.data);
    }
    hex(&hasher.finalize())
}

/// Lower-case hexadecimal text.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
