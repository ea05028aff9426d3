//! What a GPU's kernels must compute before anything relies on them: the bits of the CPU's passes, and
//! the products of what codes decode to.

pub(super) mod stepped;
pub(super) mod tokens;

use tch::{Kind, Tensor};

use super::attention::{Bins, FixedGrid, HeadShape, ScoreOffsets};
use super::codes::{FixedCodes, GpuCodes, GpuWeight};
use super::gpu::Gpu;
use super::operand::Tokens;
use super::product::Epilogue;
use super::quantize::{Affine, Plane, Rounded, Stairs, Stretch};
use crate::error::{Error, Result};
use crate::kernels::cpu_slices::{filled, floats};
use crate::kernels::passes::affine::{Constants, Grid};
use crate::kernels::passes::groups::{GroupGrids, Grouped, Shift};
use crate::kernels::passes::ranking::{Density, Rules};
use crate::kernels::passes::staircase::{Passed, Rows, Staircase, values_of};
use crate::kernels::passes::tokens::{Along, Layout, TokenGrids};
use crate::quant::IntTerm;

/// Images, tokens, channels and groups of the operands: odd, so that edges are met.
const SHAPE: [usize; 3] = [3, 37, 88];
const GROUPS: usize = 4;
/// Rows of the weight.
const OUT: i64 = 70;
/// Of scores, so that a softmax of them is neither flat nor of one value.
const SCALE: f64 = 1e-5;
/// Relative to the largest value: roundings of sums in float32.
const TOLERANCE: f64 = 1e-5;

/// Compares every kernel with what it stands for.
///
/// # Errors
/// `Internal` that names the kernel at fault, or what libtorch or the driver reports.
pub(super) fn run(gpu: &Gpu) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for stretched in [false, true] {
        linear_inputs(gpu, stretched)?;
    }
    attention(gpu)?;
    blocks(gpu)
}

fn rules() -> Rules {
    Rules {
        bits: 4,
        mixed: true,
        first_factor: 1e8,
        min_swaps: 1,
        threshold: 1.1,
        density: Some(Density { centre: 0.01, radius: 0.3, floor: 0.1 * SHAPE[2] as f32 }),
    }
}

/// Grids for groups and tokens, and products with a packed weight.
fn linear_inputs(gpu: &Gpu, stretched: bool) -> Result<()> {
    let [images, tokens, channels] = SHAPE;
    let x = numbers(&SHAPE.map(|n| n as i64), 1)?;
    let (rules, steps) = (rules(), [1.5f32, 3.0, 6.0, 12.0]);
    let shape = Grouped { channels, group: channels / GROUPS, tokens };
    let shift = stretched.then_some(Shift { factor: -2.0, steps: &steps });
    let grids = GroupGrids::new(floats(&x)?, shape, &rules, (Constants::Exact, shift));
    let expected = filled(&x.size(), |out| {
        grids.quantize(floats(&x)?, out);
        Ok(())
    })?;
    let affine = Affine {
        tokens: Tokens::new(tokens as i64, channels as i64, 1, 0)?,
        groups: GROUPS as i64,
        max_code: 15.0,
        rules: Some((rules, tokens as i64)),
        exact_constants: true,
        stretch: stretched.then_some(Stretch { factor: -2.0, steps: &steps }),
    };
    let rounded = Rounded::affine_on(gpu, x.f_to_device(gpu.device())?, &affine)?;
    let rounded = rounded.ok_or_else(|| wrong("affine"))?;
    same(&rounded.values()?, &expected, "affine")?;
    let codes = rounded.codes()?.ok_or_else(|| wrong("affine"))?;
    let rows = (images * tokens) as i64;
    let expected = expected.f_reshape([rows, channels as i64])?;
    near(&codes.decode()?, &expected, "codes")?;
    for bits in [4, 8] {
        let weight = weight_codes(gpu, bits, [OUT, SHAPE[2] as i64])?;
        let packed = GpuWeight::pack(&weight, GROUPS as i64)?.ok_or_else(|| wrong("weight"))?;
        let bias = numbers(&[OUT], 3)?.f_to_device(gpu.device())?;
        let residual = numbers(&[rows, OUT], 4)?.f_to_device(gpu.device())?;
        let order: Vec<i64> = (0..rows).map(|row| (row * 7 + 3) % rows).collect();
        let order = Tensor::f_from_slice(&order)?.f_to_device(gpu.device())?;
        let epilogue = Epilogue {
            bias: Some(&bias),
            gelu: true,
            residual: Some(&residual),
            order: Some(&order),
        };
        let found = gpu.product(&codes, &packed, epilogue)?.f_index_select(0, &order)?;
        let residual = residual.f_index_select(0, &order)?;
        let double = |x: &Tensor| x.f_to_kind(Kind::Double);
        let product = double(&codes.decode()?)?.f_matmul(&double(&weight.decode()?)?.f_tr()?)?;
        let product = product.f_add(&double(&bias)?)?.f_gelu("none")?.f_add(&double(&residual)?)?;
        near(&found, &product.f_to_device(tch::Device::Cpu)?, "product")?;
    }
    Ok(())
}

