//! Operands as the kernels see them: which tensors they take, where values are, what a token is.

use tch::{Kind, Tensor};

use super::gpu::{Gpu, address, to_i32};
use crate::error::Result;

/// Where the tokens of an operand are: blocks (a head of a window) of `rows` rows of `width` values.
/// Blocks share tokens: the heads of a window, or of the windows of a quadrant.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tokens {
    pub(super) rows: i32,
    pub(super) width: i32,
    pub(super) heads: i32,
    /// Windows along a side of a quadrant; 0: every window for itself.
    pub(super) half: i32,
}

impl Tokens {
    /// Every row of `x` a token of its own.
    ///
    /// # Errors
    /// `Internal` for more rows than a kernel counts.
    pub fn rows_of(x: &Tensor) -> Result<Self> {
        match x.size().as_slice() {
            // Blocks, which may lie apart.
            &[_, _, rows, width] => Self::new(rows, width, 1, 0),
            shape => {
                let width = shape.last().copied().unwrap_or(1).max(1);
                Self::new(x.numel() as i64 / width, width, 1, 0)
            }
        }
    }

    /// Blocks of `rows` rows of `width` values; the tokens of `heads` blocks are the same, and those of
    /// `half` × `half` windows, if it is not 0.
    ///
    /// # Errors
    /// `Internal` for numbers beyond 32 bits.
    pub fn new(rows: i64, width: i64, heads: i64, half: i64) -> Result<Self> {
        Ok(Self {
            rows: to_i32(rows)?,
            width: to_i32(width)?,
            heads: to_i32(heads)?,
            half: to_i32(half)?,
        })
    }

    /// Number of tokens of an operand of that many values.
    pub(super) fn count(self, values: i64) -> i64 {
        let quadrant = i64::from(self.half * self.half).max(1);
        values / (i64::from(self.width) * i64::from(self.heads) * quadrant).max(1)
    }
}

/// Where the values of an operand are.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    x: u64,
    window: i64,
    head: i64,
    row: i64,
    heads: i32,
    aligned: i32,
}

impl Memory {
    /// Values that are read at once, if rows allow it.
    const RUN: i64 = 4;
    /// Their bytes, of which an address is then a multiple.
    pub(super) const ALIGNMENT: u64 = Self::RUN as u64 * size_of::<f32>() as u64;

    /// Rows, whose values can be read at once, from an address on; windows, their blocks and rows are so many values
    /// apart.
    pub(super) fn new(x: u64, [window, head, row]: [i64; 3], heads: i32) -> Self {
        Self { x, window, head, row, heads, aligned: 1 }
    }

    /// Where the rows of `x` are in groups: a tensor that [`dense`] gave.
    pub(super) fn of(x: &Tensor, tokens: Tokens, groups: i64) -> Result<Self> {
        let (rows, width) = (i64::from(tokens.rows), i64::from(tokens.width));
        let (heads, [window, head, row]) = match (x.size().as_slice(), x.stride().as_slice()) {
            (&[_, heads, ..], &[window, head, row, 1]) => (heads, [window, head, row]),
            _ => (1, [rows * width, 0, width]),
        };
        let is_run = |n: i64| n % Self::RUN == 0;
        let address = address(Some(x));
        let aligned = address.is_multiple_of(Self::ALIGNMENT)
            && [window, head, row].into_iter().all(is_run)
            && is_run(width / groups.max(1));
        Ok(Self {
            x: address,
            window,
            head,
            row,
            heads: to_i32(heads)?,
            aligned: i32::from(aligned),
        })
    }
}

/// `x` as the kernels take it; `None` where tensor code has to do.
pub(super) fn dense(x: &Tensor) -> Result<Option<(&'static Gpu, Tensor)>> {
    if x.kind() != Kind::Float || x.requires_grad() || x.numel() == 0 || x.dim() == 0 {
        return Ok(None);
    }
    let Some(gpu) = Gpu::of(x) else { return Ok(None) };
    // Blocks may lie apart, as heads do in what a linear gave; values of a row may not.
    let in_rows = matches!(x.stride().as_slice(), &[_, _, _, 1]);
    Ok(Some((gpu, if in_rows { x.shallow_clone() } else { x.f_contiguous()? })))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn heads_are_read_where_a_linear_left_them() {
        let qkv = Tensor::zeros([2, 5, 3 * 2 * 8], (Kind::Float, Device::Cpu));
        let parts = qkv.view([2, 5, 3, 2, 8]).permute([2, 0, 3, 1, 4]);
        let k = parts.select(0, 1); // [2, 2, 5, 8]
        let memory = Memory::of(&k, Tokens::new(5, 8, 2, 0).unwrap(), 1).unwrap();
        assert_eq!((memory.window, memory.head, memory.row, memory.heads), (240, 8, 48, 2));
        assert_eq!(memory.x - address(Some(&qkv)), 16 * 4);
        assert_eq!(memory.aligned, i32::from(memory.x.is_multiple_of(16)));
        // Groups of six cannot be read by fours.
        let x = Tensor::zeros([2, 5, 48], (Kind::Float, Device::Cpu));
        let memory = Memory::of(&x, Tokens::new(5, 48, 1, 0).unwrap(), 8).unwrap();
        assert_eq!((memory.window, memory.row, memory.heads, memory.aligned), (240, 48, 1, 0));
    }

    #[test]
    fn tokens_are_counted_once_for_all_heads_and_windows() {
        assert_eq!(Tokens::new(5, 8, 3, 0).unwrap().count(4 * 3 * 5 * 8), 20);
        // 4 × 4 windows, quadrants of 2 × 2.
        assert_eq!(Tokens::new(5, 8, 3, 2).unwrap().count(16 * 3 * 5 * 8), 20);
        let rows = Tokens::rows_of(&Tensor::zeros([2, 3, 7], (Kind::Float, Device::Cpu))).unwrap();
        assert_eq!((rows.rows, rows.width), (6, 7));
        let rows = Tokens::rows_of(&Tensor::zeros([2, 3, 5, 7], (Kind::Float, Device::Cpu)));
        assert_eq!(rows.unwrap().count(2 * 3 * 5 * 7), 30);
    }
}
