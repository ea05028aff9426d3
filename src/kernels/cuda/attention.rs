//! Attention on a GPU from codes to codes, on grids that are known beforehand.

use tch::{Device, Kind, Tensor};

use super::codes::{FixedCodes, GpuWeight, Padding, decoded};
use super::compile::Source;
use super::gpu::{Gpu, Launch, WARP, address, by_value, parts, to_i32, to_u32};
use super::operand::Tokens;
use super::product::{GRID_COLUMNS, GridArguments, MAX_SHARED_BYTES};
use super::quantize::{Plane, Stairs};
use crate::error::{Error, Result};
use crate::kernels::passes::affine::Grid;
use crate::kernels::passes::bins::{Layout, first_passed};

/// Queries of a warp.
pub(super) const QUERIES: i64 = 16;
/// Keys of a step.
const KEYS: i64 = 32;
/// Columns that a step of the tensor cores sums.
const STEP: i64 = 32;
/// Planes that are multiplied in a turn.
const PLANES: usize = 2;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Windows of all images; images where there are no windows.
    pub windows: i64,
    /// Tokens of a window.
    pub tokens: i64,
    /// Heads.
    pub heads: i64,
    /// Columns of a head.
    pub width: i64,
}

/// q, k and v of all heads side by side, each on its grid.
#[derive(Debug)]
pub struct HeadCodes {
    shape: HeadShape,
    /// uint8 [windows · tokens, pitch].
    codes: Tensor,
    pitch: i64,
    grids: [Grid; 3],
}

impl HeadCodes {
    /// q̂, k̂ and v̂, each float32 [windows·tokens, heads·width], by tensor operations.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn decode(&self) -> Result<[Tensor; 3]> {
        let columns = self.shape.columns();
        let part =
            |index: i64, grid| decoded(&self.codes.f_narrow(1, index * columns, columns)?, grid);
        let [q, k, v] = self.grids;
        Ok([part(0, q)?, part(1, k)?, part(2, v)?])
    }
}

/// What becomes of scores before their softmax.
#[derive(Clone, Copy, Debug, Default)]
pub struct ScoreOffsets<'a> {
    /// Factor.
    pub scale: f32,
    /// float32 [1, heads, t, t].
    pub bias: Option<&'a Tensor>,
    /// float32 [windows, 1, t, t], of which an image's windows are a multiple.
    pub mask: Option<&'a Tensor>,
}

/// A grid that is known before its values.
#[derive(Debug)]
pub enum FixedGrid {
    /// Uniform.
    Uniform(Grid),
    /// Stairs between 0 and 1, as weights of an attention have them, or their ratios to the largest of a token.
    Stepped(Bins),
}

/// Stairs as a table: numbers whose first bits are the same share a bin, in which there is one step at most.
#[derive(Debug)]
pub struct Bins {
    /// Tokens to whose largest value the numbers are ratios; none: they are as they are.
    pub(super) relative: Option<Tokens>,
    /// uint8 [turns, count, 8]: {a threshold, codes of two planes below it and from it on}.
    table: Tensor,
    /// float32 [turns, 2]: scales of the planes.
    factors: Tensor,
    turns: i32,
    count: i32,
    first: i32,
    shift: i32,
}

impl Bins {
    /// The table of stairs for numbers from 0 to 1, or for ratios if they are relative; `None` where steps are too
    /// close for one.
    ///
    /// # Errors
    /// `Device` when memory is short.
    pub fn new(gpu: &Gpu, stairs: &Stairs<'_>) -> Result<Option<Self>> {
        Self::on(gpu.device(), stairs)
    }

    /// The same, kept on the GPU for stairs that are described at every call.
    pub(super) fn kept(gpu: &Gpu, stairs: &Stairs<'_>) -> Result<Option<Self>> {
        Self::made(stairs, |table| gpu.constant(table), |factors| gpu.constant(factors))
    }

    pub(super) fn on(device: Device, stairs: &Stairs<'_>) -> Result<Option<Self>> {
        let floats = |factors: &[f32]| Tensor::f_from_slice(factors)?.f_to_device(device);
        let bytes = |table: &[u8]| Tensor::f_from_slice(table)?.f_to_device(device);
        Self::made(stairs, |table| Ok(bytes(table)?), |factors| Ok(floats(factors)?))
    }

