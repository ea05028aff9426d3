//! The scales of a site's two operands, searched in turns (methods/ptq4vit.md, section 5).

use tch::Tensor;

use crate::calib::kept::Tensors;
use crate::error::Result;
use crate::nn::Operand;
use crate::quant::Quantizer;
use crate::tensor::to_vec_f32;

use super::grid::{Candidates, Factors, Grid, GridShape};
use super::search::{Product, Trial};

/// What of an operand has a scale of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Parts {
    /// All of it.
    Whole,
    /// Each head of [.., heads, free, k].
    Heads,
    /// Each of so many equal groups of a weight's output rows.
    RowGroups(i64),
    /// Each output row of a weight.
    Rows,
}

impl Parts {
    fn count(self, x: &Tensor) -> i64 {
        match self {
            Self::Whole => 1,
            Self::Heads => x.size()[x.dim() - 3],
            Self::RowGroups(groups) => groups,
            Self::Rows => x.size()[0],
        }
    }

    /// A part of the operand itself.
    fn of(self, x: &Tensor, part: i64) -> Result<Tensor> {
        Ok(match self {
            Self::Whole => x.shallow_clone(),
            Self::Heads => x.f_select(-3, part)?,
            Self::RowGroups(_) | Self::Rows => {
                let rows = x.size()[0] / self.count(x);
                x.f_narrow(0, part * rows, rows)?
            }
        })
    }

    /// The part of the other operand that meets it.
    fn met_by(self, held: &Tensor, part: i64) -> Result<Tensor> {
        match self {
            Self::Whole | Self::RowGroups(_) | Self::Rows => Ok(held.shallow_clone()),
            Self::Heads => Ok(held.f_select(-3, part)?),
        }
    }

    /// What of the product a part determines.
    fn product(self, product: &Product, part: i64) -> Result<Product> {
        let of_output = |x: &Tensor| -> Result<Tensor> {
            Ok(match self {
                Self::Whole => x.shallow_clone(),
                Self::Heads => x.f_select(-3, part)?,
                Self::RowGroups(_) | Self::Rows => {
                    let rows = product.rhs.size()[0] / self.count(&product.rhs);
                    x.f_narrow(-1, part * rows, rows)?
                }
            })
        };
        let rhs = match self {
            Self::Whole => product.rhs.shallow_clone(),
            Self::Heads | Self::RowGroups(_) | Self::Rows => self.of(&product.rhs, part)?,
        };
        Ok(Product {
            lhs: self.met_by(&product.lhs, part)?,
            rhs,
            output: of_output(&product.output)?,
            importance: product.importance.as_ref().map(of_output).transpose()?,
        })
    }

    /// One scale per part as a tensor that broadcasts to the operand; a weight's are repeated per row.
    fn layout(self, scales: &[f32], x: &Tensor) -> Result<Tensor> {
        let values = Tensor::f_from_slice(scales)?.f_to_device(x.device())?;
        Ok(match self {
            Self::Whole => values,
            Self::Heads => values.f_view([1, -1, 1, 1])?,
            Self::RowGroups(_) | Self::Rows => {
                let rows = x.size()[0];
                let each = rows / self.count(x);
                values.f_repeat_interleave_self_int(each, 0, rows)?.f_view([-1, 1])?
            }
        })
    }
}

/// The scales of one operand, as far as they are known.
#[derive(Debug)]
pub(super) struct OperandFit {
    grid: Grid,
    parts: Parts,
    /// What is tried, by part.
    candidates: Vec<Candidates>,
    /// What was found, by part.
    scales: Vec<f32>,
    /// The other operand's scales at the last search: with the same ones it would find the same.
    searched_against: Option<Vec<f32>>,
}

impl OperandFit {
    /// The scales before the search.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn new(x: &Tensor, grid: Grid, parts: Parts, factors: &Factors) -> Result<Self> {
        let candidates = (0..parts.count(x))
            .map(|part| grid.candidates(&parts.of(x, part)?, factors))
            .collect::<Result<Vec<_>>>()?;
        let scales = candidates.iter().map(|candidates| candidates.initial).collect();
        Ok(Self { grid, parts, candidates, scales, searched_against: None })
    }

    /// The quantizer with the scales found so far.
    ///
    /// # Errors
    /// `InvalidArgument` when a scale is not finite; `Device` when libtorch refuses.
    pub(super) fn quantizer(&self, x: &Tensor) -> Result<Box<dyn Quantizer>> {
        self.grid.quantizer(self.parts.layout(&self.scales, x)?)
    }

    /// The scales found so far, by part.
    #[cfg(test)]
    pub(super) fn scales(&self) -> &[f32] {
        &self.scales
    }
}

