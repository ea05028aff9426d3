//! Fake quantization and codes on a GPU, in a visit or two of memory: the bits of the tensor code.

use std::ops::RangeInclusive;

use cudarc::driver::DeviceRepr;
use tch::{Kind, Tensor};

use super::codes::{GpuCodes, MAX_SEGMENTS, Padding};
use super::compile::{PLAIN, Source};
use super::gpu::{Gpu, Launch, WARP, address, by_value, parts, to_i32, to_u32};
use super::operand::{Memory, Tokens, dense};
use super::softmax::GridOnGpu;
use crate::error::{Error, Result};
use crate::kernels::passes::ranking::Rules;
use crate::kernels::passes::staircase::{Passed, Staircase, Values};

/// Threads of a block whose warps have a row each.
pub(super) const THREADS: u32 = 256;
/// Rows of such a block.
pub(super) const ROWS: i64 = 8;
/// Bytes of shared memory for each token of an allocation.
const TOKEN_BYTES: i64 = 8;
/// Tokens of an image that an allocation has room for, beside a few bytes of its own.
const MAX_TOKENS: i64 = ((48 << 10) - 256) / TOKEN_BYTES;
/// Groups of a row that a kernel has room for.
const MAX_GROUPS: i64 = MAX_SEGMENTS;
/// Most threads of a block.
const MAX_THREADS: i64 = 1024;

/// Values that are kept on a GPU.
pub(super) trait Constant: tch::kind::Element {
    /// Bytes of a value; tells kinds apart.
    const WIDTH: u32;

    /// Bits that tell values apart.
    fn bits(&self) -> u32;
}

impl Constant for f32 {
    const WIDTH: u32 = 4;

    fn bits(&self) -> u32 {
        self.to_bits()
    }
}

impl Constant for u8 {
    const WIDTH: u32 = 1;

    fn bits(&self) -> u32 {
        u32::from(*self)
    }
}

/// The post-GELU shift.
#[derive(Clone, Copy, Debug)]
pub struct Stretch<'a> {
    /// −τ.
    pub factor: f32,
    /// Ratios from which on the exponent is 1, 2, …
    pub steps: &'a [f32],
}

/// Grids over the extents of tokens and groups.
#[derive(Clone, Copy, Debug)]
pub struct Affine<'a> {
    /// Where the tokens are.
    pub tokens: Tokens,
    /// Groups of a token's row, each with a grid of its own.
    pub groups: i64,
    /// Largest code of every token without `rules`.
    pub max_code: f32,
    /// How tokens get bits, and how many are ranked together.
    pub rules: Option<(Rules, i64)>,
    /// Whether a group without width is the value itself.
    pub exact_constants: bool,
    /// How negatives are stretched.
    pub stretch: Option<Stretch<'a>>,
}

/// A function of few steps.
#[derive(Debug)]
pub struct Stairs<'a> {
    /// The steps.
    pub stairs: &'a Staircase,
    /// What each number of steps passed decodes to.
    pub values: &'a Values,
    /// Tokens whose largest value is the unit, and the least ratio to it; else values are as they are.
    pub relative: Option<(Tokens, f32)>,
    /// Terms of the integer form; none where there is no such form.
    pub planes: Vec<Plane>,
}

/// A term of a staircase's integer form: factor · code, times the largest value where values are
/// relative.
#[derive(Clone, Debug)]
pub struct Plane {
    /// The code of every number of steps passed.
    pub codes: [u8; 256],
    /// Scale.
    pub factor: f32,
}

impl Plane {
    /// Exponents that a plane of powers of two covers.
    const EXPONENTS: i64 = 8;

