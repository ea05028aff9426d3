//! The innermost kernel, generic over instruction sets: tiles of `ROWS` rows by `WIDTH` vectors of
//! columns.
//!
//! The order of the roundings is part of the interface, so that results are the same bits
//! everywhere:
//!
//! ```text
//! y = bias
//! for each right term:
//!     t = 0
//!     for each left term:
//!         for each group: t = fma(f32(Σ (x − z) · w), scale, t)   z clamped to the grid, exact sum
//!         for each group: t = fma(−scale · (zero point − z), Σ w, t)           where they differ
//!         for each group: t = fma(−scale · Σ (x − zero point), zero point of w − centre, t)
//!                                                                              where they differ
//!     y = fma(t, scale of w, y)
//! ```
//!
//! with w = code − centre. Closures would not be compiled for the instruction set: there are none.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::vector::Vector;
use crate::kernels::prepare::BlockTerm;

/// Most result columns of a panel.
const MAX_PANEL: usize = 32;

/// Lengths that the loops share.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) groups: usize,
    /// Steps of a group.
    pub(super) group_steps: usize,
    /// Steps of a run, after which sums are widened; the last run of a group may be shorter.
    pub(super) run_steps: usize,
    /// Runs of a group.
    pub(super) runs: usize,
}

/// A term of the left operand.
pub(super) struct Left<'a> {
    /// The block's rows, of which the last may be too short.
    pub(super) codes: &'a [u8],
    /// The last row.
    pub(super) last: &'a [u8],
    /// Their parameters.
    pub(super) term: &'a BlockTerm,
}

/// A panel of a term of the right operand.
pub(super) struct Right<'a> {
    /// Step, column, code.
    pub(super) codes: &'a [u8],
    /// −Σ w of each run, in the kernel's own partial sums.
    pub(super) sums: &'a [u8],
    /// Whether these fit 16 bits.
    pub(super) short_sums: bool,
    /// Σ w of each group, [group, column].
    pub(super) group_sums: &'a [f32],
    /// A number per column.
    pub(super) scale: &'a [f32],
    /// A number per column, or nothing if they are zero.
    pub(super) residual: &'a [f32],
}

/// One tile of a block. Every row holds the steps of all groups, and so does every panel.
pub(super) struct Tile<'a, const ROWS: usize> {
    left: &'a [Left<'a>],
    extent: Extent,
    /// Bytes from row to row.
    stride: usize,
    /// Last row of the block.
    last_row: usize,
    /// Which tile of the block.
    index: usize,
    /// Where the rows of the first left term begin.
    first: [*const u8; ROWS],
}

