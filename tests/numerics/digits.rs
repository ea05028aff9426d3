//! A demo model and its images, to quantize in the test's own process.

use tch::Tensor;
use vitq::calib::{QuantizeSpec, RoleBits, StemHeadPolicy};
use vitq::data::{Dataset, DecodeLimits, Sample, load_pixels};
use vitq::engine::pipeline::{CalibrationImages, image_batch};
use vitq::model::Checkpoint;
use vitq::quant::BitWidth;

use crate::reference::root;

/// A demo model, calibration images, validation images and their classes.
pub(crate) struct Digits {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) calibration: CalibrationImages,
    pub(crate) images: Tensor,
    #[allow(dead_code, reason = "for tests that measure accuracy")]
    pub(crate) labels: Vec<usize>,
}

impl Digits {
    /// That many calibration images, and every `step`th validation image.
    pub(crate) fn open(name: &str, calibration: usize, step: usize) -> Self {
        let demo = root("demo");
        let checkpoint = Checkpoint::open(&demo.join("checkpoints").join(name)).unwrap();
        let how = checkpoint.spec.preprocessing.clone();
        let pixels =
            |samples: &[Sample]| load_pixels(samples, &how, &DecodeLimits::default()).unwrap();
        let dataset = |part: &str| {
            Dataset::open(&demo.join("datasets/digits").join(part), "dataset").unwrap()
        };
        let calibration = dataset("calib").subset(calibration, 0, "calib_images").unwrap();
        let samples: Vec<Sample> = dataset("val").samples.into_iter().step_by(step).collect();
        Self {
            calibration: CalibrationImages::from_pixels(&pixels(&calibration)).unwrap(),
            images: image_batch(&pixels(&samples)).unwrap(),
            labels: samples.iter().map(|sample| sample.class).collect(),
            checkpoint,
        }
    }
}

/// Weights and activations at that many bits.
pub(crate) fn request(
    method: &str,
    options: &[(&str, &str)],
    bits: u32,
    stem_head: StemHeadPolicy,
) -> QuantizeSpec {
    let bits = BitWidth::new(bits, "bits").unwrap();
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    QuantizeSpec {
        method: method.to_owned(),
        options: options.collect(),
        weight_bits: bits.into(),
        activation_bits: bits.into(),
        stem_head,
        seed: 0,
        role_bits: RoleBits::default(),
    }
}