    /// Planes of 2^−e times `factor`, for the exponents e, where `exponent` gives that of a number of
    /// steps passed, if it is among them.
    pub fn powers(
        exponents: RangeInclusive<i64>,
        factor: f64,
        exponent: impl Fn(u8) -> Option<i64>,
    ) -> Vec<Self> {
        exponents
            .step_by(Self::EXPONENTS as usize)
            .map(|first| {
                let end = first + Self::EXPONENTS - 1;
                let code = |steps: usize| match u8::try_from(steps).ok().and_then(&exponent) {
                    Some(e) if (first..=end).contains(&e) => 1 << (end - e),
                    _ => 0,
                };
                let power = 2f64.powi(-i32::try_from(end).unwrap_or(i32::MAX));
                Self { codes: std::array::from_fn(code), factor: (factor * power) as f32 }
            })
            .collect()
    }
}

/// An operand whose grids are known, ready to be rounded.
#[derive(Debug)]
pub struct Rounded<'g> {
    gpu: &'g Gpu,
    /// As [`dense`] gave it.
    x: Tensor,
    form: Form,
}

#[derive(Debug)]
enum Form {
    Affine(AffineForm),
    Stairs(StairsForm),
}

#[derive(Debug)]
struct AffineForm {
    tokens: Tokens,
    groups: i64,
    /// [tokens, groups, 2]; none: the grid is fixed, or that of each row.
    extents: Option<Tensor>,
    max_codes: Option<Tensor>,
    fixed: Option<(Tensor, Tensor)>,
    max_code: f32,
    exact_constants: bool,
    /// Whether GELU comes first.
    gelu: bool,
    stretch: Option<(Tensor, f32)>,
    /// Whether codes are bytes and zero points whole numbers.
    has_codes: bool,
}

#[derive(Debug)]
struct StairsForm {
    tokens: Tokens,
    extents: Option<Tensor>,
    least_ratio: f32,
    thresholds: Tensor,
    steps: i32,
    passed: Passed,
    decoded: Tensor,
    planes: i64,
    tables: Tensor,
    factors: Tensor,
}

#[repr(C)]
pub(super) struct SurveyArguments {
    memory: Memory,
    tokens: Tokens,
    count: i32,
    groups: i32,
    per_image: i32,
    first_factor: f32,
    centre: f32,
    radius: f32,
    counts: i32,
    factor: f32,
    extents: u64,
    ranges: u64,
    inside: u64,
}

#[repr(C)]
#[derive(Default)]
pub(super) struct AllocateArguments {
    ranges: u64,
    inside: u64,
    tokens: i32,
    bits: i32,
    min_swaps: i32,
    weighted: i32,
    threshold: f32,
    floor: f32,
    max_codes: u64,
}

#[repr(C)]
#[derive(Default)]
struct CodesArguments {
    codes: u64,
    grids: u64,
    group_width: i32,
    width: i32,
}

#[repr(C)]
struct AffineArguments {
    memory: Memory,
    tokens: Tokens,
    rows: i32,
    groups: i32,
    extents: u64,
    max_codes: u64,
    scale: u64,
    zero: u64,
    max_code: f32,
    exact: i32,
    gelu: i32,
    steps: u64,
    step_count: i32,
    factor: f32,
    values: u64,
    codes: CodesArguments,
}

#[repr(C)]
struct StairsArguments {
    memory: Memory,
    tokens: Tokens,
    rows: i32,
    extents: u64,
    least_ratio: f32,
    thresholds: u64,
    steps: i32,
    passed: i32,
    decoded: u64,
    values: u64,
    planes: i32,
    codes_of: u64,
    factors: u64,
    codes: CodesArguments,
}

by_value!(SurveyArguments, AllocateArguments, AffineArguments, StairsArguments);

/// What a survey finds of tokens.
pub(super) struct Facts {
    /// float32 [tokens, groups, 2].
    pub(super) extents: Tensor,
    /// float32 `[tokens]`, if they are ranked.
    ranges: Tensor,
    /// The same.
    inside: Tensor,
}

