//! What lies between integer products, in one pass over memory each, on all threads.

use tch::Tensor;

use crate::error::Result;
use crate::exec::ScoreTerms;
use crate::kernels::cpu_elementwise::{self, NormRow, ScoreRow};
use crate::kernels::cpu_slices::{filled, floats};
use crate::kernels::passes::for_rows;
use crate::nn::LayerNorm;

/// Elements of a row where there are none by nature.
const RUN: usize = 1024;

/// Layer norm of x [.., dim].
pub(super) fn layer_norm(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    let (weight, bias, eps) = norm.parameters();
    let norm = NormRow { weight: floats(weight)?, bias: floats(bias)?, eps: eps as f32 };
    let (values, width) = (floats(&x)?, norm.weight.len());
    filled(&x.size(), |out| {
        for_rows(out, width, |first, part| {
            let rows = values[first * width..].chunks_exact(width);
            for (x, out) in rows.zip(part.chunks_exact_mut(width)) {
                cpu_elementwise::layer_norm(x, norm, out);
            }
        });
        Ok(())
    })
}

/// Exact GELU in place.
pub(super) fn gelu(values: &mut [f32]) {
    in_runs(values, |_, part| cpu_elementwise::gelu(part));
}

/// Adds `residual` in place.
pub(super) fn add(values: &mut [f32], residual: &[f32]) {
    in_runs(values, |first, part| {
        part.iter_mut().zip(&residual[first..]).for_each(|(x, residual)| *x += residual);
    });
}

/// A copy of x with `operation` done to it.
pub(super) fn changed(x: &Tensor, operation: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    filled(&x.size(), |out| {
        out.copy_from_slice(floats(&x)?);
        operation(out);
        Ok(())
    })
}

/// `operation` on parts of `values` and the index of each one's first value.
fn in_runs(values: &mut [f32], operation: impl Fn(usize, &mut [f32]) + Sync) {
    let whole = values.len() - values.len() % RUN;
    let (runs, rest) = values.split_at_mut(whole);
    for_rows(runs, RUN, |first, part| operation(first * RUN, part));
    operation(whole, rest);
}

/// [b, t, 3·heads·d] → q, k, v, each [b, heads, t, d].
pub(super) fn split_heads(qkv: &Tensor, heads: i64) -> Result<[Tensor; 3]> {
    let (b, t, width) = qkv.size3()?;
    let qkv = qkv.f_contiguous()?;
    let values = floats(&qkv)?;
    let d = width / (3 * heads);
    let size = |n: i64| usize::try_from(n).unwrap_or(0);
    let (tokens, columns, head_width) = (size(t), size(width), size(d));
    let part = |index: usize| {
        filled(&[b, heads, t, d], |out| {
            // A row is one head of one image.
            for_rows(out, tokens * head_width, |first, part| {
                let matrices = part.chunks_exact_mut(tokens * head_width).enumerate();
                for (offset, matrix) in matrices {
                    let (image, head) =
                        ((first + offset) / size(heads), (first + offset) % size(heads));
                    let column = index * columns / 3 + head * head_width;
                    let image = &values[image * tokens * columns..];
                    for (row, out) in matrix.chunks_exact_mut(head_width).enumerate() {
                        let at = row * columns + column;
                        out.copy_from_slice(&image[at..at + head_width]);
                    }
                }
            });
            Ok(())
        })
    };
    Ok([part(0)?, part(1)?, part(2)?])
}

/// [b, heads, t, d] → [b, t, heads·d].
pub(super) fn merge_heads(mixed: &Tensor) -> Result<Tensor> {
    let (b, heads, t, d) = mixed.size4()?;
    let mixed = mixed.f_contiguous()?;
    let values = floats(&mixed)?;
    let size = |n: i64| usize::try_from(n).unwrap_or(0);
    let (tokens, head_width, count) = (size(t), size(d), size(heads));
    filled(&[b, t, heads * d], |out| {
        for_rows(out, count * head_width, |first, part| {
            for (offset, row) in part.chunks_exact_mut(count * head_width).enumerate() {
                let (image, token) = ((first + offset) / tokens, (first + offset) % tokens);
                for (head, out) in row.chunks_exact_mut(head_width).enumerate() {
                    let at = ((image * count + head) * tokens + token) * head_width;
                    out.copy_from_slice(&values[at..at + head_width]);
                }
            }
        });
        Ok(())
    })
}

