//! What lies between products on a GPU.

use tch::{Kind, Tensor};

use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, address, by_value, to_i32};
use crate::error::{Error, Result};

#[repr(C)]
struct SoftmaxArguments {
    scores: u64,
    bias: u64,
    mask: u64,
    out: u64,
    rows: i32,
    tokens: i32,
    heads: i32,
    windows: i32,
    scale: f32,
}

by_value!(SoftmaxArguments);

pub(super) fn source() -> Source {
    let text = include_str!("between.cu");
    Source { name: "between", text, definitions: PLAIN, contract: true }
}

impl Gpu {
    /// Softmax over the last axis of scale · scores + bias + mask, for scores [b, heads, t, t], a bias
    /// [1, heads, t, t] and a mask [windows, 1, t, t] of which b is a multiple.
    ///
    /// # Errors
    /// `Internal` when shapes do not fit or the kernel does not start.
    pub fn softmax(
        &self,
        scores: &Tensor,
        scale: f32,
        [bias, mask]: [Option<&Tensor>; 2],
    ) -> Result<Tensor> {
        let (b, heads, tokens, width) = scores.size4()?;
        let windows = mask.map_or(1, |mask| mask.size().first().copied().unwrap_or(1));
        let fits = |x: Option<&Tensor>, count: i64| {
            x.is_none_or(|x| {
                x.numel() as i64 == count
                    && x.kind() == Kind::Float
                    && x.device() == scores.device()
            })
        };
        let square = tokens * tokens;
        let is_right = tokens == width
            && scores.kind() == Kind::Float
            && windows > 0
            && b % windows == 0
            && fits(bias, heads * square)
            && fits(mask, windows * square);
        if !is_right {
            return Err(Error::internal("scores, bias and mask of a softmax do not fit"));
        }
        let dense = |x: Option<&Tensor>| x.map(Tensor::f_contiguous).transpose();
        let (bias, mask, scores) = (dense(bias)?, dense(mask)?, scores.f_contiguous()?);
        let out = scores.f_empty_like()?;
        let arguments = SoftmaxArguments {
            scores: address(Some(&scores)),
            bias: address(bias.as_ref()),
            mask: address(mask.as_ref()),
            out: address(Some(&out)),
            rows: to_i32(b * heads * tokens)?,
            tokens: to_i32(tokens)?,
            heads: to_i32(heads)?,
            windows: to_i32(windows)?,
            scale,
        };
        self.by_row(&source(), "softmax", b * heads * tokens, &arguments)?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_compile_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            let program = source().compile(capability).unwrap().to_src();
            assert!(program.contains(".entry softmax("));
        }
    }
}
