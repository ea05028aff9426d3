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
pub mod fused;
#[cfg(test)]
mod laws;
mod openmp;
mod pack;
mod packed;
pub mod passes;
mod prepare;
pub mod reference;
mod scatter;
mod team;
mod workers;

pub use codes::{Codes, CodesTerm, MAX_GROUP_COLUMNS};
pub use cpu::InstructionSet;
pub use cpu::shuffle::transpose;
pub use fused::RowOrder;
pub use openmp::SingleThreaded;
pub use packed::PackedRhs;
pub use workers::Workers;

use cpu::{Destination, Job, Passing, Scratch};
use pack::Operand;

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
    check(lhs, rhs, bias);
    assert_eq!(out.len(), lhs.rows * rhs.rows(), "length of the result");
    if out.is_empty() {
        return;
    }
    let width = rhs.kernel.panel_columns();
    let Division { block, panels, single } = Division::of(workers, lhs, rhs);
    let parts = rhs.panels().div_ceil(panels);
    let mut tasks = Vec::new();
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
        for (part, out) in slices.into_iter().enumerate() {
            let panels = part * panels..((part + 1) * panels).min(rhs.panels());
            let rows = rows.clone();
            let job = Job { lhs, rows, rhs, panels, bias, finish };
            tasks.push((job, out));
        }
    }
    let work = |(job, mut out): (Job<'_>, Vec<&mut [f32]>), scratch: &mut Scratch| {
        rhs.kernel.run(&job, Destination::Rows(&mut out), scratch);
    };
    share(workers, tasks, single, work);
}

/// [`product`] of which nothing is kept but what `finish` makes of it: it sees every part of every row
/// once.
fn pass_on(
    workers: &Workers,
    (lhs, rhs): (&Codes, &PackedRhs),
    bias: Option<&[f32]>,
    finish: Finish<'_>,
) {
    check(lhs, rhs, bias);
    if lhs.rows * rhs.rows() == 0 {
        return;
    }
    let Division { block, panels, single } = Division::of(workers, lhs, rhs);
    let mut tasks = Vec::new();
    for first_row in (0..lhs.rows).step_by(block) {
        for first_panel in (0..rhs.panels()).step_by(panels) {
            let rows = first_row..lhs.rows.min(first_row + block);
            let panels = first_panel..rhs.panels().min(first_panel + panels);
            let finish = Some(finish);
            tasks.push(Job { lhs, rows, rhs, panels, bias, finish });
        }
    }
    let work = |job: Job<'_>, scratch: &mut Scratch| {
        rhs.kernel.run(&job, Destination::Nowhere(Passing::Parts), scratch);
    };
    share(workers, tasks, single, work);
}

/// Panics unless the operands fit together.
fn check(lhs: &Codes, rhs: &PackedRhs, bias: Option<&[f32]>) {
    lhs.check();
    assert_eq!(lhs.columns, rhs.columns(), "length of the summed axis");
    assert_eq!(lhs.groups, rhs.lhs_groups, "groups of the left operand");
    assert!(lhs.max_code() <= rhs.lhs_max_code, "codes of the left operand");
    assert!(bias.is_none_or(|bias| bias.len() == rhs.rows()), "length of the bias");
}

/// How a product is divided into tasks.
struct Division {
    /// Rows of a task.
    block: usize,
    /// Panels of a task.
    panels: usize,
    /// Whether one thread does it all.
    single: bool,
}

impl Division {
    fn of(workers: &Workers, lhs: &Codes, rhs: &PackedRhs) -> Self {
        let height = rhs.kernel.tile_rows(cpu::sums(lhs, rhs));
        let row_bytes = 4 * rhs.group_steps() * rhs.lhs_groups * lhs.terms.len();
        let single = lhs.rows * rhs.rows() * lhs.columns < SMALL || workers.threads() == 1;
        let wanted = if single { 1 } else { TASKS_PER_THREAD * workers.threads() };
        // Rows first, while blocks are worth unpacking the right operand for them; then columns.
        let blocks = wanted
            .min(lhs.rows / MIN_ROWS)
            .max((lhs.rows * row_bytes).div_ceil(BLOCK_BYTES))
            .max(1);
        let block = lhs.rows.div_ceil(blocks).next_multiple_of(height);
        let parts = wanted.div_ceil(blocks).min(rhs.panels());
        Self { block, panels: rhs.panels().div_ceil(parts), single }
    }
}

