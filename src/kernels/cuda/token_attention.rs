//! Attention on a GPU on grids that tokens share over all heads: q, k and v become codes where a linear left
//! them, and scores are never in memory.

use cudarc::driver::DeviceRepr;
use tch::{Kind, Tensor};

use super::attention::{BinArguments, Bins, HeadShape, ScoreOffsets};
use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, Launch, address, by_value, parts, to_i32, to_u32};
use super::operand::{Memory, Tokens};
use super::product::MAX_SHARED_BYTES;
use super::quantize::{
    self, Affine, AllocateArguments, Facts, ROWS, SurveyArguments, THREADS, allocation_launch,
};
use crate::error::{Error, Result};

/// Columns of v that a block surveys.
const COLUMNS: i64 = 8;
/// Most warps of a block that finds sums, and of one that mixes v: more would leave too few registers.
const SUM_WARPS: i64 = 8;
const MIX_WARPS: i64 = 4;

/// q, k and v of an attention on grids that tokens share over all heads.
#[derive(Debug)]
pub struct TokenHeads<'a> {
    shape: HeadShape,
    /// Of q, k and v.
    grids: [Affine<'a>; 3],
    /// Windows along a side of a quadrant whose windows share tokens, too; 0: every window for itself.
    half: i64,
}

impl<'a> TokenHeads<'a> {
    /// Heads on those grids; `None` where there are no kernels for them, or operands do not have the same heads and
    /// windows in common.
    ///
    /// # Errors
    /// `Internal` for numbers beyond 32 bits.
    pub fn new(shape: HeadShape, grids: [Affine<'a>; 3]) -> Result<Option<Self>> {
        let HeadShape { windows, tokens, heads, width } = shape;
        let half = i64::from(grids[0].tokens.half);
        let quadrants = 4 * half * half;
        let in_common = |rows, width| Tokens::new(rows, width, heads, half);
        let (rows, columns) = (in_common(tokens, width)?, in_common(width, tokens)?);
        let is_plain = |grids: &Affine<'_>, tokens: Tokens| {
            let has_kernel = grids.groups == 1 && grids.stretch.is_none();
            has_kernel && grids.tokens == tokens && grids.fits()
        };
        let [q, k, v] = &grids;
        let is_taken = is_plain(q, rows)
            && is_plain(k, rows)
            && is_plain(v, columns)
            && windows > 0
            && windows % quadrants.max(1) == 0
            && shape.has_width()
            && tokens > 0;
        Ok(is_taken.then_some(Self { shape, grids, half }))
    }

    fn has_byte_codes(&self) -> bool {
        self.grids.iter().all(Affine::has_byte_codes)
    }

    /// Sets of windows that share tokens.
    fn sets(&self) -> i64 {
        self.shape.windows / (self.half * self.half).max(1)
    }

    /// Rows of all heads, as windows share them.
    fn rows(&self) -> Result<Tokens> {
        Tokens::new(self.shape.tokens, self.shape.columns(), 1, self.half)
    }
}

/// An attention of such heads, its weights on stairs.
#[derive(Debug)]
pub struct TokenAttention<'a> {
    heads: TokenHeads<'a>,
    bins: &'a Bins,
}

impl<'a> TokenAttention<'a> {
    /// The attention of heads with weights that have the same heads and windows in common; `None` where they have not,
    /// or there are no kernels for it.
    ///
    /// # Errors
    /// As [`TokenHeads::new`].
    pub fn new(heads: TokenHeads<'a>, bins: &'a Bins) -> Result<Option<Self>> {
        let HeadShape { tokens, heads: count, .. } = heads.shape;
        let weights = Tokens::new(tokens, tokens, count, heads.half)?;
        let attention = Self { heads, bins };
        let is_taken = bins.relative == Some(weights)
            && attention.heads.has_byte_codes()
            && attention.mix_bytes() <= MAX_SHARED_BYTES;
        Ok(is_taken.then_some(attention))
    }