/// Grids for tokens that heads and windows share, staircases, and products of many matrices.
fn attention(gpu: &Gpu) -> Result<()> {
    // Two images of 4 × 4 windows, three heads.
    let (blocks, rows, width) = (2 * 16 * 3, 5, 9);
    let x = numbers(&[blocks, rows, width], 5)?;
    let quadrant = |window: i64| (window / 8) * 2 + window % 4 / 2;
    let set = |block: i64| (block / 48 * 4 + quadrant(block / 3 % 16)) as usize;
    let layout = Layout {
        width: width as usize,
        rows: rows as usize,
        sets: (0..blocks).map(set).collect(),
        set_count: 8,
        tokens_per_image: 4 * rows as usize,
        along: Along::Rows,
    };
    let rules = Rules { first_factor: 1.0, min_swaps: 0, ..rules() };
    let expected = filled(&x.size(), |out| {
        TokenGrids::new(floats(&x)?, &layout, &rules, Constants::SmallestScale)
            .quantize(floats(&x)?, out);
        Ok(())
    })?;
    let affine = Affine {
        tokens: Tokens::new(rows, width, 3, 2)?,
        groups: 1,
        max_code: 15.0,
        rules: Some((rules, 4 * rows)),
        exact_constants: false,
        stretch: None,
    };
    let on_gpu = x.f_to_device(gpu.device())?;
    let values = Rounded::affine_on(gpu, on_gpu.shallow_clone(), &affine)?;
    let values = values.ok_or_else(|| wrong("affine"))?;
    same(&values.values()?, &expected, "affine of windows")?;

    let scores = x.f_abs()?;
    let thresholds: Vec<f32> = (0..16i16).rev().map(|e| 0.7 * 0.5f32.powi(i32::from(e))).collect();
    let stairs = Staircase::new(thresholds, Passed::AtLeast).ok_or_else(|| wrong("stairs"))?;
    let powers: Vec<f32> = (0..=16i16).map(|steps| 0.5f32.powi(16 - i32::from(steps))).collect();
    let values_of_steps = values_of(&powers);
    let (plain, least_ratio) = (Tokens::new(rows, width, 3, 0)?, 1e-8);
    let largest = scores.f_reshape([-1, 3, rows, width])?.f_amax([1i64, 3].as_slice(), true)?;
    let largest = largest.f_expand([blocks / 3, 3, rows, 1], false)?.f_contiguous()?;
    let expected = filled(&scores.size(), |out| {
        let rows = Rows { width: width as usize, largest: floats(&largest)?, least_ratio };
        stairs.map_rows(floats(&scores)?, rows, &values_of_steps, out);
        Ok(())
    })?;
    let exponent = |steps: u8| (1..=16).contains(&steps).then(|| 16 - i64::from(steps));
    let described = Stairs {
        stairs: &stairs,
        values: &values_of_steps,
        relative: Some((plain, least_ratio)),
        planes: Plane::powers(0..=15, 1.0, exponent),
    };
    let rounded = Rounded::stairs_on(gpu, scores.f_to_device(gpu.device())?, &described)?;
    same(&rounded.values()?, &expected, "stairs")?;
    let lhs = rounded.codes()?.ok_or_else(|| wrong("stairs"))?;
    near(&lhs.decode()?, &expected.f_reshape([-1, width])?, "codes of stairs")?;

    let rhs = values.codes()?.ok_or_else(|| wrong("affine"))?;
    let found = gpu.product_batch(&lhs, &rhs, blocks)?;
    let matrices = |codes: &GpuCodes| -> Result<Tensor> {
        Ok(codes.decode()?.f_to_kind(Kind::Double)?.f_reshape([blocks, rows, width])?)
    };
    let product = matrices(&lhs)?.f_matmul(&matrices(&rhs)?.f_transpose(1, 2)?)?;
    near(&found, &product.f_to_device(tch::Device::Cpu)?, "product of matrices")?;
    softmax(gpu)
}

