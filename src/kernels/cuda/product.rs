//! Products of codes on a GPU.

use tch::{Kind, Tensor};

use super::codes::{FixedCodes, GpuCodes, GpuWeight, Padding};
use super::compile::Source;
use super::gpu::{Gpu, Launch, WARP, address, by_value, parts, to_i32, to_u32};
use crate::error::{Error, Result};
use crate::kernels::passes::affine::Grid;

/// Shared memory of a block on the smallest of the GPUs.
pub(super) const MAX_SHARED_BYTES: i64 = 99 << 10;

/// Columns that are certain to be on one grid where a result becomes codes on several.
pub(super) const GRID_COLUMNS: i64 = 32;

/// Values that are added and written at once to a product of a fixed grid.
const VALUES: i64 = 4;

/// Matrices of a launch at most: what the grid of blocks takes along its last axis.
const MAX_MATRICES: i64 = u16::MAX as i64;

/// Grids of a result at most.
const MAX_GRIDS: usize = 3;

/// What is done to a product while it is in registers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// Added to every row: `[n]`.
    pub bias: Option<&'a Tensor>,
    /// Whether exact GELU follows.
    pub gelu: bool,
    /// Added at last: as many values as the product has.
    pub residual: Option<&'a Tensor>,
    /// int64 `[rows of an image]`: the row that each of the product's rows becomes, and is added to.
    pub order: Option<&'a Tensor>,
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
    /// Blocks that share a multiprocessor at least.
    blocks: i32,
}

/// Which of the kernel's forms runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Variant {
    /// Terms and groups of the left operand are rescaled one by one.
    Segments,
    /// There is one of both.
    Single,
    /// The left operand is on a fixed grid.
    Fixed,
    /// The same, and the result becomes codes on fixed grids.
    FixedToCodes,
}

impl Tiling {
    const LARGE: Self = Self { block: (128, 128), warp: (64, 32), step: 128, stages: 3, blocks: 1 };
    const MIDDLE: Self = Self { block: (128, 64), warp: (32, 32), step: 128, stages: 3, blocks: 1 };
    const SMALL: Self = Self { block: (64, 64), warp: (32, 32), step: 128, stages: 3, blocks: 1 };
    /// Of a left operand on a fixed grid: many small blocks share a multiprocessor, so that some multiply
    /// while others write.
    const WIDE: Self = Self { block: (64, 128), warp: (64, 32), step: 128, stages: 2, blocks: 4 };
    const NARROW: Self = Self { block: (64, 64), warp: (32, 32), step: 128, stages: 2, blocks: 6 };

    /// The tiling of `batch` products [m, n] over rows of `width` codes in terms and groups.
    fn choose(
        (batch, m, n): (i64, i64, i64),
        width: i64,
        segments: (i64, i64),
        variant: Variant,
    ) -> Self {
        /// Blocks that keep a large GPU busy.
        const ENOUGH: i64 = 132;
        let (wide, narrow) = match variant {
            Variant::Segments => (Self::LARGE, Self::SMALL),
            Variant::Single => (Self::MIDDLE, Self::SMALL),
            Variant::Fixed => (Self::NARROW, Self::NARROW),
            Variant::FixedToCodes => (Self::WIDE, Self::NARROW),
        };
        let blocks = batch * parts(m, wide.block.0) * parts(n, wide.block.1);
        // As if every code had a byte: with the grids of eight groups, the wide one was never measured.
        let fits = wide.shared_bytes(false, segments) <= MAX_SHARED_BYTES;
        let tiling = if fits && blocks >= ENOUGH { wide } else { narrow };
        if width % tiling.step == 0 { tiling } else { Self { step: 64, ..tiling } }
    }

