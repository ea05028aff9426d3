//! Executors: how a model's products are computed. The model says what, the executor says how.

mod attention;
mod float;
mod integer;
mod simulated;
mod tap;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Error, Result};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Site, gelu};

pub use attention::{AttentionTerms, ScoreTerms};
pub use float::Float;
pub use integer::{Cpu, Cuda, Integer, IntegerOnGpu, IntegerSites, Kernels, Packer, SiteCounts};
pub use simulated::{Simulated, WeightSource};
pub use tap::{Tap, TapSink};

/// Computes the two kinds of quantizable product, and the blocks that are made of them. What lies between
/// products is plain tensor code, and blocks go step by step, unless an executor has a way of its own.
pub trait Executor {
    /// `x · op.weightᵀ + op.bias`; x [.., in] → [.., out].
    ///
    /// # Errors
    /// `Device` when libtorch refuses; `Cancelled` from sinks that were asked to stop.
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor>;

    /// `lhs · rhsᵀ`; lhs [b, h, m, k], rhs [b, h, n, k] → [b, h, m, n].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor>;

    /// Layer norm of `x` [.., dim].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn layer_norm(&mut self, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        norm.forward(x)
    }

    /// GELU of a linear of `x` [n, .., in].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn linear_gelu(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        gelu(&self.linear(op, x)?)
    }

    /// `residual` [.., out] plus a linear of `x` [.., in].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn linear_add(&mut self, op: &Linear, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        Ok(residual.f_add(&self.linear(op, x)?)?)
    }

    /// q, k and v of `qkv` [b, t, 3·heads·d], each [b, heads, t, d], in memory as the products take
    /// them.
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn split_heads(&mut self, qkv: &Tensor, heads: i64) -> Result<[Tensor; 3]> {
        attention::split_heads(qkv, heads)
    }

    /// Softmax of the scores q·kᵀ with their `terms`: [b, heads, t, t].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn attention_weights(
        &mut self,
        site: &Site,
        [q, k]: [&Tensor; 2],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        attention::softmax(&self.matmul(site, q, k)?, terms)
    }

    /// `weights` [b, heads, t, t] times v [b, heads, t, d], heads merged: [b, t, heads·d].
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn attention_mix(&mut self, site: &Site, weights: &Tensor, v: &Tensor) -> Result<Tensor> {
        attention::merge_heads(&self.matmul(site, weights, &v.f_transpose(-2, -1)?)?)
    }

    /// The softmax of q·kᵀ with its `terms` times v, heads merged: [b, t, heads·d]; q, k and v as
    /// [`Executor::split_heads`] gives them.
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn attend(
        &mut self,
        op: &Attention,
        [q, k, v]: [&Tensor; 3],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        let weights = self.attention_weights(&op.query_key, [q, k], terms)?;
        self.attention_mix(&op.score_value, &weights, v)
    }

    /// [`Executor::attend`] of q, k and v side by side, `qkv` [b, t, 3·heads·d], q being scaled first.
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn attend_qkv(
        &mut self,
        op: &Attention,
        qkv: &Tensor,
        terms: &AttentionTerms<'_>,
    ) -> Result<Tensor> {
        attention::attend_qkv(self, op, qkv, terms)
    }

    /// `x` [n, t, dim] plus the attention over its norm.
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn add_attention(
        &mut self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Tensor> {
        attention::add_attention(self, norm, op, terms, x)
    }

    /// `x` [n, t, dim] plus the MLP of its norm.
    ///
    /// # Errors
    /// As [`Executor::linear`].
    fn add_mlp(&mut self, norm: &LayerNorm, op: &Mlp, x: &Tensor) -> Result<Tensor> {
        attention::add_mlp(self, norm, op, x)
    }
}

/// The caller's choice of arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// Float weights and activations.
    Float,
    /// Fake quantization in float32: the definition of each method.
    #[default]
    Simulated,
    /// Products of integers: the same numbers, where the operands have integer codes.
    Integer,
}

impl Backend {
    /// The name in flags, reports and result files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Simulated => "simulated",
            Self::Integer => "integer",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Backend {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "float" => Ok(Self::Float),
            "simulated" => Ok(Self::Simulated),
            "integer" => Ok(Self::Integer),
            other => Err(Error::invalid(
                "executor",
                format!("unknown executor `{other}`, known are float, simulated and integer"),
            )),
        }
    }
}
