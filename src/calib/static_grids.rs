//! Static percentile grids with folded LayerNorm outputs: what RepQ-ViT, I&S-ViT and DopQ-ViT share.
//!
//! Activations and weights get the best of a few percentile ranges. The outputs of some LayerNorms
//! are calibrated per channel and then folded: the LayerNorm and the layer behind it are rewritten so
//! that one grid per tensor gives the codes of the channel grids ([`reparam`]). A [`Recipe`] is what
//! the methods choose differently; they call the steps in their own order.
//!
//! [`reparam`]: crate::calib::reparam

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use tch::Tensor;

use crate::calib::capture::{LazyCalibration, QuantizerSource};
use crate::calib::reparam::{ChannelGrids, CommonGrid, fold, is_foldable};
use crate::calib::report::{Seen, SiteLog};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::model::Model;
use crate::nn::{Operand, Role, Site, SiteId, WeightEdits, Weights};
use crate::quant::search::{uniform_grid, uniform_range};
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, QuantPlan, Quantizer};

/// Makes the quantizer of attention scores [images · windows, heads, t, t].
pub type ScoreQuantizer<'r> = dyn Fn(&Tensor, BitWidth) -> Result<Box<dyn Quantizer>> + 'r;

/// What methods of this kind choose.
pub struct Recipe<'r> {
    /// Percentiles tried for activations, in this order; the first of equals wins.
    pub activation_percentiles: &'static [f64],
    /// Percentiles tried for each output channel of a weight.
    pub weight_percentiles: &'static [f64],
    /// Bits of the pixels where the stem is quantized; `None` leaves them float.
    pub pixel_bits: Option<BitWidth>,
    /// Layers whose input is folded, if a LayerNorm feeds it.
    pub folded: &'static [Role],
    /// The grid of a folded input.
    pub common_grid: CommonGrid,
    /// Attention scores.
    pub scores: &'r ScoreQuantizer<'r>,
}

impl fmt::Debug for Recipe<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Recipe")
            .field("folded", &self.folded)
            .field("common_grid", &self.common_grid)
            .finish_non_exhaustive()
    }
}

impl Recipe<'_> {
    fn folds(&self, site: &Site) -> bool {
        is_foldable(site) && self.folded.contains(&site.role)
    }

    /// A grid for the whole tensor, parameters of shape `[1]`.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub fn per_tensor(&self, x: &Tensor, bits: BitWidth) -> Result<Uniform> {
        let range = uniform_range(&x.f_reshape([1, -1])?, self.activation_percentiles, bits)?;
        let flat = Range { low: range.low.f_view([1])?, high: range.high.f_view([1])? };
        uniform_grid(&flat, bits)
    }

    /// A grid per index of the last axis.
    ///
    /// # Errors
    /// As [`Recipe::per_tensor`].
    pub fn per_channel(&self, x: &Tensor, bits: BitWidth) -> Result<ChannelGrids> {
        let channels = x.size().last().copied().unwrap_or(1);
        let rows = x.f_reshape([-1, channels])?.f_tr()?.f_contiguous()?; // [channels, tokens]
        let range = uniform_range(&rows, self.activation_percentiles, bits)?;
        let flat = Range { low: range.low.f_view([-1])?, high: range.high.f_view([-1])? };
        ChannelGrids::from_range(&flat, bits)
    }

    /// A grid per row of a weight [out, in], parameters of shape [out, 1].
    ///
    /// # Errors
    /// As [`Recipe::per_tensor`].
    pub fn per_row(&self, weight: &Tensor, bits: BitWidth) -> Result<Uniform> {
        uniform_grid(&uniform_range(weight, self.weight_percentiles, bits)?, bits)
    }
}

/// Which operands the calibration forward quantizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// Activations and weights.
    All,
    /// Activations; weights stay float until [`StaticGrids::fit_weights`].
    Activations,
}

/// The plan of a model, as far as it is known.
pub struct StaticGrids<'t, 'p> {
    /// What has been found.
    pub plan: QuantPlan,
    /// The log of it.
    pub log: SiteLog<'t, 'p>,
    recipe: &'t Recipe<'t>,
    sites: Vec<Arc<Site>>,
    /// Channel grids of the inputs that are not folded yet.
    channels: BTreeMap<SiteId, ChannelGrids>,
    /// Sites whose weight has been rewritten since it was fitted.
    rewritten: BTreeSet<SiteId>,
}

/// The closed form, without learning: every quantizer is fitted in one forward of all images, then
/// LayerNorms are folded and the rewritten weights are fitted again (methods/repq-vit.md, section 4).
///
/// # Errors
/// `Cancelled` when the task was asked to stop; `InvalidArgument` when an activation is not finite;
/// `Device` when libtorch refuses.
pub fn closed_form(task: &CalibrationTask<'_>, recipe: &Recipe<'_>) -> Result<Quantization> {
    let model = task.model()?;
    let mut grids = StaticGrids::new(task, recipe, &model);
    grids.calibrate(&model, &task.images, Operands::All)?;
    let edits = grids.fold(&task.weights)?;
    grids.fit_weights(&task.weights.with(&edits))?;
    Ok(grids.finish(edits))
}

