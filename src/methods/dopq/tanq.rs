//! TanQ, a static tangent quantizer of attention scores (methods/dopq-vit.md, section 2; our
//! reading): with u = clamp(x/s, 0, 1) and L = 2^b − 1,
//!
//! two-sided: y = ½·(1 + tan(a·(2u − 1))/tan a);  one-sided: y = tan(a·u)/tan a;  q = round(L·y)
//!
//! x̂ is s times the inverse of y at q/L. The tangent is steep at the ends of its period, so levels are
//! dense near 0 and s (near s only, if one-sided). Values are coded by comparison with 2^b − 1
//! thresholds and decoded from a table of 2^b levels, so no tangent is computed at run time.

use std::sync::Arc;

use std::f64::consts::FRAC_PI_2;

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::kernels::cuda::{Rounded, Stairs};
use crate::kernels::passes::staircase::{Passed, Staircase, Values, values_of};
use crate::quant::dense::Dense;
use crate::quant::once::Once;
use crate::quant::{BitWidth, IntTerm, Quantizer, QuantizerState, Slope};
use crate::tensor::{Tails, to_vec_f32};

/// Kind name in artifacts.
pub(super) const KIND: &str = "tangent";

/// Clips s that are tried: these quantiles of the scores, then their maximum.
const CLIPS: [f64; 3] = [0.999, 0.9999, 0.99999];

/// Shapes a that are tried for each clip.
const SHAPES: [f64; 13] = [0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.45, 1.48, 1.50, 1.52, 1.54, 1.55];

/// Smallest clip: scores of zero have none of their own.
const MIN_CLIP: f64 = 1e-12;

/// Where levels are dense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ends {
    /// Near 0 and near s.
    Both,
    /// Near s.
    Upper,
}

/// A tangent grid.
#[derive(Debug)]
pub(super) struct Tangent {
    bits: BitWidth,
    curve: Curve,
    /// 2^b levels, ascending, float32.
    levels: Tensor,
    /// 2^b − 1 thresholds, ascending, float32; a value at a threshold belongs above it.
    thresholds: Tensor,
    stairs: Arc<Once<(Staircase, Values)>>,
}

/// The smooth map between scores and codes.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Curve {
    ends: Ends,
    /// a, in (0, π/2).
    shape: f64,
    /// s.
    clip: f64,
}

impl Curve {
    /// x at which the code is `code` (a fraction between codes).
    fn value(self, code: f64, last_code: f64) -> f64 {
        let Self { ends, shape, clip } = self;
        let y = code / last_code;
        let u = match ends {
            Ends::Both => 0.5 * (1.0 + (shape.tan() * (2.0 * y - 1.0)).atan() / shape),
            Ends::Upper => (shape.tan() * y).atan() / shape,
        };
        clip * u
    }

    /// Ascending levels and thresholds of 2^b codes.
    fn table(self, bits: BitWidth) -> (Vec<f64>, Vec<f64>) {
        let last = bits.max_code();
        let levels: Vec<f64> =
            (0..=last as u32).map(|code| self.value(f64::from(code), last)).collect();
        let between = 0..levels.len() - 1;
        let thresholds = between.map(|code| self.value(code as f64 + 0.5, last)).collect();
        (levels, thresholds)
    }

    /// cos² of the tangent's angle at x: the reciprocal slope of y, up to a constant.
    fn flatness(self, x: &Tensor) -> Result<Tensor> {
        let Self { ends, shape, clip } = self;
        let angle = match ends {
            Ends::Both => x.f_mul_scalar(2.0 * shape / clip)?.f_sub_scalar(shape)?,
            Ends::Upper => x.f_mul_scalar(shape / clip)?,
        };
        Ok(angle.f_cos()?.f_square()?)
    }
}

impl Tangent {
    /// Searches s and a for scores `x` by least squared error; the first of equals wins.
    pub(super) fn search(x: &Tensor, bits: BitWidth, ends: Ends) -> Result<Self> {
        let rows = x.f_reshape([1, -1])?;
        let tails = Tails::new(&rows, CLIPS[0])?;
        let mut clips = Vec::new();
        for clip in CLIPS {
            clips.push(tails.quantile_range(clip)?.1.f_double_value(&[0, 0])?);
        }
        clips.push(rows.f_max()?.f_double_value(&[])?);
        let sums = SortedSums::new(&rows)?;
        let mut best: Option<(f64, Curve)> = None;
        for clip in clips {
            for shape in SHAPES {
                let curve = Curve { ends, shape, clip: clip.max(MIN_CLIP) };
                let (levels, thresholds) = curve.table(bits);
                let error = sums.squared_error(&levels, &thresholds)?;
                if best.is_none_or(|(least, _)| error < least) {
                    best = Some((error, curve));
                }
            }
        }
        let (_, curve) = best.ok_or_else(|| Error::internal("no tangent grid was tried"))?;
        Self::new(bits, curve, x.device())
    }

