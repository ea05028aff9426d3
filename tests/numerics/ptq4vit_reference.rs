//! PTQ4ViT end to end against its authors' code: a small model with their scales
//! (tests/fixtures/ptq4vit) and the trained digits models (demo/reference).

use std::collections::BTreeMap;

use tch::{Device, Tensor};
use vitq::Error;
use vitq::artifact::Artifact;
use vitq::calib::progress::Unwatched;
use vitq::calib::{Progress, ProgressUpdate, QuantizeSpec, StemHeadPolicy};
use vitq::engine::pipeline::{CalibrationImages, quantize};
use vitq::exec::{Simulated, WeightSource};
use vitq::model::{Checkpoint, Model};
use vitq::nn::{Operand, Role, Site};
use vitq::quant::{BitWidth, QuantPlan, QuantizerState};
use vitq::tensor::sqnr_db;

use crate::digits;
use crate::reference::{
    artifact, artifact_on, calibration, device, gpu_slack, json_file, load, logits, metrics, root,
    small_checkpoint, small_model_floor_db, subject, tensors,
};

fn request(bits: u32, options: &[(&str, &str)]) -> QuantizeSpec {
    digits::request("ptq4vit", options, bits, StemHeadPolicy::Same)
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
        let weights = checkpoint.weights.to_device(device()).unwrap();
        let model = Model::build(&checkpoint.spec, &weights).unwrap();
        let bits = case["meta"]["w_bit"].as_u64().unwrap() as u32;
        let mut plan = QuantPlan::default();
        for site in &model.sites {
            let scale = |kind: &str| get(&format!("{kind}.{}", site.path));
            let (lhs, rhs) = match site.role {
                Role::QueryKey => (scale("A_interval"), scale("B_interval")),
                Role::ScoreValue => (scale("split"), scale("B_interval")),
                Role::Embed
                | Role::Qkv
                | Role::Proj
                | Role::Fc1
                | Role::Fc2
                | Role::Reduction
                | Role::Head => {
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
                let state = state(site, operand, bits, &scale).to_device(device()).unwrap();
                plan.insert(site.id, operand, vitq::methods::restore(&state).unwrap());
            }
        }
        assert_eq!(plan.len(), 2 * model.sites.len() - 1);
        let mut executor = Simulated::new(&plan, WeightSource::Quantize);
        let images = get("eval_input").unwrap().to_device(device());
        let logits = model.forward(&mut executor, &images).unwrap().to_device(Device::Cpu);
        let fidelity = sqnr_db(&get("eval_logits").unwrap(), &logits).unwrap();
        println!("{name}: {fidelity:.1} dB of the released code's logits");
        assert!(fidelity >= small_model_floor_db(), "{name}: {fidelity} dB");
    }
}

fn site_weight<'a>(checkpoint: &'a Checkpoint, site: &Site) -> &'a Tensor {
    checkpoint.weights.find(&format!("{}.weight", site.path)).unwrap()
}

/// How far a result may lie below the authors', in percentage points of top-1 and agreement and in
/// dB. Their gradients are rounding noise, so a repetition is another draw.
const TOP1: f64 = 0.5;
const AGREEMENT: f64 = 1.0;
const SQNR_DB: f64 = 0.5;

/// The published search tries 100 scales; the quantizers' tests do. These give the same quality here
/// in half the time.
const COARSE: [(&str, &str); 1] = [("candidates", "40")];

#[test]
fn it_is_as_good_as_the_authors_code_on_the_digits_vit() {
    let subject = subject("digits-vit");
    let results = json_file("demo/reference/peer_results.json");
    let images = calibration(&subject.checkpoint, "digits-vit/n32/seed0");
    let run = "digits-vit/ptq4vit/W4A4/seed0";
    let rows = results["results"].as_array().unwrap();
    let row = rows.iter().find(|row| row["logits"] == run).unwrap();
    let artifact = artifact_on(device(), &subject.checkpoint, &images, &request(4, &COARSE));
    assert!(artifact.header.report.warnings.is_empty());
    let found = metrics(&subject, &logits(&artifact, &subject.images));
    for (found, key, tolerance) in [
        (found.top1(), "top1", TOP1),
        (found.agreement(), "agreement", AGREEMENT),
        (found.sqnr_db(), "logits_sqnr_db", SQNR_DB),
    ] {
        let expected = row[key].as_f64().unwrap();
        println!("{run} {key}: {found:.2} ({expected:.2})");
        assert!(found >= expected - tolerance - gpu_slack(), "{run} {key}: {found} {expected}");
    }
}

