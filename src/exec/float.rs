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
    if let (Role::Embed, Some(bias), Device::Cpu) = (site.role, bias, x.device()) {
        // The convolution that the stem is in timm starts its sums from the bias on a CPU. Quantizers turn
        // a last bit into a step now and then, so the order is kept.
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
            let source = aligned(rows.f_select(0, image)?)?;
            fill(&result.f_select(0, image)?, |target| match bias {
                Some(bias) => Ok(bias.f_addmm_out(target, &source, &transposed)?),
                None => Ok(source.f_mm_out(target, &transposed)?),
            })?;
        }
        result
    } else if x.device() != Device::Cpu {
        rows.f_linear(weight, bias)?
    } else {
        let product = rows.f_matmul(&weight.f_tr()?)?;
        match bias {
            Some(bias) => product.f_add(bias)?,
            None => product,
        }
    };
    Ok(product.f_reshape(result_shape)?)
}

/// `lhs · rhsᵀ` per head; on the CPU the heads (and windows) of one image at a time, since the order
/// of a sum may depend on the number of matrices and on how threads share them.
///
/// The operands are laid out in memory as the float forward has them (vᵀ is a view of v). With the
/// strides of a quantizer's result, which may depend on the batch, the order of the sums would, too.
pub(super) fn matmul(site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let transposed = if site.role == Role::ScoreValue {
        rhs.f_transpose(-2, -1)?.f_contiguous()?
    } else {
        rhs.f_contiguous()?.f_transpose(-2, -1)?
    };
    let lhs = lhs.f_contiguous()?;
    if lhs.device() != Device::Cpu || needs_gradient(&lhs, rhs) {
        return Ok(lhs.f_matmul(&transposed)?);
    }
    let (b, heads, m, _) = lhs.size4()?;
    let n = rhs.size()[2];
    let result = Tensor::f_empty([b, heads, m, n], (Kind::Float, Device::Cpu))?;
    for first in (0..b).step_by(usize::try_from(site.windows.max(1)).unwrap_or(1)) {
        let part = |t: &Tensor| -> Result<Tensor> {
            Ok(t.f_narrow(0, first, site.windows)?.f_flatten(0, 1)?)
        };
        let (left, right) = (aligned(part(&lhs)?)?, aligned(part(&transposed)?)?);
        fill(&part(&result)?, |target| Ok(left.f_bmm_out(target, &right)?))?;
    }
    Ok(result)
}

/// Bytes to which libtorch aligns a buffer of its own.
const ALIGNMENT: usize = 64;

fn is_aligned(x: &Tensor) -> bool {
    (x.data_ptr() as usize).is_multiple_of(ALIGNMENT)
}

/// `x`, or a copy of it at an aligned address: BLAS chooses its kernels by the address, too, and an
/// image's address within a batch depends on its position.
fn aligned(x: Tensor) -> Result<Tensor> {
    if is_aligned(&x) {
        return Ok(x);
    }
    let mut copy = Tensor::f_empty_strided(x.size(), x.stride(), (x.kind(), x.device()))?;
    copy.f_copy_(&x)?;
    Ok(copy)
}

/// Computes into `target`, by way of an aligned buffer where it has no such address itself.
fn fill(target: &Tensor, compute: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    // The results are other handles of their targets.
    if is_aligned(target) {
        let _filled = compute(target)?;
        return Ok(());
    }
    let buffer = target.f_empty_like()?;
    let _filled = compute(&buffer)?;
    let mut target = target.shallow_clone();
    target.f_copy_(&buffer)?;
    Ok(())
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

    #[test]
    fn the_strides_of_an_operand_do_not_show_in_the_product() {
        let site = |role| Site { role, ..site(1) };
        // Tokens before heads in memory, as a quantizer of tokens returns it.
        let strided = |x: &Tensor| x.transpose(1, 2).contiguous().transpose(1, 2);
        let (q, k) = (sample(&[4, 2, 10, 8], 1), sample(&[4, 2, 10, 8], 2));
        let (scores, v) = (sample(&[4, 2, 10, 10], 3), sample(&[4, 2, 10, 8], 4));
        for (role, lhs, rhs) in
            [(Role::QueryKey, q, k), (Role::ScoreValue, scores, v.transpose(-2, -1))]
        {
            let all = matmul(&site(role), &lhs, &rhs).unwrap();
            for image in 0..4 {
                let alone = |x: &Tensor| strided(&x.narrow(0, image, 1));
                let found = matmul(&site(role), &alone(&lhs), &alone(&rhs)).unwrap();
                assert!(found.equal(&all.narrow(0, image, 1)), "{role:?} of image {image}");
            }
        }
    }
}
