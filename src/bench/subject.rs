//! A checkpoint with the images it meets, and what a run asks of it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Instant;

use tch::{Device, Tensor};

use crate::artifact::Artifact;
use crate::bench::heatmap;
use crate::bench::matrix::Cell;
use crate::bench::results::{FLOAT_METHOD, RowKey};
use crate::bench::validation::Validation;
use crate::calib::task::StemHeadPolicy;
use crate::device;
use crate::engine::evaluator::Metrics;
use crate::engine::pipeline::CalibrationImages;
use crate::error::{Error, Result};
use crate::exec::Backend;
use crate::model::{Checkpoint, Model};
use crate::quant::bits::FLOAT_BITS;

/// Speed is measured over whole passes until they took this long together.
const MIN_TIMED_SECONDS: f64 = 1.0;

/// Logits of all validation images and how fast they came.
#[derive(Debug)]
pub(super) struct Scored {
    pub(super) logits: Vec<f32>, // [images, classes]
    pub(super) images_per_second: f64,
}

/// A checkpoint and all the images it meets.
pub(super) struct Subject<'a> {
    pub(super) name: String,
    pub(super) checkpoint: Checkpoint,
    pub(super) validation: Validation<'a>,
    pub(super) validation_digest: String,
    pub(super) calibrations: BTreeMap<u64, Rc<CalibrationImages>>,
}

impl Subject<'_> {
    /// The key of a row.
    pub(super) fn key(
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
            validation_digest: self.validation_digest.clone(),
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

    pub(super) fn calibration(&self, seed: u64) -> Result<&CalibrationImages> {
        let images = self.calibrations.get(&seed);
        images.map(Rc::as_ref).ok_or_else(|| Error::internal("a seed has no calibration images"))
    }

    /// All logits, and the speed of the forward without decoding and transfer of the images.
    pub(super) fn score(
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

    /// The errors of a calibration by unit and operand, as SVG text.
    pub(super) fn heatmap(&self, key: &RowKey, artifact: &Artifact) -> Result<String> {
        let model = Model::build(&self.checkpoint.spec, &self.checkpoint.weights)?;
        heatmap::sqnr(&model, &artifact.header.report.sites, &heatmap::title(key))
    }

    /// Accuracy of logits, and their distance from the float model's.
    pub(super) fn metrics(&self, logits: &[f32], float: &[f32]) -> Metrics {
        let classes = logits.len() / self.validation.len();
        let mut metrics = Metrics::default();
        let images = logits.chunks_exact(classes).zip(float.chunks_exact(classes));
        for (image, (logits, float)) in images.enumerate() {
            metrics.add(logits, self.validation.class(image), Some(float));
        }
        metrics
    }
}
