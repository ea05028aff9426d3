//! Fake quantization in float32: every operand that the plan names is rounded to its grid, the
//! product itself is a float product. This is the definition of each method, and differentiable.

use tch::Tensor;

use crate::error::Result;
use crate::exec::{Executor, ScoreTerms, attention, float};
use crate::kernels::cuda::Rounded;
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Operand, Site, gelu};
use crate::quant::QuantPlan;

/// Where the executor finds the rounded weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// The model holds float weights; the plan's weight quantizers round them at every call.
    Quantize,
    /// The model was rebuilt with already rounded weights (decoded from an artifact's codes).
    Decoded,
}

/// Executes what the plan holds with fake quantization, and everything else in float.
#[derive(Debug)]
pub struct Simulated<'a> {
    plan: &'a QuantPlan,
    weights: WeightSource,
}

impl<'a> Simulated<'a> {
    /// An executor of `plan`.
    pub fn new(plan: &'a QuantPlan, weights: WeightSource) -> Self {
        Self { plan, weights }
    }

    fn quantized(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<Tensor> {
        match self.plan.get(site.id, operand) {
            Some(quantizer) => quantizer.fake_quantize(x),
            None => Ok(x.shallow_clone()),
        }
    }

    /// The left operand of a site on a GPU, if its grids do not depend on it: it can be made and rounded in
    /// one pass.
    fn fixed_on_gpu(&self, site: &Site, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        let quantizer = self.plan.get(site.id, Operand::Lhs);
        Ok(quantizer.map(|quantizer| quantizer.fixed_on_gpu(x)).transpose()?.flatten())
    }

    /// The linear of an operand that is rounded.
    fn product(&self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let weight = match self.weights {
            WeightSource::Quantize => self.quantized(&op.site, Operand::Rhs, &op.weight)?,
            WeightSource::Decoded => op.weight.shallow_clone(),
        };
        float::linear(&op.site, x, &weight, op.bias.as_ref())
    }
}

impl Executor for Simulated<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let x = self.quantized(&op.site, Operand::Lhs, x)?;
        self.product(op, &x)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let lhs = self.quantized(site, Operand::Lhs, lhs)?;
        let rhs = self.quantized(site, Operand::Rhs, rhs)?;
        float::matmul(site, &lhs, &rhs)
    }

    fn attend(
        &mut self,
        op: &Attention,
        [q, k, v]: [&Tensor; 3],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        let scores = self.matmul(&op.query_key, q, k)?;
        let scale = terms.scale.map_or(1.0, |scale| scale as f32);
        if let Some(rounded) = self.fixed_on_gpu(&op.score_value, &scores)?
            && let Some(weights) = rounded.after_softmax(scale, [terms.bias, terms.mask])?
        {
            let v = self.quantized(&op.score_value, Operand::Rhs, &v.f_transpose(-2, -1)?)?;
            return attention::merge_heads(&float::matmul(&op.score_value, &weights, &v)?);
        }
        self.attention_mix(&op.score_value, &attention::softmax(&scores, terms)?, v)
    }

    fn add_mlp(&mut self, norm: &LayerNorm, op: &Mlp, x: &Tensor) -> Result<Tensor> {
        let normed = self.layer_norm(norm, x)?;
        let hidden = self.linear(&op.fc1, &normed)?;
        if let Some(rounded) = self.fixed_on_gpu(&op.fc2.site, &hidden)?
            && let Some(hidden) = rounded.after_gelu()?
        {
            return Ok(x.f_add(&self.product(&op.fc2, &hidden)?)?);
        }
        self.linear_add(&op.fc2, &gelu(&hidden)?, x)
    }
}