    /// The table, its bytes and factors where the functions put them.
    fn made(
        stairs: &Stairs<'_>,
        bytes: impl FnOnce(&[u8]) -> Result<Tensor>,
        floats: impl FnOnce(&[f32]) -> Result<Tensor>,
    ) -> Result<Option<Self>> {
        let passed = stairs.stairs.passed();
        let firsts = stairs.stairs.thresholds().iter().map(|t| first_passed(*t, passed));
        // All numbers have passed those up to the least.
        let least = stairs.relative.map_or(0.0, |(_, least_ratio)| least_ratio);
        let thresholds: Vec<f32> = firsts.collect();
        let always = thresholds.partition_point(|t| *t <= least);
        let bits: Vec<u32> = thresholds[always..].iter().map(|t| t.to_bits()).collect();
        let lowest = bits.first().copied().unwrap_or_default();
        let layout = Layout::of(&bits, [lowest, 1f32.to_bits()]);
        let Some(layout) = layout.filter(|_| !stairs.planes.is_empty()) else { return Ok(None) };
        let turns = stairs.planes.chunks(PLANES);
        let (mut table, mut factors) = (Vec::new(), Vec::new());
        for planes in turns.clone() {
            let codes = |steps: usize| {
                let code = |plane: &Plane| plane.codes.get(steps).copied().unwrap_or(0);
                [planes.first().map_or(0, code), planes.get(1).map_or(0, code)]
            };
            for bin in &layout.bins {
                table.extend(bin.threshold.map_or(f32::INFINITY, f32::from_bits).to_ne_bytes());
                table.extend(codes(always + bin.below));
                table.extend(codes(always + bin.above));
            }
            let factor = |index: usize| planes.get(index).map_or(0.0, |plane| plane.factor);
            factors.extend([factor(0), factor(1)]);
        }
        Ok(Some(Self {
            relative: stairs.relative.map(|(tokens, _)| tokens),
            table: bytes(&table)?,
            factors: floats(&factors)?,
            turns: to_i32(turns.len() as i64)?,
            count: to_i32(layout.bins.len() as i64)?,
            first: to_i32(i64::from(layout.first))?,
            shift: to_i32(i64::from(layout.shift))?,
        }))
    }

    pub(super) fn count(&self) -> i64 {
        i64::from(self.count)
    }

    /// Bytes of a turn's bins.
    pub(super) fn bytes(&self) -> i64 {
        8 * self.count()
    }

    pub(super) fn arguments(&self) -> BinArguments {
        BinArguments {
            table: address(Some(&self.table)),
            factors: address(Some(&self.factors)),
            turns: self.turns,
            count: self.count,
            first: self.first,
            shift: self.shift,
        }
    }
}

/// [`Bins`] as kernels take them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct BinArguments {
    table: u64,
    factors: u64,
    turns: i32,
    count: i32,
    first: i32,
    shift: i32,
}

/// Arguments of the kernel, in its order.
#[repr(C)]
struct Arguments {
    qkv: u64,
    bias: u64,
    mask: u64,
    out: u64,
    bins: BinArguments,
    tokens: i32,
    heads: i32,
    windows: i32,
    pitch: i32,
    out_pitch: i32,
    score_factor: f32,
    q_zero: f32,
    scores: GridArguments,
    scores_scale: f32,
    v_scale: f32,
    v_zero: f32,
    mixed: GridArguments,
}

by_value!(Arguments);

fn source(width: i64, is_stepped: bool) -> Source {
    let mut definitions = super::compile::PLAIN;
    definitions[0] = ("HEAD", i32::try_from(width).unwrap_or(i32::MAX));
    definitions[1] = ("STEPPED", i32::from(is_stepped));
    Source {
        name: "attention",
        text: concat!(
            include_str!("primitives.cu"),
            include_str!("codes.cu"),
            include_str!("bins.cu"),
            include_str!("scores.cu"),
            include_str!("attention.cu")
        ),
        definitions,
        contract: true,
    }
}

impl HeadShape {
    pub(super) fn columns(self) -> i64 {
        self.heads * self.width
    }

    /// Keys of whole steps, and the bytes of each in shared memory.
    pub(super) fn keys(self) -> (i64, i64) {
        (parts(self.tokens, KEYS) * KEYS, parts(self.width, STEP) * STEP + 16)
    }

    fn shared_bytes(self, bins: i64) -> i64 {
        let (padded, pitch) = self.keys();
        2 * padded * pitch + 4 * padded + 4 * self.width + 8 * bins
    }

    /// Whether kernels are compiled for heads of that width.
    pub(super) fn has_width(self) -> bool {
        const MAX_WIDTH: i64 = 64;
        self.width % QUERIES == 0 && (1..=MAX_WIDTH).contains(&self.width)
    }

