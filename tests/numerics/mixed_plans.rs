//! Plans that quantize less than everything: weights alone, activations alone, single roles with
//! bits of their own. Every method listed here must hold to them, for ViT and Swin.

use serde_json::json;
use tch::{Device, Tensor};
use vitq::artifact::Artifact;
use vitq::calib::progress::Unwatched;
use vitq::calib::{QuantizeSpec, RoleBits, StemHeadPolicy};
use vitq::engine::pipeline::{CalibrationImages, quantize};
use vitq::engine::{FloatModel, QuantizedModel};
use vitq::exec::Backend;
use vitq::model::generated::{GeneratedOptions, generate, images};
use vitq::model::{Checkpoint, Model};
use vitq::nn::{Operand, Site};
use vitq::quant::Precision;
use vitq::tensor::sqnr_db;

use crate::methods::{quantizing, quick};

/// A plan: weight bits, activation bits, exceptions.
type Plan = (u32, u32, &'static [&'static str]);

const WEIGHTS_ONLY: Plan = (6, 32, &[]);
const ACTIVATIONS_ONLY: Plan = (32, 6, &[]);
const PLANS: [Plan; 5] = [
    WEIGHTS_ONLY,
    ACTIVATIONS_ONLY,
    (6, 6, &["qkv=8/float", "fc1=float/8", "reduction=8/8", "score_value=float"]),
    (32, 32, &["fc2=4/5", "query_key=7", "qkv=float/4"]),
    (6, 6, &["head=8/6", "embed=6/float", "proj=float/float"]),
];

/// A ViT and a Swin with two stages, so that there is a patch merging.
fn checkpoints() -> [Checkpoint; 2] {
    [
        ("vit_tiny", json!({"img_size": 32, "embed_dim": 48, "depth": 1})),
        ("swin_tiny", json!({"img_size": 56, "embed_dim": 24, "depths": [1, 1]})),
    ]
    .map(|(architecture, mut args)| {
        let args = args.as_object_mut().unwrap();
        if architecture == "swin_tiny" {
            args.insert("num_heads".to_owned(), json!([1, 2]));
        }
        let options =
            GeneratedOptions { num_classes: 10, model_args: args.clone(), ..Default::default() };
        generate(architecture, options).unwrap()
    })
}

fn request(method: &str, (weights, activations, exceptions): Plan) -> QuantizeSpec {
    let options = quick(method).iter();
    let mut role_bits = RoleBits::default();
    for text in exceptions {
        role_bits.insert_text(text).unwrap();
    }
    QuantizeSpec {
        method: method.to_owned(),
        options: options.map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        weight_bits: Precision::new(weights, "weight_bits").unwrap(),
        activation_bits: Precision::new(activations, "activation_bits").unwrap(),
        stem_head: StemHeadPolicy::Float,
        seed: 0,
        role_bits,
    }
}

fn artifact(checkpoint: &Checkpoint, request: &QuantizeSpec) -> Artifact {
    let side = checkpoint.spec.preprocessing.image_size;
    let images = CalibrationImages { images: images(3, side, 0).unwrap(), digest: String::new() };
    quantize(checkpoint, &images, request, Device::Cpu, &Unwatched).unwrap().artifact
}

fn logits(artifact: &Artifact, images: &Tensor) -> Tensor {
    let model = QuantizedModel::load(artifact, Device::Cpu, Backend::Simulated).unwrap();
    model.forward(images).unwrap()
}

/// Bits that the request asks for; pixels have 8 wherever they are quantized.
fn expected(request: &QuantizeSpec, site: &Site, operand: Operand) -> Option<u8> {
    let is_weight = operand == Operand::Rhs && !site.role.is_matmul();
    let bits = if is_weight {
        request.role_weight_bits(site.role)
    } else {
        request.role_activation_bits(site.role)
    };
    let pixels = site.role == vitq::nn::Role::Embed && !is_weight;
    bits.map(|bits| if pixels { 8 } else { bits.get() })
}

#[test]
fn every_operand_gets_the_bits_that_were_asked_for() {
    for checkpoint in checkpoints() {
        let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
        for (method, plan) in quantizing().flat_map(|(m, _)| PLANS.iter().map(move |p| (m, *p))) {
            let request = request(method, plan);
            let artifact = artifact(&checkpoint, &request);
            for site in &model.sites {
                for operand in [Operand::Lhs, Operand::Rhs] {
                    let found = artifact.state(site, operand).unwrap().map(|state| state.bits);
                    let path = &site.path;
                    let expected = expected(&request, site, operand);
                    assert_eq!(found, expected, "{method} {plan:?} {path} {operand:?}");
                }
            }
            // Stored, restored and run: finite, near the float model, the same one by one.
            let bytes = artifact.to_bytes().unwrap();
            let restored = Artifact::from_bytes("test", &bytes).unwrap();
            assert_eq!(restored.header.request, request);
            let batch = images(3, checkpoint.spec.preprocessing.image_size, 1).unwrap();
            let found = logits(&restored, &batch);
            let alone = logits(&restored, &batch.narrow(0, 1, 1)).get(0);
            assert!(found.get(1).equal(&alone), "{method} {plan:?}: an image depends on its batch");
            let float = FloatModel::load(&checkpoint, Device::Cpu).unwrap();
            let fidelity = sqnr_db(&float.forward(&batch).unwrap(), &found).unwrap();
            assert!(fidelity > 5.0, "{method} {plan:?}: {fidelity} dB");
        }
    }
}

#[test]
fn equal_requests_give_equal_bytes() {
    let [checkpoint, _] = checkpoints();
    let first = request("minmax", (4, 4, &["fc2=8/8", "qkv=8/8"]));
    let second = request("minmax", (4, 4, &["qkv=8/8", "fc2=8/8"]));
    let bytes = |request| artifact(&checkpoint, request).to_bytes().unwrap();
    assert_eq!(bytes(&first), bytes(&second));
    assert_ne!(bytes(&first), bytes(&request("minmax", (4, 4, &["fc2=8/8"]))));
}

#[test]
fn repq_rewrites_a_layer_norm_only_between_two_grids() {
    let [_, checkpoint] = checkpoints();
    let unchanged = |plan: Plan, name: &str| {
        let weights = artifact(&checkpoint, &request("repq", plan)).weights().unwrap();
        match (weights.find(name), checkpoint.weights.find(name)) {
            (Some(found), Some(float)) => found.equal(float),
            (found, float) => found.is_none() && float.is_none(),
        }
    };
    let norms = ["layers.0.blocks.0.norm1.weight", "layers.0.blocks.0.norm2.bias"];
    let merging = ["layers.0.downsample.norm.weight", "layers.0.downsample.reduction.bias"];
    for name in norms.into_iter().chain(merging) {
        assert!(unchanged(WEIGHTS_ONLY, name), "weights only: {name}");
        assert!(unchanged(ACTIVATIONS_ONLY, name), "activations only: {name}");
        assert!(!unchanged((6, 6, &[]), name), "all: {name}");
    }
    // One side of one role decides for that role alone.
    let plan: Plan = (6, 6, &["qkv=float/6", "reduction=6/float"]);
    assert!(unchanged(plan, norms[0]) && !unchanged(plan, norms[1]));
    assert!(unchanged(plan, merging[0]) && unchanged(plan, merging[1]));
}
