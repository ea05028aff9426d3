//! The calibrating forward: every product is quantized when the activations that are already
//! quantized reach it, and computed with what was found.

use tch::{Kind, Tensor};

use super::compensate::{self, Fitted, Layer, Rules};
use super::equalize::{self, Channels};
use super::scores::ScoreCodebook;
use super::{Scores, Settings};
use crate::calib::reparam::{fold, is_foldable};
use crate::calib::report::{Seen, SiteLog, require_finite};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::exec::{Executor, Float};
use crate::methods::ubb::Shift;
use crate::nn::{Linear, Operand, Role, Site, WeightEdits};
use crate::quant::dynamic::DynamicToken;
use crate::quant::log2::{Log2Row, ZeroCode};
use crate::quant::uniform::Uniform;
use crate::quant::{BitWidth, QuantPlan, Quantizer};

/// Runs the calibrating forward.
///
/// # Errors
/// As [`crate::methods::Method::calibrate`].
pub(super) fn calibrate(task: &CalibrationTask<'_>, settings: Settings) -> Result<Quantization> {
    let model = task.model()?;
    let mut calibrator = Calibrator {
        log: SiteLog::new(task, "calibrate", model.units.len()),
        settings,
        plan: QuantPlan::default(),
        edits: WeightEdits::new(),
    };
    let _logits = model.forward(&mut calibrator, &task.images)?;
    let Calibrator { log, plan, edits, .. } = calibrator;
    Ok(Quantization { plan, edits, report: log.finish() })
}

struct Calibrator<'t, 'p> {
    log: SiteLog<'t, 'p>,
    settings: Settings,
    plan: QuantPlan,
    edits: WeightEdits,
}

/// A linear layer on its way to quantization, equal to the original in float.
struct Prepared {
    input: Tensor,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Executor for Calibrator<'_, '_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let site = &op.site;
        require_finite(site, Operand::Lhs, x)?;
        require_finite(site, Operand::Rhs, &op.weight)?;
        let prepared = self.equalized(op, x)?;
        let rounded_input = self.input(site, &prepared.input)?;
        let (weight, bias) = self.weight(site, &prepared, &rounded_input)?;
        Float.linear(&Linear { site: site.clone(), weight, bias }, &rounded_input)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        require_finite(site, Operand::Lhs, lhs)?;
        require_finite(site, Operand::Rhs, rhs)?;
        let Some(bits) = self.log.task().activation_bits(site.role) else {
            return Float.matmul(site, lhs, rhs);
        };
        let left = if site.role == Role::ScoreValue {
            self.scores(site, lhs, rhs, bits)?
        } else {
            self.attention(site, lhs, bits)?
        };
        let right = self.attention(site, rhs, bits)?;
        let lhs = self.accept(site, Operand::Lhs, left, lhs)?;
        let rhs = self.accept(site, Operand::Rhs, right, rhs)?;
        Float.matmul(site, &lhs, &rhs)
    }
}

impl Calibrator<'_, '_> {
    /// Takes a quantizer into the plan; gives what it makes of `x`.
    fn accept(
        &mut self,
        site: &Site,
        operand: Operand,
        quantizer: Box<dyn Quantizer>,
        x: &Tensor,
    ) -> Result<Tensor> {
        let x_hat = quantizer.fake_quantize(x)?;
        let quantizer_seen = quantizer.as_ref();
        self.log.record(&Seen { site, operand, quantizer: quantizer_seen, x, x_hat: &x_hat })?;
        self.plan.insert(site.id, operand, quantizer);
        Ok(x_hat)
    }

    /// Evens out the channels of the input, and of q and k in the output.
    fn equalized(&mut self, op: &Linear, x: &Tensor) -> Result<Prepared> {
        let site = &op.site;
        let mut layer = Prepared {
            input: x.shallow_clone(),
            weight: op.weight.shallow_clone(),
            bias: op.bias.as_ref().map(Tensor::shallow_clone),
        };
        let task = self.log.task();
        let bits = (task.weight_bits(site.role), task.activation_bits(site.role));
        // Both move ranges between operands: of no use where one of them stays float.
        let (true, (Some(weight_bits), Some(bits))) = (self.settings.equalize, bits) else {
            return Ok(layer);
        };
        if is_foldable(site) {
            self.settings.tokens.check_groups(site, x)?;
            let grid = self.settings.tokens.equal_bits(bits);
            let channels = equalize::search(x, &op.weight, weight_bits, |x| grid.fake_quantize(x))?;
            let one = channels.scale.f_narrow(0, 0, 1)?.f_ones_like()?;
            let identity = Uniform::new(bits, one.shallow_clone(), one.f_zeros_like()?)?;
            let edits = fold(&task.weights, site, &channels.grids(bits)?, &identity)?;
            layer.input = channels.apply(x)?;
            layer.weight = edits[&format!("{}.weight", site.path)].shallow_clone();
            layer.bias = Some(edits[&format!("{}.bias", site.path)].shallow_clone());
            self.edits.extend(edits);
        }
        if site.role == Role::Qkv && task.activation_bits(Role::QueryKey).is_some() {
            let outputs = x.f_linear(&op.weight, op.bias.as_ref())?;
            let Channels { scale, offset } = equalize::query_key(&outputs)?;
            let bias = match layer.bias {
                Some(bias) => bias.f_sub(&offset)?,
                None => offset.f_neg()?,
            };
            layer.weight = layer.weight.f_div(&scale.f_unsqueeze(1)?)?;
            layer.bias = Some(bias.f_div(&scale)?);
            self.edit(site, &layer.weight, layer.bias.as_ref());
        }
        Ok(layer)
    }