    /// Whether there is a kernel for such heads.
    pub fn is_taken(self, scores: &FixedGrid) -> bool {
        let bins = match scores {
            // Four zero points share a word with codes.
            FixedGrid::Uniform(grid) if (0.0..=grid.max_code).contains(&grid.zero_point) => 0,
            FixedGrid::Uniform(_) => return false,
            FixedGrid::Stepped(bins) if bins.relative.is_none() => bins.count(),
            FixedGrid::Stepped(_) => return false,
        };
        self.has_width()
            && self.columns() % GRID_COLUMNS == 0
            && self.tokens > 0
            && self.shared_bytes(bins) <= MAX_SHARED_BYTES
    }

    /// Blocks of at most so many warps, for every head of every window.
    pub(super) fn launch(self, most_warps: i64, shared: i64) -> Result<Launch> {
        let tiles = parts(self.tokens, QUERIES);
        let shares = parts(tiles, most_warps);
        Ok(Launch {
            grid: (to_u32(self.windows * self.heads)?, to_u32(shares)?, 1),
            threads: to_u32(parts(tiles, shares) * WARP)?,
            shared: to_u32(shared)?,
        })
    }
}

/// Bias and mask as kernels read them.
pub(super) struct Offsets {
    pub(super) bias: Option<Tensor>,
    pub(super) mask: Option<Tensor>,
    /// Windows of the mask.
    pub(super) masks: i64,
}

impl ScoreOffsets<'_> {
    /// Dense offsets that fit scores of so many windows, heads and tokens.
    ///
    /// # Errors
    /// `Internal` when they do not; `Device` when memory is short.
    pub(super) fn dense(&self, gpu: &Gpu, [windows, heads, tokens]: [i64; 3]) -> Result<Offsets> {
        let masks = self.mask.map_or(1, |mask| mask.size().first().copied().unwrap_or(1));
        let square = tokens * tokens;
        let fits = gpu.fits(self.bias, Kind::Float, heads * square)
            && gpu.fits(self.mask, Kind::Float, masks * square)
            && masks > 0
            && windows % masks == 0;
        if !fits {
            return Err(Error::internal("heads, bias and mask of an attention do not fit"));
        }
        let dense = |x: Option<&Tensor>| x.map(Tensor::f_contiguous).transpose();
        Ok(Offsets { bias: dense(self.bias)?, mask: dense(self.mask)?, masks })
    }
}

impl Gpu {
    /// q, k and v of `lhs · weightᵀ (+ bias)`, each on its grid; `query_scale` is a factor of q.
    ///
    /// # Errors
    /// As [`Gpu::product`].
    pub fn split_heads(
        &self,
        lhs: &FixedCodes,
        weight: &GpuWeight,
        bias: Option<&Tensor>,
        (shape, query_scale, grids): (HeadShape, Option<f32>, [Grid; 3]),
    ) -> Result<HeadCodes> {
        let (rows, columns) = (shape.windows * shape.tokens, 3 * shape.columns());
        if lhs.rows != rows || weight.rows != columns {
            return Err(Error::internal("q, k and v do not fit their heads"));
        }
        let factor = query_scale.unwrap_or(1.0);
        let codes = self.codes_of(lhs, weight, (bias, false), (&grids, factor))?;
        let pitch = codes.size()[1];
        Ok(HeadCodes { shape, codes, pitch, grids })
    }