/// Options that make a calibration quick where its quality does not matter.
const QUICK: [(&str, &str); 2] = [("candidates", "12"), ("rounds", "1")];

fn few_images(checkpoint: &Checkpoint, name: &str, count: i64) -> CalibrationImages {
    let images = calibration(checkpoint, &format!("{name}/n32/seed0"));
    CalibrationImages { images: images.images.narrow(0, 0, count), ..images }
}

#[test]
fn storing_and_loading_gives_the_same_logits_whatever_the_batch() {
    for (name, gradient) in
        [("digits-vit", "noise"), ("digits-vit", "perturbed"), ("digits-swin", "fisher")]
    {
        let subject = subject(name);
        let images = few_images(&subject.checkpoint, name, 3);
        let request = request(4, &[&QUICK[..], &[("gradient", gradient)]].concat());
        let first = artifact(&subject.checkpoint, &images, &request);
        let bytes = first.to_bytes().unwrap();
        let model = load(&Artifact::from_bytes("test", &bytes).unwrap());
        let all = model.forward(&subject.images.narrow(0, 0, 14)).unwrap();
        assert!(load(&first).forward(&subject.images.narrow(0, 0, 14)).unwrap().equal(&all));
        let repeated = artifact(&subject.checkpoint, &images, &request);
        assert_eq!(repeated.to_bytes().unwrap(), bytes, "{name} {gradient}: deterministic");
        for batch in [1, 7] {
            for first in (0..14).step_by(batch as usize) {
                let part = model.forward(&subject.images.narrow(0, first, batch)).unwrap();
                assert!(part.equal(&all.narrow(0, first, batch)), "{name} {batch} {first}");
            }
        }
    }
}

