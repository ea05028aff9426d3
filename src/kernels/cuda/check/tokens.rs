//! Attention on grids that tokens share over all heads: its codes against those of one operand at a time, and the rest
//! against its definition.

use tch::{Kind, Tensor};

use super::{numbers, rules, same, wrong};
use crate::error::Result;
use crate::kernels::cuda::attention::{Bins, HeadShape, ScoreOffsets};
use crate::kernels::cuda::gpu::Gpu;
use crate::kernels::cuda::operand::Tokens;
use crate::kernels::cuda::quantize::{Affine, Plane, Rounded, Stairs};
use crate::kernels::cuda::token_attention::{TokenAttention, TokenHeads};
use crate::kernels::passes::ranking::Rules;
use crate::kernels::passes::staircase::{Passed, Staircase, values_of};

/// Least ratio of a weight to the largest of its token.
const LEAST_RATIO: f32 = 1e-8;
/// Relative: a weight so near to a step may be on either side of it in float32.
const NEAR: f64 = 2e-5;
/// Relative to what is summed: roundings of float32.
const TOLERANCE: f64 = 1e-5;
/// Of scores, so that a softmax of them is neither flat nor of one value.
const SCALE: f64 = 0.05;

/// An attention.
struct Case {
    shape: HeadShape,
    /// Windows along a side of a quadrant; 0: no quadrants.
    half: i64,
    query_scale: Option<f32>,
    /// Powers of two of weights.
    levels: i64,
}

/// Images, and windows in quadrants.
///
/// # Errors
/// As [`run`](super::run).
pub(in crate::kernels::cuda) fn run(gpu: &Gpu) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let plain = HeadShape { windows: 2, tokens: 69, heads: 3, width: 64 };
    check(gpu, &Case { shape: plain, half: 0, query_scale: None, levels: 16 })?;
    let windows = HeadShape { windows: 32, tokens: 9, heads: 2, width: 32 };
    check(gpu, &Case { shape: windows, half: 2, query_scale: Some(0.3), levels: 28 })
}

fn check(gpu: &Gpu, case: &Case) -> Result<()> {
    let HeadShape { windows, tokens, heads, width } = case.shape;
    let stairs = stairs(case.levels).ok_or_else(|| wrong("stairs"))?;
    let exponent = |steps: u8| (steps > 0).then_some(case.levels - i64::from(steps));
    let values = values_of(&[]); // of no importance
    let described = Stairs {
        stairs: &stairs,
        values: &values,
        relative: Some((Tokens::new(tokens, tokens, heads, case.half)?, LEAST_RATIO)),
        planes: Plane::powers(0..=case.levels - 1, 1.0, exponent),
    };
    let bins = Bins::new(gpu, &described)?.ok_or_else(|| wrong("bins"))?;
    let grids = case.grids()?;
    let found = TokenHeads::new(case.shape, grids)?.ok_or_else(|| wrong("heads"))?;
    let attention = TokenAttention::new(found, &bins)?.ok_or_else(|| wrong("heads"))?;
    let found = attention.heads();

    let qkv = case.qkv()?.f_to_device(gpu.device())?;
    let codes = gpu.token_codes(&qkv, found, case.query_scale)?;
    let values = gpu.round_heads(&qkv, found, case.query_scale)?;
    let mut operands = Vec::new();
    for (index, decoded) in codes.decode(found)?.iter().enumerate() {
        let x = case.operand(&qkv, index)?;
        let rounded = Rounded::affine_on(gpu, x, &grids[index])?.ok_or_else(|| wrong("affine"))?;
        let expected = rounded.values()?.f_to_device(tch::Device::Cpu)?;
        same(&decoded.f_permute(Case::order(index))?, &expected, "codes of heads")?;
        let value = &values[index];
        let value = if index == 2 { value.f_transpose(2, 3)? } else { value.shallow_clone() };
        same(&value, &expected, "round_heads")?;
        operands.push(expected);
    }
    let [bias, mask] = case.terms()?;
    let (middle, slack) = case.mixed(&operands, [&bias, &mask], &stairs)?;
    let [bias, mask] = [bias.f_to_device(gpu.device())?, mask.f_to_device(gpu.device())?];
    let offsets = ScoreOffsets { scale: SCALE as f32, bias: Some(&bias), mask: Some(&mask) };
    let mixed = gpu.token_attention(codes, &attention, offsets)?;
    let mixed = mixed.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
    debug_assert_eq!(mixed.size(), [windows, tokens, heads * width]);
    let excess = mixed.f_sub(&middle)?.f_abs()?.f_sub(&slack)?.f_max()?.f_double_value(&[])?;
    // NaN is no less, either.
    if excess <= 0.0 { Ok(()) } else { Err(wrong("attention of tokens")) }
}

