//! Cases of the authors' code that the methods' unit tests compare with: tests/fixtures/FOLDER. On the
//! CPU, or on the device that VITQ_TEST_DEVICE names.

use std::collections::BTreeMap;
use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::device;
use crate::quant::{BitWidth, Quantizer};

/// Largest difference allowed, relative to the reference's largest magnitude: float32 rounding of a
/// few operations.
const TOLERANCE: f64 = 1e-5;

/// Share of an operand's values that may be further off on a GPU, which divides and sums in other
/// ways: a last bit moves a value across the border of two codes. (Three of some thousand.)
const FLIPPED: f64 = 1e-3;
/// The same of a product's values: one code of an operand is in a row or a column of them.
pub(super) const FLIPPED_OF_PRODUCT: f64 = 0.05;

/// Where the cases are computed. First of all that uses libtorch, which could not see CUDA later on.
fn device() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    *DEVICE.get_or_init(|| {
        let Some(name) = env::var_os("VITQ_TEST_DEVICE") else { return Device::Cpu };
        device::open_cuda_libraries();
        device::parse(&name.to_string_lossy())
            .unwrap_or_else(|error| panic!("VITQ_TEST_DEVICE: {error}"))
    })
}

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
    let device = device();
    // Where the test runs, if it was built elsewhere.
    let root = env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let folder = PathBuf::from(root).join("tests/fixtures").join(folder);
    let index: Value =
        serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
    let stored: BTreeMap<String, Tensor> =
        Tensor::read_safetensors(folder.join("goldens.safetensors")).unwrap().into_iter().collect();
    let tensor =
        |entry: &Value| -> Tensor { stored[entry["name"].as_str().unwrap()].to_device(device) };
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
        self.assert_values(found, &self.get(key).view_as(found), (key, FLIPPED));
    }

    /// The same of any values, of which that share may be further off on a GPU.
    pub(super) fn assert_values(
        &self,
        found: &Tensor,
        expected: &Tensor,
        (what, flipped): (&str, f64),
    ) {
        let [found, expected] = [found, expected].map(|x| x.to_device(Device::Cpu));
        let scale = expected.abs().max().double_value(&[]);
        let difference = (found - expected).abs();
        let off = difference.le(TOLERANCE * scale).logical_not().to_kind(Kind::Double);
        let off = off.mean(Kind::Double).double_value(&[]);
        let worst = difference.max().double_value(&[]);
        let most = if device() == Device::Cpu { 0.0 } else { flipped };
        let name = &self.name;
        assert!(off <= most, "{name} {what}: {worst} of {scale}, {off} of the values");
    }

    /// The quantizer of `matrix`, which is the case's input, gives the case's outputs.
    pub(super) fn assert_outputs(&self, quantizer: &dyn Quantizer, matrix: &Tensor) {
        self.assert_close(&quantizer.fake_quantize(matrix).unwrap(), "output");
        if let Some(input) = self.tensors.get("eval_input") {
            self.assert_close(&quantizer.fake_quantize(input).unwrap(), "eval_output");
        }
    }
}
