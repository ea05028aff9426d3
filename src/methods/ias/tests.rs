//! I&S-ViT's quantizers against the released code: tests/fixtures/ias.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tch::Tensor;

use super::*;

/// Largest difference allowed, relative to the reference's largest magnitude: float32 rounding.
const TOLERANCE: f64 = 1e-5;

struct Case {
    name: String,
    bits: BitWidth,
    tensors: BTreeMap<String, Tensor>,
}

fn cases(prefix: &str) -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/ias");
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
}

/// The recipe without its scores, which have a test of their own.
fn rules() -> Recipe<'static> {
    recipe(Variant::Released, &|_, _| unreachable!())
}

#[test]
fn weights_equal_the_released_code() {
    let cases = cases("weight_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let matrix = case.tensors["input"].view([64, -1]);
        let grid = rules().per_row(&matrix, case.bits).unwrap();
        case.assert_close(grid.scale(), "delta");
        case.assert_outputs(&grid, &matrix);
    }
}

#[test]
fn scores_equal_the_released_code() {
    let cases = cases("softmax");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let found = ShiftUniformLog2::search(input, case.bits, Levels::Released).unwrap();
        for (ours, theirs) in [("shift", "delta"), ("low", "minv"), ("high", "maxv")] {
            case.assert_close(&Tensor::from_slice(&[found.state().scalars[ours]]), theirs);
        }
        case.assert_outputs(&found, input);
        // As scored, each value is at least as close on average as on any other shift's grid.
        let corrected = ShiftUniformLog2::search(input, case.bits, Levels::Corrected).unwrap();
        assert_eq!(corrected.state().scalars["shift"], found.state().scalars["shift"]);
    }
}
