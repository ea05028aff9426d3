//! Sixteen numbers at once: what a register of AVX-512 holds, or two of AVX2. Results are the same bits
//! with both; plain code has no fused multiply-add.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Numbers of [`Lanes`].
pub(in crate::kernels) const LANES: usize = 16;

/// Entries of a table of [`Lanes::entry`].
pub(in crate::kernels) const FEW: usize = 32;

/// The numbers in whole registers of `len`, and how many are left.
#[inline(always)]
pub(in crate::kernels) fn registers(len: usize) -> (usize, usize) {
    (len - len % LANES, len % LANES)
}

/// Sixteen `f32`.
///
/// # Safety
/// The methods may be called only where the instruction set is available; each pointer must be valid for
/// the numbers that its method reads or writes. No alignment is needed.
pub(in crate::kernels) trait Lanes: Copy {
    /// `value` in every lane.
    unsafe fn splat(value: f32) -> Self;
    /// Loads 16 numbers.
    unsafe fn load(from: *const f32) -> Self;
    /// Loads `count` numbers, fewer than 16; the other lanes are `others`.
    unsafe fn load_first(from: *const f32, count: usize, others: f32) -> Self;
    /// The first `count` numbers, fewer than 16; the other lanes are `others`.
    unsafe fn first(self, count: usize, others: f32) -> Self;
    /// Stores 16 numbers.
    unsafe fn store(self, to: *mut f32);
    /// Stores the first `count` numbers, fewer than 16.
    unsafe fn store_first(self, to: *mut f32, count: usize);
    /// Stores the lowest byte of every number's bits.
    unsafe fn store_bytes(self, to: *mut u8);
    /// As [`Lanes::store_bytes`], of the first `count` numbers, fewer than 16.
    #[inline(always)]
    unsafe fn store_first_bytes(self, to: *mut u8, count: usize) {
        let mut all = [0; LANES];
        // SAFETY: the caller's pointer is valid for as many.
        unsafe {
            self.store_bytes(all.as_mut_ptr());
            to.copy_from_nonoverlapping(all.as_ptr(), count.min(LANES));
        }
    }
    /// `self + other`.
    unsafe fn add(self, other: Self) -> Self;
    /// `self − other`.
    unsafe fn subtract(self, other: Self) -> Self;
    /// `self · other`.
    unsafe fn multiply(self, other: Self) -> Self;
    /// `self / other`.
    unsafe fn divide(self, other: Self) -> Self;
    /// `self · b + c`; rounded once where that is one instruction.
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self;
    /// `self` where it is larger, else `other`: also where one is NaN.
    unsafe fn larger(self, other: Self) -> Self;
    /// `self` where it is smaller, else `other`: also where one is NaN.
    unsafe fn smaller(self, other: Self) -> Self;
    /// The nearest integer, the even one of two.
    unsafe fn round(self) -> Self;
    /// 2ⁿ, n being the difference to `zero` of the bits: both have an integer in the last ones.
    unsafe fn power_of_two(self, zero: f32) -> Self;
    /// The sum, of halves, of their halves, and so on.
    unsafe fn sum(self) -> f32;
    /// The largest number; a lane that is NaN does not count.
    unsafe fn largest(self) -> f32;
    /// The smallest number; a lane that is NaN does not count.
    unsafe fn smallest(self) -> f32;
    /// Whether a lane is NaN.
    unsafe fn has_nan(self) -> bool;
    /// Whether a lane is not equal to that of `other`: also where one is NaN.
    unsafe fn differs(self, other: Self) -> bool;
    /// The bits plus those of `other`.
    unsafe fn add_bits(self, other: Self) -> Self;
    /// The bits less those of `other`.
    unsafe fn subtract_bits(self, other: Self) -> Self;
    /// The bits moved right, fewer than 32 places.
    unsafe fn move_bits(self, places: u32) -> Self;
    /// The bits of the entry of a table whose number the last bits are.
    unsafe fn entry(self, table: &[u32; FEW]) -> Self;
    /// One more than `counts` in lanes with `low <= self < high`.
    unsafe fn count_between(self, low: Self, high: Self, counts: Self) -> Self;
}

