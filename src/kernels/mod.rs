//! Integer matrix products on the CPU: `out = lhs · rhsᵀ (+ bias)` over codes, rescaled to float32.
//!
//! [`product`] multiplies rows of codes with a right operand that was packed once ([`PackedRhs`]);
//! [`product_batch`] multiplies many small pairs (attention heads). A row's result depends on nothing
//! but that row: not on other rows, the thread count, or the instruction set.

mod aligned;
pub(crate) mod codes;
mod cpu;
pub mod cpu_elementwise;
pub mod cpu_slices;
pub mod cuda;
#[cfg(test)]
mod laws;
mod openmp;
mod pack;
mod packed;
pub mod passes;
mod prepare;
pub mod reference;
mod team;
mod workers;

pub use codes::{Codes, CodesTerm, MAX_GROUP_COLUMNS};
pub use cpu::InstructionSet;
pub use cpu::shuffle::transpose;
pub use openmp::SingleThreaded;
pub use packed::PackedRhs;
pub use workers::Workers;

use cpu::{Job, Scratch};
use pack::{Operand, Uses};

/// Codes of the left operand that are laid out at once, at most.
const BLOCK_BYTES: usize = 1 << 20;

/// Rows of a task, if there are other ways to share the work: each task unpacks its panels.
const MIN_ROWS: usize = 96;

/// Multiplications below which waking another thread takes longer than it saves.
const SMALL: usize = 1 << 21;

/// Tasks for each thread, so that none waits long for the last one.
const TASKS_PER_THREAD: usize = 4;

/// What is done to a part of a row of a product while it is in the first-level cache, given the row and
/// the part's first column. A part is as long as the kernel likes.
pub type Finish<'a> = &'a (dyn Fn(usize, usize, &mut [f32]) + Sync);

/// `out[m, n] = lhs · rhsᵀ (+ bias[n])`, row-major, on the shared [`Workers`], and what is to be done then.
///
/// # Panics
/// When shapes do not fit, or `lhs` has other groups or larger codes than `rhs` was packed for.
pub fn product(
    lhs: &Codes,
    rhs: &PackedRhs,
    bias: Option<&[f32]>,
    finish: Option<Finish<'_>>,
    out: &mut [f32],
) {
    product_on(Workers::shared(), lhs, rhs, (bias, finish), out);
}

