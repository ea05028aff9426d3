//! Float forwards against timm 0.6.13: recorded activations of small models, logits of full-size
//! presets with generated weights, and what must hold for any batch.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};
use vitq::Result;
use vitq::exec::{Float, Tap, TapSink};
use vitq::model::generated::{self, GeneratedOptions};
use vitq::model::{Checkpoint, Model};
use vitq::nn::{Operand, Role, Site};

use crate::reference::{device, root};

/// Accepted difference relative to the largest reference value: float32 rounding, accumulated in
/// another order over all layers, stays two decades below it.
const TOLERANCE: f64 = 1e-4;
/// The same for one activation of a small model.
const ACTIVATION_TOLERANCE: f64 = 1e-5;

const SMALL: [&str; 5] = ["vit_a", "vit_b", "deit", "swin_a", "swin_b"];

fn fixtures() -> PathBuf {
    root("tests/fixtures")
}

fn read(path: PathBuf) -> BTreeMap<String, Tensor> {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter().map(|(name, view)| {
        let shape: Vec<i64> = view.shape().iter().map(|axis| *axis as i64).collect();
        (name, Tensor::from_data_size(view.data(), &shape, Kind::Float))
    });
    tensors.collect()
}

fn open(name: &str) -> (Model, BTreeMap<String, Tensor>) {
    open_on(Device::Cpu, name)
}

fn open_on(device: Device, name: &str) -> (Model, BTreeMap<String, Tensor>) {
    let folder = fixtures().join("float").join(name);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let weights = checkpoint.weights.to_device(device).unwrap();
    let model = Model::build(&checkpoint.spec, &weights).unwrap();
    (model, read(folder.join("io.safetensors")))
}

/// max |a − b| / max |b|, wherever a was computed.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    let a = a.to_device(Device::Cpu);
    assert_eq!(a.size(), b.size());
    let largest = |x: &Tensor| x.abs().max().double_value(&[]);
    largest(&(a - b)) / largest(b)
}

/// Keeps every operand and output by `path.input`, `path.output`, ...
#[derive(Default)]
struct Recorder(BTreeMap<String, Tensor>);

impl TapSink for Recorder {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        let name = format!("{}.{}", site.path, site.operand_name(operand));
        self.0.insert(name, x.shallow_clone());
        Ok(())
    }

    fn output(&mut self, site: &Site, y: &Tensor) -> Result<()> {
        self.0.insert(format!("{}.output", site.path), y.shallow_clone());
        Ok(())
    }
}

/// Runs unit by unit, so that unit outputs are seen too (by `path`).
fn record(model: &Model, images: &Tensor) -> (Tensor, BTreeMap<String, Tensor>) {
    let mut recorder = Recorder::default();
    let mut x = images.shallow_clone();
    for unit in &model.units {
        x = unit.forward(&mut Tap::new(&mut Float, &mut recorder), &x).unwrap();
        recorder.0.insert(unit.path().to_owned(), x.shallow_clone());
    }
    (x, recorder.0)
}

/// Name of a recorded tensor for each reference activation that is seen at a site or a unit.
fn counterpart(model: &Model, act: &str) -> String {
    let swin = model.spec.family == "swin";
    let first = if swin { "layers.0.blocks.0" } else { "blocks.0" };
    let blocks: Vec<&str> =
        model.units.iter().map(|unit| unit.path()).filter(|path| path.contains("blocks")).collect();
    let last = blocks.last().unwrap();
    match act {
        "act.patch_embed" if swin => "patch_embed".to_owned(),
        "act.patch_embed" => "patch_embed.proj.output".to_owned(),
        "act.block_first.norm1" => format!("{first}.attn.qkv.input"),
        "act.block_first.attn.qkv" => format!("{first}.attn.qkv.output"),
        "act.block_first.attn" => format!("{first}.attn.proj.output"),
        "act.block_first.mlp.act" => format!("{first}.mlp.fc2.input"),
        "act.block_first" => first.to_owned(),
        "act.stage0_block1_shifted" => "layers.0.blocks.1".to_owned(),
        "act.stage0" => "layers.0.downsample".to_owned(),
        "act.block_last" | "act.stage_last" => (*last).to_owned(),
        "act.norm" => "head.input".to_owned(),
        other => panic!("unknown activation {other}"),
    }
}

/// The reference in the layout of its counterpart.
fn as_recorded(model: &Model, act: &str, reference: &Tensor) -> Tensor {
    match (act, model.spec.family.as_str()) {
        ("act.norm", "swin") => reference.mean_dim(1, false, Kind::Float),
        ("act.norm", _) => reference.select(1, 0),
        ("act.block_first.norm1", "swin") => {
            let (n, tokens, dim) = reference.size3().unwrap();
            let side = tokens.isqrt();
            reference
                .reshape([n, side / 7, 7, side / 7, 7, dim])
                .permute([0, 1, 3, 2, 4, 5])
                .reshape([-1, 49, dim])
        }
        _ => reference.shallow_clone(),
    }
}

#[test]
fn small_models_give_the_recorded_logits_and_activations() {
    for name in SMALL {
        let (model, io) = open_on(device(), name);
        let (logits, recorded) = record(&model, &io["input"].to_device(device()));
        assert!(difference(&logits, &io["logits"]) <= TOLERANCE, "{name}");
        let acts: Vec<_> = io.iter().filter(|(act, _)| act.starts_with("act.")).collect();
        assert!(acts.len() >= 8, "{name}");
        for (act, reference) in acts {
            let reference = as_recorded(&model, act, reference);
            // Large activations are recorded for the first image or window only.
            let ours = recorded[&counterpart(&model, act)].narrow(0, 0, reference.size()[0]);
            let found = difference(&ours, &reference);
            assert!(found <= ACTIVATION_TOLERANCE, "{name} {act}: {found:e}");
        }
    }
}

