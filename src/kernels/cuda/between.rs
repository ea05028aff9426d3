//! What lies between products on a GPU.

use tch::{Kind, Tensor};

use super::codes::{FixedCodes, Padding};
use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, address, by_value, parts, to_i32};
use super::product::GridArguments;
use crate::error::{Error, Result};
use crate::kernels::passes::affine::Grid;

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

by_value!(NormArguments);

/// Columns of a layer norm that a warp reads at once.
const RUN: i64 = 128;
/// Longest row that a warp keeps in its registers.
const MAX_NORMED: i64 = 12 * RUN;

/// The kernel for layer norms of up to that many columns.
fn source(columns: i64) -> Source {
    let mut definitions = PLAIN;
    definitions[0] = ("RUNS", i32::try_from(parts(columns, RUN)).unwrap_or(i32::MAX));
    let text = concat!(
        include_str!("primitives.cu"),
        include_str!("codes.cu"),
        include_str!("between.cu")
    );
    Source { name: "between", text, definitions, contract: true }
}

impl Gpu {
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
        self.by_row(&source(columns), "normed", rows, &arguments)?;
        Ok(FixedCodes { rows, padding, codes, grid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::compile::argument_bytes;

    #[test]
    fn the_kernel_compiles_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            for columns in [96, 1536] {
                let program = source(columns).compile(capability).unwrap().to_src();
                assert_eq!(argument_bytes(&program, "normed"), size_of::<NormArguments>());
            }
        }
    }
}