    pub(super) fn source(self, nibbles: bool, variant: Variant) -> Source {
        let number = |n: i64| i32::try_from(n).unwrap_or(i32::MAX);
        let is_fixed = matches!(variant, Variant::Fixed | Variant::FixedToCodes);
        Source {
            name: "product",
            text: concat!(
                include_str!("primitives.cu"),
                include_str!("codes.cu"),
                include_str!("finish.cu"),
                include_str!("product.cu")
            ),
            definitions: [
                ("BM", number(self.block.0)),
                ("BN", number(self.block.1)),
                ("WM", number(self.warp.0)),
                ("WN", number(self.warp.1)),
                ("STEP", number(self.step)),
                ("STAGES", number(self.stages)),
                ("NIBBLES", i32::from(nibbles)),
                ("SINGLE", i32::from(variant != Variant::Segments)),
                ("FIXED", i32::from(is_fixed)),
                ("CODES", i32::from(variant == Variant::FixedToCodes)),
                ("BLOCKS", self.blocks),
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
        // Of a fixed grid, sums of rows and three numbers of columns.
        let fixed = 4 * self.block.0 + 12 * self.block.1;
        let grids = 4 * self.block.0 * (1 + 2 * terms * groups) + 4 * self.block.1 * groups;
        stages + grids.max(fixed)
    }

    /// Every one that there is.
    #[cfg(test)]
    pub(super) fn all() -> Vec<Self> {
        let whole = [Self::LARGE, Self::MIDDLE, Self::SMALL, Self::WIDE, Self::NARROW];
        whole.iter().flat_map(|tiling| [*tiling, Self { step: 64, ..*tiling }]).collect()
    }
}

/// A grid as kernels take it, whose steps they count by a multiplication.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GridArguments {
    inverse: f32,
    zero: f32,
    max_code: f32,
}

impl From<Grid> for GridArguments {
    fn from(Grid { scale, zero_point, max_code }: Grid) -> Self {
        Self { inverse: 1.0 / scale, zero: zero_point, max_code }
    }
}

/// The left operand.
#[derive(Clone, Copy)]
enum Lhs<'a> {
    Rows(&'a GpuCodes),
    Fixed(&'a FixedCodes),
}

/// The right operand as the kernel reads it.
struct Rhs<'a> {
    codes: &'a Tensor,
    grids: &'a Tensor,
    /// Σ codes of each group, `stride` floats apart.
    sums: (&'a Tensor, usize, i32),
    nibbles: bool,
}

impl<'a> From<&'a GpuWeight> for Rhs<'a> {
    fn from(weight: &'a GpuWeight) -> Self {
        let GpuWeight { codes, grids, sums, nibbles, .. } = weight;
        Self { codes, grids, sums: (sums, 0, 1), nibbles: *nibbles }
    }
}

/// What a product becomes.
enum Target<'a> {
    /// float32 [batch · m, n].
    Values {
        out: &'a Tensor,
        /// Whether it is added to what is there.
        accumulate: bool,
    },
    /// uint8 [batch · m, width], equal parts of the columns on a grid each.
    Codes { codes: &'a Tensor, width: i64, grids: &'a [Grid], first_factor: f32 },
}

