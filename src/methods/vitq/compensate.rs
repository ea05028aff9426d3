//! Closed-form weights for rounded inputs, and their rounding with error feedback.
//!
//! A layer gets x̂ where the float model's weight W expects x. Both centred, the weight of least
//! output error is a ridge regression towards W: W* = W + G·(H + λI)⁻¹ with H = x̂ᵀx̂/n and
//! G = W·(x − x̂)ᵀx̂/n (ERQ, ICML 2024, section 4.1). W* is then rounded column by column; each
//! column's error moves into the columns behind it by the Cholesky factor of (H + λI)⁻¹ (GPTQ,
//! arXiv 2210.17323, algorithm 1), which descends in exactly the error that W* minimizes. The bias
//! takes up the means: bias* = bias + W·mean(x) − Ŵ·mean(x̂).

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::quant::search::{MIN_SCALE, uniform_grid};
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, Quantizer};

/// Ridge strengths that are tried, as a share of the mean variance of x̂.
const RIDGES: [f64; 6] = [1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0];

/// Ridge of error feedback without a correction.
const FEEDBACK_RIDGE: f64 = 1e-2;

/// One in so many images is held out to choose the ridge.
const HOLD_OUT: i64 = 4;

/// Number of clipping factors, from 1 downwards, that are tried for a row's range.
const CLIPS: usize = 12;
/// Below all clipping factors.
const CLIP_LIMIT: f64 = 0.5;

/// A layer to fit.
#[derive(Debug)]
pub(super) struct Layer<'a> {
    /// Input before rounding, x [images, .., in].
    pub(super) input: &'a Tensor,
    /// Rounded input x̂, same shape.
    pub(super) rounded_input: &'a Tensor,
    /// Float weight W [out, in].
    pub(super) weight: &'a Tensor,
    /// Bits of the rounded weight.
    pub(super) bits: BitWidth,
}

/// How a weight is found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) correction: Correction,
    pub(super) rounding: Rounding,
}

impl Rules {
    /// A clipped grid, and nothing else.
    pub(super) const PLAIN: Self =
        Self { correction: Correction::None, rounding: Rounding::Nearest };
}

/// What is changed before rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Correction {
    /// Weight and bias.
    Ridge,
    /// Only the bias.
    Bias,
    /// Nothing.
    None,
}

/// How a weight is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rounding {
    /// Columns in turn, each error moved into the columns behind.
    Feedback,
    /// Every element to its nearest code.
    Nearest,
}

/// A fitted layer.
#[derive(Debug)]
pub(super) struct Fitted {
    /// W*, before rounding [out, in].
    pub(super) weight: Tensor,
    /// Ŵ [out, in], on the grid.
    pub(super) rounded: Tensor,
    /// What is added to the layer's bias [out]; `None` for nothing.
    pub(super) bias_change: Option<Tensor>,
    /// The grid of each row.
    pub(super) grid: Uniform,
}

/// Fits a layer.
///
/// # Errors
/// `InvalidArgument` when the input is not finite; `Device` when libtorch refuses.
pub(super) fn fit(layer: &Layer<'_>, rules: Rules) -> Result<Fitted> {
    let rows = Rows::of(layer)?;
    let moments = rows.moments()?;
    let ridge = match rules.correction {
        Correction::Ridge => rows.best_ridge(layer.weight)?,
        Correction::Bias | Correction::None => FEEDBACK_RIDGE,
    };
    let inverse = moments.inverse(ridge)?;
    let weight = match rules.correction {
        Correction::Ridge => corrected(layer.weight, &rows.rounding_error(&moments)?, &inverse)?,
        Correction::Bias | Correction::None => layer.weight.shallow_clone(),
    };
    let importance = moments.covariance.f_diagonal(0, 0, 1)?.f_to_kind(Kind::Float)?;
    let grid = clipped_grid(&weight, &importance, layer.bits)?;
    let rounded = match rules.rounding {
        Rounding::Feedback => with_feedback(&weight, &grid, &inverse, &importance)?,
        Rounding::Nearest => grid.fake_quantize(&weight)?,
    };
    let bias_change = match rules.correction {
        Correction::None => None,
        Correction::Ridge | Correction::Bias => {
            let wanted = layer.weight.f_mv(&moments.input_mean)?;
            Some(wanted.f_sub(&rounded.f_mv(&moments.rounded_mean)?)?)
        }
    };
    Ok(Fitted { weight, rounded, bias_change, grid })
}