/// [`product`] on threads of the caller's choice.
///
/// # Panics
/// As [`product`].
pub fn product_on(
    workers: &Workers,
    lhs: &Codes,
    rhs: &PackedRhs,
    (bias, finish): (Option<&[f32]>, Option<Finish<'_>>),
    out: &mut [f32],
) {
    lhs.check();
    assert_eq!(lhs.columns, rhs.columns(), "length of the summed axis");
    assert_eq!(lhs.groups, rhs.lhs_groups, "groups of the left operand");
    assert!(lhs.max_code() <= rhs.lhs_max_code, "codes of the left operand");
    assert!(bias.is_none_or(|bias| bias.len() == rhs.rows()), "length of the bias");
    assert_eq!(out.len(), lhs.rows * rhs.rows(), "length of the result");
    if out.is_empty() {
        return;
    }
    let height = rhs.kernel.tile_rows(cpu::sums(lhs, rhs));
    let width = rhs.kernel.panel_columns();
    let row_bytes = 4 * rhs.group_steps() * rhs.lhs_groups * lhs.terms.len();
    let single = lhs.rows * rhs.rows() * lhs.columns < SMALL || workers.threads() == 1;
    let wanted = if single { 1 } else { TASKS_PER_THREAD * workers.threads() };
    // Rows first, while blocks are worth unpacking the right operand for them; then columns.
    let blocks =
        wanted.min(lhs.rows / MIN_ROWS).max((lhs.rows * row_bytes).div_ceil(BLOCK_BYTES)).max(1);
    let block = lhs.rows.div_ceil(blocks).next_multiple_of(height);
    let parts = wanted.div_ceil(blocks).min(rhs.panels());
    let panels = rhs.panels().div_ceil(parts);

    let mut tasks = Vec::with_capacity(blocks * parts);
    for (index, out) in out.chunks_mut(block * rhs.rows()).enumerate() {
        let first_row = index * block;
        let rows = first_row..first_row + out.len() / rhs.rows();
        let mut slices: Vec<Vec<&mut [f32]>> = Vec::new();
        slices.resize_with(parts, || Vec::with_capacity(rows.len()));
        for row in out.chunks_exact_mut(rhs.rows()) {
            for (slices, part) in slices.iter_mut().zip(row.chunks_mut(panels * width)) {
                slices.push(part);
            }
        }
        for (part, out) in slices.into_iter().enumerate().filter(|(_, out)| !out.is_empty()) {
            let panels = part * panels..((part + 1) * panels).min(rhs.panels());
            let rows = rows.clone();
            let job = Job { lhs, rows, rhs, panels, bias, finish, whole_rows: false };
            tasks.push((job, out));
        }
    }
    let work = |(job, mut out): (Job<'_>, Vec<&mut [f32]>), scratch: &mut Scratch| {
        rhs.kernel.run(&job, &mut out, scratch);
    };
    if single {
        // One thread takes them one after another.
        workers.run_here(tasks, work);
    } else {
        workers.run(tasks, work);
    }
}

/// `batch` products of matrices that lie below each other in `lhs` [batch · m, k] and `rhs`
/// [batch · n, k]: `out[batch, m, n]`, and what is to be done then; parts are whole rows here. For
/// attention: one matrix per image and head.
///
/// # Panics
/// When shapes do not fit, or the rows do not divide into `batch` matrices.
pub fn product_batch(
    lhs: &Codes,
    rhs: &Codes,
    batch: usize,
    finish: Option<Finish<'_>>,
    out: &mut [f32],
) {
    product_batch_on(Workers::shared(), lhs, rhs, (batch, finish), out);
}

/// [`product_batch`] on threads of the caller's choice.
///
/// # Panics
/// As [`product_batch`].
pub fn product_batch_on(
    workers: &Workers,
    lhs: &Codes,
    rhs: &Codes,
    (batch, finish): (usize, Option<Finish<'_>>),
    out: &mut [f32],
) {
    batch_with(InstructionSet::best(), workers, (lhs, rhs), (batch, finish), out);
}

fn batch_with(
    set: InstructionSet,
    workers: &Workers,
    (lhs, rhs): (&Codes, &Codes),
    (batch, finish): (usize, Option<Finish<'_>>),
    out: &mut [f32],
) {
    lhs.check();
    rhs.check();
    assert!(lhs.rows.is_multiple_of(batch) && rhs.rows.is_multiple_of(batch), "rows of a batch");
    assert_eq!(lhs.columns, rhs.columns, "length of the summed axis");
    let (m, n) = (lhs.rows / batch.max(1), rhs.rows / batch.max(1));
    assert_eq!(out.len(), batch * m * n, "length of the result");
    if out.is_empty() {
        return;
    }
    let (lhs_groups, lhs_max_code) = (lhs.groups, lhs.max_code());
    let work = |(index, out): (usize, &mut [f32]), scratch: &mut Scratch| {
        let (first, uses) = (index * n, Uses::Once);
        let operand = Operand { codes: rhs, first, rows: n, lhs_groups, lhs_max_code, uses };
        let rhs = PackedRhs::pack_rows(&operand, set);
        let rows = index * m..(index + 1) * m;
        let (panels, bias) = (0..rhs.panels(), None);
        let job = Job { lhs, rows, rhs: &rhs, panels, bias, finish, whole_rows: true };
        let mut out: Vec<&mut [f32]> = out.chunks_exact_mut(n).collect();
        rhs.kernel.run(&job, &mut out, scratch);
    };
    let small = batch * m * n * lhs.columns < SMALL;
    let tasks: Vec<_> = out.chunks_exact_mut(m * n).enumerate().collect();
    if small {
        workers.run_here(tasks, work);
    } else {
        workers.run(tasks, work);
    }
}