    /// Codes of softmax(q·kᵀ)·v of all heads side by side: [windows·tokens, heads·width].
    ///
    /// # Errors
    /// `Internal` when the kernel takes no such heads ([`HeadShape::is_taken`]), offsets do not fit, or it
    /// does not compile or start; `Device` when memory is short.
    pub fn attention(
        &self,
        qkv: &HeadCodes,
        offsets: ScoreOffsets<'_>,
        scores: &FixedGrid,
        grid: Grid,
    ) -> Result<FixedCodes> {
        let HeadShape { windows, tokens, heads, width } = qkv.shape;
        let is_taken = qkv.shape.is_taken(scores);
        let Some(padding) = Padding::new(qkv.shape.columns(), 1).filter(|_| is_taken) else {
            return Err(Error::internal(format!("no attention takes {:?}", qkv.shape)));
        };
        let dense = offsets.dense(self, [windows, heads, tokens])?;
        let rows = windows * tokens;
        let codes = Tensor::f_empty([rows, padding.width], (Kind::Uint8, self.device()))?;
        let [q, k, v] = qkv.grids;
        let none = Grid { scale: 1.0, zero_point: 0.0, max_code: 0.0 };
        let (uniform, bins) = match scores {
            FixedGrid::Uniform(grid) => (*grid, None),
            FixedGrid::Stepped(bins) => (none, Some(bins)),
        };
        let arguments = Arguments {
            qkv: address(Some(&qkv.codes)),
            bias: address(dense.bias.as_ref()),
            mask: address(dense.mask.as_ref()),
            out: address(Some(&codes)),
            bins: bins.map_or(BinArguments::default(), Bins::arguments),
            tokens: to_i32(tokens)?,
            heads: to_i32(heads)?,
            windows: to_i32(dense.masks)?,
            pitch: to_i32(qkv.pitch)?,
            out_pitch: to_i32(padding.width)?,
            score_factor: q.scale * k.scale * offsets.scale * std::f32::consts::LOG2_E,
            q_zero: q.zero_point,
            scores: uniform.into(),
            scores_scale: uniform.scale,
            v_scale: v.scale,
            v_zero: v.zero_point,
            mixed: grid.into(),
        };
        // More of them would leave too few registers to each.
        let most_warps = if bins.is_some() { 4 } else { 8 };
        let shared = qkv.shape.shared_bytes(bins.map_or(0, Bins::count));
        let launch = qkv.shape.launch(most_warps, shared)?;
        let _counted = to_i32(rows)?;
        let function =
            self.function(&source(width, bins.is_some()), "attention", to_u32(MAX_SHARED_BYTES)?)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: codes have rows and columns for the shape, which was checked where they came to be; bias and
        // mask were checked; all live until the call ends.
        unsafe {
            self.launch(&function, launch, &arguments)?;
        }
        Ok(FixedCodes { rows, padding, codes, grid })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::compile::argument_bytes;

    #[test]
    fn the_kernels_compile_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            for (width, is_stepped) in
                [(16, true), (32, false), (48, true), (64, false), (64, true)]
            {
                let program = source(width, is_stepped).compile(capability).unwrap().to_src();
                assert_eq!(
                    argument_bytes(&program, "attention"),
                    size_of::<Arguments>(),
                    "{width}"
                );
            }
        }
    }

    #[test]
    fn ratios_below_the_least_have_its_codes() {
        use crate::kernels::passes::staircase::{Passed, Staircase, values_of};
        let stairs = Staircase::new(vec![0.01, 0.1, 0.5], Passed::AtLeast).unwrap();
        let planes = vec![Plane { codes: std::array::from_fn(|steps| steps as u8), factor: 1.0 }];
        let (tokens, values) = (Tokens::new(5, 5, 2, 0).unwrap(), values_of(&[]));
        let described = |relative| Stairs {
            stairs: &stairs,
            values: &values,
            relative,
            planes: planes.clone(),
        };
        let lowest = |relative| {
            let bins = Bins::on(Device::Cpu, &described(relative)).unwrap().unwrap();
            (bins.relative, bins.table.int64_value(&[4])) // below the first threshold of the first bin
        };
        assert_eq!(lowest(None), (None, 0));
        assert_eq!(lowest(Some((tokens, 1e-8))), (Some(tokens), 0));
        assert_eq!(lowest(Some((tokens, 0.1))), (Some(tokens), 2));
    }

    fn uniform(zero_point: f32) -> FixedGrid {
        FixedGrid::Uniform(Grid { scale: 0.1, zero_point, max_code: 15.0 })
    }

    #[test]
    fn scores_whose_zero_is_no_code_are_not_taken() {
        let shape = HeadShape { windows: 2, tokens: 49, heads: 3, width: 32 };
        let takes = |zero_point| shape.is_taken(&uniform(zero_point));
        assert!(takes(-0.0) && takes(0.0) && takes(3.0) && takes(15.0));
        assert!(!takes(-7.0) && !takes(16.0));
    }

    #[test]
    fn heads_beyond_shared_memory_are_not_taken() {
        let takes = |tokens, heads, width| {
            HeadShape { windows: 2, tokens, heads, width }.is_taken(&uniform(0.0))
        };
        assert!(takes(197, 6, 64) && takes(577, 12, 64) && takes(49, 3, 32) && takes(65, 3, 32));
        assert!(takes(1, 2, 16) && takes(49, 2, 16));
        assert!(!takes(1025, 6, 64) && !takes(49, 3, 16) && !takes(49, 4, 24) && !takes(49, 4, 80));
        assert!(!takes(49, 4, 0));
    }
}
