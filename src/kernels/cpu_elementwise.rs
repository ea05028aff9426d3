//! What lies between the products of a forward, in one pass each: GELU, softmax, layer norm.
//!
//! Every function works on whole rows and computes each by itself, in an order that depends on its
//! length alone: neither the batch nor the threads show in a result. The loops are plain Rust that the
//! compiler turns into vector instructions: for the base instruction set, for AVX2 with fused
//! multiply-add, and for AVX-512, chosen at run time. The latter two give the same bits.

#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::has_avx512;

/// Partial sums of a row: what one or two vector registers hold.
const LANES: usize = 16;

/// What is added to a row of scores before its softmax.
#[derive(Clone, Copy, Debug)]
pub struct ScoreRow<'a> {
    /// Factor of the scores.
    pub scale: f32,
    /// Added after scaling; empty for none.
    pub bias: &'a [f32],
    /// Added at last; empty for none.
    pub mask: &'a [f32],
}

/// The affine map of a layer norm.
#[derive(Clone, Copy, Debug)]
pub struct NormRow<'a> {
    /// Factors, one per column.
    pub weight: &'a [f32],
    /// Offsets, one per column.
    pub bias: &'a [f32],
    /// Added to the variance.
    pub eps: f32,
}

/// Compiles `$generic` for the base instruction set, AVX2 and AVX-512 and calls what the processor can
/// run. Its parameter says whether multiply-add is one instruction.
macro_rules! dispatch {
    ($(#[$doc:meta])* $name:ident, $generic:ident, ($($argument:ident: $type:ty),*)) => {
        $(#[$doc])*
        pub fn $name($($argument: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
                fn widest($($argument: $type),*) {
                    $generic::<true>($($argument),*);
                }
                #[target_feature(enable = "avx2,fma")]
                fn fused($($argument: $type),*) {
                    $generic::<true>($($argument),*);
                }
                if has_avx512() {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: the processor has these features.
                    unsafe {
                        widest($($argument),*);
                    }
                    return;
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    #[allow(unsafe_code, reason = "instructions that not every processor has")]
                    // SAFETY: the processor was just asked for both features.
                    unsafe {
                        fused($($argument),*);
                    }
                    return;
                }
            }
            $generic::<false>($($argument),*);
        }
    };
}

dispatch!(
    /// Exact (erf) GELU of every value, in place.
    gelu, gelu_loop, (values: &mut [f32])
);
dispatch!(
    /// Adds `other` to as many values, in place.
    add, add_loop, (values: &mut [f32], other: &[f32])
);
dispatch!(
    /// Softmax of a row of scores with what is added to it, in place.
    softmax, softmax_loop, (row: &mut [f32], terms: ScoreRow<'_>)
);
dispatch!(
    /// `out = (x − mean) / √(variance + eps) · weight + bias` of a row.
    layer_norm, layer_norm_loop, (x: &[f32], norm: NormRow<'_>, out: &mut [f32])
);

/// a·b + c, in one rounding where that is one instruction.
#[inline(always)]
fn multiply_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// Value of a polynomial, highest coefficient first.
#[inline(always)]
fn polynomial<const FUSED: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut value = coefficients[0];
    for coefficient in &coefficients[1..] {
        value = multiply_add::<FUSED>(value, x, *coefficient);
    }
    value
}

/// erf to about 3e-7: a rational minimax approximation on −4..4, beyond which erf is ±1 in float32
/// (coefficients as in Eigen).
#[inline(always)]
fn erf<const FUSED: bool>(x: f32) -> f32 {
    const NUMERATOR: [f32; 7] = [
        -2.726_142_3e-10,
        2.770_681_4e-8,
        -2.101_024e-6,
        -5.692_506_4e-5,
        -7.349_906e-4,
        -2.954_6e-3,
        -1.609_603_3e-2,
    ];
    const DENOMINATOR: [f32; 5] =
        [-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2];
    let x = x.clamp(-4.0, 4.0);
    let square = x * x;
    let ratio =
        polynomial::<FUSED, 7>(square, NUMERATOR) / polynomial::<FUSED, 5>(square, DENOMINATOR);
    x * ratio
}

#[inline(always)]
fn gelu_loop<const FUSED: bool>(values: &mut [f32]) {
    for value in values {
        let half = 0.5 * *value;
        let phi = erf::<FUSED>(*value * std::f32::consts::FRAC_1_SQRT_2);
        *value = multiply_add::<FUSED>(half, phi, half);
    }
}

#[inline(always)]
fn add_loop<const FUSED: bool>(values: &mut [f32], other: &[f32]) {
    values.iter_mut().zip(other).for_each(|(value, other)| *value += other);
}

/// `step` over a row in [`LANES`] partial results, which `join` puts together at last.
#[inline(always)]
fn fold(
    row: &[f32],
    start: f32,
    step: impl Fn(f32, f32) -> f32,
    join: impl Fn(f32, f32) -> f32,
) -> f32 {
    let mut lanes = [start; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, x)| *lane = step(*lane, *x));
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, x)| *lane = step(*lane, *x));
    lanes.into_iter().fold(start, join)
}

