//! The runner: every combination once, each saved as soon as it is known.

use std::path::Path;

use tch::Device;

use crate::bench::bit_cost::{BitCost, bit_cost};
use crate::bench::matrix::{ArtifactPolicy, Cell, Matrix};
use crate::bench::memory::watch_peak;
use crate::bench::results::{Results, Row, RowKey, write_atomically};
use crate::bench::subject::{Scored, Subject};
use crate::bench::validation::{Digests, Validation};
use crate::calib::Progress;
use crate::calib::task::QuantizeSpec;
use crate::digest::sha256_hex;
use crate::engine::evaluator::Metrics;
use crate::engine::pipeline;
use crate::engine::{FloatModel, QuantizedModel};
use crate::error::{Error, Result};
use crate::exec::{Backend, SiteCounts};
use crate::model::Checkpoint;
use crate::quant::QuantPlan;

/// Watches a run.
pub trait Observer: Progress {
    /// A row is about to be computed.
    fn started(&self, key: &RowKey, position: Position);

    /// A row is known: computed now, or found in the result file.
    fn finished(&self, row: &Row, outcome: Outcome, position: Position);
}

/// The place of a row in its run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Number of the row, from 1.
    pub row: usize,
    /// Rows of the run.
    pub rows: usize,
}

/// Where a row came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Computed by this run.
    Computed,
    /// Found in the result file.
    Kept,
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Rows computed by this run.
    pub computed: usize,
    /// Rows found in the result file.
    pub kept: usize,
}

/// Runs what `results.json` in `folder` lacks, saving after every row.
///
/// # Errors
/// `InvalidArgument` for an unusable combination, found before anything is computed; what opening
/// checkpoints and data sets, calibration and forwards report. Finished rows stay saved.
pub fn run(matrix: &Matrix, folder: &Path, observer: &dyn Observer) -> Result<(Results, Summary)> {
    let cells = matrix.cells()?;
    let dataset = matrix.validation_set()?;
    let mut digests = Digests::default();
    let rows = matrix.checkpoints.len() * matrix.devices.len() * matrix.rows(&cells);
    let mut runner = Runner {
        matrix,
        folder,
        observer,
        results: Results::open(folder)?,
        summary: Summary::default(),
        rows,
    };
    for path in &matrix.checkpoints {
        let checkpoint = Checkpoint::open(path)?;
        let samples = matrix.validation_samples(&dataset, &checkpoint.spec)?;
        let subject = Subject {
            name: folder_name(path),
            validation: Validation::open(&samples, checkpoint.spec.preprocessing.clone())?,
            validation_digest: digests.of(&samples)?,
            calibrations: matrix.load_calibrations(&checkpoint)?,
            checkpoint,
        };
        for device in &matrix.devices {
            runner.run_subject(&subject, *device, &cells)?;
        }
    }
    Ok((runner.results, runner.summary))
}

/// The state of a run.
struct Runner<'a> {
    matrix: &'a Matrix,
    folder: &'a Path,
    observer: &'a dyn Observer,
    results: Results,
    summary: Summary,
    rows: usize,
}

/// What a row costs, beside its accuracy and speed.
struct Cost {
    calibration_seconds: f64,
    calibration_peak_bytes: Option<u64>,
    artifact_bytes: u64,
    resident_bytes: u64,
    sites: SiteCounts,
    bit_cost: BitCost,
    artifact: Option<String>,
}

