//! IGQ-ViT on the trained digits models. Its authors published no code to compare with: what is held
//! here is what the paper claims, that groups beat one grid per tensor and come near the upper bound.

use std::collections::BTreeMap;

use tch::{Device, Tensor};
use vitq::artifact::Artifact;
use vitq::calib::progress::Unwatched;
use vitq::calib::{QuantizeSpec, StemHeadPolicy};
use vitq::engine::evaluator::Metrics;
use vitq::engine::pipeline::{CalibrationImages, quantize};
use vitq::engine::{FloatModel, QuantizedModel};
use vitq::exec::Backend;
use vitq::model::Checkpoint;
use vitq::tensor::to_vec_f32;

use crate::digits::{self, Digits};

/// A demo model, calibration images, and every fourth validation image.
struct Subject {
    checkpoint: Checkpoint,
    calibration: CalibrationImages,
    images: Tensor,
    labels: Vec<usize>,
    float_logits: Tensor,
}

fn subject(name: &str) -> Subject {
    let Digits { checkpoint, calibration, images, labels } = Digits::open(name, 16, 4);
    let float = FloatModel::load(&checkpoint, Device::Cpu).unwrap();
    let float_logits = float.forward(&images).unwrap();
    Subject { checkpoint, calibration, images, labels, float_logits }
}

fn request(method: &str, options: &[(&str, &str)]) -> QuantizeSpec {
    digits::request(method, options, 4, StemHeadPolicy::Float)
}

impl Subject {
    fn artifact(&self, request: &QuantizeSpec) -> Artifact {
        quantize(&self.checkpoint, &self.calibration, request, Device::Cpu, &Unwatched)
            .unwrap()
            .artifact
    }

    fn metrics(&self, request: &QuantizeSpec) -> Metrics {
        let logits = load(&self.artifact(request)).forward(&self.images).unwrap();
        let classes = logits.size()[1] as usize;
        let (found, float) =
            (to_vec_f32(&logits).unwrap(), to_vec_f32(&self.float_logits).unwrap());
        let mut metrics = Metrics::default();
        for (index, label) in self.labels.iter().enumerate() {
            let row = index * classes..(index + 1) * classes;
            metrics.add(&found[row.clone()], *label, Some(&float[row]));
        }
        let (top1, agreement, sqnr) = (metrics.top1(), metrics.agreement(), metrics.sqnr_db());
        let QuantizeSpec { method, options, .. } = request;
        println!("{method} {options:?}: top-1 {top1:.2}, agreement {agreement:.2}, {sqnr:.1} dB");
        metrics
    }
}

fn load(artifact: &Artifact) -> QuantizedModel {
    QuantizedModel::load(artifact, Device::Cpu, Backend::Simulated).unwrap()
}

/// Measured: groups 9 to 10 and 14 dB above minmax (ViT and Swin), the upper bound 2 to 3 dB above
/// groups. In agreement it depends on the processor: 4 to 8 points of 113 images on the ViT.
fn compare(name: &str) {
    let subject = subject(name);
    let minmax = subject.metrics(&request("minmax", &[]));
    let groups = subject.metrics(&request("igq", &[("allocation", "false")]));
    let upper_bound = subject.metrics(&request("igq", &[("assignment", "upper_bound")]));
    assert!(groups.top1() >= minmax.top1() + 3.0);
    assert!(groups.agreement() >= minmax.agreement() + 3.0);
    assert!(groups.sqnr_db() >= minmax.sqnr_db() + 8.0);
    assert!(upper_bound.sqnr_db() >= groups.sqnr_db());
    assert!(upper_bound.agreement() >= 97.0);
}

#[test]
fn groups_beat_minmax_and_come_near_the_upper_bound_on_the_digits_vit() {
    compare("digits-vit");
}

#[test]
fn groups_beat_minmax_and_come_near_the_upper_bound_on_the_digits_swin() {
    compare("digits-swin");
}

#[test]
fn storing_and_loading_gives_the_same_logits_whatever_the_batch() {
    for name in ["digits-vit", "digits-swin"] {
        let mut subject = subject(name);
        subject.calibration.images = subject.calibration.images.narrow(0, 0, 4);
        for options in [
            &[("allocation", "false"), ("qkv", "group"), ("bounds", "mean")][..],
            &[("assignment", "upper_bound"), ("qkv", "group")],
        ] {
            let first = subject.artifact(&request("igq", options));
            let bytes = first.to_bytes().unwrap();
            let model = load(&Artifact::from_bytes("test", &bytes).unwrap());
            let images = subject.images.narrow(0, 0, 32);
            let all = model.forward(&images).unwrap();
            assert!(load(&first).forward(&images).unwrap().equal(&all));
            for (batch, end) in [(1, 7), (7, 28)] {
                for first in (0..end).step_by(batch as usize) {
                    let part = model.forward(&images.narrow(0, first, batch)).unwrap();
                    assert!(part.equal(&all.narrow(0, first, batch)), "{name} {batch} {first}");
                }
            }
        }
    }
}

/// The bit operations that depend on the group count, Σ g·(N·H + K), of one image of the digits ViT:
/// 65 tokens, width 96.
fn operations(artifact: &Artifact) -> f64 {
    let mut sum = 0.0;
    for (path, operands) in &artifact.header.sites {
        let (rows, width): (f64, f64) = match path.rsplit('.').next().unwrap() {
            "qkv" => (65.0 * 288.0, 96.0),
            "proj" => (65.0 * 96.0, 96.0),
            "fc1" => (65.0 * 384.0, 96.0),
            "fc2" => (65.0 * 96.0, 384.0),
            "matmul2" => (0.0, 3.0 * 65.0),
            _ => continue,
        };
        let operand = operands.get("input").or_else(|| operands.get("lhs")).unwrap();
        sum += operand.scalars["groups"] * (rows + width);
    }
    sum
}

#[test]
fn the_allocation_shares_out_what_fixed_groups_cost() {
    let mut subject = subject("digits-vit");
    subject.calibration.images = subject.calibration.images.narrow(0, 0, 4);
    let fixed = subject.artifact(&request("igq", &[("allocation", "false")]));
    let shared = subject.artifact(&request("igq", &[]));
    assert!(operations(&shared) <= operations(&fixed) * (1.0 + 1e-9));
    assert!(operations(&shared) >= operations(&fixed) * 0.9, "the budget is used");
    let counts: BTreeMap<u64, usize> = shared
        .header
        .sites
        .values()
        .flat_map(BTreeMap::values)
        .filter_map(|operand| operand.scalars.get("groups"))
        .fold(BTreeMap::new(), |mut counts, groups| {
            *counts.entry(*groups as u64).or_default() += 1;
            counts
        });
    assert_eq!(counts.values().sum::<usize>(), 6 * 5);
    assert!(counts.len() > 1, "{counts:?}");
    assert!(counts.keys().all(|count| (4..=16).contains(count)), "{counts:?}");
    let repeated = subject.artifact(&request("igq", &[]));
    assert_eq!(repeated.to_bytes().unwrap(), shared.to_bytes().unwrap());
}