    /// Its q, k and v.
    pub fn heads(&self) -> &TokenHeads<'a> {
        &self.heads
    }

    fn sum_bytes(&self) -> i64 {
        let (keys, pitch) = self.heads.shape.keys();
        keys * pitch
    }

    fn mix_bytes(&self) -> i64 {
        let (keys, pitch) = self.heads.shape.keys();
        2 * keys * pitch + self.bins.bytes()
    }
}

/// q, k and v of all heads side by side on grids of their tokens.
#[derive(Debug)]
pub struct TokenCodes {
    /// uint8 [windows · tokens, 3 · columns].
    codes: Tensor,
    /// float32 [2, windows · tokens, 2]: scale and zero point of q and k.
    grids: Tensor,
    /// float32 [windows, width, 2]: those of v.
    columns: Tensor,
    /// float32 [sets · tokens]: infinity, which an attention lowers.
    least: Tensor,
}

impl TokenCodes {
    /// q̂, k̂ and v̂, each float32 [windows, tokens, heads, width], by tensor operations.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn decode(&self, heads: &TokenHeads<'_>) -> Result<[Tensor; 3]> {
        let HeadShape { windows, tokens, heads, width } = heads.shape;
        let codes = self.codes.f_to_kind(Kind::Float)?;
        let codes = codes.f_reshape([windows, tokens, 3, heads, width])?;
        let rows = self.grids.f_reshape([2, windows, tokens, 1, 1, 2])?;
        let columns = self.columns.f_reshape([windows, 1, 1, width, 2])?;
        let part = |index: i64, grids: &Tensor| -> Result<Tensor> {
            let codes = codes.f_select(2, index)?.f_sub(&grids.f_select(-1, 1)?)?;
            Ok(codes.f_mul(&grids.f_select(-1, 0)?)?)
        };
        Ok([part(0, &rows.f_select(0, 0)?)?, part(1, &rows.f_select(0, 1)?)?, part(2, &columns)?])
    }
}

#[repr(C)]
struct HeadSurveys {
    q: SurveyArguments,
    k: SurveyArguments,
    v: SurveyArguments,
    row_blocks: i32,
}

#[repr(C)]
struct HeadAllocations {
    q: AllocateArguments,
    k: AllocateArguments,
    v: AllocateArguments,
}

#[repr(C)]
struct TokenGrids {
    extents: u64,
    max_codes: u64,
    max_code: f32,
    exact: i32,
}

#[repr(C)]
struct HeadArguments {
    qkv: u64,
    tokens: Tokens,
    width: i32,
    query_factor: f32,
    q: TokenGrids,
    k: TokenGrids,
    v: TokenGrids,
    windows: i32,
}

#[repr(C)]
struct EncodeArguments {
    heads: HeadArguments,
    codes: u64,
    grids: u64,
    columns: u64,
    least: u64,
}

#[repr(C)]
struct RoundArguments {
    heads: HeadArguments,
    values: u64,
}

#[repr(C)]
struct AttentionArguments {
    qkv: u64,
    grids: u64,
    columns: u64,
    bias: u64,
    mask: u64,
    sums: u64,
    least: u64,
    out: u64,
    bins: BinArguments,
    tokens: Tokens,
    heads: i32,
    windows: i32,
    masks: i32,
    pitch: i32,
    score_factor: f32,
}

by_value!(HeadSurveys, HeadAllocations, EncodeArguments, RoundArguments, AttentionArguments);

fn source(width: i64) -> Source {
    let mut definitions = PLAIN;
    definitions[0] = ("HEAD", i32::try_from(width).unwrap_or(i32::MAX));
    Source {
        name: "token_attention",
        text: concat!(
            include_str!("primitives.cu"),
            include_str!("codes.cu"),
            include_str!("tokens.cu"),
            include_str!("bins.cu"),
            include_str!("scores.cu"),
            include_str!("token_attention.cu")
        ),
        definitions,
        contract: true,
    }
}

