//! The right operand, packed once for many products.

use std::ops::Range;

use crate::kernels::Codes;
use crate::kernels::aligned::AlignedBytes;
use crate::kernels::cpu::{InstructionSet, Kernel};
use crate::kernels::pack::{Operand, Uses};

/// Largest code of which two share a byte.
pub(super) const MAX_NIBBLE: u8 = 15;

/// Bytes of a step of the widest panel.
pub(super) const MAX_STEP: usize = 128;

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
    pub(super) codes: AlignedBytes,
    pub(super) nibbles: bool,
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
        let operand = Operand {
            codes,
            first: 0,
            rows: codes.rows,
            lhs_groups,
            lhs_max_code,
            uses: Uses::Many,
        };
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
    /// A panel's `bytes` codes, if they are packed as the kernel reads them.
    #[inline(always)]
    pub(super) fn unpacked(&self, panel: usize, kernel: Kernel, bytes: usize) -> Option<&[u8]> {
        let plain = !self.nibbles && kernel.step() == 4;
        plain.then(|| &self.codes.as_slice()[panel * bytes..(panel + 1) * bytes])
    }

    /// All that is kept of some panels' codes, `bytes` of each as the kernel reads them.
    pub(super) fn kept(&self, panels: Range<usize>, kernel: Kernel, bytes: usize) -> &[u8] {
        let codes = bytes * kernel.step() / 4;
        let bytes = if self.nibbles { codes / 2 } else { codes };
        &self.codes.as_slice()[panels.start * bytes..panels.end * bytes]
    }

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
                return out.copy_from_slice(from);
            }
            for (to, from) in out.chunks_exact_mut(2).zip(from) {
                to.copy_from_slice(&i16::from(from.cast_signed()).to_ne_bytes());
            }
            return;
        }
        let from = &bytes[panel * codes / 2..(panel + 1) * codes / 2];
        let (mut low, mut high) = ([0; MAX_STEP], [0; MAX_STEP]);
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