/// The operands of a site that are quantized.
#[derive(Debug)]
pub(super) struct SiteFit {
    /// Of the left operand.
    pub(super) lhs: Option<OperandFit>,
    /// Of the right operand.
    pub(super) rhs: Option<OperandFit>,
}

/// In which order the operands are searched, and how often.
#[derive(Clone, Copy, Debug)]
pub(super) struct Schedule {
    /// First and second in a round.
    pub(super) order: [Operand; 2],
    /// Number of rounds.
    pub(super) rounds: i64,
}

impl SiteFit {
    /// The scales found so far, by operand: float32 [parts].
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn scales(&self) -> Result<Tensors> {
        let fits = [("lhs", &self.lhs), ("rhs", &self.rhs)].into_iter();
        let known = fits.filter_map(|(name, fit)| Some((name, fit.as_ref()?)));
        known.map(|(name, fit)| Ok((name.to_owned(), Tensor::f_from_slice(&fit.scales)?))).collect()
    }

    /// Takes over scales that [`SiteFit::scales`] gave after a search of the same site.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn set_scales(&mut self, scales: &Tensors) -> Result<()> {
        for (name, scales) in scales {
            let fit = if name == "lhs" { &mut self.lhs } else { &mut self.rhs };
            if let Some(fit) = fit {
                fit.scales = to_vec_f32(scales)?;
            }
        }
        Ok(())
    }

    /// Searches the operands as scheduled. A search whose outcome is known, because
    /// the other operand has not changed since the last one, is left out.
    ///
    /// # Errors
    /// What `stop` reports; `Device` when libtorch refuses.
    pub(super) fn search(
        &mut self,
        product: &Product,
        schedule: Schedule,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        for _ in 0..schedule.rounds {
            for moving in schedule.order {
                let (fit, other, held) = match moving {
                    Operand::Lhs => (&mut self.lhs, &self.rhs, &product.rhs),
                    Operand::Rhs => (&mut self.rhs, &self.lhs, &product.lhs),
                };
                if let Some(fit) = fit {
                    fit.search(product, &Held { moving, fit: other.as_ref(), x: held }, stop)?;
                }
            }
        }
        Ok(())
    }
}

/// The operand that is not searched at the moment.
struct Held<'a> {
    /// The operand that is.
    moving: Operand,
    fit: Option<&'a OperandFit>,
    x: &'a Tensor,
}

