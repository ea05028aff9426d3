//! LayerNorm over the last axis; always float.

use tch::Tensor;

use crate::error::Result;
use crate::nn::Scope;

/// Layer normalisation with an affine map, over the last axis.
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Reads `weight` and `bias` `[dim]` below `scope`.
    ///
    /// # Errors
    /// `InvalidArgument` when a tensor is missing or has another shape.
    pub fn load(scope: &Scope<'_>, dim: i64, eps: f64) -> Result<Self> {
        Ok(Self { weight: scope.get("weight", &[dim])?, bias: scope.get("bias", &[dim])?, eps })
    }

    /// Factors and offsets `[dim]`, and what is added to the variance.
    pub fn parameters(&self) -> (&Tensor, &Tensor, f64) {
        (&self.weight, &self.bias, self.eps)
    }

    /// Normalises `x` [.., dim].
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let shape = self.weight.size();
        Ok(x.f_layer_norm(&shape, Some(&self.weight), Some(&self.bias), self.eps, false)?)
    }
}
