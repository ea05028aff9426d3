//! RepQ-ViT: scale reparameterization (Li et al., ICCV 2023, arXiv 2212.08254).
//!
//! Closed form, no learning. LayerNorm outputs are calibrated per channel and become per tensor by a
//! rewrite of the LayerNorm and the layer behind it; attention scores are rounded to powers of √2.
//! Specification: methods/repq-vit.md. Paper and released code agree but for the common zero point,
//! a mean of integers that the code leaves fractional (option `variant`).

mod log_sqrt2;

use tch::Tensor;

use crate::calib::capture::{LazyCalibration, QuantizerSource};
use crate::calib::reparam::{ChannelGrids, fold, is_foldable};
use crate::calib::report::{Seen, SiteLog};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::{Error, Result};
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::nn::{Operand, Role, Site, SiteId, WeightEdits};
use crate::quant::log2::ZeroCode;
use crate::quant::search::{uniform_grid, uniform_range};
use crate::quant::uniform::{Range, Uniform};
use crate::quant::{BitWidth, Quantizer};

use log_sqrt2::LogSqrt2;

/// Percentiles tried for every range, in this order (the released code's constants).
const PERCENTILES: [f64; 3] = [0.999, 0.9999, 0.99999];

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "repq",
    summary: "static percentile grids, LayerNorm scales moved into the weights, log√2 scores",
    source: "RepQ-ViT, ICCV 2023, arXiv 2212.08254",
    options: OPTIONS,
    build: || Box::new(RepQ),
    restore: |state| {
        (state.kind == log_sqrt2::KIND)
            .then(|| LogSqrt2::restore(state).map(|q| Box::new(q) as Box<dyn Quantizer>))
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "variant",
        help: "common zero point of a LayerNorm's output: rounded, or fractional as released",
        kind: OptionKind::Choice(&["corrected", "released"]),
        default: "corrected",
    },
    OptionSpec {
        name: "zero_code",
        help: "softmax zero: an extra symbol (released), or the last of 2^n codes (strict n bits)",
        kind: OptionKind::Choice(&["extra", "last"]),
        default: "extra",
    },
];

#[derive(Debug)]
struct RepQ;

impl Method for RepQ {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let model = task.model()?;
        let images = task.images.shallow_clone();
        let settings = Settings::read(&task.options)?;
        let log = SiteLog::new(task, "calibrate", model.units.len());
        let mut source =
            Source { log, settings, channels: None, folded: Vec::new(), edits: WeightEdits::new() };
        let mut executor = LazyCalibration::new(&mut source);
        let _logits = model.forward(&mut executor, &images)?;
        let mut plan = executor.plan;
        for Folded { site, input, weight } in source.folded {
            plan.insert(site, Operand::Lhs, Box::new(input));
            plan.insert(site, Operand::Rhs, Box::new(weight));
        }
        Ok(Quantization { plan, edits: source.edits, report: source.log.finish() })
    }
}

/// The common zero point of a LayerNorm's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CommonZero {
    /// The rounded mean: an integer format.
    Rounded,
    /// The mean, a fraction, as the released code has it.
    Fractional,
}

/// The options, resolved.
#[derive(Clone, Copy, Debug)]
struct Settings {
    common_zero: CommonZero,
    zero_code: ZeroCode,
}

impl Settings {
    fn read(options: &MethodOptions) -> Result<Self> {
        let released = options.choice("variant")? == "released";
        let last = options.choice("zero_code")? == "last";
        Ok(Self {
            common_zero: if released { CommonZero::Fractional } else { CommonZero::Rounded },
            zero_code: if last { ZeroCode::Last } else { ZeroCode::Extra },
        })
    }

    /// δ̃ and z̃.
    fn common_grid(self, channels: &ChannelGrids) -> Result<Uniform> {
        let (scale, zero_point) = channels.mean()?;
        let zero_point = match self.common_zero {
            CommonZero::Rounded => zero_point.f_round()?,
            CommonZero::Fractional => zero_point,
        };
        Uniform::new(channels.grids.bits(), scale, zero_point)
    }
}

/// A rewritten layer's final quantizers.
struct Folded {
    site: SiteId,
    input: Uniform,
    weight: Uniform,
}

/// Makes the quantizer of each operand from already quantized upstream activations (section 4).
///
/// The forward runs with per-channel inputs and original weights, which is what every quantizer
/// downstream is fitted on. The released code then needs a second forward to refit the weights of
/// rewritten layers; a weight does not depend on activations, so here each is refitted at once.
struct Source<'t, 'p> {
    log: SiteLog<'t, 'p>,
    settings: Settings,
    /// Channel grids of the input just calibrated, until its weight is.
    channels: Option<(SiteId, ChannelGrids)>,
    folded: Vec<Folded>,
    edits: WeightEdits,
}