/// Arguments of the kernel, in its order.
#[repr(C)]
#[derive(Default)]
struct Arguments {
    lhs: u64,
    lhs_grids: u64,
    rhs: u64,
    rhs_grids: u64,
    rhs_sums: u64,
    bias: u64,
    residual: u64,
    out: u64,
    order: u64,
    codes: u64,
    m: i32,
    n: i32,
    batch: i32,
    terms: i32,
    groups: i32,
    group_width: i32,
    width: i32,
    columns: i32,
    sum_stride: i32,
    gelu: i32,
    accumulate: i32,
    per_image: i32,
    codes_width: i32,
    grid_columns: i32,
    first_factor: f32,
    lhs_scale: f32,
    lhs_zero: f32,
    grids: [GridArguments; MAX_GRIDS],
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
        fit(lhs.padding, weight.padding)?;
        let out = Tensor::f_empty([lhs.rows, weight.rows], (Kind::Float, lhs.codes.device()))?;
        let target = Target::Values { out: &out, accumulate: false };
        let shape = (1, lhs.rows, weight.rows);
        self.multiply((Lhs::Rows(lhs), weight.into()), shape, epilogue, &target)?;
        Ok(out)
    }

    /// `batch` products of matrices that lie below each other: lhs [batch · m, k] and rhs [batch · n, k]
    /// (one group) → float32 [batch, m, n].
    ///
    /// # Errors
    /// As [`Gpu::product`].
    pub fn product_batch(&self, lhs: &GpuCodes, rhs: &GpuCodes, batch: i64) -> Result<Tensor> {
        fit(lhs.padding, rhs.padding)?;
        if rhs.groups() != 1 || batch < 1 {
            return Err(misfit(lhs.padding, rhs.padding));
        }
        let (m, n) = (lhs.rows / batch, rhs.rows / batch);
        let out = Tensor::f_empty([batch, m, n], (Kind::Float, lhs.codes.device()))?;
        if batch <= MAX_MATRICES {
            self.multiply_matrices(lhs, rhs, &out)?;
            return Ok(out);
        }
        for (first, count) in slices(batch) {
            let (lhs, rhs) = (lhs.part(first * m, count * m)?, rhs.part(first * n, count * n)?);
            self.multiply_matrices(&lhs, &rhs, &out.f_narrow(0, first, count)?)?;
        }
        Ok(out)
    }

    /// [`Gpu::product_batch`] of no more matrices than a launch takes, into `out` [batch, m, n].
    fn multiply_matrices(&self, lhs: &GpuCodes, rhs: &GpuCodes, out: &Tensor) -> Result<()> {
        let shape = out.size3()?;
        for term in 0..rhs.terms() {
            let (codes, grids) = (rhs.codes.f_select(0, term)?, rhs.grids.f_select(0, term)?);
            // The fourth number of a grid is its sum of codes.
            let rhs = Rhs { codes: &codes, grids: &grids, sums: (&grids, 3, 4), nibbles: false };
            let target = Target::Values { out, accumulate: term > 0 };
            self.multiply((Lhs::Rows(lhs), rhs), shape, Epilogue::default(), &target)?;
        }
        Ok(())
    }

    /// `residual` plus `lhs · weightᵀ (+ bias)`, float32 in the shape of the residual [images, rows, n];
    /// `order`, int64 `[rows]`, gives the row of an image that each of the product's rows belongs to.
    ///
    /// # Errors
    /// As [`Gpu::product`].
    pub fn added(
        &self,
        lhs: &FixedCodes,
        weight: &GpuWeight,
        bias: Option<&Tensor>,
        residual: &Tensor,
        order: Option<&Tensor>,
    ) -> Result<Tensor> {
        fit(lhs.padding, weight.padding)?;
        let out = Tensor::f_empty(residual.size(), (Kind::Float, lhs.codes.device()))?;
        let target = Target::Values { out: &out, accumulate: false };
        let epilogue = Epilogue { bias, gelu: false, residual: Some(residual), order };
        let shape = (1, lhs.rows, weight.rows);
        self.multiply((Lhs::Fixed(lhs), weight.into()), shape, epilogue, &target)?;
        Ok(out)
    }

    /// Codes of `lhs · weightᵀ (+ bias)`, after GELU or not.
    ///
    /// # Errors
    /// As [`Gpu::product`].
    pub fn encoded(
        &self,
        lhs: &FixedCodes,
        weight: &GpuWeight,
        (bias, gelu): (Option<&Tensor>, bool),
        grid: Grid,
    ) -> Result<FixedCodes> {
        let codes = self.codes_of(lhs, weight, (bias, gelu), (&[grid], 1.0))?;
        let padding = Padding::new(weight.rows, 1).ok_or_else(|| long(weight.rows))?;
        Ok(FixedCodes { rows: lhs.rows, padding, codes, grid })
    }

    /// uint8 [rows, padded n] of `lhs · weightᵀ (+ bias)`, equal parts of whose columns are on a grid
    /// each; those on the first are multiplied by a factor before.
    pub(super) fn codes_of(
        &self,
        lhs: &FixedCodes,
        weight: &GpuWeight,
        (bias, gelu): (Option<&Tensor>, bool),
        (grids, first_factor): (&[Grid], f32),
    ) -> Result<Tensor> {
        fit(lhs.padding, weight.padding)?;
        let Padding { width, .. } =
            Padding::new(weight.rows, 1).ok_or_else(|| long(weight.rows))?;
        let codes = Tensor::f_empty([lhs.rows, width], (Kind::Uint8, lhs.codes.device()))?;
        let target = Target::Codes { codes: &codes, width, grids, first_factor };
        let epilogue = Epilogue { bias, gelu, ..Epilogue::default() };
        let shape = (1, lhs.rows, weight.rows);
        self.multiply((Lhs::Fixed(lhs), weight.into()), shape, epilogue, &target)?;
        Ok(codes)
    }

    fn multiply(
        &self,
        (lhs, rhs): (Lhs<'_>, Rhs<'_>),
        (batch, m, n): (i64, i64, i64),
        epilogue: Epilogue<'_>,
        target: &Target<'_>,
    ) -> Result<()> {
        if batch * m * n == 0 {
            return Ok(());
        }
        let bias = epilogue.bias.map(Tensor::f_contiguous).transpose()?;
        let residual = epilogue.residual.map(Tensor::f_contiguous).transpose()?;
        if !self.fits(bias.as_ref(), Kind::Float, n)
            || !self.fits(residual.as_ref(), Kind::Float, batch * m * n)
        {
            return Err(Error::internal("a bias or a residual does not fit a product"));
        }
        let (codes, padding, terms) = match lhs {
            Lhs::Rows(lhs) => (&lhs.codes, lhs.padding, lhs.terms()),
            Lhs::Fixed(lhs) => (&lhs.codes, lhs.padding, 1),
        };
        let Padding { groups, group_width, width, columns } = padding;
        let variant = match (lhs, target) {
            (Lhs::Fixed(_), Target::Values { .. }) => Variant::Fixed,
            (Lhs::Fixed(_), Target::Codes { .. }) => Variant::FixedToCodes,
            (Lhs::Rows(_), _) if groups * terms == 1 => Variant::Single,
            (Lhs::Rows(_), _) => Variant::Segments,
        };
        let segments = (terms, groups);
        let tiling = Tiling::choose((batch, m, n), width, segments, variant);
        let shared = to_u32(tiling.shared_bytes(rhs.nibbles, segments))?;
        let source = tiling.source(rhs.nibbles, variant);
        let function = self.function(&source, "product", to_u32(MAX_SHARED_BYTES)?)?;
        let (sums, first_sum, sum_stride) = rhs.sums;
        let float_bytes = size_of::<f32>() as u64;
        let mut arguments = Arguments {
            lhs: address(Some(codes)),
            rhs: address(Some(rhs.codes)),
            rhs_grids: address(Some(rhs.grids)),
            rhs_sums: address(Some(sums)) + first_sum as u64 * float_bytes,
            bias: address(bias.as_ref()),
            residual: address(residual.as_ref()),
            m: to_i32(m)?,
            n: to_i32(n)?,
            batch: to_i32(batch)?,
            terms: to_i32(terms)?,
            groups: to_i32(groups)?,
            group_width: to_i32(group_width)?,
            width: to_i32(width)?,
            columns: to_i32(columns)?,
            sum_stride,
            gelu: i32::from(epilogue.gelu),
            ..Arguments::default()
        };
        match lhs {
            Lhs::Rows(lhs) => arguments.lhs_grids = address(Some(&lhs.grids)),
            Lhs::Fixed(FixedCodes { grid, .. }) => {
                (arguments.lhs_scale, arguments.lhs_zero) = (grid.scale, grid.zero_point);
            }
        }
        let (block_m, block_n) = tiling.block;
        let written = match target {
            Target::Values { out, accumulate } => {
                let order = epilogue.order;
                let per_image = order.map_or(m, |order| order.numel() as i64);
                if m % per_image.max(1) != 0 || !self.fits(order, Kind::Int64, per_image) {
                    return Err(Error::internal("an order does not fit the rows of a product"));
                }
                if variant == Variant::Fixed && (n % VALUES != 0 || residual.is_none()) {
                    return Err(Error::internal("a sum does not fit the columns of a product"));
                }
                arguments.out = address(Some(out));
                arguments.accumulate = i32::from(*accumulate);
                arguments.order = address(order);
                arguments.per_image = to_i32(per_image)?;
                n
            }
            Target::Codes { codes, width, grids, first_factor } => {
                let columns = n / (grids.len() as i64).max(1);
                let is_one = grids.len() == 1;
                if !is_one && columns % GRID_COLUMNS != 0 || grids.len() > MAX_GRIDS {
                    return Err(Error::internal("grids do not fit the columns of a product"));
                }
                arguments.codes = address(Some(codes));
                arguments.codes_width = to_i32(*width)?;
                arguments.grid_columns = to_i32(if is_one { *width } else { columns })?;
                arguments.first_factor = *first_factor;
                for (to, grid) in arguments.grids.iter_mut().zip(*grids) {
                    *to = (*grid).into();
                }
                *width
            }
        };
        // Rows of all matrices are counted in 32 bits.
        let _counted = (to_i32(batch * m)?, to_i32(batch * n)?);
        let launch = Launch {
            grid: (to_u32(parts(written, block_n))?, to_u32(parts(m, block_m))?, to_u32(batch)?),
            threads: to_u32(tiling.threads())?,
            shared,
        };
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: codes, grids and sums are contiguous tensors on this GPU with the shapes that their
        // padding and rows say, and callers make results of the product's shape; bias, residual and order
        // were checked; all live until the call ends.
        unsafe {
            self.launch(&function, launch, &arguments)
        }
    }
}