impl<'a, const ROWS: usize> Tile<'a, ROWS> {
    /// A tile of a block whose last row is the given one.
    #[inline(always)]
    pub(super) fn new(
        left: &'a [Left<'a>],
        extent: Extent,
        stride: usize,
        last_row: usize,
        index: usize,
    ) -> Self {
        let first = [std::ptr::null(); ROWS];
        let mut tile = Self { left, extent, stride, last_row, index, first };
        if let Some(left) = left.first() {
            tile.first = tile.rows(left);
        }
        tile
    }

    /// Writes the result for one panel, of which `right` holds the terms, to `out`.
    ///
    /// # Safety
    /// The instruction set of `V` must be available, the operands as long as the extent says.
    #[inline(always)]
    pub(super) unsafe fn multiply<V: Vector, const WIDTH: usize>(
        &self,
        right: &[Right<'_>],
        bias: &[f32],
        mut out: Target<'_, '_>,
    ) {
        // SAFETY: as the caller says.
        unsafe {
            let bias = load::<V, WIDTH>(bias);
            if let ([left], [right], 1) = (self.left, right, self.extent.groups)
                && !left.term.any_outside
            {
                return if right.residual.is_empty() {
                    self.multiply_one::<V, WIDTH, false>(left, right, bias, out)
                } else {
                    self.multiply_one::<V, WIDTH, true>(left, right, bias, out)
                };
            }
            if let [right] = right {
                let total = self.total::<V, WIDTH>(right);
                let scale = load::<V, WIDTH>(right.scale);
                if let Some(out) = out.whole::<ROWS>(WIDTH * V::LANES) {
                    for r in 0..ROWS {
                        for v in 0..WIDTH {
                            let y = V::multiply_add(total[r][v], scale[v], bias[v]);
                            V::store(out[r].add(v * V::LANES), y);
                        }
                    }
                } else {
                    let mut parts = Parts::<ROWS>::new();
                    for r in 0..ROWS {
                        let mut row = bias;
                        for v in 0..WIDTH {
                            row[v] = V::multiply_add(total[r][v], scale[v], bias[v]);
                        }
                        parts.set::<V, WIDTH>(r, row);
                    }
                    out.store_parts::<ROWS>(&parts, WIDTH * V::LANES);
                }
                return;
            }
            let mut result = [bias; ROWS];
            for right in right {
                let total = self.total::<V, WIDTH>(right);
                let scale = load::<V, WIDTH>(right.scale);
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        result[r][v] = V::multiply_add(total[r][v], scale[v], result[r][v]);
                    }
                }
            }
            let mut parts = Parts::<ROWS>::new();
            for r in 0..ROWS {
                parts.set::<V, WIDTH>(r, result[r]);
            }
            out.store_parts::<ROWS>(&parts, WIDTH * V::LANES);
        }
    }

    /// The common case of one sum an element, which needs no memory; the roundings are the same.
    #[inline(always)]
    unsafe fn multiply_one<V: Vector, const WIDTH: usize, const RESIDUAL: bool>(
        &self,
        left: &Left<'_>,
        right: &Right<'_>,
        bias: [V::Reals; WIDTH],
        mut out: Target<'_, '_>,
    ) {
        let first = self.index * ROWS;
        let (zero_points, _) = left.term.zero_points[first..].as_chunks::<ROWS>();
        let scales = &left.term.scales[first..][..ROWS];
        let centred = if RESIDUAL { &left.term.centred[first..][..ROWS] } else { scales };
        // SAFETY: as the caller says.
        unsafe {
            let sums = self.sum_group::<V, WIDTH>(&self.first, right, 0, &zero_points[0]);
            let scale = load::<V, WIDTH>(right.scale);
            let residual = if RESIDUAL { load::<V, WIDTH>(right.residual) } else { scale };
            let columns = ColumnTerms::<V, WIDTH> { scale, residual, bias };
            // Row by row and at once, where the tile is whole, so that sums stay in registers.
            if let Some(out) = out.whole::<ROWS>(WIDTH * V::LANES) {
                for r in 0..ROWS {
                    let factors = [scales[r], centred[r]];
                    let row = rescale::<V, WIDTH, RESIDUAL>(&sums[r], factors, &columns);
                    for v in 0..WIDTH {
                        V::store(out[r].add(v * V::LANES), row[v]);
                    }
                }
            } else {
                let mut parts = Parts::<ROWS>::new();
                for r in 0..ROWS {
                    let factors = [scales[r], centred[r]];
                    let row = rescale::<V, WIDTH, RESIDUAL>(&sums[r], factors, &columns);
                    parts.set::<V, WIDTH>(r, row);
                }
                out.store_parts::<ROWS>(&parts, WIDTH * V::LANES);
            }
        }
    }

    /// What all left terms add to, before the right term's scale.
    #[inline(always)]
    unsafe fn total<V: Vector, const WIDTH: usize>(
        &self,
        right: &Right<'_>,
    ) -> [[V::Reals; WIDTH]; ROWS] {
        // SAFETY: as the caller says.
        unsafe {
            let mut total = [[V::splat(0.0); WIDTH]; ROWS];
            for (index, left) in self.left.iter().enumerate() {
                let rows = if index == 0 { self.first } else { self.rows(left) };
                self.add_groups::<V, WIDTH>((left, &rows), right, &mut total);
                if left.term.any_outside {
                    self.add_outside::<V, WIDTH>(left.term, right, &mut total);
                }
                if !right.residual.is_empty() {
                    self.add_residual::<V, WIDTH>(left.term, right, &mut total);
                }
            }
            total
        }
    }

    /// Where the tile's rows begin. Rows beyond the last one repeat it; their results are not stored.
    #[inline(always)]
    fn rows(&self, left: &Left<'_>) -> [*const u8; ROWS] {
        let mut rows = [left.last.as_ptr(); ROWS];
        for (r, row) in rows.iter_mut().enumerate() {
            let index = self.index * ROWS + r;
            if index < self.last_row {
                *row = left.codes[index * self.stride..].as_ptr();
            }
        }
        rows
    }

    /// Adds the sums of every group, times its scale.
    #[inline(always)]
    unsafe fn add_groups<V: Vector, const WIDTH: usize>(
        &self,
        (left, rows): (&Left<'_>, &[*const u8; ROWS]),
        right: &Right<'_>,
        total: &mut [[V::Reals; WIDTH]; ROWS],
    ) {
        // In registers meanwhile.
        let mut here = *total;
        let groups = self.extent.groups;
        let (first, per_tile) = (self.index * groups, groups * ROWS);
        let of_tile = first * ROWS..first * ROWS + per_tile;
        let (zero_points, _) = left.term.zero_points[of_tile.clone()].as_chunks::<ROWS>();
        let (scales, _) = left.term.scales[of_tile].as_chunks::<ROWS>();
        let active = &left.term.active[first..first + groups];
        let parameters = zero_points.iter().zip(scales).zip(active);
        for (group, ((zero_points, scales), active)) in parameters.enumerate() {
            if !*active {
                continue;
            }
            // SAFETY: as the caller says.
            unsafe {
                let sums = self.sum_group::<V, WIDTH>(rows, right, group, zero_points);
                for r in 0..ROWS {
                    let scale = V::splat(scales[r]);
                    for v in 0..WIDTH {
                        here[r][v] = V::multiply_add(V::reals(sums[r][v]), scale, here[r][v]);
                    }
                }
            }
        }
        *total = here;
    }

    /// Σ (x − z) · w of one group, widened.
    #[inline(always)]
    unsafe fn sum_group<V: Vector, const WIDTH: usize>(
        &self,
        rows: &[*const u8; ROWS],
        right: &Right<'_>,
        group: usize,
        zero_points: &[i32; ROWS],
    ) -> [[V::Sums; WIDTH]; ROWS] {
        let Extent { group_steps, run_steps, runs, .. } = self.extent;
        debug_assert!(right.codes.len() == 4 * WIDTH * V::LANES * group_steps * self.extent.groups);
        debug_assert!(right.sums.len() == WIDTH * size_of::<V::Sums>() * runs * self.extent.groups);
        let (first, end) = (group * group_steps, (group + 1) * group_steps);
        let run =
            Run { rows, codes: right.codes.as_ptr(), is_short: right.short_sums, zero_points };
        // SAFETY: the steps of every run lie within the group, hence within rows and codes; so do its
        // sums. The instruction set is available.
        unsafe {
            let sums = right.sums.as_ptr().cast::<[V::Sums; WIDTH]>().add(group * runs);
            if !V::HAS_RUNS || runs == 1 {
                return run.sum::<V, WIDTH>(sums.read_unaligned(), first..end);
            }
            let mut total = [[V::no_sums(); WIDTH]; ROWS];
            for index in 0..runs {
                let from = first + index * run_steps;
                let start = sums.add(index).read_unaligned();
                let next = run.sum::<V, WIDTH>(start, from..end.min(from + run_steps));
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        total[r][v] = V::add(total[r][v], next[r][v]);
                    }
                }
            }
            total
        }
    }

    /// Adds what zero points outside their grid contribute.
    #[inline(always)]
    unsafe fn add_outside<V: Vector, const WIDTH: usize>(
        &self,
        left: &BlockTerm,
        right: &Right<'_>,
        total: &mut [[V::Reals; WIDTH]; ROWS],
    ) {
        let columns = WIDTH * V::LANES;
        for group in 0..self.extent.groups {
            let at = self.index * self.extent.groups + group;
            let outside = &left.outside[at * ROWS..][..ROWS];
            let sums = &right.group_sums[group * columns..][..columns];
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
    unsafe fn add_residual<V: Vector, const WIDTH: usize>(
        &self,
        left: &BlockTerm,
        right: &Right<'_>,
        total: &mut [[V::Reals; WIDTH]; ROWS],
    ) {
        // SAFETY: the instruction set is available.
        unsafe {
            let residual = load::<V, WIDTH>(right.residual);
            for group in 0..self.extent.groups {
                let at = self.index * self.extent.groups + group;
                let centred = &left.centred[at * ROWS..][..ROWS];
                for r in 0..ROWS {
                    let centred = V::splat(-centred[r]);
                    for v in 0..WIDTH {
                        total[r][v] = V::multiply_add(centred, residual[v], total[r][v]);
                    }
                }
            }
        }
    }
}

/// What is summed up in runs of steps.
struct Run<'a, const ROWS: usize> {
    rows: &'a [*const u8; ROWS],
    codes: *const u8,
    /// Whether sums of the columns' codes fit 16 bits.
    is_short: bool,
    zero_points: &'a [i32; ROWS],
}

