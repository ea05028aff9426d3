//! Attention scores on a fitted codebook of 2^b levels.
//!
//! A row is divided by its largest score; the levels are integers 0..=255, so a product with the
//! codes looked up is an 8-bit integer product. The 2^b levels of least weighted squared error are
//! found exactly, by dynamic programming over a histogram. Codes are chosen relative to the row's
//! largest score; the scale of the row is then the one of least squared error for these codes.

use std::sync::Arc;

use tch::{Kind, Tensor};

use super::levels::{BINS_PER_LEVEL, TOP, best_levels};
use crate::error::{Error, Result};
use crate::kernels::Codes;
use crate::kernels::codes::recycle;
use crate::kernels::passes::affine::scale_rows;
use crate::kernels::passes::extent::of_rows;
use crate::kernels::passes::staircase::{Passed, Staircase, Values, values_of};
use crate::quant::cost::{OperandCost, SCALE_BITS, elements, rows};
use crate::quant::dense::Dense;
use crate::quant::once::Once;
use crate::quant::planes::Planes;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState};
use crate::tensor::{to_vec_f32, to_vec_f64};

/// Kind name in artifacts.
pub(super) const KIND: &str = "score_codebook";

/// What fixes the scale of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RowScale {
    /// The rounded row has the least squared error.
    LeastSquares,
    /// The largest score stays where it is.
    Largest,
}

/// A static codebook for rows relative to their largest score.
#[derive(Debug)]
pub(super) struct ScoreCodebook {
    bits: BitWidth,
    row_scale: RowScale,
    /// Ascending integers 0..=255, float32 [2^bits].
    levels: Tensor,
    /// Midpoints between levels, float32 [2^bits − 1].
    borders: Tensor,
    stairs: Arc<Once<(Staircase, Values)>>,
}

impl ScoreCodebook {
    /// Fits the levels to `scores` [b, heads, queries, keys]; an error at a key counts by `weight`
    /// [b, heads, 1, keys].
    pub(super) fn fit(
        scores: &Tensor,
        weight: &Tensor,
        bits: BitWidth,
        row_scale: RowScale,
    ) -> Result<Self> {
        let largest = scores.f_amax([-1i64].as_slice(), true)?.f_clamp_min(f64::MIN_POSITIVE)?;
        let bins = (TOP * BINS_PER_LEVEL) as f64;
        let bin = scores.f_div(&largest)?.f_mul_scalar(bins)?.f_round()?.f_clamp(0.0, bins)?;
        let mass = largest.f_square()?.f_mul(weight)?.f_expand_as(scores)?;
        let histogram = bin
            .f_to_kind(Kind::Int64)?
            .f_flatten(0, -1)?
            .f_bincount(Some(&mass.f_to_kind(Kind::Double)?.f_flatten(0, -1)?), bins as i64 + 1)?;
        let levels = best_levels(&to_vec_f64(&histogram)?, 1 << bits.get());
        Self::new(bits, row_scale, &Tensor::f_from_slice(&levels)?.f_to_device(scores.device())?)
    }

    fn new(bits: BitWidth, row_scale: RowScale, levels: &Tensor) -> Result<Self> {
        let count = levels.size()[0];
        let borders = levels
            .f_narrow(0, 0, count - 1)?
            .f_add(&levels.f_narrow(0, 1, count - 1)?)?
            .f_mul_scalar(0.5)?;
        let stairs = Arc::default();
        Ok(Self { bits, row_scale, levels: levels.shallow_clone(), borders, stairs })
    }