impl Case {
    /// Of q, k and v.
    fn grids(&self) -> Result<[Affine<'static>; 3]> {
        let HeadShape { tokens, heads, width, .. } = self.shape;
        let quadrants = if self.half == 0 { 1 } else { 4 };
        let rules = Rules { first_factor: 1.0, min_swaps: 0, ..rules() };
        let affine = |free: i64, reduce: i64| -> Result<Affine<'static>> {
            Ok(Affine {
                tokens: Tokens::new(free, reduce, heads, self.half)?,
                groups: 1,
                max_code: 15.0,
                rules: Some((rules, quadrants * free)),
                exact_constants: true,
                stretch: None,
            })
        };
        Ok([affine(tokens, width)?, affine(tokens, width)?, affine(width, tokens)?])
    }

    /// What a linear leaves: [windows, tokens, 3 · heads · width].
    fn qkv(&self) -> Result<Tensor> {
        let HeadShape { windows, tokens, heads, width } = self.shape;
        numbers(&[windows, tokens, 3 * heads * width], 20)
    }

    /// Of [windows, tokens, heads, width], the axes of an operand as products take it.
    fn order(index: usize) -> &'static [i64] {
        if index == 2 { &[0, 2, 3, 1] } else { &[0, 2, 1, 3] }
    }

    /// q, k or vᵀ of what a linear left: [windows, heads, free, reduce].
    fn operand(&self, qkv: &Tensor, index: usize) -> Result<Tensor> {
        let HeadShape { windows, tokens, heads, width } = self.shape;
        let x = qkv.f_reshape([windows, tokens, 3, heads, width])?.f_select(2, index as i64)?;
        let x = x.f_permute(Self::order(index))?.f_contiguous()?;
        match self.query_scale.filter(|_| index == 0) {
            Some(scale) => Ok(x.f_mul_scalar(f64::from(scale))?),
            None => Ok(x),
        }
    }

    /// Bias and mask.
    fn terms(&self) -> Result<[Tensor; 2]> {
        let HeadShape { tokens, heads, .. } = self.shape;
        let mask = numbers(&[2, 1, tokens, tokens], 22)?.f_ge(-1.0)?.f_to_kind(Kind::Float)?;
        let mask = mask.f_sub_scalar(1.0)?.f_mul_scalar(9.0)?;
        Ok([numbers(&[1, heads, tokens, tokens], 21)?, mask])
    }

    /// The definition, [windows, tokens, heads · width], and how far from it float32 may be.
    fn mixed(
        &self,
        operands: &[Tensor],
        [bias, mask]: [&Tensor; 2],
        stairs: &Staircase,
    ) -> Result<(Tensor, Tensor)> {
        let HeadShape { windows, tokens, heads, width } = self.shape;
        let [q, k, v] = operands else { return Err(wrong("codes of heads")) };
        let double = |x: &Tensor| x.f_to_kind(Kind::Double);
        let scores = double(q)?.f_matmul(&double(k)?.f_transpose(2, 3)?)?.f_mul_scalar(SCALE)?;
        let scores = scores.f_add(bias)?.f_add(&mask.f_repeat([windows / 2, 1, 1, 1])?)?;
        let weights = scores.f_softmax(-1, Kind::Double)?;
        let largest = self.largest(&weights)?;
        let ratios = weights.f_div(&largest)?;
        let on_stairs = |factor: f64| -> Result<Tensor> {
            Ok(powers(&ratios.f_mul_scalar(factor)?, stairs)?.f_mul(&largest)?)
        };
        let (low, high) = (on_stairs(1.0 - NEAR)?, on_stairs(1.0 + NEAR)?);
        let v = double(v)?.f_transpose(2, 3)?;
        let side_by_side = |x: Tensor| -> Result<Tensor> {
            Ok(x.f_transpose(1, 2)?.f_reshape([windows, tokens, heads * width])?)
        };
        let middle = low.f_add(&high)?.f_mul_scalar(0.5)?.f_matmul(&v)?;
        let slack = high.f_sub(&low)?.f_mul_scalar(0.5)?.f_add(&high.f_mul_scalar(TOLERANCE)?)?;
        let slack = slack.f_matmul(&v.f_abs()?.f_add_scalar(1.0)?)?;
        Ok((side_by_side(middle)?, side_by_side(slack)?))
    }

    /// The largest weight of every token, over all heads and the windows of its quadrant: [windows, 1, tokens, 1].
    fn largest(&self, weights: &Tensor) -> Result<Tensor> {
        let (HeadShape { windows, tokens, heads, .. }, half) = (self.shape, self.half);
        if half == 0 {
            return Ok(weights.f_amax([1i64, 3].as_slice(), true)?);
        }
        let images = windows / (4 * half * half);
        let quadrants = [images, 2, half, 2, half, heads, tokens, tokens];
        let largest = weights.f_reshape(quadrants.as_slice())?;
        let largest = largest.f_amax([2i64, 4, 5, 7].as_slice(), true)?;
        let every = [images, 2, half, 2, half, 1, tokens, 1];
        Ok(largest.f_expand(every.as_slice(), false)?.f_reshape([windows, 1, tokens, 1])?)
    }
}

/// Steps of powers of two, the lowest of which every ratio has passed if there are many.
fn stairs(levels: i64) -> Option<Staircase> {
    let exponents = (0..i32::try_from(levels).unwrap_or(0)).rev();
    Staircase::new(exponents.map(|e| 0.7 * 0.5f32.powi(e)).collect(), Passed::AtLeast)
}

/// What ratios become on those stairs.
fn powers(ratios: &Tensor, stairs: &Staircase) -> Result<Tensor> {
    let ratios = ratios.f_clamp_min(f64::from(LEAST_RATIO))?;
    let mut steps = ratios.f_zeros_like()?;
    for threshold in stairs.thresholds() {
        steps = steps.f_add(&ratios.f_ge(f64::from(*threshold))?.f_to_kind(Kind::Double)?)?;
    }
    let powers = steps.f_sub_scalar(stairs.len() as f64)?.f_exp2()?;
    Ok(powers.f_mul(&steps.f_gt(0.0)?.f_to_kind(Kind::Double)?)?)
}
