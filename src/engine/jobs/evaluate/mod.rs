//! The evaluation job: a model and a labelled data set in, accuracy and fidelity out.
//!
//! [`measure`] is one worker's view of it: what is loaded, and the numbers of some of its images.
//! [`shards`] spreads the images over the workers of several processes.

mod measure;
mod shards;

use super::progress::{JobReporter, START};
use super::runner::{JobRunner, RunnerParts};
use super::{EvaluateJob, Evaluation, JobOutput, JobProgress};
use crate::artifact::store::ModelRecord;
use crate::calib::{Progress as _, ProgressUpdate};
use crate::data::{Dataset, Sample, check_classes};
use crate::engine::evaluator::Metrics;
use crate::engine::names::ModelId;
use crate::engine::resources::DatasetLook;
use crate::error::{Error, Result};
use crate::model::ModelSpec;

use measure::Measurement;

pub(super) use shards::help;

/// Checks what a request names; the request with the model that an alias stands for. Blocking.
///
/// # Errors
/// `InvalidArgument`, `NotFound`.
pub(super) fn check(parts: &RunnerParts, mut job: EvaluateJob) -> Result<EvaluateJob> {
    let record = parts.registry.get(&job.model)?.record;
    if record.id != job.model.as_str() {
        let id = ModelId::parse(&record.id, "model")?;
        job.alias = Some(std::mem::replace(&mut job.model, id));
    }
    match parts.resources.look_at_dataset(&job.dataset, "dataset")? {
        DatasetLook::Open(dataset) => choose(dataset, &job, &record).map(drop)?,
        DatasetLook::Uploaded(info) => {
            check_classes(info.classes.len(), record.model.num_classes, "dataset")?;
            job.limit.map_or(Ok(()), |limit| info.check_count(limit, "limit"))?;
        }
    }
    Ok(job)
}

/// Evaluates, together with other processes if there is much to do. `earlier` is what watchers were
/// told last.
///
/// # Errors
/// Whatever its steps report; `Cancelled`.
pub(super) fn run(
    runner: &JobRunner,
    job: &EvaluateJob,
    earlier: Option<&JobProgress>,
    reporter: &JobReporter,
) -> Result<JobOutput> {
    let told = begin(earlier, reporter);
    let going_on = || reporter.check_cancelled();
    let (measurement, no_reference) =
        reporter.wait_for(START, || Measurement::prepare(runner, job, &going_on))?;
    let mut warnings = Vec::new();
    if let Some(error) = no_reference {
        warnings.push(format!("no agreement and no SQNR: {error}"));
        reporter.warn(error);
    }
    if let Some(remark) = measurement.remark() {
        let warning = Error::invalid("dataset", remark);
        warnings.push(warning.to_string());
        reporter.warn(warning);
    }
    let figures = shards::lead(runner, &measurement, told, reporter)?;
    Ok(JobOutput::Evaluated(Evaluation {
        model: job.model.clone(),
        model_version: measurement.record().digest.clone(),
        dataset: job.dataset.clone(),
        figures,
        warnings,
    }))
}

/// Tells that the models are loaded now, and again of the images that an earlier attempt told of:
/// watchers never see fewer. Their numbers.
fn begin(earlier: Option<&JobProgress>, reporter: &JobReporter) -> Metrics {
    let (images, images_total) = earlier.map_or((0, 0), |told| (told.images, told.images_total));
    let figures = earlier.and_then(|told| told.figures.clone());
    let told = figures.as_ref().map(|figures| figures.metrics.clone()).unwrap_or_default();
    if let Some(figures) = figures {
        reporter.figures(figures);
    }
    reporter.report(ProgressUpdate {
        stage: "load".to_owned(),
        images,
        images_total,
        ..ProgressUpdate::default()
    });
    told
}

/// The images that are evaluated, with the model's classes; and what may be wrong with these.
fn choose(
    dataset: Dataset,
    job: &EvaluateJob,
    record: &ModelRecord,
) -> Result<(Vec<Sample>, Option<String>)> {
    let ModelSpec { labels, num_classes, .. } = &record.model;
    let (dataset, remark) = dataset.for_model(labels, *num_classes, "dataset")?;
    let samples = match job.limit {
        Some(limit) => dataset.subset(limit, job.seed, "limit")?,
        None => dataset.samples,
    };
    Ok((samples, remark))
}