/// First and number of the matrices of each launch.
fn slices(batch: i64) -> impl Iterator<Item = (i64, i64)> {
    (0..parts(batch, MAX_MATRICES)).map(move |slice| {
        let first = slice * MAX_MATRICES;
        (first, MAX_MATRICES.min(batch - first))
    })
}

fn fit(lhs: Padding, rhs: Padding) -> Result<()> {
    if lhs == rhs { Ok(()) } else { Err(misfit(lhs, rhs)) }
}

fn misfit(lhs: Padding, rhs: Padding) -> Error {
    Error::internal(format!("operands {lhs:?} and {rhs:?} do not fit each other"))
}

fn long(columns: i64) -> Error {
    Error::internal(format!("{columns} columns are too many for a product"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::codes::MAX_SEGMENTS;
    use crate::kernels::cuda::compile::{argument_bytes, is_installed};

    const VARIANTS: [Variant; 4] =
        [Variant::Segments, Variant::Single, Variant::Fixed, Variant::FixedToCodes];

    #[test]
    fn every_tiling_compiles_for_both_generations() {
        assert!(is_installed(), "scripts/setup.sh test installs NVRTC");
        for capability in [(8, 0), (9, 0)] {
            // Each tiling with one kind of codes, all kinds and variants among them.
            for (index, tiling) in Tiling::all().into_iter().enumerate() {
                let variants: &[Variant] = match tiling.stages {
                    2 => &[Variant::Fixed, Variant::FixedToCodes],
                    _ => &[Variant::Segments, Variant::Single],
                };
                for variant in variants {
                    let program = tiling.source(index % 2 == 0, *variant).compile(capability);
                    let program = program.unwrap().to_src();
                    assert!(program.contains("mma.sync"), "{tiling:?} {variant:?}");
                    assert_eq!(argument_bytes(&program, "product"), size_of::<Arguments>());
                }
            }
            // Codes of a byte, too, whose rows take turns in another way.
            let program = Tiling::WIDE.source(false, Variant::FixedToCodes).compile(capability);
            assert!(program.unwrap().to_src().contains("mma.sync"));
        }
    }

    #[test]
    fn matrices_are_divided_among_launches() {
        for batch in [1, MAX_MATRICES, MAX_MATRICES + 1, 3 * MAX_MATRICES] {
            let mut next = 0;
            for (first, count) in slices(batch) {
                assert!(first == next && (1..=MAX_MATRICES).contains(&count));
                next += count;
            }
            assert_eq!(next, batch);
        }
    }

    #[test]
    fn tilings_fit_the_smallest_shared_memory() {
        for tiling in Tiling::all() {
            assert!(tiling.threads() <= 1024);
        }
        for segments in [(1, 1), (1, 8), (2, 8), (1, MAX_SEGMENTS), (4, MAX_SEGMENTS / 4)] {
            for rows in [1, 197, 12608] {
                for variant in VARIANTS {
                    let tiling = Tiling::choose((1, rows, 384), 512, segments, variant);
                    let bytes = tiling.shared_bytes(false, segments);
                    assert!(bytes <= MAX_SHARED_BYTES, "{segments:?}");
                }
            }
        }
        let single = |shape, width| Tiling::choose(shape, width, (1, 1), Variant::Single);
        assert_eq!(single((1, 12608, 384), 384), Tiling::MIDDLE);
        assert_eq!(single((1, 197, 384), 384), Tiling::SMALL);
        assert_eq!(single((384, 197, 197), 64).step, 64);
    }
}
