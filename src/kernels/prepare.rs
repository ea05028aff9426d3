//! The left operand of one block of rows, laid out for the kernels.

use std::ops::Range;

use crate::kernels::aligned::AlignedBytes;
use crate::kernels::cpu::sums;
use crate::kernels::passes::vectorized;
use crate::kernels::{Codes, CodesTerm, PackedRhs};

/// A block of rows of the left operand, tile by tile.
#[derive(Debug, Default)]
pub(super) struct Block {
    pub(super) rows: usize,
    /// The first `terms` of these are in use.
    pub(super) terms: Vec<BlockTerm>,
}

/// One term. Parameters are laid out [tile, group, row of the tile].
#[derive(Debug, Default)]
pub(super) struct BlockTerm {
    /// Padded or widened rows: all, or the last where the operand's own rows will do for the others.
    pub(super) codes: AlignedBytes,
    /// Zero points as far as they lie within the grid.
    pub(super) zero_points: Vec<i32>,
    /// Scales.
    pub(super) scales: Vec<f32>,
    /// −scale · (what a zero point lies outside the grid).
    pub(super) outside: Vec<f32>,
    /// Whether `outside` is other than zero anywhere.
    pub(super) any_outside: bool,
    /// scale · Σ (code − zero point), if the right operand needs it.
    pub(super) centred: Vec<f32>,
    /// Whether anything but zero is summed, [tile, group].
    pub(super) active: Vec<bool>,
}

impl Block {
    /// Lays out rows `range` of `lhs`.
    pub(super) fn fill(&mut self, lhs: &Codes, range: Range<usize>, rhs: &PackedRhs) {
        self.rows = range.len();
        self.terms.resize_with(self.terms.len().max(lhs.terms.len()), BlockTerm::default);
        for (to, from) in self.terms.iter_mut().zip(&lhs.terms) {
            to.fill(lhs, from, range.clone(), rhs);
        }
    }
}

/// Whether the kernel can read the operand's own rows: steps are of single bytes, and where the last step
/// goes beyond the row, the right operand has zeros. The last row of all must not be read beyond.
pub(super) fn reads_plain_rows(lhs: &Codes, rhs: &PackedRhs) -> bool {
    let whole = lhs.group_columns().is_multiple_of(4);
    rhs.kernel.step() == 4 && (whole || (lhs.groups == 1 && lhs.columns > 4))
}

vectorized! {
    fn sum(codes: &[u8]) -> u32 {
        codes.iter().map(|&code| u32::from(code)).sum()
    }
}

vectorized! {
    fn all_are(codes: &[u8], zero: u8) -> bool {
        codes.iter().fold(0, |any, code| any | (code ^ zero)) == 0
    }
}

impl BlockTerm {
    fn fill(&mut self, lhs: &Codes, term: &CodesTerm, range: Range<usize>, rhs: &PackedRhs) {
        let copied =
            if reads_plain_rows(lhs, rhs) { range.end - 1..range.end } else { range.clone() };
        self.copy_codes(lhs, term, copied, rhs);
        let height = rhs.kernel.tile_rows(sums(lhs, rhs));
        let tiles = range.len().div_ceil(height);
        let needs_centred = rhs.terms.iter().any(|term| !term.residual.is_empty());
        let parameters = tiles * lhs.groups * height;
        self.zero_points.resize(parameters, 0);
        self.scales.resize(parameters, 0.0);
        self.outside.resize(parameters, 0.0);
        self.centred.resize(if needs_centred { parameters } else { 0 }, 0.0);
        self.any_outside = false;
        self.active.clear();
        // A single term is hardly ever zero throughout, and looking costs a pass.
        let looked_at = lhs.terms.len() > 1;
        self.active.resize(tiles * lhs.groups, !looked_at);

        let size = lhs.group_columns();
        let largest = i32::from(term.max_code);
        for (tile, first) in range.clone().step_by(height).enumerate() {
            let at = tile * lhs.groups;
            let count = height.min(range.end - first);
            if count < height {
                // Rows beyond the last one are computed, too, and not stored.
                let tile = at * height..(at + lhs.groups) * height;
                self.zero_points[tile.clone()].fill(0);
                self.scales[tile.clone()].fill(0.0);
                self.outside[tile].fill(0.0);
            }
            for (r, row) in (first..first + count).enumerate() {
                let of_row = row * lhs.groups..(row + 1) * lhs.groups;
                let grids = term.zero_point[of_row.clone()].iter().zip(&term.scale[of_row]);
                for (group, (&zero_point, &scale)) in grids.enumerate() {
                    let to = (at + group) * height + r;
                    let codes = || &term.codes[row * lhs.columns + group * size..][..size];
                    let inside = zero_point.clamp(0, largest);
                    (self.zero_points[to], self.scales[to]) = (inside, scale);
                    self.outside[to] = 0.0;
                    if inside != zero_point {
                        let beyond = i64::from(zero_point) - i64::from(inside);
                        self.outside[to] = -scale * beyond as f32;
                        self.any_outside = true;
                    }
                    if looked_at && !self.active[at + group] {
                        let zero = u8::try_from(zero_point);
                        self.active[at + group] = !zero.is_ok_and(|zero| all_are(codes(), zero));
                    }
                    if needs_centred {
                        let sum = i64::from(sum(codes())) - i64::from(zero_point) * size as i64;
                        self.centred[to] = scale * sum as f32;
                    }
                }
            }
        }
    }

    /// Copies codes so that every group is whole steps, 4 bytes each.
    fn copy_codes(&mut self, lhs: &Codes, term: &CodesTerm, range: Range<usize>, rhs: &PackedRhs) {
        let size = lhs.group_columns();
        let padded = 4 * rhs.group_steps();
        self.codes.resize(range.len() * lhs.groups * padded);
        let from = &term.codes[range.start * lhs.columns..range.end * lhs.columns];
        let groups = self.codes.as_mut_slice().chunks_exact_mut(padded.max(1));
        for (to, from) in groups.zip(from.chunks_exact(size.max(1))) {
            if rhs.kernel.step() == 4 {
                to[..size].copy_from_slice(from);
                to[size..].fill(0);
            } else {
                for (to, from) in to.chunks_exact_mut(2).zip(from) {
                    to.copy_from_slice(&u16::from(*from).to_ne_bytes());
                }
                to[2 * size..].fill(0);
            }
        }
    }
}
