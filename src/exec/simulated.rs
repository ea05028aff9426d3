//! Fake quantization in float32: every operand that the plan names is rounded to its grid, the
//! product itself is a float product. This is the definition of each method, and differentiable.

use tch::Tensor;

use crate::error::Result;
use crate::exec::{AttentionTerms, Executor, ScoreTerms, attention, float};
use crate::kernels::cuda::{Gpu, HeadShape, Rounded};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Operand, Site, gelu};
use crate::quant::QuantPlan;
use crate::quant::tokens::shape4;

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

    /// The rounded softmax of scores on a GPU that rounds it while it is computed.
    fn rounded_weights(
        &self,
        site: &Site,
        scores: &Tensor,
        terms: &ScoreTerms<'_>,
    ) -> Result<Option<Tensor>> {
        let scale = terms.scale.map_or(1.0, |scale| scale as f32);
        let offsets = [terms.bias, terms.mask];
        if let Some(rounded) = self.fixed_on_gpu(site, scores)? {
            return rounded.after_softmax(scale, offsets);
        }
        let is_trained =
            scores.requires_grad() || offsets.into_iter().flatten().any(Tensor::requires_grad);
        let gpu = Gpu::of(scores).filter(|gpu| gpu.takes_steps() && !is_trained);
        let quantizer = self.plan.get(site.id, Operand::Lhs);
        let (Some(gpu), Some(quantizer)) = (gpu, quantizer) else { return Ok(None) };
        match quantizer.relative_stairs(shape4(scores)?)? {
            Some(stairs) => gpu.stepped_softmax(scores, scale, offsets, &stairs),
            None => Ok(None),
        }
    }

    /// The attention of rounded q, k and vᵀ.
    fn mixed(
        &self,
        op: &Attention,
        [q, k, v]: [&Tensor; 3],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        let scores = float::matmul(&op.query_key, q, k)?;
        let weights = match self.rounded_weights(&op.score_value, &scores, terms)? {
            Some(weights) => weights,
            None => {
                let weights = attention::softmax(&scores, terms)?;
                self.quantized(&op.score_value, Operand::Lhs, &weights)?
            }
        };
        attention::merge_heads(&float::matmul(&op.score_value, &weights, v)?)
    }

    /// q, k and v [b, heads, t, d] on a GPU that rounds them together where a linear left them, [b, t, 3·heads·d].
    fn rounded_heads(
        &self,
        op: &Attention,
        qkv: &Tensor,
        query_scale: Option<f64>,
    ) -> Result<Option<[Tensor; 3]>> {
        let gpu = Gpu::of(qkv).filter(|gpu| gpu.takes_tokens() && !qkv.requires_grad());
        let Some(gpu) = gpu else { return Ok(None) };
        let (windows, tokens, columns) = qkv.size3()?;
        let shape = HeadShape { windows, tokens, heads: op.heads, width: columns / (3 * op.heads) };
        let Some(heads) = attention::token_heads(self.plan, op, shape)? else { return Ok(None) };
        gpu.round_heads(qkv, &heads, query_scale.map(|scale| scale as f32)).map(Some)
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
        let q = self.quantized(&op.query_key, Operand::Lhs, q)?;
        let k = self.quantized(&op.query_key, Operand::Rhs, k)?;
        let v = self.quantized(&op.score_value, Operand::Rhs, &v.f_transpose(-2, -1)?)?;
        self.mixed(op, [&q, &k, &v], terms)
    }

    fn attend_qkv(
        &mut self,
        op: &Attention,
        qkv: &Tensor,
        terms: &AttentionTerms<'_>,
    ) -> Result<Tensor> {
        let Some([q, k, v]) = self.rounded_heads(op, qkv, terms.query_scale)? else {
            return attention::attend_qkv(self, op, qkv, terms);
        };
        self.mixed(op, [&q, &k, &v.f_transpose(-2, -1)?], &terms.scores)
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
