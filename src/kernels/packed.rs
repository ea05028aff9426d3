//! The right operand, packed once for many products.

use std::ops::Range;

use crate::kernels::aligned::AlignedBytes;
use crate::kernels::cpu::{InstructionSet, Kernel};
use crate::kernels::{Codes, CodesTerm};

/// Largest code of which two share a byte.
const MAX_NIBBLE: u8 = 15;

/// Short runs of 16-bit sums cost more than they save.
const MIN_NARROW_STEPS: usize = 3;

/// A weight or the right operand of an attention product,
/// `ŵ[o, k] = Σ_terms scale[o] · (codes[o, k] − zero_point[o])`, laid out for the kernels.
///
/// Rows of the operand, which are columns of the result, lie side by side in panels: panel, step of
/// the summed axis, row, code. Codes of up to four bits stay two per byte: a byte holds the codes of
/// the first half of the panel's rows in its low bits, those of the second half in its high bits.
/// Other codes are centred to `i8`.
#[derive(Debug)]
pub struct PackedRhs {
    rows: usize,
    columns: usize,
    pub(super) lhs_groups: usize,
    pub(super) lhs_max_code: u8,
    pub(super) kernel: Kernel,
    /// Steps that are summed before sums are widened; at most the steps of a group.
    pub(super) run_steps: usize,
    pub(super) terms: Vec<PackedTerm>,
}

/// One term of a packed operand.
#[derive(Debug)]
pub(super) struct PackedTerm {
    codes: AlignedBytes,
    nibbles: bool,
    /// What is taken off each code to make it an `i8`, a row each; padded to whole panels.
    pub(super) centre: Vec<u8>,
    /// Padded to whole panels.
    pub(super) scale: Vec<f32>,
    /// zero point − centre, padded to whole panels; empty if zero throughout.
    pub(super) residual: Vec<f32>,
}

impl PackedRhs {
    /// Packs `codes` (one group) for left operands of `lhs_groups` groups and codes up to
    /// `lhs_max_code`.
    ///
    /// # Panics
    /// When the lengths of `codes` do not fit together, or a group has more than
    /// [`MAX_GROUP_COLUMNS`](crate::kernels::MAX_GROUP_COLUMNS) columns.
    pub fn pack(codes: &Codes, lhs_groups: usize, lhs_max_code: u8) -> Self {
        codes.check();
        let operand = Operand { codes, first: 0, rows: codes.rows, lhs_groups, lhs_max_code };
        Self::pack_rows(&operand, InstructionSet::best())
    }

    /// Packs some rows for an instruction set that this machine has.
    pub(super) fn pack_rows(operand: &Operand<'_>, set: InstructionSet) -> Self {
        assert_eq!(operand.codes.groups, 1, "groups of the right operand");
        assert!(operand.lhs_groups > 0, "left operand without a group");
        assert!(operand.codes.columns.is_multiple_of(operand.lhs_groups), "groups of unequal size");
        let narrow = set.narrow_kernel().and_then(|kernel| {
            let run_steps = operand.narrow_run_steps(kernel);
            (run_steps >= MIN_NARROW_STEPS.min(operand.group_steps(kernel)))
                .then_some((kernel, run_steps))
        });
        let (kernel, run_steps) = narrow.unwrap_or_else(|| {
            let kernel = set.wide_kernel();
            (kernel, operand.group_steps(kernel))
        });
        Self {
            rows: operand.rows,
            columns: operand.codes.columns,
            lhs_groups: operand.lhs_groups,
            lhs_max_code: operand.lhs_max_code,
            kernel,
            run_steps: run_steps.max(1),
            terms: operand.codes.terms.iter().map(|term| operand.pack(term, kernel)).collect(),
        }
    }

    /// Bytes of memory that it holds.
    pub fn resident_bytes(&self) -> u64 {
        let bytes = |term: &PackedTerm| {
            term.codes.as_slice().len()
                + term.centre.len()
                + 4 * (term.scale.len() + term.residual.len())
        };
        self.terms.iter().map(|term| bytes(term) as u64).sum()
    }