/// Short rows and long ones, with every term.
fn softmax(gpu: &Gpu) -> Result<()> {
    for tokens in [37i64, 300] {
        let (windows, heads) = (2, 3);
        let scores = numbers(&[2 * windows, heads, tokens, tokens], 7)?;
        let bias = numbers(&[1, heads, tokens, tokens], 8)?;
        let mask = numbers(&[windows, 1, tokens, tokens], 9)?.f_ge(0.0)?.f_to_kind(Kind::Float)?;
        let mask = mask.f_mul_scalar(100.0)?.f_sub_scalar(100.0)?;
        let by_window = scores.f_mul_scalar(0.5)?.f_add(&bias)?;
        let by_window = by_window.f_reshape([2, windows, heads, tokens, tokens])?.f_add(&mask)?;
        let expected = by_window.f_softmax(-1, Kind::Double)?.f_reshape_as(&scores)?;
        let [scores, bias, mask] = [scores, bias, mask].map(|x| x.f_to_device(gpu.device()));
        let (scores, bias, mask) = (scores?, bias?, mask?);
        let terms = [Some(&bias), Some(&mask)];
        near(&gpu.softmax(&scores, 0.5, terms)?, &expected, "softmax")?;
        let grid = Grid { scale: 0.01, zero_point: 3.0, max_code: 63.0 };
        let scores = on_grid(gpu, scores, grid)?;
        let found = scores.after_softmax(0.5, terms)?.ok_or_else(|| wrong("softmax"))?;
        rounded(&found, &expected, (grid, 0.0), "rounded softmax")?;
    }
    let grid = Grid { scale: 0.03, zero_point: 9.0, max_code: 63.0 };
    for width in [37, 48] {
        let x = numbers(&[5, width], 18)?;
        let expected = x.f_to_kind(Kind::Double)?.f_gelu("none")?;
        let x = on_grid(gpu, x.f_to_device(gpu.device())?, grid)?;
        let found = x.after_gelu()?.ok_or_else(|| wrong("GELU"))?;
        rounded(&found, &expected, (grid, 0.0), "rounded GELU")?;
    }
    Ok(())
}

fn on_grid(gpu: &Gpu, x: Tensor, grid: Grid) -> Result<Rounded<'_>> {
    let number = |n: f32| Tensor::f_from_slice(&[n])?.f_to_device(gpu.device());
    let (scale, zero) = (number(grid.scale)?, number(grid.zero_point)?);
    Rounded::fixed_on(gpu, x, (&scale, &zero), grid.max_code, true)
}