impl<const ROWS: usize> Run<'_, ROWS> {
    /// Σ (x − z) · w of some steps, widened. `start` is −Σ w.
    #[inline(always)]
    unsafe fn sum<V: Vector, const WIDTH: usize>(
        &self,
        start: [V::Sums; WIDTH],
        steps: Range<usize>,
    ) -> [[V::Sums; WIDTH]; ROWS] {
        let zero_points = self.zero_points;
        // SAFETY: the pointers are valid for the steps; the instruction set is available.
        unsafe {
            let mut sums = [start; ROWS];
            if self.is_short {
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        sums[r][v] = V::times_short(zero_points[r], start[v]);
                    }
                }
            } else {
                for r in 0..ROWS {
                    for v in 0..WIDTH {
                        sums[r][v] = V::times(zero_points[r], start[v]);
                    }
                }
            }
            // One step at a time: of two, the compiler would keep more alive than there are registers.
            let mut from = self.codes.add(4 * V::LANES * WIDTH * steps.start);
            for step in steps {
                let mut columns = [V::columns(from); WIDTH];
                for (v, columns) in columns.iter_mut().enumerate().skip(1) {
                    *columns = V::columns(from.add(4 * V::LANES * v));
                }
                for r in 0..ROWS {
                    let row = V::row(self.rows[r].add(4 * step));
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
}

/// Loads a vector for each vector of columns.
#[inline(always)]
unsafe fn load<V: Vector, const WIDTH: usize>(from: &[f32]) -> [V::Reals; WIDTH] {
    assert!(from.len() >= WIDTH * V::LANES);
    // SAFETY: `from` is long enough; the instruction set is available.
    unsafe {
        let mut reals = [V::load(from.as_ptr()); WIDTH];
        for (v, reals) in reals.iter_mut().enumerate().skip(1) {
            *reals = V::load(from.as_ptr().add(v * V::LANES));
        }
        reals
    }
}

/// What the columns of a panel have in the common case.
struct ColumnTerms<V: Vector, const WIDTH: usize> {
    scale: [V::Reals; WIDTH],
    /// Unused where columns have none.
    residual: [V::Reals; WIDTH],
    bias: [V::Reals; WIDTH],
}

/// A row of the common case: one sum, rescaled. The factors are the row's scale and that of the residual.
///
/// # Safety
/// The instruction set of `V` must be available.
#[inline(always)]
unsafe fn rescale<V: Vector, const WIDTH: usize, const RESIDUAL: bool>(
    sums: &[V::Sums; WIDTH],
    [left_scale, centred]: [f32; 2],
    columns: &ColumnTerms<V, WIDTH>,
) -> [V::Reals; WIDTH] {
    // SAFETY: as the caller says.
    unsafe {
        let left_scale = V::splat(left_scale);
        let mut row = columns.bias;
        for v in 0..WIDTH {
            let mut sum = V::multiply_add(V::reals(sums[v]), left_scale, V::splat(0.0));
            if RESIDUAL {
                sum = V::multiply_add(V::splat(-centred), columns.residual[v], sum);
            }
            row[v] = V::multiply_add(sum, columns.scale[v], columns.bias[v]);
        }
        row
    }
}

/// Where the result of a tile belongs: from column `start` of `rows` on, which are equally long and may
/// be fewer or shorter than the tile.
pub(super) struct Target<'a, 'b> {
    pub(super) rows: &'a mut [&'b mut [f32]],
    pub(super) start: usize,
}

