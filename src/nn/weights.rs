//! Read-only named tensors, and cursors that walk them by timm's parameter names.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use tch::{Device, Tensor};

use crate::error::{Error, Result};

/// New values for parameters, by full name. A method's result; applied by [`Weights::with`].
pub type WeightEdits = BTreeMap<String, Tensor>;

/// Named float32 tensors of one model. Immutable; tensors are shared handles.
#[derive(Debug, Default)]
pub struct Weights {
    tensors: BTreeMap<String, Tensor>,
}

impl Weights {
    /// Wraps a map from parameter name to tensor.
    pub fn new(tensors: BTreeMap<String, Tensor>) -> Self {
        Self { tensors }
    }

    /// A cursor at the root that records every name it hands out.
    pub fn root<'a>(&'a self, used: &'a RefCell<BTreeSet<String>>) -> Scope<'a> {
        Scope { weights: self, used, prefix: String::new() }
    }

    /// The same weights with some parameters replaced or added; untouched tensors are shared.
    pub fn with(&self, edits: &WeightEdits) -> Self {
        let mut tensors = self.share();
        for (name, tensor) in edits {
            tensors.insert(name.clone(), tensor.shallow_clone());
        }
        Self { tensors }
    }

    /// The weights on another device.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub fn to_device(&self, device: Device) -> Result<Self> {
        let moved =
            |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.f_to_device(device)?));
        Ok(Self { tensors: self.tensors.iter().map(moved).collect::<Result<_>>()? })
    }

    /// Parameter names and tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The tensor of that full name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Shallow copy of the map: same tensors, new handles.
    pub fn share(&self) -> BTreeMap<String, Tensor> {
        self.tensors.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
    }

    /// Fails if a name is not in `used`: a checkpoint must not hold what the model ignores.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint`, naming up to three parameters.
    pub fn check_all_used(&self, used: &BTreeSet<String>) -> Result<()> {
        let unused: Vec<&str> =
            self.tensors.keys().filter(|name| !used.contains(*name)).map(String::as_str).collect();
        if unused.is_empty() {
            return Ok(());
        }
        let shown = unused.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        Err(Error::invalid(
            "checkpoint",
            format!("{} parameters are not part of the architecture: {shown}", unused.len()),
        ))
    }
}

/// A cursor into [`Weights`]: `root.at("blocks").at(3).get("norm1.weight", &[dim])`.
#[derive(Clone, Debug)]
pub struct Scope<'a> {
    weights: &'a Weights,
    used: &'a RefCell<BTreeSet<String>>,
    prefix: String,
}

impl Scope<'_> {
    /// The cursor one level down.
    #[must_use]
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: self.path(name), ..self.clone() }
    }

    /// The cursor's own place: `blocks.3`; empty at the root.
    pub fn here(&self) -> &str {
        &self.prefix
    }

    /// The full name of `name` below this cursor.
    pub fn path(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// The tensor `name`, which must have exactly `shape`.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint` when it is missing or has another shape.
    pub fn get(&self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let path = self.path(name);
        self.get_optional(name, shape)?
            .ok_or_else(|| Error::invalid("checkpoint", format!("parameter {path} is missing")))
    }

    /// The tensor `name` if there is one; it must have exactly `shape`.
    ///
    /// # Errors
    /// `InvalidArgument` on field `checkpoint` when it has another shape.
    pub fn get_optional(&self, name: &str, shape: &[i64]) -> Result<Option<Tensor>> {
        let path = self.path(name);
        let Some(tensor) = self.weights.find(&path) else { return Ok(None) };
        if tensor.size() != shape {
            let reason = format!(
                "parameter {path} has shape {:?}, the config asks for {shape:?}",
                tensor.size()
            );
            return Err(Error::invalid("checkpoint", reason));
        }
        self.used.borrow_mut().insert(path);
        Ok(Some(tensor.shallow_clone()))
    }
}
