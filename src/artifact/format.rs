//! The artifact's schema: packed weight codes, quantizer states, float parameters, one header.

use std::collections::BTreeMap;

use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::calib::CalibrationReport;
use crate::calib::task::QuantizeSpec;
use crate::digest::hex;
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
        Self::read(name, bytes, |recorded, found| recorded == found)
    }

    /// As [`Artifact::from_bytes`], whatever the recorded digest: for the fuzzer, whose mutations no
    /// digest survives.
    pub(crate) fn from_unverified(name: &str, bytes: &[u8]) -> Result<Self> {
        Self::read(name, bytes, |_, _| true)
    }

    /// Reads a file whose recorded and actual digest `agree`.
    fn read(name: &str, bytes: &[u8], agree: fn(&str, &str) -> bool) -> Result<Self> {
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
        if !agree(field("digest")?, &digest(version, header, &tensors)) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calib::{RoleBits, StemHeadPolicy};
    use crate::model::{Interpolation, Preprocessing};
    use crate::quant::{BitWidth, Precision};

    fn artifact() -> Artifact {
        let preprocessing = Preprocessing {
            image_size: 8,
            crop_pct: 0.9,
            interpolation: Interpolation::Bicubic,
            mean: [0.485, 0.456, 0.406],
            std: [0.5; 3],
        };
        let model = ModelSpec {
            architecture: "vit_tiny_patch16_224".to_owned(),
            family: "vit".to_owned(),
            num_classes: 2,
            model_args: Map::new(),
            preprocessing,
            labels: vec!["a \"quoted\" label".to_owned(), "b".to_owned()],
        };
        let request = QuantizeSpec {
            method: "minmax".to_owned(),
            options: BTreeMap::new(),
            weight_bits: BitWidth::EIGHT.into(),
            activation_bits: Precision::Float,
            stem_head: StemHeadPolicy::Float,
            seed: 7,
            role_bits: RoleBits::default(),
        };
        let header = Header {
            model,
            request,
            calibration: CalibrationSource { images: 1, digest: "00".to_owned() },
            source_digest: "11".to_owned(),
            source_bytes: 1,
            sites: BTreeMap::new(),
            packed: BTreeMap::new(),
            report: CalibrationReport::default(),
            crate_version: "0.0.0".to_owned(),
        };
        let raw = |dtype, shape: &[usize], data: &[u8]| RawTensor {
            dtype,
            shape: shape.to_vec(),
            data: data.to_vec(),
        };
        let tensors = [
            ("head.weight".to_owned(), raw(safetensors::Dtype::U8, &[3], &[1, 2, 3])),
            ("norm.bias".to_owned(), raw(safetensors::Dtype::F32, &[1], &[0, 0, 128, 63])),
        ];
        Artifact { header, tensors: tensors.into_iter().collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let artifact = artifact();
        let bytes = artifact.to_bytes().unwrap();
        let read = Artifact::from_bytes("test", &bytes).unwrap();
        assert_eq!((&read.header, &read.tensors), (&artifact.header, &artifact.tensors));
        assert_eq!(read.to_bytes().unwrap(), bytes);
        // Any reader of the format can open it.
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), 2);
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let bytes = artifact().to_bytes().unwrap();
        for position in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[position] ^= 1 << bit;
                let result = Artifact::from_bytes("test", &damaged);
                assert!(
                    matches!(result, Err(Error::CorruptArtifact { .. })),
                    "byte {position} bit {bit}: {result:?}"
                );
            }
        }
    }

    #[test]
    fn every_truncation_is_found() {
        let bytes = artifact().to_bytes().unwrap();
        for length in 0..bytes.len() {
            let result = Artifact::from_bytes("test", &bytes[..length]);
            assert!(matches!(result, Err(Error::CorruptArtifact { .. })), "{length}: {result:?}");
        }
    }

    #[test]
    fn an_intact_file_of_another_version_is_refused_by_name() {
        let artifact = artifact();
        let bytes = artifact.to_bytes().unwrap();
        let header = serde_json::to_string(&artifact.header).unwrap();
        let (old, new) =
            (digest("1", &header, &artifact.tensors), digest("9", &header, &artifact.tensors));
        let text = String::from_utf8_lossy(&bytes[8..bytes.len() - 7]).into_owned();
        let text = text
            .replace(&old, &new)
            .replace("\"schema_version\":\"1\"", "\"schema_version\":\"9\"");
        let mut newer = bytes[..8].to_vec();
        newer.extend(text.as_bytes());
        newer.extend(&bytes[bytes.len() - 7..]);
        let error = Artifact::from_bytes("file", &newer).unwrap_err();
        assert!(
            matches!(&error, Error::FailedPrecondition { reason } if reason.contains("version 9")),
            "{error}"
        );
    }
}
