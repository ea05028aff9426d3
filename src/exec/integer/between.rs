//! What lies between integer products, in one pass over memory each, on all threads.

use tch::Tensor;

use crate::error::Result;
use crate::exec::ScoreTerms;
use crate::kernels::cpu_elementwise::{self, NormRow, ScoreRow};
use crate::kernels::cpu_slices::{filled, floats};
use crate::kernels::passes::for_rows;
use crate::kernels::{RowOrder, transpose};
use crate::nn::LayerNorm;

/// Elements of a row where there are none by nature.
const RUN: usize = 1024;

/// A layer norm as its pass takes it.
pub(super) fn norm_row(norm: &LayerNorm) -> Result<NormRow<'_>> {
    let (weight, bias, eps) = norm.parameters();
    Ok(NormRow { weight: floats(weight)?, bias: floats(bias)?, eps: eps as f32 })
}

/// Layer norm of x [.., dim].
pub(super) fn layer_norm(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    normed(norm, x, None, &x.size())
}

/// Layer norm of x [n, t, dim], whose rows stand in some order then: in that shape.
pub(super) fn normed(
    norm: &LayerNorm,
    x: &Tensor,
    order: Option<&RowOrder>,
    shape: &[i64],
) -> Result<Tensor> {
    let x = x.f_contiguous()?;
    let norm = norm_row(norm)?;
    let (values, width) = (floats(&x)?, norm.weight.len());
    filled(shape, |out| {
        for_rows(out, width, |first, part| {
            for (place, out) in part.chunks_exact_mut(width).enumerate() {
                let row = RowOrder::row(order, first + place);
                cpu_elementwise::layer_norm(&values[row * width..][..width], norm, out);
            }
        });
        Ok(())
    })
}

/// Exact GELU in place.
pub(super) fn gelu(values: &mut [f32]) {
    let whole = values.len() - values.len() % RUN;
    let (runs, rest) = values.split_at_mut(whole);
    for_rows(runs, RUN, |_, part| cpu_elementwise::gelu(part));
    cpu_elementwise::gelu(rest);
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

/// [b, t, 3·heads·d] → q, k, v, each [b, heads, t, d]; v is a view of vᵀ, which its product takes.
pub(super) fn split_heads(qkv: &Tensor, heads: i64) -> Result<[Tensor; 3]> {
    let part = |index| head_matrices(qkv, heads, index);
    Ok([part(0)?, part(1)?, part(2)?.f_transpose(-2, -1)?])
}

/// q [b, heads, t, d], k alike, or vᵀ [b, heads, d, t] of qkv [b, t, 3·heads·d].
pub(super) fn head_matrices(qkv: &Tensor, heads: i64, index: usize) -> Result<Tensor> {
    let (b, t, width) = qkv.size3()?;
    let (qkv, d) = (qkv.f_contiguous()?, width / (3 * heads));
    let part = HeadsPart::new(&qkv, (heads, d), index as i64)?;
    let (shape, copy): (_, CopyHead) = match index {
        2 => ([b, heads, d, t], copy_transposed),
        _ => ([b, heads, t, d], copy_rows),
    };
    filled(&shape, |out| {
        part.each(out, copy);
        Ok(())
    })
}

/// Copies a head, whose first value comes first, to its matrix.
type CopyHead = fn(&[f32], HeadsPart<'_>, &mut [f32]);

/// q, k or v within qkv.
#[derive(Clone, Copy)]
struct HeadsPart<'a> {
    values: &'a [f32], // [b, t, columns]
    columns: usize,
    tokens: usize,
    heads: usize,
    head_width: usize,
    first_column: usize,
}

impl<'a> HeadsPart<'a> {
    /// The part number `index` of a dense [b, t, 3·heads·d].
    fn new(qkv: &'a Tensor, (heads, d): (i64, i64), index: i64) -> Result<Self> {
        let (_, t, width) = qkv.size3()?;
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        Ok(Self {
            values: floats(qkv)?,
            columns: size(width),
            tokens: size(t),
            heads: size(heads),
            head_width: size(d),
            first_column: size(index * heads * d),
        })
    }

    /// Makes the matrix of every head of every image.
    fn each(self, out: &mut [f32], copy: CopyHead) {
        let size = self.tokens * self.head_width;
        for_rows(out, size, |first, part| {
            for (offset, matrix) in part.chunks_exact_mut(size).enumerate() {
                let (image, head) = ((first + offset) / self.heads, (first + offset) % self.heads);
                let at = image * self.tokens * self.columns;
                let column = self.first_column + head * self.head_width;
                copy(&self.values[at + column..], self, matrix);
            }
        });
    }
}

/// Rows as they are, one below the other.
fn copy_rows(head: &[f32], part: HeadsPart<'_>, matrix: &mut [f32]) {
    let HeadsPart { columns, head_width, .. } = part;
    for (row, out) in matrix.chunks_exact_mut(head_width).enumerate() {
        out.copy_from_slice(&head[row * columns..][..head_width]);
    }
}

/// Rows as columns.
fn copy_transposed(head: &[f32], part: HeadsPart<'_>, matrix: &mut [f32]) {
    let HeadsPart { columns, tokens, head_width, .. } = part;
    transpose(head, columns, [tokens, head_width], matrix);
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
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let dense = |x: Option<&Tensor>| x.map(Tensor::f_contiguous).transpose();
        Ok(Self {
            scale: terms.scale.map_or(1.0, |scale| scale as f32),
            bias: dense(terms.bias)?,
            mask: dense(terms.mask)?,
            heads: size(heads),
            tokens: size(tokens),
        })
    }

    /// The same for rows of numbers.
    pub(super) fn rows(&self) -> Result<SoftmaxRows<'_>> {
        let &Self { scale, heads, tokens, .. } = self;
        let (bias, mask) = (values(self.bias.as_ref())?, values(self.mask.as_ref())?);
        let windows = mask.len() / (tokens * tokens).max(1);
        Ok(SoftmaxRows { scale, bias, mask, heads, tokens, windows })
    }
}

