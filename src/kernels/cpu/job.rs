//! A block of rows times a range of panels: the loops around the tiles.

use std::ops::Range;

use super::tile::{Extent, Left, Right, Target, Tile};
use super::vector::Vector;
use crate::kernels::aligned::AlignedBytes;
use crate::kernels::codes::Codes;
use crate::kernels::prepare::{Block, reads_plain_rows};
use crate::kernels::{Finish, PackedRhs};

/// Unpacked codes that stay in the second-level cache. A tile's rows, which stay in the first, are
/// multiplied with all of them before the next tile, so that results are written in order.
const PANEL_BYTES: usize = 128 << 10;

/// Bytes of a line of the caches.
const LINE: usize = 64;

/// Sums of columns that do not wait for each other.
const CHAINS: usize = 4;

/// What one call computes: rows of the left operand times panels of the right one.
pub(in crate::kernels) struct Job<'a> {
    /// The left operand.
    pub(in crate::kernels) lhs: &'a Codes,
    /// Its rows.
    pub(in crate::kernels) rows: Range<usize>,
    /// The right operand.
    pub(in crate::kernels) rhs: &'a PackedRhs,
    /// Its panels.
    pub(in crate::kernels) panels: Range<usize>,
    /// One number per row of the whole right operand.
    pub(in crate::kernels) bias: Option<&'a [f32]>,
    /// What is done to the result.
    pub(in crate::kernels) finish: Option<Finish<'a>>,
}

/// Where the result of a job goes.
pub(in crate::kernels) enum Destination<'a, 'b> {
    /// Each row's part: the columns of the job's panels.
    Rows(&'a mut [&'b mut [f32]]),
    /// Nowhere but to what is done to the result.
    Nowhere(Passing),
}

/// What is seen of a result that is not kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::kernels) enum Passing {
    /// Every part of a row once.
    Parts,
    /// Every row at once.
    Rows,
}

impl Job<'_> {
    /// How many rescaled sums make up an element of the result.
    pub(in crate::kernels) fn sums(&self) -> usize {
        sums(self.lhs, self.rhs)
    }
}

/// How many rescaled sums make up an element of a product.
pub(in crate::kernels) fn sums(lhs: &Codes, rhs: &PackedRhs) -> usize {
    lhs.groups * lhs.terms.len() * rhs.terms.len()
}

/// Memory that a thread reuses from call to call.
#[derive(Debug, Default)]
pub(in crate::kernels) struct Scratch {
    block: Block,
    panels: Vec<Panel>,
    /// Padded to whole panels.
    bias: Vec<f32>,
    /// The rows of a tile whose result is not kept.
    rows: Vec<f32>,
}

/// A panel of one right term as the kernel reads it.
#[derive(Debug, Default)]
struct Panel {
    /// Unused where the packed operand has them in that form.
    codes: AlignedBytes,
    /// −Σ w of each run, in the kernel's own partial sums.
    sums: AlignedBytes,
    /// Σ w of each group, [group, column].
    group_sums: Vec<f32>,
}