    fn edit(&mut self, site: &Site, weight: &Tensor, bias: Option<&Tensor>) {
        self.edits.insert(format!("{}.weight", site.path), weight.shallow_clone());
        if let Some(bias) = bias {
            self.edits.insert(format!("{}.bias", site.path), bias.shallow_clone());
        }
    }

    /// The rounded input of a linear layer.
    fn input(&mut self, site: &Site, x: &Tensor) -> Result<Tensor> {
        let task = self.log.task();
        let Some(bits) = task.activation_bits(site.role) else { return Ok(x.shallow_clone()) };
        let tokens = self.settings.tokens;
        let quantizer: Box<dyn Quantizer> = match site.role {
            // Pixels are 8-bit data.
            Role::Embed => Box::new(DynamicToken::new(BitWidth::EIGHT)),
            Role::Head => Box::new(DynamicToken::new(bits)),
            Role::Qkv | Role::Proj | Role::Fc1 | Role::Fc2 | Role::Reduction => {
                tokens.check_groups(site, x)?;
                let stop = || task.progress.check_cancelled();
                Box::new(tokens.linear(x, bits, Shift::of(site.role), &stop)?)
            }
            Role::QueryKey | Role::ScoreValue => {
                return Err(Error::internal(format!("{} is no linear layer", site.path)));
            }
        };
        self.accept(site, Operand::Lhs, quantizer, x)
    }

    /// The rounded weight of a linear layer and its bias.
    fn weight(
        &mut self,
        site: &Site,
        layer: &Prepared,
        rounded_input: &Tensor,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let Prepared { input, weight, bias } = layer;
        let bias = bias.as_ref().map(Tensor::shallow_clone);
        let Some(bits) = self.log.task().weight_bits(site.role) else {
            return Ok((weight.shallow_clone(), bias));
        };
        let fit = Layer { input, rounded_input, weight, bits };
        if site.role == Role::Embed {
            // The stem's weight is laid out otherwise in the checkpoint; it is rounded as it is.
            let grid = compensate::fit(&fit, Rules::PLAIN)?.grid;
            return Ok((self.accept(site, Operand::Rhs, Box::new(grid), weight)?, bias));
        }
        let Fitted { weight, rounded, bias_change, grid } =
            compensate::fit(&fit, self.settings.rules)?;
        let bias = match (bias, bias_change) {
            (Some(bias), Some(change)) => Some(bias.f_add(&change)?),
            (bias, change) => bias.or(change),
        };
        self.log.record(&Seen {
            site,
            operand: Operand::Rhs,
            quantizer: &grid,
            x: &weight,
            x_hat: &rounded,
        })?;
        self.plan.insert(site.id, Operand::Rhs, Box::new(grid));
        // On the grid already: rounding it again changes nothing.
        self.edit(site, &rounded, bias.as_ref());
        Ok((rounded, bias))
    }

    fn attention(&self, site: &Site, x: &Tensor, bits: BitWidth) -> Result<Box<dyn Quantizer>> {
        let (tokens, layout) = (self.settings.tokens, self.settings.layout(site));
        let task = self.log.task();
        Ok(Box::new(tokens.attention(x, bits, layout, &|| task.progress.check_cancelled())?))
    }

    fn scores(
        &self,
        site: &Site,
        scores: &Tensor,
        values: &Tensor,
        bits: BitWidth,
    ) -> Result<Box<dyn Quantizer>> {
        let row_scale = match self.settings.scores {
            Scores::Codebook(row_scale) => row_scale,
            Scores::Log2 => {
                let layout = self.settings.tokens.layout(site);
                return Ok(Box::new(Log2Row::new(bits, ZeroCode::Extra, layout)));
            }
        };
        // An error at a key counts by how far its value is from what all keys have in common.
        let common = values.f_mean_dim([-1i64].as_slice(), true, Kind::Float)?;
        let spread = values.f_sub(&common)?.f_square()?;
        let weight = spread.f_sum_dim_intlist([-2i64].as_slice(), true, Kind::Float)?;
        Ok(Box::new(ScoreCodebook::fit(scores, &weight, bits, row_scale)?))
    }
}