/// What a block does between codes: layer norm, q, k and v, attention, MLP and residuals, in windows.
fn blocks(gpu: &Gpu) -> Result<()> {
    let shape = HeadShape { windows: 4, tokens: 19, heads: 3, width: 32 };
    let (images, places, dim, hidden) = (2, 38, 96, 110);
    let to_gpu = |x: Tensor| -> Result<Tensor> { Ok(x.f_to_device(gpu.device())?) };
    let x = numbers(&[images, places, dim], 10)?;
    let order: Vec<i64> = (0..places).map(|place| (place * 7 + 3) % places).collect();
    let order = Tensor::f_from_slice(&order)?;
    let [factors, offsets] = [numbers(&[dim], 11)?, numbers(&[dim], 12)?];
    let expected = x.f_index_select(1, &order)?.f_layer_norm(
        [dim],
        Some(&factors),
        Some(&offsets),
        1e-5,
        false,
    )?;
    let [x, order, factors, offsets] = [x, order, factors, offsets].map(to_gpu);
    let (x, order) = (x?, order?);
    let grid = |scale: f32, zero_point: f32| Grid { scale, zero_point, max_code: 255.0 };
    let input = grid(0.1, 120.0);
    let codes = gpu.normed(&x, (&factors?, &offsets?, 1e-5), Some(&order), input)?;
    rounded(&codes.decode()?, &expected.f_reshape([-1, dim])?, (input, 0.0), "normed")?;

    let double = |x: Tensor| -> Result<Tensor> {
        Ok(x.f_to_kind(Kind::Double)?.f_to_device(tch::Device::Cpu)?)
    };
    let weight = |rows: i64, columns: i64, bits: u32| -> Result<(GpuWeight, Tensor)> {
        let codes = weight_codes(gpu, bits, [rows, columns])?;
        let decoded = double(codes.decode()?)?;
        Ok((GpuWeight::pack(&codes, 1)?.ok_or_else(|| wrong("weight"))?, decoded))
    };
    let (packed, decoded) = weight(3 * dim, dim, 4)?;
    let bias = to_gpu(numbers(&[3 * dim], 13)?)?;
    let product = |lhs: &FixedCodes, weight: &Tensor, bias: &Tensor| -> Result<Tensor> {
        Ok(double(lhs.decode()?)?
            .f_matmul(&weight.f_tr()?)?
            .f_add(&double(bias.shallow_clone())?)?)
    };
    let expected = product(&codes, &decoded, &bias)?;
    let grids = [grid(6.0, 128.0), grid(11.0, 120.0), grid(9.0, 140.0)];
    let qkv = gpu.split_heads(&codes, &packed, Some(&bias), (shape, Some(0.5), grids))?;
    for (index, (part, grid)) in qkv.decode()?.iter().zip(grids).enumerate() {
        let expected = expected.f_narrow(1, index as i64 * dim, dim)?;
        let factor = if index == 0 { 0.5 } else { 1.0 };
        rounded(part, &expected.f_mul_scalar(factor)?, (grid, 0.0), "heads of a product")?;
    }

    let [q, k, v] = qkv.decode()?.map(|x| -> Result<Tensor> {
        let HeadShape { windows, tokens, heads, width } = shape;
        Ok(double(x)?.f_reshape([windows, tokens, heads, width])?.f_transpose(1, 2)?)
    });
    let (v, bias, mask) = (
        v?,
        numbers(&[1, 3, 19, 19], 14)?,
        numbers(&[2, 1, 19, 19], 15)?.f_ge(-1.0)?.f_to_kind(Kind::Float)?.f_sub_scalar(1.0)?,
    );
    let masks = mask.f_mul_scalar(9.0)?.f_repeat([2, 1, 1, 1])?;
    let weights =
        q?.f_matmul(&k?.f_transpose(2, 3)?)?.f_mul_scalar(SCALE)?.f_add(&bias)?.f_add(&masks)?;
    let weights = weights.f_softmax(-1, Kind::Double)?;
    let [bias, mask] = [bias, mask.f_mul_scalar(9.0)?].map(to_gpu);
    let (bias, mask) = (bias?, mask?);
    let offsets = ScoreOffsets { scale: SCALE as f32, bias: Some(&bias), mask: Some(&mask) };
    let uniform = Grid { scale: 0.01, zero_point: 3.0, max_code: 63.0 };
    let on_grid = weights.f_div_scalar(0.01)?.f_round()?.f_clamp(-3.0, 60.0)?.f_mul_scalar(0.01)?;
    let thresholds: Vec<f32> = (0..16i16).rev().map(|e| 0.7 * 0.5f32.powi(i32::from(e))).collect();
    let stairs = Staircase::new(thresholds, Passed::AtLeast).ok_or_else(|| wrong("stairs"))?;
    let powers: Vec<f32> = (0..=16i16).map(|steps| 0.5f32.powi(16 - i32::from(steps))).collect();
    let values = values_of(&powers);
    let exponent = |steps: u8| (1..=16).contains(&steps).then(|| 16 - i64::from(steps));
    let mut planes = Plane::powers(0..=15, 1.0, exponent);
    planes.push(Plane { codes: [1; 256], factor: -0.01 });
    let mut steps = weights.f_zeros_like()?;
    for threshold in stairs.thresholds() {
        steps = steps.f_add(&weights.f_ge(f64::from(*threshold))?.f_to_kind(Kind::Double)?)?;
    }
    let powers = steps.f_sub_scalar(16.0)?.f_exp2()?;
    let powers = powers.f_mul(&steps.f_gt(0.0)?.f_to_kind(Kind::Double)?)?;
    let on_stairs = powers.f_sub_scalar(0.01)?;
    let stairs = Stairs { stairs: &stairs, values: &values, relative: None, planes };
    let stepped = Bins::new(gpu, &stairs)?.ok_or_else(|| wrong("bins"))?;
    // One weight may be so near to the border of two codes that float32 takes the other one.
    let largest = v.f_abs()?.f_max()?.f_double_value(&[])?;
    for (scores, hat, step) in [
        (FixedGrid::Uniform(uniform), on_grid, 0.01),
        (FixedGrid::Stepped(stepped), on_stairs, 0.0),
    ] {
        let mixed = hat.f_matmul(&v)?.f_transpose(1, 2)?.f_reshape([-1, dim])?;
        let found = gpu.attention(&qkv, offsets, &scores, grid(6.0, 128.0))?;
        rounded(&found.decode()?, &mixed, (grid(6.0, 128.0), step * largest), "attention")?;
    }

    let (packed, decoded) = weight(hidden, dim, 8)?;
    let bias = to_gpu(numbers(&[hidden], 16)?)?;
    let expected = product(&codes, &decoded, &bias)?.f_gelu("none")?;
    let codes = gpu.encoded(&codes, &packed, (Some(&bias), true), grid(80.0, 10.0))?;
    rounded(&codes.decode()?, &expected, (grid(80.0, 10.0), 0.0), "codes of a product")?;
    let (packed, decoded) = weight(dim, hidden, 4)?;
    let bias = to_gpu(numbers(&[dim], 17)?)?;
    let expected = product(&codes, &decoded, &bias)?.f_reshape([images, places, dim])?;
    let found = gpu.added(&codes, &packed, Some(&bias), &x, Some(&order))?;
    let found = double(found)?
        .f_sub(&double(x)?)?
        .f_index_select(1, &double(order)?.f_to_kind(Kind::Int64)?)?;
    near(&found, &expected, "sum with a product")
}

