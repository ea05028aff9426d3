//! The blocked kernel, generic over instruction sets.
//!
//! For one panel of result columns after another, unpacked to the first-level cache, it computes
//! tiles of `ROWS` rows by `WIDTH` vectors of columns. The order of the roundings is part of the
//! interface, so that results are the same bits everywhere:
//!
//! ```text
//! y = bias
//! for each right term:
//!     t = 0
//!     for each left term, for each group:
//!         t = fma(f32(Σ (x − z) · w), scale, t)     z clamped to the grid, w = code − centre, exact
//!         t = fma(−scale · (zero point − z), Σ w, t)                  where they differ
//!         t = fma(−(zero point of w − centre), scale · Σ (x − zero point), t)  where they differ
//!     y = fma(t, scale of w, y)
//! ```

use std::ops::Range;

use super::vector::Vector;
use crate::kernels::PackedRhs;
use crate::kernels::aligned::AlignedBytes;
use crate::kernels::codes::Codes;
use crate::kernels::packed::PackedTerm;
use crate::kernels::prepare::{Block, BlockTerm, reads_plain_rows};

/// Most result columns of a panel.
pub(super) const MAX_PANEL: usize = 32;

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
}

/// Memory that a thread reuses from call to call.
#[derive(Debug, Default)]
pub(in crate::kernels) struct Scratch {
    block: Block,
    panels: Vec<Panel>,
}

/// A panel of one right term as the kernel reads it.
#[derive(Debug, Default)]
struct Panel {
    codes: AlignedBytes,
    /// −Σ w of each run, in the kernel's own partial sums.
    sums: AlignedBytes,
    /// Σ w of each group, [group, column].
    group_sums: Vec<f32>,
}

/// Lengths that the loops share.
#[derive(Clone, Copy)]
struct Extent {
    groups: usize,
    group_steps: usize,
    run_steps: usize,
    runs: usize,
}

/// Runs a job. `out` holds each row's part of the result: the columns of the job's panels.
///
/// # Safety
/// The instruction set of `V` must be available.
#[inline(always)]
pub(super) unsafe fn run<V: Vector, const ROWS: usize, const WIDTH: usize>(
    job: &Job<'_>,
    out: &mut [&mut [f32]],
    scratch: &mut Scratch,
) {
    let columns = WIDTH * V::LANES;
    let (lhs, rhs) = (job.lhs, job.rhs);
    assert!(rhs.kernel.tile_rows() == ROWS && rhs.kernel.panel_columns() == columns);
    assert!(rhs.kernel.step() == V::STEP && out.len() == job.rows.len());
    let group_steps = rhs.group_steps();
    let extent = Extent {
        groups: lhs.groups,
        group_steps,
        run_steps: rhs.run_steps,
        runs: group_steps.div_ceil(rhs.run_steps),
    };
    let Scratch { block, panels } = scratch;
    block.fill(lhs, job.rows.clone(), rhs);
    panels.resize_with(panels.len().max(rhs.terms.len()), Panel::default);
    let plain_rows = reads_plain_rows(lhs, rhs);
    let row_bytes = 4 * group_steps * lhs.groups;

    for panel_index in job.panels.clone() {
        for (panel, term) in panels.iter_mut().zip(&rhs.terms) {
            panel.codes.resize(4 * columns * group_steps * lhs.groups);
            term.unpack(panel_index, rhs.kernel, panel.codes.as_mut_slice());
            // SAFETY: the instruction set is available.
            unsafe { panel.sum::<V, WIDTH>(extent) };
        }
        let first = panel_index * columns;
        let mut bias = [0.0; MAX_PANEL];
        if let Some(all) = job.bias {
            let count = columns.min(rhs.rows() - first);
            bias[..count].copy_from_slice(&all[first..first + count]);
        }
        let local = first - job.panels.start * columns;

        for (tile, out) in out.chunks_mut(ROWS).enumerate() {
            // SAFETY: `bias` holds MAX_PANEL numbers, at least WIDTH vectors.
            let mut result = unsafe {
                let bias: [V::Reals; WIDTH] =
                    std::array::from_fn(|v| V::load(bias.as_ptr().add(v * V::LANES)));
                [bias; ROWS]
            };
            for (panel, right) in panels.iter().zip(&rhs.terms) {
                // SAFETY: the instruction set is available.
                let mut total = unsafe { [[V::splat(0.0); WIDTH]; ROWS] };
                for (left, term) in block.terms.iter().zip(&lhs.terms) {
                    let codes = if plain_rows {
                        &term.codes[job.rows.start * row_bytes..]
                    } else {
                        left.codes.as_slice()
                    };
                    // Rows beyond the last one repeat it; their results are not stored.
                    let rows: [&[u8]; ROWS] = std::array::from_fn(|r| {
                        let row = (tile * ROWS + r).min(block.rows - 1);
                        &codes[row * row_bytes..][..row_bytes]
                    });
                    // SAFETY: rows and panel hold the steps of all groups; the instruction set is
                    // available.
                    unsafe {
                        add_groups::<V, ROWS, WIDTH>(&rows, panel, left, tile, extent, &mut total);
                        if left.any_outside {
                            add_outside::<V, ROWS, WIDTH>(panel, left, tile, extent, &mut total);
                        }
                        if !right.residual.is_empty() {
                            let residual = &right.residual[first..first + columns];
                            add_residual::<V, ROWS, WIDTH>(
                                residual, left, tile, extent, &mut total,
                            );
                        }
                    }
                }
                // SAFETY: as above.
                unsafe { scale::<V, ROWS, WIDTH>(right, first, &total, &mut result) };
            }
            for (row, out) in out.iter_mut().enumerate() {
                let count = columns.min(out.len() - local);
                let mut numbers = [0.0f32; MAX_PANEL];
                for (v, &reals) in result[row].iter().enumerate() {
                    // SAFETY: WIDTH vectors fit MAX_PANEL numbers.
                    unsafe { V::store(numbers.as_mut_ptr().add(v * V::LANES), reals) };
                }
                if count == columns {
                    out[local..local + columns].copy_from_slice(&numbers[..columns]);
                } else {
                    out[local..local + count].copy_from_slice(&numbers[..count]);
                }
            }
        }
    }
}

