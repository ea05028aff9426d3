//! Fake quantization on the CPU in a pass or two over memory.
//!
//! Every pass does to each element what the tensor code of its quantizer does, operation by operation:
//! the results are equal to the bit, NaN and infinities included, whatever the instruction set and the
//! number of threads. No result is contracted to a fused multiply-add or divided by way of a reciprocal; what is
//! rounded to a code need not be computed where its code is known without.

pub mod affine;
pub(crate) mod bins;
pub mod extent;
pub mod groups;
pub mod ranking;
pub mod search;
pub mod select;
pub mod staircase;
pub mod tokens;
pub mod twin;

use crate::kernels::workers::Tasks;
use crate::kernels::{Workers, openmp};

/// Elements from which on threads share the work; below, handing it out costs more than it saves.
pub(super) const PARALLEL_ELEMENTS: usize = 1 << 15;

/// Elements of a piece of work: as much as fits the first-level cache beside its result.
const PIECE_ELEMENTS: usize = 1 << 12;

/// Compiles a function for the baseline of the target and for AVX2, and calls what the machine has. The body
/// must be arithmetic on its arguments: both versions give the same bits.
macro_rules! vectorized_up_to_avx2 {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        $vis fn $name($($arg: $type),*) $(-> $result)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn wide($($arg: $type),*) $(-> $result)? {
                    body($($arg),*)
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    #[allow(unsafe_code, reason = "a function for instructions that were detected")]
                    // SAFETY: the machine has AVX2, the only thing that `wide` asks for.
                    return unsafe { wide($($arg),*) };
                }
            }
            body($($arg),*)
        }
    };
}
pub(crate) use vectorized_up_to_avx2;

/// As [`vectorized_up_to_avx2`], and for AVX-512. Not for tables, from which compilers gather with AVX-512:
/// many processors are slow at that.
macro_rules! vectorized {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) $(-> $result:ty)? $body:block) => {
        $(#[$attribute])*
        $vis fn $name($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            if crate::kernels::cpu::has_avx512() {
                #[inline(always)]
                fn body($($arg: $type),*) $(-> $result)? $body

                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn widest($($arg: $type),*) $(-> $result)? {
                    body($($arg),*)
                }
                #[allow(unsafe_code, reason = "a function for instructions that were detected")]
                // SAFETY: the machine has what `widest` asks for.
                return unsafe { widest($($arg),*) };
            }
            $crate::kernels::passes::vectorized_up_to_avx2! {
                fn narrower($($arg: $type),*) $(-> $result)? $body
            }
            narrower($($arg),*)
        }
    };
}
pub(crate) use vectorized;

/// Calls `work` with every piece of `out`, whole rows of `width` elements, and its first row's number.
pub(crate) fn for_rows<T: Send>(
    out: &mut [T],
    width: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    for_parts(out, width, width, work);
}

/// As [`for_rows`] where `out` has `per_row` elements a row, made from `width` elements each.
pub(crate) fn for_parts<T: Send>(
    out: &mut [T],
    per_row: usize,
    width: usize,
    work: impl Fn(usize, &mut [T]) + Sync,
) {
    if out.is_empty() {
        return;
    }
    let (per_row, width) = (per_row.max(1), width.max(1));
    let rows = out.len() / per_row;
    if rows * width < PARALLEL_ELEMENTS {
        return work(0, out);
    }
    let rows = (PIECE_ELEMENTS / width).max(1);
    let pieces = out.chunks_mut(rows * per_row).enumerate();
    share(pieces, |(piece, part)| work(piece * rows, part));
}

/// Works on all `pieces`, on the threads that the products between the passes have: libtorch's, or
/// those of the integer kernels where libtorch is kept to one.
fn share<T: Send>(pieces: impl Iterator<Item = T>, work: impl Fn(T) + Sync) {
    let pieces: Vec<T> = pieces.collect();
    if pieces.len() <= 1 {
        return pieces.into_iter().for_each(work);
    }
    if !openmp::has_team() {
        return Workers::shared().run(pieces, |piece, _| work(piece));
    }
    let pieces = Tasks::new(pieces);
    openmp::on_team(&|| pieces.drain(&work));
}

/// Rows of `width` values that begin `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a> {
    /// From the first value of the first row on.
    pub values: &'a [f32],
    /// Values from row to row.
    pub stride: usize,
    /// Values of a row.
    pub width: usize,
}

impl<'a> Strided<'a> {
    /// Rows that follow each other.
    pub(crate) fn dense(values: &'a [f32], width: usize) -> Self {
        Self { values, stride: width, width }
    }

    /// A row.
    #[inline(always)]
    pub(crate) fn row(self, index: usize) -> &'a [f32] {
        &self.values[index * self.stride..][..self.width]
    }
}

/// The rows `first..` that belong to a piece of `len` elements.
pub(crate) fn rows_of(x: &[f32], width: usize, first: usize, rows: usize) -> &[f32] {
    &x[first * width..(first + rows) * width]
}
