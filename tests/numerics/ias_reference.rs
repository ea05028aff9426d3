//! I&S-ViT against its authors' code on small models without optimization steps (tests/fixtures/ias),
//! and learning on the trained digits models, for `ias` and `dopq`.
//!
//! With the authors' 256 images and 100 iterations the comparison takes minutes; docs/methods.md says
//! what it gave.

use tch::Tensor;
use vitq::calib::{QuantizeSpec, StemHeadPolicy};
use vitq::engine::pipeline::CalibrationImages;

use crate::digits;
use crate::reference::{
    Subject, artifact, calibration, compare_small_models, load, metrics, subject,
};

fn request(method: &str, bits: u32, options: &[(&str, &str)]) -> QuantizeSpec {
    digits::request(method, options, bits, StemHeadPolicy::Same)
}

#[test]
fn ias_equals_the_released_code_on_small_models() {
    let released = [("variant", "released"), ("learning", "off")];
    let count = compare_small_models("tests/fixtures/ias", &|bits| request("ias", bits, &released));
    assert_eq!(count, 2);
}

/// Few images and steps: enough to see that learning pays.
const SHORT: [(&str, &str); 3] = [("iterations", "8"), ("batch", "8"), ("learning_rate", "0.0005")];

/// Every fourth image, of all classes.
fn thinned(subject: Subject) -> Subject {
    let every = |x: &Tensor| x.slice(0, 0, None, 4);
    Subject {
        images: every(&subject.images).contiguous(),
        labels: subject.labels.into_iter().step_by(4).collect(),
        timm_logits: every(&subject.timm_logits),
        checkpoint: subject.checkpoint,
    }
}

#[test]
fn learning_brings_the_logits_closer_to_the_float_model() {
    let subject = thinned(subject("digits-vit"));
    let images = calibration(&subject.checkpoint, "digits-vit/n32/seed0");
    let score = |method, options: &[(&str, &str)]| {
        let artifact = artifact(&subject.checkpoint, &images, &request(method, 3, options));
        let logits = load(&artifact).forward(&subject.images).unwrap();
        metrics(&subject, &logits).sqnr_db()
    };
    for method in ["ias", "dopq"] {
        let (off, on) = (score(method, &[("learning", "off")]), score(method, &SHORT));
        println!("{method}: {off:.2} dB without learning, {on:.2} dB with a little");
        assert!(on > off + 0.3, "{method}: {off} {on}");
    }
}

#[test]
fn storing_and_loading_gives_the_same_logits_whatever_the_batch() {
    let subject = subject("digits-swin");
    let images = calibration(&subject.checkpoint, "digits-swin/n32/seed0");
    let few = CalibrationImages { images: images.images.narrow(0, 0, 4), ..images };
    for method in ["ias", "dopq"] {
        let request = request(method, 4, &[("iterations", "1"), ("batch", "2")]);
        let first = artifact(&subject.checkpoint, &few, &request);
        let bytes = first.to_bytes().unwrap();
        let repeated = artifact(&subject.checkpoint, &few, &request);
        assert_eq!(repeated.to_bytes().unwrap(), bytes, "{method}: deterministic");
        let model = load(&vitq::artifact::Artifact::from_bytes("test", &bytes).unwrap());
        let all = model.forward(&subject.images.narrow(0, 0, 7)).unwrap();
        assert!(load(&first).forward(&subject.images.narrow(0, 0, 7)).unwrap().equal(&all));
        for batch in [1, 7] {
            for first in (0..7).step_by(batch as usize) {
                let part = model.forward(&subject.images.narrow(0, first, batch)).unwrap();
                assert!(part.equal(&all.narrow(0, first, batch)), "{method} {batch} {first}");
            }
        }
        // The trained score tables and the rewritten norms are part of the artifact.
        let weights = first.weights().unwrap();
        for name in [
            "layers.0.blocks.0.attn.relative_position_bias_table",
            "layers.0.blocks.0.norm1.weight",
        ] {
            let before = subject.checkpoint.weights.find(name).unwrap();
            assert!(!weights.find(name).unwrap().equal(before), "{name}");
        }
        // Swin's reduction is folded by dopq only; folding gives it a bias.
        let bias = weights.find("layers.0.downsample.reduction.bias").is_some();
        assert_eq!(bias, method == "dopq");
    }
}