impl Facts {
    /// Those of tokens in groups, for a kernel to fill.
    pub(super) fn empty(gpu: &Gpu, count: i64, groups: i64, is_ranked: bool) -> Result<Self> {
        let floats = |shape: &[i64]| Tensor::f_empty(shape, (Kind::Float, gpu.device()));
        let ranked = if is_ranked { count } else { 0 };
        Ok(Self {
            extents: floats(&[count, groups, 2])?,
            ranges: floats(&[ranked])?,
            inside: floats(&[ranked])?,
        })
    }

    /// What a survey of tokens takes, whose values are multiplied by `factor` before.
    pub(super) fn survey(
        &self,
        (memory, tokens): (Memory, Tokens),
        ranking: Option<(Rules, i64)>,
        factor: f32,
    ) -> Result<SurveyArguments> {
        let density = ranking.and_then(|(rules, _)| rules.density);
        let (count, groups, _) = self.extents.size3()?;
        let is_ranked = ranking.is_some();
        Ok(SurveyArguments {
            memory,
            tokens,
            count: to_i32(count)?,
            groups: to_i32(groups)?,
            per_image: to_i32(ranking.map_or(1, |(_, per_image)| per_image))?,
            first_factor: ranking.map_or(1.0, |(rules, _)| rules.first_factor),
            centre: density.map_or(0.0, |density| density.centre),
            radius: density.map_or(0.0, |density| density.radius),
            counts: i32::from(density.is_some()),
            factor,
            extents: address(Some(&self.extents)),
            ranges: if is_ranked { address(Some(&self.ranges)) } else { 0 },
            inside: if is_ranked { address(Some(&self.inside)) } else { 0 },
        })
    }

    /// What an allocation takes that gives every token its largest code: float32 `[tokens]`.
    pub(super) fn allocation(
        &self,
        (rules, per_image): (Rules, i64),
        max_codes: &Tensor,
    ) -> Result<AllocateArguments> {
        Ok(AllocateArguments {
            ranges: address(Some(&self.ranges)),
            inside: address(Some(&self.inside)),
            tokens: to_i32(per_image)?,
            bits: i32::from(rules.bits),
            min_swaps: to_i32(rules.min_swaps as i64)?,
            weighted: i32::from(rules.density.is_some()),
            threshold: rules.threshold,
            floor: rules.density.map_or(0.0, |density| density.floor),
            max_codes: address(Some(max_codes)),
        })
    }

    /// Room for the largest codes.
    pub(super) fn max_codes(&self) -> Result<Tensor> {
        Ok(self.ranges.f_empty_like()?)
    }
}

impl Affine<'_> {
    /// The rules of an allocation, if there is one, and how many tokens are ranked together.
    pub(super) fn mixed(&self) -> Option<(Rules, i64)> {
        self.rules.filter(|(rules, per_image)| rules.mixed && *per_image > 1)
    }

    /// Whether there is room for a row's grids, and for an allocation if there is one.
    pub(super) fn fits(&self) -> bool {
        self.groups <= MAX_GROUPS
            && self.mixed().is_none_or(|(_, per_image)| per_image <= MAX_TOKENS)
    }

    /// Whether codes are bytes.
    pub(super) fn has_byte_codes(&self) -> bool {
        match self.mixed() {
            Some((rules, _)) => u32::from(rules.bits) < u8::BITS, // some have one more
            None => self.max_code <= f32::from(u8::MAX),
        }
    }
}

/// How an allocation for that many tokens runs in blocks of the grid.
pub(super) fn allocation_launch(grid: (u32, u32, u32), per_image: i64) -> Result<Launch> {
    let threads = parts(per_image, WARP) * WARP;
    let shared = to_u32(per_image * TOKEN_BYTES)?;
    Ok(Launch { grid, threads: to_u32(threads.min(MAX_THREADS))?, shared })
}

