//! The vector kernels, chosen at run time. All `unsafe` code of the products is below this module.

#![allow(unsafe_code, reason = "vector instructions and their loads")]
#![allow(clippy::needless_range_loop, reason = "rows and columns of a tile are plainer by index")]

mod job;
pub(super) mod lanes;
mod peak;
mod portable;
pub(super) mod shuffle;
mod tile;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::{LazyLock, OnceLock};

pub(super) use job::{Destination, Job, Passing, Scratch, sums};
use portable::Portable;

/// Whether the processor has the parts of AVX-512 that plain loops are compiled for.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(super) fn has_avx512() -> bool {
    // Asked for every row: one look instead of five.
    static HAS_ALL: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("fma")
    });
    *HAS_ALL
}

/// What a processor may be able to do, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructionSet {
    /// Plain code.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX2 with the 256-bit `vpdpbusd`.
    AvxVnni,
    /// AVX-512 with the 512-bit `vpdpbusd`.
    Avx512Vnni,
    /// Plain code in the shape of AVX-512's kernel, whose blocking is so tested without it.
    #[cfg(test)]
    Like512,
    /// The kernel for AVX-VNNI with the instruction as AVX-512 encodes it: so it is tested without it.
    #[cfg(test)]
    LikeAvxVnni,
}

impl InstructionSet {
    /// All of them, slowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512Vnni];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            match self {
                Self::Portable => true,
                #[cfg(test)]
                Self::Like512 => true,
                #[cfg(test)]
                Self::LikeAvxVnni => {
                    avx2 && is_x86_feature_detected!("avx512vl")
                        && is_x86_feature_detected!("avx512vnni")
                }
                Self::Avx2 => avx2,
                Self::AvxVnni => avx2 && is_x86_feature_detected!("avxvnni"),
                Self::Avx512Vnni => {
                    avx2 && is_x86_feature_detected!("avx512f")
                        && is_x86_feature_detected!("avx512vnni")
                }
            }
        }
        #[cfg(not(all(target_arch = "x86_64", not(miri))))]
        {
            #[cfg(test)]
            if self == Self::LikeAvxVnni {
                return false;
            }
            !matches!(self, Self::Avx2 | Self::AvxVnni | Self::Avx512Vnni)
        }
    }

    /// The fastest one that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<InstructionSet> = OnceLock::new();
        *BEST.get_or_init(|| {
            let available = Self::ALL.into_iter().rev().find(|set| set.is_available());
            available.unwrap_or(Self::Portable)
        })
    }

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avx_vnni",
            Self::Avx512Vnni => "avx512_vnni",
            #[cfg(test)]
            Self::Like512 => "like_512",
            #[cfg(test)]
            Self::LikeAvxVnni => "like_avx_vnni",
        }
    }

    /// Whether products of small codes are faster than those of any bytes.
    pub fn prefers_small_codes(self) -> bool {
        self.narrow_kernel().is_some()
    }

    /// A faster kernel for small codes, whose sums are exact in 16 bits for a while.
    pub(super) fn narrow_kernel(self) -> Option<Kernel> {
        (self == Self::Avx2).then_some(Kernel::Avx2Narrow)
    }

    /// The kernel for any codes.
    pub(super) fn wide_kernel(self) -> Kernel {
        match self {
            Self::Portable => Kernel::Portable,
            Self::Avx2 => Kernel::Avx2Wide,
            Self::AvxVnni => Kernel::AvxVnni,
            Self::Avx512Vnni => Kernel::Avx512Vnni,
            #[cfg(test)]
            Self::Like512 => Kernel::Like512,
            #[cfg(test)]
            Self::LikeAvxVnni => Kernel::LikeAvxVnni,
        }
    }
}

/// One way to multiply; see `x86.rs` and `portable.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernel {
    Portable,
    Avx2Narrow,
    Avx2Wide,
    AvxVnni,
    Avx512Vnni,
    #[cfg(test)]
    Like512,
    #[cfg(test)]
    LikeAvxVnni,
}

impl Kernel {
    /// Rows of a tile whose result is the sum of `sums` rescaled ones. Tile and columns leave registers
    /// for a row's codes and a product; of 32 registers, also for the total of several sums.
    pub(super) fn tile_rows(self, sums: usize) -> usize {
        match self {
            Self::Portable => 2,
            Self::Avx2Narrow | Self::Avx2Wide | Self::AvxVnni => 6,
            Self::Avx512Vnni if sums > 1 => 6,
            Self::Avx512Vnni => 12,
            #[cfg(test)]
            Self::Like512 => Self::Avx512Vnni.tile_rows(sums),
            #[cfg(test)]
            Self::LikeAvxVnni => Self::AvxVnni.tile_rows(sums),
        }
    }