impl QuantizerSource for Source<'_, '_> {
    fn quantizer(
        &mut self,
        site: &Site,
        operand: Operand,
        x: &Tensor,
    ) -> Result<Option<Box<dyn Quantizer>>> {
        let task = self.log.task();
        if operand == Operand::Rhs && !site.role.is_matmul() {
            let Some(bits) = task.weight_bits(site.role) else { return Ok(None) };
            return Ok(Some(Box::new(per_row(x, bits)?)));
        }
        let Some(bits) = task.activation_bits(site.role) else { return Ok(None) };
        if is_foldable(site) {
            return Ok(Some(Box::new(self.per_channel(site, x, bits)?)));
        }
        match (site.role, operand) {
            // The released code fixes the pixels at 8 bits too.
            (Role::Embed, _) => Ok(Some(Box::new(per_tensor(x, BitWidth::EIGHT)?))),
            (Role::ScoreValue, Operand::Lhs) => {
                Ok(Some(Box::new(LogSqrt2::search(x, bits, self.settings.zero_code)?)))
            }
            _ => Ok(Some(Box::new(per_tensor(x, bits)?))),
        }
    }

    fn quantized(&mut self, seen: &Seen<'_>) -> Result<()> {
        if seen.operand == Operand::Rhs && self.rewrites(seen.site) {
            return self.rewrite(seen.site, seen.quantizer.bits());
        }
        self.log.record(seen)
    }
}

impl Source<'_, '_> {
    /// Whether channel grids move from the site's input into its weight. A float input has none to
    /// move; next to a float weight there is no integer product that needs a common grid, so the
    /// channel grids stay (the codes are the same) and the float parameters are not touched.
    fn rewrites(&self, site: &Site) -> bool {
        let task = self.log.task();
        is_foldable(site)
            && task.activation_bits(site.role).is_some()
            && task.weight_bits(site.role).is_some()
    }

    /// One grid per channel, of batch and tokens; kept for the rewrite.
    fn per_channel(&mut self, site: &Site, x: &Tensor, bits: BitWidth) -> Result<Uniform> {
        let channels = x.size().last().copied().unwrap_or(1);
        let rows = x.f_reshape([-1, channels])?.f_tr()?.f_contiguous()?; // [channels, tokens]
        let range = uniform_range(&rows, &PERCENTILES, bits)?;
        let range = Range { low: range.low.f_view([-1])?, high: range.high.f_view([-1])? };
        let channels = ChannelGrids::from_range(&range, bits)?;
        let constant = channels.constant_channels()?;
        if constant > 0 {
            self.log.warn(format!("{}: {constant} input channels are constant", site.path));
        }
        let (scale, zero_point) = (channels.grids.scale(), channels.grids.zero_point());
        let quantizer = Uniform::new(bits, scale.shallow_clone(), zero_point.shallow_clone())?;
        self.channels = Some((site.id, channels));
        Ok(quantizer)
    }

    /// Moves the channel grids of the site's input into the norm and the weight, and fits that.
    fn rewrite(&mut self, site: &Site, bits: BitWidth) -> Result<()> {
        let Some((_, channels)) = self.channels.take().filter(|(id, _)| *id == site.id) else {
            return Err(Error::internal(format!("{} has no channel grids", site.path)));
        };
        let input = self.settings.common_grid(&channels)?;
        let edits = fold(&self.log.task().weights, site, &channels, &input)?;
        let x = &edits[&format!("{}.weight", site.path)];
        let weight = per_row(x, bits)?;
        let x_hat = weight.fake_quantize(x)?;
        let operand = Operand::Rhs;
        self.log.record(&Seen { site, operand, quantizer: &weight, x, x_hat: &x_hat })?;
        self.edits.extend(edits);
        self.folded.push(Folded { site: site.id, input, weight });
        Ok(())
    }
}

/// A grid for the whole tensor, parameters of shape `[1]`.
fn per_tensor(x: &Tensor, bits: BitWidth) -> Result<Uniform> {
    let range = uniform_range(&x.f_reshape([1, -1])?, &PERCENTILES, bits)?;
    uniform_grid(&Range { low: range.low.f_view([1])?, high: range.high.f_view([1])? }, bits)
}

/// A grid per row of a weight [out, in], parameters of shape [out, 1].
fn per_row(weight: &Tensor, bits: BitWidth) -> Result<Uniform> {
    uniform_grid(&uniform_range(weight, &PERCENTILES, bits)?, bits)
}

#[cfg(test)]
mod tests;