    /// Number of rows: columns of the result.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Length of the summed axis.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Runs the inner instructions of its kernel from registers, for benchmarks: what a product could
    /// reach at best. Returns the number of multiplications.
    pub fn spin(&self, steps: u64) -> u64 {
        self.kernel.spin(steps)
    }

    /// Number of panels.
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(self.kernel.panel_columns())
    }

    /// Steps of the summed axis in one group.
    pub(super) fn group_steps(&self) -> usize {
        (self.columns / self.lhs_groups).div_ceil(self.kernel.step())
    }
}

impl PackedTerm {
    /// Writes a panel's codes to `out` as the kernel reads them: centred, one per byte (or per two
    /// bytes where a step is two codes).
    #[inline(always)]
    pub(super) fn unpack(&self, panel: usize, kernel: Kernel, out: &mut [u8]) {
        let (width, step) = (kernel.panel_columns(), kernel.step());
        let bytes = self.codes.as_slice();
        let codes = out.len() * step / 4;
        if !self.nibbles {
            let from = &bytes[panel * codes..(panel + 1) * codes];
            if step == 4 {
                out.copy_from_slice(from);
                return;
            }
            for (to, from) in out.chunks_exact_mut(2).zip(from) {
                to.copy_from_slice(&i16::from(from.cast_signed()).to_ne_bytes());
            }
            return;
        }
        let from = &bytes[panel * codes / 2..(panel + 1) * codes / 2];
        let (mut low, mut high) = ([0; MAX_HALF], [0; MAX_HALF]);
        let half = width * step / 2; // bytes of a packed step
        for (i, (low, high)) in low.iter_mut().zip(&mut high).enumerate().take(half) {
            *low = self.centre[panel * width + i / step];
            *high = self.centre[panel * width + width / 2 + i / step];
        }
        let (low, high) = (&low[..half], &high[..half]);
        if step == 4 {
            for (to, from) in out.chunks_exact_mut(2 * half).zip(from.chunks_exact(half)) {
                let (to_low, to_high) = to.split_at_mut(half);
                for i in 0..half {
                    to_low[i] = (from[i] & MAX_NIBBLE).wrapping_sub(low[i]);
                    to_high[i] = (from[i] >> 4).wrapping_sub(high[i]);
                }
            }
            return;
        }
        for (to, from) in out.chunks_exact_mut(4 * half).zip(from.chunks_exact(half)) {
            let (to_low, to_high) = to.split_at_mut(2 * half);
            let wide = |code: u8, centre: u8| (i16::from(code) - i16::from(centre)).to_ne_bytes();
            for (i, (to_low, to_high)) in
                to_low.chunks_exact_mut(2).zip(to_high.chunks_exact_mut(2)).enumerate()
            {
                to_low.copy_from_slice(&wide(from[i] & MAX_NIBBLE, low[i]));
                to_high.copy_from_slice(&wide(from[i] >> 4, high[i]));
            }
        }
    }
}

/// Bytes of a packed step of the widest panel.
const MAX_HALF: usize = 64;

/// Rows `first..first + rows` of a right operand.
pub(super) struct Operand<'a> {
    pub(super) codes: &'a Codes,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) lhs_groups: usize,
    pub(super) lhs_max_code: u8,
}