/// Compiles a function for the base instruction set, AVX2 with FMA and AVX-512 and calls what the
/// processor can run: `$generic` is generic over [`Lanes`].
macro_rules! for_lanes {
    (
        $(#[$doc:meta])*
        $vis:vis fn $name:ident, $generic:ident, ($($argument:ident: $type:ty),*) $(-> $result:ty)?
    ) => {
        $(#[$doc])*
        $vis fn $name($($argument: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn widest($($argument: $type),*) $(-> $result)? {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: this function enables them.
                    unsafe { $generic::<$crate::kernels::cpu::lanes::Avx512>($($argument),*) }
                }
                #[target_feature(enable = "avx2,fma")]
                fn fused($($argument: $type),*) $(-> $result)? {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: this function enables them.
                    unsafe { $generic::<$crate::kernels::cpu::lanes::Avx2>($($argument),*) }
                }
                if $crate::kernels::cpu::has_avx512() {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: the processor has these features.
                    return unsafe { widest($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: the processor was just asked for both features.
                    return unsafe { fused($($argument),*) };
                }
            }
            #[allow(unsafe_code, reason = "plain code")]
            // SAFETY: it is always available.
            unsafe { $generic::<$crate::kernels::cpu::lanes::Plain>($($argument),*) }
        }
    };
}
pub(in crate::kernels) use for_lanes;

/// Plain code.
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Plain([f32; LANES]);

/// `$value` of every lane.
macro_rules! each {
    (|$lane:ident| $value:expr) => {{
        let mut result = [0.0; LANES];
        for ($lane, result) in result.iter_mut().enumerate() {
            *result = $value;
        }
        Plain(result)
    }};
}

impl Lanes for Plain {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid for 16 numbers.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize, others: f32) -> Self {
        let mut all = [others; LANES];
        // SAFETY: the caller's pointer is valid for as many.
        unsafe { from.copy_to_nonoverlapping(all.as_mut_ptr(), count.min(LANES)) };
        Self(all)
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, others: f32) -> Self {
        each!(|lane| if lane < count { self.0[lane] } else { others })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid for 16 numbers.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) };
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: the caller's pointer is valid for as many.
        unsafe { to.copy_from_nonoverlapping(self.0.as_ptr(), count.min(LANES)) };
    }

    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        let mut bytes = [0; LANES];
        for (byte, value) in bytes.iter_mut().zip(self.0) {
            *byte = value.to_bits() as u8;
        }
        // SAFETY: the caller's pointer is valid for 16 bytes.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(bytes) };
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        each!(|lane| self.0[lane] + other.0[lane])
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        each!(|lane| self.0[lane] - other.0[lane])
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        each!(|lane| self.0[lane] * other.0[lane])
    }

    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        each!(|lane| self.0[lane] / other.0[lane])
    }

    #[inline(always)]
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
        each!(|lane| self.0[lane] * b.0[lane] + c.0[lane])
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        each!(|lane| if self.0[lane] > other.0[lane] { self.0[lane] } else { other.0[lane] })
    }

    #[inline(always)]
    unsafe fn smaller(self, other: Self) -> Self {
        each!(|lane| if self.0[lane] < other.0[lane] { self.0[lane] } else { other.0[lane] })
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        each!(|lane| self.0[lane].round_ties_even())
    }

    #[inline(always)]
    unsafe fn power_of_two(self, zero: f32) -> Self {
        let bias = 127u32.wrapping_sub(zero.to_bits());
        each!(|lane| f32::from_bits(self.0[lane].to_bits().wrapping_add(bias) << 23))
    }

    #[inline(always)]
    unsafe fn sum(mut self) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                self.0[lane] += self.0[lane + width];
            }
            width /= 2;
        }
        self.0[0]
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |a, b| if b > a { b } else { a })
    }

    #[inline(always)]
    unsafe fn smallest(self) -> f32 {
        self.0.into_iter().fold(f32::INFINITY, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    unsafe fn has_nan(self) -> bool {
        self.0.iter().fold(false, |any, x| any | x.is_nan())
    }

    #[inline(always)]
    unsafe fn differs(self, other: Self) -> bool {
        self.0.iter().zip(other.0).fold(false, |any, (a, b)| any | (*a != b))
    }

    #[inline(always)]
    unsafe fn add_bits(self, other: Self) -> Self {
        each!(|lane| f32::from_bits(self.0[lane].to_bits().wrapping_add(other.0[lane].to_bits())))
    }

    #[inline(always)]
    unsafe fn subtract_bits(self, other: Self) -> Self {
        each!(|lane| f32::from_bits(self.0[lane].to_bits().wrapping_sub(other.0[lane].to_bits())))
    }

    #[inline(always)]
    unsafe fn move_bits(self, places: u32) -> Self {
        each!(|lane| f32::from_bits(self.0[lane].to_bits() >> places))
    }

    #[inline(always)]
    unsafe fn entry(self, table: &[u32; FEW]) -> Self {
        each!(|lane| f32::from_bits(table[self.0[lane].to_bits() as usize % FEW]))
    }

    #[inline(always)]
    unsafe fn count_between(self, low: Self, high: Self, counts: Self) -> Self {
        each!(|lane| {
            let is_between = (self.0[lane] >= low.0[lane]) & (self.0[lane] < high.0[lane]);
            counts.0[lane] + f32::from(u8::from(is_between))
        })
    }
}

/// A register of AVX-512.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_set1_ps(value) }) // vbroadcastss
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid for 16 numbers; the load is unaligned.
        Self(unsafe { _mm512_loadu_ps(from) }) // vmovups
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize, others: f32) -> Self {
        // SAFETY: lanes beyond the count are not read.
        Self(unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(others), (1 << count) - 1, from) })
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, others: f32) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_mask_mov_ps(_mm512_set1_ps(others), (1 << count) - 1, self.0) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid for 16 numbers; the store is unaligned.
        unsafe { _mm512_storeu_ps(to, self.0) } // vmovups
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        // SAFETY: lanes beyond the count are not written.
        unsafe { _mm512_mask_storeu_ps(to, (1 << count) - 1, self.0) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        // SAFETY: the caller's pointer is valid for 16 bytes; the store is unaligned.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(self.0))) } // vpmovdb
    }

    #[inline(always)]
    unsafe fn store_first_bytes(self, to: *mut u8, count: usize) {
        // SAFETY: the caller has AVX-512BW and VL; lanes beyond the count are not written.
        unsafe {
            let bytes = _mm512_cvtepi32_epi8(_mm512_castps_si512(self.0)); // vpmovdb
            _mm_mask_storeu_epi8(to.cast(), (1 << count) - 1, bytes); // vmovdqu8
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_add_ps(self.0, other.0) }) // vaddps
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) }) // vsubps
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) }) // vmulps
    }

    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_div_ps(self.0, other.0) }) // vdivps
    }

    #[inline(always)]
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) }) // vfmadd
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_max_ps(self.0, other.0) }) // vmaxps
    }

    #[inline(always)]
    unsafe fn smaller(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_min_ps(self.0, other.0) }) // vminps
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller has AVX-512F.
        Self(unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(self.0) }) // vrndscaleps
    }

    #[inline(always)]
    unsafe fn power_of_two(self, zero: f32) -> Self {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let bias = _mm512_set1_epi32(127i32.wrapping_sub(zero.to_bits().cast_signed()));
            let exponent = _mm512_add_epi32(_mm512_castps_si512(self.0), bias); // vpaddd
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))) // vpslld
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller has AVX-512F.
        unsafe { self.halves().sum() }
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the caller has AVX-512F.
        unsafe { self.halves().largest() }
    }

    #[inline(always)]
    unsafe fn smallest(self) -> f32 {
        // SAFETY: the caller has AVX-512F.
        unsafe { self.halves().smallest() }
    }

    #[inline(always)]
    unsafe fn has_nan(self) -> bool {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0) != 0 } // vcmpps
    }

    #[inline(always)]
    unsafe fn differs(self, other: Self) -> bool {
        // SAFETY: the caller has AVX-512F.
        unsafe { _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(self.0, other.0) != 0 } // vcmpps
    }

    #[inline(always)]
    unsafe fn add_bits(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let sum = _mm512_add_epi32(_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(sum)) // vpaddd
        }
    }

    #[inline(always)]
    unsafe fn subtract_bits(self, other: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let (a, b) = (_mm512_castps_si512(self.0), _mm512_castps_si512(other.0));
            Self(_mm512_castsi512_ps(_mm512_sub_epi32(a, b))) // vpsubd
        }
    }

    #[inline(always)]
    unsafe fn move_bits(self, places: u32) -> Self {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let places = _mm512_set1_epi32(places.cast_signed());
            let moved = _mm512_srlv_epi32(_mm512_castps_si512(self.0), places); // vpsrlvd
            Self(_mm512_castsi512_ps(moved))
        }
    }

    #[inline(always)]
    unsafe fn entry(self, table: &[u32; FEW]) -> Self {
        // SAFETY: the caller has AVX-512F; a table fills two registers, and loads are unaligned.
        unsafe {
            let low = _mm512_loadu_si512(table.as_ptr().cast());
            let high = _mm512_loadu_si512(table.as_ptr().add(LANES).cast());
            let index = _mm512_castps_si512(self.0);
            Self(_mm512_castsi512_ps(_mm512_permutex2var_epi32(low, index, high))) // vpermi2d
        }
    }

    #[inline(always)]
    unsafe fn count_between(self, low: Self, high: Self, counts: Self) -> Self {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let above = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(self.0, low.0); // vcmpps
            let between = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(above, self.0, high.0);
            Self(_mm512_mask_add_ps(counts.0, between, counts.0, _mm512_set1_ps(1.0))) // vaddps
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    #[inline(always)]
    unsafe fn halves(self) -> Avx2 {
        // SAFETY: the caller has AVX-512F.
        unsafe {
            let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)); // vextractf64x4
            Avx2(_mm512_castps512_ps256(self.0), _mm256_castpd_ps(high))
        }
    }
}