/// The softmax of scores [b, heads, t, t] with their terms.
#[derive(Debug)]
pub(super) struct Softmax {
    scale: f32,
    bias: Option<Tensor>,
    mask: Option<Tensor>,
    heads: usize,
    tokens: usize,
}

impl Softmax {
    pub(super) fn new(terms: &ScoreTerms<'_>, heads: i64, tokens: i64) -> Result<Self> {
        let dense = |x: Option<&Tensor>| x.map(Tensor::f_contiguous).transpose();
        Ok(Self {
            scale: terms.scale.map_or(1.0, |scale| scale as f32),
            bias: dense(terms.bias)?,
            mask: dense(terms.mask)?,
            heads: usize::try_from(heads).unwrap_or(0),
            tokens: usize::try_from(tokens).unwrap_or(0),
        })
    }

    /// In place.
    pub(super) fn apply(&self, scores: &mut [f32]) -> Result<()> {
        let &Self { scale, heads, tokens, .. } = self;
        let (bias, mask) = (values(self.bias.as_ref())?, values(self.mask.as_ref())?);
        let windows = mask.len() / (tokens * tokens).max(1);
        for_rows(scores, tokens, |first, part| {
            for (offset, row) in part.chunks_exact_mut(tokens).enumerate() {
                let (matrix, query) = ((first + offset) / tokens, (first + offset) % tokens);
                let row_of = |matrix: usize| {
                    let at = (matrix * tokens + query) * tokens;
                    at..at + tokens
                };
                let bias = if bias.is_empty() { bias } else { &bias[row_of(matrix % heads)] };
                let mask = match windows {
                    0 => mask,
                    windows => &mask[row_of(matrix / heads % windows)],
                };
                cpu_elementwise::softmax(row, ScoreRow { scale, bias, mask });
            }
        });
        Ok(())
    }
}

/// The values of a tensor, none without one.
fn values(x: Option<&Tensor>) -> Result<&[f32]> {
    x.map_or(Ok(&[]), floats)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::exec::attention;
    use crate::quant::uniform::laws::sample;

    fn is_close(found: &Tensor, expected: &Tensor) -> bool {
        let worst = (found - expected).abs().max().double_value(&[]);
        found.size() == expected.size()
            && worst <= 1e-6 * expected.abs().max().double_value(&[]).max(1.0)
    }

    #[test]
    fn heads_are_moved_as_by_tensors() {
        for (b, t, heads, d) in [(1, 1, 1, 3), (2, 5, 3, 4), (3, 197, 6, 64)] {
            let qkv = sample(&[b, t, 3 * heads * d], 1);
            let found = split_heads(&qkv, heads).unwrap();
            for (found, expected) in found.iter().zip(attention::split_heads(&qkv, heads).unwrap())
            {
                assert!(found.equal(&expected));
            }
            assert!(
                merge_heads(&found[0]).unwrap().equal(&attention::merge_heads(&found[0]).unwrap())
            );
        }
    }

    #[test]
    fn scores_get_the_terms_of_their_head_and_window() {
        let (images, windows, heads, t) = (2, 4, 3, 7);
        let scores = sample(&[images * windows, heads, t, t], 1) * 4.0;
        let bias = sample(&[1, heads, t, t], 2);
        let mask = sample(&[windows, 1, t, t], 3).ge(0.0).to_kind(Kind::Float) * 50.0 - 50.0;
        for terms in [
            ScoreTerms { scale: Some(0.125), ..ScoreTerms::default() },
            ScoreTerms { bias: Some(&bias), ..ScoreTerms::default() },
            ScoreTerms { scale: Some(2.0), bias: Some(&bias), mask: Some(&mask) },
        ] {
            let softmax = Softmax::new(&terms, heads, t).unwrap();
            let found = filled(&scores.size(), |out| {
                out.copy_from_slice(floats(&scores)?);
                softmax.apply(out)
            });
            assert!(is_close(&found.unwrap(), &attention::softmax(&scores, &terms).unwrap()));
        }
    }

    #[test]
    fn values_change_wherever_they_lie() {
        let x = sample(&[3, 5, 1111], 1);
        assert!(is_close(&changed(&x, gelu).unwrap(), &x.gelu("none")));
        let residual = sample(&[3, 5, 1111], 2);
        let added = changed(&x, |out| add(out, floats(&residual).unwrap())).unwrap();
        assert!(added.equal(&(&x + &residual)));
        let ones = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        assert!(changed(&ones, |_| ()).unwrap().equal(&ones));
    }
}
