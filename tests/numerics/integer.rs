//! The law of the integer executors: what `Simulated` computes, for every method and both families.

use tch::{Device, Kind, Tensor};
use vitq::Result;
use vitq::artifact::Artifact;
use vitq::calib::StemHeadPolicy;
use vitq::engine::QuantizedModel;
use vitq::engine::pipeline::CalibrationImages;
use vitq::exec::{
    Backend, Executor, Integer, IntegerOnGpu, IntegerSites, Kernels, Packer, ScoreTerms, Simulated,
    WeightSource,
};
use vitq::kernels::cuda::Gpu;
use vitq::model::Checkpoint;
use vitq::model::generated::{GeneratedOptions, generate, images};
use vitq::nn::{LayerNorm, Linear, Site};
use vitq::tensor::to_vec_f64;

use crate::digits::{Digits, request};
use crate::methods::quantizing;
use crate::reference::{artifact_on, device, on_gpu};

/// Every so many validation images.
const STEP: usize = 9;

/// Difference of one product with the same operands, relative to its largest value: float32 rounding
/// of sums of some hundred terms.
const PRODUCT_BOUND: f64 = 3e-6;

/// Difference of logits, relative to the largest. Where no operand is near the border of two codes it
/// is rounding (half of the images: below 1e-6); a code that falls on the other side is a step of its
/// grid. Largest seen: 0.09 (`ias` at 4 bits).
const LOGIT_BOUND: f64 = 0.15;

/// On a GPU layer norms, softmax and GELU of the two executors differ in their last bits, so that more
/// codes fall on the other side, also between a product's own operands. Half of the products and nine
/// tenths of the logits stay within the bounds above, and all logits within this one.
const GPU_BOUND: f64 = 2.0 * LOGIT_BOUND;

/// Least share of images with the same top-1 on a GPU.
const GPU_SAME: f64 = 0.95;

fn artifact(
    (checkpoint, calibration): (&Checkpoint, &CalibrationImages),
    (method, options): (&str, &[(&str, &str)]),
    bits: u32,
) -> Artifact {
    let request = request(method, options, bits, StemHeadPolicy::Int8);
    artifact_on(device(), checkpoint, calibration, &request)
}

/// Computes each product twice, from the same operands, and goes on with the simulated one.
struct Twice<'a> {
    simulated: Simulated<'a>,
    integer: &'a mut dyn Executor,
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

/// The integer forms that the first image shows.
fn sites<K: Kernels>(model: &QuantizedModel, images: &Tensor) -> IntegerSites<K> {
    let mut packer = Packer::new(model.plan());
    let _ = model.model().forward(&mut packer, &images.narrow(0, 0, 1)).unwrap();
    packer.finish()
}

/// Differences of the products of four images, ascending, and where.
fn differences(
    simulated: &QuantizedModel,
    integer: &mut dyn Executor,
    images: &Tensor,
) -> Vec<(f64, String)> {
    let mut twice = Twice {
        simulated: Simulated::new(simulated.plan(), WeightSource::Decoded),
        integer,
        differences: Vec::new(),
    };
    let _ = simulated.model().forward(&mut twice, &images.narrow(0, 0, 4)).unwrap();
    let mut differences = twice.differences;
    differences.sort_by(|a, b| a.0.total_cmp(&b.0));
    differences
}

/// Products within the bound.
fn check_products(name: &str, models: [&QuantizedModel; 2], images: &Tensor) -> f64 {
    let [simulated, integer] = models;
    let (plan, images) = (simulated.plan(), images.to_device(device()));
    let counts = integer.site_counts();
    if on_gpu() {
        let gpu = Gpu::on(device()).expect("kernels for the GPU");
        let sites = sites(simulated, &images);
        assert_eq!(sites.counts(), counts, "{name}: forms depend on pixels");
        let mut integer = IntegerOnGpu::new(gpu, plan, &sites);
        let products = differences(simulated, &mut integer, &images);
        let median = &products[products.len() / 2];
        assert!(median.0 <= PRODUCT_BOUND, "{name}: {products:?}");
        return median.0;
    }
    let sites = sites(simulated, &images);
    assert_eq!(sites.counts(), counts, "{name}: forms depend on pixels");
    let products = differences(simulated, &mut Integer::new(plan, &sites), &images);
    let worst = products.last().unwrap();
    assert!(worst.0 <= PRODUCT_BOUND, "{name}: {worst:?}");

    // What a block does in one go are the bits of its steps.
    let some = images.narrow(0, 0, 3);
    let mut by_steps = Steps(Integer::new(plan, &sites));
    let by_steps = simulated.model().forward(&mut by_steps, &some).unwrap();
    let at_once = simulated.model().forward(&mut Integer::new(plan, &sites), &some).unwrap();
    assert!(at_once.equal(&by_steps), "{name}: blocks are not their steps");
    worst.0
}

/// Same top-1, logits within the bound, one image as many.
fn check(name: &str, artifact: &Artifact, images: &Tensor) {
    let load = |backend| QuantizedModel::load(artifact, device(), backend).unwrap();
    let (simulated, integer) = (load(Backend::Simulated), load(Backend::Integer));
    let _guard = tch::no_grad_guard();
    let product = check_products(name, [&simulated, &integer], images);

    let expected = simulated.forward(images).unwrap().to_device(Device::Cpu);
    let found = integer.forward(images).unwrap().to_device(Device::Cpu);
    let same = found.argmax(-1, false).eq_tensor(&expected.argmax(-1, false));
    let same = same.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    let largest = expected.abs().max();
    let errors = (&found - &expected).abs().amax([-1i64].as_slice(), false) / &largest;
    let mut errors = to_vec_f64(&errors).unwrap();
    errors.sort_by(f64::total_cmp);
    println!(
        "{name}: {}; a product {:.1e}; logits median {:.1e}, 90 % {:.1e}, all {:.1e}; {} of {} bytes",
        integer.site_counts(),
        product,
        errors[errors.len() / 2],
        errors[errors.len() * 9 / 10],
        errors[errors.len() - 1],
        integer.resident_bytes(),
        simulated.resident_bytes(),
    );
    if on_gpu() {
        assert!(same >= GPU_SAME, "{name}: the same top-1 of {same}");
        assert!(errors[errors.len() * 9 / 10] <= LOGIT_BOUND, "{name}: {errors:?}");
        assert!(errors[errors.len() - 1] <= GPU_BOUND, "{name}: {errors:?}");
        return;
    }
    assert!(same == 1.0, "{name}: another top-1");
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
        let integer = QuantizedModel::load(&artifact, device(), Backend::Integer).unwrap();
        let counts = integer.site_counts();
        assert_eq!(counts.float, 0, "{name}");
        if on_gpu() {
            // Its kernels take fewer forms; none at all would mean that there are none.
            assert!(counts.integer > 0, "{name}: {counts}");
        } else {
            assert_eq!(counts.simulated, simulated_sites(model, method), "{name}: {counts}");
        }
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
