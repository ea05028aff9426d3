//! The rows of a benchmark and the file that keeps them between runs.
//!
//! A row's key holds everything that decides its numbers. A row found under its key is never
//! computed again, so a long run that was stopped goes on where it was.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::bench::bit_cost::BitCost;
use crate::error::{Error, Result};
use crate::exec::SiteCounts;

/// Method id of the unquantized checkpoint.
pub const FLOAT_METHOD: &str = "float";

/// What decides a row's numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowKey {
    /// Name of the checkpoint's folder.
    pub checkpoint: String,
    /// Method id; `float` for the checkpoint itself.
    pub method: String,
    /// Bits of the weights; 32 if they are float.
    pub weight_bits: u8,
    /// Bits of the activations; 32 if they are float.
    pub activation_bits: u8,
    /// Arithmetic of the forward: `float`, `simulated`, `integer`.
    pub executor: String,
    /// Where it ran: `cpu`, `cuda:0`.
    pub device: String,
    /// Seed of the calibration; absent for float.
    pub seed: Option<u64>,
    /// Treatment of stem and head: `float`, `int8`, `same`.
    pub stem_head: String,
    /// Bits of single roles (`reduction=8/8`), separated by spaces; empty without any.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub role_bits: String,
    /// Method options that were given, by name.
    pub options: BTreeMap<String, String>,
    /// Images per forward (changes the speed, never the logits).
    pub batch_size: usize,
    /// Number of calibration images; 0 for float.
    pub calibration_images: usize,
    /// sha256 (hex) over the calibration pixels; absent for float.
    pub calibration_digest: Option<String>,
    /// sha256 (hex) of the float checkpoint.
    pub checkpoint_digest: String,
    /// Number of validation images.
    pub validation_images: usize,
    /// sha256 (hex) over the validation files and their classes.
    pub validation_digest: String,
    /// Version of vitq that computed the row.
    pub vitq_version: String,
}

impl RowKey {
    /// Whether both rows answer the same question, perhaps computed by different versions.
    pub fn same_cell(&self, other: &Self) -> bool {
        let versionless = Self { vitq_version: other.vitq_version.clone(), ..self.clone() };
        versionless == *other
    }

    /// Whether the row is the checkpoint itself.
    pub fn is_float(&self) -> bool {
        self.method == FLOAT_METHOD
    }

    /// Short form of the bit widths: `w4a4`, `w4a32`; `float` for the checkpoint itself.
    pub fn bits(&self) -> String {
        if self.is_float() {
            "float".to_owned()
        } else {
            format!("w{}a{}", self.weight_bits, self.activation_bits)
        }
    }
}

/// One measured combination: a line of `results.json` and `results.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// What was run.
    #[serde(flatten)]
    pub key: RowKey,
    /// Top-1 accuracy in percent.
    pub top1: f64,
    /// Top-5 accuracy in percent.
    pub top5: f64,
    /// Share of images with the float model's top-1 class, in percent.
    pub agreement: f64,
    /// 10·log10(Σfloat² / Σ(quantized − float)²) over all logits, in dB; absent if they are equal.
    pub sqnr_db: Option<f64>,
    /// Wall time of the calibration in seconds; 0 for float.
    pub calibration_seconds: f64,
    /// Images per second of the forward alone.
    pub images_per_second: f64,
    /// Size of the artifact in bytes; for float, of the checkpoint's weights.
    pub artifact_bytes: u64,
    /// Bytes of parameters held on the device while running; for float, of the checkpoint's weights.
    pub resident_bytes: u64,
    /// How many products were computed in which arithmetic; absent from rows of versions before they
    /// were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sites: Option<SiteCounts>,
    /// Largest resident memory of the process during the calibration in bytes; absent for float and
    /// where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_peak_bytes: Option<u64>,
    /// Effective bits and bit operations; absent from rows of versions before they were counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bit_cost: Option<BitCost>,
    /// File name under `artifacts/`, when artifacts were kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<String>,
}

/// The rows of a `results.json`.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    rows: Vec<Row>,
}

impl Results {
    /// Reads `results.json` in `folder`; without that file there are no rows yet.
    ///
    /// # Errors
    /// `Io` when the folder or file is unreadable; `FailedPrecondition` when the file is not a
    /// result file, which is never overwritten.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|source| Error::io(folder, source))?;
        let path = folder.join("results.json");
        let rows = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                let reason = format!("{} is not a result file: {error}", path.display());
                Error::FailedPrecondition { reason }
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(Error::io(&path, error)),
        };
        Ok(Self { path, rows })
    }

    /// The row of exactly that key.
    pub fn find(&self, key: &RowKey) -> Option<&Row> {
        self.rows.iter().find(|row| row.key == *key)
    }

    /// Adds a row, replacing what an older version computed for the same cell, and saves all rows.
    ///
    /// # Errors
    /// `Io` when the file cannot be written; the old file then stays as it was.
    pub fn insert(&mut self, row: Row) -> Result<()> {
        self.rows.retain(|old| !old.key.same_cell(&row.key));
        self.rows.push(row);
        let mut text = serde_json::to_string_pretty(&self.rows)
            .map_err(|error| Error::internal(format!("rows have no JSON form: {error}")))?;
        text.push('\n');
        write_atomically(&self.path, text.as_bytes())
    }

    /// All rows, in the order in which they were computed.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// Replaces `path` by a file of exactly these bytes, or leaves it untouched.
