//! timm's `model_args`: read with bounds, and settled against what the tensors say.
//!
//! The bounds keep every later product of sizes within 64 bits and every table within memory.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::model::Parameter;

/// Shapes of a checkpoint's tensors by canonical name.
pub type TensorShapes = BTreeMap<String, Vec<i64>>;

/// Largest width of a layer, number of heads, or depth that is believed.
pub(super) const MAX_SIZE: i64 = 16_384;
/// Largest side of the model's input in pixels.
pub(super) const MAX_IMAGE: i64 = 4_096;

/// Largest ratio of the MLP's hidden width to the token width.
pub(super) const MAX_MLP_RATIO: f64 = 64.0;

/// An unusable checkpoint.
pub(super) fn unusable(reason: impl Into<String>) -> Error {
    Error::invalid("checkpoint", reason)
}

/// A contradiction between the config and the tensors.
pub(super) fn contradiction(key: &str, config: &Value, tensors: &Value) -> Error {
    unusable(format!("the config says {key} = {config}, the tensors say {tensors}"))
}

/// Reads one `model_args` after another.
#[derive(Clone, Copy)]
pub(super) struct Args<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Args<'a> {
    /// A whole number from 1 to `max`.
    pub(super) fn size(self, key: &str, max: i64) -> Result<i64> {
        size(key, self.required(key)?, max)
    }

    /// A list of whole numbers from 1 to `max`, of at least one entry.
    pub(super) fn sizes(self, key: &str, max: i64) -> Result<Vec<i64>> {
        let value = self.required(key)?;
        let Some(list) = value.as_array().filter(|list| !list.is_empty()) else {
            return Err(unusable(format!("{key} is {value}, expected a list of numbers")));
        };
        list.iter().map(|entry| size(key, entry, max)).collect()
    }

    /// A number above 0, at most `max`.
    pub(super) fn positive(self, key: &str, max: f64) -> Result<f64> {
        let value = self.required(key)?;
        value.as_f64().filter(|number| *number > 0.0 && *number <= max).ok_or_else(|| {
            unusable(format!("{key} is {value}, expected a number above 0, at most {max}"))
        })
    }

    /// `true` or `false`.
    pub(super) fn flag(self, key: &str) -> Result<bool> {
        let value = self.required(key)?;
        value.as_bool().ok_or_else(|| unusable(format!("{key} is {value}, expected true or false")))
    }

    /// A text.
    pub(super) fn text(self, key: &str) -> Result<&'a str> {
        let value = self.required(key)?;
        value.as_str().ok_or_else(|| unusable(format!("{key} is {value}, expected a text")))
    }

    /// The value of `key`.
    pub(super) fn required(self, key: &str) -> Result<&'a Value> {
        self.0.get(key).ok_or_else(|| missing(key))
    }
}

/// Enters what the tensors say, or checks that the config says the same.
pub(super) fn settle(args: &mut Map<String, Value>, key: &str, found: Value) -> Result<()> {
    match args.get(key) {
        Some(given) if !same(given, &found) => Err(contradiction(key, given, &found)),
        _ => {
            args.insert(key.to_owned(), found);
            Ok(())
        }
    }
}

/// Width of the MLP's hidden layer, as timm truncates it.
pub(super) fn hidden_width(dim: i64, ratio: f64) -> Result<i64> {
    // The tiny addend undoes the division when the ratio was itself taken from two widths.
    let hidden = (dim as f64 * ratio + 1e-6) as i64;
    if hidden == 0 {
        return Err(unusable(format!("mlp_ratio {ratio} leaves no hidden layer of width {dim}")));
    }
    Ok(hidden)
}

/// Checks every argument that is given for itself; what they have to fit, only the tensors tell.
pub(super) fn check_each(args: &Map<String, Value>) -> Result<()> {
    let read = Args(args);
    for (key, value) in args {
        match key.as_str() {
            "in_chans" => check_channels(read),
            "img_size" | "patch_size" => read.size(key, MAX_IMAGE).map(drop),
            "mlp_ratio" => read.positive(key, MAX_MLP_RATIO).map(drop),
            "qkv_bias" | "class_token" | "fc_norm" => read.flag(key).map(drop),
            // Of Swin, one number per stage.
            "depths" | "num_heads" | "window_size" if value.is_array() => {
                read.sizes(key, MAX_SIZE).map(drop)
            }
            "embed_dim" | "depth" | "depths" | "num_heads" | "window_size" => {
                read.size(key, MAX_SIZE).map(drop)
            }
            _ => Ok(()),
        }?;
    }
    Ok(())
}

/// Fails unless the model takes RGB images.
pub(super) fn check_channels(args: Args<'_>) -> Result<()> {
    match args.size("in_chans", MAX_SIZE)? {
        3 => Ok(()),
        other => Err(channels(other)),
    }
}

/// Fails unless `heads` divide `dim`.
pub(super) fn check_heads(dim: i64, heads: i64) -> Result<()> {
    if dim % heads != 0 {
        return Err(unusable(format!("a width of {dim} is not a multiple of {heads} heads")));
    }
    Ok(())
}