impl OperandFit {
    fn search(
        &mut self,
        product: &Product,
        held: &Held<'_>,
        stop: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        // As released: the split point of the scores is searched with v in float.
        let splits = matches!(self.grid.shape, GridShape::TwinSoftmax(_));
        let other = held.fit.filter(|_| !splits);
        let against = other.map(|fit| fit.scales.clone()).unwrap_or_default();
        if self.searched_against.as_ref() == Some(&against) {
            return Ok(());
        }
        let rounded = match other {
            Some(fit) => fit.quantizer(held.x)?.fake_quantize(held.x)?,
            None => held.x.shallow_clone(),
        };
        for (index, candidates) in self.candidates.iter().enumerate() {
            let part = index as i64;
            let trial = Trial {
                moving: held.moving,
                grid: self.grid,
                scales: &candidates.scales,
                held: &self.parts.met_by(&rounded, part)?,
            };
            let found = self.parts.product(product, part)?.best(&trial, stop)?;
            // Without a finite error there is nothing to choose by.
            self.scales[index] = found.map_or(candidates.initial, |best| candidates.scales[best]);
        }
        self.searched_against = Some(against);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::grid::Ratio;
    use super::super::twin_softmax::Overlap;
    use super::*;
    use crate::quant::BitWidth;
    use crate::quant::uniform::laws::sample;

    const FACTORS: Factors = Factors { low: 0.01, high: 1.2, count: 20 };

    fn fit(x: &Tensor, shape: GridShape, parts: Parts) -> OperandFit {
        let grid = Grid { shape, bits: BitWidth::new(4, "bits").unwrap() };
        OperandFit::new(x, grid, parts, &FACTORS).unwrap()
    }

    fn product(lhs: Tensor, rhs: Tensor) -> Product {
        let output = lhs.matmul(&rhs.transpose(-2, -1));
        Product { lhs, rhs, output, importance: None }
    }

    fn searched(product: &Product, mut fit: SiteFit, rounds: i64) -> SiteFit {
        let schedule = Schedule { order: [Operand::Lhs, Operand::Rhs], rounds };
        fit.search(product, schedule, &|| Ok(())).unwrap();
        fit
    }

    #[test]
    fn a_part_is_searched_as_if_it_were_alone() {
        let (q, k) = (sample(&[4, 2, 3, 5, 8], 1), sample(&[4, 2, 3, 5, 8], 2));
        let both = |q: &Tensor, k: &Tensor| SiteFit {
            lhs: Some(fit(q, GridShape::Symmetric, Parts::Heads)),
            rhs: Some(fit(k, GridShape::Symmetric, Parts::Heads)),
        };
        let all = searched(&product(q.copy(), k.copy()), both(&q, &k), 3);
        let (lhs, rhs) = (all.lhs.unwrap(), all.rhs.unwrap());
        assert_eq!(lhs.quantizer(&q).unwrap().state().tensors["scale"].size(), [1, 3, 1, 1]);
        for head in 0..3 {
            let (q, k) = (q.narrow(2, head, 1).copy(), k.narrow(2, head, 1).copy());
            let alone = searched(&product(q.copy(), k.copy()), both(&q, &k), 3);
            assert_eq!(lhs.scales()[head as usize], alone.lhs.unwrap().scales()[0]);
            assert_eq!(rhs.scales()[head as usize], alone.rhs.unwrap().scales()[0]);
        }
    }

    #[test]
    fn row_groups_of_a_weight_have_scales_repeated_per_row() {
        let (x, weight) = (sample(&[4, 7, 8], 1), sample(&[6, 8], 2));
        let product = product(x.copy(), weight.copy());
        let site =
            |parts| SiteFit { lhs: None, rhs: Some(fit(&weight, GridShape::Symmetric, parts)) };
        let grouped = searched(&product, site(Parts::RowGroups(3)), 1).rhs.unwrap();
        let single = searched(&product, site(Parts::Rows), 1).rhs.unwrap();
        assert_eq!((grouped.scales().len(), single.scales().len()), (3, 6));
        let scale = grouped.quantizer(&weight).unwrap().state().tensors["scale"].shallow_clone();
        assert_eq!(scale.size(), [6, 1]);
        assert_eq!(scale.double_value(&[2, 0]), f64::from(grouped.scales()[1]));
        // Smaller groups fit their rows better.
        let error = |fit: &OperandFit| {
            let rounded = fit.quantizer(&weight).unwrap().fake_quantize(&weight).unwrap();
            let difference = x.matmul(&rounded.tr()) - &product.output;
            difference.square().sum(tch::Kind::Double).double_value(&[])
        };
        assert!(error(&single) < error(&grouped));
    }

    #[test]
    fn what_is_skipped_would_have_found_the_same() {
        let (x, weight) = (sample(&[4, 7, 8], 1).gelu("none"), sample(&[6, 8], 2));
        let product = product(x.copy(), weight.copy());
        let start = || SiteFit {
            lhs: Some(fit(&x, GridShape::TwinGelu(Ratio::Free), Parts::Whole)),
            rhs: Some(fit(&weight, GridShape::Symmetric, Parts::RowGroups(1))),
        };
        let at_once = searched(&product, start(), 3);
        let mut by_hand = start();
        for _ in 0..3 {
            for fit in [&mut by_hand.lhs, &mut by_hand.rhs] {
                fit.as_mut().unwrap().searched_against = None;
            }
            by_hand = searched(&product, by_hand, 1);
        }
        assert_eq!(at_once.lhs.unwrap().scales(), by_hand.lhs.unwrap().scales());
        assert_eq!(at_once.rhs.unwrap().scales(), by_hand.rhs.unwrap().scales());
    }

    #[test]
    fn the_split_of_scores_is_searched_with_float_values() {
        let scores = (sample(&[3, 1, 2, 6, 6], 1) * 3.0).softmax(-1, tch::Kind::Float);
        let values = sample(&[3, 1, 2, 4, 6], 2);
        let product = product(scores.copy(), values.copy());
        let lhs = || Some(fit(&scores, GridShape::TwinSoftmax(Overlap::Exclusive), Parts::Whole));
        let rhs = Some(fit(&values, GridShape::Symmetric, Parts::Heads));
        let with = searched(&product, SiteFit { lhs: lhs(), rhs }, 2).lhs.unwrap();
        let without = searched(&product, SiteFit { lhs: lhs(), rhs: None }, 1).lhs.unwrap();
        assert_eq!(with.scales(), without.scales());
        assert_eq!(with.searched_against, Some(Vec::new()));
    }

    #[test]
    fn errors_beyond_float_keep_the_initial_scale() {
        let (x, weight) = (sample(&[2, 3, 4], 1) * 1e30, sample(&[2, 4], 2));
        let product = product(x.copy(), weight.copy());
        let rhs = Some(fit(&weight, GridShape::Symmetric, Parts::RowGroups(1)));
        let found = searched(&product, SiteFit { lhs: None, rhs }, 3).rhs.unwrap();
        assert_eq!(found.scales()[0], found.candidates[0].initial);
    }
}
