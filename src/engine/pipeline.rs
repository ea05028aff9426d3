//! From a checkpoint and calibration images to an artifact: what every entry point runs.

use tch::{Device, Tensor};

use crate::artifact::Artifact;
use crate::calib::Progress;
use crate::calib::task::QuantizeSpec;
use crate::error::{Error, Result};
use crate::model::Checkpoint;

/// Calibration images, already preprocessed for the model.
#[derive(Debug)]
pub struct CalibrationImages {
    /// Normalised float32 [n, 3, h, w].
    pub images: Tensor,
    /// sha256 (hex) over the pixels, in order.
    pub digest: String,
}

/// The result of [`quantize`].
#[derive(Debug)]
pub struct Quantized {
    /// What to store and serve.
    pub artifact: Artifact,
    /// Wall time of the method in seconds.
    pub calibration_seconds: f64,
}

/// Calibrates a checkpoint.
///
/// # Errors
/// `InvalidArgument` for an unknown method or option or an unusable combination; `Cancelled`;
/// `Device`.
pub fn quantize(
    _checkpoint: &Checkpoint,
    _calibration: &CalibrationImages,
    _request: &QuantizeSpec,
    _device: Device,
    _progress: &dyn Progress,
) -> Result<Quantized> {
    Err(Error::internal("not built yet"))
}

/// Checks a request without running it: method, options, and bits against the model.
///
/// # Errors
/// As [`quantize`].
pub fn validate(request: &QuantizeSpec) -> Result<()> {
    let method = crate::methods::find(&request.method)?;
    crate::methods::MethodOptions::resolve(method.options, &request.options)?;
    Ok(())
}
