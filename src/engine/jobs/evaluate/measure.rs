//! One worker's side of an evaluation: the model, the float model beside it, the list of images; and
//! the numbers of some of them.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::choose;
use crate::artifact::store::ModelRecord;
use crate::data::{DecodeLimits, Pixels, Sample, load_pixels};
use crate::digest::hex;
use crate::engine::FloatModel;
use crate::engine::device::{DeviceHandle, LoadKey};
use crate::engine::evaluator::Metrics;
use crate::engine::jobs::EvaluateJob;
use crate::engine::jobs::runner::JobRunner;
use crate::engine::names::ModelId;
use crate::engine::registry::{ModelRegistry, Placement};
use crate::engine::resources::GoingOn;
use crate::error::{Error, Result};
use crate::exec::Backend;

/// Images per forward.
pub(super) const BATCH: usize = 32;

/// Everything that an evaluation needs on this worker. Of its images only the names are in memory.
pub(super) struct Measurement {
    record: Arc<ModelRecord>,
    backend: Backend,
    /// Another one once the model was unloaded meanwhile.
    placement: RefCell<Placement>,
    registry: Arc<ModelRegistry>,
    runtime: Handle,
    reference: Option<Reference>,
    samples: Vec<Sample>,
    remark: Option<String>,
    limits: DecodeLimits,
}

impl Measurement {
    /// Loads the models and lists the images. Without the checkpoint that the model was made from
    /// there is nothing to compare with: then it also says why.
    ///
    /// # Errors
    /// Whatever its steps report; `Cancelled`.
    pub(super) fn prepare(
        runner: &JobRunner,
        job: &EvaluateJob,
        going_on: GoingOn<'_>,
    ) -> Result<(Self, Option<Error>)> {
        let parts = &runner.parts;
        let loading = parts.registry.ensure_loaded(&job.model);
        let (record, placement) = runner.runtime.block_on(loading)?;
        let backend = parts.registry.get(&job.model)?.backend;
        let dataset = parts.resources.open_dataset(&job.dataset, "dataset", going_on)?;
        let (samples, remark) = choose(dataset, job, &record)?;
        let (reference, missing) =
            match Reference::load(runner, &record, &placement.device, going_on) {
                Ok(reference) => (Some(reference), None),
                Err(Error::Cancelled) => return Err(Error::Cancelled),
                Err(error) => (None, Some(error)),
            };
        let measurement = Self {
            record,
            backend,
            placement: placement.into(),
            registry: Arc::clone(&parts.registry),
            runtime: runner.runtime.clone(),
            reference,
            samples,
            remark,
            limits: parts.limits.clone(),
        };
        Ok((measurement, missing))
    }

    /// The model as it was stored.
    pub(super) fn record(&self) -> &ModelRecord {
        &self.record
    }

    /// What may be wrong with the classes of the images.
    pub(super) fn remark(&self) -> Option<&str> {
        self.remark.as_deref()
    }

    /// Number of images.
    pub(super) fn images(&self) -> usize {
        self.samples.len()
    }

    /// Equal for workers whose numbers can be added: the same model and arithmetic, compared with
    /// the same float model or with none, on images of the same names and classes.
    pub(super) fn inputs(&self) -> String {
        let mut hash = Sha256::new();
        let reference = self.reference.as_ref().map_or("", |_| &self.record.source_digest);
        for text in [&self.record.digest, self.backend.name(), reference] {
            hash.update(text);
            hash.update([0]);
        }
        for Sample { name, class, source: _ } in &self.samples {
            hash.update(name);
            hash.update([0]);
            hash.update((*class as u64).to_le_bytes());
        }
        hex(&hash.finalize())
    }

