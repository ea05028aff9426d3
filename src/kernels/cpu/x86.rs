//! AVX2 and VNNI. Every function is one or two instructions, named in its comment.
//!
//! The functions are inlined into entry points that enable the instruction set, hence no
//! `target_feature` here.

use std::arch::asm;
use std::arch::x86_64::*;

use super::job::{self, Destination, Job, Scratch};
use super::peak;
use super::vector::Vector;

/// AVX2, 16-bit partial sums (`vpmaddubsw`): the caller keeps runs so short that none overflows.
pub(super) struct Avx2Narrow;
/// AVX2, codes widened to 16 bits (`vpmaddwd`): exact for any 8-bit codes.
pub(super) struct Avx2Wide;
/// 256-bit VNNI (`vpdpbusd`, VEX).
pub(super) struct AvxVnni;
/// 256-bit VNNI as AVX-512 encodes it (`vpdpbusd`, EVEX).
#[cfg(test)]
pub(super) struct LikeAvxVnni;
/// 512-bit VNNI (`vpdpbusd`, EVEX).
pub(super) struct Avx512Vnni;

/// [`job::run`] of one kernel in tiles of some rows.
macro_rules! run {
    ($vector:ident, $rows:literal, $width:literal, $features:literal, $run:ident) => {
        #[target_feature(enable = $features)]
        pub(super) fn $run(job: &Job<'_>, out: Destination<'_, '_>, scratch: &mut Scratch) {
            // SAFETY: this function enables the instruction set.
            unsafe { job::run::<$vector, $rows, $width>(job, out, scratch) }
        }
    };
}

/// [`job::run`] and [`peak::spin`] of one kernel.
macro_rules! entry_points {
    ($vector:ident, $rows:literal, $width:literal, $features:literal, $register:ident,
     $run:ident, $spin:ident) => {
        run!($vector, $rows, $width, $features, $run);

        #[target_feature(enable = $features)]
        pub(super) fn $spin(steps: u64) -> u64 {
            let opaque = |mut codes| {
                // SAFETY: does nothing to a register; the compiler cannot know what.
                unsafe {
                    asm!("/* {0} */", inout($register) codes, options(nomem, nostack, preserves_flags))
                };
                codes
            };
            // SAFETY: this function enables the instruction set.
            unsafe { peak::spin::<$vector, $rows, $width>(steps, opaque) }
        }
    };
}

entry_points!(Avx2Narrow, 6, 2, "avx2,fma", ymm_reg, run_avx2_narrow, spin_avx2_narrow);
entry_points!(Avx2Wide, 6, 2, "avx2,fma", ymm_reg, run_avx2_wide, spin_avx2_wide);
entry_points!(AvxVnni, 6, 2, "avx2,fma,avxvnni", ymm_reg, run_avx_vnni, spin_avx_vnni);
#[cfg(test)]
entry_points!(
    LikeAvxVnni,
    6,
    2,
    "avx2,fma,avx512f,avx512vl,avx512vnni",
    ymm_reg,
    run_like_avx_vnni,
    spin_like_avx_vnni
);
entry_points!(
    Avx512Vnni,
    12,
    2,
    "avx2,fma,avx512f,avx512vnni",
    zmm_reg,
    run_avx512_vnni,
    spin_avx512_vnni
);
run!(Avx512Vnni, 6, 2, "avx2,fma,avx512f,avx512vnni", run_avx512_vnni_sums);

/// What all 256-bit vectors share.
macro_rules! vector_256 {
    () => {
        type Codes = __m256i;
        type Sums = __m256i;
        type Reals = __m256;

        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn columns(from: *const u8) -> __m256i {
            // SAFETY: the caller's pointer is valid for 32 bytes; the load is unaligned.
            unsafe { _mm256_loadu_si256(from.cast()) } // vmovdqu
        }

        #[inline(always)]
        unsafe fn row(from: *const u8) -> __m256i {
            // SAFETY: the caller's pointer is valid for 4 bytes; the read is unaligned.
            unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) } // vpbroadcastd
        }

        #[inline(always)]
        unsafe fn no_sums() -> __m256i {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_setzero_si256() } // vpxor
        }

        #[inline(always)]
        unsafe fn add(a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_add_epi32(a, b) } // vpaddd
        }

        #[inline(always)]
        unsafe fn reals(sums: __m256i) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_cvtepi32_ps(sums) } // vcvtdq2ps
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            // SAFETY: the caller has AVX2.
            unsafe { _mm256_set1_ps(value) } // vbroadcastss
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: the caller's pointer is valid for 8 numbers; the load is unaligned.
            unsafe { _mm256_loadu_ps(from) } // vmovups
        }

        #[inline(always)]
        unsafe fn store(to: *mut f32, reals: __m256) {
            // SAFETY: the caller's pointer is valid for 8 numbers; the store is unaligned.
            unsafe { _mm256_storeu_ps(to, reals) } // vmovups
        }

        #[inline(always)]
        unsafe fn prefetch(to: *const f32) {
            // SAFETY: a hint, without effect on memory.
            unsafe { _mm_prefetch::<_MM_HINT_ET0>(to.cast()) } // prefetchw
        }

        #[inline(always)]
        unsafe fn prefetch_for_later(from: *const u8) {
            // SAFETY: a hint, without effect on memory.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) } // prefetcht1
        }

        #[inline(always)]
        unsafe fn multiply_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: the caller has FMA.
            unsafe { _mm256_fmadd_ps(a, b, c) } // vfmadd
        }
    };
}