/// `batch` products of matrices that lie below each other in `lhs` [batch · m, k] and `rhs`
/// [batch · n, k]: `out[batch, m, n]`. For attention: one matrix per image and head.
///
/// # Panics
/// When shapes do not fit, or the rows do not divide into `batch` matrices.
pub fn product_batch(lhs: &Codes, rhs: &Codes, batch: usize, out: &mut [f32]) {
    product_batch_on(Workers::shared(), lhs, rhs, batch, out);
}

/// [`product_batch`] on threads of the caller's choice.
///
/// # Panics
/// As [`product_batch`].
pub fn product_batch_on(
    workers: &Workers,
    lhs: &Codes,
    rhs: &Codes,
    batch: usize,
    out: &mut [f32],
) {
    batch_with(InstructionSet::best(), workers, (lhs, rhs), batch, out);
}

/// [`product_batch`] of which nothing is kept but what `finish` makes of it.
fn pass_batch(
    set: InstructionSet,
    workers: &Workers,
    (lhs, rhs): (&Codes, &Codes),
    batch: usize,
    (finish, passing): (Finish<'_>, Passing),
) {
    let [m, n] = batch_shape(lhs, rhs, batch);
    let work = |index: usize, scratch: &mut Scratch| {
        let rhs = Operand::of_batch(lhs, rhs, index * n, n);
        let rhs = PackedRhs::pack_rows(&rhs, set);
        let (rows, panels) = (index * m..(index + 1) * m, 0..rhs.panels());
        let finish = Some(finish);
        let job = Job { lhs, rows, rhs: &rhs, panels, bias: None, finish };
        rhs.kernel.run(&job, Destination::Nowhere(passing), scratch);
    };
    if m * n > 0 {
        share_batch(workers, (0..batch).collect(), m * n * lhs.columns, work);
    }
}

/// Rows of the matrices of a batch.
///
/// # Panics
/// When shapes do not fit.
fn batch_shape(lhs: &Codes, rhs: &Codes, batch: usize) -> [usize; 2] {
    lhs.check();
    rhs.check();
    assert!(lhs.rows.is_multiple_of(batch) && rhs.rows.is_multiple_of(batch), "rows of a batch");
    assert_eq!(lhs.columns, rhs.columns, "length of the summed axis");
    [lhs.rows / batch.max(1), rhs.rows / batch.max(1)]
}

/// Works on the products of a batch, of so many multiplications each.
fn share_batch<T: Send>(
    workers: &Workers,
    tasks: Vec<T>,
    multiplications: usize,
    work: impl Fn(T, &mut Scratch) + Sync,
) {
    let single = tasks.len() * multiplications < SMALL;
    share(workers, tasks, single, work);
}

/// Works on tasks, on one thread one after another or on all.
fn share<T: Send>(
    workers: &Workers,
    tasks: Vec<T>,
    single: bool,
    work: impl Fn(T, &mut Scratch) + Sync,
) {
    if single {
        workers.run_here(tasks, work);
    } else {
        workers.run(tasks, work);
    }
}

fn batch_with(
    set: InstructionSet,
    workers: &Workers,
    (lhs, rhs): (&Codes, &Codes),
    batch: usize,
    out: &mut [f32],
) {
    let [m, n] = batch_shape(lhs, rhs, batch);
    assert_eq!(out.len(), batch * m * n, "length of the result");
    if out.is_empty() {
        return;
    }
    let work = |(index, out): (usize, &mut [f32]), scratch: &mut Scratch| {
        let rhs = PackedRhs::pack_rows(&Operand::of_batch(lhs, rhs, index * n, n), set);
        let rows = index * m..(index + 1) * m;
        let panels = 0..rhs.panels();
        let job = Job { lhs, rows, rhs: &rhs, panels, bias: None, finish: None };
        let mut out: Vec<&mut [f32]> = out.chunks_exact_mut(n).collect();
        rhs.kernel.run(&job, Destination::Rows(&mut out), scratch);
    };
    let tasks = out.chunks_exact_mut(m * n).enumerate().collect();
    share_batch(workers, tasks, m * n * lhs.columns, work);
}