impl Operand<'_> {
    fn group_steps(&self, kernel: Kernel) -> usize {
        (self.codes.columns / self.lhs_groups).div_ceil(kernel.step())
    }

    fn range(&self) -> Range<usize> {
        self.first..self.first + self.rows
    }

    /// How many steps 16-bit sums can take, whatever the left operand holds.
    ///
    /// A lane sums `(x − z) · w` over two codes a step, with x and z in 0..=max. With P and N the sums
    /// of its positive and its negative weights, that lies within ±max · larger(P, N), and so does
    /// every pair of products, which `vpmaddubsw` would saturate otherwise. (Sums on the way may
    /// leave 16 bits: they are taken modulo 2^16.)
    fn narrow_run_steps(&self, kernel: Kernel) -> usize {
        let group_steps = self.group_steps(kernel);
        let limit = usize::from(i16::MAX.unsigned_abs()) / usize::from(self.lhs_max_code.max(1));
        let largest = |term: &CodesTerm| {
            let centre = |row| centre(term.zero_point[row], term.max_code);
            self.range()
                .map(|row| centre(row).max(term.max_code - centre(row).min(term.max_code)))
                .max()
                .map_or(0, usize::from)
        };
        let largest = self.codes.terms.iter().map(largest).max().unwrap_or(0);
        (limit / (2 * largest).max(1)).min(group_steps)
    }

    fn pack(&self, term: &CodesTerm, kernel: Kernel) -> PackedTerm {
        let (width, step) = (kernel.panel_columns(), kernel.step());
        let padded = self.rows.next_multiple_of(width);
        let group_columns = self.codes.columns / self.lhs_groups;
        let group_steps = self.group_steps(kernel);
        let panel_steps = group_steps * self.lhs_groups;

        let mut centre: Vec<u8> =
            self.range().map(|row| centre(term.zero_point[row], term.max_code)).collect();
        let mut residual: Vec<f32> = self
            .range()
            .zip(&centre)
            .map(|(row, &centre)| (i64::from(term.zero_point[row]) - i64::from(centre)) as f32)
            .collect();
        if residual.iter().all(|&residual| residual == 0.0) {
            residual.clear();
        } else {
            residual.resize(padded, 0.0);
        }
        centre.resize(padded, 0);
        let mut scale = term.scale[self.range()].to_vec();
        scale.resize(padded, 0.0);

        let nibbles = term.max_code <= MAX_NIBBLE;
        let panel_bytes = panel_steps * width * step;
        let mut packed =
            AlignedBytes::zeroed(padded * panel_steps * step / (1 + usize::from(nibbles)));
        let mut panel = vec![0u8; panel_bytes];
        for (index, to) in packed
            .as_mut_slice()
            .chunks_exact_mut(panel_bytes.max(1) / (1 + usize::from(nibbles)))
            .enumerate()
        {
            panel.fill(0);
            for lane in 0..width.min(self.rows - index * width) {
                let row = index * width + lane;
                let codes =
                    &term.codes[(self.first + row) * self.codes.columns..][..self.codes.columns];
                for (group, codes) in codes.chunks_exact(group_columns.max(1)).enumerate() {
                    let start = group * group_steps * width * step + lane * step;
                    let to = &mut panel[start..];
                    match step {
                        4 => interleave::<4>(codes, width * step, centre[row], to),
                        _ => interleave::<2>(codes, width * step, centre[row], to),
                    }
                }
            }
            let centre = &centre[index * width..][..width];
            if nibbles {
                let half = width * step / 2;
                for (to, from) in to.chunks_exact_mut(half).zip(panel.chunks_exact(2 * half)) {
                    for i in 0..half {
                        to[i] = from[i] | from[half + i] << 4;
                    }
                }
            } else {
                let centre: Vec<u8> = (0..width * step).map(|i| centre[i / step]).collect();
                for (to, from) in
                    to.chunks_exact_mut(width * step).zip(panel.chunks_exact(width * step))
                {
                    for i in 0..width * step {
                        to[i] = from[i].wrapping_sub(centre[i]);
                    }
                }
            }
        }
        PackedTerm { codes: packed, nibbles, centre, scale, residual }
    }
}

/// Writes `codes`, `STEP` at a time, to every `stride` bytes of `to`; the last ones padded.
fn interleave<const STEP: usize>(codes: &[u8], stride: usize, padding: u8, to: &mut [u8]) {
    let (whole, rest) = codes.as_chunks::<STEP>();
    for (from, to) in whole.iter().zip(to.chunks_mut(stride)) {
        to[..STEP].copy_from_slice(from);
    }
    if !rest.is_empty() {
        let to = &mut to[whole.len() * stride..][..STEP];
        to.fill(padding);
        to[..rest.len()].copy_from_slice(rest);
    }
}

/// The number nearest to the zero point that makes every code up to `max_code` an `i8`, and neither
/// larger nor smaller than the grid.
fn centre(zero_point: i32, max_code: u8) -> u8 {
    let largest = i32::from(max_code).min(128);
    let smallest = (i32::from(max_code) - 127).max(0);
    u8::try_from(zero_point.clamp(smallest, largest)).unwrap_or(0)
}
