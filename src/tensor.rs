//! Small tensor helpers that libtorch lacks: straight-through rounding, exact quantiles, SQNR.

use tch::{Kind, Tensor};

use crate::error::Result;

/// Rounds to the nearest integer, ties to even; the gradient passes straight through.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn round_straight_through(x: &Tensor) -> Result<Tensor> {
    let rounded = x.f_round()?;
    if x.requires_grad() { Ok(rounded.f_sub(x)?.f_detach()?.f_add(x)?) } else { Ok(rounded) }
}

/// The `p` and `1 − p` quantiles of each row of `rows` [n, m]: linear interpolation at p·(m−1) of
/// the sorted values. Returns (low, high), each [n, 1], low being the smaller fraction.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn quantile_range(rows: &Tensor, p: f64) -> Result<(Tensor, Tensor)> {
    let (sorted, _) = rows.f_sort(-1, false)?;
    let fraction = p.min(1.0 - p);
    Ok((interpolate(&sorted, fraction)?, interpolate(&sorted, 1.0 - fraction)?))
}

/// Value at fraction `p` of sorted rows, interpolated as `torch.quantile` does: the position and
/// the weight are float32, and the lerp runs from the lower neighbour.
fn interpolate(sorted: &Tensor, p: f64) -> Result<Tensor> {
    let last = sorted.size()[1] - 1;
    let position = (p as f32) * (last as f32);
    let below = position.floor();
    let low = sorted.f_narrow(1, below as i64, 1)?;
    let high = sorted.f_narrow(1, (position.ceil() as i64).min(last), 1)?;
    Ok(low.f_lerp(&high, f64::from(position - below))?)
}

/// 10·log10(Σx² / Σ(x − x̂)²) in dB; +∞ if equal.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn sqnr_db(x: &Tensor, x_hat: &Tensor) -> Result<f64> {
    let energy =
        |t: &Tensor| -> Result<f64> { Ok(t.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?) };
    Ok(10.0 * (energy(x)? / energy(&x.f_sub(x_hat)?)?).log10())
}

/// The tensor's values as f32, row-major.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn to_vec_f32(x: &Tensor) -> Result<Vec<f32>> {
    Ok(Vec::<f32>::try_from(&x.f_to_kind(Kind::Float)?.f_contiguous()?.f_flatten(0, -1)?)?)
}

/// The tensor's values as f64, row-major.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn to_vec_f64(x: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(&x.f_to_kind(Kind::Double)?.f_contiguous()?.f_flatten(0, -1)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_goes_to_even_and_gradients_pass() {
        let x = Tensor::from_slice(&[0.5f32, 1.5, 2.5, -0.5]).set_requires_grad(true);
        let y = round_straight_through(&x).unwrap();
        assert_eq!(to_vec_f32(&y.detach()).unwrap(), [0.0, 2.0, 2.0, 0.0]);
        y.sum(Kind::Float).backward();
        assert_eq!(to_vec_f32(&x.grad()).unwrap(), [1.0; 4]);
    }

    #[test]
    fn quantiles_interpolate_linearly() {
        let rows = Tensor::from_slice(&[4.0f32, 0.0, 1.0, 3.0, 2.0]).view([1, 5]);
        let (low, high) = quantile_range(&rows, 0.9).unwrap();
        assert!((low.double_value(&[0, 0]) - 0.4).abs() < 1e-6);
        assert!((high.double_value(&[0, 0]) - 3.6).abs() < 1e-6);
    }

    #[test]
    fn sqnr_of_a_tenth_is_twenty_db() {
        let x = Tensor::from_slice(&[1.0f32, -1.0]);
        assert!((sqnr_db(&x, &(&x * 0.9)).unwrap() - 20.0).abs() < 1e-4);
        assert_eq!(sqnr_db(&x, &x).unwrap(), f64::INFINITY);
    }
}