impl Target<'_, '_> {
    /// Where each row begins, if there is room for a whole tile.
    #[inline(always)]
    fn whole<const ROWS: usize>(&mut self, columns: usize) -> Option<[*mut f32; ROWS]> {
        let rows = self.rows.first_chunk_mut::<ROWS>()?;
        let mut starts = [std::ptr::null_mut(); ROWS];
        let mut fits = true;
        for r in 0..ROWS {
            fits &= rows[r].len() >= self.start + columns;
            starts[r] = rows[r].as_mut_ptr().wrapping_add(self.start);
        }
        fits.then_some(starts)
    }

    /// Stores as much of a tile of `columns` as there is room for.
    ///
    /// # Safety
    /// All rows of `parts` must be set, to that many columns.
    #[inline(always)]
    unsafe fn store_parts<const ROWS: usize>(self, parts: &Parts<ROWS>, columns: usize) {
        for (row, numbers) in self.rows.iter_mut().zip(&parts.0) {
            let row = &mut row[self.start..];
            for (to, from) in row.iter_mut().zip(&numbers[..columns]) {
                // SAFETY: as the caller says.
                *to = unsafe { from.assume_init() };
            }
        }
    }
}

/// A tile in memory, whose rows can be counted at run time. Not initialized: compilers would do that for
/// every tile, whether it comes to it or not.
struct Parts<const ROWS: usize>([[MaybeUninit<f32>; MAX_PANEL]; ROWS]);

impl<const ROWS: usize> Parts<ROWS> {
    #[inline(always)]
    fn new() -> Self {
        Self([[MaybeUninit::uninit(); MAX_PANEL]; ROWS])
    }

    /// # Safety
    /// The instruction set of `V` must be available.
    #[inline(always)]
    unsafe fn set<V: Vector, const WIDTH: usize>(&mut self, r: usize, row: [V::Reals; WIDTH]) {
        for v in 0..WIDTH {
            // SAFETY: WIDTH vectors fit MAX_PANEL numbers.
            unsafe { V::store(self.0[r].as_mut_ptr().add(v * V::LANES).cast(), row[v]) };
        }
    }
}