/// Two registers of AVX2, with FMA.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(in crate::kernels) struct Avx2(__m256, __m256);

/// An instruction on both halves.
#[cfg(target_arch = "x86_64")]
macro_rules! both {
    ($instruction:ident, $($operand:ident),+) => {
        // SAFETY: the caller has AVX2 and FMA.
        unsafe { Avx2($instruction($($operand.0),+), $instruction($($operand.1),+)) }
    };
}

/// An instruction on the bits of both halves.
#[cfg(target_arch = "x86_64")]
macro_rules! both_bits {
    ($instruction:ident, $($operand:ident),+) => {
        // SAFETY: the caller has AVX2.
        unsafe {
            let first = $instruction($(_mm256_castps_si256($operand.0)),+);
            let second = $instruction($(_mm256_castps_si256($operand.1)),+);
            Avx2(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
        }
    };
}

#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) } // vbroadcastss
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's pointer is valid for 16 numbers; loads are unaligned.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(LANES / 2))) } // vmovups
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, count: usize, others: f32) -> Self {
        // SAFETY: as the caller says.
        unsafe {
            let all = Plain::load_first(from, count, others);
            Self::load(all.0.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn first(self, count: usize, others: f32) -> Self {
        let mut all = [0.0; LANES];
        // SAFETY: as the caller says.
        unsafe {
            self.store(all.as_mut_ptr());
            Self::load(Plain(all).first(count, others).0.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's pointer is valid for 16 numbers; stores are unaligned.
        unsafe {
            _mm256_storeu_ps(to, self.0); // vmovups
            _mm256_storeu_ps(to.add(LANES / 2), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, count: usize) {
        let mut all = [0.0; LANES];
        // SAFETY: as the caller says.
        unsafe {
            self.store(all.as_mut_ptr());
            Plain(all).store_first(to, count);
        }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8) {
        // SAFETY: the caller has AVX2, and a pointer that is valid for 16 bytes; the store is unaligned.
        unsafe {
            let lowest = _mm256_set1_epi32(0xff);
            let first = _mm256_and_si256(_mm256_castps_si256(self.0), lowest);
            let second = _mm256_and_si256(_mm256_castps_si256(self.1), lowest);
            // Packing works within 128 bits; then four bytes each are in the order 0, 2, 1, 3.
            let words = _mm256_packus_epi32(first, second); // vpackusdw
            let words = _mm256_permute4x64_epi64::<0b1101_1000>(words); // vpermq
            let bytes = _mm256_packus_epi16(words, words); // vpackuswb
            let bytes = _mm256_permute4x64_epi64::<0b1101_1000>(bytes);
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(bytes));
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        both!(_mm256_add_ps, self, other) // vaddps
    }

    #[inline(always)]
    unsafe fn subtract(self, other: Self) -> Self {
        both!(_mm256_sub_ps, self, other) // vsubps
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> Self {
        both!(_mm256_mul_ps, self, other) // vmulps
    }

    #[inline(always)]
    unsafe fn divide(self, other: Self) -> Self {
        both!(_mm256_div_ps, self, other) // vdivps
    }

    #[inline(always)]
    unsafe fn multiply_add(self, b: Self, c: Self) -> Self {
        both!(_mm256_fmadd_ps, self, b, c) // vfmadd
    }

    #[inline(always)]
    unsafe fn larger(self, other: Self) -> Self {
        both!(_mm256_max_ps, self, other) // vmaxps
    }

    #[inline(always)]
    unsafe fn smaller(self, other: Self) -> Self {
        both!(_mm256_min_ps, self, other) // vminps
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            Self(
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0), // vroundps
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.1),
            )
        }
    }

    #[inline(always)]
    unsafe fn power_of_two(self, zero: f32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            let bias = _mm256_set1_epi32(127i32.wrapping_sub(zero.to_bits().cast_signed()));
            let first = _mm256_add_epi32(_mm256_castps_si256(self.0), bias); // vpaddd
            let second = _mm256_add_epi32(_mm256_castps_si256(self.1), bias);
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(first)), // vpslld
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(second)),
            )
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: the caller has AVX2.
        unsafe {
            let eight = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: the caller has AVX2. What compares with NaN is the second operand: it has to be the
        // number.
        unsafe {
            let lowest = _mm256_set1_ps(f32::NEG_INFINITY);
            let eight = _mm256_max_ps(_mm256_max_ps(self.0, lowest), _mm256_max_ps(self.1, lowest));
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn smallest(self) -> f32 {
        // SAFETY: as for the largest.
        unsafe {
            let highest = _mm256_set1_ps(f32::INFINITY);
            let eight =
                _mm256_min_ps(_mm256_min_ps(self.0, highest), _mm256_min_ps(self.1, highest));
            let four = _mm_min_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_min_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_min_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }

    #[inline(always)]
    unsafe fn has_nan(self) -> bool {
        // SAFETY: the caller has AVX2.
        unsafe {
            // One of two is not a number.
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.1)) != 0 // vcmpps
        }
    }

    #[inline(always)]
    unsafe fn differs(self, other: Self) -> bool {
        // SAFETY: the caller has AVX2.
        unsafe {
            let first = _mm256_cmp_ps::<_CMP_NEQ_UQ>(self.0, other.0); // vcmpps
            let second = _mm256_cmp_ps::<_CMP_NEQ_UQ>(self.1, other.1);
            _mm256_movemask_ps(_mm256_or_ps(first, second)) != 0 // vmovmskps
        }
    }

    #[inline(always)]
    unsafe fn add_bits(self, other: Self) -> Self {
        both_bits!(_mm256_add_epi32, self, other) // vpaddd
    }

    #[inline(always)]
    unsafe fn subtract_bits(self, other: Self) -> Self {
        both_bits!(_mm256_sub_epi32, self, other) // vpsubd
    }

    #[inline(always)]
    unsafe fn move_bits(self, places: u32) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            let places = _mm256_set1_epi32(places.cast_signed());
            let first = _mm256_srlv_epi32(_mm256_castps_si256(self.0), places); // vpsrlvd
            let second = _mm256_srlv_epi32(_mm256_castps_si256(self.1), places);
            Self(_mm256_castsi256_ps(first), _mm256_castsi256_ps(second))
        }
    }

    #[inline(always)]
    unsafe fn entry(self, table: &[u32; FEW]) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe { Self(entry(self.0, table), entry(self.1, table)) }
    }

    #[inline(always)]
    unsafe fn count_between(self, low: Self, high: Self, counts: Self) -> Self {
        // SAFETY: the caller has AVX2.
        unsafe {
            let first = _mm256_and_ps(
                _mm256_cmp_ps::<_CMP_GE_OQ>(self.0, low.0), // vcmpps
                _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, high.0),
            );
            let second = _mm256_and_ps(
                _mm256_cmp_ps::<_CMP_GE_OQ>(self.1, low.1),
                _mm256_cmp_ps::<_CMP_LT_OQ>(self.1, high.1),
            );
            let one = _mm256_set1_ps(1.0);
            counts.add(Self(_mm256_and_ps(first, one), _mm256_and_ps(second, one)))
        }
    }
}