pub(super) fn source() -> Source {
    // Every operation rounds, as those of tensors do.
    let text = concat!(
        include_str!("primitives.cu"),
        include_str!("tokens.cu"),
        include_str!("quantize.cu"),
        include_str!("heads.cu")
    );
    Source { name: "quantize", text, definitions: PLAIN, contract: false }
}

impl<'g> Rounded<'g> {
    /// `x` on grids over its own extents; `None` where tensor code has to do.
    ///
    /// # Errors
    /// `Device` when memory is short; `Internal` when a kernel does not start.
    pub fn affine(x: &Tensor, affine: &Affine<'_>) -> Result<Option<Self>> {
        let Some((gpu, x)) = dense(x)? else { return Ok(None) };
        Self::affine_on(gpu, x, affine)
    }

    /// [`Rounded::affine`] of a tensor that [`dense`] gave, on that GPU.
    pub(super) fn affine_on(gpu: &'g Gpu, x: Tensor, affine: &Affine<'_>) -> Result<Option<Self>> {
        let &Affine { tokens, groups, max_code, exact_constants, stretch, .. } = affine;
        let mixed = affine.mixed();
        if !affine.fits() {
            return Ok(None);
        }
        // A row that is a token finds its own extent when it is rounded.
        let alone = groups == 1 && tokens.heads == 1 && tokens.half == 0 && stretch.is_none();
        let facts = if alone && mixed.is_none() {
            None
        } else {
            Some(gpu.survey(&x, tokens, groups, mixed)?)
        };
        let max_codes = match (&facts, mixed) {
            (Some(facts), Some(mixed)) => Some(gpu.allocate(facts, mixed)?),
            _ => None,
        };
        let stretch = stretch
            .map(|stretch| Ok::<_, Error>((gpu.constant(stretch.steps)?, stretch.factor)))
            .transpose()?;
        let form = AffineForm {
            tokens,
            groups,
            extents: facts.map(|facts| facts.extents),
            max_codes,
            fixed: None,
            max_code,
            exact_constants,
            gelu: false,
            stretch,
            has_codes: affine.has_byte_codes(),
        };
        Ok(Some(Self { gpu, x, form: Form::Affine(form) }))
    }

    /// `x` on one given grid, scale and zero point being tensors of one value, the latter a whole number
    /// if the grid `is_integral`; `None` where tensor code has to do.
    ///
    /// # Errors
    /// As [`Rounded::affine`].
    pub fn fixed(
        x: &Tensor,
        (scale, zero): (&Tensor, &Tensor),
        max_code: f32,
        is_integral: bool,
    ) -> Result<Option<Self>> {
        let is_plain = |p: &Tensor| {
            p.numel() == 1
                && p.kind() == Kind::Float
                && p.device() == x.device()
                && !p.requires_grad()
        };
        if !is_plain(scale) || !is_plain(zero) {
            return Ok(None);
        }
        let Some((gpu, x)) = dense(x)? else { return Ok(None) };
        Self::fixed_on(gpu, x, (scale, zero), max_code, is_integral).map(Some)
    }

    /// [`Rounded::fixed`] of a tensor that [`dense`] gave, on that GPU, where the grid is, too.
    pub(super) fn fixed_on(
        gpu: &'g Gpu,
        x: Tensor,
        (scale, zero): (&Tensor, &Tensor),
        max_code: f32,
        is_integral: bool,
    ) -> Result<Self> {
        let form = AffineForm {
            tokens: Tokens::rows_of(&x)?,
            groups: 1,
            extents: None,
            max_codes: None,
            fixed: Some((scale.shallow_clone(), zero.shallow_clone())),
            max_code,
            exact_constants: false,
            gelu: false,
            stretch: None,
            has_codes: is_integral && max_code <= f32::from(u8::MAX),
        };
        Ok(Self { gpu, x, form: Form::Affine(form) })
    }