impl Gpu {
    /// Codes of q, k and v, which a linear left side by side: float32 [windows, tokens, 3 · columns];
    /// `query_scale` is a factor of q.
    ///
    /// # Errors
    /// `Internal` when shapes do not fit or a kernel does not compile or start; `Device` when memory is short.
    pub fn token_codes(
        &self,
        qkv: &Tensor,
        heads: &TokenHeads<'_>,
        query_scale: Option<f32>,
    ) -> Result<TokenCodes> {
        let HeadShape { windows, tokens, width, .. } = heads.shape;
        let (columns, rows, sets) = (heads.shape.columns(), windows * tokens, heads.sets());
        if !heads.has_byte_codes() {
            return Err(Error::internal("codes of q, k and v are no bytes"));
        }
        let found = self.find_grids(qkv, heads, query_scale)?;
        let floats = |shape: &[i64]| Tensor::f_empty(shape, (Kind::Float, self.device()));
        let result = TokenCodes {
            codes: Tensor::f_empty([rows, 3 * columns], (Kind::Uint8, self.device()))?,
            grids: floats(&[2, rows, 2])?,
            columns: floats(&[windows, width, 2])?,
            least: floats(&[sets * tokens])?,
        };
        let arguments = EncodeArguments {
            heads: found.arguments(heads)?,
            codes: address(Some(&result.codes)),
            grids: address(Some(&result.grids)),
            columns: address(Some(&result.columns)),
            least: address(Some(&result.least)),
        };
        self.by_head_rows("encode_heads", heads, &arguments)?;
        Ok(result)
    }

    /// q̂, k̂ and v̂, each float32 [windows, heads, tokens, width], of what [`Gpu::token_codes`] takes: the bits of one
    /// operand at a time.
    ///
    /// # Errors
    /// As [`Gpu::token_codes`].
    pub fn round_heads(
        &self,
        qkv: &Tensor,
        heads: &TokenHeads<'_>,
        query_scale: Option<f32>,
    ) -> Result<[Tensor; 3]> {
        let HeadShape { windows, tokens, heads: count, width } = heads.shape;
        let found = self.find_grids(qkv, heads, query_scale)?;
        let shape = [3, windows, count, tokens, width];
        let values = Tensor::f_empty(shape, (Kind::Float, self.device()))?;
        let arguments =
            RoundArguments { heads: found.arguments(heads)?, values: address(Some(&values)) };
        self.by_head_rows("round_heads", heads, &arguments)?;
        Ok([values.f_select(0, 0)?, values.f_select(0, 1)?, values.f_select(0, 2)?])
    }

    /// Grids of all tokens of q, k and v.
    fn find_grids(
        &self,
        qkv: &Tensor,
        heads: &TokenHeads<'_>,
        query_scale: Option<f32>,
    ) -> Result<FoundGrids> {
        let HeadShape { windows, tokens, .. } = heads.shape;
        let qkv = qkv.f_contiguous()?;
        let is_aligned = address(Some(&qkv)).is_multiple_of(Memory::ALIGNMENT);
        let count = 3 * windows * tokens * heads.shape.columns();
        if !is_aligned || !self.fits(Some(&qkv), Kind::Float, count) {
            return Err(Error::internal("q, k and v do not fit their heads"));
        }
        let query_factor = query_scale.unwrap_or(1.0);
        let operands = Operands { qkv: &qkv, heads };
        let facts = self.survey_heads(&operands, query_factor)?;
        let max_codes = self.allocate_heads(&operands, &facts)?;
        Ok(FoundGrids { qkv, query_factor, facts, max_codes })
    }