/// [`Lanes::entry`] of half as many.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn entry(index: __m256, table: &[u32; FEW]) -> __m256 {
    // SAFETY: the caller has AVX2; a table fills four registers, and loads are unaligned.
    unsafe {
        let index = _mm256_castps_si256(index);
        let first = _mm256_loadu_ps(table.as_ptr().cast());
        let second = _mm256_loadu_ps(table.as_ptr().add(FEW / 4).cast());
        let third = _mm256_loadu_ps(table.as_ptr().add(FEW / 2).cast());
        let fourth = _mm256_loadu_ps(table.as_ptr().add(3 * FEW / 4).cast());
        let [first, second, third, fourth] = [
            _mm256_permutevar8x32_ps(first, index), // vpermps
            _mm256_permutevar8x32_ps(second, index),
            _mm256_permutevar8x32_ps(third, index),
            _mm256_permutevar8x32_ps(fourth, index),
        ];
        // Bits 3 and 4 of the index, as signs.
        let eight = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)); // vpslld
        let sixteen = _mm256_castsi256_ps(_mm256_slli_epi32::<27>(index));
        let low = _mm256_blendv_ps(first, second, eight); // vblendvps
        let high = _mm256_blendv_ps(third, fourth, eight);
        _mm256_blendv_ps(low, high, sixteen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What all methods make of two sets of lanes.
    unsafe fn results<L: Lanes>(a: &[f32; LANES], b: &[f32; LANES], count: usize) -> Vec<Vec<u32>> {
        // SAFETY: all pointers are valid for 16 numbers; the caller has the instruction set.
        unsafe {
            let (x, y) = (L::load(a.as_ptr()), L::load(b.as_ptr()));
            let mut found = Vec::new();
            let one = L::splat(1.0);
            for result in [
                x.add(y),
                x.subtract(y),
                x.multiply(y),
                x.divide(y),
                x.larger(y),
                x.smaller(y),
                x.multiply(L::splat(3.7)).round(),
                x.round().add(L::splat(12_582_912.0)).power_of_two(12_582_912.0),
                // Exact, so that it is the same with one rounding or two.
                x.round().multiply_add(y.round(), one),
                L::load_first(a.as_ptr(), count, 7.0),
                x.first(count, -3.0),
                x.add_bits(y),
                x.subtract_bits(y),
                x.move_bits(21),
                x.move_bits(21).entry(&std::array::from_fn(|entry| entry as u32 * 77_777_777)),
            ] {
                let mut out = [0.0f32; LANES];
                result.store(out.as_mut_ptr());
                found.push(out.map(f32::to_bits).to_vec());
            }
            let mut out = [0.0f32; LANES];
            x.store_first(out.as_mut_ptr(), count);
            found.push(out.map(f32::to_bits).to_vec());
            let mut bytes = [0u8; LANES];
            x.store_bytes(bytes.as_mut_ptr());
            found.push(bytes.map(u32::from).to_vec());
            let mut bytes = [9u8; LANES];
            x.store_first_bytes(bytes.as_mut_ptr(), count);
            found.push(bytes.map(u32::from).to_vec());
            found.push(vec![x.sum().to_bits(), x.largest().to_bits(), x.smallest().to_bits()]);
            let between = x.count_between(L::splat(-4.0), L::splat(4.0), L::splat(0.0)).sum();
            let above = x.count_between(y, L::splat(9.0), one).sum();
            found.push(vec![between as u32, above as u32, u32::from(x.has_nan())]);
            found.push([x.differs(y), x.differs(x), y.differs(y)].map(u32::from).to_vec());
            found
        }
    }

    #[test]
    fn all_registers_compute_alike() {
        let a: [f32; LANES] = std::array::from_fn(|lane| (lane as f32 * 37.3).sin() * 9.0);
        let mut b: [f32; LANES] = std::array::from_fn(|lane| (lane as f32 * 11.9).cos() * 5.0);
        b[3] = f32::NAN;
        b[8] = f32::INFINITY;
        for (a, b) in [(a, b), (b, a)] {
            for count in [1, 7, 15] {
                // SAFETY: plain code is always available, the others were asked for.
                let expected = unsafe { results::<Plain>(&a, &b, count) };
                #[cfg(target_arch = "x86_64")]
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    assert!(same(&unsafe { results::<Avx2>(&a, &b, count) }, &expected));
                }
                #[cfg(target_arch = "x86_64")]
                if crate::kernels::cpu::has_avx512() {
                    assert!(same(&unsafe { results::<Avx512>(&a, &b, count) }, &expected));
                }
                let largest = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let smallest = a.iter().copied().fold(f32::INFINITY, f32::min);
                assert_eq!(expected[18][1..], [largest, smallest].map(f32::to_bits));
                let between = a.iter().filter(|x| (-4.0..4.0).contains(*x)).count();
                assert_eq!(expected[19][0] as usize, between);
                let nan = [&a, &b].map(|all| u32::from(all.iter().any(|x| x.is_nan())));
                assert_eq!(expected[19][2], nan[0]);
                assert_eq!(expected[20], [1, nan[0], nan[1]]);
            }
        }
    }

    /// Equal to the bit, but for which NaN it is.
    fn same(found: &[Vec<u32>], expected: &[Vec<u32>]) -> bool {
        let nan = |bits: u32| f32::from_bits(bits).is_nan();
        let pairs = found.iter().flatten().zip(expected.iter().flatten());
        pairs.clone().count() == expected.iter().flatten().count()
            && pairs.into_iter().all(|(a, b)| a == b || (nan(*a) && nan(*b)))
    }
}
