//! Integer execution on a GPU. Where the grids of a block's operands are known beforehand, nothing but
//! codes and the residual stream is in memory. Where tokens share theirs over all heads, q, k and v come to be
//! as values, and scores in registers only. Else what lies between the products is libtorch's; bias, GELU and
//! residual belong to them.

use tch::Tensor;

use super::sites::{Cuda, Form, IntegerSites, encode};
use crate::error::Result;
use crate::exec::{AttentionTerms, Executor, Simulated, WeightSource, attention};
use crate::kernels::cuda::{
    Epilogue, FixedGrid, Gpu, GpuCodes, GpuWeight, HeadShape, ScoreOffsets, TokenAttention,
};
use crate::kernels::passes::affine::Grid;
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Operand, Site, Windows, gelu};
use crate::quant::QuantPlan;

/// Executes sites that have an integer form in integers on a GPU, and the others as [`Simulated`] does.
#[derive(Debug)]
pub struct IntegerOnGpu<'a> {
    gpu: &'a Gpu,
    plan: &'a QuantPlan,
    sites: &'a IntegerSites<Cuda>,
    simulated: Simulated<'a>,
}

impl<'a> IntegerOnGpu<'a> {
    /// An executor of `plan` with the forms and weights that a [`Packer`](crate::exec::Packer) found on
    /// that GPU.
    pub fn new(gpu: &'a Gpu, plan: &'a QuantPlan, sites: &'a IntegerSites<Cuda>) -> Self {
        Self { gpu, plan, sites, simulated: Simulated::new(plan, WeightSource::Decoded) }
    }

    fn encode(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<GpuCodes> {
        encode::<Cuda>(self.plan, (site, operand), x)
    }

    /// The linear of x [.., in] by its packed weight.
    fn packed(
        &self,
        (op, weight): (&Linear, &GpuWeight),
        x: &Tensor,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let codes = self.encode(&op.site, Operand::Lhs, x)?;
        let epilogue = Epilogue { bias: op.bias.as_ref(), ..epilogue };
        Ok(self.gpu.product(&codes, weight, epilogue)?.f_reshape(op.output_shape(x))?)
    }

    /// The uniform grid of an operand, if it is known before its values.
    fn grid(&self, site: &Site, operand: Operand) -> Option<Grid> {
        match self.sites.fixed(site, operand)? {
            FixedGrid::Uniform(grid) => Some(*grid),
            FixedGrid::Stepped(_) => None,
        }
    }

    /// `x` plus the MLP of its norm; `None` where grids are not known beforehand.
    fn mlp_of_codes(&self, norm: &LayerNorm, op: &Mlp, x: &Tensor) -> Result<Option<Tensor>> {
        let Some([fc1, fc2]) = self.sites.mlp(op) else { return Ok(None) };
        let grid = |op: &Linear| self.grid(&op.site, Operand::Lhs);
        let (Some(input), Some(hidden)) = (grid(&op.fc1), grid(&op.fc2)) else { return Ok(None) };
        let dim = x.size3()?.2;
        if !Gpu::takes_norm(dim) {
            return Ok(None);
        }
        let codes = self.gpu.normed(x, norm.parameters(), None, input)?;
        let codes = self.gpu.encoded(&codes, fc1, (op.fc1.bias.as_ref(), true), hidden)?;
        self.gpu.added(&codes, fc2, op.fc2.bias.as_ref(), x, None).map(Some)
    }

    /// `x` plus the attention over its norm; `None` where grids are not known beforehand, or there is no
    /// kernel for such heads.
    fn attention_of_codes(
        &self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some([qkv, proj]) = self.sites.attention(op) else { return Ok(None) };
        let (Some(input), Some(q), Some(k), Some(v), Some(mixed), Some(scores)) = (
            self.grid(&op.qkv.site, Operand::Lhs),
            self.grid(&op.query_key, Operand::Lhs),
            self.grid(&op.query_key, Operand::Rhs),
            self.grid(&op.score_value, Operand::Rhs),
            self.grid(&op.proj.site, Operand::Lhs),
            self.sites.fixed(&op.score_value, Operand::Lhs),
        ) else {
            return Ok(None);
        };
        let shape = heads_of(op, terms, x)?;
        if !Gpu::takes_norm(x.size3()?.2) || !shape.is_taken(scores) {
            return Ok(None);
        }
        let order = terms.windows.map(Windows::tokens);
        let codes = self.gpu.normed(x, norm.parameters(), order, input)?;
        let query_scale = terms.query_scale.map(|scale| scale as f32);
        let heads = (shape, query_scale, [q, k, v]);
        let codes = self.gpu.split_heads(&codes, qkv, op.qkv.bias.as_ref(), heads)?;
        let codes = self.gpu.attention(&codes, offsets(terms), scores, mixed)?;
        self.gpu.added(&codes, proj, op.proj.bias.as_ref(), x, order).map(Some)
    }

    /// `x` plus the attention over its norm, q, k and v being on grids that tokens share over all heads; `None` where
    /// they are not, or there is no kernel for such heads.
    fn attention_of_tokens(
        &mut self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some([qkv, proj]) = self.sites.attention(op) else { return Ok(None) };
        let weights = self.sites.fixed(&op.score_value, Operand::Lhs);
        let Some(FixedGrid::Stepped(bins)) = weights else { return Ok(None) };
        if !self.gpu.takes_tokens() {
            return Ok(None);
        }
        let shape = heads_of(op, terms, x)?;
        let Some(heads) = attention::token_heads(self.plan, op, shape)? else { return Ok(None) };
        let Some(attention) = TokenAttention::new(heads, bins)? else { return Ok(None) };
        let mut normed = self.layer_norm(norm, x)?;
        if let Some(windows) = terms.windows {
            normed = windows.split(&normed)?;
        }
        let values = self.packed((&op.qkv, qkv), &normed, Epilogue::default())?;
        let query_scale = terms.query_scale.map(|scale| scale as f32);
        let codes = self.gpu.token_codes(&values, attention.heads(), query_scale)?;
        let mixed = self.gpu.token_attention(codes, &attention, offsets(terms))?;
        let order = terms.windows.map(Windows::tokens);
        let epilogue = Epilogue { residual: Some(x), order, ..Epilogue::default() };
        let sum = self.packed((&op.proj, proj), &mixed, epilogue)?;
        Ok(Some(sum.f_reshape(x.size())?))
    }
}

/// The heads of an attention to the norm of `x` [n, tokens, dim].
fn heads_of(op: &Attention, terms: &AttentionTerms<'_>, x: &Tensor) -> Result<HeadShape> {
    let (n, tokens, dim) = x.size3()?;
    let per_image = terms.windows.map_or(1, Windows::per_image);
    Ok(HeadShape {
        windows: n * per_image,
        tokens: tokens / per_image,
        heads: op.heads,
        width: dim / op.heads,
    })
}

/// What kernels do to scores.
fn offsets<'a>(terms: &AttentionTerms<'a>) -> ScoreOffsets<'a> {
    ScoreOffsets {
        scale: terms.scores.scale.map_or(1.0, |scale| scale as f32),
        bias: terms.scores.bias,
        mask: terms.scores.mask,
    }
}

