//! What is kept of a model beside its artifact.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::artifact::format::{CalibrationSource, Header};
use crate::calib::CalibrationReport;
use crate::calib::task::QuantizeSpec;
use crate::model::ModelSpec;

/// What is known of a stored model without opening its artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    /// The model's id.
    pub id: String,
    /// sha256 (hex) of its artifact: the model's version.
    pub digest: String,
    /// Size of the artifact in bytes.
    pub artifact_bytes: u64,
    /// Checkpoint as named in the request.
    pub checkpoint: String,
    /// Labels that the client gave.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// When it was stored, in milliseconds since the Unix epoch.
    pub created_ms: i64,
    /// Wall time of the calibration in seconds.
    pub calibration_seconds: f64,
    /// Architecture, preprocessing, class names.
    pub model: ModelSpec,
    /// Method, options, bits, policy, seed.
    pub request: QuantizeSpec,
    /// Which images calibrated it.
    pub calibration: CalibrationSource,
    /// sha256 of the float checkpoint.
    pub source_digest: String,
    /// Size of the float checkpoint's weights in bytes.
    pub source_bytes: u64,
    /// Per-site errors and remarks.
    pub report: CalibrationReport,
}

/// What a record adds to an artifact's header.
#[derive(Clone, Debug)]
pub struct RecordOrigin {
    /// See [`ModelRecord::id`].
    pub id: String,
    /// See [`ModelRecord::checkpoint`].
    pub checkpoint: String,
    /// See [`ModelRecord::labels`].
    pub labels: BTreeMap<String, String>,
    /// See [`ModelRecord::created_ms`].
    pub created_ms: i64,
    /// See [`ModelRecord::calibration_seconds`].
    pub calibration_seconds: f64,
}

impl ModelRecord {
    /// The record of an artifact with this header; `stored` is its digest and size.
    pub fn new(origin: RecordOrigin, header: Header, stored: (String, u64)) -> Self {
        let RecordOrigin { id, checkpoint, labels, created_ms, calibration_seconds } = origin;
        let Header {
            model,
            request,
            calibration,
            source_digest,
            source_bytes,
            report,
            sites: _,
            packed: _,
            crate_version: _,
        } = header;
        let (digest, artifact_bytes) = stored;
        Self {
            id,
            digest,
            artifact_bytes,
            checkpoint,
            labels,
            created_ms,
            calibration_seconds,
            model,
            request,
            calibration,
            source_digest,
            source_bytes,
            report,
        }
    }
}

#[cfg(test)]
pub(crate) fn example_record(id: &str, digest: &str) -> ModelRecord {
    serde_json::from_value(serde_json::json!({
        "id": id,
        "digest": digest,
        "artifact_bytes": 10,
        "checkpoint": "digits-vit",
        "created_ms": 1_700_000_000_000_i64,
        "calibration_seconds": 0.5,
        "model": {
            "architecture": "vit_tiny_patch16_224", "family": "vit", "num_classes": 2,
            "model_args": {}, "labels": ["no", "yes"],
            "preprocessing": {
                "image_size": 4, "crop_pct": 1.0, "interpolation": "bicubic",
                "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]
            }
        },
        "request": {
            "method": "ubb", "weight_bits": 4, "activation_bits": 4, "stem_head": "float", "seed": 0
        },
        "calibration": { "images": 32, "digest": "00" },
        "source_digest": "11",
        "source_bytes": 100,
        "report": { "images": 32, "sites": [] }
    }))
    .unwrap()
}