    /// `x` on a staircase; `None` where tensor code has to do.
    ///
    /// # Errors
    /// As [`Rounded::affine`].
    pub fn stairs(x: &Tensor, stairs: &Stairs<'_>) -> Result<Option<Self>> {
        let Some((gpu, x)) = dense(x)? else { return Ok(None) };
        Self::stairs_on(gpu, x, stairs).map(Some)
    }

    /// [`Rounded::stairs`] of a tensor that [`dense`] gave, on that GPU.
    pub(super) fn stairs_on(gpu: &'g Gpu, x: Tensor, stairs: &Stairs<'_>) -> Result<Self> {
        let tokens = match stairs.relative {
            Some((tokens, _)) => tokens,
            None => Tokens::rows_of(&x)?,
        };
        let extents = stairs
            .relative
            .map(|_| Ok::<_, Error>(gpu.survey(&x, tokens, 1, None)?.extents))
            .transpose()?;
        let steps = stairs.stairs.thresholds();
        let mut decoded = stairs.values[..=steps.len()].to_vec();
        if stairs.relative.is_some() {
            decoded[0] = 0.0;
        }
        let tables: Vec<u8> = stairs.planes.iter().flat_map(|plane| plane.codes).collect();
        let factors: Vec<f32> = stairs.planes.iter().map(|plane| plane.factor).collect();
        let form = StairsForm {
            tokens,
            extents,
            least_ratio: stairs.relative.map_or(0.0, |(_, least)| least),
            thresholds: gpu.constant(steps)?,
            steps: to_i32(steps.len() as i64)?,
            passed: stairs.stairs.passed(),
            decoded: gpu.constant(&decoded)?,
            planes: stairs.planes.len() as i64,
            tables: gpu.constant(&tables)?,
            factors: gpu.constant(&factors)?,
        };
        Ok(Self { gpu, x, form: Form::Stairs(form) })
    }

    /// x̂ of exact GELU of x; `None` unless the grid is given and uniform.
    ///
    /// # Errors
    /// As [`Rounded::affine`].
    pub fn after_gelu(mut self) -> Result<Option<Tensor>> {
        match &mut self.form {
            Form::Affine(form) if form.fixed.is_some() => form.gelu = true,
            Form::Affine(_) | Form::Stairs(_) => return Ok(None),
        }
        self.values().map(Some)
    }

    /// x̂ of the softmax of scores, as [`Gpu::softmax`]; `None` unless the grid is given and uniform.
    ///
    /// # Errors
    /// As [`Gpu::softmax`].
    pub fn after_softmax(&self, scale: f32, terms: [Option<&Tensor>; 2]) -> Result<Option<Tensor>> {
        let Form::Affine(AffineForm { fixed: Some((step, zero_point)), max_code, .. }) = &self.form
        else {
            return Ok(None);
        };
        let grid = GridOnGpu { scale: step, zero_point, max_code: *max_code };
        self.gpu.softmax_on(&self.x, scale, terms, Some(grid)).map(Some)
    }

    /// x̂.
    ///
    /// # Errors
    /// As [`Rounded::affine`].
    pub fn values(&self) -> Result<Tensor> {
        let out = Tensor::f_empty(self.x.size(), (Kind::Float, self.x.device()))?;
        self.run(Some(&out), None)?;
        Ok(out)
    }

    /// Codes of rows; `None` without an integer form.
    ///
    /// # Errors
    /// As [`Rounded::affine`].
    pub fn codes(&self) -> Result<Option<GpuCodes>> {
        let (terms, groups) = match &self.form {
            Form::Affine(form) if !form.has_codes => return Ok(None),
            Form::Affine(form) => (if form.stretch.is_some() { 2 } else { 1 }, form.groups),
            Form::Stairs(form) => (form.planes, 1),
        };
        let width = i64::from(self.tokens().width);
        let fits = terms > 0 && terms * groups <= MAX_SEGMENTS;
        let Some(padding) = Padding::new(width, groups).filter(|_| fits) else {
            return Ok(None);
        };
        let codes = GpuCodes::empty(terms, i64::from(self.rows()?), padding, &self.x)?;
        self.run(None, Some(&codes))?;
        Ok(Some(codes))
    }

