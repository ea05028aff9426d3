//! Operands of integer products on a GPU: codes in libtorch's tensors, padded as the kernels read them.

use tch::{Kind, Tensor};

use super::gpu::parts;
use crate::error::{Error, Result};
use crate::kernels::passes::affine::Grid;
use crate::quant::IntTerm;
use crate::quant::encode::{ByteTerm, bytes_of};

/// Codes of a step of the tensor cores: groups are padded to whole steps.
const STEP: i64 = 32;
/// Rows are padded to whole stages.
const STAGE: i64 = 64;
/// Largest code of which two share a byte.
const MAX_NIBBLE: i64 = 15;
/// Longest group whose sum of products fits 32 bits.
const MAX_GROUP: i64 = 33_025;
/// Most terms × groups of an operand: a product keeps their grids in shared memory.
pub(super) const MAX_SEGMENTS: i64 = 64;

/// How rows of codes lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Padding {
    /// Length of the summed axis.
    pub(super) columns: i64,
    /// Contiguous groups of columns with a scale of their own.
    pub(super) groups: i64,
    /// Bytes of a group.
    pub(super) group_width: i64,
    /// Bytes of a row.
    pub(super) width: i64,
}

impl Padding {
    /// The padding of rows of that many columns in groups; `None` where the groups are unequal, or too
    /// long for sums of 32 bits.
    pub(super) fn new(columns: i64, groups: i64) -> Option<Self> {
        let group = columns.checked_div(groups).filter(|group| group * groups == columns)?;
        if group == 0 || group > MAX_GROUP {
            return None;
        }
        let group_width = parts(group, STEP) * STEP;
        Some(Self {
            columns,
            groups,
            group_width,
            width: parts(group_width * groups, STAGE) * STAGE,
        })
    }

    fn group(self) -> i64 {
        self.columns / self.groups
    }

    /// [.., columns] → [.., width].
    fn pad(self, codes: &Tensor) -> Result<Tensor> {
        let mut shape = codes.size();
        shape.pop();
        let rows: i64 = shape.iter().product();
        let grouped = codes.f_reshape([rows, self.groups, self.group()])?;
        let grouped = grouped.f_constant_pad_nd([0, self.group_width - self.group()])?;
        let flat = grouped.f_reshape([rows, self.groups * self.group_width])?;
        let padded = flat.f_constant_pad_nd([0, self.width - self.groups * self.group_width])?;
        shape.push(self.width);
        Ok(padded.f_reshape(shape)?)
    }
}

/// Rows of small unsigned codes in one or more terms:
/// `x̂[r, c] = Σ_terms scale[r, g] · (codes[r, c] − zero_point[r, g])`.
#[derive(Debug)]
pub struct GpuCodes {
    pub(super) rows: i64,
    pub(super) padding: Padding,
    /// uint8 [terms, rows, width].
    pub(super) codes: Tensor,
    /// float32 [terms, groups, rows, 4]: scale, −scale · zero point, Σ x̂, Σ codes.
    pub(super) grids: Tensor,
}

impl GpuCodes {
    /// Codes for a kernel to fill.
    pub(super) fn empty(terms: i64, rows: i64, padding: Padding, like: &Tensor) -> Result<Self> {
        let device = like.device();
        Ok(Self {
            rows,
            padding,
            codes: Tensor::f_empty([terms, rows, padding.width], (Kind::Uint8, device))?,
            grids: Tensor::f_empty([terms, padding.groups, rows, 4], (Kind::Float, device))?,
        })
    }

