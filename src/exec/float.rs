//! Plain float32 execution, one product per image so that an image's result never depends on its batch.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::exec::Executor;
use crate::nn::{Linear, Role, Site};

/// The float executor: what a checkpoint computes by itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Float;

impl Executor for Float {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        linear(&op.site, x, &op.weight, op.bias.as_ref())
    }

    fn matmul(&mut self, _site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        matmul(lhs, rhs)
    }
}

/// `x · weightᵀ + bias` with x [images·windows, .., in].
///
/// A BLAS product may sum in another order when its row count changes. On the CPU each image is
/// therefore multiplied by itself: same shape, same order, same bits whatever the batch. On a GPU
/// one batched product is used, with one matrix per image.
pub(super) fn linear(
    site: &Site,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    if let (Role::Embed, Some(bias)) = (site.role, bias) {
        // The convolution that the stem is in timm starts its sums from the bias. Quantizers turn a
        // last bit into a step now and then, so the order is kept.
        let ones = x.f_narrow(-1, 0, 1)?.f_ones_like()?;
        let x = Tensor::f_cat(&[&ones, x], -1)?;
        let weight = Tensor::f_cat(&[&bias.f_unsqueeze(1)?, weight], 1)?;
        return sum_in_order(&x, &weight, None, site.windows);
    }
    sum_in_order(x, weight, bias, site.windows)
}

fn sum_in_order(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    windows: i64,
) -> Result<Tensor> {
    let shape = x.size();
    let images = shape[0] / windows;
    let (input, out) = (weight.size()[1], weight.size()[0]);
    let mut result_shape = shape.clone();
    if let Some(last) = result_shape.last_mut() {
        *last = out;
    }
    let rows = x.f_reshape([images, -1, input])?; // [images, rows, in]
    let product = if x.device() == Device::Cpu && !needs_gradient(x, weight) {
        let result = Tensor::f_empty([images, rows.size()[1], out], (Kind::Float, x.device()))?;
        let transposed = weight.f_tr()?;
        for image in 0..images {
            let target = result.f_select(0, image)?;
            let source = rows.f_select(0, image)?;
            // Both return another handle of `target`.
            let _filled = match bias {
                Some(bias) => bias.f_addmm_out(&target, &source, &transposed)?,
                None => source.f_mm_out(&target, &transposed)?,
            };
        }
        result
    } else {
        let product = rows.f_matmul(&weight.f_tr()?)?;
        match bias {
            Some(bias) => product.f_add(bias)?,
            None => product,
        }
    };
    Ok(product.f_reshape(result_shape)?)
}

/// `lhs · rhsᵀ` per image and head; every matrix of the batch is multiplied by itself.
///
/// Heads that lie side by side in memory would be copied apart in a batch and used in place in a
/// single image, and BLAS sums small matrices by their layout: here they are always apart.
pub(super) fn matmul(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let (lhs, rhs) = (lhs.f_contiguous()?, rhs.f_contiguous()?);
    Ok(lhs.f_matmul(&rhs.f_transpose(-2, -1)?)?)
}

/// In-place output tensors carry no gradients, so training takes the plain product.
fn needs_gradient(x: &Tensor, weight: &Tensor) -> bool {
    x.requires_grad() || weight.requires_grad()
}
