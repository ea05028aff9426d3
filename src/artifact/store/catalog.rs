//! The catalogue: one small file per model id, `models/<id>.json`, that names an artifact.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::atomic::{self, Place, WriteFn};
use crate::artifact::format::{CalibrationSource, Header};
use crate::calib::CalibrationReport;
use crate::calib::task::QuantizeSpec;
use crate::error::{Error, Result};
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

/// Names of artifacts, in a folder. All methods block.
#[derive(Clone, Debug)]
pub struct ModelCatalog {
    folder: PathBuf,
    write: WriteFn,
}

impl ModelCatalog {
    /// Opens, or creates, the catalogue below `data_dir`.
    ///
    /// # Errors
    /// `Io` when the folder cannot be used.
    pub fn open(data_dir: &Path) -> Result<Self> {
        Self::with_writer(data_dir, atomic::write_all)
    }

    fn with_writer(data_dir: &Path, write: WriteFn) -> Result<Self> {
        let folder = data_dir.join("models");
        atomic::open_folder(&folder)?;
        Ok(Self { folder, write })
    }

    /// Adds a record; its id must be a checked one.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is taken; `Io`, and then nothing is listed.
    pub fn create(&self, record: &ModelRecord) -> Result<()> {
        let json = serde_json::to_vec_pretty(record)
            .map_err(|error| Error::internal(format!("record of {}: {error}", record.id)))?;
        if atomic::put(&self.path(&record.id), &json, Place::Free, self.write)? {
            return Ok(());
        }
        Err(Error::AlreadyExists { kind: "model", name: record.id.clone() })
    }

    /// Removes a record; removing an unknown one is fine.
    ///
    /// # Errors
    /// `Io` when the folder refuses.
    pub fn remove(&self, id: &str) -> Result<()> {
        match fs::remove_file(self.path(id)) {
            Ok(()) => atomic::sync_folder(&self.folder),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(Error::io(self.path(id), error)),
        }
    }

    /// All records, sorted by id. A record that cannot be read is logged and left out.
    ///
    /// # Errors
    /// `Io` when the folder cannot be read.
    pub fn list(&self) -> Result<Vec<ModelRecord>> {
        let entries = fs::read_dir(&self.folder).map_err(|e| Error::io(&self.folder, e))?;
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| Error::io(&self.folder, error))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read(&path) {
                Ok(record) => records.push(record),
                Err(error) => tracing::error!(%error, "a model record cannot be read"),
            }
        }
        records.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(records)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.folder.join(format!("{id}.json"))
    }
}

fn read(path: &Path) -> Result<ModelRecord> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
    let name = path.display().to_string();
    let record: ModelRecord =
        serde_json::from_slice(&bytes).map_err(|error| Error::corrupt(&name, error.to_string()))?;
    if path.file_stem().is_none_or(|stem| stem != record.id.as_str()) {
        return Err(Error::corrupt(name, format!("holds the record of {}", record.id)));
    }
    Ok(record)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_given_once_and_free_again_after_removal() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = ModelCatalog::open(folder.path()).unwrap();
        let record = example_record("a", "d1");
        catalog.create(&record).unwrap();
        let error = catalog.create(&example_record("a", "d2")).unwrap_err();
        assert!(matches!(error, Error::AlreadyExists { .. }));
        assert_eq!(catalog.list().unwrap(), [record]);
        catalog.remove("a").unwrap();
        catalog.remove("a").unwrap();
        assert!(catalog.list().unwrap().is_empty());
    }

    #[test]
    fn unreadable_half_written_and_misnamed_records_are_not_listed() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = ModelCatalog::open(folder.path()).unwrap();
        catalog.create(&example_record("good", "d")).unwrap();
        let models = folder.path().join("models");
        fs::copy(models.join("good.json"), models.join("other.json")).unwrap();
        fs::write(models.join("bad.json"), b"{").unwrap();
        fs::write(models.join(".writing-02"), b"{").unwrap();
        let ids: Vec<_> = catalog.list().unwrap().into_iter().map(|r| r.id).collect();
        assert_eq!(ids, ["good"]);
    }

    #[test]
    fn a_full_disk_lists_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let catalog = ModelCatalog::with_writer(folder.path(), atomic::full_disk).unwrap();
        assert!(matches!(catalog.create(&example_record("a", "d")).unwrap_err(), Error::Io { .. }));
        assert!(catalog.list().unwrap().is_empty());
    }
}
