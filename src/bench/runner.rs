//! The runner: every combination once, each saved as soon as it is known.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use tch::{Device, Tensor};

use crate::bench::matrix::{ArtifactPolicy, Cell, Matrix};
use crate::bench::results::{FLOAT_METHOD, Results, Row, RowKey, write_atomically};
use crate::bench::validation::{self, Validation};
use crate::calib::Progress;
use crate::calib::task::{QuantizeSpec, StemHeadPolicy};
use crate::device;
use crate::digest::sha256_hex;
use crate::engine::evaluator::Metrics;
use crate::engine::pipeline::{self, CalibrationImages};
use crate::engine::{FloatModel, QuantizedModel};
use crate::error::{Error, Result};
use crate::exec::Backend;
use crate::model::Checkpoint;
use crate::quant::bits::FLOAT_BITS;

/// Speed is measured over whole passes until they took this long together.
const MIN_TIMED_SECONDS: f64 = 1.0;

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

/// Logits of all validation images and how fast they came.
#[derive(Debug)]
struct Scored {
    logits: Vec<f32>, // [images, classes]
    images_per_second: f64,
}

/// Runs what `results.json` in `folder` lacks, saving after every row.
///
/// # Errors
/// `InvalidArgument` for an unusable combination, found before anything is computed; what opening
/// checkpoints and data sets, calibration and forwards report. Finished rows stay saved.
pub fn run(matrix: &Matrix, folder: &Path, observer: &dyn Observer) -> Result<(Results, Summary)> {
    let cells = matrix.cells()?;
    let samples = matrix.validation_samples()?;
    let validation_digest = validation::digest(&samples)?;
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
        let subject = Subject {
            name: folder_name(path),
            validation: Validation::open(&samples, checkpoint.spec.preprocessing.clone())?,
            validation_digest: &validation_digest,
            calibrations: matrix.load_calibrations(&checkpoint)?,
            checkpoint,
        };
        for device in &matrix.devices {
            runner.run_subject(&subject, *device, &cells)?;
        }
    }
    Ok((runner.results, runner.summary))
}

/// A checkpoint and all the images it meets.
struct Subject<'a> {
    name: String,
    checkpoint: Checkpoint,
    validation: Validation<'a>,
    validation_digest: &'a str,
    calibrations: BTreeMap<u64, Rc<CalibrationImages>>,
}

