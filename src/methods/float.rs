//! `float`: quantizes nothing. The reference row of every table, and a way to serve a float model
//! through the same artifact, store and engine as the quantized ones.

use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry};

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "float",
    summary: "no quantization: the float32 reference",
    source: "the checkpoint itself",
    options: &[],
    build: || Box::new(FloatReference),
    restore: |_| None,
};

#[derive(Debug)]
struct FloatReference;

impl Method for FloatReference {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        task.step("calibrate", 1, 1)?;
        let mut quantization = Quantization::default();
        quantization.report.images = task.image_count();
        Ok(quantization)
    }
}
