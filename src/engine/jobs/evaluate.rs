//! The evaluation job: a model and a labelled data set in, accuracy and fidelity out.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use super::progress::{JobReporter, START};
use super::runner::{JobRunner, RunnerParts};
use super::{EvaluateJob, Evaluation, Figures, JobOutput};
use crate::artifact::store::ModelRecord;
use crate::calib::{Progress as _, ProgressUpdate};
use crate::data::{Dataset, Pixels, Sample, load_pixels};
use crate::engine::FloatModel;
use crate::engine::device::{DeviceHandle, LoadKey};
use crate::engine::evaluator::Metrics;
use crate::engine::registry::Placement;
use crate::engine::resources::{DatasetLook, GoingOn};
use crate::error::{Error, Result};

/// Images per forward.
const BATCH: usize = 32;

/// Checks what a request names. Blocking.
///
/// # Errors
/// `InvalidArgument`, `NotFound`.
pub(super) fn check(parts: &RunnerParts, job: &EvaluateJob) -> Result<()> {
    let record = parts.registry.get(&job.model)?.record;
    match parts.resources.look_at_dataset(&job.dataset, "dataset")? {
        DatasetLook::Open(dataset) => choose(dataset, job, &record).map(drop),
        DatasetLook::Uploaded(info) => {
            check_classes(info.classes.len(), &record)?;
            job.limit.map_or(Ok(()), |limit| info.check_count(limit, "limit"))
        }
    }
}

/// Evaluates.
///
/// # Errors
/// Whatever its steps report; `Cancelled`.
pub(super) fn run(
    runner: &JobRunner,
    job: &EvaluateJob,
    reporter: &JobReporter,
) -> Result<JobOutput> {
    let RunnerParts { registry, .. } = &runner.parts;
    reporter.stage("load");
    let (record, placement) = runner.runtime.block_on(registry.ensure_loaded(&job.model))?;
    let going_on = || reporter.check_cancelled();
    let dataset = reporter.wait_for(START, || {
        runner.parts.resources.open_dataset(&job.dataset, "dataset", &going_on)
    })?;
    let samples = choose(dataset, job, &record)?;
    let mut warnings = Vec::new();
    let reference = match float_reference(runner, &record, &placement.device, &going_on) {
        Ok(key) => Some(key),
        Err(Error::Cancelled) => return Err(Error::Cancelled),
        Err(error) => {
            warnings.push(format!("no agreement and no SQNR: {error}"));
            reporter.warn(error);
            None
        }
    };
    let run = EvaluationRun { runner, record: &record, placement: &placement, reference, reporter };
    let figures = run.all(&samples);
    if let Some(key) = reference {
        runner.runtime.block_on(placement.device.unload(key))?;
    }
    Ok(JobOutput::Evaluated(Evaluation {
        model: job.model.clone(),
        model_version: record.digest.clone(),
        dataset: job.dataset.clone(),
        figures: figures?,
        warnings,
    }))
}

/// The images that are evaluated.
fn choose(dataset: Dataset, job: &EvaluateJob, record: &ModelRecord) -> Result<Vec<Sample>> {
    check_classes(dataset.classes.len(), record)?;
    match job.limit {
        Some(limit) => dataset.subset(limit, job.seed, "limit"),
        None => Ok(dataset.samples),
    }
}

fn check_classes(found: usize, record: &ModelRecord) -> Result<()> {
    let known = record.model.num_classes;
    if i64::try_from(found).map_or(true, |found| found > known) {
        let reason = format!("has {found} classes, the model knows {known}");
        return Err(Error::invalid("dataset", reason));
    }
    Ok(())
}

