//! What lies between the products of a forward, in one pass each: GELU, softmax, layer norm.
//!
//! Every function works on whole rows and computes each by itself, in an order that depends on its
//! length alone: neither the batch nor the threads show in a result. The instruction set is chosen at run
//! time; AVX2 and AVX-512 give the same bits.

#![allow(unsafe_code, reason = "registers, and their loads")]

use crate::kernels::cpu::lanes::{LANES, Lanes, for_lanes, registers};

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

for_lanes!(
    /// Exact (erf) GELU of every value, in place.
    pub fn gelu, gelu_of, (values: &mut [f32])
);
for_lanes!(
    /// Adds `other` to as many values, in place.
    pub fn add, sums_of, (values: &mut [f32], other: &[f32])
);
for_lanes!(
    /// Softmax of a row of scores with what is added to it. The row is used up.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn softmax, softmax_of, (row: &mut [f32], terms: ScoreRow<'_>, out: &mut [f32])
);
for_lanes!(
    /// `out = (x − mean) / √(variance + eps) · weight + bias` of a row.
    ///
    /// # Panics
    /// When lengths differ.
    pub fn layer_norm, layer_norm_of, (x: &[f32], norm: NormRow<'_>, out: &mut [f32])
);

/// Value of a polynomial, highest coefficient first.
#[inline(always)]
unsafe fn polynomial<L: Lanes, const N: usize>(x: L, coefficients: [f32; N]) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let mut value = L::splat(coefficients[0]);
        for coefficient in &coefficients[1..] {
            value = value.multiply_add(x, L::splat(*coefficient));
        }
        value
    }
}

/// 1 / x to about 1e-7, for x from 2^−100 to 2^100. A division of 16 numbers takes as long as 30 other operations.
#[inline(always)]
unsafe fn reciprocal<L: Lanes>(x: L) -> L {
    // Taken off twice the exponent's offset, a number's bits are nearly those of its reciprocal: to a sixteenth.
    const TWICE: u32 = 0x7ef3_11c7;
    // SAFETY: the caller has the instruction set.
    unsafe {
        let minus_x = L::splat(0.0).subtract(x);
        let mut result = L::splat(f32::from_bits(TWICE)).subtract_bits(x);
        // The error e = 1 − x·result becomes e³, twice.
        for _ in 0..2 {
            let error = minus_x.multiply_add(result, L::splat(1.0));
            let change = error.multiply_add(error, error);
            result = result.multiply_add(change, result);
        }
        result
    }
}

/// erf to about 3e-7: a rational minimax approximation on −4..4, beyond which erf is ±1 in float32
/// (coefficients as in Eigen, both signs turned).
#[inline(always)]
unsafe fn erf<L: Lanes>(x: L) -> L {
    const NUMERATOR: [f32; 7] = [
        2.726_142_3e-10,
        -2.770_681_4e-8,
        2.101_024e-6,
        5.692_506_4e-5,
        7.349_906e-4,
        2.954_6e-3,
        1.609_603_3e-2,
    ];
    const DENOMINATOR: [f32; 5] =
        [1.456_607_2e-5, 2.133_740_6e-4, 1.682_827e-3, 7.373_329e-3, 1.426_473_9e-2];
    // SAFETY: the caller has the instruction set.
    unsafe {
        let x = L::splat(4.0).smaller(L::splat(-4.0).larger(x)); // NaN stays
        let square = x.multiply(x);
        let inverse = reciprocal(polynomial::<L, 5>(square, DENOMINATOR));
        x.multiply(polynomial::<L, 7>(square, NUMERATOR)).multiply(inverse)
    }
}

#[inline(always)]
unsafe fn gelu_of_register<L: Lanes>(x: L) -> L {
    // SAFETY: the caller has the instruction set.
    unsafe {
        let half = L::splat(0.5).multiply(x);
        let phi = erf(x.multiply(L::splat(std::f32::consts::FRAC_1_SQRT_2)));
        half.multiply_add(phi, half)
    }
}

