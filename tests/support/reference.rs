//! What the comparisons with authors' code share: where they compute, fixtures, demo models, figures.

#![allow(dead_code, reason = "each test that names the module uses a part of it")]

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde_json::{Value, json};
use tch::{Device, Tensor};
use vitq::artifact::Artifact;
use vitq::calib::QuantizeSpec;
use vitq::calib::progress::Unwatched;
use vitq::data::{Dataset, DecodeLimits, load_pixels};
use vitq::device;
use vitq::engine::QuantizedModel;
use vitq::engine::evaluator::Metrics;
use vitq::engine::pipeline::{CalibrationImages, image_batch, quantize};
use vitq::exec::Backend;
use vitq::model::Checkpoint;
use vitq::tensor::{sqnr_db, to_vec_f32};

/// Where the golden tests compute: on the CPU, or on the device that VITQ_TEST_DEVICE names. To be
/// asked before anything else of libtorch, which could not see CUDA later on: `root` does.
pub(crate) fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let Some(name) = env::var_os("VITQ_TEST_DEVICE") else { return Device::Cpu };
        device::open_cuda_libraries();
        device::parse(&name.to_string_lossy())
            .unwrap_or_else(|error| panic!("VITQ_TEST_DEVICE: {error}"))
    })
}

/// Whether what depends on the last bit of a sum may be other than on a CPU.
pub(crate) fn on_gpu() -> bool {
    device() != Device::Cpu
}

/// Percentage points of top-1 and agreement and decibels by which a GPU may be further off than another
/// processor: some of 450 images lie on the border.
pub(crate) fn gpu_slack() -> f64 {
    if on_gpu() { 1.0 } else { 0.0 }
}

/// Greatest relative difference of a parameter. On a GPU an activation that crosses a rounding boundary
/// may be the end of a range in a later layer. (9 % when inputs and weights moved by a last bit.)
fn parameter_tolerance() -> f64 {
    if on_gpu() { 0.2 } else { 1e-4 }
}

/// Whether sums are those of the authors' runs on a processor with AVX2.
pub(crate) fn is_avx2_only() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !on_gpu() && is_x86_feature_detected!("avx2") && !is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// A path of the repository: where the test runs, if it was built elsewhere.
pub(crate) fn root(path: &str) -> PathBuf {
    device();
    let root = env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    PathBuf::from(root).join(path)
}

pub(crate) fn json_file(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

pub(crate) fn tensors(path: &str) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(root(path)).unwrap().into_iter().collect()
}

pub(crate) fn artifact(
    checkpoint: &Checkpoint,
    images: &CalibrationImages,
    request: &QuantizeSpec,
) -> Artifact {
    artifact_on(Device::Cpu, checkpoint, images, request)
}

/// The same, calibrated on that device.
pub(crate) fn artifact_on(
    device: Device,
    checkpoint: &Checkpoint,
    images: &CalibrationImages,
    request: &QuantizeSpec,
) -> Artifact {
    quantize(checkpoint, images, request, device, &Unwatched).unwrap().artifact
}

/// Its logits, computed by the golden tests' device.
pub(crate) fn logits(artifact: &Artifact, images: &Tensor) -> Tensor {
    let model = QuantizedModel::load(artifact, device(), Backend::Simulated).unwrap();
    model.forward(images).unwrap().to_device(Device::Cpu)
}

pub(crate) fn load(artifact: &Artifact) -> QuantizedModel {
    QuantizedModel::load(artifact, Device::Cpu, Backend::Simulated).unwrap()
}

/// Least fidelity of a small model's logits. Few values meet a rounding boundary in it, so the rules
/// show themselves. With a GPU's sums one may, which moves an operand by a step of its grid. (Inputs and
/// weights moved by a last bit on a CPU: 16 dB at worst, most above 100.)
pub(crate) fn small_model_floor_db() -> f64 {
    if on_gpu() { 12.0 } else { 60.0 }
}

/// Compares logits, rewritten parameters and quantizers with those of the `model_*` cases of a
/// fixture, and returns how many there are. `request` asks for the released code's behaviour.
pub(crate) fn compare_small_models(folder: &str, request: &dyn Fn(u32) -> QuantizeSpec) -> usize {
    let stored = tensors(&format!("{folder}/goldens.safetensors"));
    let index = json_file(&format!("{folder}/index.json"));
    let models = index["cases"].as_array().unwrap().iter();
    let models: Vec<_> =
        models.filter(|case| case["case"].as_str().unwrap().starts_with("model_")).collect();
    for case in &models {
        let name = case["case"].as_str().unwrap();
        let keys = || case["tensors"].as_object().unwrap().keys();
        let get =
            |key: &str| stored[case["tensors"][key]["name"].as_str().unwrap()].shallow_clone();
        let weights: Vec<_> = keys()
            .filter_map(|key| Some((key.strip_prefix("weights.")?.to_owned(), get(key))))
            .collect();
        let checkpoint = small_checkpoint(&case["meta"]["config"], &weights);
        let images = CalibrationImages { images: get("calib_input"), digest: String::new() };
        let bits = case["meta"]["w_bits"].as_u64().unwrap() as u32;
        let artifact = artifact_on(device(), &checkpoint, &images, &request(bits));
        let logits = logits(&artifact, &get("eval_input"));
        let fidelity = sqnr_db(&get("eval_logits"), &logits).unwrap();
        println!("{name}: {fidelity:.1} dB of the released code's logits");
        assert!(fidelity >= small_model_floor_db(), "{name}: {fidelity} dB");
        let found = artifact.weights().unwrap();
        let mut rewritten = 0;
        for key in keys().filter(|key| key.starts_with("reparam.")) {
            let parameter = found.find(key.trim_start_matches("reparam.")).unwrap();
            let worst = (parameter - get(key)).abs().max().double_value(&[]);
            let scale = get(key).abs().max().double_value(&[]);
            assert!(worst <= parameter_tolerance() * scale, "{name} {key}: {worst} of {scale}");
            rewritten += 1;
        }
        assert!(rewritten >= 10);
        assert_parameters(&artifact, keys().map(|key| (key.clone(), get(key))));
    }
    models.len()
}

