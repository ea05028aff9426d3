//! I&S-ViT: shift-uniform-log2 scores and a smooth optimization in three stages (Zhong et al.,
//! TPAMI 2025, arXiv 2311.10126).
//!
//! RepQ-ViT's grids and folding, with weights trained by block reconstruction: first with fine
//! activation grids and float weights, then with everything quantized. Specification:
//! methods/ias-vit.md. Option `variant` names what the released code does differently; its stochastic
//! depth during Swin's training (an effect of timm's defaults) is not offered.

mod stages;
mod sulq;

use crate::calib::reparam::CommonGrid;
use crate::calib::static_grids::{Recipe, ScoreQuantizer};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::nn::Role;
use crate::quant::BitWidth;
use crate::quant::quantizer::boxed;

use sulq::{Levels, ShiftUniformLog2};

pub(super) use stages::{
    BATCH, INIT_IMAGES, ITERATIONS, KEEP, LEARNING, LEARNING_RATE, run as run_stages,
};

/// Percentiles tried for activations, in this order (the released code's constants).
pub(super) const ACTIVATION_PERCENTILES: [f64; 3] = [0.999, 0.9999, 0.99999];

/// Percentiles tried for weights, in this order (the released code's constants).
pub(super) const WEIGHT_PERCENTILES: [f64; 9] =
    [0.97, 0.98, 0.99, 0.995, 0.9995, 0.9997, 0.9999, 0.99995, 0.99999];

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "ias",
    summary: "repq's grids, shift-uniform-log2 scores, weights trained by block reconstruction",
    source: "I&S-ViT, TPAMI 2025, arXiv 2311.10126",
    options: OPTIONS,
    build: || Box::new(Ias),
    restore: |state| {
        if state.kind == sulq::KIND { boxed(ShiftUniformLog2::restore(state)) } else { None }
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "variant",
        help: "corrected: integer zero points, 8-bit pixels; released: fractional, float",
        kind: OptionKind::Choice(&["corrected", "released"]),
        default: "corrected",
    },
    OptionSpec {
        name: "sulq_levels",
        help: "levels of scores: 2^n as scored (corrected), 2^n + 1 (released), or as `variant`",
        kind: OptionKind::Choice(&["variant", "corrected", "released"]),
        default: "variant",
    },
    LEARNING,
    ITERATIONS,
    BATCH,
    LEARNING_RATE,
    INIT_IMAGES,
    KEEP,
];

#[derive(Debug)]
struct Ias;

impl Method for Ias {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let Settings { variant, levels } = Settings::read(&task.options)?;
        let scores: &ScoreQuantizer<'_> =
            &|x, bits| Ok(Box::new(ShiftUniformLog2::search(x, bits, levels)?));
        run_stages(task, &recipe(variant, scores))
    }
}

/// The options of the quantizers, resolved.
#[derive(Clone, Copy, Debug)]
struct Settings {
    variant: Variant,
    levels: Levels,
}

/// What the released code does differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Corrected,
    Released,
}

impl Settings {
    fn read(options: &MethodOptions) -> Result<Self> {
        let released = options.choice("variant")? == "released";
        let levels = match options.choice("sulq_levels")? {
            "corrected" => Levels::Corrected,
            "released" => Levels::Released,
            _ if released => Levels::Released,
            _ => Levels::Corrected,
        };
        Ok(Self { variant: if released { Variant::Released } else { Variant::Corrected }, levels })
    }
}

/// I&S-ViT's choices.
fn recipe<'r>(variant: Variant, scores: &'r ScoreQuantizer<'r>) -> Recipe<'r> {
    let released = variant == Variant::Released;
    Recipe {
        activation_percentiles: &ACTIVATION_PERCENTILES,
        weight_percentiles: &WEIGHT_PERCENTILES,
        pixel_bits: (!released).then_some(BitWidth::EIGHT),
        // Swin's reduction keeps one grid per tensor, unlike RepQ-ViT's.
        folded: &[Role::Qkv, Role::Fc1],
        common_grid: if released { CommonGrid::FractionalMean } else { CommonGrid::Mean },
        scores,
    }
}

#[cfg(test)]
mod tests;