/// Inputs as rows, those of an image together.
struct Rows {
    images: i64,
    /// x, float32 [n, in].
    input: Tensor,
    /// x̂, float32 [n, in].
    rounded: Tensor,
}

impl Rows {
    fn of(layer: &Layer<'_>) -> Result<Self> {
        let width = layer.weight.size()[1];
        Ok(Self {
            images: layer.input.size()[0],
            input: layer.input.f_reshape([-1, width])?,
            rounded: layer.rounded_input.f_reshape([-1, width])?,
        })
    }

    fn narrow(&self, first: i64, images: i64) -> Result<Self> {
        let rows = self.input.size()[0] / self.images;
        let part = |t: &Tensor| t.f_narrow(0, first * rows, images * rows);
        Ok(Self { images, input: part(&self.input)?, rounded: part(&self.rounded)? })
    }

    fn moments(&self) -> Result<Moments> {
        let mean = |t: &Tensor| t.f_mean_dim([0i64].as_slice(), false, Kind::Float);
        let (input_mean, rounded_mean) = (mean(&self.input)?, mean(&self.rounded)?);
        let rounded = self.rounded.f_sub(&rounded_mean)?;
        let covariance = mean_product(&rounded, &rounded)?;
        Ok(Moments { input_mean, rounded_mean, covariance })
    }

    /// (x − x̂)ᵀx̂/n of the centred rows, float64 [in, in].
    fn rounding_error(&self, moments: &Moments) -> Result<Tensor> {
        let rounded = self.rounded.f_sub(&moments.rounded_mean)?;
        let error = self.input.f_sub(&moments.input_mean)?.f_sub(&rounded)?;
        mean_product(&error, &rounded)
    }

    /// The ridge whose regression on most images has the least error on those held out.
    fn best_ridge(&self, weight: &Tensor) -> Result<f64> {
        let strongest = RIDGES[RIDGES.len() - 1];
        let held = self.images / HOLD_OUT;
        if held == 0 {
            return Ok(strongest);
        }
        let kept = self.narrow(0, self.images - held)?;
        let moments = kept.moments()?;
        let rounding_error = kept.rounding_error(&moments)?;
        let held = self.narrow(self.images - held, held)?;
        let input = held.input.f_sub(&moments.input_mean)?;
        let rounded = held.rounded.f_sub(&moments.rounded_mean)?;
        let wanted = input.f_matmul(&weight.f_tr()?)?;
        let mut best = (f64::INFINITY, strongest);
        for ridge in RIDGES {
            let corrected = corrected(weight, &rounding_error, &moments.inverse(ridge)?)?;
            let error = rounded.f_matmul(&corrected.f_tr()?)?.f_sub(&wanted)?;
            let error = error.f_square()?.f_sum(Kind::Double)?.f_double_value(&[])?;
            if error < best.0 {
                best = (error, ridge);
            }
        }
        Ok(best.1)
    }
}

/// Moments of a layer's rows.
struct Moments {
    /// Mean of x, float32 [in].
    input_mean: Tensor,
    /// Mean of x̂, float32 [in].
    rounded_mean: Tensor,
    /// H, float64 [in, in].
    covariance: Tensor,
}

impl Moments {
    /// (H + λ·mean(diag H)·I)⁻¹, float64.
    fn inverse(&self, ridge: f64) -> Result<Tensor> {
        let width = self.covariance.size()[0];
        let mean = self.covariance.f_trace()?.f_double_value(&[])? / width as f64;
        // Without variance there is nothing to correct, whatever the ridge.
        let strength = if mean > 0.0 { ridge * mean } else { 1.0 };
        let eye = Tensor::f_eye(width, (Kind::Double, self.covariance.device()))?;
        let damped = self.covariance.f_add(&eye.f_mul_scalar(strength)?)?;
        Ok(damped.f_linalg_cholesky(false)?.f_cholesky_inverse(false)?)
    }
}

