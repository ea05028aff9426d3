//! Models ready to run on a device: quantized ones from an artifact alone, float ones from a
//! checkpoint.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use crate::artifact::Artifact;
use crate::error::{Error, Result};
use crate::exec::{Backend, Float, Simulated, WeightSource};
use crate::model::{Checkpoint, Model, ModelSpec};
use crate::nn::Weights;
use crate::quant::QuantPlan;

/// A quantized model: decoded weights, restored quantizers, the backend's executor.
#[derive(Debug)]
pub struct QuantizedModel {
    model: Model,
    plan: QuantPlan,
    backend: Backend,
    device: Device,
    resident_bytes: u64,
}

impl QuantizedModel {
    /// Builds the model of an artifact on a device.
    ///
    /// `Backend::Float` runs the stored weights with float activations ("weights only").
    ///
    /// # Errors
    /// `CorruptArtifact` when the artifact contradicts itself; `Device` when memory is short.
    pub fn load(artifact: &Artifact, device: Device, backend: Backend) -> Result<Self> {
        let spec = Arc::new(artifact.header.model.clone());
        let weights = artifact.weights()?.to_device(device)?;
        // The digest was right, so a misfit is a damaged or foreign header, not the caller's fault.
        let model =
            Model::build(&spec, &weights).map_err(|e| Error::corrupt("artifact", e.to_string()))?;
        let plan = artifact.plan(&model, device)?;
        Ok(Self { model, plan, backend, device, resident_bytes: bytes_of(&weights) })
    }

    /// Logits float32 [n, classes] of normalised images float32 [n, 3, h, w] (any device).
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let images = images.f_to_device(self.device)?;
        match self.backend {
            Backend::Float => self.model.forward(&mut Float, &images),
            Backend::Simulated => {
                self.model.forward(&mut Simulated::new(&self.plan, WeightSource::Decoded), &images)
            }
        }
    }

    /// The architecture over the decoded weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The restored quantizers.
    pub fn plan(&self) -> &QuantPlan {
        &self.plan
    }

    /// Bytes of parameters held on the device.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.model.spec
    }
}

/// A checkpoint executed in float32: the reference of every comparison.
#[derive(Debug)]
pub struct FloatModel {
    model: Model,
    device: Device,
}

impl FloatModel {
    /// Builds a checkpoint's model on a device.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub fn load(checkpoint: &Checkpoint, device: Device) -> Result<Self> {
        let weights = checkpoint.weights.to_device(device)?;
        Ok(Self { model: Model::build(&checkpoint.spec, &weights)?, device })
    }

    /// Logits float32 [n, classes] of normalised images float32 [n, 3, h, w] (any device).
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        self.model.forward(&mut Float, &images.f_to_device(self.device)?)
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The architecture over its weights.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the model is.
    pub fn spec(&self) -> &Arc<ModelSpec> {
        &self.model.spec
    }
}

fn bytes_of(weights: &Weights) -> u64 {
    let size = |t: &Tensor| t.numel() * if t.kind() == Kind::Float { 4 } else { 1 };
    weights.iter().map(|(_, tensor)| size(tensor) as u64).sum()
}
