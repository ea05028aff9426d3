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
    Tails::new(rows, p)?.quantile_range(p)
}

/// The two sorted ends of each row: all that quantiles beyond a fraction need, for the price of a
/// partial sort.
#[derive(Debug)]
pub struct Tails {
    /// Smallest values, ascending, [n, k].
    smallest: Tensor,
    /// Largest values, descending, [n, k].
    largest: Tensor,
    /// Index of a row's last element.
    last: i64,
}

impl Tails {
    /// The ends of `rows` [n, m] up to the `p` and `1 − p` quantiles.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn new(rows: &Tensor, p: f64) -> Result<Self> {
        let last = rows.size()[1] - 1;
        let (low, high) = fractions(p);
        let below = position(low, last).ceil() as i64 + 1;
        let above = last - position(high, last).floor() as i64 + 1;
        let count = below.max(above).min(last + 1);
        let (smallest, _) = rows.f_topk(count, -1, false, true)?;
        let (largest, _) = rows.f_topk(count, -1, true, true)?;
        Ok(Self { smallest, largest, last })
    }

    /// The `p` and `1 − p` quantiles, (low, high), each [n, 1]; `p` no closer to the median than the
    /// tails reach.
    ///
    /// # Errors
    /// `Device` when the tails do not reach as far.
    pub fn quantile_range(&self, p: f64) -> Result<(Tensor, Tensor)> {
        let (low, high) = fractions(p);
        let low = self.interpolate(low, |index| Ok(self.smallest.f_narrow(1, index, 1)?))?;
        let high =
            self.interpolate(high, |index| Ok(self.largest.f_narrow(1, self.last - index, 1)?))?;
        Ok((low, high))
    }

    /// Value at a fraction of the sorted rows, the lerp running from the lower neighbour.
    fn interpolate(&self, p: f64, at: impl Fn(i64) -> Result<Tensor>) -> Result<Tensor> {
        let position = position(p, self.last);
        let below = position.floor();
        let high = at((position.ceil() as i64).min(self.last))?;
        Ok(at(below as i64)?.f_lerp(&high, position - below)?)
    }
}

/// The smaller and the larger of p and 1 − p.
fn fractions(p: f64) -> (f64, f64) {
    let low = p.min(1.0 - p);
    (low, 1.0 - low)
}

/// Largest row whose indices are exact in float32.
const MAX_FLOAT_INDEX: i64 = 1 << 24;

/// Position of a fraction among 0..=last. `torch.quantile` computes it in float32 and refuses longer
/// rows, for which released codes fall back to NumPy's float64.
fn position(p: f64, last: i64) -> f64 {
    if last < MAX_FLOAT_INDEX { f64::from((p as f32) * (last as f32)) } else { p * last as f64 }
}

/// 10·log10(Σx² / Σ(x − x̂)²) in dB; +∞ if equal.
///
/// # Errors
/// `Device` when libtorch refuses.
pub fn sqnr_db(x: &Tensor, x_hat: &Tensor) -> Result<f64> {
    let energy =
        |t: &Tensor| -> Result<f64> { Ok(t.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?) };
    let noise = energy(&x.f_sub(x_hat)?)?;
    if noise == 0.0 {
        return Ok(f64::INFINITY); // even if x is all zeros: 0/0 would be NaN
    }
    Ok(10.0 * (energy(x)? / noise).log10())
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
    fn tails_serve_every_fraction_beyond_theirs() {
        let rows = Tensor::arange(2001, (Kind::Float, tch::Device::Cpu)).flip([0]).view([1, 2001]);
        let tails = Tails::new(&rows, 0.99).unwrap();
        for (p, low, high) in [(0.99, 20.0, 1980.0), (0.999, 2.0, 1998.0), (0.99975, 0.5, 1999.5)] {
            let found = tails.quantile_range(p).unwrap();
            assert!((found.0.double_value(&[0, 0]) - low).abs() < 2e-3, "{p}");
            assert!((found.1.double_value(&[0, 0]) - high).abs() < 2e-3, "{p}");
        }
        assert!(tails.quantile_range(0.9).is_err());
    }

    #[test]
    fn sqnr_of_a_tenth_is_twenty_db() {
        let x = Tensor::from_slice(&[1.0f32, -1.0]);
        assert!((sqnr_db(&x, &(&x * 0.9)).unwrap() - 20.0).abs() < 1e-4);
        assert_eq!(sqnr_db(&x, &x).unwrap(), f64::INFINITY);
        let zeros = x.zeros_like();
        assert_eq!(sqnr_db(&zeros, &zeros).unwrap(), f64::INFINITY);
    }
}