    fn tokens(&self) -> Tokens {
        match &self.form {
            Form::Affine(form) => form.tokens,
            Form::Stairs(form) => form.tokens,
        }
    }

    fn rows(&self) -> Result<i32> {
        to_i32(self.x.numel() as i64 / i64::from(self.tokens().width).max(1))
    }

    fn run(&self, values: Option<&Tensor>, codes: Option<&GpuCodes>) -> Result<()> {
        let codes = match codes {
            Some(codes) => CodesArguments {
                codes: address(Some(&codes.codes)),
                grids: address(Some(&codes.grids)),
                group_width: to_i32(codes.padding.group_width)?,
                width: to_i32(codes.padding.width)?,
            },
            None => CodesArguments::default(),
        };
        let (values, rows) = (address(values), self.rows()?);
        let groups = match &self.form {
            Form::Affine(form) => form.groups,
            Form::Stairs(_) => 1,
        };
        let memory = Memory::of(&self.x, self.tokens(), groups)?;
        match &self.form {
            Form::Affine(form) => {
                let (scale, zero) = match &form.fixed {
                    Some((scale, zero)) => (address(Some(scale)), address(Some(zero))),
                    None => (0, 0),
                };
                let (steps, step_count, factor) = match &form.stretch {
                    Some((steps, factor)) => (address(Some(steps)), steps.numel() as i64, *factor),
                    None => (0, 0, 0.0),
                };
                let arguments = AffineArguments {
                    memory,
                    tokens: form.tokens,
                    rows,
                    groups: to_i32(form.groups)?,
                    extents: address(form.extents.as_ref()),
                    max_codes: address(form.max_codes.as_ref()),
                    scale,
                    zero,
                    max_code: form.max_code,
                    exact: i32::from(form.exact_constants),
                    gelu: i32::from(form.gelu),
                    steps,
                    step_count: to_i32(step_count)?,
                    factor,
                    values,
                    codes,
                };
                self.gpu.by_row(&source(), "affine", i64::from(rows), &arguments)
            }
            Form::Stairs(form) => {
                let arguments = StairsArguments {
                    memory,
                    tokens: form.tokens,
                    rows,
                    extents: address(form.extents.as_ref()),
                    least_ratio: form.least_ratio,
                    thresholds: address(Some(&form.thresholds)),
                    steps: form.steps,
                    passed: match form.passed {
                        Passed::AtLeast => 0,
                        Passed::NotBelow => 1,
                        Passed::Above => 2,
                    },
                    decoded: address(Some(&form.decoded)),
                    values,
                    planes: to_i32(form.planes)?,
                    codes_of: address(Some(&form.tables)),
                    factors: address(Some(&form.factors)),
                    codes,
                };
                self.gpu.by_row(&source(), "stairs", i64::from(rows), &arguments)
            }
        }
    }
}

impl Gpu {
    /// Extents of the groups of every token of `x` and, for ranking, ranges and counts.
    fn survey(
        &self,
        x: &Tensor,
        tokens: Tokens,
        groups: i64,
        ranking: Option<(Rules, i64)>,
    ) -> Result<Facts> {
        let count = tokens.count(x.numel() as i64);
        let facts = Facts::empty(self, count, groups, ranking.is_some())?;
        let memory = Memory::of(x, tokens, groups)?;
        let arguments = facts.survey((memory, tokens), ranking, 1.0)?;
        self.by_row(&source(), "survey", count, &arguments)?;
        Ok(facts)
    }

