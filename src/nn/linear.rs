//! A linear layer: weights and the site it computes. How it computes is the executor's affair.

use std::sync::Arc;

use tch::Tensor;

use crate::error::Result;
use crate::nn::{Scope, Site};

/// `y = x · weightᵀ + bias`.
#[derive(Debug)]
pub struct Linear {
    /// The product this layer is.
    pub site: Arc<Site>,
    /// float32 [out, in].
    pub weight: Tensor,
    /// float32 `[out]`.
    pub bias: Option<Tensor>,
}

impl Linear {
    /// Reads `weight` `[out, in]` and, where present, `bias` `[out]` below `scope`.
    ///
    /// # Errors
    /// `InvalidArgument` when a tensor is missing or has another shape.
    pub fn load(site: Arc<Site>, scope: &Scope<'_>, out: i64, input: i64) -> Result<Self> {
        Ok(Self {
            site,
            weight: scope.get("weight", &[out, input])?,
            bias: scope.get_optional("bias", &[out])?,
        })
    }

    /// The shape of its output for `x` [.., in]: [.., out].
    pub fn output_shape(&self, x: &Tensor) -> Vec<i64> {
        let mut shape = x.size();
        if let Some(last) = shape.last_mut() {
            *last = self.weight.size()[0];
        }
        shape
    }

    /// Columns of its output.
    pub fn output_width(&self) -> usize {
        usize::try_from(self.weight.size()[0]).unwrap_or(0)
    }
}
