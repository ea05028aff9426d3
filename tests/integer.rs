//! The law of the integer executor: what `Simulated` computes, for every method and both families.

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the measured figures are shown with --nocapture")]

use std::path::{Path, PathBuf};

use tch::{Device, Tensor};
use vitq::artifact::Artifact;
use vitq::calib::progress::Unwatched;
use vitq::calib::{QuantizeSpec, RoleBits, StemHeadPolicy};
use vitq::data::{Dataset, DecodeLimits, Sample, load_pixels};
use vitq::engine::QuantizedModel;
use vitq::engine::pipeline::{CalibrationImages, image_batch, quantize};
use vitq::exec::Backend;
use vitq::model::Checkpoint;
use vitq::quant::BitWidth;
use vitq::tensor::to_vec_f64;

/// Every method that quantizes, with options that keep its calibration quick.
const METHODS: [(&str, &[(&str, &str)]); 8] = [
    ("minmax", &[]),
    ("ubb", &[]),
    ("ptq4vit", &[]),
    ("repq", &[]),
    ("igq", &[("allocation", "false")]),
    ("ias", &[("iterations", "1")]),
    ("dopq", &[("learning", "off")]),
    ("vitq", &[]),
];

/// Every so many validation images.
const STEP: usize = 9;

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A demo model, calibration images, validation images.
struct Subject {
    checkpoint: Checkpoint,
    calibration: CalibrationImages,
    images: Tensor,
}

fn subject(name: &str) -> Subject {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints").join(name)).unwrap();
    let how = checkpoint.spec.preprocessing.clone();
    let pixels = |samples: &[Sample]| load_pixels(samples, &how, &DecodeLimits::default()).unwrap();
    let dataset =
        |part: &str| Dataset::open(&root("demo/datasets/digits").join(part), "dataset").unwrap();
    let calibration = dataset("calib").subset(4, 0, "calib_images").unwrap();
    let step = std::env::var("STEP").map_or(STEP, |s| s.parse().unwrap());
    let samples: Vec<Sample> = dataset("val").samples.into_iter().step_by(step).collect();
    Subject {
        calibration: CalibrationImages::from_pixels(&pixels(&calibration)).unwrap(),
        images: image_batch(&pixels(&samples)).unwrap(),
        checkpoint,
    }
}

fn artifact(subject: &Subject, method: &str, options: &[(&str, &str)], bits: u32) -> Artifact {
    let bits = BitWidth::new(bits, "bits").unwrap();
    let options = options.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let request = QuantizeSpec {
        method: method.to_owned(),
        options: options.collect(),
        weight_bits: bits.into(),
        activation_bits: bits.into(),
        stem_head: StemHeadPolicy::Int8,
        seed: 0,
        role_bits: RoleBits::default(),
    };
    let Subject { checkpoint, calibration, .. } = subject;
    quantize(checkpoint, calibration, &request, Device::Cpu, &Unwatched).unwrap().artifact
}

#[test]
fn integers_compute_what_is_simulated() {
    for name in ["digits-vit", "digits-swin"] {
        let subject = subject(name);
        let count = subject.images.size()[0];
        for (method, options) in METHODS {
            for bits in [4, 8] {
                let artifact = artifact(&subject, method, options, bits);
                let load = |backend| QuantizedModel::load(&artifact, Device::Cpu, backend).unwrap();
                let (simulated, integer) = (load(Backend::Simulated), load(Backend::Integer));
                let expected = simulated.forward(&subject.images).unwrap();
                let found = integer.forward(&subject.images).unwrap();
                let largest = expected.abs().max();
                let errors = (&found - &expected).abs().amax([-1i64].as_slice(), false) / &largest;
                let same = found.argmax(-1, false).eq_tensor(&expected.argmax(-1, false));
                let same = same.sum(tch::Kind::Int64).int64_value(&[]);
                let mut errors = to_vec_f64(&errors).unwrap();
                errors.sort_by(f64::total_cmp);
                println!(
                    "{name} {method} {bits}: {}, {same}/{count} same, error median {:.1e} 90 % {:.1e} max {:.1e}, bytes {} of {}",
                    integer.site_counts(),
                    errors[errors.len() / 2],
                    errors[errors.len() * 9 / 10],
                    errors[errors.len() - 1],
                    integer.resident_bytes(),
                    simulated.resident_bytes(),
                );
                assert_eq!(same, count, "{name} {method} {bits}");
                let alone = integer.forward(&subject.images.narrow(0, 3, 1)).unwrap();
                assert!(alone.equal(&found.narrow(0, 3, 1)), "{name} {method} {bits} alone");
            }
        }
    }
}
