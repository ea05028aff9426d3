//! PTQ4ViT end to end against its authors' code: a small model with their scales
//! (tests/fixtures/ptq4vit) and the trained digits models (demo/reference).

#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(clippy::print_stdout, reason = "the measured parity is shown with --nocapture")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use vitq::artifact::Artifact;
use vitq::calib::progress::Unwatched;
use vitq::calib::{QuantizeSpec, StemHeadPolicy};
use vitq::data::{Dataset, DecodeLimits, load_pixels};
use vitq::engine::QuantizedModel;
use vitq::engine::evaluator::Metrics;
use vitq::engine::pipeline::{CalibrationImages, image_batch, quantize};
use vitq::exec::{Backend, Simulated, WeightSource};
use vitq::model::{Checkpoint, Model};
use vitq::nn::{Operand, Role, Site};
use vitq::quant::{BitWidth, QuantPlan, QuantizerState};
use vitq::tensor::{sqnr_db, to_vec_f32};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn json_file(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(root(path)).unwrap()).unwrap()
}

fn tensors(path: &str) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(root(path)).unwrap().into_iter().collect()
}

fn request(bits: u32, options: &[(&str, &str)]) -> QuantizeSpec {
    let bits = BitWidth::new(bits, "bits").unwrap();
    QuantizeSpec {
        method: "ptq4vit".to_owned(),
        options: options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        weight_bits: bits,
        activation_bits: bits,
        stem_head: StemHeadPolicy::Same,
        seed: 0,
    }
}

fn artifact(
    checkpoint: &Checkpoint,
    images: &CalibrationImages,
    request: &QuantizeSpec,
) -> Artifact {
    quantize(checkpoint, images, request, Device::Cpu, &Unwatched).unwrap().artifact
}

fn load(artifact: &Artifact) -> QuantizedModel {
    QuantizedModel::load(artifact, Device::Cpu, Backend::Simulated).unwrap()
}

/// Few values meet a rounding boundary in a small model, so the rules show themselves.
const SMALL_MODEL_FLOOR_DB: f64 = 60.0;

/// A model of the fixtures as a checkpoint.
fn small_checkpoint(config: &Value, weights: &[(String, Tensor)]) -> Checkpoint {
    let folder = tempfile::tempdir().unwrap();
    Tensor::write_safetensors(weights, folder.path().join("model.safetensors")).unwrap();
    let mut args = config.clone();
    args.as_object_mut().unwrap().retain(|key, _| key != "arch" && key != "num_classes");
    let side = &config["img_size"];
    let config = json!({
        "architecture": "vit_tiny_patch16_224",
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

/// The stored form of a quantizer with the authors' scale.
fn state(site: &Site, operand: Operand, bits: u32, scale: &Tensor) -> QuantizerState {
    let width = BitWidth::new(bits, "bits").unwrap();
    match (site.role, operand) {
        (Role::Fc2, Operand::Lhs) => {
            QuantizerState::new("twin_gelu", width).tensor("scale", &scale.view([1]))
        }
        (Role::ScoreValue, Operand::Lhs) => QuantizerState::new("twin_softmax", width)
            .scalar("released", 1.0)
            .tensor("split", &scale.view([1])),
        _ => {
            let zero_point = scale.full_like(2f64.powi(bits as i32 - 1));
            QuantizerState::new("uniform", width)
                .tensor("scale", scale)
                .tensor("zero_point", &zero_point)
        }
    }
}

#[test]
fn the_authors_scales_give_the_authors_logits() {
    let stored = tensors("tests/fixtures/ptq4vit/goldens.safetensors");
    let index = json_file("tests/fixtures/ptq4vit/index.json");
    let models = index["cases"].as_array().unwrap().iter();
    let models: Vec<_> =
        models.filter(|case| case["case"].as_str().unwrap().starts_with("model_")).collect();
    assert_eq!(models.len(), 2);
    for case in models {
        let name = case["case"].as_str().unwrap();
        let keys = case["tensors"].as_object().unwrap();
        let get =
            |key: &str| Some(stored[keys.get(key)?["name"].as_str().unwrap()].shallow_clone());
        let weights: Vec<_> = keys
            .keys()
            .filter_map(|key| Some((key.strip_prefix("weights.")?.to_owned(), get(key)?)))
            .collect();
        let checkpoint = small_checkpoint(&case["meta"]["config"], &weights);
        let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
        let bits = case["meta"]["w_bit"].as_u64().unwrap() as u32;
        let mut plan = QuantPlan::default();
        for site in &model.sites {
            let scale = |kind: &str| get(&format!("{kind}.{}", site.path));
            let (lhs, rhs) = match site.role {
                Role::QueryKey => (scale("A_interval"), scale("B_interval")),
                Role::ScoreValue => (scale("split"), scale("B_interval")),
                _ => {
                    let rows = site_weight(&checkpoint, site).size()[0];
                    let scales = scale("w_interval").unwrap().view([-1]);
                    let repeats = rows / scales.size()[0];
                    let scales = scales.repeat_interleave_self_int(repeats, 0, rows);
                    (scale("a_interval"), Some(scales.view([-1, 1])))
                }
            };
            for (operand, scale) in [(Operand::Lhs, lhs), (Operand::Rhs, rhs)] {
                // The stem's input has none: it stays float.
                let Some(scale) = scale else { continue };
                let scale = match site.role.is_matmul() {
                    true => scale.view([1, -1, 1, 1]),
                    false => scale.view([-1, 1]),
                };
                let state = state(site, operand, bits, &scale);
                plan.insert(site.id, operand, vitq::methods::restore(&state).unwrap());
            }
        }
        assert_eq!(plan.len(), 2 * model.sites.len() - 1);
        let mut executor = Simulated::new(&plan, WeightSource::Quantize);
        let logits = model.forward(&mut executor, &get("eval_input").unwrap()).unwrap();
        let fidelity = sqnr_db(&get("eval_logits").unwrap(), &logits).unwrap();
        println!("{name}: {fidelity:.1} dB of the released code's logits");
        assert!(fidelity >= SMALL_MODEL_FLOOR_DB, "{name}: {fidelity} dB");
    }
}

fn site_weight<'a>(checkpoint: &'a Checkpoint, site: &Site) -> &'a Tensor {
    checkpoint.weights.find(&format!("{}.weight", site.path)).unwrap()
}

/// A demo model with its validation images, labels, and timm's own logits.
struct Subject {
    checkpoint: Checkpoint,
    images: Tensor,
    labels: Vec<usize>,
    timm_logits: Tensor,
}

fn subject(name: &str) -> Subject {
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
fn calibration(checkpoint: &Checkpoint, key: &str) -> CalibrationImages {
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

fn metrics(subject: &Subject, logits: &Tensor) -> Metrics {
    let classes = logits.size()[1] as usize;
    let (found, float) = (to_vec_f32(logits).unwrap(), to_vec_f32(&subject.timm_logits).unwrap());
    let mut metrics = Metrics::default();
    for (index, label) in subject.labels.iter().enumerate() {
        let row = index * classes..(index + 1) * classes;
        metrics.add(&found[row.clone()], *label, Some(&float[row]));
    }
    metrics
}