    /// Result columns of a panel.
    pub(super) fn panel_columns(self) -> usize {
        match self {
            Self::Portable | Self::Avx2Narrow | Self::Avx2Wide | Self::AvxVnni => 16,
            Self::Avx512Vnni => 32,
            #[cfg(test)]
            Self::Like512 => 32,
            #[cfg(test)]
            Self::LikeAvxVnni => Self::AvxVnni.panel_columns(),
        }
    }

    /// Codes of the summed axis in a step.
    pub(super) fn step(self) -> usize {
        match self {
            Self::Avx2Wide => 2,
            Self::Portable | Self::Avx2Narrow | Self::AvxVnni | Self::Avx512Vnni => 4,
            #[cfg(test)]
            Self::Like512 | Self::LikeAvxVnni => 4,
        }
    }

    /// Runs a job.
    pub(super) fn run(self, job: &Job<'_>, out: Destination<'_, '_>, scratch: &mut Scratch) {
        assert!(job.rhs.kernel == self, "packed for another kernel");
        // SAFETY: plain code is always available; an operand can only be packed for instruction sets
        // that are.
        unsafe {
            match (self, self.tile_rows(job.sums())) {
                (Self::Portable, _) => job::run::<Portable<8>, 2, 2>(job, out, scratch),
                #[cfg(test)]
                (Self::Like512, 6) => job::run::<Portable<16>, 6, 2>(job, out, scratch),
                #[cfg(test)]
                (Self::Like512, _) => job::run::<Portable<16>, 12, 2>(job, out, scratch),
                #[cfg(target_arch = "x86_64")]
                (Self::Avx2Narrow, _) => x86::run_avx2_narrow(job, out, scratch),
                #[cfg(target_arch = "x86_64")]
                (Self::Avx2Wide, _) => x86::run_avx2_wide(job, out, scratch),
                #[cfg(target_arch = "x86_64")]
                (Self::AvxVnni, _) => x86::run_avx_vnni(job, out, scratch),
                #[cfg(all(test, target_arch = "x86_64"))]
                (Self::LikeAvxVnni, _) => x86::run_like_avx_vnni(job, out, scratch),
                #[cfg(target_arch = "x86_64")]
                (Self::Avx512Vnni, 6) => x86::run_avx512_vnni_sums(job, out, scratch),
                #[cfg(target_arch = "x86_64")]
                (Self::Avx512Vnni, _) => x86::run_avx512_vnni(job, out, scratch),
                #[cfg(not(target_arch = "x86_64"))]
                (Self::Avx2Narrow | Self::Avx2Wide | Self::AvxVnni | Self::Avx512Vnni, _) => {
                    unreachable!("not available on this processor")
                }
                #[cfg(all(test, not(target_arch = "x86_64")))]
                (Self::LikeAvxVnni, _) => unreachable!("not available on this processor"),
            }
        }
    }

    /// Runs the inner instructions from registers, for benchmarks; returns the multiplications done.
    pub(super) fn spin(self, steps: u64) -> u64 {
        assert!(self.set().is_available(), "not available on this processor");
        // SAFETY: it is.
        unsafe {
            match self {
                Self::Portable => peak::spin::<Portable<8>, 2, 2>(steps, std::hint::black_box),
                #[cfg(test)]
                Self::Like512 => peak::spin::<Portable<16>, 12, 2>(steps, std::hint::black_box),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2Narrow => x86::spin_avx2_narrow(steps),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2Wide => x86::spin_avx2_wide(steps),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => x86::spin_avx_vnni(steps),
                #[cfg(all(test, target_arch = "x86_64"))]
                Self::LikeAvxVnni => x86::spin_like_avx_vnni(steps),
                #[cfg(all(test, not(target_arch = "x86_64")))]
                Self::LikeAvxVnni => unreachable!("not available on this processor"),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => x86::spin_avx512_vnni(steps),
                #[cfg(not(target_arch = "x86_64"))]
                Self::Avx2Narrow | Self::Avx2Wide | Self::AvxVnni | Self::Avx512Vnni => {
                    unreachable!("not available on this processor")
                }
            }
        }
    }

    /// What it needs.
    fn set(self) -> InstructionSet {
        match self {
            Self::Portable => InstructionSet::Portable,
            Self::Avx2Narrow | Self::Avx2Wide => InstructionSet::Avx2,
            Self::AvxVnni => InstructionSet::AvxVnni,
            Self::Avx512Vnni => InstructionSet::Avx512Vnni,
            #[cfg(test)]
            Self::Like512 => InstructionSet::Like512,
            #[cfg(test)]
            Self::LikeAvxVnni => InstructionSet::LikeAvxVnni,
        }
    }
}
