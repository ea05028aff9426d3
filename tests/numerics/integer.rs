//! The law of the integer executor: what `Simulated` computes, for every method and both families.

use tch::{Device, Tensor};
use vitq::Result;
use vitq::artifact::Artifact;
use vitq::calib::StemHeadPolicy;
use vitq::calib::progress::Unwatched;
use vitq::engine::QuantizedModel;
use vitq::engine::pipeline::{CalibrationImages, quantize};
use vitq::exec::{Backend, Executor, Integer, Packer, ScoreTerms, Simulated, WeightSource};
use vitq::model::Checkpoint;
use vitq::model::generated::{GeneratedOptions, generate, images};
use vitq::nn::{LayerNorm, Linear, Site};
use vitq::tensor::to_vec_f64;

use crate::digits::{Digits, request};
use crate::methods::quantizing;

/// Every so many validation images.
const STEP: usize = 9;

/// Difference of one product with the same operands, relative to its largest value: float32 rounding
/// of sums of some hundred terms.
const PRODUCT_BOUND: f64 = 3e-6;

/// Difference of logits, relative to the largest. Where no operand is near the border of two codes it
/// is rounding (half of the images: below 1e-6); a code that falls on the other side is a step of its
/// grid. Largest seen: 0.09 (`ias` at 4 bits).
const LOGIT_BOUND: f64 = 0.15;

fn artifact(
    (checkpoint, calibration): (&Checkpoint, &CalibrationImages),
    (method, options): (&str, &[(&str, &str)]),
    bits: u32,
) -> Artifact {
    let request = request(method, options, bits, StemHeadPolicy::Int8);
    quantize(checkpoint, calibration, &request, Device::Cpu, &Unwatched).unwrap().artifact
}

/// Computes each product twice, from the same operands, and goes on with the simulated one.
struct Twice<'a> {
    simulated: Simulated<'a>,
    integer: Integer<'a>,
    /// Largest difference of each product, and where.
    differences: Vec<(f64, String)>,
}

impl Twice<'_> {
    fn compare(&mut self, site: &Site, found: &Tensor, expected: &Tensor) {
        assert_eq!(found.size(), expected.size(), "{}", site.path);
        let largest = |x: &Tensor| x.abs().max().double_value(&[]);
        let difference = largest(&(found - expected)) / largest(expected);
        self.differences.push((difference, site.path.clone()));
    }
}

impl Executor for Twice<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let expected = self.simulated.linear(op, x)?;
        let found = self.integer.linear(op, x)?;
        self.compare(&op.site, &found, &expected);
        Ok(expected)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let expected = self.simulated.matmul(site, lhs, rhs)?;
        let found = self.integer.matmul(site, lhs, rhs)?;
        self.compare(site, &found, &expected);
        Ok(expected)
    }
}

/// Computes blocks step by step.
struct Steps<'a>(Integer<'a>);

impl Executor for Steps<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        self.0.linear(op, x)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        self.0.matmul(site, lhs, rhs)
    }

    fn layer_norm(&mut self, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        self.0.layer_norm(norm, x)
    }

    fn linear_gelu(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        self.0.linear_gelu(op, x)
    }

    fn attention_weights(
        &mut self,
        site: &Site,
        operands: [&Tensor; 2],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        self.0.attention_weights(site, operands, terms)
    }
}

/// Products that have no integer form.
fn simulated_sites(model: &str, method: &str) -> usize {
    match (method, model) {
        // Inputs of linears, q and k have grids by channel.
        ("igq", "digits-vit") => 24,
        ("igq", _) => 26,
        // Scores lie on no grid of integers.
        ("dopq", _) => 6,
        _ => 0,
    }
}

