//! Attention and MLP as a whole: codes are made where values come to be, if one grid holds them.

use tch::Tensor;

use super::between::Softmax;
use super::{Integer, between};
use crate::error::Result;
use crate::exec::AttentionTerms;
use crate::kernels::cpu_slices::{filled, floats};
use crate::kernels::fused::{self, HeadRows, Heads};
use crate::kernels::passes::Strided;
use crate::kernels::passes::affine::{self, Grid};
use crate::kernels::{self, Codes, PackedRhs, RowOrder, cpu_elementwise};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Operand, Site, Windows};

/// A linear layer with its packed weight.
#[derive(Clone, Copy)]
struct Packed<'a> {
    op: &'a Linear,
    weight: &'a PackedRhs,
}

impl<'a> Packed<'a> {
    fn bias(self) -> Result<Option<&'a [f32]>> {
        self.op.bias.as_ref().map(floats).transpose()
    }
}

impl Integer<'_> {
    /// The one grid of an operand of a product in integers.
    fn grid(&self, site: &Site, operand: Operand) -> Option<Grid> {
        self.sites.fixed(site, operand).copied()
    }

    /// Codes of the norm of `x` [n, t, dim], in windows where there are any.
    fn normed(
        &self,
        norm: &LayerNorm,
        x: &Tensor,
        site: &Site,
        windows: Option<&Windows>,
    ) -> Result<Codes> {
        let order = windows.map(Windows::order);
        let Some(grid) = self.grid(site, Operand::Lhs) else {
            let (n, tokens, dim) = x.size3()?;
            let windows = windows.map_or(1, Windows::per_image);
            let shape = [n * windows, tokens / windows, dim];
            let normed = between::normed(norm, x, order, &shape)?;
            return self.encode(site, Operand::Lhs, &normed);
        };
        Ok(fused::normed(floats(x)?, between::norm_row(norm)?, order, grid))
    }

    /// `x` plus the MLP of its norm; `None` where a product of it is none of integers.
    pub(super) fn mlp_of_integers(
        &self,
        norm: &LayerNorm,
        op: &Mlp,
        x: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some([fc1, fc2]) = self.sites.mlp(op) else { return Ok(None) };
        let fc1 = Packed { op: &op.fc1, weight: fc1 };
        let fc2 = Packed { op: &op.fc2, weight: fc2 };
        let x = x.f_contiguous()?;
        let codes = self.normed(norm, &x, &op.fc1.site, None)?;
        let hidden = match self.grid(&op.fc2.site, Operand::Lhs) {
            Some(grid) => {
                fused::encoded((&codes, fc1.weight), fc1.bias()?, cpu_elementwise::gelu, grid)
            }
            None => {
                let hidden = filled(&op.fc1.output_shape(&x), |out| {
                    let gelu = |_: usize, _: usize, part: &mut [f32]| cpu_elementwise::gelu(part);
                    kernels::product(&codes, fc1.weight, fc1.bias()?, Some(&gelu), out);
                    Ok(())
                })?;
                self.encode(&op.fc2.site, Operand::Lhs, &hidden)?
            }
        };
        codes.recycle();
        self.added(fc2, hidden, &x, None).map(Some)
    }

    /// `x` plus the linear of codes, whose rows stand in some order.
    fn added(
        &self,
        layer: Packed<'_>,
        codes: Codes,
        x: &Tensor,
        order: Option<&RowOrder>,
    ) -> Result<Tensor> {
        let (bias, residual) = (layer.bias()?, floats(x)?);
        filled(&x.size(), |out| {
            fused::added((&codes, layer.weight), bias, residual, order, out);
            codes.recycle();
            Ok(())
        })
    }

    /// `x` plus the attention over its norm; `None` where a product of it is none of integers.
    pub(super) fn attention_of_integers(
        &self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some([qkv, proj]) = self.sites.attention(op) else { return Ok(None) };
        let qkv = Packed { op: &op.qkv, weight: qkv };
        let proj = Packed { op: &op.proj, weight: proj };
        let x = x.f_contiguous()?;
        let (n, tokens, dim) = x.size3()?;
        let windows = terms.windows.map_or(1, Windows::per_image);
        let (batch, tokens) = (n * windows, tokens / windows);
        let size = |n: i64| usize::try_from(n).unwrap_or(0);
        let shape =
            Heads { tokens: size(tokens), heads: size(op.heads), width: size(dim / op.heads) };

        let codes = self.normed(norm, &x, &op.qkv.site, terms.windows)?;
        let operands = self.heads(qkv, &codes, (op, terms.query_scale), (batch, shape))?;
        codes.recycle();
        let softmax = Softmax::new(&terms.scores, op.heads, tokens)?;
        let mixed = self.mixed(op, operands, &softmax, (batch, shape))?;
        self.added(proj, mixed, &x, terms.windows.map(Windows::order)).map(Some)
    }

    /// q, k and vᵀ as operands of their products.
    fn heads(
        &self,
        qkv: Packed<'_>,
        codes: &Codes,
        (op, query_scale): (&Attention, Option<f64>),
        (batch, shape): (i64, Heads),
    ) -> Result<[Codes; 3]> {
        let operands = [
            (&*op.query_key, Operand::Lhs),
            (&*op.query_key, Operand::Rhs),
            (&*op.score_value, Operand::Rhs),
        ];
        let grids = operands.map(|(site, operand)| self.grid(site, operand));
        if let [Some(q), Some(k), Some(v)] = grids {
            let scale = query_scale.map(|scale| scale as f32);
            return Ok(fused::split_heads(
                (codes, qkv.weight),
                qkv.bias()?,
                shape,
                scale,
                [q, k, v],
            ));
        }
        // q, k and v of a token side by side.
        let columns = shape.heads * shape.width;
        let tokens = [batch, shape.tokens as i64, 3 * columns as i64];
        let scale_query = |_: usize, first: usize, values: &mut [f32]| {
            let count = columns.saturating_sub(first).min(values.len());
            if let Some(scale) = query_scale {
                affine::scale(&mut values[..count], scale as f32);
            }
        };
        let values = filled(&tokens, |out| {
            kernels::product(codes, qkv.weight, qkv.bias()?, Some(&scale_query), out);
            Ok(())
        })?;
        let rows = floats(&values)?;
        let part = |index: usize| -> Result<Codes> {
            let (site, operand) = operands[index];
            let rows = &rows[index * columns..];
            let rows = Strided { values: rows, stride: 3 * columns, width: columns };
            let side_by_side = HeadRows { rows, count: codes.rows, shape };
            let quantizer = self.plan.get(site.id, operand).filter(|_| index < 2);
            if let Some(codes) = quantizer.and_then(|q| q.encode_heads(&side_by_side)) {
                return Ok(codes);
            }
            self.encode(site, operand, &between::head_matrices(&values, op.heads, index)?)
        };
        Ok([part(0)?, part(1)?, part(2)?])
    }

    /// The softmax of q·kᵀ times v, as the operand of the projection [batch·tokens, dim].
    fn mixed(
        &self,
        op: &Attention,
        operands: [Codes; 3],
        softmax: &Softmax,
        (batch, shape): (i64, Heads),
    ) -> Result<Codes> {
        let [q, k, v] = &operands;
        let rows = softmax.rows()?;
        let finish = |row: usize, scores: &mut [f32], out: &mut [f32]| rows.apply(row, scores, out);
        let encoder = self
            .plan
            .get(op.score_value.id, Operand::Lhs)
            .and_then(|quantizer| quantizer.row_encoder(shape.tokens));
        let grid = self.grid(&op.proj.site, Operand::Lhs);
        let out = [batch, shape.tokens as i64, (shape.heads * shape.width) as i64];
        let mixed = match (&encoder, grid) {
            (Some(encoder), Some(grid)) => {
                fused::mixed_codes([q, k, v], shape, (&finish, &**encoder), grid)
            }
            (Some(encoder), None) => {
                let values = filled(&out, |out| {
                    fused::mixed_values([q, k, v], shape, (&finish, &**encoder), out);
                    Ok(())
                })?;
                self.encode(&op.proj.site, Operand::Lhs, &values)?
            }
            (None, _) => {
                let tokens = shape.tokens as i64;
                let scores = filled(&[batch, op.heads, tokens, tokens], |out| {
                    fused::weights([q, k], shape, &finish, out);
                    Ok(())
                })?;
                let scores = self.encode(&op.score_value, Operand::Lhs, &scores)?;
                let values = filled(&out, |out| {
                    fused::mixed_heads([&scores, v], shape, out);
                    scores.recycle();
                    Ok(())
                })?;
                self.encode(&op.proj.site, Operand::Lhs, &values)?
            }
        };
        operands.into_iter().for_each(Codes::recycle);
        Ok(mixed)
    }
}
