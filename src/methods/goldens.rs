//! Cases of the authors' code that the methods' unit tests compare with: tests/fixtures/FOLDER.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;
use tch::Tensor;

use crate::quant::{BitWidth, Quantizer};

/// Largest difference allowed, relative to the reference's largest magnitude: float32 rounding of a
/// few operations.
pub(super) const TOLERANCE: f64 = 1e-5;

/// A call of the authors' code.
pub(super) struct Case {
    pub(super) name: String,
    /// Its settings.
    pub(super) meta: Value,
    /// Its inputs and outputs.
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// The cases of a folder whose names are `wanted`.
pub(super) fn cases(folder: &str, wanted: impl Fn(&str) -> bool) -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(folder);
    let index: Value =
        serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
    let stored: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(folder.join("goldens.safetensors")).unwrap().into_iter().collect();
    let tensor =
        |entry: &Value| -> Tensor { stored[entry["name"].as_str().unwrap()].shallow_clone() };
    let cases = index["cases"].as_array().unwrap().iter();
    cases
        .filter(|case| wanted(case["case"].as_str().unwrap()))
        .map(|case| {
            let tensors = case["tensors"].as_object().unwrap().iter();
            Case {
                name: case["case"].as_str().unwrap().to_owned(),
                meta: case["meta"].clone(),
                tensors: tensors.map(|(key, entry)| (key.clone(), tensor(entry))).collect(),
            }
        })
        .collect()
}

impl Case {
    /// The bit width, by whichever name the authors give it.
    pub(super) fn bits(&self) -> BitWidth {
        let names = ["n_bits", "w_bit", "A_bit"];
        let bits = names.iter().find_map(|name| self.meta[name].as_u64()).unwrap();
        BitWidth::new(bits as u32, "bits").unwrap()
    }

    pub(super) fn get(&self, key: &str) -> &Tensor {
        &self.tensors[key]
    }

    /// `found` has the values of the reference, whose shape may have more axes of length 1.
    pub(super) fn assert_close(&self, found: &Tensor, key: &str) {
        let expected = self.get(key).view_as(found);
        let scale = expected.abs().max().double_value(&[]);
        let worst = (found - expected).abs().max().double_value(&[]);
        assert!(worst <= TOLERANCE * scale, "{} {key}: {worst} of {scale}", self.name);
    }

    /// The quantizer of `matrix`, which is the case's input, gives the case's outputs.
    pub(super) fn assert_outputs(&self, quantizer: &dyn Quantizer, matrix: &Tensor) {
        self.assert_close(&quantizer.fake_quantize(matrix).unwrap(), "output");
        if let Some(input) = self.tensors.get("eval_input") {
            self.assert_close(&quantizer.fake_quantize(input).unwrap(), "eval_output");
        }
    }
}
