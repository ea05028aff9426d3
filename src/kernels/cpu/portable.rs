//! Plain arrays, for processors without a path of their own. Miri checks the blocking through it.

use super::vector::Vector;

/// Lanes of plain integers.
pub(super) struct Portable<const LANES: usize>;

impl<const LANES: usize> Vector for Portable<LANES> {
    type Codes = [[u8; 4]; LANES];
    type Sums = [i32; LANES];
    type Reals = [f32; LANES];

    const LANES: usize = LANES;
    const STEP: usize = 4;

    #[inline(always)]
    unsafe fn columns(from: *const u8) -> Self::Codes {
        // SAFETY: the caller's pointer is valid for 4 · LANES bytes; an array of bytes is unaligned.
        unsafe { from.cast::<Self::Codes>().read() }
    }

    #[inline(always)]
    unsafe fn row(from: *const u8) -> Self::Codes {
        // SAFETY: the caller's pointer is valid for 4 bytes.
        [unsafe { from.cast::<[u8; 4]>().read() }; LANES]
    }

    #[inline(always)]
    unsafe fn no_sums() -> Self::Sums {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Sums, row: Self::Codes, columns: Self::Codes) -> Self::Sums {
        std::array::from_fn(|lane| {
            let at = |i: usize| i32::from(row[lane][i]) * i32::from(columns[lane][i].cast_signed());
            sums[lane] + at(0) + at(1) + at(2) + at(3)
        })
    }

    #[inline(always)]
    unsafe fn times(factor: i32, sums: Self::Sums) -> Self::Sums {
        sums.map(|sum| factor * sum)
    }

    #[inline(always)]
    unsafe fn times_short(factor: i32, sums: Self::Sums) -> Self::Sums {
        sums.map(|sum| factor * i32::from(sum as i16))
    }

    #[inline(always)]
    unsafe fn widen(sums: Self::Sums) -> Self::Sums {
        sums
    }

    #[inline(always)]
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums {
        std::array::from_fn(|lane| a[lane] + b[lane])
    }

    #[inline(always)]
    unsafe fn reals(sums: Self::Sums) -> Self::Reals {
        sums.map(|sum| sum as f32)
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Reals {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Reals {
        // SAFETY: the caller's pointer is valid for LANES numbers.
        unsafe { from.cast::<Self::Reals>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, reals: Self::Reals) {
        // SAFETY: the caller's pointer is valid for LANES numbers.
        unsafe { to.cast::<Self::Reals>().write_unaligned(reals) }
    }

    #[inline(always)]
    unsafe fn prefetch(_to: *const f32) {}

    #[inline(always)]
    unsafe fn prefetch_for_later(_from: *const u8) {}

    #[inline(always)]
    unsafe fn multiply_add(a: Self::Reals, b: Self::Reals, c: Self::Reals) -> Self::Reals {
        std::array::from_fn(|lane| a[lane].mul_add(b[lane], c[lane]))
    }
}
