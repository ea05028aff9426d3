//! DopQ-style (our reading): tangent scores and median scales, learned as in I&S-ViT (Yang et al.,
//! arXiv 2408.03291).
//!
//! The paper's equations and code were not available to us. TanQ, the clips and shapes it searches and
//! all settings that are not named in the paper's abstract and tables are our choices
//! (methods/dopq-vit.md). MOSF, the median as the common scale of a LayerNorm's output, changes no
//! code in closed form, as the scale cancels in the rewrite; it only sets the size of the weights that
//! Adam's steps meet. A test holds this.

mod tanq;

use crate::calib::reparam::CommonGrid;
use crate::calib::static_grids::{Recipe, ScoreQuantizer, closed_form};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry, OptionKind, OptionSpec, ias};
use crate::nn::Role;
use crate::quant::BitWidth;
use crate::quant::quantizer::boxed;

use tanq::{Ends, Tangent};

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "dopq",
    summary: "DopQ-style (our reading): tangent scores, median scales, trained as ias",
    source: "after DopQ-ViT, arXiv 2408.03291; its equations were not available",
    options: OPTIONS,
    build: || Box::new(DopQ),
    restore: |state| match state.kind.as_str() {
        tanq::KIND => boxed(Tangent::restore(state)),
        _ => None,
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "tangent",
        help: "levels of scores are dense near 0 and 1 (both), or near 1 only (upper)",
        kind: OptionKind::Choice(&["both", "upper"]),
        default: "both",
    },
    OptionSpec {
        name: "common_scale",
        help: "scale and zero point of a LayerNorm's output: median (MOSF) or mean of the channels'",
        kind: OptionKind::Choice(&["median", "mean"]),
        default: "median",
    },
    ias::LEARNING,
    ias::ITERATIONS,
    ias::BATCH,
    ias::LEARNING_RATE,
    ias::INIT_IMAGES,
    ias::KEEP,
];

#[derive(Debug)]
struct DopQ;

impl Method for DopQ {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let upper = task.options.choice("tangent")? == "upper";
        let ends = if upper { Ends::Upper } else { Ends::Both };
        let scores: &ScoreQuantizer<'_> = &|x, bits| Ok(Box::new(Tangent::search(x, bits, ends)?));
        let mean = task.options.choice("common_scale")? == "mean";
        let recipe = recipe(if mean { CommonGrid::Mean } else { CommonGrid::Median }, scores);
        // Without learning it is RepQ-ViT's pipeline, which fits activations on quantized weights.
        match task.options.choice(ias::LEARNING.name)? {
            "off" => closed_form(task, &recipe),
            _ => ias::run_stages(task, &recipe),
        }
    }
}

/// Our choices.
fn recipe<'r>(common_grid: CommonGrid, scores: &'r ScoreQuantizer<'r>) -> Recipe<'r> {
    Recipe {
        activation_percentiles: &ias::ACTIVATION_PERCENTILES,
        weight_percentiles: &ias::WEIGHT_PERCENTILES,
        pixel_bits: Some(BitWidth::EIGHT),
        folded: &[Role::Qkv, Role::Fc1, Role::Reduction],
        common_grid,
        scores,
    }
}

#[cfg(test)]
mod tests;