/// A [`Softmax`] with its terms as slices.
#[derive(Clone, Copy, Debug)]
pub(super) struct SoftmaxRows<'a> {
    scale: f32,
    bias: &'a [f32],
    mask: &'a [f32],
    heads: usize,
    tokens: usize,
    windows: usize,
}

impl SoftmaxRows<'_> {
    /// Of the row of that number, whose scores are used up.
    pub(super) fn apply(&self, row: usize, scores: &mut [f32], out: &mut [f32]) {
        let &Self { scale, bias, mask, heads, tokens, windows } = self;
        let (matrix, query) = (row / tokens, row % tokens);
        let row_of = |matrix: usize| {
            let at = (matrix * tokens + query) * tokens;
            at..at + tokens
        };
        let bias = if bias.is_empty() { bias } else { &bias[row_of(matrix % heads)] };
        let mask = match windows {
            0 => mask,
            windows => &mask[row_of(matrix / heads % windows)],
        };
        cpu_elementwise::softmax(scores, ScoreRow { scale, bias, mask }, out);
    }

    /// Of all rows, in place.
    pub(super) fn apply_to_all(&self, scores: &mut [f32]) {
        for_rows(scores, self.tokens, |first, part| {
            let mut scores = vec![0.0; self.tokens];
            for (offset, row) in part.chunks_exact_mut(self.tokens).enumerate() {
                scores.copy_from_slice(row);
                self.apply(first + offset, &mut scores, row);
            }
        });
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
            assert!(found[2].transpose(-2, -1).is_contiguous(), "as the product takes it");
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
            let rows = softmax.rows().unwrap();
            let found = changed(&scores, |out| rows.apply_to_all(out)).unwrap();
            assert!(is_close(&found, &attention::softmax(&scores, &terms).unwrap()));
        }
    }

    #[test]
    fn values_change_wherever_they_lie() {
        let x = sample(&[3, 5, 1111], 1);
        assert!(is_close(&changed(&x, gelu).unwrap(), &x.gelu("none")));
        let ones = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        assert!(changed(&ones, |_| ()).unwrap().equal(&ones));
    }
}
