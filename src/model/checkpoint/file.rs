//! The safetensors file: refused by content before anything is made of it, read, written.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, json};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::model::args::unusable;
use crate::nn::Weights;

/// A config is a page of text; more is no config.
const MAX_CONFIG_BYTES: u64 = 16 << 20;
/// Far above the largest model of the two architectures, below what would exhaust a host.
pub(super) const MAX_MODEL_BYTES: u64 = 16 << 30;
/// Bytes of the header's length, at the start of the file.
const PREFIX: usize = 8;

/// What the header says of every tensor, by its name in the file.
pub(super) type Outline = BTreeMap<String, Entry>;

/// What the header says of a tensor.
#[derive(Debug)]
pub(super) struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The bytes of `config.json`.
pub(super) fn read_config(path: &Path) -> Result<Vec<u8>> {
    let (mut file, size) = open(path, MAX_CONFIG_BYTES)?;
    read(&mut file, size, path)
}

/// The bytes of `model.safetensors`, once its first bytes do not speak against it.
pub(super) fn read_model(path: &Path) -> Result<Vec<u8>> {
    let (mut file, size) = open(path, MAX_MODEL_BYTES)?;
    let mut start = read(&mut file, size.min(PREFIX as u64), path)?;
    sniff(&start, size)?;
    let rest = read(&mut file, size - start.len() as u64, path)?;
    start.extend_from_slice(&rest);
    Ok(start)
}

/// The tensors of a file's bytes; offsets, sizes and the whole length are checked.
pub(super) fn parse(bytes: &[u8]) -> Result<(SafeTensors<'_>, Outline)> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| foreign(&error))?;
    let entry = |view: &TensorView<'_>| Entry { dtype: view.dtype(), shape: view.shape().to_vec() };
    let outline = tensors.iter().map(|(name, view)| (name.to_owned(), entry(&view))).collect();
    Ok((tensors, outline))
}

/// What the header says, the first bytes of a file of `size` bytes; checked as by [`parse`].
pub(super) fn outline(start: &[u8], size: u64) -> Result<Outline> {
    let text = start.get(PREFIX..).unwrap_or_default();
    let metadata: Metadata = serde_json::from_slice(text).map_err(|error| foreign(&error))?;
    let whole = (start.len() as u64).checked_add(metadata.data_len() as u64);
    if whole != Some(size) {
        let lengths = format!("{} bytes of tensors in {size} bytes", metadata.data_len());
        return Err(foreign(&lengths));
    }
    let entry = |info: &TensorInfo| Entry { dtype: info.dtype, shape: info.shape.clone() };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, entry(info))).collect())
}

/// The shape of a tensor.
pub(super) fn shape(name: &str, entry: &Entry) -> Result<Vec<i64>> {
    let axes = entry.shape.iter().map(|axis| i64::try_from(*axis));
    axes.collect::<std::result::Result<_, _>>()
        .map_err(|_| unusable(format!("parameter {name} has shape {:?}", entry.shape)))
}

/// The element type of a tensor, if it is supported.
#[allow(clippy::wildcard_enum_match_arm, reason = "the list of element types is open")]
pub(super) fn kind(name: &str, entry: &Entry) -> Result<Kind> {
    match entry.dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(unusable(format!(
            "parameter {name} has element type {other}, supported are F32, F16 and BF16"
        ))),
    }
}

/// A tensor as float32; all values must be finite.
pub(super) fn read_tensor(tensors: &SafeTensors<'_>, name: &str, entry: &Entry) -> Result<Tensor> {
    let view = tensors.tensor(name).map_err(|error| unusable(error.to_string()))?;
    // The parser has checked that the bytes are as many as shape and type ask for.
    let tensor = Tensor::f_from_data_size(view.data(), &shape(name, entry)?, kind(name, entry)?)?
        .f_to_kind(Kind::Float)?;
    if tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 0 {
        return Err(unusable(format!("parameter {name} holds values that are not finite")));
    }
    Ok(tensor)
}

/// Writes float32 tensors in the order of their names. The outer result is libtorch's.
pub(super) fn write_model(weights: &Weights, out: &mut dyn Write) -> Result<std::io::Result<()>> {
    let mut header = Map::new();
    let mut offset = 0;
    for (name, tensor) in weights.iter() {
        let end = offset + 4 * tensor.numel();
        let entry = json!({"dtype": "F32", "shape": tensor.size(), "data_offsets": [offset, end]});
        header.insert(name.to_owned(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    // Readers that map the file want the tensors aligned.
    header.resize(header.len().next_multiple_of(PREFIX), b' ');
    let length = (header.len() as u64).to_le_bytes();
    if let Err(error) = out.write_all(&length).and_then(|()| out.write_all(&header)) {
        return Ok(Err(error));
    }
    for (_, tensor) in weights.iter() {
        let tensor = tensor.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut bytes = vec![0; 4 * tensor.numel()];
        tensor.f_copy_data_u8(&mut bytes, tensor.numel())?;
        if let Err(error) = out.write_all(&bytes) {
            return Ok(Err(error));
        }
    }
    Ok(Ok(()))
}

fn open(path: &Path, max: u64) -> Result<(File, u64)> {
    let about = match fs::metadata(path) {
        Ok(about) => about,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(Error::NotFound { kind: "checkpoint", name: path.display().to_string() });
        }
        Err(error) => return Err(Error::io(path, error)),
    };
    if !about.is_file() {
        return Err(unusable(format!("{} is not a regular file", path.display())));
    }
    if about.len() > max {
        let text = format!("{} has {} bytes, more than {max}", path.display(), about.len());
        return Err(unusable(text));
    }
    let file = File::open(path).map_err(|source| Error::io(path, source))?;
    Ok((file, about.len()))
}

/// Reads exactly `size` bytes; a file that shrinks meanwhile is an error.
fn read(file: &mut File, size: u64, path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(size).read_to_end(&mut bytes).map_err(|source| Error::io(path, source))?;
    Ok(bytes)
}

fn foreign(error: &dyn Display) -> Error {
    unusable(format!("model.safetensors is truncated or not a safetensors file: {error}"))
}

/// Recognises other formats by content, and a header that cannot fit; where the header ends.
pub(super) fn sniff(start: &[u8], size: u64) -> Result<u64> {
    let refuse =
        |what: &str| Err(unusable(format!("the file is {what}, only safetensors is accepted")));
    match *start {
        [b'P', b'K', 3, 4, ..] => refuse("a zip archive (TorchScript or torch.save)"),
        [a, b, c, d, e, f, g, h] => {
            let header = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            if header > size.saturating_sub(PREFIX as u64) {
                // A header of 640 bytes, say, begins like a pickle, which goes on with an instruction.
                if let [0x80, 2..=5, ..] = start {
                    return refuse("a pickle");
                }
                let text = format!("a header of {header} bytes does not fit into {size} bytes");
                return Err(unusable(format!("model.safetensors is truncated or foreign: {text}")));
            }
            Ok(PREFIX as u64 + header)
        }
        _ => Err(unusable(format!("model.safetensors has only {size} bytes"))),
    }
}
