//! What the closed form owes to the common scale: nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::calib::progress::Unwatched;
use crate::calib::{QuantizeSpec, RoleBits, StemHeadPolicy};
use crate::methods::MethodOptions;
use crate::model::Model;
use crate::model::generated::{GeneratedOptions, generate, images};
use crate::nn::{Operand, Site, Weights};
use crate::quant::QuantPlan;
use crate::quant::uniform::laws::sample;

/// A small model with random weights, quantized with some options.
fn quantize(architecture: &str, given: &[(&str, &str)]) -> (Model, Weights, QuantPlan) {
    let _guard = tch::no_grad_guard();
    let args = match architecture {
        "swin_tiny" => {
            r#"{"embed_dim":16,"depths":[2,1],"num_heads":[2,4],"img_size":28,"patch_size":2}"#
        }
        _ => r#"{"embed_dim":32,"depth":2,"num_heads":2,"img_size":32}"#,
    };
    let model_args = serde_json::from_str(args).unwrap();
    let options = GeneratedOptions { num_classes: 5, model_args, seed: 3 };
    let checkpoint = generate(architecture, options).unwrap();
    let given: BTreeMap<String, String> =
        given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let bits = BitWidth::new(4, "bits").unwrap();
    let mut task = CalibrationTask {
        spec: Arc::clone(&checkpoint.spec),
        images: images(6, checkpoint.spec.preprocessing.image_size, 2).unwrap(),
        weights: checkpoint.weights,
        options: MethodOptions::resolve(OPTIONS, &given).unwrap(),
        request: QuantizeSpec {
            method: "dopq".to_owned(),
            options: given,
            weight_bits: bits.into(),
            activation_bits: bits.into(),
            stem_head: StemHeadPolicy::Same,
            seed: 0,
            role_bits: RoleBits::default(),
        },
        device: Device::Cpu,
        progress: &Unwatched,
    };
    let found = DopQ.calibrate(&mut task).unwrap();
    let model = task.model_with(&found.edits).unwrap();
    (model, task.weights.with(&found.edits), found.plan)
}

/// Codes of an operand.
fn codes(plan: &QuantPlan, site: &Site, operand: Operand, x: &Tensor) -> Tensor {
    let quantizer = plan.get(site.id, operand).unwrap();
    quantizer.quantize(x).unwrap().unwrap().remove(0).codes
}

/// Share of equal codes. The rewritten parameters differ by a factor, so a value at a rounding
/// boundary may fall to either side.
fn agreement(a: &Tensor, b: &Tensor) -> f64 {
    a.eq_tensor(b).to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

#[test]
fn mean_and_median_differ_in_scale_but_not_in_codes() {
    for architecture in ["vit_tiny", "swin_tiny"] {
        let off = ("learning", "off");
        let median = quantize(architecture, &[off]);
        let mean = quantize(architecture, &[off, ("common_scale", "mean")]);
        let sites = median.0.sites.iter();
        let folded: Vec<_> =
            sites.filter(|site| site.norm.is_some() && site.role != Role::Head).collect();
        assert!(folded.len() >= 4);
        for site in folded {
            let scale = |plan: &QuantPlan| {
                let state = plan.get(site.id, Operand::Lhs).unwrap().state();
                state.tensors["scale"].double_value(&[0])
            };
            let ratio = scale(&median.2) / scale(&mean.2);
            assert!((ratio - 1.0).abs() > 1e-3, "{}: {ratio}", site.path);
            let [first, second] = [&median, &mean].map(|(_, weights, plan)| {
                let get = |name: &str| weights.find(name).unwrap();
                let norm = site.norm.as_ref().unwrap();
                let gain = get(&format!("{norm}.weight"));
                let normalized = sample(&[50, gain.size()[0]], 3);
                let input = normalized * gain + get(&format!("{norm}.bias"));
                let weight = get(&format!("{}.weight", site.path));
                let input = codes(plan, site, Operand::Lhs, &input);
                (input, codes(plan, site, Operand::Rhs, weight))
            });
            assert!(agreement(&first.0, &second.0) > 0.995, "{} input", site.path);
            assert!(agreement(&first.1, &second.1) > 0.995, "{} weight", site.path);
        }
    }
}

#[test]
fn with_learning_the_scale_matters() {
    let steps = [("iterations", "3"), ("batch", "4"), ("learning_rate", "0.01")];
    let [median, again] = [0, 1].map(|_| quantize("vit_tiny", &steps));
    let mean = quantize("vit_tiny", &[&steps[..], &[("common_scale", "mean")]].concat());
    let trained = |found: &(Model, Weights, QuantPlan)| {
        let site = found.0.sites.iter().find(|site| site.role == Role::Fc1).unwrap();
        let weight = found.1.find(&format!("{}.weight", site.path)).unwrap();
        codes(&found.2, site, Operand::Rhs, weight)
    };
    assert_eq!(trained(&median), trained(&again), "deterministic");
    let share = agreement(&trained(&median), &trained(&mean));
    assert!(share < 0.995, "{share}");
}
