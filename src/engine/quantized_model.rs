//! A quantized model on a device, built from an artifact alone.

use tch::{Device, Tensor};

use crate::artifact::Artifact;
use crate::error::{Error, Result};
use crate::exec::Backend;

/// A model ready to classify: decoded weights, restored quantizers, the backend's executor.
#[derive(Debug)]
pub struct QuantizedModel {
    device: Device,
}

impl QuantizedModel {
    /// Builds the model of an artifact on a device.
    ///
    /// # Errors
    /// `CorruptArtifact` when the artifact contradicts itself; `Device` when memory is short.
    pub fn load(_artifact: &Artifact, _device: Device, _backend: Backend) -> Result<Self> {
        Err(Error::internal("not built yet"))
    }

    /// Logits float32 [n, classes] of normalised images float32 [n, 3, h, w] (any device).
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, images: &Tensor) -> Result<Tensor> {
        Ok(images.to_device(self.device))
    }

    /// Bytes of parameters held on the device.
    pub fn resident_bytes(&self) -> u64 {
        0
    }
}