/// aᵀb/n of rows [n, in], float64 [in, in].
fn mean_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let rows = a.size()[0] as f64;
    Ok(a.f_tr()?.f_matmul(b)?.f_to_kind(Kind::Double)?.f_div_scalar(rows)?)
}

/// W*, from [`Rows::rounding_error`] and [`Moments::inverse`].
fn corrected(weight: &Tensor, rounding_error: &Tensor, inverse: &Tensor) -> Result<Tensor> {
    let change = rounding_error.f_matmul(inverse)?.f_to_kind(Kind::Float)?; // [in, in]
    Ok(weight.f_add(&weight.f_matmul(&change)?)?)
}

/// For each row the clipped range of least squared error, columns counted by `importance` [in].
fn clipped_grid(weight: &Tensor, importance: &Tensor, bits: BitWidth) -> Result<Uniform> {
    let full = Range::per_row(weight)?;
    let clipped = |factor: f64| -> Result<Range> {
        Ok(Range { low: full.low.f_mul_scalar(factor)?, high: full.high.f_mul_scalar(factor)? })
    };
    let mut best = clipped(1.0)?;
    let mut least = full.low.f_full_like(f64::INFINITY)?.f_to_kind(Kind::Double)?;
    for step in 0..CLIPS {
        let range = clipped(1.0 - (1.0 - CLIP_LIMIT) * step as f64 / CLIPS as f64)?;
        let rounded = Uniform::from_range(&range, bits, MIN_SCALE)?.fake_quantize(weight)?;
        let error = rounded.f_sub(weight)?.f_square()?.f_mul(importance)?;
        let error = error.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Double)?;
        let better = error.f_lt_tensor(&least)?;
        least = error.f_where_self(&better, &least)?;
        best = Range {
            low: range.low.f_where_self(&better, &best.low)?,
            high: range.high.f_where_self(&better, &best.high)?,
        };
    }
    uniform_grid(&best, bits)
}

