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

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        matmul(site, lhs, rhs)
    }
}

/// `x · weightᵀ + bias` with x [images·windows, .., in].
///
/// A BLAS product may sum in another order when its row count or its alignment changes. On the CPU
/// each image is therefore multiplied by itself: same shape, same place, same bits whatever the
/// batch. On a GPU one batched product is used, with one matrix per image.
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
            let mut place = result.f_select(0, image)?;
            let in_place = is_aligned(&place);
            let target = if in_place { place.shallow_clone() } else { place.f_empty_like()? };
            let source = aligned(rows.f_select(0, image)?)?;
            // Both return another handle of `target`.
            let _filled = match bias {
                Some(bias) => bias.f_addmm_out(&target, &source, &transposed)?,
                None => source.f_mm_out(&target, &transposed)?,
            };
            if !in_place {
                place.f_copy_(&target)?;
            }
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

/// `lhs · rhsᵀ` per head with lhs, rhs [images·windows, heads, free, reduce].
///
/// On the CPU each image is multiplied by itself: heads that lie side by side in memory would be
/// copied apart in a batch and used in place in a single image, and BLAS sums small matrices by
/// their layout.
pub(super) fn matmul(site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let product = |lhs: &Tensor, rhs: &Tensor| lhs.f_matmul(&rhs.f_transpose(-2, -1)?);
    if lhs.device() != Device::Cpu || needs_gradient(lhs, rhs) {
        return Ok(product(lhs, rhs)?);
    }
    let images = lhs.size()[0] / site.windows;
    let image = |x: &Tensor, image: i64| x.f_narrow(0, image * site.windows, site.windows);
    let products = (0..images)
        .map(|index| Ok(product(&aligned(image(lhs, index)?)?, &aligned(image(rhs, index)?)?)?))
        .collect::<Result<Vec<_>>>()?;
    match products.as_slice() {
        [only] => Ok(only.shallow_clone()),
        all => Ok(Tensor::f_cat(all, 0)?),
    }
}

/// Alignment of fresh tensors in bytes. BLAS may sum what starts elsewhere in another order.
const ALIGNMENT: usize = 64;

/// Whether the tensor lies row by row at an aligned address.
fn is_aligned(x: &Tensor) -> bool {
    x.is_contiguous() && x.data_ptr().addr().is_multiple_of(ALIGNMENT)
}

/// The tensor itself if it is aligned, or a copy that is.
fn aligned(x: Tensor) -> Result<Tensor> {
    if is_aligned(&x) {
        return Ok(x);
    }
    let mut copy = Tensor::f_empty(x.size(), (x.kind(), x.device()))?;
    copy.f_copy_(&x)?;
    Ok(copy)
}

/// In-place output tensors carry no gradients, so training takes the plain product.
fn needs_gradient(x: &Tensor, weight: &Tensor) -> bool {
    x.requires_grad() || weight.requires_grad()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::SiteId;
    use crate::quant::uniform::laws::sample;

    fn site(windows: i64) -> Site {
        let (path, norm) = ("matmul1".to_owned(), None);
        Site { id: SiteId(0), path, role: Role::QueryKey, norm, unit: 0, windows }
    }

    #[test]
    fn a_batch_gives_what_each_image_gives_whatever_the_layout() {
        for (windows, heads, tokens, width) in
            [(1, 3, 5, 16), (1, 5, 10, 8), (4, 3, 7, 5), (1, 1, 3, 3)]
        {
            let site = site(windows);
            // Heads side by side in memory, as a quantizer of tokens leaves them, and apart.
            let beside = |seed| {
                sample(&[4 * windows, tokens, heads, width], seed).transpose(1, 2) // [.., h, t, w]
            };
            for (lhs, rhs) in
                [(beside(1), beside(2)), (beside(1).contiguous(), beside(2).contiguous())]
            {
                let together = matmul(&site, &lhs, &rhs).unwrap();
                for image in 0..4 {
                    let alone = |x: &Tensor| x.narrow(0, image * windows, windows).copy();
                    let expected = matmul(&site, &alone(&lhs), &alone(&rhs)).unwrap();
                    assert!(together.narrow(0, image * windows, windows).equal(&expected));
                }
            }
            let x = sample(&[4 * windows, tokens, width], 3);
            let weight = sample(&[tokens + 2, width], 4);
            let bias = sample(&[tokens + 2], 5);
            let together = linear(&site, &x, &weight, Some(&bias)).unwrap();
            for image in 0..4 {
                let alone = x.narrow(0, image * windows, windows).copy();
                let expected = linear(&site, &alone, &weight, Some(&bias)).unwrap();
                assert!(together.narrow(0, image * windows, windows).equal(&expected));
            }
        }
    }
}