impl<'t, 'p> StaticGrids<'t, 'p> {
    /// An empty plan of `model`.
    pub fn new(task: &'t CalibrationTask<'p>, recipe: &'t Recipe<'t>, model: &Model) -> Self {
        Self {
            plan: QuantPlan::default(),
            log: SiteLog::new(task, "calibrate", model.units.len()),
            recipe,
            sites: model.sites.clone(),
            channels: BTreeMap::new(),
            rewritten: BTreeSet::new(),
        }
    }

    /// Fits quantizers in one forward of `images`, each on already quantized upstream activations.
    ///
    /// # Errors
    /// As [`closed_form`].
    pub fn calibrate(&mut self, model: &Model, images: &Tensor, operands: Operands) -> Result<()> {
        let mut source = Source { grids: self, operands };
        let mut executor = LazyCalibration::new(&mut source);
        let _logits = model.forward(&mut executor, images)?;
        self.plan = executor.plan;
        Ok(())
    }

    /// Moves the channel grids into LayerNorms and weights, and makes the inputs per tensor. The
    /// rewritten weights are to be fitted again. Next to a float weight there is no integer product
    /// that needs a common grid, so the channel grids stay and no parameter is touched.
    ///
    /// # Errors
    /// As [`fold`].
    pub fn fold(&mut self, weights: &Weights) -> Result<WeightEdits> {
        let mut edits = WeightEdits::new();
        for (id, channels) in std::mem::take(&mut self.channels) {
            let site = self.sites.iter().find(|site| site.id == id);
            let site = site.ok_or_else(|| Error::internal("channel grids without a site"))?;
            if self.log.task().weight_bits(site.role).is_none() {
                continue;
            }
            let common = channels.common(self.recipe.common_grid)?;
            edits.extend(fold(weights, site, &channels, &common)?);
            self.plan.insert(id, Operand::Lhs, Box::new(common));
            self.rewritten.insert(id);
        }
        Ok(edits)
    }

    /// Fits the weights that are not fitted yet, or were rewritten since.
    ///
    /// # Errors
    /// `Internal` when a weight is missing; `Cancelled`; `Device`.
    pub fn fit_weights(&mut self, weights: &Weights) -> Result<()> {
        let Self { plan, log, recipe, sites, rewritten, .. } = self;
        for site in sites.iter().filter(|site| !site.role.is_matmul()) {
            let fitted = plan.get(site.id, Operand::Rhs).is_some() && !rewritten.contains(&site.id);
            let Some(bits) = log.task().weight_bits(site.role).filter(|_| !fitted) else {
                continue;
            };
            let name = format!("{}.weight", site.path);
            let weight = weights
                .find(&name)
                .ok_or_else(|| Error::internal(format!("parameter {name} is missing")))?;
            let x = weight.f_flatten(1, -1)?; // the stem's kernel is [out, 3, p, p]
            let quantizer = recipe.per_row(&x, bits)?;
            let (operand, x_hat) = (Operand::Rhs, quantizer.fake_quantize(&x)?);
            log.record(&Seen { site, operand, quantizer: &quantizer, x: &x, x_hat: &x_hat })?;
            plan.insert(site.id, operand, Box::new(quantizer));
        }
        rewritten.clear();
        Ok(())
    }

    /// The method's result.
    pub fn finish(self, edits: WeightEdits) -> Quantization {
        Quantization { plan: self.plan, edits, report: self.log.finish() }
    }
}

/// Makes the quantizers of a calibration forward.
struct Source<'s, 't, 'p> {
    grids: &'s mut StaticGrids<'t, 'p>,
    operands: Operands,
}

impl QuantizerSource for Source<'_, '_, '_> {
    fn quantizer(
        &mut self,
        site: &Site,
        operand: Operand,
        x: &Tensor,
    ) -> Result<Option<Box<dyn Quantizer>>> {
        let StaticGrids { log, recipe, channels, .. } = &mut *self.grids;
        let task = log.task();
        if operand == Operand::Rhs && !site.role.is_matmul() {
            let bits = task.weight_bits(site.role).filter(|_| self.operands == Operands::All);
            return Ok(match bits {
                Some(bits) => Some(Box::new(recipe.per_row(x, bits)?)),
                None => None,
            });
        }
        let Some(bits) = task.activation_bits(site.role) else { return Ok(None) };
        if recipe.folds(site) {
            let found = recipe.per_channel(x, bits)?;
            let constant = found.constant_channels()?;
            if constant > 0 {
                log.warn(format!("{}: {constant} input channels are constant", site.path));
            }
            let (scale, zero_point) = (found.grids.scale(), found.grids.zero_point());
            let quantizer = Uniform::new(bits, scale.shallow_clone(), zero_point.shallow_clone())?;
            channels.insert(site.id, found);
            return Ok(Some(Box::new(quantizer)));
        }
        match (site.role, operand) {
            (Role::Embed, _) => match recipe.pixel_bits {
                Some(bits) => Ok(Some(Box::new(recipe.per_tensor(x, bits)?))),
                None => Ok(None),
            },
            (Role::ScoreValue, Operand::Lhs) => Ok(Some((recipe.scores)(x, bits)?)),
            _ => Ok(Some(Box::new(recipe.per_tensor(x, bits)?))),
        }
    }

    fn quantized(&mut self, seen: &Seen<'_>) -> Result<()> {
        // A weight that will be rewritten is recorded when it is fitted again.
        let rewritten =
            seen.operand == Operand::Rhs && self.grids.channels.contains_key(&seen.site.id);
        if rewritten { Ok(()) } else { self.grids.log.record(seen) }
    }
}
