//! The blocked kernel, generic over instruction sets.
//!
//! For a few panels of result columns at a time, unpacked to the second-level cache, it computes
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

/// Unpacked codes that stay in the second-level cache. A tile's rows, which stay in the first, are
/// multiplied with all of them before the next tile, so that results are written in order.
const PANEL_BYTES: usize = 128 << 10;

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
    let row_bytes = 4 * group_steps * lhs.groups;
    let operands = Operands { job, block, extent, row_bytes };

    let terms = rhs.terms.len();
    let together = (PANEL_BYTES / (row_bytes * columns * terms).max(1)).clamp(1, job.panels.len());
    panels.resize_with(panels.len().max(together * terms), Panel::default);
    for first_panel in job.panels.clone().step_by(together) {
        let last_panel = (first_panel + together).min(job.panels.end);
        for (panel, index) in panels.iter_mut().zip(0..(last_panel - first_panel) * terms) {
            panel.codes.resize(columns * row_bytes);
            let (index, term) = (first_panel + index / terms, &rhs.terms[index % terms]);
            term.unpack(index, rhs.kernel, panel.codes.as_mut_slice());
            // SAFETY: the instruction set is available.
            unsafe { panel.sum::<V, WIDTH>(extent) };
        }
        for (tile, out) in out.chunks_mut(ROWS).enumerate() {
            for index in first_panel..last_panel {
                let panels = &panels[(index - first_panel) * terms..][..terms];
                let first = index * columns;
                // SAFETY: the instruction set is available.
                let result = unsafe { operands.multiply::<V, ROWS, WIDTH>(tile, panels, first) };
                let start = first - job.panels.start * columns;
                for (out, numbers) in out.iter_mut().zip(&result) {
                    let end = out.len().min(start + columns);
                    // SAFETY: the instruction set is available.
                    unsafe { store::<V, WIDTH>(numbers, &mut out[start..end]) };
                }
            }
        }
    }
}

/// Stores one row of a tile, or as much as there is room for.
#[inline(always)]
unsafe fn store<V: Vector, const WIDTH: usize>(numbers: &[V::Reals; WIDTH], out: &mut [f32]) {
    let whole = out.len() == WIDTH * V::LANES;
    let mut padded = [0.0f32; MAX_PANEL];
    let to = if whole { out.as_mut_ptr() } else { padded.as_mut_ptr() };
    for (v, &numbers) in numbers.iter().enumerate() {
        // SAFETY: WIDTH vectors fit `out` if it has that length, and MAX_PANEL numbers.
        unsafe { V::store(to.add(v * V::LANES), numbers) };
    }
    if !whole {
        out.copy_from_slice(&padded[..out.len()]);
    }
}

/// What the tiles of a job share.
struct Operands<'a> {
    job: &'a Job<'a>,
    block: &'a Block,
    extent: Extent,
    /// Bytes of a row of the left operand as the kernel reads it.
    row_bytes: usize,
}

impl Operands<'_> {
    /// One tile of the result: columns from `first` on, whose codes are in `panels`, one a term.
    #[inline(always)]
    unsafe fn multiply<V: Vector, const ROWS: usize, const WIDTH: usize>(
        &self,
        tile: usize,
        panels: &[Panel],
        first: usize,
    ) -> [[V::Reals; WIDTH]; ROWS] {
        let Self { job, block, extent, row_bytes } = *self;
        let columns = WIDTH * V::LANES;
        let mut bias = [0.0; MAX_PANEL];
        if let Some(all) = job.bias {
            let all = &all[first..];
            let count = columns.min(all.len());
            bias[..count].copy_from_slice(&all[..count]);
        }
        // SAFETY: `bias` holds MAX_PANEL numbers, at least WIDTH vectors.
        let mut result = unsafe { [load::<V, WIDTH>(&bias); ROWS] };
        for (panel, right) in panels.iter().zip(&job.rhs.terms) {
            // SAFETY: the instruction set is available.
            let mut total = unsafe { [[V::splat(0.0); WIDTH]; ROWS] };
            for (left, term) in block.terms.iter().zip(&job.lhs.terms) {
                let codes = if reads_plain_rows(job.lhs, job.rhs) {
                    &term.codes[job.rows.start * row_bytes..]
                } else {
                    left.codes.as_slice()
                };
                // Rows beyond the last one repeat it; their results are not stored.
                let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
                for (r, to) in rows.iter_mut().enumerate() {
                    let row = (tile * ROWS + r).min(block.rows - 1);
                    *to = &codes[row * row_bytes..][..row_bytes];
                }
                // SAFETY: the instruction set is available.
                unsafe {
                    add_groups::<V, ROWS, WIDTH>(&rows, panel, left, tile, extent, &mut total);
                    if left.any_outside {
                        add_outside::<V, ROWS, WIDTH>(panel, left, tile, extent, &mut total);
                    }
                    if !right.residual.is_empty() {
                        let residual = load::<V, WIDTH>(&right.residual[first..][..columns]);
                        add_residual::<V, ROWS, WIDTH>(residual, left, tile, extent, &mut total);
                    }
                }
            }
            // SAFETY: the instruction set is available.
            unsafe {
                let scale = load::<V, WIDTH>(&right.scale[first..][..columns]);
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        result[r][v] = V::multiply_add(total[r][v], scale[v], result[r][v]);
                    }
                }
            }
        }
        result
    }
}