/// Runs a job.
///
/// # Safety
/// The instruction set of `V` must be available.
#[inline(always)]
pub(super) unsafe fn run<V: Vector, const ROWS: usize, const WIDTH: usize>(
    job: &Job<'_>,
    mut out: Destination<'_, '_>,
    scratch: &mut Scratch,
) {
    let columns = WIDTH * V::LANES;
    let (lhs, rhs) = (job.lhs, job.rhs);
    assert!(rhs.kernel.tile_rows(job.sums()) == ROWS && rhs.kernel.panel_columns() == columns);
    assert!(rhs.kernel.step() == V::STEP);
    assert!(V::HAS_RUNS || rhs.run_steps >= rhs.group_steps());
    if let Destination::Rows(out) = &out {
        assert!(out.len() == job.rows.len());
    }
    let group_steps = rhs.group_steps();
    let extent = Extent {
        groups: lhs.groups,
        group_steps,
        run_steps: rhs.run_steps,
        runs: group_steps.div_ceil(rhs.run_steps),
    };
    let Scratch { block, panels, bias, rows: kept } = scratch;
    block.fill(lhs, job.rows.clone(), rhs);
    bias.clear();
    if let Some(all) = job.bias {
        bias.extend(&all[job.panels.start * columns..all.len().min(job.panels.end * columns)]);
    }
    bias.resize(job.panels.len() * columns, 0.0);

    // Rows and panels are as long as the tiles will read them: `Tile` relies on it.
    let row_bytes = 4 * group_steps * lhs.groups;
    let plain = reads_plain_rows(lhs, rhs);
    let stride = if plain { lhs.columns } else { row_bytes };
    let last_row = block.rows - 1;
    let left = |term: usize| {
        let copied = block.terms[term].codes.as_slice();
        let (codes, last) = if plain {
            (&lhs.terms[term].codes[job.rows.start * stride..], copied)
        } else {
            (copied, &copied[last_row * stride..])
        };
        assert!(last.len() >= row_bytes);
        // Rows before the last are followed by others.
        assert!(last_row == 0 || codes.len() >= (last_row - 1) * stride + row_bytes);
        Left { codes, last, term: &block.terms[term] }
    };
    let left: Vec<Left<'_>> = (0..lhs.terms.len()).map(left).collect();

    let terms = rhs.terms.len();
    let mut together =
        (PANEL_BYTES / (row_bytes * columns * terms).max(1)).clamp(1, job.panels.len());
    let whole_rows = matches!(out, Destination::Nowhere(Passing::Rows));
    if whole_rows {
        together = job.panels.len();
    }
    panels.resize_with(panels.len().max(together * terms), Panel::default);
    let job_columns = rhs.rows().min(job.panels.end * columns) - job.panels.start * columns;
    for first_panel in job.panels.clone().step_by(together) {
        let last_panel = (first_panel + together).min(job.panels.end);
        let count = (last_panel - first_panel) * terms;
        let mut right = Vec::with_capacity(count);
        for (index, panel) in panels.iter_mut().enumerate().take(count) {
            let (at, term) = (first_panel + index / terms, &rhs.terms[index % terms]);
            let codes = match term.unpacked(at, rhs.kernel, columns * row_bytes) {
                Some(codes) => codes,
                None => {
                    panel.codes.resize(columns * row_bytes);
                    term.unpack(at, rhs.kernel, panel.codes.as_mut_slice());
                    panel.codes.as_slice()
                }
            };
            let (sums, group_sums) = (&mut panel.sums, &mut panel.group_sums);
            sums.resize(extent.groups * extent.runs * WIDTH * size_of::<V::Sums>());
            group_sums.resize(extent.groups * columns, 0.0);
            // SAFETY: the instruction set is available.
            unsafe { sum_columns::<V, WIDTH>(codes, sums.as_mut_slice(), group_sums, extent) };
            let range = at * columns..(at + 1) * columns;
            right.push(Right {
                codes,
                sums: sums.as_slice(),
                short_sums: group_sums.iter().all(|sum| sum.abs() <= f32::from(i16::MAX)),
                group_sums,
                scale: &term.scale[range.clone()],
                residual: if term.residual.is_empty() { &[] } else { &term.residual[range] },
            });
        }
        let next_panels = last_panel..(last_panel + together).min(job.panels.end);
        let terms_kept = rhs
            .terms
            .iter()
            .map(|term| term.kept(next_panels.clone(), rhs.kernel, columns * row_bytes));
        let next: Vec<&[u8]> = terms_kept.collect();
        let next_lines: usize = next.iter().map(|bytes| bytes.len().div_ceil(LINE)).sum();
        let mut next = next.into_iter().flat_map(|bytes| bytes.chunks(LINE));
        let tiles = job.rows.len().div_ceil(ROWS) * (last_panel - first_panel);
        let lines_per_tile = next_lines.div_ceil(tiles);
        let start = (first_panel - job.panels.start) * columns;
        let end = job_columns.min(start + (last_panel - first_panel) * columns);
        // Rows that are not kept have room for whole tiles.
        let kept_columns = (last_panel - first_panel) * columns;
        if let Destination::Nowhere(_) = &out {
            kept.resize(kept.len().max(ROWS * kept_columns), 0.0);
        }
        for (index, first_row) in (0..job.rows.len()).step_by(ROWS).enumerate() {
            // Rows of the tile, and the job's column with which they begin.
            let mut rows: [&mut [f32]; ROWS] = std::array::from_fn(|_| &mut [][..]);
            let count = ROWS.min(job.rows.len() - first_row);
            let (rows, first_column) = match &mut out {
                Destination::Rows(out) => {
                    for (row, out) in rows.iter_mut().zip(&mut out[first_row..]) {
                        *row = out;
                    }
                    (&mut rows[..count], 0)
                }
                Destination::Nowhere(_) => {
                    for (row, kept) in rows.iter_mut().zip(kept.chunks_exact_mut(kept_columns)) {
                        *row = kept;
                    }
                    (&mut rows[..], start)
                }
            };
            let tile = Tile::<ROWS>::new(&left, extent, stride, last_row, index);
            for panel in first_panel..last_panel {
                let right = &right[(panel - first_panel) * terms..][..terms];
                let panel_start = (panel - job.panels.start) * columns;
                let bias = &bias[panel_start..panel_start + columns];
                let start = panel_start - first_column;
                for row in rows.iter() {
                    // SAFETY: a hint about an address within the row.
                    unsafe { V::prefetch(row[start..].as_ptr()) };
                }
                for line in next.by_ref().take(lines_per_tile) {
                    // SAFETY: a hint about an address within the operand.
                    unsafe { V::prefetch_for_later(line.as_ptr()) };
                }
                // SAFETY: operands are as long as said above; the instruction set is available.
                unsafe { tile.multiply::<V, WIDTH>(right, bias, Target { rows, start }) };
            }
            let Some(finish) = job.finish else { continue };
            let column = job.panels.start * columns + start;
            for (r, row) in rows.iter_mut().enumerate().take(count) {
                let part = &mut row[start - first_column..][..end - start];
                finish(job.rows.start + first_row + r, column, part);
            }
        }
    }
}