/// Rounds the columns in the order of falling importance; the error of each moves into the rest.
fn with_feedback(
    weight: &Tensor,
    grid: &Uniform,
    inverse: &Tensor,
    importance: &Tensor,
) -> Result<Tensor> {
    let order = importance.f_argsort_stable(true, 0, true)?;
    let back = order.f_argsort_stable(true, 0, false)?;
    let inverse = inverse.f_index_select(0, &order)?.f_index_select(1, &order)?;
    let factor = inverse.f_linalg_cholesky(true)?.f_to_kind(Kind::Float)?;
    let columns = weight.size()[1];
    // Transposed, so that a column of the weight is contiguous: [in, out].
    let work = weight.f_index_select(1, &order)?.f_tr()?.f_contiguous()?;
    let flat = |t: &Tensor| t.f_flatten(0, -1);
    let grid = Uniform::new(grid.bits(), flat(grid.scale())?, flat(grid.zero_point())?)?;
    let rounded = work.f_empty_like()?;
    for column in 0..columns {
        let value = work.f_select(0, column)?;
        let nearest = grid.fake_quantize(&value)?;
        rounded.f_select(0, column)?.f_copy_(&nearest)?;
        let behind = columns - column - 1;
        if behind == 0 {
            break;
        }
        let row = factor.f_select(0, column)?;
        let error = value.f_sub(&nearest)?.f_div_scalar(row.f_double_value(&[column])?)?;
        let shares = row.f_narrow(0, column + 1, behind)?.f_neg()?;
        // Returns another handle of the rest of `work`.
        let _updated = work.f_narrow(0, column + 1, behind)?.f_addr_(&shares, &error)?;
    }
    Ok(rounded.f_tr()?.f_index_select(1, &back)?.f_contiguous()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws::sample;
    use crate::tensor::sqnr_db;

    const FEEDBACK: Rules = Rules { correction: Correction::None, rounding: Rounding::Feedback };
    const BIAS: Rules = Rules { correction: Correction::Bias, rounding: Rounding::Nearest };
    const RIDGE: Rules = Rules { correction: Correction::Ridge, rounding: Rounding::Feedback };

    /// Inputs whose channels depend on each other [images, 20, 16], and what `bits` make of them.
    fn inputs(images: i64, seed: i64, bits: u32) -> (Tensor, Tensor) {
        let mixed = sample(&[images, 20, 6], seed).matmul(&sample(&[6, 16], 2)) + 0.4;
        let x = mixed + sample(&[images, 20, 16], seed + 1) * 0.2;
        let bits = BitWidth::new(bits, "bits").unwrap();
        let grid = Uniform::from_range(&Range::per_tensor(&x).unwrap(), bits, 1e-10).unwrap();
        let rounded = grid.fake_quantize(&x).unwrap();
        (x, rounded)
    }

    fn fitted(x: &Tensor, rounded: &Tensor, weight: &Tensor, rules: Rules) -> Fitted {
        let bits = BitWidth::new(4, "bits").unwrap();
        fit(&Layer { input: x, rounded_input: rounded, weight, bits }, rules).unwrap()
    }

    /// SQNR of the layer's output on other images than those of the fit.
    fn unseen(bits: u32, rules: Rules) -> f64 {
        let (x, rounded) = inputs(16, 3, bits);
        let weight = sample(&[12, 16], 4);
        let fitted = fitted(&x, &rounded, &weight, rules);
        let (x, rounded) = inputs(8, 50, bits);
        let output = rounded.matmul(&fitted.rounded.tr());
        let output = match &fitted.bias_change {
            Some(change) => output + change,
            None => output,
        };
        sqnr_db(&x.matmul(&weight.tr()), &output).unwrap()
    }

    #[test]
    fn feedback_lowers_the_error_on_unseen_images() {
        let (plain, feedback) = (unseen(8, Rules::PLAIN), unseen(8, FEEDBACK));
        assert!(feedback > plain + 1.0, "{feedback} {plain}");
    }

    #[test]
    fn the_correction_lowers_the_error_on_unseen_images() {
        let (plain, bias) = (unseen(3, Rules::PLAIN), unseen(3, BIAS));
        let (feedback, ridge) = (unseen(3, FEEDBACK), unseen(3, RIDGE));
        assert!(bias >= plain - 0.05, "{bias} {plain}");
        assert!(ridge > feedback + 0.3, "{ridge} {feedback}");
    }

    #[test]
    fn the_mean_output_is_right_on_the_calibration_images() {
        let (x, rounded) = inputs(8, 3, 3);
        let weight = sample(&[12, 16], 4);
        let found = fitted(&x, &rounded, &weight, RIDGE);
        let mean = |t: &Tensor| t.reshape([-1, 12]).mean_dim([0i64].as_slice(), false, Kind::Float);
        let output = rounded.matmul(&found.rounded.tr()) + found.bias_change.unwrap();
        let (found, expected) = (mean(&output), mean(&x.matmul(&weight.tr())));
        assert!(found.allclose(&expected, 1e-4, 1e-4, false));
    }

    #[test]
    fn the_rounded_weight_lies_on_its_grid() {
        let (x, rounded) = inputs(8, 3, 3);
        for rules in [Rules::PLAIN, FEEDBACK, RIDGE] {
            let found = fitted(&x, &rounded, &sample(&[12, 16], 4), rules);
            assert!(found.grid.fake_quantize(&found.rounded).unwrap().equal(&found.rounded));
        }
    }

    #[test]
    fn an_exact_input_needs_no_correction() {
        let (x, _) = inputs(8, 3, 3);
        let weight = sample(&[12, 16], 4);
        let found = fitted(&x, &x, &weight, RIDGE);
        assert!(found.weight.allclose(&weight, 1e-5, 1e-6, false));
    }

    #[test]
    fn inputs_without_variance_and_single_images_are_no_exception() {
        let weight = sample(&[12, 16], 4);
        for x in
            [Tensor::zeros_like(&inputs(4, 3, 3).0), Tensor::ones_like(&inputs(1, 3, 3).0) * 3.0]
        {
            let found = fitted(&x, &x, &weight, RIDGE);
            assert!(found.rounded.isfinite().all().int64_value(&[]) == 1);
            let output = x.matmul(&found.rounded.tr()) + found.bias_change.unwrap();
            assert!(output.allclose(&x.matmul(&weight.tr()), 1e-4, 1e-4, false));
        }
    }
}