impl Runner<'_> {
    fn run_subject(&mut self, subject: &Subject<'_>, device: Device, cells: &[Cell]) -> Result<()> {
        let mut reference = None;
        for cell in cells {
            match cell {
                Cell::Float => self.run_float(subject, device, &mut reference)?,
                Cell::Quantized(spec) => {
                    self.run_quantized(subject, device, spec, &mut reference)?;
                }
            }
        }
        Ok(())
    }

    fn run_float(
        &mut self,
        subject: &Subject<'_>,
        device: Device,
        reference: &mut Option<Vec<f32>>,
    ) -> Result<()> {
        for batch_size in &self.matrix.batch_sizes {
            let key = subject.key(&Cell::Float, device, Backend::Float, *batch_size)?;
            if self.keep(&key) {
                continue;
            }
            self.observer.started(&key, self.position());
            let model = FloatModel::load(&subject.checkpoint, device)?;
            let scored = float_scored(subject, &model, *batch_size)?;
            let float = reference.get_or_insert_with(|| scored.logits.clone());
            let metrics = subject.metrics(&scored.logits, float);
            let cost = Cost {
                calibration_seconds: 0.0,
                calibration_peak_bytes: None,
                artifact_bytes: subject.checkpoint.bytes,
                resident_bytes: subject.checkpoint.bytes,
                sites: SiteCounts { float: model.model().sites.len(), ..SiteCounts::default() },
                bit_cost: bit_cost(model.model(), &QuantPlan::default(), Backend::Float, device)?,
                artifact: None,
            };
            self.insert(row(key, &metrics, &scored, cost))?;
        }
        Ok(())
    }

    fn run_quantized(
        &mut self,
        subject: &Subject<'_>,
        device: Device,
        spec: &QuantizeSpec,
        reference: &mut Option<Vec<f32>>,
    ) -> Result<()> {
        let cell = Cell::Quantized(spec.clone());
        let mut missing = Vec::new();
        for executor in &self.matrix.executors {
            for batch_size in &self.matrix.batch_sizes {
                let key = subject.key(&cell, device, *executor, *batch_size)?;
                if !self.keep(&key) {
                    missing.push((*executor, *batch_size, key));
                }
            }
        }
        let Some((_, _, first)) = missing.first() else { return Ok(()) };
        self.observer.started(first, self.position());
        let float = match reference {
            Some(float) => float,
            None => {
                let model = FloatModel::load(&subject.checkpoint, device)?;
                reference.insert(float_scored(subject, &model, self.matrix.batch_sizes[0])?.logits)
            }
        };
        let calibration = subject.calibration(spec.seed)?;
        let watch = watch_peak();
        let quantized =
            pipeline::quantize(&subject.checkpoint, calibration, spec, device, self.observer)?;
        let calibration_peak_bytes = watch.and_then(|watch| watch.peak_bytes());
        let bytes = quantized.artifact.to_bytes()?;
        let artifact = match self.matrix.artifacts {
            ArtifactPolicy::Keep => {
                let map = subject.heatmap(first, &quantized.artifact)?;
                Some(self.keep_artifact(first, &bytes, &map)?)
            }
            ArtifactPolicy::Discard => None,
        };
        for (executor, batch_size, key) in missing {
            let model = QuantizedModel::load(&quantized.artifact, device, executor)?;
            let scored = subject.score(device, batch_size, |images| model.forward(images))?;
            let metrics = subject.metrics(&scored.logits, float);
            let cost = Cost {
                calibration_seconds: quantized.calibration_seconds,
                calibration_peak_bytes,
                artifact_bytes: bytes.len() as u64,
                resident_bytes: model.resident_bytes(),
                sites: model.site_counts(),
                bit_cost: bit_cost(model.model(), model.plan(), executor, device)?,
                artifact: artifact.clone(),
            };
            self.insert(row(key, &metrics, &scored, cost))?;
        }
        Ok(())
    }

    /// Whether the row is known already; an artifact that was asked for must be there as well.
    fn keep(&mut self, key: &RowKey) -> bool {
        let Some(row) = self.results.find(key).cloned() else { return false };
        if self.matrix.artifacts == ArtifactPolicy::Keep && !key.is_float() {
            let file = row.artifact.as_ref().map(|name| self.folder.join("artifacts").join(name));
            if !file.is_some_and(|file| file.is_file()) {
                return false;
            }
        }
        let position = self.position();
        self.summary.kept += 1;
        self.observer.finished(&row, Outcome::Kept, position);
        true
    }

    fn insert(&mut self, row: Row) -> Result<()> {
        self.results.insert(row.clone())?;
        let position = self.position();
        self.summary.computed += 1;
        self.observer.finished(&row, Outcome::Computed, position);
        Ok(())
    }

    fn position(&self) -> Position {
        Position { row: self.summary.computed + self.summary.kept + 1, rows: self.rows }
    }

    /// Writes an artifact, and beside it a map of its errors, under a name that tells what it is;
    /// returns the artifact's name.
    fn keep_artifact(&self, key: &RowKey, bytes: &[u8], map: &str) -> Result<String> {
        let folder = self.folder.join("artifacts");
        std::fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, source))?;
        let digest = sha256_hex(bytes);
        let (checkpoint, method, bits) = (&key.checkpoint, &key.method, key.bits());
        let stem = format!("{checkpoint}-{method}-{bits}-{}", &digest[..8]);
        write_atomically(&folder.join(format!("{stem}.svg")), map.as_bytes())?;
        let name = format!("{stem}.safetensors");
        write_atomically(&folder.join(&name), bytes)?;
        Ok(name)
    }
}

fn float_scored(subject: &Subject<'_>, model: &FloatModel, batch_size: usize) -> Result<Scored> {
    subject.score(model.device(), batch_size, |images| model.forward(images))
}

fn row(key: RowKey, metrics: &Metrics, scored: &Scored, cost: Cost) -> Row {
    let sqnr_db = metrics.sqnr_db();
    Row {
        key,
        top1: metrics.top1(),
        top5: metrics.top5(),
        agreement: metrics.agreement(),
        sqnr_db: sqnr_db.is_finite().then_some(sqnr_db),
        calibration_seconds: cost.calibration_seconds,
        images_per_second: scored.images_per_second,
        artifact_bytes: cost.artifact_bytes,
        resident_bytes: cost.resident_bytes,
        sites: Some(cost.sites),
        calibration_peak_bytes: cost.calibration_peak_bytes,
        bit_cost: Some(cost.bit_cost),
        artifact: cost.artifact,
    }
}

/// The last part of a path, also of `.` and `demo/`.
fn folder_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    full.file_name().map_or_else(|| full.display().to_string(), |n| n.to_string_lossy().into())
}
