//! Softmax on stairs: the bits of a softmax and stairs one after the other.

use tch::{Kind, Tensor};

use super::{numbers, same, wrong};
use crate::error::Result;
use crate::kernels::cuda::gpu::Gpu;
use crate::kernels::cuda::operand::Tokens;
use crate::kernels::cuda::quantize::{Rounded, Stairs};
use crate::kernels::passes::staircase::{Passed, Staircase, values_of};

/// Of scores.
const FACTOR: f32 = 3.0;

/// Short rows and long ones, with every term.
///
/// # Errors
/// As [`run`](super::run).
pub(in crate::kernels::cuda) fn run(gpu: &Gpu) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let values: Vec<f32> = (0..=16i16).map(|steps| 0.5f32.powi(16 - i32::from(steps))).collect();
    let values = values_of(&values);
    // Heads that share tokens, and windows in quadrants of `half` × `half`, if it is not 0; rows that registers hold,
    // and longer ones.
    for (windows, tokens, (heads, half)) in
        [(2, 300, (3, 0)), (4, 197, (3, 1)), (32, 37, (3, 2)), (2, 99, (1, 0))]
    {
        let to_gpu = |x: Tensor| -> Result<Tensor> { Ok(x.f_to_device(gpu.device())?) };
        let shape = [windows, 3, tokens, tokens];
        let scores = if heads == 1 { near_steps(&shape)? } else { numbers(&shape, 23)? };
        let scores = to_gpu(scores)?;
        let bias = to_gpu(numbers(&[1, 3, tokens, tokens], 24)?)?;
        let mask = numbers(&[2, 1, tokens, tokens], 25)?.f_ge(-1.0)?.f_to_kind(Kind::Float)?;
        let mask = to_gpu(mask.f_sub_scalar(1.0)?.f_mul_scalar(100.0)?)?;
        for levels in [8u8, 16] {
            let thresholds = (0..i32::from(levels)).rev().map(|e| 0.7 * 0.5f32.powi(e));
            let stairs = Staircase::new(thresholds.collect(), Passed::AtLeast);
            let described = Stairs {
                stairs: &stairs.ok_or_else(|| wrong("stairs"))?,
                values: &values,
                relative: Some((Tokens::new(tokens, tokens, heads, half)?, 1e-8)),
                planes: Vec::new(),
            };
            for terms in [[None, None], [Some(&bias), None], [Some(&bias), Some(&mask)]] {
                let found = gpu.stepped_softmax(&scores, FACTOR, terms, &described)?;
                let found = found.ok_or_else(|| wrong("step_rows"))?;
                let weights = gpu.softmax(&scores, FACTOR, terms)?;
                let expected = Rounded::stairs_on(gpu, weights, &described)?.values()?;
                same(&found, &expected.f_to_device(tch::Device::Cpu)?, "step_rows")?;
            }
        }
    }
    Ok(())
}

/// Scores whose weights are so near to steps, in ratios to the largest of their row, that a rounding decides.
fn near_steps(shape: &[i64]) -> Result<Tensor> {
    let exponents = numbers(shape, 26)?.f_abs()?.f_mul_scalar(4.0)?.f_floor()?;
    let logarithms = exponents.f_mul_scalar(-std::f64::consts::LN_2)?.f_add_scalar(0.7f64.ln())?;
    let errors = numbers(shape, 27)?.f_mul_scalar(1e-7)?.f_add_scalar(1.0)?;
    let scores = logarithms.f_mul(&errors)?.f_div_scalar(f64::from(FACTOR))?;
    let _largest = scores.f_narrow(-1, 0, 1)?.f_fill_(0.0)?;
    Ok(scores)
}
