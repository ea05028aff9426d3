//! Products of codes on a GPU.

use tch::{Kind, Tensor};

use super::codes::{GpuCodes, GpuWeight, Padding};
use super::compile::Source;
use super::gpu::{Gpu, Launch, WARP, address, by_value, parts, to_i32, to_u32};
use crate::error::{Error, Result};

/// Shared memory of a block on the smallest of the GPUs.
const MAX_SHARED_BYTES: i64 = 99 << 10;

/// What is done to a product while it is in registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// Added to every row: `[n]`.
    pub bias: Option<&'a Tensor>,
    /// Whether exact GELU follows.
    pub gelu: bool,
    /// Added at last: as many values as the product has.
    pub residual: Option<&'a Tensor>,
}

/// How a product is cut up. Values that were fastest on an H100 among those that fit other GPUs, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tiling {
    /// Rows and columns of a block.
    block: (i64, i64),
    /// Rows and columns of a warp.
    warp: (i64, i64),
    /// Codes of a row in a stage.
    step: i64,
    /// Stages in flight.
    stages: i64,
}

impl Tiling {
    const LARGE: Self = Self { block: (128, 128), warp: (64, 32), step: 128, stages: 3 };
    const MIDDLE: Self = Self { block: (128, 64), warp: (32, 32), step: 128, stages: 3 };
    const SMALL: Self = Self { block: (64, 64), warp: (32, 32), step: 128, stages: 3 };

    /// The tiling of `batch` products [m, n] over rows of `width` codes in terms and groups.
    fn choose((batch, m, n): (i64, i64, i64), width: i64, (terms, groups): (i64, i64)) -> Self {
        /// Blocks that keep a large GPU busy.
        const ENOUGH: i64 = 132;
        let blocks = |tiling: Self| batch * parts(m, tiling.block.0) * parts(n, tiling.block.1);
        let wide = if terms * groups == 1 { Self::MIDDLE } else { Self::LARGE };
        let fits = wide.shared_bytes(false, (terms, groups)) <= MAX_SHARED_BYTES;
        let tiling = if fits && blocks(wide) >= ENOUGH { wide } else { Self::SMALL };
        if width % tiling.step == 0 { tiling } else { Self { step: 64, ..tiling } }
    }

    pub(super) fn source(self, nibbles: bool, is_single: bool) -> Source {
        let number = |n: i64| i32::try_from(n).unwrap_or(i32::MAX);
        Source {
            name: "product",
            text: include_str!("product.cu"),
            definitions: [
                ("BM", number(self.block.0)),
                ("BN", number(self.block.1)),
                ("WM", number(self.warp.0)),
                ("WN", number(self.warp.1)),
                ("STEP", number(self.step)),
                ("STAGES", number(self.stages)),
                ("NIBBLES", i32::from(nibbles)),
                ("SINGLE", i32::from(is_single)),
            ],
            contract: true,
        }
    }

    fn threads(self) -> i64 {
        (self.block.0 / self.warp.0) * (self.block.1 / self.warp.1) * WARP
    }

    /// Bytes of shared memory for codes, and for the grids of terms and groups.
    fn shared_bytes(self, nibbles: bool, (terms, groups): (i64, i64)) -> i64 {
        let rhs = if nibbles { self.step / 2 } else { self.step };
        let stages = self.stages * (self.block.0 * self.step + self.block.1 * rhs);
        stages + 4 * self.block.0 * (1 + 2 * terms * groups) + 4 * self.block.1 * groups
    }

    /// Every one that there is.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let whole = [Self::LARGE, Self::MIDDLE, Self::SMALL];
        whole.iter().flat_map(|tiling| [*tiling, Self { step: 64, ..*tiling }]).collect()
    }
}

/// The right operand as the kernel reads it.
struct Rhs<'a> {
    codes: &'a Tensor,
    grids: &'a Tensor,
    /// Σ codes of each group, `stride` floats apart.
    sums: (&'a Tensor, usize, i32),
    nibbles: bool,
}

/// Arguments of the kernel, in its order.
#[repr(C)]
struct Arguments {
    lhs: u64,
    lhs_grids: u64,
    rhs: u64,
    rhs_grids: u64,
    rhs_sums: u64,
    bias: u64,
    residual: u64,
    out: u64,
    m: i32,
    n: i32,
    batch: i32,
    terms: i32,
    groups: i32,
    group_width: i32,
    width: i32,
    sum_stride: i32,
    gelu: i32,
    accumulate: i32,
}

by_value!(Arguments);

impl Gpu {
    /// `lhs · weightᵀ` with its epilogue, float32 [rows of lhs, rows of the weight].
    ///
    /// # Errors
    /// `Internal` when shapes do not fit or the kernel does not compile or start; `Device` when memory
    /// is short.
    pub fn product(
        &self,
        lhs: &GpuCodes,
        weight: &GpuWeight,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        if lhs.padding != weight.padding {
            return Err(misfit(lhs.padding, weight.padding));
        }
        let out = Tensor::f_empty([lhs.rows, weight.rows], (Kind::Float, lhs.codes.device()))?;
        let rhs = Rhs {
            codes: &weight.codes,
            grids: &weight.grids,
            sums: (&weight.sums, 0, 1),
            nibbles: weight.nibbles,
        };
        self.multiply(lhs, &rhs, (1, lhs.rows, weight.rows), (epilogue, false), &out)?;
        Ok(out)
    }