impl Executor for IntegerOnGpu<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => self.packed((op, weight), x, Epilogue::default()),
            Form::Matmul | Form::Simulated | Form::Float => self.simulated.linear(op, x),
        }
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let Form::Matmul = self.sites.form(site) else {
            return self.simulated.matmul(site, lhs, rhs);
        };
        let (b, heads, m, _) = lhs.size4()?;
        let left = self.encode(site, Operand::Lhs, lhs)?;
        let right = self.encode(site, Operand::Rhs, rhs)?;
        let product = self.gpu.product_batch(&left, &right, b * heads)?;
        Ok(product.f_reshape([b, heads, m, rhs.size()[2]])?)
    }

    fn linear_gelu(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => {
                self.packed((op, weight), x, Epilogue { gelu: true, ..Epilogue::default() })
            }
            Form::Matmul | Form::Simulated | Form::Float => gelu(&self.simulated.linear(op, x)?),
        }
    }

    fn linear_add(&mut self, op: &Linear, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => {
                let epilogue = Epilogue { residual: Some(residual), ..Epilogue::default() };
                self.packed((op, weight), x, epilogue)
            }
            Form::Matmul | Form::Simulated | Form::Float => {
                Ok(residual.f_add(&self.simulated.linear(op, x)?)?)
            }
        }
    }

    fn add_attention(
        &mut self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Tensor> {
        if let Some(y) = self.attention_of_codes(norm, op, terms, x)? {
            return Ok(y);
        }
        match self.attention_of_tokens(norm, op, terms, x)? {
            Some(y) => Ok(y),
            None => attention::add_attention(self, norm, op, terms, x),
        }
    }

    fn add_mlp(&mut self, norm: &LayerNorm, op: &Mlp, x: &Tensor) -> Result<Tensor> {
        match self.mlp_of_codes(norm, op, x)? {
            Some(y) => Ok(y),
            None => attention::add_mlp(self, norm, op, x),
        }
    }
}
