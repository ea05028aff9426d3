//! From a checkpoint and calibration images to an artifact: what every entry point runs.

use std::sync::Arc;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use crate::artifact::Artifact;
use crate::artifact::content::Source;
use crate::calib::{CalibrationTask, Progress, ProgressUpdate, QuantizeSpec};
use crate::data::Pixels;
use crate::error::{Error, Result};
use crate::methods::{self, MethodOptions};
use crate::model::Checkpoint;

/// Calibration images, already preprocessed for the model.
#[derive(Debug)]
pub struct CalibrationImages {
    /// Normalised float32 [n, 3, h, w].
    pub images: Tensor,
    /// sha256 (hex) over the pixels, in order.
    pub digest: String,
}

impl CalibrationImages {
    /// Wraps preprocessed images.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn from_pixels(pixels: &Pixels) -> Result<Self> {
        Ok(Self { images: image_batch(pixels)?, digest: pixels.digest() })
    }
}

/// Preprocessed images as a float32 tensor [n, 3, h, w] on the CPU.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn image_batch(pixels: &Pixels) -> Result<Tensor> {
    let shape = [pixels.count as i64, 3, pixels.image_size, pixels.image_size];
    Ok(Tensor::f_from_slice(&pixels.data)?.f_view(shape)?)
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
    checkpoint: &Checkpoint,
    calibration: &CalibrationImages,
    request: &QuantizeSpec,
    device: Device,
    progress: &dyn Progress,
) -> Result<Quantized> {
    let entry = methods::find(&request.method)?;
    let options = MethodOptions::resolve(entry.options, &request.options)?;
    check_images(checkpoint, &calibration.images)?;
    let _guard = tch::no_grad_guard();
    let mut task = CalibrationTask {
        spec: Arc::clone(&checkpoint.spec),
        weights: checkpoint.weights.to_device(device)?,
        images: calibration.images.f_to_device(device)?,
        request: request.clone(),
        options,
        device,
        progress,
    };
    let start = Instant::now();
    let quantization = (entry.build)().calibrate(&mut task)?;
    let calibration_seconds = start.elapsed().as_secs_f64();
    let images = task.image_count();
    let update = ProgressUpdate {
        stage: "pack".to_owned(),
        images,
        images_total: images,
        ..Default::default()
    };
    progress.report(update);
    let source = Source {
        checkpoint,
        request,
        calibration_digest: &calibration.digest,
        quantization: &quantization,
    };
    Ok(Quantized { artifact: Artifact::build(&source)?, calibration_seconds })
}

/// Checks a request without running it: method and options.
///
/// # Errors
/// As [`quantize`].
pub fn validate(request: &QuantizeSpec) -> Result<()> {
    let method = methods::find(&request.method)?;
    MethodOptions::resolve(method.options, &request.options).map(|_| ())
}

fn check_images(checkpoint: &Checkpoint, images: &Tensor) -> Result<()> {
    let side = checkpoint.spec.preprocessing.image_size;
    let shape = images.size();
    let fits = images.kind() == Kind::Float
        && shape.len() == 4
        && shape[0] > 0
        && shape[1..] == [3, side, side];
    if fits {
        return Ok(());
    }
    let reason =
        format!("calibration images have shape {shape:?}, the model takes [n, 3, {side}, {side}]");
    Err(Error::invalid("calibration", reason))
}