    /// Runs a kernel whose blocks have rows of a window.
    fn by_head_rows<A: DeviceRepr>(
        &self,
        name: &'static str,
        heads: &TokenHeads<'_>,
        arguments: &A,
    ) -> Result<()> {
        let HeadShape { windows, tokens, .. } = heads.shape;
        let grid = (to_u32(windows * parts(tokens, ROWS))?, 1, 1);
        let function = self.function(&quantize::source(), name, 0)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: q, k and v were checked when their grids were found, which there are for each token; results are
        // of the shape of the heads; callers hold all of them until the call ends.
        unsafe {
            self.launch(&function, Launch { grid, threads: THREADS, shared: 0 }, arguments)
        }
    }

    /// Extents of all tokens of q, k and v and, for ranking, ranges and counts.
    fn survey_heads(&self, of: &Operands<'_>, query_factor: f32) -> Result<[Facts; 3]> {
        let HeadShape { tokens, width, .. } = of.heads.shape;
        let [q, k, v] = &of.heads.grids;
        let (sets, rows) = (of.heads.sets(), of.heads.rows()?);
        let facts = |affine: &Affine<'_>, tokens| {
            Facts::empty(self, sets * tokens, 1, affine.mixed().is_some())
        };
        let facts = [facts(q, tokens)?, facts(k, tokens)?, facts(v, width)?];
        let row_blocks = parts(sets * tokens, ROWS);
        let arguments = HeadSurveys {
            q: facts[0].survey((of.memory(0)?, rows), q.mixed(), query_factor)?,
            k: facts[1].survey((of.memory(1)?, rows), k.mixed(), 1.0)?,
            v: facts[2].survey((of.memory(2)?, v.tokens), v.mixed(), 1.0)?,
            row_blocks: to_i32(row_blocks)?,
        };
        let grid = (to_u32(2 * row_blocks + sets * (width / COLUMNS))?, 1, 1);
        let function = self.function(&quantize::source(), "survey_heads", 0)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: the caller has checked q, k and v, and facts have a value for each token; all live until the
        // call ends.
        unsafe {
            self.launch(&function, Launch { grid, threads: THREADS, shared: 0 }, &arguments)?;
        }
        Ok(facts)
    }

    /// Largest codes of all tokens of q, k and v; none where they are the same for all.
    fn allocate_heads(&self, of: &Operands<'_>, facts: &[Facts; 3]) -> Result<[Option<Tensor>; 3]> {
        let mixed = [0, 1, 2].map(|part| of.heads.grids[part].mixed());
        let Some(longest) = mixed.iter().flatten().map(|(_, per_image)| *per_image).max() else {
            return Ok([None, None, None]);
        };
        let max_codes = |part: usize| mixed[part].map(|_| facts[part].max_codes()).transpose();
        let max_codes = [max_codes(0)?, max_codes(1)?, max_codes(2)?];
        let arguments = |part: usize| match (mixed[part], &max_codes[part]) {
            (Some(mixed), Some(max_codes)) => facts[part].allocation(mixed, max_codes),
            _ => Ok(AllocateArguments::default()),
        };
        let arguments = HeadAllocations { q: arguments(0)?, k: arguments(1)?, v: arguments(2)? };
        let images = of.heads.sets() / if of.heads.half == 0 { 1 } else { 4 };
        let launch = allocation_launch((to_u32(images)?, 3, 1), longest)?;
        let function = self.function(&quantize::source(), "allocate_heads", 0)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: facts and largest codes have a value for each token, of which every image has the same number;
        // all live until the call ends.
        unsafe {
            self.launch(&function, launch, &arguments)?;
        }
        Ok(max_codes)
    }

    /// softmax(q·kᵀ)·v of all heads side by side, its weights on stairs: float32 [windows, tokens, columns].
    ///
    /// # Errors
    /// As [`Gpu::token_codes`].
    pub fn token_attention(
        &self,
        qkv: TokenCodes,
        attention: &TokenAttention<'_>,
        offsets: ScoreOffsets<'_>,
    ) -> Result<Tensor> {
        let TokenAttention { heads, bins } = attention;
        let HeadShape { windows, tokens, heads: count, width } = heads.shape;
        let columns = heads.shape.columns();
        if qkv.codes.size() != [windows * tokens, 3 * columns]
            || qkv.columns.size() != [windows, width, 2]
            || qkv.least.size() != [heads.sets() * tokens]
        {
            return Err(Error::internal("codes do not fit the heads of an attention"));
        }
        let dense = offsets.dense(self, [windows, count, tokens])?;
        let floats = |shape: &[i64]| Tensor::f_empty(shape, (Kind::Float, self.device()));
        let (sums, out) =
            (floats(&[windows, count, tokens, 2])?, floats(&[windows, tokens, columns])?);
        let arguments = AttentionArguments {
            qkv: address(Some(&qkv.codes)),
            grids: address(Some(&qkv.grids)),
            columns: address(Some(&qkv.columns)),
            bias: address(dense.bias.as_ref()),
            mask: address(dense.mask.as_ref()),
            sums: address(Some(&sums)),
            least: address(Some(&qkv.least)),
            out: address(Some(&out)),
            bins: bins.arguments(),
            tokens: heads.rows()?,
            heads: to_i32(count)?,
            windows: to_i32(windows)?,
            masks: to_i32(dense.masks)?,
            pitch: to_i32(3 * columns)?,
            score_factor: offsets.scale * std::f32::consts::LOG2_E,
        };
        let _counted = to_i32(2 * windows * tokens)?;
        let (source, most_bytes) = (source(width), to_u32(MAX_SHARED_BYTES)?);
        let sum = self.function(&source, "attention_sums", most_bytes)?;
        let mix = self.function(&source, "attention_mix", most_bytes)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: codes have rows, columns and grids for the shape, which was checked; bias and mask were checked;
        // results are of that shape; all live until the call ends.
        unsafe {
            self.launch(&sum, heads.shape.launch(SUM_WARPS, attention.sum_bytes())?, &arguments)?;
            self.launch(&mix, heads.shape.launch(MIX_WARPS, attention.mix_bytes())?, &arguments)?;
        }
        Ok(out)
    }
}