/// `result = fma(total, scale, result)`.
#[inline(always)]
unsafe fn scale<V: Vector, const ROWS: usize, const WIDTH: usize>(
    right: &PackedTerm,
    first: usize,
    total: &[[V::Reals; WIDTH]; ROWS],
    result: &mut [[V::Reals; WIDTH]; ROWS],
) {
    let scales = &right.scale[first..first + WIDTH * V::LANES];
    for v in 0..WIDTH {
        // SAFETY: `scales` holds WIDTH vectors; the instruction set is available.
        unsafe {
            let scale = V::load(scales.as_ptr().add(v * V::LANES));
            for r in 0..ROWS {
                result[r][v] = V::multiply_add(total[r][v], scale, result[r][v]);
            }
        }
    }
}

/// Adds the sums of every group, times its scale.
#[inline(always)]
unsafe fn add_groups<V: Vector, const ROWS: usize, const WIDTH: usize>(
    rows: &[&[u8]; ROWS],
    panel: &Panel,
    left: &BlockTerm,
    tile: usize,
    extent: Extent,
    total: &mut [[V::Reals; WIDTH]; ROWS],
) {
    let columns_step = 4 * WIDTH * V::LANES;
    let all_steps = extent.groups * extent.group_steps;
    let (codes, sums) = (panel.codes.as_slice(), panel.sums.as_slice());
    assert!(rows.iter().all(|row| row.len() == 4 * all_steps));
    assert!(codes.len() == columns_step * all_steps);
    assert!(sums.len() == extent.groups * extent.runs * WIDTH * size_of::<V::Sums>());
    for group in 0..extent.groups {
        let at = tile * extent.groups + group;
        if !left.active[at] {
            continue;
        }
        let zero_points = &left.zero_points[at * ROWS..][..ROWS];
        let scales = &left.scales[at * ROWS..][..ROWS];
        let run = |index: usize| {
            let start = index * extent.run_steps;
            let steps = extent.run_steps.min(extent.group_steps - start);
            let first = group * extent.group_steps + start;
            // SAFETY: steps first..first + steps lie within the group, hence within rows and codes,
            // whose lengths are checked above; so are the sums'. The instruction set is available.
            unsafe {
                let rows: [*const u8; ROWS] =
                    std::array::from_fn(|r| rows[r].as_ptr().add(4 * first));
                let codes = codes.as_ptr().add(columns_step * first);
                let start = sums.as_ptr().cast::<[V::Sums; WIDTH]>();
                let start = start.add(group * extent.runs + index).read_unaligned();
                sum_run::<V, ROWS, WIDTH>(&rows, codes, steps, zero_points, &start)
            }
        };
        let mut sums = run(0);
        for index in 1..extent.runs {
            let next = run(index);
            for r in 0..ROWS {
                for v in 0..WIDTH {
                    // SAFETY: the instruction set is available.
                    sums[r][v] = unsafe { V::add(sums[r][v], next[r][v]) };
                }
            }
        }
        for r in 0..ROWS {
            // SAFETY: the instruction set is available.
            unsafe {
                let scale = V::splat(scales[r]);
                for v in 0..WIDTH {
                    total[r][v] = V::multiply_add(V::reals(sums[r][v]), scale, total[r][v]);
                }
            }
        }
    }
}