#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    fold(row, 0.0, |sum, x| sum + x, |a, b| a + b)
}

/// eˣ for x ≤ 0: x = n·ln 2 + r, a polynomial in r (Cephes' coefficients), and n in the exponent.
#[inline(always)]
fn exp_of_negative<const FUSED: bool>(x: f32) -> f32 {
    const LOWEST: f32 = -87.0; // beyond it the result is no normal number
    const HIGH: f32 = 0.693_359_4; // ln 2 in two parts
    const LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves an integer in the last bits
    const SERIES: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let x = x.max(LOWEST);
    let shifted = multiply_add::<FUSED>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = multiply_add::<FUSED>(n, -HIGH, x);
    let r = multiply_add::<FUSED>(n, -LOW, r);
    let tail = polynomial::<FUSED, 6>(r, SERIES);
    let value = multiply_add::<FUSED>(tail, r * r, r) + 1.0;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    value * f32::from_bits(exponent)
}

#[inline(always)]
fn softmax_loop<const FUSED: bool>(row: &mut [f32], terms: ScoreRow<'_>) {
    let ScoreRow { mut scale, bias, mask } = terms;
    // Differences can be scaled as well, in a pass that there is anyway.
    if scale != 1.0 && (scale <= 0.0 || !(bias.is_empty() && mask.is_empty())) {
        row.iter_mut().for_each(|x| *x *= scale);
        scale = 1.0;
    }
    for added in [bias, mask] {
        row.iter_mut().zip(added).for_each(|(x, added)| *x += added);
    }
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let largest = fold(row, f32::NEG_INFINITY, larger, larger);
    let mut sums = [0.0; LANES];
    let exponentials = |part: &mut [f32; LANES]| {
        part.iter_mut().for_each(|x| *x = exp_of_negative::<FUSED>((*x - largest) * scale));
    };
    let mut parts = row.chunks_exact_mut(LANES);
    for part in &mut parts {
        if let Some(part) = part.first_chunk_mut() {
            exponentials(part);
            sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += *x);
        }
    }
    // What is left as a whole register, too: one at a time, exponentials cost as much each.
    let rest = parts.into_remainder();
    let mut whole = [largest; LANES];
    whole[..rest.len()].copy_from_slice(rest);
    exponentials(&mut whole);
    rest.copy_from_slice(&whole[..rest.len()]);
    sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += *x);
    let factor = 1.0 / sums.into_iter().fold(0.0, |sum, lane| sum + lane);
    row.iter_mut().for_each(|x| *x *= factor);
}