    /// The codes of integer terms, by tensor operations on their device; `None` where a scale differs
    /// along the summed axis in another way than by contiguous groups, or codes of `code_bits` bits
    /// need more than two bytes.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn of_terms(terms: &[IntTerm], code_bits: u32) -> Result<Option<Self>> {
        let Some(first) = terms.first() else { return Ok(None) };
        let shape = first.codes.size();
        let Some((columns, outer)) = shape.split_last() else { return Ok(None) };
        let last = |x: &Tensor| x.size().last().copied().unwrap_or(1);
        let groups =
            terms.iter().flat_map(|term| [last(&term.scale), last(&term.zero_point)]).max();
        let Some(padding) = groups.and_then(|groups| Padding::new(*columns, groups)) else {
            return Ok(None);
        };
        // A scale for every channel is no group that a product could sum.
        if code_bits > 2 * u8::BITS || (padding.groups > 1 && padding.group() == 1) {
            return Ok(None);
        }
        let terms = bytes_of(terms, code_bits)?;
        if terms.len() as i64 * padding.groups > MAX_SEGMENTS {
            return Ok(None);
        }
        let rows: i64 = outer.iter().product();
        let parameters = [outer, &[padding.groups]].concat();
        let (mut codes, mut grids) = (Vec::new(), Vec::new());
        for ByteTerm { term, .. } in &terms {
            let dense = |x: &Tensor| -> Result<Tensor> {
                let x = x.f_to_kind(Kind::Float)?.f_expand(&parameters, false)?;
                Ok(x.f_reshape([rows, padding.groups])?)
            };
            let (scale, zero_point) = (dense(&term.scale)?, dense(&term.zero_point)?);
            let bytes = term.codes.f_reshape([rows, *columns])?;
            grids.push(grid_of(&bytes, &scale, &zero_point, padding)?);
            codes.push(padding.pad(&bytes.f_to_kind(Kind::Uint8)?)?);
        }
        Ok(Some(Self {
            rows,
            padding,
            codes: Tensor::f_stack(&codes, 0)?,
            grids: Tensor::f_stack(&grids, 0)?.f_contiguous()?,
        }))
    }

    /// `count` rows from the one at `first` on.
    pub(super) fn part(&self, first: i64, count: i64) -> Result<Self> {
        Ok(Self {
            rows: count,
            padding: self.padding,
            codes: self.codes.f_narrow(1, first, count)?.f_contiguous()?,
            grids: self.grids.f_narrow(2, first, count)?.f_contiguous()?,
        })
    }

    /// Groups of columns.
    pub fn groups(&self) -> i64 {
        self.padding.groups
    }

    /// Terms.
    pub(super) fn terms(&self) -> i64 {
        self.codes.size()[0]
    }

    /// x̂ float32 [rows, columns], by tensor operations.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn decode(&self) -> Result<Tensor> {
        let Padding { columns, groups, group_width, .. } = self.padding;
        let shape = [self.terms(), self.rows, groups, group_width];
        let codes = self.codes.f_narrow(2, 0, groups * group_width)?.f_reshape(shape)?;
        let codes = codes.f_narrow(3, 0, self.padding.group())?.f_to_kind(Kind::Float)?;
        let parameter = |index: i64| -> Result<Tensor> {
            Ok(self.grids.f_select(3, index)?.f_transpose(1, 2)?.f_unsqueeze(-1)?)
        };
        let terms = codes.f_mul(&parameter(0)?)?.f_add(&parameter(1)?)?;
        let sum = terms.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?;
        Ok(sum.f_reshape([self.rows, columns])?)
    }
}

/// [groups, rows, 4] of codes [rows, columns] on grids [rows, groups].
fn grid_of(codes: &Tensor, scale: &Tensor, zero: &Tensor, padding: Padding) -> Result<Tensor> {
    let rows = codes.size()[0];
    let sums = codes.f_reshape([rows, padding.groups, padding.group()])?.f_sum_dim_intlist(
        [-1i64].as_slice(),
        false,
        Kind::Float,
    )?;
    let values = sums.f_sub(&zero.f_mul_scalar(padding.group() as f64)?)?.f_mul(scale)?;
    let offset = scale.f_mul(zero)?.f_neg()?;
    let grids = Tensor::f_stack(&[scale.shallow_clone(), offset, values, sums], -1)?; // [rows, groups, 4]
    Ok(grids.f_transpose(0, 1)?.f_contiguous()?)
}

/// Rows of codes on one grid that was known before they were.
#[derive(Debug)]
pub struct FixedCodes {
    pub(super) rows: i64,
    /// One group.
    pub(super) padding: Padding,
    /// uint8 [rows, width].
    pub(super) codes: Tensor,
    pub(super) grid: Grid,
}