/// Whether values are those on the grid that are nearest to the expected ones, give or take `slack`.
fn rounded(
    found: &Tensor,
    expected: &Tensor,
    (grid, slack): (Grid, f64),
    what: &str,
) -> Result<()> {
    let found = found.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
    let Grid { scale, zero_point, max_code } = grid;
    let [scale, zero_point, max_code] = [scale, zero_point, max_code].map(f64::from);
    let (low, high) = (-zero_point * scale, (max_code - zero_point) * scale);
    let expected = expected.f_to_kind(Kind::Double)?.f_clamp(low, high)?;
    let error = found.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    // NaN is no less, either.
    if error <= 0.501 * scale + slack { Ok(()) } else { Err(wrong(what)) }
}

fn weight_codes(gpu: &Gpu, bits: u32, shape: [i64; 2]) -> Result<GpuCodes> {
    let codes = numbers(&shape, 2)?.f_abs()?.f_mul_scalar(f64::from(1 << bits) / 4.0)?;
    let codes = codes.f_floor()?.f_clamp(0.0, f64::from((1 << bits) - 1))?;
    let scale = numbers(&[shape[0], 1], 6)?.f_abs()?.f_add_scalar(0.1)?;
    let term = IntTerm {
        codes: codes.f_to_kind(Kind::Int)?.f_to_device(gpu.device())?,
        zero_point: scale.f_full_like(f64::from(1 << (bits - 1)))?.f_to_device(gpu.device())?,
        scale: scale.f_to_device(gpu.device())?,
    };
    GpuCodes::of_terms(&[term], bits)?.ok_or_else(|| wrong("weight"))
}

/// Numbers between −4 and 4, most of them small, that are the same on every machine.
fn numbers(shape: &[i64], seed: u64) -> Result<Tensor> {
    let mut state = seed;
    filled(shape, |out| {
        for value in out {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            *value = 4.0 * uniform * uniform * uniform;
        }
        Ok(())
    })
}

fn same(found: &Tensor, expected: &Tensor, what: &str) -> Result<()> {
    let found = found.f_to_device(tch::Device::Cpu)?;
    if found.f_equal(expected)? { Ok(()) } else { Err(wrong(what)) }
}

fn near(found: &Tensor, expected: &Tensor, what: &str) -> Result<()> {
    let found = found.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Double)?;
    let expected = expected.f_to_kind(Kind::Double)?;
    let largest = expected.f_abs()?.f_max()?.f_double_value(&[])?;
    let error = found.f_sub(&expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    // NaN is no less, either.
    if error <= TOLERANCE * largest { Ok(()) } else { Err(wrong(what)) }
}

fn wrong(kernel: &str) -> Error {
    Error::internal(format!("kernel `{kernel}` computes something else on this GPU"))
}