#[inline(always)]
fn layer_norm_loop<const FUSED: bool>(x: &[f32], norm: NormRow<'_>, out: &mut [f32]) {
    let count = x.len() as f32;
    let mean = sum(x) / count;
    let square = |sum, x: f32| multiply_add::<FUSED>(x - mean, x - mean, sum);
    let squares = fold(x, 0.0, square, |a, b| a + b);
    let factor = 1.0 / (squares / count + norm.eps).sqrt();
    let columns = x.iter().zip(norm.weight).zip(norm.bias).zip(out);
    for (((x, weight), bias), out) in columns {
        *out = multiply_add::<FUSED>((x - mean) * factor, *weight, *bias);
    }
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

    use super::*;
    use crate::kernels::cpu_slices::{filled, floats};
    use crate::quant::uniform::laws::sample;

    /// Largest difference, relative to the largest value.
    fn difference(found: &Tensor, expected: &Tensor) -> f64 {
        let expected = expected.to_kind(Kind::Double);
        let worst = (found.to_kind(Kind::Double) - &expected).abs().max().double_value(&[]);
        worst / expected.abs().max().double_value(&[])
    }

    fn by_rows(x: &Tensor, mut operation: impl FnMut(&mut [f32])) -> Tensor {
        let columns = x.size()[x.dim() - 1] as usize;
        filled(&x.size(), |out| {
            out.copy_from_slice(floats(x)?);
            out.chunks_mut(columns).for_each(&mut operation);
            Ok(())
        })
        .unwrap()
    }

    /// Lengths around the width of the partial sums.
    const WIDTHS: [i64; 6] = [1, 7, 16, 49, 197, 384];

    #[test]
    fn gelu_is_the_exact_one() {
        let x = Tensor::linspace(-12.0, 12.0, 40_001, (Kind::Float, tch::Device::Cpu));
        let found = by_rows(&x, gelu);
        let expected = x.to_kind(Kind::Double).gelu("none");
        let worst = (found.to_kind(Kind::Double) - &expected).abs() / (x.abs() + 1.0);
        assert!(worst.max().double_value(&[]) < 3e-7, "{worst}");
        // Where a value lies in the row does not show.
        let single = by_rows(&x.view([-1, 1]), gelu);
        assert!(single.view([-1]).equal(&found));
    }

    #[test]
    fn values_are_added() {
        for width in WIDTHS {
            let (x, other) = (sample(&[1, width], 1), sample(&[1, width], 2));
            let found = by_rows(&x, |row| add(row, floats(&other).unwrap()));
            assert!(found.equal(&(&x + &other)));
        }
    }

    #[test]
    fn softmax_is_libtorchs() {
        for width in WIDTHS {
            let x = sample(&[5, width], 1) * 9.0;
            let (bias, mask) =
                (sample(&[width], 2), sample(&[width], 3).ge(0.0).to_kind(Kind::Float));
            let mask = (mask - 1.0) * 100.0;
            for scale in [1.0f32, 0.125] {
                let plain = ScoreRow { scale, bias: &[], mask: &[] };
                let full =
                    ScoreRow { scale, bias: floats(&bias).unwrap(), mask: floats(&mask).unwrap() };
                let scaled = x.to_kind(Kind::Double) * f64::from(scale);
                for (terms, scores) in [(plain, &scaled), (full, &(&scaled + &bias + &mask))] {
                    let found = by_rows(&x, |row| softmax(row, terms));
                    assert!(difference(&found, &scores.softmax(-1, Kind::Double)) < 1e-6);
                }
            }
        }
    }

    #[test]
    fn layer_norm_is_libtorchs() {
        for width in WIDTHS {
            let x = sample(&[5, width], 1) * 3.0 + 0.7;
            let (weight, bias) = (sample(&[width], 2) + 1.0, sample(&[width], 3));
            let norm = NormRow {
                weight: floats(&weight).unwrap(),
                bias: floats(&bias).unwrap(),
                eps: 1e-6,
            };
            let found = by_rows(&x, |row| {
                let x = row.to_vec();
                layer_norm(&x, norm, row);
            });
            let double = |t: &Tensor| t.to_kind(Kind::Double);
            let (weight, bias) = (double(&weight), double(&bias));
            let expected = double(&x).layer_norm([width], Some(&weight), Some(&bias), 1e-6, false);
            // A single column is all rounding: its variance is nothing.
            assert!(width == 1 || difference(&found, &expected) < 2e-6, "{width}");
        }
    }
}