    /// Restores a stored quantizer.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let bits = state.read_bits()?;
        let row_scale = if state.read_scalar("least_squares")? == 0.0 {
            RowScale::Largest
        } else {
            RowScale::LeastSquares
        };
        let levels = state.read_tensor("levels")?;
        let values = to_vec_f32(&levels)?;
        let valid = levels.size() == [1i64 << bits.get()]
            && values.iter().all(|v| (0.0..=TOP as f32).contains(v) && v.fract() == 0.0)
            && values.is_sorted()
            && values.last().is_some_and(|last| *last > 0.0);
        if !valid {
            return Err(Error::corrupt("artifact", "the levels of a score codebook are unusable"));
        }
        Self::new(bits, row_scale, &levels)
    }

    /// Levels of the scores, and the scale of each row.
    fn codes(&self, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let largest = x.f_amax([-1i64].as_slice(), true)?;
        let relative = x.f_mul(&largest.f_reciprocal()?.f_mul_scalar(TOP as f64)?)?;
        let index = relative.f_contiguous()?.f_bucketize(&self.borders, false, false)?;
        let codes = self.levels.f_take(&index)?;
        let scale = match self.row_scale {
            RowScale::LeastSquares => least_squares(x, &codes)?,
            RowScale::Largest => largest.f_mul_scalar(1.0 / TOP as f64)?,
        };
        Ok((codes, scale))
    }
}

impl ScoreCodebook {
    /// Levels by comparison with the borders, in one visit; libtorch adds up what fixes the scales, in
    /// an order of its own.
    fn fake_quantize_in_passes(&self, dense: &Dense) -> Result<Option<Tensor>> {
        let Some((stairs, levels)) = self.stairs() else { return Ok(None) };
        let (width, x) = (dense.width(), dense.values()?);
        let (largest, factors) = row_factors(x, width);
        let codes = |out: &mut [f32]| stairs.map_multiples(x, &factors, levels, width, out);
        if self.row_scale == RowScale::Largest {
            let scales = largest_scales(&largest);
            return Ok(Some(dense.map(|_, out| {
                codes(out);
                scale_rows(&scales, width, out);
            })?));
        }
        let codes = dense.map(|_, out| codes(out))?;
        let scale = least_squares(dense.memory(), &codes)?;
        Ok(Some(codes.f_mul(&scale)?))
    }

    /// The tables for a pass.
    fn stairs(&self) -> Option<&(Staircase, Values)> {
        self.stairs.get(|| {
            let stairs = Staircase::new(to_vec_f32(&self.borders)?, Passed::Above);
            let levels = values_of(&to_vec_f32(&self.levels)?);
            Ok(stairs.map(|stairs| (stairs, levels)))
        })
    }
}

/// Σx·code / Σcode² of every row.
fn least_squares(x: &Tensor, codes: &Tensor) -> Result<Tensor> {
    let sum = |t: &Tensor| t.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float);
    Ok(sum(&x.f_mul(codes)?)?.f_div(&sum(&codes.f_square()?)?)?)
}

/// The largest value of every row, and the factor that makes it [`TOP`].
fn row_factors(x: &[f32], width: usize) -> (Vec<f32>, Vec<f32>) {
    let largest: Vec<f32> = of_rows(x, width).iter().map(|row| row.high).collect();
    let factors = largest.iter().map(|value| 1.0 / value * TOP as f32).collect();
    (largest, factors)
}

/// The scales that leave largest values where they are.
fn largest_scales(largest: &[f32]) -> Vec<f32> {
    largest.iter().map(|value| value * (1.0 / TOP as f64) as f32).collect()
}

