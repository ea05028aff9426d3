//! The few operations in which instruction sets differ.

/// One way to multiply codes: vectors of `LANES` result columns, `STEP` codes of the summed axis at
/// a time.
///
/// # Safety
/// The methods may be called only where the instruction set is available; each pointer must be
/// valid for the bytes that its method reads or writes. No alignment is needed.
pub(super) trait Vector {
    /// Codes: of `LANES` columns, or of one row repeated in all lanes.
    type Codes: Copy;
    /// Partial sums, `widen`ed to one `i32` a lane in the end.
    type Sums: Copy;
    /// One `f32` a lane.
    type Reals: Copy;

    /// Result columns of one vector.
    const LANES: usize;
    /// Codes of the summed axis in one step: 4 bytes of a row hold 4 codes, or 2 of 16 bits.
    const STEP: usize;
    /// Whether partial sums must be widened after some steps; else a group is one run of them.
    const HAS_RUNS: bool = false;

    /// Loads 4 · `LANES` bytes: one step of `LANES` columns.
    unsafe fn columns(from: *const u8) -> Self::Codes;
    /// Loads 4 bytes, one step of a row, into every lane.
    unsafe fn row(from: *const u8) -> Self::Codes;
    /// Sums of nothing.
    unsafe fn no_sums() -> Self::Sums;
    /// `sums + row · columns`, unsigned times signed.
    unsafe fn dot(sums: Self::Sums, row: Self::Codes, columns: Self::Codes) -> Self::Sums;
    /// `factor · sums`.
    unsafe fn times(factor: i32, sums: Self::Sums) -> Self::Sums;
    /// The same for a factor and sums that fit 16 bits.
    unsafe fn times_short(factor: i32, sums: Self::Sums) -> Self::Sums;
    /// Partial sums as one `i32` a lane, still in the same type.
    unsafe fn widen(sums: Self::Sums) -> Self::Sums;
    /// Sum of two widened vectors.
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// Widened sums, rounded to the nearest `f32`.
    unsafe fn reals(sums: Self::Sums) -> Self::Reals;

    /// `value` in every lane.
    unsafe fn splat(value: f32) -> Self::Reals;
    /// Loads `LANES` numbers.
    unsafe fn load(from: *const f32) -> Self::Reals;
    /// Stores `LANES` numbers.
    unsafe fn store(to: *mut f32, reals: Self::Reals);
    /// Says that what is at `to` will be written soon. Any address will do.
    unsafe fn prefetch(to: *const f32);
    /// Says that what is at `from` will be read later. Any address will do.
    unsafe fn prefetch_for_later(from: *const u8);
    /// `a · b + c`, rounded once.
    unsafe fn multiply_add(a: Self::Reals, b: Self::Reals, c: Self::Reals) -> Self::Reals;
}