/// A model of the fixtures as a checkpoint.
pub(crate) fn small_checkpoint(config: &Value, weights: &[(String, Tensor)]) -> Checkpoint {
    let folder = tempfile::tempdir().unwrap();
    Tensor::write_safetensors(weights, folder.path().join("model.safetensors")).unwrap();
    let architecture = if config["arch"] == "vit" {
        "vit_tiny_patch16_224"
    } else {
        "swin_tiny_patch4_window7_224"
    };
    let mut args = config.clone();
    args.as_object_mut().unwrap().retain(|key, _| key != "arch" && key != "num_classes");
    let side = &config["img_size"];
    let config = json!({
        "architecture": architecture,
        "num_classes": config["num_classes"],
        "model_args": args,
        "pretrained_cfg": {
            "input_size": [3, side, side], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
            "crop_pct": 0.9, "interpolation": "bicubic",
        },
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Checkpoint::open(folder.path()).unwrap()
}

/// Compares scales and zero points with `delta.MODULE.QUANTIZER` and `zero_point.MODULE.QUANTIZER`.
fn assert_parameters(artifact: &Artifact, theirs: impl Iterator<Item = (String, Tensor)>) {
    for (key, expected) in theirs {
        let Some((what @ ("delta" | "zero_point"), module)) = key.split_once('.') else { continue };
        let (path, quantizer) = module.rsplit_once('.').unwrap();
        let operand = match quantizer {
            "input_quantizer" => "input",
            "weight_quantizer" => "weight",
            "quantizer_A" => "lhs",
            _ => "rhs",
        };
        let entry = &artifact.header.sites[path][operand];
        // Scores have a grid of their own kind, described by one number.
        let scores = entry.scalars.get("largest").or_else(|| entry.scalars.get("shift"));
        let found = if let Some(parameter) = scores {
            vec![*parameter as f32]
        } else {
            let name = if what == "delta" { "scale" } else { what };
            let raw = &artifact.tensors[&format!("{path}.{operand}_{name}")];
            raw.data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let expected = to_vec_f32(&expected).unwrap();
        assert_eq!(found.len(), expected.len(), "{key}");
        // The next integer.
        let border = if on_gpu() && what == "zero_point" { 1.0 } else { 0.0 };
        for (found, expected) in found.iter().zip(&expected) {
            let (found, expected) = (f64::from(*found), f64::from(*expected));
            let tolerance = border + parameter_tolerance() * expected.abs().max(1e-6);
            assert!((found - expected).abs() <= tolerance, "{key}: {found} {expected}");
        }
    }
}

/// A demo model with its validation images, labels, and timm's own logits.
pub(crate) struct Subject {
    pub(crate) checkpoint: Checkpoint,
    pub(crate) images: Tensor,
    pub(crate) labels: Vec<usize>,
    pub(crate) timm_logits: Tensor,
}

pub(crate) fn subject(name: &str) -> Subject {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints").join(name)).unwrap();
    let dataset = Dataset::open(&root("demo/datasets/digits/val"), "dataset").unwrap();
    let how = &checkpoint.spec.preprocessing;
    let pixels = load_pixels(&dataset.samples, how, &DecodeLimits::default()).unwrap();
    let labels = dataset.samples.iter().map(|sample| sample.class).collect();
    let logits = tensors(&format!("demo/checkpoints/{name}/val_logits.safetensors"));
    let timm_logits = logits["logits"].shallow_clone();
    Subject { images: image_batch(&pixels).unwrap(), checkpoint, labels, timm_logits }
}

/// The images that the authors' code was calibrated with.
pub(crate) fn calibration(checkpoint: &Checkpoint, key: &str) -> CalibrationImages {
    let results = json_file("demo/reference/peer_results.json");
    let names = results["calibration_files"][key].as_array().unwrap().iter();
    let names: Vec<String> =
        names.map(|name| name.as_str().unwrap().trim_start_matches("calib/").to_owned()).collect();
    let dataset = Dataset::open(&root("demo/datasets/digits/calib"), "dataset").unwrap();
    let samples = dataset.listed(&names, "calib_files").unwrap();
    let how = &checkpoint.spec.preprocessing;
    let pixels = load_pixels(&samples, how, &DecodeLimits::default()).unwrap();
    CalibrationImages::from_pixels(&pixels).unwrap()
}

pub(crate) fn metrics(subject: &Subject, logits: &Tensor) -> Metrics {
    let classes = logits.size()[1] as usize;
    let (found, float) = (to_vec_f32(logits).unwrap(), to_vec_f32(&subject.timm_logits).unwrap());
    let mut metrics = Metrics::default();
    for (index, label) in subject.labels.iter().enumerate() {
        let row = index * classes..(index + 1) * classes;
        metrics.add(&found[row.clone()], *label, Some(&float[row]));
    }
    metrics
}