/// Grids of all tokens of q, k and v, and what is rounded to them.
struct FoundGrids {
    qkv: Tensor,
    query_factor: f32,
    facts: [Facts; 3],
    max_codes: [Option<Tensor>; 3],
}

impl FoundGrids {
    fn arguments(&self, heads: &TokenHeads<'_>) -> Result<HeadArguments> {
        let grids = |part: usize| TokenGrids {
            extents: address(Some(&self.facts[part].extents)),
            max_codes: address(self.max_codes[part].as_ref()),
            max_code: heads.grids[part].max_code,
            exact: i32::from(heads.grids[part].exact_constants),
        };
        Ok(HeadArguments {
            qkv: address(Some(&self.qkv)),
            tokens: heads.rows()?,
            width: to_i32(heads.shape.width)?,
            query_factor: self.query_factor,
            q: grids(0),
            k: grids(1),
            v: grids(2),
            windows: to_i32(heads.shape.windows)?,
        })
    }
}

/// q, k and v where a linear left them.
struct Operands<'a> {
    qkv: &'a Tensor,
    heads: &'a TokenHeads<'a>,
}

impl Operands<'_> {
    /// Where the values of q, k or v are.
    fn memory(&self, part: i64) -> Result<Memory> {
        let HeadShape { tokens, heads, width, .. } = self.heads.shape;
        let columns = self.heads.shape.columns();
        let is_value = part == 2;
        let (blocks, block) = if is_value { (heads, width) } else { (1, 0) };
        let first = (part * columns) as u64 * size_of::<f32>() as u64;
        let steps = [tokens * 3 * columns, block, 3 * columns];
        Ok(Memory::new(address(Some(self.qkv)) + first, steps, to_i32(blocks)?))
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::kernels::cuda::compile::argument_bytes;
    use crate::kernels::cuda::quantize::{Plane, Stairs};
    use crate::kernels::passes::ranking::Rules;
    use crate::kernels::passes::staircase::{Passed, Staircase, values_of};

    const RULES: Rules = Rules {
        bits: 4,
        mixed: true,
        first_factor: 1.0,
        min_swaps: 0,
        threshold: 1.0,
        density: None,
    };

    fn bins(tokens: Tokens) -> Bins {
        let stairs = Staircase::new(vec![0.1, 0.5], Passed::AtLeast).unwrap();
        let stairs = Stairs {
            stairs: &stairs,
            values: &values_of(&[]),
            relative: Some((tokens, 1e-8)),
            planes: vec![Plane { codes: [1; 256], factor: 1.0 }],
        };
        Bins::on(Device::Cpu, &stairs).unwrap().unwrap()
    }

    fn affine(free: i64, reduce: i64, (heads, half): (i64, i64), rules: Rules) -> Affine<'static> {
        Affine {
            tokens: Tokens::new(free, reduce, heads, half).unwrap(),
            groups: 1,
            max_code: 15.0,
            rules: Some((rules, free)),
            exact_constants: true,
            stretch: None,
        }
    }

    #[test]
    fn operands_have_heads_and_windows_in_common() {
        let shape = HeadShape { windows: 32, tokens: 49, heads: 3, width: 32 };
        // Whether q, k, v and weights with those heads and windows in common are taken.
        let takes = |shape: HeadShape, in_common: [(i64, i64); 4], rules: Rules| {
            let HeadShape { tokens, width, .. } = shape;
            let [q, k, v, (heads, half)] = in_common;
            let grids = [
                affine(tokens, width, q, rules),
                affine(tokens, width, k, rules),
                affine(width, tokens, v, rules),
            ];
            let bins = bins(Tokens::new(tokens, tokens, heads, half).unwrap());
            let heads = TokenHeads::new(shape, grids).unwrap();
            heads.is_some_and(|heads| TokenAttention::new(heads, &bins).unwrap().is_some())
        };
        for half in [0, 1, 2] {
            assert!(takes(shape, [(3, half); 4], RULES), "{half}");
            for odd in 0..4 {
                for other in [(1, half), (3, half + 1)] {
                    let mut in_common = [(3, half); 4];
                    in_common[odd] = other;
                    assert!(!takes(shape, in_common, RULES), "{half}: {odd}");
                }
            }
        }
        // Nine bits are no byte.
        let eight = |mixed| Rules { bits: 8, mixed, ..RULES };
        assert!(takes(shape, [(3, 0); 4], eight(false)) && !takes(shape, [(3, 0); 4], eight(true)));
        // Windows that are no quadrants, and heads without a kernel.
        assert!(!takes(HeadShape { windows: 12, ..shape }, [(3, 2); 4], RULES));
        assert!(!takes(HeadShape { width: 24, ..shape }, [(3, 0); 4], RULES));
        let large = |tokens| HeadShape { windows: 1, tokens, heads: 3, width: 64 };
        assert!(takes(large(577), [(3, 0); 4], RULES) && !takes(large(1025), [(3, 0); 4], RULES));
    }

    #[test]
    fn the_kernels_compile_for_both_generations() {
        for capability in [(8, 0), (9, 0)] {
            for width in [16, 32, 48, 64] {
                let program = source(width).compile(capability).unwrap().to_src();
                for kernel in ["attention_sums", "attention_mix"] {
                    let bytes = argument_bytes(&program, kernel);
                    assert_eq!(bytes, size_of::<AttentionArguments>(), "{width}: {kernel}");
                }
            }
            let program = quantize::source().compile(capability).unwrap().to_src();
            for (kernel, bytes) in [
                ("survey_heads", size_of::<HeadSurveys>()),
                ("allocate_heads", size_of::<HeadAllocations>()),
                ("encode_heads", size_of::<EncodeArguments>()),
                ("round_heads", size_of::<RoundArguments>()),
            ] {
                assert_eq!(argument_bytes(&program, kernel), bytes, "{kernel}");
            }
        }
    }
}