/// Loads the checkpoint that the model was made from beside it.
fn float_reference(
    runner: &JobRunner,
    record: &ModelRecord,
    device: &DeviceHandle,
    going_on: GoingOn<'_>,
) -> Result<LoadKey> {
    let resources = &runner.parts.resources;
    let checkpoint = resources.open_checkpoint(&record.checkpoint, "checkpoint", going_on)?;
    if checkpoint.digest != record.source_digest {
        let reason = "differs from the checkpoint that the model was made from";
        return Err(Error::invalid(format!("checkpoint `{}`", record.checkpoint), reason));
    }
    let key = runner.parts.registry.new_key();
    let model = FloatModel::load(&checkpoint, device.device())?;
    runner.runtime.block_on(device.load(key, Box::new(model), Arc::default()))?;
    Ok(key)
}

struct EvaluationRun<'a> {
    runner: &'a JobRunner,
    record: &'a Arc<ModelRecord>,
    placement: &'a Placement,
    reference: Option<LoadKey>,
    reporter: &'a JobReporter,
}

/// Logits on their way: of the model, and of the float model.
struct Pending<'a> {
    samples: &'a [Sample],
    logits: oneshot::Receiver<Result<Vec<f32>>>,
    float: Option<oneshot::Receiver<Result<Vec<f32>>>>,
}

impl EvaluationRun<'_> {
    /// Decodes one batch while the device works on the one before.
    fn all(&self, samples: &[Sample]) -> Result<Figures> {
        let started = Instant::now();
        let units = samples.len().div_ceil(BATCH);
        let mut metrics = Metrics::default();
        let mut before: Option<Pending<'_>> = None;
        let batches = samples.chunks(BATCH).map(Some).chain([None]);
        for (unit, batch) in batches.enumerate() {
            self.reporter.check_cancelled()?;
            let next = batch.map(|batch| self.start(batch)).transpose()?;
            if let Some(pending) = before.take() {
                self.count(pending, &mut metrics)?;
                let figures = figures(&metrics, started);
                self.reporter.figures(figures);
                self.reporter.report(ProgressUpdate {
                    stage: "evaluate".to_owned(),
                    unit,
                    units,
                    images: usize::try_from(metrics.images).unwrap_or(usize::MAX),
                    images_total: samples.len(),
                    ..ProgressUpdate::default()
                });
            }
            before = next;
        }
        Ok(figures(&metrics, started))
    }

    fn start<'s>(&self, samples: &'s [Sample]) -> Result<Pending<'s>> {
        let RunnerParts { limits, .. } = &self.runner.parts;
        let pixels = load_pixels(samples, &self.record.model.preprocessing, limits)?;
        let Placement { device, key, .. } = self.placement;
        let float = self.reference.map(|key| {
            let Pixels { count, image_size, ref data } = pixels;
            device.forward(key, Pixels { count, image_size, data: data.clone() })
        });
        let float = float.transpose()?;
        Ok(Pending { samples, logits: device.forward(*key, pixels)?, float })
    }

    fn count(&self, pending: Pending<'_>, metrics: &mut Metrics) -> Result<()> {
        let Pending { samples, logits, float } = pending;
        let classes = usize::try_from(self.record.model.num_classes).unwrap_or(0).max(1);
        let logits = receive(logits)?;
        let float = float.map(receive).transpose()?;
        for (index, sample) in samples.iter().enumerate() {
            let row = index * classes..(index + 1) * classes;
            let short = || Error::internal("a forward gave too few logits");
            let quantized = logits.get(row.clone()).ok_or_else(short)?;
            let reference = match &float {
                Some(float) => Some(float.get(row).ok_or_else(short)?),
                None => None,
            };
            metrics.add(quantized, sample.class, reference);
        }
        Ok(())
    }
}

fn receive(logits: oneshot::Receiver<Result<Vec<f32>>>) -> Result<Vec<f32>> {
    logits.blocking_recv().map_err(|_| Error::internal("the device thread is gone"))?
}

fn figures(metrics: &Metrics, started: Instant) -> Figures {
    let seconds = started.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
    Figures { metrics: metrics.clone(), images_per_second: metrics.images as f64 / seconds }
}
