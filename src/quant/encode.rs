//! From integer terms to the codes that integer kernels multiply: bytes with a scale and a zero point
//! per row and group of columns.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::kernels::{Codes, CodesTerm, MAX_GROUP_COLUMNS};
use crate::quant::IntTerm;

/// Fewest columns of a group whose sum is worth a rescaling of its own.
const MIN_GROUP: usize = 4;
/// What the high byte of a wider code counts.
pub(super) const BYTE: f64 = 256.0;

/// The codes of `terms`, or `None` where a scale differs along the summed axis in another way than by
/// contiguous groups, or codes of `code_bits` bits need more than two bytes.
///
/// # Errors
/// `Device` when shapes do not fit.
pub(super) fn codes_of(terms: &[IntTerm], code_bits: u32) -> Result<Option<Codes>> {
    let Some(first) = terms.first() else { return Ok(None) };
    let shape = first.codes.size();
    let Some((columns, outer)) = shape.split_last() else { return Ok(None) };
    let widths = terms.iter().flat_map(|t| [last_axis(&t.scale), last_axis(&t.zero_point)]);
    let groups = widths.max().unwrap_or(1);
    let size = |n: i64| usize::try_from(n).unwrap_or(0);
    if !is_taken(size(*columns), size(groups), code_bits) {
        return Ok(None);
    }
    let mut layout = Layout { shape: [outer, &[groups]].concat(), terms: Vec::new() };
    for term in &bytes_of(terms, code_bits)? {
        layout.push(term)?;
    }
    Ok(Some(Codes {
        rows: size(outer.iter().product()),
        columns: size(*columns),
        groups: size(groups),
        terms: layout.terms,
    }))
}

/// Whether kernels take codes of that many bits, in rows of `columns` with that many groups.
pub(crate) fn is_taken(columns: usize, groups: usize, code_bits: u32) -> bool {
    let width = columns / groups.max(1);
    width * groups == columns
        && (groups == 1 || width >= MIN_GROUP)
        && width <= MAX_GROUP_COLUMNS
        && code_bits <= 2 * u8::BITS
}

fn last_axis(x: &Tensor) -> i64 {
    x.size().last().copied().unwrap_or(1)
}

/// The largest code of that many bits, at most eight.
pub(crate) fn max_code(bits: u32) -> u8 {
    u8::MAX >> (u8::BITS - bits.min(u8::BITS))
}

/// A term whose codes are bytes, none larger than `max_code`.
#[derive(Debug)]
pub(crate) struct ByteTerm {
    pub(crate) term: IntTerm,
    max_code: u8,
}

/// The sum of `terms`, each as one term of bytes, or as two of which the second counts 256.
///
/// # Errors
/// `Device` when libtorch refuses.
pub(crate) fn bytes_of(terms: &[IntTerm], code_bits: u32) -> Result<Vec<ByteTerm>> {
    let mut bytes = Vec::new();
    for IntTerm { codes, scale, zero_point } in terms {
        // Negative codes come of pixels that are not numbers; their scale is not one, either.
        let codes = codes.f_clamp_min(0i64)?;
        let (scale, zero_point) = (scale.shallow_clone(), zero_point.shallow_clone());
        let Some(high_bits) = code_bits.checked_sub(u8::BITS).filter(|bits| *bits > 0) else {
            let term = IntTerm { codes, scale, zero_point };
            bytes.push(ByteTerm { term, max_code: max_code(code_bits) });
            continue;
        };
        // s·(q − z) = s·(low − z) + 256·s·(high − 0)
        let high = IntTerm {
            codes: codes.f_bitwise_right_shift_tensor_scalar(i64::from(u8::BITS))?,
            scale: scale.f_mul_scalar(BYTE)?,
            zero_point: zero_point.f_zeros_like()?,
        };
        let low = IntTerm { codes: codes.f_bitwise_and(i64::from(u8::MAX))?, scale, zero_point };
        bytes.push(ByteTerm { term: low, max_code: u8::MAX });
        bytes.push(ByteTerm { term: high, max_code: max_code(high_bits) });
    }
    Ok(bytes)
}

struct Layout {
    /// [.., groups], the shape of every scale.
    shape: Vec<i64>,
    terms: Vec<CodesTerm>,
}

impl Layout {
    fn push(&mut self, ByteTerm { term, max_code }: &ByteTerm) -> Result<()> {
        let dense = |x: &Tensor, kind: Kind| -> Result<Tensor> {
            let x = x.f_expand(&self.shape, false)?;
            Ok(x.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?.f_flatten(0, -1)?)
        };
        let (scale, zero_point) =
            (dense(&term.scale, Kind::Float)?, dense(&term.zero_point, Kind::Int)?);
        let codes = term.codes.f_to_device(Device::Cpu)?.f_to_kind(Kind::Uint8)?.f_contiguous()?;
        self.terms.push(CodesTerm {
            codes: Vec::try_from(&codes.f_flatten(0, -1)?)?,
            scale: Vec::try_from(&scale)?,
            zero_point: Vec::try_from(&zero_point)?,
            max_code: *max_code,
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;

    fn term(codes: &Tensor, scale: &Tensor, zero_point: i64) -> IntTerm {
        let zero_point = scale.full_like(zero_point).to_kind(Kind::Int);
        IntTerm { codes: codes.to_kind(Kind::Int), scale: scale.shallow_clone(), zero_point }
    }

    #[test]
    fn codes_decode_to_what_their_terms_do() {
        let row_scales = sample(&[2, 3, 1], 1).abs() + 0.1;
        let group_scales = sample(&[2, 3, 2], 2).abs() + 0.1;
        for (bits, scales, planes) in [
            (8, &row_scales, 1),
            (4, &group_scales, 1),
            (9, &group_scales, 2),
            (15, &row_scales, 2),
        ] {
            let codes =
                (sample(&[2, 3, 16], 3).abs() * 1e4).remainder(f64::from(1 << bits)).floor();
            let term = term(&codes, scales, 5);
            let expected = crate::tensor::to_vec_f32(&term.dequantize().unwrap()).unwrap();
            let found = codes_of(&[term], bits).unwrap().unwrap();
            assert_eq!((found.rows, found.columns, found.terms.len()), (6, 16, planes));
            assert!(found.terms.iter().all(|t| t.codes.iter().all(|code| *code <= t.max_code)));
            for (found, expected) in found.decoded().iter().zip(&expected) {
                assert!((found - expected).abs() <= 1e-6 * expected.abs().max(1.0));
            }
        }
    }

    #[test]
    fn scales_of_single_channels_have_no_codes() {
        let codes = Tensor::zeros([2, 3, 16], (Kind::Int, Device::Cpu));
        for width in [16, 8, 5] {
            let scale = Tensor::ones([1, 1, width], (Kind::Float, Device::Cpu));
            assert!(codes_of(&[term(&codes, &scale, 0)], 4).unwrap().is_none());
        }
        let scale = Tensor::ones([1, 1, 1], (Kind::Float, Device::Cpu));
        assert!(codes_of(&[term(&codes, &scale, 0)], 17).unwrap().is_none());
        assert!(codes_of(&[], 4).unwrap().is_none());
    }
}