/// Settles `mlp_ratio` by the widths that it must lead to.
pub(super) fn settle_mlp(args: &mut Map<String, Value>, dim: i64, hidden: i64) -> Result<()> {
    if let Some(ratio) = args.get("mlp_ratio").and_then(Value::as_f64) {
        let asked = hidden_width(dim, ratio)?;
        if asked != hidden {
            let text = format!(
                "the config says mlp_ratio = {ratio}, a hidden width of {asked}, the tensors say {hidden}"
            );
            return Err(unusable(text));
        }
        return Ok(());
    }
    settle(args, "mlp_ratio", Value::from(hidden as f64 / dim as f64))
}

/// The shape of a tensor that must be there.
pub(super) fn shape<'a>(shapes: &'a TensorShapes, name: &str) -> Result<&'a [i64]> {
    let found = shapes.get(name).map(Vec::as_slice);
    found.ok_or_else(|| unusable(format!("parameter {name} is missing")))
}

/// Width and patch size of `patch_embed.proj.weight` [dim, 3, patch, patch].
pub(super) fn patch_embedding(shapes: &TensorShapes) -> Result<(i64, i64)> {
    const NAME: &str = "patch_embed.proj.weight";
    match *shape(shapes, NAME)? {
        [dim, 3, h, w] if h == w && dim > 0 && h > 0 => Ok((dim, h)),
        [_, 3, h, w] => Err(unusable(format!("the patches are not square: {h} by {w} pixels"))),
        [_, other, _, _] => Err(channels(other)),
        ref other => {
            Err(unusable(format!("parameter {NAME} has shape {other:?}, expected 4 axes")))
        }
    }
}

/// The first axis of a tensor that must be there.
pub(super) fn first_axis(shapes: &TensorShapes, name: &str) -> Result<i64> {
    let found = shape(shapes, name)?;
    found.first().copied().ok_or_else(|| unusable(format!("parameter {name} is a single number")))
}

/// How many different numbers follow `prefix` in the names: `blocks.0.`, `blocks.1.`, ...
pub(super) fn count_children(shapes: &TensorShapes, prefix: &str) -> i64 {
    let mut numbers: Vec<&str> = shapes
        .keys()
        .filter_map(|name| name.strip_prefix(prefix)?.split_once('.'))
        .map(|(number, _)| number)
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers.len() as i64
}

fn channels(count: i64) -> Error {
    unusable(format!("the model wants {count} image channels, supported are 3"))
}

fn size(key: &str, value: &Value, max: i64) -> Result<i64> {
    value.as_i64().filter(|number| (1..=max).contains(number)).ok_or_else(|| {
        unusable(format!("{key} is {value}, expected a whole number from 1 to {max}"))
    })
}

fn missing(key: &str) -> Error {
    unusable(format!("the config does not give {key}, and the tensors do not tell it"))
}

fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64(), a.as_array(), b.as_array()) {
        (Some(a), Some(b), _, _) => a == b,
        (_, _, Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b,
    }
}

/// Collects the parameters of an architecture.
#[derive(Debug, Default)]
pub(super) struct ParameterList(pub(super) Vec<Parameter>);

impl ParameterList {
    /// A parameter that must be there.
    pub(super) fn tensor(&mut self, name: impl Into<String>, shape: &[i64]) {
        self.0.push(Parameter { name: name.into(), shape: shape.to_vec(), optional: false });
    }

    /// `path.weight` and `path.bias` of a LayerNorm.
    pub(super) fn norm(&mut self, path: &str, dim: i64) {
        self.tensor(format!("{path}.weight"), &[dim]);
        self.tensor(format!("{path}.bias"), &[dim]);
    }

    /// `path.weight` [out, in] and `path.bias` [out].
    pub(super) fn linear(&mut self, path: &str, out: i64, input: i64) {
        self.tensor(format!("{path}.weight"), &[out, input]);
        self.tensor(format!("{path}.bias"), &[out]);
    }

    /// `path.weight` [out, in], and `path.bias` [out] that may be absent.
    pub(super) fn linear_without_bias(&mut self, path: &str, out: i64, input: i64) {
        self.tensor(format!("{path}.weight"), &[out, input]);
        let name = format!("{path}.bias");
        self.0.push(Parameter { name, shape: vec![out], optional: true });
    }

    /// The parameters of a transformer block at `path`.
    pub(super) fn block(&mut self, path: &str, shape: BlockShape) {
        let BlockShape { dim, hidden, qkv_bias } = shape;
        self.norm(&format!("{path}.norm1"), dim);
        let qkv = format!("{path}.attn.qkv");
        if qkv_bias {
            self.linear(&qkv, 3 * dim, dim);
        } else {
            self.linear_without_bias(&qkv, 3 * dim, dim);
        }
        self.linear(&format!("{path}.attn.proj"), dim, dim);
        self.norm(&format!("{path}.norm2"), dim);
        self.linear(&format!("{path}.mlp.fc1"), hidden, dim);
        self.linear(&format!("{path}.mlp.fc2"), dim, hidden);
    }
}

/// Widths of a transformer block.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockShape {
    /// Width of a token.
    pub(super) dim: i64,
    /// Width of the MLP's hidden layer.
    pub(super) hidden: i64,
    /// Whether the qkv layer has a bias.
    pub(super) qkv_bias: bool,
}