    /// `batch` products of matrices that lie below each other: lhs [batch · m, k] and rhs [batch · n, k]
    /// (one group) → float32 [batch, m, n].
    ///
    /// # Errors
    /// As [`Gpu::product`].
    pub fn product_batch(&self, lhs: &GpuCodes, rhs: &GpuCodes, batch: i64) -> Result<Tensor> {
        if lhs.padding != rhs.padding || rhs.groups() != 1 || batch < 1 {
            return Err(misfit(lhs.padding, rhs.padding));
        }
        let (m, n) = (lhs.rows / batch, rhs.rows / batch);
        let out = Tensor::f_empty([batch, m, n], (Kind::Float, lhs.codes.device()))?;
        for term in 0..rhs.terms() {
            let (codes, grids) = (rhs.codes.f_select(0, term)?, rhs.grids.f_select(0, term)?);
            // The fourth number of a grid is its sum of codes.
            let rhs = Rhs { codes: &codes, grids: &grids, sums: (&grids, 3, 4), nibbles: false };
            self.multiply(lhs, &rhs, (batch, m, n), (Epilogue::default(), term > 0), &out)?;
        }
        Ok(out)
    }

    fn multiply(
        &self,
        lhs: &GpuCodes,
        rhs: &Rhs<'_>,
        (batch, m, n): (i64, i64, i64),
        (epilogue, accumulate): (Epilogue<'_>, bool),
        out: &Tensor,
    ) -> Result<()> {
        if out.numel() == 0 {
            return Ok(());
        }
        let bias = epilogue.bias.map(Tensor::f_contiguous).transpose()?;
        let residual = epilogue.residual.map(Tensor::f_contiguous).transpose()?;
        let fits = |x: Option<&Tensor>, count: usize| {
            x.is_none_or(|x| {
                x.numel() == count && x.kind() == Kind::Float && x.device() == out.device()
            })
        };
        let columns = usize::try_from(n).unwrap_or(0);
        if !fits(bias.as_ref(), columns) || !fits(residual.as_ref(), out.numel()) {
            return Err(Error::internal("a bias or a residual does not fit a product"));
        }
        let Padding { groups, group_width, width, .. } = lhs.padding;
        let is_single = groups * lhs.terms() == 1;
        let segments = (lhs.terms(), groups);
        let tiling = Tiling::choose((batch, m, n), width, segments);
        let shared = to_u32(tiling.shared_bytes(rhs.nibbles, segments))?;
        let source = tiling.source(rhs.nibbles, is_single);
        let function = self.function(&source, "product", to_u32(MAX_SHARED_BYTES)?)?;
        let (sums, first_sum, sum_stride) = rhs.sums;
        let float_bytes = size_of::<f32>() as u64;
        let arguments = Arguments {
            lhs: address(Some(&lhs.codes)),
            lhs_grids: address(Some(&lhs.grids)),
            rhs: address(Some(rhs.codes)),
            rhs_grids: address(Some(rhs.grids)),
            rhs_sums: address(Some(sums)) + first_sum as u64 * float_bytes,
            bias: address(bias.as_ref()),
            residual: address(residual.as_ref()),
            out: address(Some(out)),
            m: to_i32(m)?,
            n: to_i32(n)?,
            batch: to_i32(batch)?,
            terms: to_i32(lhs.terms())?,
            groups: to_i32(groups)?,
            group_width: to_i32(group_width)?,
            width: to_i32(width)?,
            sum_stride,
            gelu: i32::from(epilogue.gelu),
            accumulate: i32::from(accumulate),
        };
        // Rows of all matrices are counted in 32 bits.
        let _counted = (to_i32(batch * m)?, to_i32(batch * n)?);
        let (block_m, block_n) = tiling.block;
        let launch = Launch {
            grid: (to_u32(parts(n, block_n))?, to_u32(parts(m, block_m))?, to_u32(batch)?),
            threads: to_u32(tiling.threads())?,
            shared,
        };
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: codes, grids and sums are contiguous tensors on this GPU with the shapes that their
        // padding and rows say; bias, residual and result were checked; all live until the call ends.
        unsafe {
            self.launch(&function, launch, &arguments)
        }
    }
}

fn misfit(lhs: Padding, rhs: Padding) -> Error {
    Error::internal(format!("operands {lhs:?} and {rhs:?} do not fit each other"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::codes::MAX_SEGMENTS;
    use crate::kernels::cuda::compile::is_installed;

    #[test]
    fn every_tiling_compiles_for_both_generations() {
        assert!(is_installed(), "scripts/setup.sh test installs NVRTC");
        for capability in [(8, 0), (9, 0)] {
            for (index, tiling) in Tiling::all().into_iter().enumerate() {
                // Each tiling with one kind of codes and terms, all kinds among them.
                let (nibbles, is_single) = (index % 2 == 0, index % 4 < 2);
                let program = tiling.source(nibbles, is_single).compile(capability);
                assert!(program.unwrap().to_src().contains("mma.sync"), "{tiling:?}");
            }
        }
    }

    #[test]
    fn tilings_fit_the_smallest_shared_memory() {
        for tiling in Tiling::all() {
            assert!(tiling.threads() <= 1024);
        }
        for segments in [(1, 1), (1, 8), (2, 8), (1, MAX_SEGMENTS), (4, MAX_SEGMENTS / 4)] {
            for rows in [1, 197, 12608] {
                let tiling = Tiling::choose((1, rows, 384), 512, segments);
                assert!(tiling.shared_bytes(false, segments) <= MAX_SHARED_BYTES, "{segments:?}");
            }
        }
        assert_eq!(Tiling::choose((1, 12608, 384), 384, (1, 1)), Tiling::MIDDLE);
        assert_eq!(Tiling::choose((1, 197, 384), 384, (1, 1)), Tiling::SMALL);
        assert_eq!(Tiling::choose((384, 197, 197), 64, (1, 1)).step, 64);
    }
}