impl Subject<'_> {
    /// The key of a row.
    fn key(
        &self,
        cell: &Cell,
        device: Device,
        executor: Backend,
        batch_size: usize,
    ) -> Result<RowKey> {
        let float = RowKey {
            checkpoint: self.name.clone(),
            method: FLOAT_METHOD.to_owned(),
            weight_bits: FLOAT_BITS,
            activation_bits: FLOAT_BITS,
            executor: Backend::Float.name().to_owned(),
            device: device::name(device),
            seed: None,
            stem_head: StemHeadPolicy::Float.name().to_owned(),
            role_bits: String::new(),
            options: BTreeMap::new(),
            batch_size,
            calibration_images: 0,
            calibration_digest: None,
            checkpoint_digest: self.checkpoint.digest.clone(),
            validation_images: self.validation.len(),
            validation_digest: self.validation_digest.to_owned(),
            vitq_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let Cell::Quantized(spec) = cell else { return Ok(float) };
        let calibration = self.calibration(spec.seed)?;
        Ok(RowKey {
            method: spec.method.clone(),
            weight_bits: spec.weight_bits.get(),
            activation_bits: spec.activation_bits.get(),
            executor: executor.name().to_owned(),
            seed: Some(spec.seed),
            stem_head: spec.stem_head.name().to_owned(),
            role_bits: spec.role_bits.to_string(),
            options: spec.options.clone(),
            calibration_images: usize::try_from(calibration.images.size()[0]).unwrap_or(0),
            calibration_digest: Some(calibration.digest.clone()),
            ..float
        })
    }

    fn calibration(&self, seed: u64) -> Result<&CalibrationImages> {
        let images = self.calibrations.get(&seed);
        images.map(Rc::as_ref).ok_or_else(|| Error::internal("a seed has no calibration images"))
    }

    /// All logits, and the speed of the forward without decoding and transfer of the images.
    fn score(
        &self,
        device: Device,
        batch_size: usize,
        forward: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Scored> {
        let _inference = tch::no_grad_guard();
        let mut scored: Option<Scored> = None;
        let (mut seconds, mut images) = (0.0, 0);
        while scored.is_none() || (seconds < MIN_TIMED_SECONDS && self.validation.is_resident()) {
            let mut logits = Vec::new();
            self.validation.for_each_batch(batch_size, device, |batch, pixels| {
                if scored.is_none() && batch.start == 0 {
                    let _warm_up = forward(pixels)?; // allocators, kernel selection
                }
                let start = Instant::now();
                // The copy waits for the device, so that asynchronous work is timed in full.
                let values = forward(pixels)?.f_to_device(Device::Cpu)?;
                seconds += start.elapsed().as_secs_f64();
                images += batch.len();
                logits.extend(Vec::<f32>::try_from(values.f_flatten(0, -1)?)?);
                Ok(())
            })?;
            scored = scored.or(Some(Scored { logits, images_per_second: 0.0 }));
        }
        let mut scored = scored.ok_or_else(|| Error::internal("no pass was made"))?;
        scored.images_per_second = images as f64 / seconds;
        Ok(scored)
    }

    /// Accuracy of logits, and their distance from the float model's.
    fn metrics(&self, logits: &[f32], float: &[f32]) -> Metrics {
        let classes = logits.len() / self.validation.len();
        let mut metrics = Metrics::default();
        let images = logits.chunks_exact(classes).zip(float.chunks_exact(classes));
        for (image, (logits, float)) in images.enumerate() {
            metrics.add(logits, self.validation.class(image), Some(float));
        }
        metrics
    }
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
    artifact_bytes: u64,
    resident_bytes: u64,
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
            let scored = float_scored(subject, device, *batch_size)?;
            let float = reference.get_or_insert_with(|| scored.logits.clone());
            let metrics = subject.metrics(&scored.logits, float);
            let cost = Cost {
                calibration_seconds: 0.0,
                artifact_bytes: subject.checkpoint.bytes,
                resident_bytes: subject.checkpoint.bytes,
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
                reference.insert(float_scored(subject, device, self.matrix.batch_sizes[0])?.logits)
            }
        };
        let calibration = subject.calibration(spec.seed)?;
        let quantized =
            pipeline::quantize(&subject.checkpoint, calibration, spec, device, self.observer)?;
        let bytes = quantized.artifact.to_bytes()?;
        let artifact = match self.matrix.artifacts {
            ArtifactPolicy::Keep => Some(self.keep_artifact(first, &bytes)?),
            ArtifactPolicy::Discard => None,
        };
        for (executor, batch_size, key) in missing {
            let model = QuantizedModel::load(&quantized.artifact, device, executor)?;
            let scored = subject.score(device, batch_size, |images| model.forward(images))?;
            let metrics = subject.metrics(&scored.logits, float);
            let cost = Cost {
                calibration_seconds: quantized.calibration_seconds,
                artifact_bytes: bytes.len() as u64,
                resident_bytes: model.resident_bytes(),
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

    /// Writes an artifact under a name that tells what it is; returns the name.
    fn keep_artifact(&self, key: &RowKey, bytes: &[u8]) -> Result<String> {
        let folder = self.folder.join("artifacts");
        std::fs::create_dir_all(&folder).map_err(|source| Error::io(&folder, source))?;
        let digest = sha256_hex(bytes);
        let (checkpoint, method, bits) = (&key.checkpoint, &key.method, key.bits());
        let name = format!("{checkpoint}-{method}-{bits}-{}.safetensors", &digest[..8]);
        write_atomically(&folder.join(&name), bytes)?;
        Ok(name)
    }
}

fn float_scored(subject: &Subject<'_>, device: Device, batch_size: usize) -> Result<Scored> {
    let model = FloatModel::load(&subject.checkpoint, device)?;
    subject.score(device, batch_size, |images| model.forward(images))
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
        artifact: cost.artifact,
    }
}

/// The last part of a path, also of `.` and `demo/`.
fn folder_name(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    full.file_name().map_or_else(|| full.display().to_string(), |n| n.to_string_lossy().into())
}
