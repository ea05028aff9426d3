//! Results of finished units: what an interrupted calibration need not compute again.

use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use tch::{Kind, Tensor};

use crate::calib::CalibrationTask;
use crate::error::{Error, Result};

/// What is kept, in libtorch's and in safetensors' words.
const TYPES: [(Kind, Dtype); 3] =
    [(Kind::Float, Dtype::F32), (Kind::Double, Dtype::F64), (Kind::Int64, Dtype::I64)];

/// Named tensors, in order.
pub type Tensors = Vec<(String, Tensor)>;

/// The result of a unit: from an earlier attempt if it is there and `fits`, else computed and kept.
/// `unit` names it within the calibration: letters, digits, `.`, `_` and `-`.
///
/// # Errors
/// Whatever `compute` reports. A result that cannot be restored is computed, one that cannot be kept
/// is not.
pub fn restore_or_compute(
    task: &CalibrationTask<'_>,
    unit: &str,
    fits: impl FnOnce(&Tensors) -> bool,
    compute: impl FnOnce() -> Result<Tensors>,
) -> Result<Tensors> {
    if let Some(tensors) = task.progress.restore(unit)
        && fits(&tensors)
    {
        let moved = |(name, tensor): (String, Tensor)| Ok((name, tensor.f_to(task.device)?));
        return tensors.into_iter().map(moved).collect();
    }
    let tensors = compute()?;
    task.progress.keep(unit, &tensors);
    Ok(tensors)
}

/// Tensors of float32, float64 or int64 as bytes (safetensors). Equal tensors give equal bytes.
///
/// # Errors
/// `Internal` for another kind or a name given twice; `Device` when libtorch refuses.
pub fn to_bytes(tensors: &[(String, Tensor)]) -> Result<Vec<u8>> {
    let failed = |error: safetensors::SafeTensorError| Error::internal(error.to_string());
    let mut raw = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let tensor = tensor.f_to(tch::Device::Cpu)?.f_contiguous()?;
        let kind = tensor.kind();
        let (_, dtype) = TYPES
            .into_iter()
            .find(|(known, _)| *known == kind)
            .ok_or_else(|| Error::internal(format!("{name}: {kind:?} is not kept")))?;
        let mut data = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
        tensor.f_copy_data_u8(&mut data, tensor.numel())?;
        let shape = tensor.size().iter().map(|n| usize::try_from(*n).unwrap_or(0)).collect();
        raw.push((name, dtype, shape, data));
    }
    let views = raw.iter().map(|(name, dtype, shape, data): &(_, _, Vec<usize>, _)| {
        Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), data).map_err(failed)?))
    });
    let views = views.collect::<Result<Vec<_>>>()?;
    safetensors::serialize(views, None).map_err(failed)
}

/// What [`to_bytes`] wrote, by name.
///
/// # Errors
/// `CorruptArtifact` for other bytes.
pub fn from_bytes(bytes: &[u8]) -> Result<Tensors> {
    let damaged = |reason: String| Error::corrupt("a kept unit", reason);
    let file = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let mut tensors = Vec::new();
    for (name, view) in file.iter() {
        let dtype = view.dtype();
        let (kind, _) = TYPES
            .into_iter()
            .find(|(_, known)| *known == dtype)
            .ok_or_else(|| damaged(format!("{name} is of type {dtype:?}")))?;
        let shape: Vec<i64> = view.shape().iter().map(|n| *n as i64).collect();
        tensors.push((name.to_owned(), Tensor::f_from_data_size(view.data(), &shape, kind)?));
    }
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_come_back_bit_for_bit_and_damage_is_found() {
        let strange = [f32::NAN, -0.0, f32::MIN_POSITIVE / 2.0, f32::INFINITY];
        let tensors = vec![
            ("a".to_owned(), Tensor::from_slice(&strange).view([2, 2]).tr()),
            ("b".to_owned(), Tensor::from_slice(&[i64::MIN, 7])),
            ("c".to_owned(), Tensor::from_slice(&[0.1_f64])),
            ("empty".to_owned(), Tensor::from_slice::<f32>(&[])),
        ];
        let bytes = to_bytes(&tensors).unwrap();
        let again = from_bytes(&bytes).unwrap();
        assert_eq!(to_bytes(&again).unwrap(), bytes);
        let bits = |t: &Tensor| Vec::<f32>::try_from(t.contiguous().view(-1)).unwrap();
        let bits = |t: &Tensor| bits(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&again[0].1), bits(&tensors[0].1));
        assert_eq!(again[0].1.size(), [2, 2]);
        assert!(from_bytes(&bytes[..bytes.len() - 1]).is_err());
        let half = [("h".to_owned(), Tensor::from_slice(&[1_f32]).to_kind(Kind::Half))];
        assert!(to_bytes(&half).is_err());
    }
}