impl FixedCodes {
    /// x̂ float32 [rows, columns], by tensor operations.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn decode(&self) -> Result<Tensor> {
        decoded(&self.codes.f_narrow(1, 0, self.padding.columns)?, self.grid)
    }
}

/// What codes on a grid stand for, float32.
pub(super) fn decoded(codes: &Tensor, Grid { scale, zero_point, .. }: Grid) -> Result<Tensor> {
    let codes = codes.f_to_kind(Kind::Float)?;
    Ok(codes.f_sub_scalar(f64::from(zero_point))?.f_mul_scalar(f64::from(scale))?)
}

/// A weight, packed once for left operands of a number of groups; codes of up to four bits stay two a
/// byte.
#[derive(Debug)]
pub struct GpuWeight {
    pub(super) rows: i64,
    /// Groups are those of the left operand.
    pub(super) padding: Padding,
    pub(super) nibbles: bool,
    /// uint8 [rows, width], or half of it.
    pub(super) codes: Tensor,
    /// float32 [rows, 4], as those of [`GpuCodes`]; only scale and offset are read.
    pub(super) grids: Tensor,
    /// float32 [groups, rows]: Σ codes.
    pub(super) sums: Tensor,
}

impl GpuWeight {
    /// Packs a weight of one term and one group; `None` for others, and where its columns do not divide
    /// into `groups`.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn pack(weight: &GpuCodes, groups: i64) -> Result<Option<Self>> {
        let columns = weight.padding.columns;
        let Some(padding) = Padding::new(columns, groups) else { return Ok(None) };
        if weight.terms() != 1 || weight.groups() != 1 {
            return Ok(None);
        }
        let rows = weight.rows;
        let codes = weight.codes.f_select(0, 0)?.f_narrow(1, 0, columns)?;
        let sums = codes.f_reshape([rows, groups, columns / groups])?.f_sum_dim_intlist(
            [-1i64].as_slice(),
            false,
            Kind::Float,
        )?;
        let nibbles = codes.f_max()?.f_int64_value(&[])? <= MAX_NIBBLE;
        let codes = padding.pad(&codes)?;
        let codes = if nibbles { pack_nibbles(&codes)? } else { codes };
        Ok(Some(Self {
            rows,
            padding,
            nibbles,
            codes: codes.f_contiguous()?,
            grids: weight.grids.f_reshape([rows, 4])?.f_contiguous()?,
            sums: sums.f_transpose(0, 1)?.f_contiguous()?,
        }))
    }

    /// Bytes of memory that it holds.
    pub fn resident_bytes(&self) -> u64 {
        let floats = self.grids.numel() + self.sums.numel();
        (self.codes.numel() + 4 * floats) as u64
    }
}