    fn new(bits: BitWidth, curve: Curve, device: Device) -> Result<Self> {
        let (levels, thresholds) = curve.table(bits);
        let float = |values: &[f64]| -> Result<Tensor> {
            Ok(Tensor::f_from_slice(values)?.f_to_kind(Kind::Float)?.f_to(device)?)
        };
        Ok(Self {
            bits,
            curve,
            levels: float(&levels)?,
            thresholds: float(&thresholds)?,
            stairs: Arc::default(),
        })
    }

    /// Restores a stored quantizer. The stored tables count: other machines may compute other last
    /// bits.
    pub(super) fn restore(state: &QuantizerState) -> Result<Self> {
        let bits = state.read_bits()?;
        let one_sided = state.read_scalar("one_sided")? != 0.0;
        let curve = Curve {
            ends: if one_sided { Ends::Upper } else { Ends::Both },
            shape: state.read_scalar("shape")?,
            clip: state.read_scalar("clip")?,
        };
        let (levels, thresholds) = (state.read_tensor("levels")?, state.read_tensor("thresholds")?);
        let codes = bits.max_code() as i64 + 1;
        let usable = curve.shape > 0.0
            && curve.shape < FRAC_PI_2
            && curve.clip > 0.0
            && levels.size() == [codes]
            && thresholds.size() == [codes - 1];
        if !usable {
            return Err(Error::corrupt("artifact", format!("a tangent grid of {curve:?}")));
        }
        Ok(Self { bits, curve, levels, thresholds, stairs: Arc::default() })
    }
}

impl Tangent {
    /// The slope of the inverse at x̂ times that at x; 0 beyond the curve's ends.
    fn slope_between(&self, x: &Tensor, x_hat: &Tensor) -> Result<Tensor> {
        let slope = self.curve.flatness(x_hat)?.f_div(&self.curve.flatness(x)?)?;
        let inside = x.f_ge(0.0)?.f_logical_and(&x.f_le(self.curve.clip)?)?;
        Ok(slope.f_where_self(&inside, &slope.f_zeros_like()?)?)
    }

    /// The tables for a pass.
    fn stairs(&self) -> Option<&(Staircase, Values)> {
        self.stairs.get(|| {
            let stairs = Staircase::new(to_vec_f32(&self.thresholds)?, Passed::NotBelow);
            let values = values_of(&to_vec_f32(&self.levels)?);
            Ok(stairs.map(|stairs| (stairs, values)))
        })
    }
}

impl Quantizer for Tangent {
    fn bits(&self) -> BitWidth {
        self.bits
    }

    fn fake_quantize_in_a_pass(&self, x: &Tensor) -> Result<Option<Tensor>> {
        Dense::climb(x, self.stairs())
    }

    fn fake_quantize_by_tensors(&self, x: &Tensor) -> Result<Tensor> {
        let source = x.f_detach()?.f_contiguous()?;
        let codes = source.f_bucketize(&self.thresholds, true, true)?.f_view([-1])?;
        let value = self.levels.f_index_select(0, &codes)?.f_view_as(&source)?;
        if !x.requires_grad() {
            return Ok(value);
        }
        let linear = x.f_mul(&self.slope_between(&source, &value)?)?;
        Ok(value.f_add(&linear.f_sub(&linear.f_detach()?)?)?)
    }

    fn slope(&self, x: &Tensor, x_hat: &Tensor) -> Result<Option<Slope>> {
        Ok(Some(Slope::Each(self.slope_between(x, x_hat)?)))
    }

    fn on_gpu(&self, x: &Tensor) -> Result<Option<Rounded<'static>>> {
        let Some((stairs, values)) = self.stairs() else { return Ok(None) };
        Rounded::stairs(x, &Stairs { stairs, values, relative: None, planes: Vec::new() })
    }

    /// None: the levels lie on no common integer grid.
    fn quantize(&self, _x: &Tensor) -> Result<Option<Vec<IntTerm>>> {
        Ok(None)
    }

    fn state(&self) -> QuantizerState {
        let one_sided = f64::from(u8::from(self.curve.ends == Ends::Upper));
        QuantizerState::new(KIND, self.bits)
            .scalar("one_sided", one_sided)
            .scalar("shape", self.curve.shape)
            .scalar("clip", self.curve.clip)
            .tensor("levels", &self.levels)
            .tensor("thresholds", &self.thresholds)
    }
}

