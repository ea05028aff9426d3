//! The scale search (methods/ptq4vit.md, section 5; paper, section 3.2): the candidate whose output
//! has the least error Σ (g·(O − Ô))².
//!
//! The error is a sum over images of what is never negative. So a candidate is out as soon as its
//! error on some images exceeds another's on all: the search gives what trying every candidate on
//! every image gives, for less than half of the products.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::nn::Operand;

use super::grid::Grid;

/// Parts of the images after which candidates are compared.
const CHUNKS: usize = 8;

/// Elements of the tensors of one batch of candidates: they fit a processor's cache.
const BATCH_ELEMENTS: i64 = 1 << 17;

/// A product `lhs · rhsᵀ`, its float result, and the importance of the result's elements.
#[derive(Debug)]
pub(super) struct Product {
    /// float32 [images, .., m, k].
    pub(super) lhs: Tensor,
    /// float32 [images, .., n, k], or [n, k] for all images.
    pub(super) rhs: Tensor,
    /// O = lhs · rhsᵀ, float32 [images, .., m, n].
    pub(super) output: Tensor,
    /// |g|, float32, shape of the output or one image for all; none: every element counts the same.
    pub(super) importance: Option<Tensor>,
}

/// What is tried: one operand of a product on a grid with several scales, the other held.
#[derive(Debug)]
pub(super) struct Trial<'a> {
    /// The operand that is rounded.
    pub(super) moving: Operand,
    /// Its grid.
    pub(super) grid: Grid,
    /// The scales, in order of preference among equals.
    pub(super) scales: &'a [f32],
    /// The other operand, rounded or float, in its shape in the product.
    pub(super) held: &'a Tensor,
}

impl Product {
    /// Index of the scale of least error, the first of equals; `None` if no error is finite. `stop`
    /// is asked before every part of the work.
    ///
    /// # Errors
    /// What `stop` reports; `Device` when libtorch refuses.
    pub(super) fn best(
        &self,
        trial: &Trial<'_>,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<Option<usize>> {
        let images = usize::try_from(self.output.size()[0]).unwrap_or(0);
        let chunks = images.min(CHUNKS);
        let bound = |chunk: usize| chunk * images / chunks.max(1);
        least(trial.scales.len(), chunks, &mut |alive, chunk| {
            stop()?;
            self.errors(trial, alive, bound(chunk)..bound(chunk + 1))
        })
    }

    /// Errors of some of the trial's scales on some images, in float64.
    fn errors(&self, trial: &Trial<'_>, alive: &[usize], images: Range<usize>) -> Result<Vec<f64>> {
        let part = |x: &Tensor| select_images(x, &images);
        let shared = self.lhs.dim() != self.rhs.dim();
        let (moving, held) = match trial.moving {
            Operand::Lhs if shared => (part(&self.lhs)?, trial.held.shallow_clone()),
            Operand::Rhs if shared => (self.rhs.shallow_clone(), part(trial.held)?),
            Operand::Lhs => (part(&self.lhs)?, part(trial.held)?),
            Operand::Rhs => (part(&self.rhs)?, part(trial.held)?),
        };
        let output = part(&self.output)?;
        let importance = self.importance.as_ref().map(part).transpose()?;
        // g·(Ô − O) = g·Ô + negated
        let negated = match &importance {
            Some(importance) => output.f_mul(importance)?.f_neg()?,
            None => output.f_neg()?,
        };
        let each = output.numel().max(moving.numel()).max(1) as i64;
        let batch = usize::try_from(BATCH_ELEMENTS / each).unwrap_or(1).max(1);
        let mut errors = Vec::with_capacity(alive.len());
        for alive in alive.chunks(batch) {
            let scales: Vec<f32> = alive.iter().map(|index| trial.scales[*index]).collect();
            let scales = Tensor::f_from_slice(&scales)?.f_to_device(moving.device())?;
            let scales = scales.f_view([-1, 1, 1])?;
            let rounded = trial.grid.round(&moving.f_unsqueeze(-3)?, scales)?; // [.., c, free, k]
            let outputs = products(trial.moving, &rounded, &held)?;
            // The candidates' axis: [.., c, m, n] or [.., m, c, n].
            let axis = if trial.moving == Operand::Lhs { -3 } else { -2 };
            let negated = negated.f_unsqueeze(axis)?;
            let errors_of = match &importance {
                Some(importance) => negated.f_addcmul(&outputs, &importance.f_unsqueeze(axis)?)?,
                None => outputs.f_add(&negated)?,
            };
            // A row's errors are summed in float32, rows in float64.
            let rows = errors_of.f_norm_scalaropt_dim(2, [-1i64].as_slice(), false)?;
            let rows = rows.f_to_kind(Kind::Double)?.f_square_()?.f_movedim_int(axis + 1, 0)?;
            let sums = rows.f_reshape([alive.len() as i64, -1])?;
            errors.extend(crate::tensor::to_vec_f64(&sums.f_sum_dim_intlist(-1, false, None)?)?);
        }
        Ok(errors)
    }
}

