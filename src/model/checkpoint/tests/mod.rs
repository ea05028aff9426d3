//! Checkpoints on disk, whole or changed; what is accepted and what is refused.

mod accepted;
mod refused;

use half::{bf16, f16};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;

use super::*;
use crate::digest::sha256_hex;
use crate::exec::Float;
use crate::model::Model;
use crate::model::generated::{GeneratedOptions, generate, images};

/// A checkpoint on disk whose two files can be changed before it is opened.
struct Draft {
    config: Value,
    tensors: BTreeMap<String, Raw>,
}

#[derive(Clone)]
struct Raw {
    dtype: &'static str,
    shape: Vec<i64>,
    bytes: Vec<u8>,
}

impl Raw {
    fn zeros(shape: &[i64]) -> Self {
        let count = shape.iter().product::<i64>() as usize;
        Self { dtype: "F32", shape: shape.to_vec(), bytes: vec![0; 4 * count] }
    }

    fn of(tensor: &Tensor) -> Self {
        let mut raw = Self::zeros(&tensor.size());
        tensor.copy_data_u8(&mut raw.bytes, tensor.numel());
        raw
    }

    fn values(&self) -> impl Iterator<Item = f32> {
        self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }
}

impl Draft {
    fn vit() -> Self {
        let args = json!({"img_size": 8, "patch_size": 4, "embed_dim": 4, "depth": 1,
            "num_heads": 2, "mlp_ratio": 2.0});
        Self::generate("vit_tiny", args)
    }

    fn swin() -> Self {
        let args = json!({"img_size": 16, "patch_size": 2, "embed_dim": 4, "depths": [2, 1],
            "num_heads": [1, 2], "window_size": 4, "mlp_ratio": 2.0});
        Self::generate("swin_tiny", args)
    }

    fn generate(architecture: &str, args: Value) -> Self {
        let model_args = args.as_object().unwrap().clone();
        let options = GeneratedOptions { num_classes: 3, model_args, seed: 5 };
        let checkpoint = generate(architecture, options).unwrap();
        let config = serde_json::from_slice(&Config::of(&checkpoint.spec).to_json().unwrap());
        let tensors = checkpoint.weights.iter().map(|(name, t)| (name.to_owned(), Raw::of(t)));
        Self { config: config.unwrap(), tensors: tensors.collect() }
    }

    fn rename(&mut self, from: &str, to: &str) {
        let raw = self.tensors.remove(from).unwrap();
        self.tensors.insert(to.to_owned(), raw);
    }

    fn set(mut self, pointer: &str, value: Value) -> Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.config.pointer_mut(parent).unwrap()[key] = value;
        self
    }

    /// Leaves the image size to `model_args` and the tensors.
    fn without_input_size(mut self) -> Self {
        self.config["pretrained_cfg"].as_object_mut().unwrap().remove("input_size");
        self
    }

    fn shape(mut self, name: &str, shape: &[i64]) -> Self {
        self.tensors.insert(name.to_owned(), Raw::zeros(shape));
        self
    }

    fn model_bytes(&self) -> Vec<u8> {
        let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
        for (name, Raw { dtype, shape, bytes }) in &self.tensors {
            let offsets = [data.len(), data.len() + bytes.len()];
            let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
            header.insert(name.clone(), entry);
            data.extend_from_slice(bytes);
        }
        file_of(&Value::Object(header).to_string(), &data)
    }

    fn open(&self) -> Result<Checkpoint> {
        open_bytes(&serde_json::to_vec(&self.config).unwrap(), &self.model_bytes())
    }

    /// What is found before the values have come.
    fn check_header(&self) -> Result<()> {
        let (config, model) = (serde_json::to_vec(&self.config).unwrap(), self.model_bytes());
        let size = model.len() as u64;
        let end = Checkpoint::check_start(&model[..8], size)?;
        Checkpoint::check_header(&config, &model[..end as usize], size)
    }

    fn logits(&self) -> Tensor {
        self.check_header().unwrap();
        let checkpoint = self.open().unwrap();
        let model = Model::build(&checkpoint.spec, &checkpoint.weights).unwrap();
        let side = checkpoint.spec.preprocessing.image_size;
        model.forward(&mut Float, &images(2, side, 0).unwrap()).unwrap()
    }

    /// The reason why the checkpoint is refused; all but values are refused by the header, too.
    fn refusal(&self) -> String {
        let reason = reason(self.open());
        match self.check_header() {
            Ok(()) => assert_mentions(&reason, &["not finite"]),
            header => assert_eq!(self::reason(header), reason),
        }
        reason
    }
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length, header.as_bytes(), data].concat()
}

fn folder_of(config: &[u8], model: &[u8]) -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join(CONFIG), config).unwrap();
    fs::write(folder.path().join(MODEL), model).unwrap();
    folder
}

fn open_bytes(config: &[u8], model: &[u8]) -> Result<Checkpoint> {
    Checkpoint::open(folder_of(config, model).path())
}

fn reason<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::InvalidArgument { field, reason }) if field == "checkpoint" => reason,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_mentions(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}