/// [rows, width] → [rows, width / 2]: byte i of 16 holds the codes i and i + 16 of 32.
fn pack_nibbles(codes: &Tensor) -> Result<Tensor> {
    let &[rows, width] = codes.size().as_slice() else {
        return Err(Error::internal("codes of a weight are no matrix"));
    };
    let halves = codes.f_reshape([rows, width / STEP, 2, STEP / 2])?;
    let (low, high) = (halves.f_select(2, 0)?, halves.f_select(2, 1)?);
    let packed = high.f_mul_scalar(MAX_NIBBLE + 1)?.f_bitwise_or_tensor(&low)?;
    Ok(packed.f_reshape([rows, width / 2])?)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::quant::uniform::laws::sample;

    fn term(codes: &Tensor, scale: &Tensor, zero: i64) -> IntTerm {
        let zero_point = scale.full_like(zero).to_kind(Kind::Int);
        IntTerm { codes: codes.to_kind(Kind::Int), scale: scale.shallow_clone(), zero_point }
    }

    fn codes(shape: &[i64], bits: u32, seed: i64) -> Tensor {
        (sample(shape, seed).abs() * 1e4).remainder(f64::from(1 << bits)).floor()
    }

    #[test]
    fn codes_decode_to_what_their_terms_do() {
        for (columns, groups, bits, terms) in
            [(48, 1, 4, 1), (48, 8, 4, 2), (384, 8, 5, 1), (37, 1, 8, 1), (40, 2, 15, 2)]
        {
            let scale = sample(&[2, 3, groups], 1).abs() + 0.1;
            let terms: Vec<IntTerm> = (0..terms)
                .map(|index| term(&codes(&[2, 3, columns], bits, index + 2), &scale, 3 + index))
                .collect();
            let expected = terms.iter().map(|term| term.dequantize().unwrap());
            let expected = expected.reduce(|a, b| a + b).unwrap().view([6, columns]);
            let found = GpuCodes::of_terms(&terms, bits).unwrap().unwrap();
            let largest = expected.abs().max().double_value(&[]);
            let decoded = found.decode().unwrap();
            let part = found.part(2, 3).unwrap();
            assert!(part.rows == 3 && part.codes.is_contiguous() && part.grids.is_contiguous());
            assert!(part.decode().unwrap().equal(&decoded.narrow(0, 2, 3)));
            assert!((&decoded - &expected).abs().max().double_value(&[]) <= 1e-6 * largest);
            // What a product adds for zero points of the other operand: Σ x̂ of a row.
            let sums =
                found.grids.select(3, 2).sum_dim_intlist([0i64, 1].as_slice(), false, Kind::Float);
            let totals = expected.sum_dim_intlist([1i64].as_slice(), false, Kind::Float);
            assert!(
                (sums - totals).abs().max().double_value(&[]) <= 1e-5 * largest * columns as f64
            );
        }
    }

    #[test]
    fn padding_is_zero_and_whole_steps() {
        let padding = Padding::new(384, 8).unwrap();
        assert_eq!((padding.group_width, padding.width), (64, 512));
        assert_eq!(Padding::new(48, 1).unwrap().width, 64);
        assert_eq!(
            Padding::new(72, 3).unwrap(),
            Padding { columns: 72, groups: 3, group_width: 32, width: 128 }
        );
        assert!(Padding::new(50, 8).is_none() && Padding::new(0, 1).is_none());
        let ones = Tensor::ones([2, 72], (Kind::Uint8, Device::Cpu));
        let padded = Padding::new(72, 3).unwrap().pad(&ones).unwrap();
        assert_eq!(padded.sum(Kind::Int64).int64_value(&[]), 144);
        assert_eq!(padded.select(0, 0).narrow(0, 24, 8).sum(Kind::Int64).int64_value(&[]), 0);
        assert_eq!(padded.select(0, 0).narrow(0, 32, 24).sum(Kind::Int64).int64_value(&[]), 24);
    }

    #[test]
    fn weights_of_four_bits_take_half_a_byte() {
        let scale = sample(&[5, 1], 1).abs() + 0.1;
        let pack = |bits: u32, groups: i64| {
            let codes = GpuCodes::of_terms(&[term(&codes(&[5, 64], bits, 2), &scale, 7)], bits);
            GpuWeight::pack(&codes.unwrap().unwrap(), groups).unwrap().unwrap()
        };
        let (narrow, wide) = (pack(4, 2), pack(8, 2));
        assert_eq!((narrow.codes.size(), wide.codes.size()), (vec![5, 32], vec![5, 64]));
        let first = codes(&[5, 64], 4, 2).to_kind(Kind::Int64);
        for (byte, column) in [(0, 0), (15, 15), (16, 32), (31, 47)] {
            let value = narrow.codes.int64_value(&[3, byte]);
            assert_eq!(value & 15, first.int64_value(&[3, column]));
            assert_eq!(value >> 4, first.int64_value(&[3, column + 16]));
        }
        let sums = first.view([5, 2, 32]).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
        assert!(narrow.sums.equal(&sums.transpose(0, 1)));
        assert!(narrow.resident_bytes() < wide.resident_bytes());
    }

    #[test]
    fn scales_of_single_channels_have_no_codes() {
        let scale = sample(&[1, 1, 16], 1).abs() + 0.1;
        assert!(
            GpuCodes::of_terms(&[term(&codes(&[2, 3, 16], 4, 2), &scale, 0)], 4).unwrap().is_none()
        );
        let scale = sample(&[1, 1, 1], 1).abs() + 0.1;
        assert!(
            GpuCodes::of_terms(&[term(&codes(&[2, 3, 16], 4, 2), &scale, 0)], 17)
                .unwrap()
                .is_none()
        );
    }
}