/// Same top-1, logits within the bound, one image as many.
fn check(name: &str, artifact: &Artifact, images: &Tensor) {
    let load = |backend| QuantizedModel::load(artifact, Device::Cpu, backend).unwrap();
    let (simulated, integer) = (load(Backend::Simulated), load(Backend::Integer));
    let _guard = tch::no_grad_guard();
    let mut packer = Packer::new(simulated.plan());
    let _ = simulated.model().forward(&mut packer, &images.narrow(0, 0, 1)).unwrap();
    let sites = packer.finish();
    assert_eq!(sites.counts(), integer.site_counts(), "{name}: forms depend on pixels");
    let mut twice = Twice {
        simulated: Simulated::new(simulated.plan(), WeightSource::Decoded),
        integer: Integer::new(simulated.plan(), &sites),
        differences: Vec::new(),
    };
    let _ = simulated.model().forward(&mut twice, &images.narrow(0, 0, 4)).unwrap();
    let worst = twice.differences.iter().max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    assert!(worst.0 <= PRODUCT_BOUND, "{name}: {worst:?}");

    // What a block does in one go are the bits of its steps.
    let some = images.narrow(0, 0, 3);
    let mut by_steps = Steps(Integer::new(simulated.plan(), &sites));
    let by_steps = simulated.model().forward(&mut by_steps, &some).unwrap();
    let at_once = Integer::new(simulated.plan(), &sites);
    let at_once = simulated.model().forward(&mut { at_once }, &some).unwrap();
    assert!(at_once.equal(&by_steps), "{name}: blocks are not their steps");

    let expected = simulated.forward(images).unwrap();
    let found = integer.forward(images).unwrap();
    let same = found.argmax(-1, false).equal(&expected.argmax(-1, false));
    let largest = expected.abs().max();
    let errors = (&found - &expected).abs().amax([-1i64].as_slice(), false) / &largest;
    let mut errors = to_vec_f64(&errors).unwrap();
    errors.sort_by(f64::total_cmp);
    println!(
        "{name}: {}; a product {:.1e}; logits median {:.1e}, 90 % {:.1e}, all {:.1e}; {} of {} bytes",
        integer.site_counts(),
        worst.0,
        errors[errors.len() / 2],
        errors[errors.len() * 9 / 10],
        errors[errors.len() - 1],
        integer.resident_bytes(),
        simulated.resident_bytes(),
    );
    assert!(same, "{name}: another top-1");
    assert!(errors[errors.len() - 1] <= LOGIT_BOUND, "{name}: {errors:?}");
    for (first, count) in [(0, 1), (3, 1), (2, 5)] {
        let part = integer.forward(&images.narrow(0, first, count)).unwrap();
        assert!(part.equal(&found.narrow(0, first, count)), "{name}: {count} at {first}");
    }
}

fn check_methods(model: &str, bits: u32) {
    let Digits { checkpoint, calibration, images, .. } = Digits::open(model, 4, STEP);
    for (method, options) in quantizing() {
        let artifact = artifact((&checkpoint, &calibration), (method, options), bits);
        let name = format!("{model} {method} {bits}");
        check(&name, &artifact, &images);
        let integer = QuantizedModel::load(&artifact, Device::Cpu, Backend::Integer).unwrap();
        let counts = integer.site_counts();
        assert_eq!(counts.simulated, simulated_sites(model, method), "{name}: {counts}");
        assert_eq!(counts.float, 0, "{name}");
    }
}

#[test]
fn integers_compute_what_is_simulated_for_vit() {
    check_methods("digits-vit", 4);
}

#[test]
fn integers_compute_what_is_simulated_for_swin() {
    check_methods("digits-swin", 8);
}

#[test]
fn packed_weights_take_the_memory_of_their_bits() {
    // A model as wide as published ones: scales, biases and norms hardly count.
    let args = serde_json::json!({"img_size": 32, "patch_size": 16, "embed_dim": 384, "depth": 1});
    let options = GeneratedOptions {
        num_classes: 10,
        model_args: args.as_object().unwrap().clone(),
        ..GeneratedOptions::default()
    };
    let checkpoint = generate("deit_small", options).unwrap();
    let images = images(2, 32, 0).unwrap();
    let calibration = CalibrationImages { images, digest: String::new() };
    let artifact = artifact((&checkpoint, &calibration), ("minmax", &[]), 4);
    let bytes = |backend| {
        QuantizedModel::load(&artifact, Device::Cpu, backend).unwrap().resident_bytes() as f64
    };
    let share = bytes(Backend::Integer) / bytes(Backend::Float);
    assert!(share <= 0.16, "{share}");
}
