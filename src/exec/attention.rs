//! Attention step by step, and plain tensor code between its products: what executors do unless they
//! know better.

use tch::{Device, Tensor};

use crate::error::Result;
use crate::exec::Executor;
use crate::kernels::cuda::{Gpu, HeadShape, TokenHeads};
use crate::nn::{Attention, LayerNorm, Mlp, Operand, Site, Windows};
use crate::quant::QuantPlan;

/// What an attention does beside its products.
#[derive(Clone, Copy, Debug, Default)]
pub struct AttentionTerms<'a> {
    /// Factor of q before the product with k.
    pub query_scale: Option<f64>,
    /// What becomes of the scores.
    pub scores: ScoreTerms<'a>,
    /// The windows within which tokens are attended to; `None` for all together.
    pub windows: Option<&'a Windows>,
}

/// What becomes of the scores q·kᵀ before their softmax.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScoreTerms<'a> {
    /// Factor; `None` where q was scaled before the product.
    pub scale: Option<f64>,
    /// Added to every image's (window's) scores: [1, heads, t, t].
    pub bias: Option<&'a Tensor>,
    /// Added to the scores of each window of an image: [windows, 1, t, t].
    pub mask: Option<&'a Tensor>,
}

/// `x` plus the attention over its norm, a step at a time.
pub(super) fn add_attention<E: Executor + ?Sized>(
    exec: &mut E,
    norm: &LayerNorm,
    op: &Attention,
    terms: &AttentionTerms<'_>,
    x: &Tensor,
) -> Result<Tensor> {
    let mut normed = exec.layer_norm(norm, x)?;
    if let Some(windows) = terms.windows {
        normed = windows.split(&normed)?;
    }
    let qkv = exec.linear(&op.qkv, &normed)?;
    let mixed = exec.attend_qkv(op, &qkv, terms)?;
    let Some(windows) = terms.windows else { return exec.linear_add(&op.proj, &mixed, x) };
    let mixed = exec.linear(&op.proj, &mixed)?;
    Ok(x.f_add(&windows.join(&mixed)?)?)
}

/// The attention of q, k and v side by side, which are split.
pub(super) fn attend_qkv<E: Executor + ?Sized>(
    exec: &mut E,
    op: &Attention,
    qkv: &Tensor,
    terms: &AttentionTerms<'_>,
) -> Result<Tensor> {
    let [mut q, k, v] = exec.split_heads(qkv, op.heads)?;
    if let Some(scale) = terms.query_scale {
        q = q.f_mul_scalar(scale)?;
    }
    exec.attend(op, [&q, &k, &v], &terms.scores)
}

/// q, k and v of an attention on grids of tokens; `None` where the plan has others, or a GPU no kernels for them.
pub(super) fn token_heads<'a>(
    plan: &'a QuantPlan,
    op: &Attention,
    shape: HeadShape,
) -> Result<Option<TokenHeads<'a>>> {
    let HeadShape { windows, tokens, heads, width } = shape;
    let grids = |site: &Site, operand, free, reduce| {
        let quantizer = plan.get(site.id, operand);
        let grids = quantizer.map(|q| q.token_grids([windows, heads, free, reduce]));
        grids.transpose().map(Option::flatten)
    };
    let (Some(q), Some(k), Some(v)) = (
        grids(&op.query_key, Operand::Lhs, tokens, width)?,
        grids(&op.query_key, Operand::Rhs, tokens, width)?,
        grids(&op.score_value, Operand::Rhs, width, tokens)?,
    ) else {
        return Ok(None);
    };
    TokenHeads::new(shape, [q, k, v])
}

/// `x` plus the MLP of its norm, a step at a time.
pub(super) fn add_mlp<E: Executor + ?Sized>(
    exec: &mut E,
    norm: &LayerNorm,
    op: &Mlp,
    x: &Tensor,
) -> Result<Tensor> {
    let normed = exec.layer_norm(norm, x)?;
    let hidden = exec.linear_gelu(&op.fc1, &normed)?;
    exec.linear_add(&op.fc2, &hidden, x)
}

/// Softmax over the last axis of scores [b, heads, t, t] with their terms.
pub(super) fn softmax(scores: &Tensor, terms: &ScoreTerms<'_>) -> Result<Tensor> {
    if let Some(gpu) = Gpu::of(scores).filter(|_| !scores.requires_grad()) {
        let scale = terms.scale.map_or(1.0, |scale| scale as f32);
        return gpu.softmax(scores, scale, [terms.bias, terms.mask]);
    }
    let mut scores = scores.shallow_clone();
    if let Some(scale) = terms.scale {
        scores = scores.f_mul_scalar(scale)?;
    }
    if let Some(bias) = terms.bias {
        scores = scores.f_add(bias)?;
    }
    if let Some(mask) = terms.mask {
        let (b, heads, t, _) = scores.size4()?;
        let windows = mask.size()[0];
        let by_window = scores.f_reshape([b / windows, windows, heads, t, t])?.f_add(mask)?;
        scores = by_window.f_reshape([b, heads, t, t])?;
    }
    Ok(scores.f_softmax(-1, None)?)
}

/// [b, t, 3·heads·d] → q, k, v, each [b, heads, t, d]. On the CPU they are contiguous: a view's strides
/// depend on b, and with them could the order in which a product is summed. GPUs read them in place.
pub(super) fn split_heads(qkv: &Tensor, heads: i64) -> Result<[Tensor; 3]> {
    let (b, t, width) = qkv.size3()?;
    let parts = qkv.f_reshape([b, t, 3, heads, width / (3 * heads)])?.f_permute([2, 0, 3, 1, 4])?; // [3, b, heads, t, d]
    let parts = if qkv.device() == Device::Cpu { parts.f_contiguous()? } else { parts };
    Ok([parts.f_select(0, 0)?, parts.f_select(0, 1)?, parts.f_select(0, 2)?])
}

/// [b, heads, t, d] → [b, t, heads·d].
pub(super) fn merge_heads(mixed: &Tensor) -> Result<Tensor> {
    let (b, heads, t, d) = mixed.size4()?;
    Ok(mixed.f_transpose(1, 2)?.f_reshape([b, t, heads * d])?)
}