/// Sorted values with running sums: the squared error of any table costs a few look-ups.
struct SortedSums {
    /// Ascending, float64.
    values: Tensor,
    /// Sums of the first 0..=n values, float64.
    sums: Tensor,
    /// Sums of their squares, float64.
    squares: Tensor,
}

impl SortedSums {
    /// Sorts `rows` [1, n].
    fn new(rows: &Tensor) -> Result<Self> {
        let (values, _) = rows.f_view([-1])?.f_sort(0, false)?;
        let values = values.f_to_kind(Kind::Double)?;
        let running = |x: &Tensor| -> Result<Tensor> {
            Ok(x.f_cumsum(0, Kind::Double)?.f_constant_pad_nd([1, 0])?)
        };
        let (sums, squares) = (running(&values)?, running(&values.f_square()?)?);
        Ok(Self { values, sums, squares })
    }

    /// Σ(x − level)² with the level that the thresholds give each value.
    fn squared_error(&self, levels: &[f64], thresholds: &[f64]) -> Result<f64> {
        let device = self.values.device();
        let thresholds = Tensor::f_from_slice(thresholds)?.f_to(device)?;
        let below = thresholds.f_bucketize(&self.values, false, false)?; // values < threshold
        let at = |running: &Tensor| -> Result<Tensor> {
            let inner = running.f_index_select(0, &below)?;
            let ends = [running.f_narrow(0, 0, 1)?, inner, running.f_narrow(0, -1, 1)?];
            Ok(Tensor::f_cat(&ends, 0)?.f_diff::<Tensor>(1, 0, None, None)?)
        };
        let count = Tensor::f_arange(self.sums.size()[0], (Kind::Double, device))?;
        let levels = Tensor::f_from_slice(levels)?.f_to(device)?;
        // Σx² − 2·l·Σx + l²·n, per level.
        let error = at(&self.squares)?
            .f_sub(&at(&self.sums)?.f_mul(&levels)?.f_mul_scalar(2.0)?)?
            .f_add(&at(&count)?.f_mul(&levels.f_square()?)?)?;
        Ok(error.f_sum(Kind::Double)?.f_double_value(&[])?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::uniform::laws;
    use crate::tensor::{to_vec_f32, to_vec_f64};

    const BOTH: [Ends; 2] = [Ends::Both, Ends::Upper];

    fn width(bits: u32) -> BitWidth {
        BitWidth::new(bits, "bits").unwrap()
    }

    fn scores() -> Tensor {
        (laws::sample(&[2, 3, 7, 7], 5) * 12.0).softmax(-1, Kind::Float)
    }

    fn grid(bits: u32, ends: Ends) -> Tangent {
        Tangent::new(width(bits), Curve { ends, shape: 1.4, clip: 0.9 }, Device::Cpu).unwrap()
    }

    #[test]
    fn a_pass_gives_the_same_bits() {
        for ends in BOTH {
            for bits in [3, 4, 6, 8] {
                let q = grid(bits, ends);
                assert!(q.stairs().is_some());
                let x = Tensor::cat(&[&q.thresholds, &q.levels], 0);
                let (found, expected) = (q.fake_quantize(&x), q.fake_quantize_by_tensors(&x));
                assert!(found.unwrap().equal(&expected.unwrap()));
                for shape in [&[1i64, 1][..], &[2, 3, 7, 7], &[1, 3, 197, 197]] {
                    let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                    laws::pass_is_exact(shape, |x| q.fake_quantize(x), definition);
                }
            }
        }
    }

    #[test]
    fn laws_hold() {
        let x = scores();
        for bits in 3..=8 {
            for ends in BOTH {
                let found = Tangent::search(&x, width(bits), ends).unwrap();
                laws::images_are_independent(&found, &x, 1);
                laws::state_round_trips(&found, &x);
                let once = found.fake_quantize(&x).unwrap();
                assert!(found.fake_quantize(&once).unwrap().equal(&once), "idempotent");
                assert!(found.quantize(&x).unwrap().is_none());
            }
        }
    }

    /// The tables give what the formulas give.
    #[test]
    fn values_are_those_of_the_tangent() {
        let x = Tensor::linspace(-0.05, 1.0, 2101, (Kind::Float, Device::Cpu));
        for ends in BOTH {
            let grid = grid(4, ends);
            let Curve { shape: a, clip, .. } = grid.curve;
            let y = to_vec_f32(&grid.fake_quantize(&x).unwrap()).unwrap();
            assert!(y.is_sorted() && y[0] == 0.0 && y[2100] == clip as f32);
            for (x, found) in to_vec_f64(&x).unwrap().into_iter().zip(y) {
                let u = (x / clip).clamp(0.0, 1.0);
                let (code, back) = match ends {
                    Ends::Both => {
                        let code = 0.5 * (1.0 + (a * (2.0 * u - 1.0)).tan() / a.tan()) * 15.0;
                        let angle = (a.tan() * (2.0 * code.round() / 15.0 - 1.0)).atan();
                        (code, clip / 2.0 * (1.0 + angle / a))
                    }
                    Ends::Upper => {
                        let code = (a * u).tan() / a.tan() * 15.0;
                        (code, clip * (a.tan() * code.round() / 15.0).atan() / a)
                    }
                };
                let tie = (code.fract() - 0.5).abs() < 1e-3;
                assert!(tie || (f64::from(found) - back).abs() < 1e-6, "{x}: {found} {back}");
            }
        }
    }

    #[test]
    fn the_search_finds_the_least_error_of_all_candidates() {
        let x = scores();
        for ends in BOTH {
            let found = Tangent::search(&x, width(4), ends).unwrap();
            let error = |grid: &Tangent| {
                let difference = grid.fake_quantize(&x).unwrap() - &x;
                difference.square().sum(Kind::Double).double_value(&[])
            };
            let least = error(&found);
            let rows = x.reshape([1, -1]);
            let largest = x.max().double_value(&[]);
            let quantile =
                |p| crate::tensor::quantile_range(&rows, p).unwrap().1.double_value(&[0, 0]);
            for clip in [quantile(0.999), quantile(0.9999), quantile(0.99999), largest] {
                for shape in SHAPES {
                    let curve = Curve { ends, shape, clip };
                    let other = Tangent::new(width(4), curve, Device::Cpu).unwrap();
                    assert!(error(&other) >= least * (1.0 - 1e-6), "{clip} {shape}");
                }
            }
        }
    }

    /// Without its rounding the quantizer is a smooth map; its slope passes straight through.
    #[test]
    fn gradients_are_those_of_the_smooth_part() {
        for ends in BOTH {
            let grid = grid(4, ends);
            let values = [-0.01f64, 0.002, 0.1, 0.45, 0.7, 0.89, 0.95];
            let x = Tensor::from_slice(&values).to_kind(Kind::Float).set_requires_grad(true);
            let y = grid.fake_quantize(&x).unwrap();
            assert_eq!(y.detach(), grid.fake_quantize(&x.detach()).unwrap());
            y.sum(Kind::Float).backward();
            let x_hat = to_vec_f64(&y.detach()).unwrap();
            for (index, found) in to_vec_f64(&x.grad()).unwrap().into_iter().enumerate() {
                // The slope dx/dcode at x̂ over that at x, by differences of the inverse map.
                let code = |x: f64| {
                    let (mut low, mut high) = (0.0, 15.0);
                    for _ in 0..60 {
                        let middle = 0.5 * (low + high);
                        let below = grid.curve.value(middle, 15.0) < x;
                        (low, high) = if below { (middle, high) } else { (low, middle) };
                    }
                    low
                };
                let slope = |x: f64| {
                    let at = code(x);
                    (grid.curve.value(at + 1e-5, 15.0) - grid.curve.value(at - 1e-5, 15.0)) / 2e-5
                };
                let inside = (0.0..=0.9).contains(&values[index]);
                let expected =
                    if inside { slope(x_hat[index]) / slope(values[index]) } else { 0.0 };
                assert!((found - expected).abs() < 2e-3, "{}: {found} {expected}", values[index]);
            }
        }
    }

    #[test]
    fn scores_of_zero_have_a_grid() {
        let x = Tensor::zeros([1, 1, 2, 2], (Kind::Float, Device::Cpu));
        let found = Tangent::search(&x, width(3), Ends::Both).unwrap();
        assert!(found.fake_quantize(&x).unwrap().equal(&x));
    }

    #[test]
    fn a_table_of_another_length_is_corrupt() {
        let mut state = grid(4, Ends::Both).state();
        state.bits = 5;
        assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
    }
}