#[inline(always)]
unsafe fn gelu_of<L: Lanes>(values: &mut [f32]) {
    let (whole, rest) = registers(values.len());
    let at = values.as_mut_ptr();
    // SAFETY: registers are within the values; the caller has the instruction set.
    unsafe {
        for first in (0..whole).step_by(LANES) {
            gelu_of_register(L::load(at.add(first))).store(at.add(first));
        }
        if rest > 0 {
            let last = L::load_first(at.add(whole), rest, 0.0);
            gelu_of_register(last).store_first(at.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn sums_of<L: Lanes>(values: &mut [f32], other: &[f32]) {
    let (whole, rest) = registers(values.len().min(other.len()));
    let (to, from) = (values.as_mut_ptr(), other.as_ptr());
    // SAFETY: registers are within both; the caller has the instruction set.
    unsafe {
        for first in (0..whole).step_by(LANES) {
            L::load(to.add(first)).add(L::load(from.add(first))).store(to.add(first));
        }
        if rest > 0 {
            let other = L::load_first(from.add(whole), rest, 0.0);
            let sum = L::load_first(to.add(whole), rest, 0.0).add(other);
            sum.store_first(to.add(whole), rest);
        }
    }
}

/// eˣ for x ≤ 0: x = n·ln 2 + r, a polynomial in r (Cephes' coefficients), and n in the exponent. 0 where it is
/// no normal number: processors take a hundred times as long for what becomes of the others.
#[inline(always)]
unsafe fn exp_of_negative<L: Lanes>(x: L) -> L {
    const LOWEST: f32 = -88.0; // n is −127 from here on, which leaves nothing in the exponent
    const HIGH: f32 = 0.693_359_4; // ln 2 in two parts
    const LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5·2^23: adding it leaves an integer in the last bits
    const SERIES: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    // SAFETY: the caller has the instruction set.
    unsafe {
        let x = x.larger(L::splat(LOWEST));
        let shifted = x.multiply_add(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND));
        let n = shifted.subtract(L::splat(ROUND));
        let r = n.multiply_add(L::splat(-HIGH), x);
        let r = n.multiply_add(L::splat(-LOW), r);
        let tail = polynomial::<L, 6>(r, SERIES);
        let value = tail.multiply_add(r.multiply(r), r).add(L::splat(1.0));
        value.multiply(shifted.power_of_two(ROUND))
    }
}

#[inline(always)]
unsafe fn softmax_of<L: Lanes>(row: &mut [f32], terms: ScoreRow<'_>, out: &mut [f32]) {
    let ScoreRow { scale, bias, mask } = terms;
    let len = row.len();
    assert!(out.len() == len, "length of the result");
    for added in [bias, mask] {
        assert!(added.is_empty() || added.len() == len, "length of what is added");
    }
    let (whole, rest) = registers(len);
    // Differences can be scaled as well, in a pass that there is anyway.
    let scaled_first = scale <= 0.0 || !(bias.is_empty() && mask.is_empty());
    let (early, late) = if scaled_first { (scale, 1.0) } else { (1.0, scale) };
    let (scores, to) = (row.as_mut_ptr(), out.as_mut_ptr());
    let (bias_at, mask_at) = (bias.as_ptr(), mask.as_ptr());
    // SAFETY: registers are within slices of `len`; the caller has the instruction set.
    unsafe {
        let (early, late) = (L::splat(early), L::splat(late));
        let mut largest = L::splat(f32::NEG_INFINITY);
        for first in (0..whole).step_by(LANES) {
            let mut x = L::load(scores.add(first));
            if scaled_first {
                x = x.multiply(early);
                if !bias.is_empty() {
                    x = x.add(L::load(bias_at.add(first)));
                }
                if !mask.is_empty() {
                    x = x.add(L::load(mask_at.add(first)));
                }
                x.store(scores.add(first));
            }
            largest = x.larger(largest);
        }
        let mut last = L::splat(f32::NEG_INFINITY);
        if rest > 0 {
            last = L::load_first(scores.add(whole), rest, 0.0).multiply(early);
            if !bias.is_empty() {
                last = last.add(L::load_first(bias_at.add(whole), rest, 0.0));
            }
            if !mask.is_empty() {
                last = last.add(L::load_first(mask_at.add(whole), rest, 0.0));
            }
            last = last.first(rest, f32::NEG_INFINITY);
            largest = last.larger(largest);
        }
        let largest = L::splat(largest.largest());
        let mut sums = L::splat(0.0);
        for first in (0..whole).step_by(LANES) {
            let x = L::load(scores.add(first)).subtract(largest).multiply(late);
            let x = exp_of_negative(x);
            x.store(scores.add(first));
            sums = sums.add(x);
        }
        if rest > 0 {
            // What is beyond the row is nothing.
            last = exp_of_negative(last.subtract(largest).multiply(late));
            sums = sums.add(last);
        }
        let factor = L::splat(1.0 / sums.sum());
        for first in (0..whole).step_by(LANES) {
            L::load(scores.add(first)).multiply(factor).store(to.add(first));
        }
        if rest > 0 {
            last.multiply(factor).store_first(to.add(whole), rest);
        }
    }
}

#[inline(always)]
unsafe fn layer_norm_of<L: Lanes>(x: &[f32], norm: NormRow<'_>, out: &mut [f32]) {
    let NormRow { weight, bias, eps } = norm;
    let len = x.len();
    assert!(out.len() == len && weight.len() == len && bias.len() == len, "length of the norm");
    let (whole, rest) = registers(len);
    let (from, to) = (x.as_ptr(), out.as_mut_ptr());
    let (weight, bias) = (weight.as_ptr(), bias.as_ptr());
    // SAFETY: registers are within slices of `len`; the caller has the instruction set.
    unsafe {
        let mut sums = L::splat(0.0);
        for first in (0..whole).step_by(LANES) {
            sums = sums.add(L::load(from.add(first)));
        }
        if rest > 0 {
            sums = sums.add(L::load_first(from.add(whole), rest, 0.0));
        }
        let mean = sums.sum() / len as f32;
        let (all, mut squares) = (L::splat(mean), L::splat(0.0));
        for first in (0..whole).step_by(LANES) {
            let x = L::load(from.add(first)).subtract(all);
            squares = x.multiply_add(x, squares);
        }
        if rest > 0 {
            let x = L::load_first(from.add(whole), rest, mean).subtract(all);
            squares = x.multiply_add(x, squares);
        }
        let factor = L::splat(1.0 / (squares.sum() / len as f32 + eps).sqrt());
        for first in (0..whole).step_by(LANES) {
            let x = L::load(from.add(first)).subtract(all).multiply(factor);
            let y = x.multiply_add(L::load(weight.add(first)), L::load(bias.add(first)));
            y.store(to.add(first));
        }
        if rest > 0 {
            let x = L::load_first(from.add(whole), rest, 0.0).subtract(all).multiply(factor);
            let weight = L::load_first(weight.add(whole), rest, 0.0);
            let bias = L::load_first(bias.add(whole), rest, 0.0);
            x.multiply_add(weight, bias).store_first(to.add(whole), rest);
        }
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
                    let found = by_rows(&x, |row| {
                        let mut scores = row.to_vec();
                        softmax(&mut scores, terms, row);
                    });
                    assert!(difference(&found, &scores.softmax(-1, Kind::Double)) < 1e-6);
                }
            }
        }
    }

    #[test]
    fn scores_far_below_the_largest_weigh_nothing() {
        for width in WIDTHS {
            let mut scores = vec![-100.0; width as usize];
            scores[width as usize / 2] = 3.0;
            let mut out = scores.clone();
            softmax(&mut scores, ScoreRow { scale: 1.0, bias: &[], mask: &[] }, &mut out);
            for (index, weight) in out.into_iter().enumerate() {
                assert_eq!(weight, if index == width as usize / 2 { 1.0 } else { 0.0 }, "{width}");
            }
        }
        // Down to the smallest normal number they have their weight.
        let mut out = [0.0; 2];
        softmax(&mut [0.0, -87.0], ScoreRow { scale: 1.0, bias: &[], mask: &[] }, &mut out);
        assert!((f64::from(out[1]) / (-87f64).exp() - 1.0).abs() < 1e-6);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn registers_of_both_widths_give_the_same_bits() {
        use crate::kernels::cpu::has_avx512;
        use crate::kernels::cpu::lanes::{Avx2, Avx512};

        /// Everything that is done to rows.
        unsafe fn all<L: Lanes>(x: &[f32], other: &[f32]) -> Vec<u32> {
            let mut found = [x.to_vec(), x.to_vec(), x.to_vec(), x.to_vec(), x.to_vec()];
            // SAFETY: the caller has the instruction set.
            unsafe {
                gelu_of::<L>(&mut found[0]);
                sums_of::<L>(&mut found[1], other);
                let norm = NormRow { weight: x, bias: other, eps: 1e-6 };
                layer_norm_of::<L>(other, norm, &mut found[2]);
                for (index, (bias, mask)) in
                    [(&[][..], &[][..]), (other, x)].into_iter().enumerate()
                {
                    let terms = ScoreRow { scale: 0.3, bias, mask };
                    softmax_of::<L>(&mut x.to_vec(), terms, &mut found[3 + index]);
                }
            }
            found.concat().into_iter().map(f32::to_bits).collect()
        }
        if !has_avx512() {
            return;
        }
        for width in WIDTHS {
            let (x, other) = (sample(&[width], 1) * 5.0, sample(&[width], 2));
            let (x, other) = (floats(&x).unwrap(), floats(&other).unwrap());
            // SAFETY: the processor has both.
            let (narrow, wide) = unsafe { (all::<Avx2>(x, other), all::<Avx512>(x, other)) };
            assert_eq!(narrow, wide, "{width}");
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