/// `lhs · rhsᵀ` with candidates of one side [.., c, free, k]: [.., c, m, n] if of the left,
/// [.., m, c, n] if of the right. The candidates' rows go through one product.
fn products(moving: Operand, candidates: &Tensor, held: &Tensor) -> Result<Tensor> {
    let shape = candidates.size();
    let (count, free) = (shape[shape.len() - 3], shape[shape.len() - 2]);
    let rows = candidates.f_flatten(-3, -2)?; // [.., c·free, k]
    match moving {
        Operand::Lhs => {
            let product = rows.f_matmul(&held.f_transpose(-2, -1)?)?;
            split(&product, -2, [count, free])
        }
        Operand::Rhs => {
            let product = held.f_matmul(&rows.f_transpose(-2, -1)?)?;
            split(&product, -1, [count, free])
        }
    }
}

fn split(x: &Tensor, axis: i64, sizes: [i64; 2]) -> Result<Tensor> {
    Ok(x.f_unflatten(axis, sizes)?)
}

/// The images of `x`; all of it if it holds one image for all.
fn select_images(x: &Tensor, images: &Range<usize>) -> Result<Tensor> {
    if x.size()[0] == 1 {
        return Ok(x.shallow_clone());
    }
    Ok(x.f_narrow(0, images.start as i64, images.len() as i64)?)
}

/// Gives the errors of some candidates on one chunk of the images.
type ChunkErrors<'a> = &'a mut dyn FnMut(&[usize], usize) -> Result<Vec<f64>>;

/// The candidate of least total error over all chunks, the first of equals; `None` if no total is
/// finite. Errors are not negative; one that is not finite counts as infinite.
fn least(candidates: usize, chunks: usize, errors: ChunkErrors<'_>) -> Result<Option<usize>> {
    let mut totals = vec![0.0; candidates];
    let mut add = |totals: &mut [f64], alive: &[usize], chunk: usize| -> Result<()> {
        for (index, error) in alive.iter().zip(errors(alive, chunk)?) {
            totals[*index] += if error.is_finite() { error } else { f64::INFINITY };
        }
        Ok(())
    };
    let mut alive: Vec<usize> = (0..candidates).collect();
    if chunks == 0 || candidates < 2 {
        return Ok(alive.first().copied());
    }
    add(&mut totals, &alive, 0)?;
    // The best so far goes ahead; its total is what the others have to stay within.
    let leader = first_least(&totals, &alive).unwrap_or(0);
    for chunk in 1..chunks {
        add(&mut totals, &[leader], chunk)?;
    }
    alive.retain(|index| *index != leader);
    for chunk in 1..chunks {
        alive.retain(|index| totals[*index] <= totals[leader]);
        if alive.is_empty() {
            break;
        }
        add(&mut totals, &alive, chunk)?;
    }
    alive.push(leader);
    alive.sort_unstable();
    Ok(first_least(&totals, &alive))
}

