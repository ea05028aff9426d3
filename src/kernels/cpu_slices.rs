//! Tensors as slices: how kernels in plain Rust read and make libtorch's tensors without a copy.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// The values of `x`, which must be contiguous float32 on the CPU, row by row.
///
/// # Errors
/// `Internal` for any other tensor.
pub fn floats(x: &Tensor) -> Result<&[f32]> {
    check(x)?;
    #[allow(unsafe_code, reason = "tch gives no slice of a tensor's values")]
    // SAFETY: the tensor is dense, so `numel` values lie behind its pointer, aligned by libtorch's
    // allocator; `x` is borrowed as long as the slice and keeps them alive; and layers and executors
    // compute into new tensors, so nothing writes through another handle meanwhile.
    let values = unsafe {
        if x.numel() == 0 {
            &[]
        } else {
            std::slice::from_raw_parts(x.data_ptr().cast::<f32>().cast_const(), x.numel())
        }
    };
    Ok(values)
}

/// A new float32 tensor of `shape` on the CPU, whose values `fill` writes.
///
/// # Errors
/// `Device` when memory is short; whatever `fill` reports.
pub fn filled(shape: &[i64], fill: impl FnOnce(&mut [f32]) -> Result<()>) -> Result<Tensor> {
    let x = Tensor::f_empty(shape, (Kind::Float, Device::Cpu))?;
    check(&x)?;
    if x.numel() > 0 {
        #[allow(unsafe_code, reason = "tch gives no slice of a tensor's values")]
        // SAFETY: the tensor is dense and was made here, so this is the only way to its values;
        // they come from libtorch's allocator, and every pattern of bits is a float.
        let values =
            unsafe { std::slice::from_raw_parts_mut(x.data_ptr().cast::<f32>(), x.numel()) };
        fill(values)?;
    }
    Ok(x)
}

fn check(x: &Tensor) -> Result<()> {
    if x.device() == Device::Cpu && x.kind() == Kind::Float && x.is_contiguous() {
        return Ok(());
    }
    let (shape, kind) = (x.size(), x.kind());
    Err(Error::internal(format!("a tensor {shape:?} of {kind:?} is no dense float32 on the CPU")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let x = filled(&[2, 3], |values| {
            values.copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
            Ok(())
        })
        .unwrap();
        assert_eq!(x.double_value(&[1, 0]), 4.0);
        assert_eq!(floats(&x).unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(floats(&x.narrow(0, 1, 1)).unwrap(), [4.0, 5.0, 6.0]);
        assert!(filled(&[0, 3], |_| Ok(())).is_ok());
    }

    #[test]
    fn other_tensors_are_refused() {
        let x = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
        assert!(floats(&x.transpose(0, 1)).is_err());
        assert!(floats(&x.to_kind(Kind::Double)).is_err());
        assert!(floats(&x.expand([2, 2, 3], false)).is_err());
    }
}