/// `vpmaddwd`, which AVX-512F and VNNI have as `vpdpwssd` only.
#[inline(always)]
unsafe fn multiply_short(a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller has AVX-512 VNNI.
    unsafe { _mm512_dpwssd_epi32(_mm512_setzero_si512(), a, b) }
}

/// One `i32` a lane from the start.
macro_rules! sums_of_32_bits {
    ($times:ident, $times_short:ident, $set:ident) => {
        #[inline(always)]
        unsafe fn times(factor: i32, sums: Self::Sums) -> Self::Sums {
            // SAFETY: the caller has the instruction set.
            unsafe { $times($set(factor), sums) } // vpmulld
        }

        #[inline(always)]
        unsafe fn times_short(factor: i32, sums: Self::Sums) -> Self::Sums {
            // The upper half of a factor is zero. Half as much work as `vpmulld`.
            // SAFETY: the caller has the instruction set.
            unsafe { $times_short($set(factor), sums) } // vpmaddwd
        }

        #[inline(always)]
        unsafe fn widen(sums: Self::Sums) -> Self::Sums {
            sums
        }
    };
}

impl Vector for Avx2Narrow {
    vector_256!();
    const STEP: usize = 4;
    const HAS_RUNS: bool = true;

    #[inline(always)]
    unsafe fn dot(sums: __m256i, row: __m256i, columns: __m256i) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_add_epi16(sums, _mm256_maddubs_epi16(row, columns)) } // vpmaddubsw, vpaddw
    }

    #[inline(always)]
    unsafe fn times(factor: i32, sums: __m256i) -> __m256i {
        // Modulo 2^16: only the sum in the end has to fit.
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_mullo_epi16(_mm256_set1_epi16(factor as i16), sums) } // vpmullw
    }

    #[inline(always)]
    unsafe fn times_short(factor: i32, sums: __m256i) -> __m256i {
        // SAFETY: as the caller says.
        unsafe { Self::times(factor, sums) }
    }

    #[inline(always)]
    unsafe fn widen(sums: __m256i) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) } // vpmaddwd
    }
}

impl Vector for Avx2Wide {
    vector_256!();
    sums_of_32_bits!(_mm256_mullo_epi32, _mm256_madd_epi16, _mm256_set1_epi32);
    const STEP: usize = 2;

    #[inline(always)]
    unsafe fn dot(sums: __m256i, row: __m256i, columns: __m256i) -> __m256i {
        // SAFETY: the caller has AVX2.
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(row, columns)) } // vpmaddwd, vpaddd
    }
}

impl Vector for AvxVnni {
    vector_256!();
    sums_of_32_bits!(_mm256_mullo_epi32, _mm256_madd_epi16, _mm256_set1_epi32);
    const STEP: usize = 4;

    #[inline(always)]
    unsafe fn dot(sums: __m256i, row: __m256i, columns: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-VNNI.
        unsafe { _mm256_dpbusd_avx_epi32(sums, row, columns) } // vpdpbusd
    }
}

#[cfg(test)]
impl Vector for LikeAvxVnni {
    vector_256!();
    sums_of_32_bits!(_mm256_mullo_epi32, _mm256_madd_epi16, _mm256_set1_epi32);
    const STEP: usize = 4;

    #[inline(always)]
    unsafe fn dot(sums: __m256i, row: __m256i, columns: __m256i) -> __m256i {
        // SAFETY: the caller has AVX-512 VNNI and VL.
        unsafe { _mm256_dpbusd_epi32(sums, row, columns) } // vpdpbusd
    }
}

impl Vector for Avx512Vnni {
    type Codes = __m512i;
    type Sums = __m512i;
    type Reals = __m512;

    const LANES: usize = 16;
    const STEP: usize = 4;

    sums_of_32_bits!(_mm512_mullo_epi32, multiply_short, _mm512_set1_epi32);

    #[inline(always)]
    unsafe fn columns(from: *const u8) -> __m512i {
        // SAFETY: the caller's pointer is valid for 64 bytes; the load is unaligned.
        unsafe { _mm512_loadu_si512(from.cast()) } // vmovdqu
    }

    #[inline(always)]
    unsafe fn row(from: *const u8) -> __m512i {
        // SAFETY: the caller's pointer is valid for 4 bytes; the read is unaligned.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) } // vpbroadcastd
    }

    #[inline(always)]
    unsafe fn no_sums() -> __m512i {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_setzero_si512() } // vpxord
    }

    #[inline(always)]
    unsafe fn dot(sums: __m512i, row: __m512i, columns: __m512i) -> __m512i {
        // SAFETY: the caller has AVX-512 VNNI.
        unsafe { _mm512_dpbusd_epi32(sums, row, columns) } // vpdpbusd
    }

    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_add_epi32(a, b) } // vpaddd
    }

    #[inline(always)]
    unsafe fn reals(sums: __m512i) -> __m512 {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_cvtepi32_ps(sums) } // vcvtdq2ps
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_set1_ps(value) } // vbroadcastss
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller's pointer is valid for 16 numbers; the load is unaligned.
        unsafe { _mm512_loadu_ps(from) } // vmovups
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, reals: __m512) {
        // SAFETY: the caller's pointer is valid for 16 numbers; the store is unaligned.
        unsafe { _mm512_storeu_ps(to, reals) } // vmovups
    }

    #[inline(always)]
    unsafe fn prefetch(to: *const f32) {
        // SAFETY: a hint, without effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(to.cast()) } // prefetchw
    }

    #[inline(always)]
    unsafe fn prefetch_for_later(from: *const u8) {
        // SAFETY: a hint, without effect on memory.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.cast()) } // prefetcht1
    }

    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_fmadd_ps(a, b, c) } // vfmadd
    }
}