/// Loads a vector for each vector of columns.
#[inline(always)]
unsafe fn load<V: Vector, const WIDTH: usize>(from: &[f32]) -> [V::Reals; WIDTH] {
    assert!(from.len() >= WIDTH * V::LANES);
    // SAFETY: `from` is long enough; the instruction set is available.
    unsafe {
        let mut reals = [V::splat(0.0); WIDTH];
        for (v, reals) in reals.iter_mut().enumerate() {
            *reals = V::load(from.as_ptr().add(v * V::LANES));
        }
        reals
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
    let (codes, panel_sums) = (panel.codes.as_slice(), panel.sums.as_slice());
    assert!(rows.iter().all(|row| row.len() == 4 * all_steps));
    assert!(codes.len() == columns_step * all_steps);
    assert!(panel_sums.len() == extent.groups * extent.runs * WIDTH * size_of::<V::Sums>());
    for group in 0..extent.groups {
        let at = tile * extent.groups + group;
        if !left.active[at] {
            continue;
        }
        let zero_points = &left.zero_points[at * ROWS..][..ROWS];
        let scales = &left.scales[at * ROWS..][..ROWS];
        // Closures would not be compiled for the instruction set, hence the repetition.
        // SAFETY: steps first..first + steps lie within the group, hence within rows and codes, whose
        // lengths are checked above; so are the sums'. The instruction set is available.
        let mut sums = unsafe {
            let run = Run::new::<V, WIDTH>(rows, codes, panel_sums, extent, [group, 0]);
            sum_run::<V, ROWS, WIDTH>(&run, zero_points)
        };
        for index in 1..extent.runs {
            // SAFETY: as above.
            unsafe {
                let run = Run::new::<V, WIDTH>(rows, codes, panel_sums, extent, [group, index]);
                let next = sum_run::<V, ROWS, WIDTH>(&run, zero_points);
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        sums[r][v] = V::add(sums[r][v], next[r][v]);
                    }
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

/// Where the codes of one run are.
struct Run<const ROWS: usize> {
    rows: [*const u8; ROWS],
    codes: *const u8,
    /// −Σ w, a vector of sums for each vector of columns.
    start: *const u8,
    steps: usize,
}

impl<const ROWS: usize> Run<ROWS> {
    /// Run `index` of `group`.
    #[inline(always)]
    unsafe fn new<V: Vector, const WIDTH: usize>(
        rows: &[&[u8]; ROWS],
        codes: &[u8],
        sums: &[u8],
        extent: Extent,
        [group, index]: [usize; 2],
    ) -> Self {
        let start = index * extent.run_steps;
        let first = group * extent.group_steps + start;
        // SAFETY: the caller says that all three hold the steps and runs of all groups.
        unsafe {
            let mut pointers = [codes.as_ptr(); ROWS];
            for (pointer, row) in pointers.iter_mut().zip(rows) {
                *pointer = row.as_ptr().add(4 * first);
            }
            Self {
                rows: pointers,
                codes: codes.as_ptr().add(4 * WIDTH * V::LANES * first),
                start: sums
                    .as_ptr()
                    .add((group * extent.runs + index) * WIDTH * size_of::<V::Sums>()),
                steps: extent.run_steps.min(extent.group_steps - start),
            }
        }
    }
}

/// Σ (x − z) · w of one run, widened.
#[inline(always)]
unsafe fn sum_run<V: Vector, const ROWS: usize, const WIDTH: usize>(
    run: &Run<ROWS>,
    zero_points: &[i32],
) -> [[V::Sums; WIDTH]; ROWS] {
    // SAFETY: the run's pointers are valid for its steps; the instruction set is available.
    unsafe {
        let start = run.start.cast::<[V::Sums; WIDTH]>().read_unaligned();
        let mut sums = [[V::no_sums(); WIDTH]; ROWS];
        for r in 0..ROWS {
            for v in 0..WIDTH {
                sums[r][v] = V::times(zero_points[r], start[v]);
            }
        }
        // One step at a time: of two, the compiler would keep more alive than there are registers.
        let mut from = run.codes;
        for step in 0..run.steps {
            let mut columns = [V::columns(from); WIDTH];
            for (v, columns) in columns.iter_mut().enumerate().skip(1) {
                *columns = V::columns(from.add(4 * V::LANES * v));
            }
            for r in 0..ROWS {
                let row = V::row(run.rows[r].add(4 * step));
                for v in 0..WIDTH {
                    sums[r][v] = V::dot(sums[r][v], row, columns[v]);
                }
            }
            from = from.add(4 * V::LANES * WIDTH);
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
            // SAFETY: the instruction set is available.
            unsafe {
                let sums = load::<V, WIDTH>(sums);
                for v in 0..WIDTH {
                    total[r][v] = V::multiply_add(V::splat(outside[r]), sums[v], total[r][v]);
                }
            }
        }
    }
}

/// Takes off what zero points of the right operand contribute beyond their centres.
#[inline(always)]
unsafe fn add_residual<V: Vector, const ROWS: usize, const WIDTH: usize>(
    residual: [V::Reals; WIDTH],
    left: &BlockTerm,
    tile: usize,
    extent: Extent,
    total: &mut [[V::Reals; WIDTH]; ROWS],
) {
    for group in 0..extent.groups {
        let centred = &left.centred[(tile * extent.groups + group) * ROWS..][..ROWS];
        for r in 0..ROWS {
            for v in 0..WIDTH {
                // SAFETY: the instruction set is available.
                unsafe {
                    total[r][v] = V::multiply_add(V::splat(-centred[r]), residual[v], total[r][v]);
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
