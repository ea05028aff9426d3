//! The products of a transformer block, which executors may compute together.

use std::sync::Arc;

use crate::nn::{Linear, Site};

/// Two linear layers around a GELU.
#[derive(Debug)]
pub struct Mlp {
    /// [hidden, dim].
    pub fc1: Linear,
    /// [dim, hidden].
    pub fc2: Linear,
}

/// The four products of an attention, in forward order.
#[derive(Debug)]
pub struct Attention {
    /// [3·dim, dim]: q, k and v of every head.
    pub qkv: Linear,
    /// q · kᵀ.
    pub query_key: Arc<Site>,
    /// The softmax of the scores times v.
    pub score_value: Arc<Site>,
    /// [dim, dim].
    pub proj: Linear,
    /// Heads, which divide dim.
    pub heads: i64,
}

impl Attention {
    /// d^-0.5, the scale of the scores; d is the width of a head.
    pub fn scale(&self) -> f64 {
        let dim = self.proj.weight.size()[0];
        ((dim / self.heads) as f64).powf(-0.5)
    }
}