    /// The numbers of a range of the images, of which one batch is decoded while the device works
    /// on the one before. `step` hears of the numbers so far before each batch, and may stop it.
    ///
    /// # Errors
    /// Whatever `step`, decoding and the device report.
    pub(super) fn count(
        &self,
        images: Range<usize>,
        step: &mut dyn FnMut(&Metrics) -> Result<()>,
    ) -> Result<Metrics> {
        let samples = self.samples.get(images);
        let samples = samples.ok_or_else(|| Error::internal("a shard beyond the last image"))?;
        let mut metrics = Metrics::default();
        let mut before: Option<Pending<'_>> = None;
        for batch in samples.chunks(BATCH).map(Some).chain([None]) {
            step(&metrics)?;
            let next = batch.map(|batch| self.start(batch)).transpose()?;
            while let Some(pending) = before.take() {
                let samples = pending.samples;
                match self.add(pending, &mut metrics) {
                    // Unloading frees memory, and ends no job.
                    Err(Error::Unloaded) => {
                        step(&metrics)?;
                        self.load_again()?;
                        before = Some(self.start(samples)?);
                    }
                    added => added?,
                }
            }
            before = next;
        }
        Ok(metrics)
    }

    /// # Errors
    /// `FailedPrecondition` when the model was deleted; whatever the load reports.
    fn load_again(&self) -> Result<()> {
        let ModelRecord { id, digest, .. } = &*self.record;
        let model = ModelId::parse(id, "model")?;
        let loaded = match self.runtime.block_on(self.registry.ensure_loaded(&model)) {
            // Another one may have the name by now.
            Ok((record, placement)) => (record.digest == *digest).then_some(placement),
            Err(Error::NotFound { .. }) => None,
            Err(error) => return Err(error),
        };
        let placement = loaded.ok_or_else(|| {
            let reason = format!("model `{id}` was deleted while it was evaluated");
            Error::FailedPrecondition { reason }
        })?;
        tracing::info!("the model was unloaded, it is loaded again");
        self.placement.replace(placement);
        Ok(())
    }

    fn start<'s>(&self, samples: &'s [Sample]) -> Result<Pending<'s>> {
        let pixels = load_pixels(samples, &self.record.model.preprocessing, &self.limits)?;
        let Placement { device, key, .. } = &*self.placement.borrow();
        let float = self.reference.as_ref().map(|reference| {
            let Pixels { count, image_size, ref data } = pixels;
            reference
                .device
                .forward(reference.key, Pixels { count, image_size, data: data.clone() })
        });
        let float = float.transpose()?;
        Ok(Pending { samples, logits: device.forward(*key, pixels)?, float })
    }

    fn add(&self, pending: Pending<'_>, metrics: &mut Metrics) -> Result<()> {
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

/// Logits on their way: of the model, and of the float model.
struct Pending<'a> {
    samples: &'a [Sample],
    logits: oneshot::Receiver<Result<Vec<f32>>>,
    float: Option<oneshot::Receiver<Result<Vec<f32>>>>,
}

fn receive(logits: oneshot::Receiver<Result<Vec<f32>>>) -> Result<Vec<f32>> {
    logits.blocking_recv().map_err(|_| Error::internal("the device thread is gone"))?
}

/// The float model on the device, for the length of one evaluation.
struct Reference {
    key: LoadKey,
    device: DeviceHandle,
    runtime: Handle,
}

impl Reference {
    /// Loads the checkpoint that the model was made from beside it.
    fn load(
        runner: &JobRunner,
        record: &ModelRecord,
        device: &DeviceHandle,
        going_on: GoingOn<'_>,
    ) -> Result<Self> {
        let resources = &runner.parts.resources;
        let checkpoint = resources.open_checkpoint(&record.checkpoint, "checkpoint", going_on)?;
        if checkpoint.digest != record.source_digest {
            let reason = "differs from the checkpoint that the model was made from";
            return Err(Error::invalid(format!("checkpoint `{}`", record.checkpoint), reason));
        }
        let key = runner.parts.registry.new_key();
        let model = FloatModel::load(&checkpoint, device.device())?;
        let (device, runtime) = (device.clone(), runner.runtime.clone());
        runtime.block_on(device.load(key, Box::new(model), Arc::default()))?;
        Ok(Self { key, device, runtime })
    }
}

/// On a worker's thread, as everything here.
impl Drop for Reference {
    fn drop(&mut self) {
        // A device thread that is gone holds no models.
        let _ = self.runtime.block_on(self.device.unload(self.key));
    }
}