/// The first index of the least finite total.
fn first_least(totals: &[f64], alive: &[usize]) -> Option<usize> {
    let finite = alive.iter().copied().filter(|index| totals[*index].is_finite());
    finite.min_by(|a, b| totals[*a].total_cmp(&totals[*b]).then(a.cmp(b)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::grid::{Factors, GridShape, Ratio};
    use super::super::twin_softmax::Overlap;
    use super::*;
    use crate::quant::BitWidth;
    use crate::quant::uniform::laws::sample;

    /// What the search has to find, and the number of errors it asked for.
    fn search(table: &[Vec<f64>]) -> (Option<usize>, usize) {
        let mut asked = 0;
        let found = least(table.len(), table[0].len(), &mut |alive, chunk| {
            asked += alive.len();
            Ok(alive.iter().map(|index| table[*index][chunk]).collect())
        });
        (found.unwrap(), asked)
    }

    proptest! {
        #[test]
        fn dropping_candidates_changes_nothing(
            table in (1usize..6).prop_flat_map(|chunks| {
                // Few values, so that there are ties.
                prop::collection::vec(prop::collection::vec(0u8..4, chunks), 1..12)
            })
        ) {
            let table: Vec<Vec<f64>> =
                table.iter().map(|row| row.iter().map(|e| f64::from(*e)).collect()).collect();
            let totals: Vec<f64> = table.iter().map(|row| row.iter().sum()).collect();
            let least = totals.iter().copied().fold(f64::INFINITY, f64::min);
            let expected = totals.iter().position(|total| *total == least);
            prop_assert_eq!(search(&table).0, expected);
        }
    }

    #[test]
    fn a_hopeless_candidate_is_tried_on_one_chunk() {
        let table = vec![vec![9.0; 8], vec![1.0; 8], vec![1.5; 8]];
        // 3 on the first chunk, 7 more of the leader, 5 more of the third: then it has 9 > 8.
        assert_eq!(search(&table), (Some(1), 3 + 7 + 5));
    }

    #[test]
    fn errors_that_are_not_finite_lose() {
        assert_eq!(search(&[vec![f64::NAN, 1.0], vec![7.0, 7.0]]).0, Some(1));
        assert_eq!(search(&[vec![7.0, f64::INFINITY], vec![8.0, 8.0]]).0, Some(1));
        assert_eq!(search(&[vec![f64::NAN], vec![f64::INFINITY]]).0, None);
    }

    fn product(shared: bool, importance: bool) -> Product {
        let lhs = sample(&[5, 6, 8], 1);
        let rhs = if shared { sample(&[4, 8], 2) } else { sample(&[5, 4, 8], 2) };
        let output = lhs.matmul(&rhs.transpose(-2, -1));
        let importance = importance.then(|| sample(&[5, 6, 4], 3).abs());
        Product { lhs, rhs, output, importance }
    }

    /// The error of one candidate, computed plainly.
    fn plain_error(product: &Product, trial: &Trial<'_>, scale: f32) -> f64 {
        let quantizer = trial.grid.quantizer(Tensor::from_slice(&[scale])).unwrap();
        let round = |x: &Tensor| quantizer.fake_quantize(x).unwrap();
        let (lhs, rhs) = match trial.moving {
            Operand::Lhs => (round(&product.lhs), trial.held.shallow_clone()),
            Operand::Rhs => (trial.held.shallow_clone(), round(&product.rhs)),
        };
        let difference = lhs.matmul(&rhs.transpose(-2, -1)) - &product.output;
        let weighted = match &product.importance {
            Some(importance) => difference * importance,
            None => difference,
        };
        weighted.square().sum(Kind::Double).double_value(&[])
    }

    #[test]
    fn errors_are_those_of_one_candidate_at_a_time() {
        let factors = Factors { low: 0.01, high: 1.2, count: 100 };
        let shapes = [
            GridShape::Symmetric,
            GridShape::TwinGelu(Ratio::Free),
            GridShape::TwinSoftmax(Overlap::Released),
        ];
        for shape in shapes {
            for (shared, importance) in [(false, false), (true, true), (false, true)] {
                let product = product(shared, importance);
                for moving in [Operand::Lhs, Operand::Rhs] {
                    let (x, held) = match moving {
                        Operand::Lhs => (&product.lhs, &product.rhs),
                        Operand::Rhs => (&product.rhs, &product.lhs),
                    };
                    let grid = Grid { shape, bits: BitWidth::new(4, "bits").unwrap() };
                    let scales = grid.candidates(x, &factors).unwrap().scales;
                    let trial = Trial { moving, grid, scales: &scales, held };
                    let all: Vec<usize> = (0..scales.len()).collect();
                    let found = product.errors(&trial, &all, 0..5).unwrap();
                    let expected: Vec<f64> =
                        scales.iter().map(|s| plain_error(&product, &trial, *s)).collect();
                    for (found, expected) in found.iter().zip(&expected) {
                        assert!((found - expected).abs() <= 1e-5 * expected, "{shape:?}");
                    }
                    let best = product.best(&trial, &|| Ok(())).unwrap().unwrap();
                    let least = expected.iter().copied().fold(f64::INFINITY, f64::min);
                    assert!(expected[best] <= least * (1.0 + 1e-6), "{shape:?} {moving:?}");
                    // Parts of the images add up, whatever their sizes.
                    let mut parts = vec![0.0; scales.len()];
                    for images in [0..1, 1..4, 4..5] {
                        for (sum, error) in
                            parts.iter_mut().zip(product.errors(&trial, &all, images).unwrap())
                        {
                            *sum += error;
                        }
                    }
                    for (parts, found) in parts.iter().zip(&found) {
                        assert!((parts - found).abs() <= 1e-6 * found);
                    }
                }
            }
        }
    }

    #[test]
    fn stopping_stops() {
        let product = product(true, false);
        let grid = Grid { shape: GridShape::Symmetric, bits: BitWidth::EIGHT };
        let held = product.lhs.shallow_clone();
        let trial = Trial { moving: Operand::Rhs, grid, scales: &[0.1, 0.2], held: &held };
        let stopped = product.best(&trial, &|| Err(crate::Error::Cancelled));
        assert!(matches!(stopped, Err(crate::Error::Cancelled)));
    }
}