    /// Largest codes of all tokens, of which so many are ranked together.
    fn allocate(&self, facts: &Facts, (rules, per_image): (Rules, i64)) -> Result<Tensor> {
        let max_codes = facts.max_codes()?;
        let images = max_codes.numel() as i64 / per_image;
        let arguments = facts.allocation((rules, per_image), &max_codes)?;
        let launch = allocation_launch((to_u32(images)?, 1, 1), per_image)?;
        let function = self.function(&source(), "allocate", 0)?;
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: the tensors have a value for each token, and live until the call ends.
        unsafe {
            self.launch(&function, launch, &arguments)?;
        }
        Ok(max_codes)
    }

    /// Runs a kernel that has a warp for each row (or token), eight to a block.
    pub(super) fn by_row<A: DeviceRepr>(
        &self,
        source: &Source,
        name: &'static str,
        rows: i64,
        arguments: &A,
    ) -> Result<()> {
        if rows == 0 {
            return Ok(());
        }
        let function = self.function(source, name, 0)?;
        let grid = (to_u32(parts(rows, ROWS))?, 1, 1);
        #[allow(unsafe_code, reason = "a kernel follows whatever pointers it is given")]
        // SAFETY: callers make the tensors behind the arguments for the rows and groups that they pass,
        // contiguous and on this GPU, and hold them until the call ends.
        unsafe {
            self.launch(&function, Launch { grid, threads: THREADS, shared: 0 }, arguments)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cuda::compile::{argument_bytes, is_installed};

    #[test]
    fn the_kernels_compile_for_both_generations() {
        assert!(is_installed(), "scripts/setup.sh test installs NVRTC");
        for capability in [(8, 0), (9, 0)] {
            let program = source().compile(capability).unwrap().to_src();
            for (kernel, bytes) in [
                ("survey", size_of::<SurveyArguments>()),
                ("allocate", size_of::<AllocateArguments>()),
                ("affine", size_of::<AffineArguments>()),
                ("stairs", size_of::<StairsArguments>()),
            ] {
                assert_eq!(argument_bytes(&program, kernel), bytes, "{kernel}");
            }
            assert!(!program.contains("fma.rn.f32 \t%f1, %f2, %f3"), "operations were contracted");
        }
    }

    #[test]
    fn grids_and_tokens_beyond_shared_memory_are_left_to_tensors() {
        assert!(source().text.contains(&format!("const int MAX_GROUPS = {MAX_GROUPS};")));
        let rules = Rules {
            bits: 4,
            mixed: true,
            first_factor: 1.0,
            min_swaps: 1,
            threshold: 1.1,
            density: None,
        };
        let fits = |groups: i64, per_image: i64| {
            let affine = Affine {
                tokens: Tokens::new(per_image, 384, 1, 0).unwrap(),
                groups,
                max_code: 15.0,
                rules: Some((rules, per_image)),
                exact_constants: true,
                stretch: None,
            };
            affine.fits()
        };
        assert!(fits(1, 197) && fits(64, 197) && fits(8, 4097));
        assert!(!fits(96, 197) && !fits(384, 1) && !fits(8, 6144));
    }

    #[test]
    fn what_does_not_compile_is_said() {
        let broken = Source { text: "__global__ void f() { g(); }", ..source() };
        let message = broken.compile((9, 0)).unwrap_err();
        assert!(message.contains("quantize.cu") && message.contains('g'), "{message}");
    }

    #[test]
    fn powers_of_two_take_planes_of_eight() {
        // Numbers of steps passed 1..=16 are exponents 15..=0.
        let planes = Plane::powers(0..=15, 1.0, |steps| {
            (1..=16).contains(&steps).then(|| 16 - i64::from(steps))
        });
        assert_eq!(planes.len(), 2);
        for steps in 0..=16u8 {
            let value: f64 = planes
                .iter()
                .map(|plane| f64::from(plane.codes[usize::from(steps)]) * f64::from(plane.factor))
                .sum();
            let expected = if steps == 0 { 0.0 } else { 2f64.powi(i32::from(steps) - 16) };
            assert_eq!(value, expected);
        }
    }
}
