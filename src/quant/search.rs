//! Static ranges by search: a few percentiles are tried, and each row keeps the one of least squared
//! error (methods/repq-vit.md, section 1).

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, Quantizer};
use crate::tensor::Tails;

/// Error that the first candidate has to beat (the released code's constant).
const FIRST_INCUMBENT: f64 = 1e10;

/// Smallest scale of a searched grid.
pub const MIN_SCALE: f64 = 1e-12;

/// For each row of `rows` [n, m], the percentile range of least mean squared error, low and high
/// [n, 1]. `reconstruct` gives x̂ [n, m] for a candidate.
///
/// A strictly smaller error wins, so the first of equals stays; NaN never wins. A row without a
/// winner gets minimum and maximum.
///
/// # Errors
/// `Device` when libtorch refuses; whatever `reconstruct` reports.
pub fn percentile_range(
    rows: &Tensor,
    percentiles: &[f64],
    reconstruct: impl Fn(&Range) -> Result<Tensor>,
) -> Result<Range> {
    let mut best = Range::per_row(rows)?;
    let mut least = best.low.f_full_like(FIRST_INCUMBENT)?.f_to_kind(Kind::Double)?;
    let innermost = percentiles.iter().copied().fold(1.0, f64::min);
    let tails = Tails::new(rows, innermost)?;
    for percentile in percentiles {
        let (low, high) = tails.quantile_range(*percentile)?;
        let range = Range { low, high };
        let difference = reconstruct(&range)?.f_sub(rows)?;
        let error = difference.f_square()?.f_mean_dim([-1i64].as_slice(), true, Kind::Double)?;
        let better = error.f_lt_tensor(&least)?;
        least = error.f_where_self(&better, &least)?;
        best = Range {
            low: range.low.f_where_self(&better, &best.low)?,
            high: range.high.f_where_self(&better, &best.high)?,
        };
    }
    Ok(best)
}

/// [`percentile_range`] for uniform grids of `bits` bits.
///
/// # Errors
/// `InvalidArgument` when a range is not finite; `Device` when libtorch refuses.
pub fn uniform_range(rows: &Tensor, percentiles: &[f64], bits: BitWidth) -> Result<Range> {
    percentile_range(rows, percentiles, |range| {
        let x_hat = Uniform::from_range(range, bits, MIN_SCALE)?.fake_quantize(rows)?;
        // A candidate without width (most values equal) divides by zero in the source: NaN.
        let wide = range.high.f_gt_tensor(&range.low)?;
        Ok(x_hat.f_where_self(&wide, &x_hat.f_full_like(f64::NAN)?)?)
    })
}

/// The grid over a searched range. A range without width (a constant row) is widened to hold zero,
/// so that the constant is the grid's other end.
///
/// # Errors
/// `InvalidArgument` when the range is not finite; `Device` when libtorch refuses.
pub fn uniform_grid(range: &Range, bits: BitWidth) -> Result<Uniform> {
    let wide = range.high.f_gt_tensor(&range.low)?;
    let widened = Range {
        low: range.low.f_where_self(&wide, &range.low.f_clamp_max(0.0)?)?,
        high: range.high.f_where_self(&wide, &range.high.f_clamp_min(0.0)?)?,
    };
    Uniform::from_range(&widened, bits, MIN_SCALE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::to_vec_f32;

    const PERCENTILES: [f64; 2] = [0.9, 1.0];

    fn four() -> BitWidth {
        BitWidth::new(4, "bits").unwrap()
    }

    #[test]
    fn each_row_keeps_its_own_best() {
        // The outlier of the first row is worth clipping at few bits, the second row has none.
        let mut values: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin()).collect();
        values.extend_from_within(..);
        values[3] = 2.5;
        let rows = Tensor::from_slice(&values).view([2, 1000]);
        let range = uniform_range(&rows, &PERCENTILES, BitWidth::new(3, "bits").unwrap()).unwrap();
        let high = to_vec_f32(&range.high).unwrap();
        assert!(high[0] < 1.0 && high[1] > 0.999, "{high:?}");
    }

    #[test]
    fn the_first_of_equals_stays() {
        let rows = Tensor::from_slice(&[0.0f32, 1.0, 2.0, 3.0, 4.0]).view([1, 5]);
        let range = percentile_range(&rows, &[0.9, 1.0], |_| Ok(rows.zeros_like())).unwrap();
        assert!((range.high.double_value(&[0, 0]) - 3.6).abs() < 1e-6);
    }

    #[test]
    fn without_a_winner_minimum_and_maximum_are_taken() {
        let rows = Tensor::from_slice(&[-1.0f32, 1.0, 2.0, 3.0, 4.0]).view([1, 5]);
        let nan = |_: &Range| Ok(rows.full_like(f64::NAN));
        let range = percentile_range(&rows, &PERCENTILES, nan).unwrap();
        assert_eq!(
            (range.low.double_value(&[0, 0]), range.high.double_value(&[0, 0])),
            (-1.0, 4.0)
        );
        // One value in a hundred is not zero: the inner percentile has no width.
        let mut sparse = vec![0.0f32; 100];
        sparse[7] = 5.0;
        let range =
            uniform_range(&Tensor::from_slice(&sparse).view([1, 100]), &PERCENTILES, four())
                .unwrap();
        assert_eq!(range.high.double_value(&[0, 0]), 5.0);
    }

    #[test]
    fn constant_rows_are_exact() {
        let rows = Tensor::from_slice(&[3.7f32, 3.7, -512.5, -512.5, 0.0, 0.0]).view([3, 2]);
        let range = uniform_range(&rows, &PERCENTILES, four()).unwrap();
        let grid = uniform_grid(&range, four()).unwrap();
        assert!(grid.fake_quantize(&rows).unwrap().allclose(&rows, 1e-6, 0.0, false));
        assert!(grid.zero_point().abs().max().double_value(&[]) <= 15.0);
    }
}