/// Σ (x − z) · w of one run, widened. `start` is −Σ w.
#[inline(always)]
unsafe fn sum_run<V: Vector, const ROWS: usize, const WIDTH: usize>(
    rows: &[*const u8; ROWS],
    codes: *const u8,
    steps: usize,
    zero_points: &[i32],
    start: &[V::Sums; WIDTH],
) -> [[V::Sums; WIDTH]; ROWS] {
    // SAFETY: the caller's pointers are valid for `steps` steps; the instruction set is available.
    unsafe {
        let mut sums = [[V::no_sums(); WIDTH]; ROWS];
        for r in 0..ROWS {
            for v in 0..WIDTH {
                sums[r][v] = V::times(zero_points[r], start[v]);
            }
        }
        for step in 0..steps {
            let columns: [V::Codes; WIDTH] =
                std::array::from_fn(|v| V::columns(codes.add(4 * V::LANES * (step * WIDTH + v))));
            for r in 0..ROWS {
                let row = V::row(rows[r].add(4 * step));
                for v in 0..WIDTH {
                    sums[r][v] = V::dot(sums[r][v], row, columns[v]);
                }
            }
        }
        for r in 0..ROWS {
            for v in 0..WIDTH {
                sums[r][v] = V::widen(sums[r][v]);
            }
        }
        sums
    }
}

/// Adds what zero points outside their grid contribute.
#[inline(always)]
unsafe fn add_outside<V: Vector, const ROWS: usize, const WIDTH: usize>(
    panel: &Panel,
    left: &BlockTerm,
    tile: usize,
    extent: Extent,
    total: &mut [[V::Reals; WIDTH]; ROWS],
) {
    let columns = WIDTH * V::LANES;
    for group in 0..extent.groups {
        let outside = &left.outside[(tile * extent.groups + group) * ROWS..][..ROWS];
        let sums = &panel.group_sums[group * columns..][..columns];
        for r in 0..ROWS {
            if outside[r] == 0.0 {
                continue;
            }
            for v in 0..WIDTH {
                // SAFETY: `sums` holds WIDTH vectors; the instruction set is available.
                unsafe {
                    let sum = V::load(sums.as_ptr().add(v * V::LANES));
                    total[r][v] = V::multiply_add(V::splat(outside[r]), sum, total[r][v]);
                }
            }
        }
    }
}

/// Takes off what zero points of the right operand contribute beyond their centres.
#[inline(always)]
unsafe fn add_residual<V: Vector, const ROWS: usize, const WIDTH: usize>(
    residual: &[f32],
    left: &BlockTerm,
    tile: usize,
    extent: Extent,
    total: &mut [[V::Reals; WIDTH]; ROWS],
) {
    assert!(residual.len() == WIDTH * V::LANES);
    for group in 0..extent.groups {
        let centred = &left.centred[(tile * extent.groups + group) * ROWS..][..ROWS];
        for v in 0..WIDTH {
            // SAFETY: `residual` holds WIDTH vectors; the instruction set is available.
            unsafe {
                let residual = V::load(residual.as_ptr().add(v * V::LANES));
                for r in 0..ROWS {
                    total[r][v] = V::multiply_add(V::splat(-centred[r]), residual, total[r][v]);
                }
            }
        }
    }
}

impl Panel {
    /// Sums up the columns' codes, per run and per group.
    #[inline(always)]
    unsafe fn sum<V: Vector, const WIDTH: usize>(&mut self, extent: Extent) {
        let columns = WIDTH * V::LANES;
        let size = WIDTH * size_of::<V::Sums>();
        self.sums.resize(extent.groups * extent.runs * size);
        self.group_sums.clear();
        self.group_sums.resize(extent.groups * columns, 0.0);
        let codes = self.codes.as_slice();
        assert!(codes.len() == 4 * columns * extent.groups * extent.group_steps);
        // A one in every code of a step.
        let one = if V::STEP == 4 {
            [1; 4]
        } else {
            [1u16.to_ne_bytes(); 2].concat()[..].try_into().unwrap_or([1; 4])
        };
        for group in 0..extent.groups {
            // SAFETY: the steps below lie within the group; lengths are checked above or set by
            // `resize`. The instruction set is available.
            unsafe {
                let mut whole = [V::no_sums(); WIDTH];
                for index in 0..extent.runs {
                    let start = index * extent.run_steps;
                    let steps = extent.run_steps.min(extent.group_steps - start);
                    let first = group * extent.group_steps + start;
                    let codes = codes.as_ptr().add(4 * columns * first);
                    let mut sums = [V::no_sums(); WIDTH];
                    for step in 0..steps {
                        for v in 0..WIDTH {
                            let columns = V::columns(codes.add(4 * V::LANES * (step * WIDTH + v)));
                            sums[v] = V::dot(sums[v], V::row(one.as_ptr()), columns);
                        }
                    }
                    let to = self.sums.as_mut_slice()[(group * extent.runs + index) * size..]
                        .as_mut_ptr();
                    to.cast::<[V::Sums; WIDTH]>()
                        .write_unaligned(sums.map(|sums| V::times(-1, sums)));
                    for v in 0..WIDTH {
                        whole[v] = V::add(whole[v], V::widen(sums[v]));
                    }
                }
                for v in 0..WIDTH {
                    let to = self.group_sums[group * columns..][..columns].as_mut_ptr();
                    V::store(to.add(v * V::LANES), V::reals(whole[v]));
                }
            }
        }
    }
}
