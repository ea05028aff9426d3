//! RepQ-ViT's quantizers against the released code: tests/fixtures/repq.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tch::Tensor;

use super::*;
use crate::quant::uniform::Uniform;

/// Largest difference allowed, relative to the reference's largest magnitude: float32 rounding.
const TOLERANCE: f64 = 1e-5;

struct Case {
    name: String,
    bits: BitWidth,
    tensors: BTreeMap<String, Tensor>,
}

fn cases(prefix: &str) -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/repq");
    let index: Value =
        serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
    let stored: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(folder.join("goldens.safetensors")).unwrap().into_iter().collect();
    let tensor =
        |entry: &Value| -> Tensor { stored[entry["name"].as_str().unwrap()].shallow_clone() };
    let cases = index["cases"].as_array().unwrap().iter();
    cases
        .filter(|case| case["case"].as_str().unwrap().starts_with(prefix))
        .map(|case| Case {
            name: case["case"].as_str().unwrap().to_owned(),
            bits: BitWidth::new(case["meta"]["n_bits"].as_u64().unwrap() as u32, "bits").unwrap(),
            tensors: case["tensors"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(key, entry)| (key.clone(), tensor(entry)))
                .collect(),
        })
        .collect()
}

impl Case {
    fn assert_close(&self, found: &Tensor, key: &str) {
        let expected = self.tensors[key].view_as(found);
        let scale = expected.abs().max().double_value(&[]);
        let worst = (found - expected).abs().max().double_value(&[]);
        assert!(worst <= TOLERANCE * scale, "{} {key}: {worst} of {scale}", self.name);
    }

    fn assert_outputs(&self, quantizer: &dyn Quantizer, matrix: &Tensor) {
        self.assert_close(&quantizer.fake_quantize(matrix).unwrap(), "output");
        if let Some(input) = self.tensors.get("eval_input") {
            self.assert_close(&quantizer.fake_quantize(input).unwrap(), "eval_output");
        }
    }

    fn assert_grid(&self, found: &Uniform, matrix: &Tensor) {
        self.assert_close(found.scale(), "delta");
        let zero_point = self.tensors["zero_point"].view_as(found.zero_point());
        assert!(found.zero_point().equal(&zero_point), "{}", self.name);
        self.assert_outputs(found, matrix);
    }
}

/// The recipe without its scores, which have a test of their own.
fn rules() -> Recipe<'static> {
    recipe(CommonGrid::Mean, &|_, _| unreachable!())
}

#[test]
fn activations_per_tensor_equal_the_released_code() {
    let mut count = 0;
    for prefix in ["act_ln_tensor", "act_gelu", "act_qk"] {
        for case in cases(prefix) {
            let input = &case.tensors["input"];
            case.assert_grid(&rules().per_tensor(input, case.bits).unwrap(), input);
            count += 1;
        }
    }
    assert_eq!(count, 9);
}

#[test]
fn activations_per_channel_equal_the_released_code() {
    let cases = cases("act_ln_channel");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let channels = rules().per_channel(input, case.bits).unwrap();
        assert_eq!(channels.constant_channels().unwrap(), 0);
        case.assert_grid(&channels.grids, input);
    }
}

#[test]
fn weights_equal_the_released_code() {
    let cases = cases("weight_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let matrix = case.tensors["input"].view([64, -1]);
        case.assert_grid(&rules().per_row(&matrix, case.bits).unwrap(), &matrix);
    }
}

#[test]
fn scores_equal_the_released_code() {
    let cases = cases("softmax");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let found = LogSqrt2::search(input, case.bits, ZeroCode::Extra).unwrap();
        let largest = Tensor::from_slice(&[found.state().scalars["largest"]]);
        case.assert_close(&largest, "delta");
        case.assert_outputs(&found, input);
    }
}