#[derive(Deserialize)]
struct Case {
    architecture: String,
    num_classes: i64,
    images: i64,
    model_args: Map<String, Value>,
}

#[test]
fn generated_presets_give_timm_logits() {
    let folder = fixtures().join("presets");
    let cases = fs::read_to_string(folder.join("cases.json")).unwrap();
    let cases: BTreeMap<String, Case> = serde_json::from_str(&cases).unwrap();
    let reference = read(folder.join("logits.safetensors"));
    let mut table = String::from("| model | max Δlogit / max logit |\n|---|---|\n");
    let mut worst = 0f64;
    for (name, case) in cases {
        let Case { architecture, num_classes, images, model_args } = case;
        let options = GeneratedOptions { num_classes, model_args, seed: 0 };
        let checkpoint = generated::generate(&architecture, options).unwrap();
        let weights = checkpoint.weights.to_device(device()).unwrap();
        let model = Model::build(&checkpoint.spec, &weights).unwrap();
        let side = checkpoint.spec.preprocessing.image_size;
        let input = generated::images(images, side, 0).unwrap().to_device(device());
        let logits = model.forward(&mut Float, &input).unwrap();
        let found = difference(&logits, &reference[&name]);
        table += &format!("| {name} | {found:.1e} |\n");
        worst = worst.max(found);
    }
    println!("{table}");
    assert!(worst <= TOLERANCE, "{table}");
}

#[test]
fn logits_do_not_depend_on_the_batch() {
    for name in SMALL {
        let (model, io) = open(name);
        let side = io["input"].size()[3];
        let images = generated::images(32, side, 3).unwrap();
        let all = model.forward(&mut Float, &images).unwrap();
        let seven = model.forward(&mut Float, &images.narrow(0, 20, 7)).unwrap();
        assert_eq!(seven, all.narrow(0, 20, 7), "{name}, 7 of 32");
        for index in [0, 13, 31] {
            let one = model.forward(&mut Float, &images.narrow(0, index, 1)).unwrap();
            assert_eq!(one, all.narrow(0, index, 1), "{name}, image {index} of 32");
        }
    }
}

#[test]
fn sites_carry_timm_paths_norms_and_windows() {
    let (vit, _) = open("vit_a");
    let paths: Vec<&str> = vit.sites.iter().map(|site| site.path.as_str()).collect();
    let block = ["attn.qkv", "attn.matmul1", "attn.matmul2", "attn.proj", "mlp.fc1", "mlp.fc2"];
    let mut expected = vec!["patch_embed.proj".to_owned()];
    for index in 0..2 {
        expected.extend(block.iter().map(|site| format!("blocks.{index}.{site}")));
    }
    expected.push("head".to_owned());
    assert_eq!(paths, expected);
    assert_eq!(vit.sites[7].norm.as_deref(), Some("blocks.1.norm1"));
    assert_eq!(vit.sites[11].norm.as_deref(), Some("blocks.1.norm2"));
    assert_eq!(vit.sites[13].norm.as_deref(), Some("norm"));
    assert!(vit.sites.iter().enumerate().all(|(id, site)| site.id.0 as usize == id));

    let (swin, io) = open("swin_b");
    let find = |path: &str| swin.sites.iter().find(|site| site.path == path).unwrap();
    let reduction = find("layers.0.downsample.reduction");
    assert_eq!(reduction.role, Role::Reduction);
    assert_eq!(reduction.norm.as_deref(), Some("layers.0.downsample.norm"));
    assert_eq!(swin.units[reduction.unit].path(), "layers.0.downsample");
    assert_eq!(find("head").norm, None);
    // Every operand's leading axis is images × windows.
    let (_, recorded) = record(&swin, &io["input"]);
    for site in &swin.sites {
        let operand = format!("{}.{}", site.path, site.operand_name(Operand::Lhs));
        assert_eq!(recorded[&operand].size()[0], 2 * site.windows, "{operand}");
    }
    assert_eq!(find("layers.0.blocks.1.attn.matmul1").windows, 16);
}

#[test]
fn edits_of_any_parameter_change_the_model() {
    for name in ["vit_b", "swin_a"] {
        let folder = fixtures().join("float").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        let image = read(folder.join("io.safetensors"))["input"].narrow(0, 0, 1);
        let logits = |edits: &BTreeMap<String, Tensor>| {
            let weights = checkpoint.weights.with(edits);
            let model = Model::build(&checkpoint.spec, &weights).unwrap();
            model.forward(&mut Float, &image).unwrap()
        };
        let before = logits(&BTreeMap::new());
        for (parameter, tensor) in checkpoint.weights.iter() {
            // A softmax does not see a shift of all keys; noise it does.
            let edited = tensor + tensor.rand_like() * 0.5;
            let after = logits(&BTreeMap::from([(parameter.to_owned(), edited)]));
            assert_ne!(before, after, "{name} {parameter}");
        }
        let added = match name {
            "swin_a" => ("layers.0.downsample.reduction.bias", 48),
            _ => ("blocks.1.attn.qkv.bias", 120),
        };
        let bias = Tensor::ones([added.1], (Kind::Float, Device::Cpu));
        let after = logits(&BTreeMap::from([(added.0.to_owned(), bias)]));
        assert_ne!(before, after, "{name} {}", added.0);
    }
}
