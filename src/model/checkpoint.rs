//! A checkpoint: `model.safetensors` and `config.json` in one folder, as timm publishes them.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::ModelSpec;
use crate::nn::Weights;

/// A float model read from disk, weights on the CPU.
#[derive(Debug)]
pub struct Checkpoint {
    /// What the weights are of.
    pub spec: Arc<ModelSpec>,
    /// float32 parameters under timm 0.6.13's names.
    pub weights: Weights,
    /// sha256 (hex) over `config.json` and `model.safetensors`.
    pub digest: String,
    /// Size of `model.safetensors` in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// Reads and checks the folder.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint` for unusable content, `Io` for unreadable files.
    pub fn open(_folder: &Path) -> Result<Self> {
        Err(Error::internal("not built yet"))
    }
}
