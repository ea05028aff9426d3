//! What lies between products on a GPU.

use tch::{Kind, Tensor};

use super::codes::{FixedCodes, Padding};
use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, address, by_value, parts, to_i32};
use super::product::GridArguments;
use crate::error::{Error, Result};
use crate::kernels::passes::affine::Grid;

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
    max_code: f32,
    grid_scale: u64,
    grid_zero: u64,
}

/// A uniform grid whose scale and zero point, float32 [1], are on a GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct GridOnGpu<'a> {
    pub(super) scale: &'a Tensor,
    pub(super) zero_point: &'a Tensor,
    pub(super) max_code: f32,
}

#[repr(C)]
struct NormArguments {
    x: u64,
    weight: u64,
    bias: u64,
    order: u64,
    codes: u64,
    rows: i32,
    per_image: i32,
    columns: i32,
    width: i32,
    eps: f32,
    grid: GridArguments,
}

by_value!(SoftmaxArguments, NormArguments);

/// Columns of a layer norm that a warp reads at once.
const RUN: i64 = 128;
/// Longest row that a warp keeps in its registers.
const MAX_NORMED: i64 = 12 * RUN;

/// The kernels; those for layer norms of up to that many columns, if there are any.
fn source(normed: Option<i64>) -> Source {
    let mut definitions = PLAIN;
    if let Some(columns) = normed {
        definitions[0] = ("RUNS", i32::try_from(parts(columns, RUN)).unwrap_or(i32::MAX));
    }
    let text = concat!(
        include_str!("primitives.cu"),
        include_str!("codes.cu"),
        include_str!("between.cu")
    );
    Source { name: "between", text, definitions, contract: true }
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
        terms: [Option<&Tensor>; 2],
    ) -> Result<Tensor> {
        self.softmax_on(scores, scale, terms, None)
    }

    /// [`Gpu::softmax`], rounded to a grid if there is one.
    pub(super) fn softmax_on(
        &self,
        scores: &Tensor,
        scale: f32,
        [bias, mask]: [Option<&Tensor>; 2],
        grid: Option<GridOnGpu<'_>>,
    ) -> Result<Tensor> {
        let (b, heads, tokens, width) = scores.size4()?;
        let windows = mask.map_or(1, |mask| mask.size().first().copied().unwrap_or(1));
        let square = tokens * tokens;
        let is_right = tokens == width
            && windows > 0
            && b % windows == 0
            && self.fits(Some(scores), Kind::Float, b * heads * square)
            && self.fits(bias, Kind::Float, heads * square)
            && self.fits(mask, Kind::Float, windows * square);
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
            max_code: grid.map_or(0.0, |grid| grid.max_code),
            grid_scale: address(grid.map(|grid| grid.scale)),
            grid_zero: address(grid.map(|grid| grid.zero_point)),
        };
        self.by_row(&source(None), "softmax", b * heads * tokens, &arguments)?;
        Ok(out)
    }

    /// Whether [`Gpu::normed`] takes rows of that length.
    pub fn takes_norm(columns: i64) -> bool {
        columns > 0 && columns % 4 == 0 && columns <= MAX_NORMED
    }

    /// Codes of the layer norm, with factors and offsets `[dim]` and `eps`, of x float32 [n, tokens, dim];
    /// `order`, int64 `[tokens]`, gives the row of an image that stands at every place.
    ///
    /// # Errors
    /// `Internal` when shapes do not fit ([`Gpu::takes_norm`]) or the kernel does not start.
    pub fn normed(
        &self,
        x: &Tensor,
        (weight, bias, eps): (&Tensor, &Tensor, f64),
        order: Option<&Tensor>,
        grid: Grid,
    ) -> Result<FixedCodes> {
        let (n, tokens, columns) = x.size3()?;
        let is_right = Self::takes_norm(columns)
            && self.fits(Some(x), Kind::Float, n * tokens * columns)
            && self.fits(Some(weight), Kind::Float, columns)
            && self.fits(Some(bias), Kind::Float, columns)
            && self.fits(order, Kind::Int64, tokens);
        let Some(padding) = Padding::new(columns, 1).filter(|_| is_right) else {
            return Err(Error::internal("rows and parameters of a layer norm do not fit"));
        };
        let (x, weight, bias) = (x.f_contiguous()?, weight.f_contiguous()?, bias.f_contiguous()?);
        let rows = n * tokens;
        let codes = Tensor::f_empty([rows, padding.width], (Kind::Uint8, self.device()))?;
        let arguments = NormArguments {
            x: address(Some(&x)),
            weight: address(Some(&weight)),
            bias: address(Some(&bias)),
            order: address(order),
            codes: address(Some(&codes)),
            rows: to_i32(rows)?,
            per_image: to_i32(tokens)?,
            columns: to_i32(columns)?,
            width: to_i32(padding.width)?,
            eps: eps as f32,
            grid: grid.into(),
        };
        self.by_row(&source(Some(columns)), "normed", rows, &arguments)?;
        Ok(FixedCodes { rows, padding, codes, grid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::compile::argument_bytes;

    #[test]
    fn the_kernels_compile_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            for (normed, kernel, bytes) in [
                (None, "softmax", size_of::<SoftmaxArguments>()),
                (Some(96), "normed", size_of::<NormArguments>()),
                (Some(1536), "normed", size_of::<NormArguments>()),
            ] {
                let program = source(normed).compile(capability).unwrap().to_src();
                assert_eq!(argument_bytes(&program, kernel), bytes, "{kernel}");
            }
        }
    }
}
