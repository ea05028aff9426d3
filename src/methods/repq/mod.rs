//! RepQ-ViT: scale reparameterization (Li et al., ICCV 2023, arXiv 2212.08254).
//!
//! Closed form, no learning. LayerNorm outputs are calibrated per channel and become per tensor by a
//! rewrite of the LayerNorm and the layer behind it; attention scores are rounded to powers of √2.
//! Specification: methods/repq-vit.md. Paper and released code agree but for the common zero point,
//! a mean of integers that the code leaves fractional (option `variant`).

mod log_sqrt2;

use crate::calib::reparam::CommonGrid;
use crate::calib::static_grids::{Recipe, ScoreQuantizer, closed_form};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::nn::Role;
use crate::quant::BitWidth;
use crate::quant::log2::ZeroCode;
use crate::quant::quantizer::boxed;

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
        if state.kind == log_sqrt2::KIND { boxed(LogSqrt2::restore(state)) } else { None }
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
        let Settings { common_grid, zero_code } = Settings::read(&task.options)?;
        let scores: &ScoreQuantizer<'_> =
            &|x, bits| Ok(Box::new(LogSqrt2::search(x, bits, zero_code)?));
        closed_form(task, &recipe(common_grid, scores))
    }
}

/// RepQ-ViT's choices.
fn recipe<'r>(common_grid: CommonGrid, scores: &'r ScoreQuantizer<'r>) -> Recipe<'r> {
    Recipe {
        activation_percentiles: &PERCENTILES,
        weight_percentiles: &PERCENTILES,
        // The released code fixes the pixels at 8 bits too.
        pixel_bits: Some(BitWidth::EIGHT),
        folded: &[Role::Qkv, Role::Fc1, Role::Reduction],
        common_grid,
        scores,
    }
}

/// The options, resolved.
#[derive(Clone, Copy, Debug)]
struct Settings {
    common_grid: CommonGrid,
    zero_code: ZeroCode,
}

impl Settings {
    fn read(options: &MethodOptions) -> Result<Self> {
        let released = options.choice("variant")? == "released";
        let last = options.choice("zero_code")? == "last";
        Ok(Self {
            common_grid: if released { CommonGrid::FractionalMean } else { CommonGrid::Mean },
            zero_code: if last { ZeroCode::Last } else { ZeroCode::Extra },
        })
    }
}

#[cfg(test)]
mod tests;