impl Quantizer for ScoreCodebook {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        match Dense::in_order(x)? {
            Some(dense) => self.fake_quantize_in_passes(&dense),
            None => Ok(None),
        }
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let (codes, scale) = self.codes(&x.f_detach()?)?;
        let value = codes.f_mul(&scale)?;
        // Straight through: the codebook has no slope of its own.
        if x.requires_grad() { Ok(value.f_sub(x)?.f_detach()?.f_add(x)?) } else { Ok(value) }
    }

    fn encode_in_a_pass(&self, x: &Tensor) -> Result<Option<Codes>> {
        let (Some(dense), Some((stairs, levels))) = (Dense::rows(x)?, self.stairs()) else {
            return Ok(None);
        };
        let Some(mut planes) = Planes::of(&dense, 1, self.code_bits())? else { return Ok(None) };
        let (x, width) = (dense.values()?, dense.width());
        let (largest, factors) = row_factors(x, width);
        let counts = stairs.count_multiples(x, &factors, width);
        let scale = match self.row_scale {
            RowScale::Largest => largest_scales(&largest),
            RowScale::LeastSquares => {
                let codes = dense.map(|_, out| {
                    for (code, count) in out.iter_mut().zip(&counts) {
                        *code = levels[usize::from(*count)];
                    }
                })?;
                to_vec_f32(&least_squares(dense.memory(), &codes)?)?
            }
        };
        let code = |steps: u8| levels[usize::from(steps)] as u32;
        planes.push_steps((&counts, stairs.len()), code, scale);
        recycle(counts);
        Ok(Some(planes.finish()))
    }

    fn quantize(&self, x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        let (codes, scale) = self.codes(x)?;
        Ok(Some(vec![IntTerm {
            codes: codes.f_to_kind(Kind::Int)?,
            zero_point: scale.f_zeros_like()?.f_to_kind(Kind::Int)?,
            scale,
        }]))
    }

    /// A level is a byte, however few there are.
    fn code_bits(&self) -> u32 {
        u8::BITS
    }

    fn state(&self) -> QuantizerState {
        let least_squares = f64::from(u8::from(self.row_scale == RowScale::LeastSquares));
        QuantizerState::new(KIND, self.bits)
            .scalar("least_squares", least_squares)
            .tensor("levels", &self.levels)
    }

    fn cost(&self, shape: &[i64]) -> OperandCost {
        // One scale a row; a maximum, and for least squares two more sums.
        let passes = match self.row_scale {
            RowScale::LeastSquares => 3.0,
            RowScale::Largest => 1.0,
        };
        OperandCost {
            metadata_bits: SCALE_BITS * rows(shape),
            operations: passes * elements(shape),
            ..OperandCost::of_grid(self.bits)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;

    fn scores(shape: &[i64], seed: i64) -> Tensor {
        (laws::sample(shape, seed) * 6.0).softmax(-1, Kind::Float)
    }

    fn fitted(bits: u32, row_scale: RowScale, x: &Tensor) -> ScoreCodebook {
        let weight = x.narrow(2, 0, 1).ones_like();
        let bits = BitWidth::new(bits, "bits").unwrap();
        ScoreCodebook::fit(x, &weight, bits, row_scale).unwrap()
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for row_scale in [RowScale::LeastSquares, RowScale::Largest] {
            for bits in [3, 4, 6, 8] {
                let q = fitted(bits, row_scale, &scores(&[2, 3, 50, 50], 1));
                assert!(q.stairs().is_some());
                for shape in [[2, 3, 7, 7], [1, 3, 197, 197]] {
                    // Scores are not negative. (Beside negative values it would matter which sign
                    // libtorch gives to a largest value of zero.)
                    let definition = |x: &Tensor| q.fake_quantize_by_tensors(&x.abs());
                    laws::pass_is_exact(&shape, |x| q.fake_quantize(&x.abs()), definition);
                }
            }
        }
    }

    #[test]
    fn laws_hold() {
        let x = scores(&[3, 2, 7, 7], 5);
        for bits in 3..=8 {
            for row_scale in [RowScale::LeastSquares, RowScale::Largest] {
                let q = fitted(bits, row_scale, &x);
                laws::terms_add_up(&q, &x);
                laws::images_are_independent(&q, &x, 1);
                laws::state_round_trips(&q, &x);
            }
        }
    }

    #[test]
    fn rows_have_the_scale_they_should() {
        let x = scores(&[2, 2, 9, 9], 6);
        let wide = fitted(8, RowScale::Largest, &x).fake_quantize(&x).unwrap();
        let largest = |t: &Tensor| t.amax([-1i64].as_slice(), false);
        assert!(largest(&wide).allclose(&largest(&x), 1e-6, 0.0, false));
        // The error of least squares is orthogonal to what is scaled.
        let rounded = fitted(3, RowScale::LeastSquares, &x).fake_quantize(&x).unwrap();
        let product =
            ((&x - &rounded) * &rounded).sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
        assert!(product.abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn the_levels_are_the_best_there_are() {
        // Mass near 10 and 12, at 100, and a little at 200: three levels.
        let mut histogram = vec![0.0; TOP * BINS_PER_LEVEL + 1];
        for (position, mass) in [(10, 3.0), (12, 3.0), (100, 5.0), (200, 1.0)] {
            histogram[position * BINS_PER_LEVEL] = mass;
        }
        assert_eq!(best_levels(&histogram, 3), [11.0, 100.0, 200.0]);
        assert_eq!(best_levels(&histogram, 4), [10.0, 12.0, 100.0, 200.0]);
        // Against every pair of levels.
        let error = |levels: &[f32]| -> f64 {
            let bins = histogram.iter().enumerate();
            bins.map(|(bin, mass)| {
                let x = bin as f64 / BINS_PER_LEVEL as f64;
                let squares = levels.iter().map(|level| (x - f64::from(*level)).powi(2));
                mass * squares.fold(f64::INFINITY, f64::min)
            })
            .sum()
        };
        let found = error(&best_levels(&histogram, 2));
        for low in (0..TOP).step_by(3) {
            for high in (low + 1..=TOP).step_by(3) {
                assert!(error(&[low as f32, high as f32]) >= found - 1e-9, "{low} {high}");
            }
        }
    }

    #[test]
    fn errors_count_by_the_keys_weight() {
        // Scores of key 0 are all that counts, and they take two values of their rows' largest.
        let x = Tensor::from_slice(&[0.5f32, 1.0, 0.2, 0.3, 1.0, 0.7]).view([1, 1, 2, 3]);
        let weight = Tensor::from_slice(&[1.0f32, 0.0, 0.0]).view([1, 1, 1, 3]);
        let bits = BitWidth::new(3, "bits").unwrap();
        let q = ScoreCodebook::fit(&x, &weight, bits, RowScale::Largest).unwrap();
        let error = (q.fake_quantize(&x).unwrap() - &x).abs().select(3, 0).max();
        assert!(error.double_value(&[]) <= 0.5 / 255.0);
    }

    #[test]
    fn more_bits_are_better_than_powers_of_two() {
        let x = scores(&[2, 2, 16, 16], 7);
        let log2 = crate::quant::log2::Log2Row::new(
            BitWidth::new(4, "bits").unwrap(),
            crate::quant::log2::ZeroCode::Extra,
            crate::quant::tokens::TokenLayout::PLAIN,
        );
        let sqnr = |q: &dyn Quantizer| crate::tensor::sqnr_db(&x, &q.fake_quantize(&x).unwrap());
        let mut last = sqnr(&log2).unwrap();
        for bits in 4..=7 {
            let found = sqnr(&fitted(bits, RowScale::Largest, &x)).unwrap();
            assert!(found > last, "{bits}: {found} {last}");
            last = found;
        }
    }

    #[test]
    fn unusable_levels_are_refused() {
        let state = fitted(3, RowScale::LeastSquares, &scores(&[1, 1, 4, 4], 1)).state();
        for levels in [
            vec![0.0f32; 8],
            vec![0.0, 1.0, 2.0],
            vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.5, 7.0],
            vec![3.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 700.0],
        ] {
            let mut broken = QuantizerState::new(KIND, BitWidth::new(3, "bits").unwrap());
            broken.scalars = state.scalars.clone();
            broken.tensors.insert("levels".to_owned(), Tensor::from_slice(&levels));
            assert!(matches!(crate::methods::restore(&broken), Err(Error::CorruptArtifact { .. })));
        }
    }
}
