//! Operations that are computed image by image, so that an image's result never depends on its batch.
//!
//! libtorch's CPU kernels treat the end of a buffer (and of a thread's share of it) with other
//! instructions than the middle. Where these differ in the last bit, a batch would show in the result.

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// Exact (erf) GELU of `x` [n, ..].
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if needs_whole_batch(x) {
        return Ok(x.f_gelu("none")?);
    }
    let x = x.f_contiguous()?;
    let result = x.f_empty_like()?;
    for image in 0..x.size()[0] {
        // Returns another handle of the result's slice.
        let _filled = x.f_select(0, image)?.f_gelu_out(&result.f_select(0, image)?, "none")?;
    }
    Ok(result)
}

/// Mean over the tokens: [n, t, c] → [n, c].
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn mean_of_tokens(x: &Tensor) -> Result<Tensor> {
    if needs_whole_batch(x) {
        return Ok(x.f_mean_dim(1, false, Kind::Float)?);
    }
    let images = (0..x.size()[0])
        .map(|image| x.f_select(0, image)?.f_contiguous()?.f_mean_dim(0, false, Kind::Float))
        .collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Tensor::f_stack(&images, 0)?)
}

/// On a GPU one launch per image would cost more than it is worth; gradients need the plain operation.
fn needs_whole_batch(x: &Tensor) -> bool {
    x.device() != Device::Cpu || x.requires_grad()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_gives_what_each_image_gives() {
        tch::manual_seed(1);
        // An odd size, so that images end inside a vector register.
        let x = Tensor::randn([5, 7, 13], (Kind::Float, Device::Cpu));
        for operation in [gelu, mean_of_tokens] {
            let together = operation(&x).unwrap();
            for image in 0..5 {
                let alone = operation(&x.narrow(0, image, 1)).unwrap();
                assert_eq!(together.narrow(0, image, 1), alone);
            }
        }
    }

    #[test]
    fn gradients_flow() {
        let x = Tensor::ones([2, 3, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        mean_of_tokens(&gelu(&x).unwrap()).unwrap().sum(Kind::Float).backward();
        assert!(x.grad().abs().min().double_value(&[]) > 0.0);
    }
}
