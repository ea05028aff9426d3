//! The quantization job: checkpoint and images in, a named model out.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use rayon::prelude::*;

use super::progress::{JobReporter, START};
use super::runner::{JobRunner, RunnerParts};
use super::{Afterwards, ImageChoice, JobOutput, QuantizeJob};
use crate::artifact::Artifact;
use crate::artifact::store::RecordOrigin;
use crate::calib::Progress as _;
use crate::data::{DecodeLimits, Pixels, Sample, check_start, decode, load_pixels, preprocess};
use crate::engine::pipeline::{self, CalibrationImages};
use crate::engine::registry::ModelView;
use crate::engine::resources::{DatasetLook, GoingOn, Resources};
use crate::error::{Error, Result};
use crate::model::Preprocessing;

/// Most images that one calibration may ask for; their pixels are held in memory.
const MAX_IMAGES: usize = 4096;

/// Checks what a request names, without opening the checkpoint's weights; the request with the
/// checkpoint pinned. Blocking.
///
/// # Errors
/// `InvalidArgument`, `NotFound`, `AlreadyExists`.
pub(super) fn check(parts: &RunnerParts, mut job: QuantizeJob) -> Result<QuantizeJob> {
    pipeline::validate(&job.request)?;
    job.pinned = parts.resources.check_checkpoint(&job.checkpoint, "checkpoint")?;
    check_images(parts, &job)?;
    match parts.registry.get(&job.model) {
        Ok(_) => Err(Error::AlreadyExists { kind: "model", name: job.model.to_string() }),
        Err(_) => Ok(job),
    }
}

/// Calibrates and stores.
///
/// # Errors
/// Whatever its steps report; `Cancelled`.
pub(super) fn run(
    runner: &JobRunner,
    job: &QuantizeJob,
    reporter: &JobReporter,
) -> Result<JobOutput> {
    let RunnerParts { registry, resources, limits, device, .. } = &runner.parts;
    reporter.stage("load");
    let going_on = || reporter.check_cancelled();
    let checkpoint = reporter
        .wait_for(START, || resources.open_checkpoint(job.source(), "checkpoint", &going_on))?;
    reporter.check_cancelled()?;

    reporter.stage("images");
    let how = &checkpoint.spec.preprocessing;
    let pixels = match &job.images {
        ImageChoice::Inline { contents, .. } => decode_all(contents, how, limits)?,
        ImageChoice::Drawn { .. } | ImageChoice::Listed { .. } => {
            let samples = reporter.wait_for(START, || samples(resources, job, &going_on))?;
            load_pixels(&samples, how, limits)?
        }
    };
    let images = CalibrationImages::from_pixels(&pixels)?;
    reporter.made_of(&[&checkpoint.digest, &images.digest]);
    reporter.check_cancelled()?;

    let quantized = pipeline::quantize(&checkpoint, &images, &job.request, *device, reporter)?;
    reporter.check_cancelled()?;

    reporter.stage("store");
    let origin = RecordOrigin {
        id: job.model.to_string(),
        checkpoint: job.source().to_owned(),
        labels: job.labels.clone(),
        created_ms: Timestamp::now().as_millisecond(),
        calibration_seconds: quantized.calibration_seconds,
    };
    let view = publish(runner, &origin, &quantized.artifact, reporter)?;
    if job.afterwards == Afterwards::Load {
        reporter.stage("serve");
        // The model is made and stored whatever comes of the load; its state tells.
        if let Err(error) = runner.runtime.block_on(registry.ensure_loaded(&job.model)) {
            reporter.warn(error);
        }
    }
    Ok(JobOutput::Quantized(view.record))
}

/// Stores and names the result. What took hours to make is not lost because a store is out of
/// reach: it waits, until it is told to stop.
fn publish(
    runner: &JobRunner,
    origin: &RecordOrigin,
    artifact: &Artifact,
    reporter: &JobReporter,
) -> Result<ModelView> {
    let registry = &runner.parts.registry;
    let bytes = Bytes::from(artifact.to_bytes()?);
    reporter.wait_for(Duration::MAX, || {
        let (origin, header) = (origin.clone(), artifact.header.clone());
        let published = registry.publish(origin, header, bytes.clone(), reporter.lease());
        runner.runtime.block_on(published)
    })
}

fn check_count(count: usize, field: &str) -> Result<()> {
    if (1..=MAX_IMAGES).contains(&count) {
        return Ok(());
    }
    let reason = format!("a calibration takes 1 to {MAX_IMAGES} images, not {count}");
    Err(Error::invalid(field, reason))
}

/// Checks the choice of images as far as it can be done without fetching them.
fn check_images(parts: &RunnerParts, job: &QuantizeJob) -> Result<()> {
    let look = |name: &str| parts.resources.look_at_dataset(name, "dataset.name");
    match &job.images {
        ImageChoice::Inline { contents, .. } => {
            check_count(contents.len(), "images.images")?;
            let check = |(index, content): (usize, &Bytes)| {
                check_start(content, &parts.limits, &content_field(index))
            };
            contents.iter().enumerate().try_for_each(check)
        }
        ImageChoice::Drawn { dataset, count } => {
            check_count(*count, "dataset.count")?;
            match look(dataset)? {
                DatasetLook::Open(set) => {
                    set.subset(*count, job.request.seed, "dataset.count").map(drop)
                }
                DatasetLook::Uploaded(info) => info.check_count(*count, "dataset.count"),
            }
        }
        ImageChoice::Listed { dataset, files } => {
            check_count(files.len(), "dataset.files")?;
            match look(dataset)? {
                DatasetLook::Open(set) => set.listed(files, "dataset.files").map(drop),
                // The job finds out whether the set has these files.
                DatasetLook::Uploaded(_) => Ok(()),
            }
        }
    }
}

fn samples(resources: &Resources, job: &QuantizeJob, going_on: GoingOn<'_>) -> Result<Vec<Sample>> {
    let open = |name: &str| resources.open_dataset(name, "dataset.name", going_on);
    match &job.images {
        ImageChoice::Drawn { dataset, count } => {
            open(dataset)?.subset(*count, job.request.seed, "dataset.count")
        }
        ImageChoice::Listed { dataset, files } => open(dataset)?.listed(files, "dataset.files"),
        ImageChoice::Inline { .. } => Ok(Vec::new()),
    }
}

/// What the request calls the bytes of an image.
fn content_field(index: usize) -> String {
    format!("images.images[{index}].content")
}

fn decode_all(contents: &[Bytes], how: &Preprocessing, limits: &DecodeLimits) -> Result<Pixels> {
    let images = contents
        .par_iter()
        .enumerate()
        .map(|(index, bytes)| {
            let image = decode(bytes, limits, &content_field(index))?;
            preprocess(&image, how)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Pixels { count: images.len(), image_size: how.image_size, data: images.concat() })
}