/// Sums up the columns' codes: −Σ w of every run in the kernel's own partial sums, Σ w of every
/// group as numbers.
#[inline(always)]
unsafe fn sum_columns<V: Vector, const WIDTH: usize>(
    codes: &[u8],
    run_sums: &mut [u8],
    group_sums: &mut [f32],
    extent: Extent,
) {
    let columns = WIDTH * V::LANES;
    let size = WIDTH * size_of::<V::Sums>();
    assert!(codes.len() == 4 * columns * extent.groups * extent.group_steps);
    assert!(run_sums.len() == extent.groups * extent.runs * size);
    assert!(group_sums.len() == extent.groups * columns);
    // A one for every code of a step.
    let one: [u8; 4] = if V::STEP == 4 { [1; 4] } else { (1u32 | 1 << 16).to_le_bytes() };
    for group in 0..extent.groups {
        // SAFETY: the steps below lie within the group, and the lengths are checked above. The
        // instruction set is available.
        unsafe {
            let mut whole = [V::no_sums(); WIDTH];
            for index in 0..extent.runs {
                let start = index * extent.run_steps;
                let steps = extent.run_steps.min(extent.group_steps - start);
                let first = group * extent.group_steps + start;
                let codes = codes.as_ptr().add(4 * columns * first);
                let mut sums = [V::no_sums(); WIDTH];
                let mut done = 0;
                if !V::HAS_RUNS {
                    let mut chains = [sums; CHAINS];
                    while done + CHAINS <= steps {
                        for (chain, sums) in chains.iter_mut().enumerate() {
                            for v in 0..WIDTH {
                                let at = 4 * V::LANES * ((done + chain) * WIDTH + v);
                                let columns = V::columns(codes.add(at));
                                sums[v] = V::dot(sums[v], V::row(one.as_ptr()), columns);
                            }
                        }
                        done += CHAINS;
                    }
                    for chain in chains {
                        for v in 0..WIDTH {
                            sums[v] = V::add(sums[v], chain[v]);
                        }
                    }
                }
                for step in done..steps {
                    for v in 0..WIDTH {
                        let columns = V::columns(codes.add(4 * V::LANES * (step * WIDTH + v)));
                        sums[v] = V::dot(sums[v], V::row(one.as_ptr()), columns);
                    }
                }
                let to = run_sums.as_mut_ptr().add((group * extent.runs + index) * size);
                let to = to.cast::<V::Sums>();
                for v in 0..WIDTH {
                    to.add(v).write_unaligned(V::times(-1, sums[v]));
                    whole[v] = V::add(whole[v], V::widen(sums[v]));
                }
            }
            let to = group_sums.as_mut_ptr().add(group * columns);
            for v in 0..WIDTH {
                V::store(to.add(v * V::LANES), V::reals(whole[v]));
            }
        }
    }
}