///
/// # Errors
/// `Io` on `path`.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        // As any other new file: temporary ones are their owner's alone unless told otherwise.
        let everybody = Permissions::from_mode(0o666);
        let mut file = tempfile::Builder::new().permissions(everybody).tempfile_in(folder)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().map_err(|source| Error::io(path, source))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::quant::bits::FLOAT_BITS;

    #[test]
    fn a_result_may_be_read_by_whoever_reads_other_files() {
        let folder = tempfile::tempdir().unwrap();
        let mode = |name: &str| {
            let found = std::fs::metadata(folder.path().join(name)).unwrap();
            found.permissions().mode()
        };
        std::fs::write(folder.path().join("plain"), "").unwrap();
        write_atomically(&folder.path().join("result"), b"").unwrap();
        assert_eq!(mode("result"), mode("plain"));
    }

    /// A row of the digits with the fields that reports look at.
    pub(crate) fn row(checkpoint: &str, method: &str, bits: u8, seed: u64, top1: f64) -> Row {
        let float = bits == FLOAT_BITS;
        Row {
            key: RowKey {
                checkpoint: checkpoint.to_owned(),
                method: method.to_owned(),
                weight_bits: bits,
                activation_bits: bits,
                executor: if float { "float" } else { "simulated" }.to_owned(),
                device: "cpu".to_owned(),
                seed: (!float).then_some(seed),
                stem_head: "float".to_owned(),
                role_bits: String::new(),
                options: BTreeMap::new(),
                batch_size: 32,
                calibration_images: if float { 0 } else { 32 },
                calibration_digest: (!float).then(|| format!("calibration {seed}")),
                checkpoint_digest: "checkpoint".to_owned(),
                validation_images: 450,
                validation_digest: "validation".to_owned(),
                vitq_version: "1.0.0".to_owned(),
            },
            top1,
            top5: 99.5,
            agreement: if float { 100.0 } else { 97.0 },
            sqnr_db: (!float).then_some(16.25),
            calibration_seconds: if float { 0.0 } else { 2.5 },
            images_per_second: 120.0,
            artifact_bytes: 1_000_000,
            resident_bytes: 2_000_000,
            sites: Some(SiteCounts { integer: 0, simulated: 24, float: 2 }),
            calibration_peak_bytes: (!float).then_some(300_000_000),
            bit_cost: (!float).then_some(BitCost {
                weight_bits: 4.25,
                activation_bits: 4.5,
                metadata_bits: 0.125,
                gbops: 1.5,
                overhead_percent: 3.25,
            }),
            artifact: None,
        }
    }

    #[test]
    fn rows_survive_the_file_and_are_found_by_their_whole_key() {
        let folder = tempfile::tempdir().unwrap();
        let mut results = Results::open(folder.path()).unwrap();
        let rows = [row("a", "float", FLOAT_BITS, 0, 0.1 + 0.2), row("a", "ubb", 4, 0, 95.0)];
        for row in &rows {
            results.insert(row.clone()).unwrap();
        }
        let reread = Results::open(folder.path()).unwrap();
        assert_eq!(reread.rows(), rows);
        assert_eq!(reread.find(&rows[1].key), Some(&rows[1]));
        for change in [
            |key: &mut RowKey| key.validation_images = 40,
            |key: &mut RowKey| key.seed = Some(1),
            |key: &mut RowKey| key.vitq_version = "2.0.0".to_owned(),
            |key: &mut RowKey| key.role_bits = "fc2=8/8".to_owned(),
            |key: &mut RowKey| drop(key.options.insert("groups".to_owned(), "4".to_owned())),
        ] {
            let mut key = rows[1].key.clone();
            change(&mut key);
            assert_eq!(reread.find(&key), None);
        }
    }

    #[test]
    fn a_newer_version_replaces_the_row_of_an_older_one() {
        let folder = tempfile::tempdir().unwrap();
        let mut results = Results::open(folder.path()).unwrap();
        let old = row("a", "ubb", 4, 0, 90.0);
        let mut new = row("a", "ubb", 4, 0, 95.0);
        new.key.vitq_version = "2.0.0".to_owned();
        results.insert(old).unwrap();
        results.insert(new.clone()).unwrap();
        assert_eq!(results.rows(), [new]);
    }

    #[test]
    fn a_file_that_holds_no_rows_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.json");
        std::fs::write(&path, "notes of mine").unwrap();
        assert!(matches!(Results::open(folder.path()), Err(Error::FailedPrecondition { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "notes of mine");
    }
}