/// The stored values of a quantizer's tensor.
fn values(artifact: &Artifact, name: &str) -> Vec<f32> {
    let raw = &artifact.tensors[name];
    raw.data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

#[test]
fn every_operand_has_its_grid() {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints/digits-swin")).unwrap();
    let images = few_images(&checkpoint, "digits-swin", 2);
    let options = [&QUICK[..], &[("gradient", "mse"), ("gelu_pow2_ratio", "true")]].concat();
    let artifact = artifact(&checkpoint, &images, &request(3, &options));
    let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
    assert_eq!(artifact.header.sites.len(), model.sites.len());
    for site in &model.sites {
        let entries = &artifact.header.sites[&site.path];
        let (lhs, rhs) = (site.operand_name(Operand::Lhs), site.operand_name(Operand::Rhs));
        let kinds = (entries[lhs].kind.as_str(), entries[rhs].kind.as_str());
        let expected = match site.role {
            Role::Fc2 => "twin_gelu",
            Role::ScoreValue => "twin_softmax",
            Role::Embed
            | Role::Qkv
            | Role::QueryKey
            | Role::Proj
            | Role::Fc1
            | Role::Reduction
            | Role::Head => "uniform",
        };
        assert_eq!(kinds, (expected, "uniform"), "{}", site.path);
        let pixels = site.role == Role::Embed;
        assert_eq!((entries[lhs].bits, entries[rhs].bits), (if pixels { 8 } else { 3 }, 3));
        let mut scales = values(&artifact, &format!("{}.{rhs}_scale", site.path));
        let rows = scales.len();
        scales.dedup();
        match site.role {
            Role::Embed => assert_eq!((rows, scales.len()), (32, 32)),
            Role::Qkv => assert_eq!(scales.len(), 3, "{}", site.path),
            Role::QueryKey | Role::ScoreValue => assert!([2, 4, 8].contains(&rows)),
            Role::Proj | Role::Fc1 | Role::Fc2 | Role::Reduction | Role::Head => {
                assert_eq!(scales.len(), 1, "{}", site.path);
            }
        }
        let zeros = values(&artifact, &format!("{}.{rhs}_zero_point", site.path));
        assert!(zeros.iter().all(|zero| *zero == 4.0));
        if site.role == Role::Fc2 {
            let scale = values(&artifact, &format!("{}.input_scale", site.path))[0];
            let exponent = (f64::from(scale) / (0.169_971_242_547_035_22 / 4.0)).log2();
            assert!((exponent - exponent.round()).abs() < 1e-5, "{}: 2^{exponent}", site.path);
        }
        if site.role == Role::ScoreValue {
            let split = values(&artifact, &format!("{}.lhs_split", site.path))[0];
            assert_eq!(split.log2(), split.log2().round());
        }
    }
}

#[test]
fn stem_and_head_follow_the_policy() {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints/digits-vit")).unwrap();
    let images = few_images(&checkpoint, "digits-vit", 2);
    let mse = [&QUICK[..], &[("gradient", "mse")]].concat();
    let float_pixels = [&mse[..], &[("stem_input", "float")]].concat();
    for (stem_head, options, expected) in [
        (StemHeadPolicy::Float, &mse, [None; 4]),
        (StemHeadPolicy::Int8, &mse, [Some(8); 4]),
        (StemHeadPolicy::Same, &mse, [Some(8), Some(4), Some(4), Some(4)]),
        (StemHeadPolicy::Same, &float_pixels, [None, Some(4), Some(4), Some(4)]),
    ] {
        let request = QuantizeSpec { stem_head, ..request(4, options) };
        let artifact = artifact(&checkpoint, &images, &request);
        let bits =
            |path: &str, operand: &str| Some(artifact.header.sites.get(path)?.get(operand)?.bits);
        let found = [
            bits("patch_embed.proj", "input"),
            bits("patch_embed.proj", "weight"),
            bits("head", "input"),
            bits("head", "weight"),
        ];
        assert_eq!(found, expected, "{stem_head:?}");
    }
}

#[test]
fn images_without_information_and_vanishing_gradients_are_survived() {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints/digits-vit")).unwrap();
    let zero = CalibrationImages {
        images: few_images(&checkpoint, "digits-vit", 2).images.zeros_like(),
        digest: String::new(),
    };
    let request = request(4, &QUICK);
    let quantized = artifact(&checkpoint, &zero, &request);
    let logits = load(&quantized).forward(&zero.images).unwrap();
    assert_eq!(logits.isfinite().all().int64_value(&[]), 1);
    // A head of zeros sends nothing back.
    let head = "head.weight".to_owned();
    let weight = checkpoint.weights.find(&head).unwrap().zeros_like();
    let weights = checkpoint.weights.with(&BTreeMap::from([(head, weight)]));
    let deaf = Checkpoint { weights, ..checkpoint };
    let quantized = artifact(&deaf, &few_images(&deaf, "digits-vit", 2), &request);
    let warnings = &quantized.header.report.warnings;
    let sites = Model::build(&deaf.spec, &deaf.weights).unwrap().sites.len();
    assert_eq!(warnings.len(), sites - 1);
    assert!(warnings[0].contains("the gradient vanishes"), "{warnings:?}");
    let nan = CalibrationImages { images: &zero.images + f64::NAN, digest: String::new() };
    let refused = quantize(&deaf, &nan, &request, Device::Cpu, &Unwatched).unwrap_err();
    assert!(matches!(refused, Error::InvalidArgument { .. }), "{refused}");
}

/// Stops after the first operand.
struct Impatient(std::sync::atomic::AtomicUsize);

impl Progress for Impatient {
    fn report(&self, update: ProgressUpdate) {
        let operands = usize::from(update.site.is_some());
        self.0.fetch_add(operands, std::sync::atomic::Ordering::SeqCst);
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::SeqCst) > 0
    }
}

#[test]
fn a_calibration_stops_when_asked_to() {
    let checkpoint = Checkpoint::open(&root("demo/checkpoints/digits-vit")).unwrap();
    let images = few_images(&checkpoint, "digits-vit", 2);
    let watcher = Impatient(std::sync::atomic::AtomicUsize::new(0));
    let stopped = quantize(&checkpoint, &images, &request(4, &[]), Device::Cpu, &watcher);
    assert!(matches!(stopped, Err(Error::Cancelled)));
    assert_eq!(watcher.0.into_inner(), 1);
}
