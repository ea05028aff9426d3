//! How a right operand is packed, and how long 16-bit sums of it are exact.

use std::ops::Range;

use crate::kernels::aligned::AlignedBytes;
use crate::kernels::cpu::Kernel;
use crate::kernels::packed::{MAX_NIBBLE, MAX_STEP, PackedTerm};
use crate::kernels::{Codes, CodesTerm};

/// Rows `first..first + rows` of a right operand.
pub(super) struct Operand<'a> {
    pub(super) codes: &'a Codes,
    pub(super) first: usize,
    pub(super) rows: usize,
    pub(super) lhs_groups: usize,
    pub(super) lhs_max_code: u8,
    pub(super) uses: Uses,
}

/// How often a packed operand will be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Uses {
    /// Once: packing must be quick.
    Once,
    /// Again and again: it should be small and fit its kernel well.
    Many,
}

impl<'a> Operand<'a> {
    /// A matrix of many in `codes`, for one product with rows like those of `lhs`.
    pub(super) fn of_batch(lhs: &Codes, codes: &'a Codes, first: usize, rows: usize) -> Self {
        let (lhs_groups, lhs_max_code) = (lhs.groups, lhs.max_code());
        Self { codes, first, rows, lhs_groups, lhs_max_code, uses: Uses::Once }
    }

    pub(super) fn group_steps(&self, kernel: Kernel) -> usize {
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
    pub(super) fn narrow_run_steps(&self, kernel: Kernel) -> usize {
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
        let safe = (limit / (2 * largest).max(1)).min(group_steps);
        if self.uses == Uses::Once {
            return safe;
        }
        // Few weights are the largest: see how far these ones go.
        let mut steps = group_steps;
        while steps > safe {
            let fitting = self.fitting_steps(steps, limit);
            if fitting == steps {
                return steps;
            }
            steps = fitting;
        }
        safe
    }

    /// The first number of steps after which a run of `steps` has sums of weights beyond `limit`.
    fn fitting_steps(&self, steps: usize, limit: usize) -> usize {
        let columns = self.codes.columns;
        let group_columns = columns / self.lhs_groups;
        let mut fitting = steps;
        for term in &self.codes.terms {
            for row in self.range() {
                let centre = centre(term.zero_point[row], term.max_code);
                let codes = &term.codes[row * columns..][..columns];
                for group in codes.chunks_exact(group_columns.max(1)) {
                    for run in group.chunks(4 * steps) {
                        let overflow = overflowing_step(run, centre, limit);
                        fitting = fitting.min(overflow.unwrap_or(fitting));
                    }
                }
            }
        }
        fitting
    }

    pub(super) fn pack(&self, term: &CodesTerm, kernel: Kernel) -> PackedTerm {
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

        let nibbles = term.max_code <= MAX_NIBBLE && self.uses == Uses::Many;
        let panel_bytes = panel_steps * width * step;
        let packed_bytes = if nibbles { panel_bytes / 2 } else { panel_bytes };
        let mut packed = AlignedBytes::zeroed(padded / width * packed_bytes);
        let mut whole = vec![0; if nibbles { panel_bytes } else { 0 }];
        let panels = packed.as_mut_slice().chunks_exact_mut(packed_bytes.max(1));
        for (index, packed) in panels.enumerate() {
            whole.fill(0);
            let panel = if nibbles { &mut whole[..] } else { &mut *packed };
            for lane in 0..width.min(self.rows - index * width) {
                let row = index * width + lane;
                let codes = &term.codes[(self.first + row) * self.codes.columns..];
                let groups = codes[..self.codes.columns].chunks_exact(group_columns.max(1));
                for (group, codes) in groups.enumerate() {
                    let to = &mut panel[(group * group_steps * width + lane) * step..];
                    match step {
                        4 => interleave::<4>(codes, width * step, centre[row], to),
                        _ => interleave::<2>(codes, width * step, centre[row], to),
                    }
                }
            }
            if nibbles {
                join_halves(&whole, width * step, packed);
            } else {
                subtract(&centre[index * width..][..width], step, packed);
            }
        }
        PackedTerm { codes: packed, nibbles, centre, scale, residual }
    }
}

/// The step of four codes in which the positive or the negative weights of a lane exceed `limit`.
fn overflowing_step(codes: &[u8], centre: u8, limit: usize) -> Option<usize> {
    let mut sums = [[0usize; 2]; 2]; // [lane, sign]
    for (index, step) in codes.chunks(4).enumerate() {
        for (at, &code) in step.iter().enumerate() {
            sums[at / 2][usize::from(code < centre)] += usize::from(code.abs_diff(centre));
        }
        if sums.iter().flatten().any(|&sum| sum > limit) {
            return Some(index);
        }
    }
    None
}

/// Puts the second half of every step into the high bits of the first.
fn join_halves(codes: &[u8], step_bytes: usize, packed: &mut [u8]) {
    let half = step_bytes / 2;
    for (to, from) in packed.chunks_exact_mut(half).zip(codes.chunks_exact(step_bytes)) {
        let (low, high) = from.split_at(half);
        for ((to, low), high) in to.iter_mut().zip(low).zip(high) {
            *to = low | high << 4;
        }
    }
}

/// Takes a number off every code of a panel, one for each lane.
fn subtract(centre: &[u8], step: usize, codes: &mut [u8]) {
    let mut lanes = [0; MAX_STEP];
    for (lane, &centre) in lanes.chunks_exact_mut(step).zip(centre) {
        lane.fill(centre);
    }
    let lanes = &lanes[..centre.len() * step];
    for codes in codes.chunks_exact_mut(lanes.len()) {
        for (code, lane) in codes.iter_mut().zip(lanes) {
            *code = code.wrapping_sub(*lane);
        }
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
