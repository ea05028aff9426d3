//! `vitq`: our own method. Closed form, no learning, one forward over the calibration images.
//!
//! What it takes from the methods beside it and from the literature, and what each ingredient gives,
//! is told in docs/methods.md:
//!
//! - dynamic ranges per token × channel group and token-wise bits of mean n for linear inputs (ubb),
//!   for q, k and v per head (ours);
//! - a codebook for attention scores, fitted exactly ([`scores`]);
//! - channels evened out in front of linear layers and of q·kᵀ ([`equalize`]);
//! - weights rounded with error feedback and, as an option, corrected for the rounding of their
//!   inputs ([`compensate`]).

mod calibrator;
mod compensate;
mod equalize;
mod levels;
mod scores;

use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::methods::{Method, MethodEntry, MethodOptions, OptionKind, OptionSpec};
use crate::nn::Site;
use crate::quant::quantizer::boxed;
use crate::quant::tokens::TokenLayout;

use super::ubb::{self, TokenBits};
use compensate::{Correction, Rounding, Rules};
use scores::{RowScale, ScoreCodebook};

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "vitq",
    summary: "dynamic token-wise bits, fitted score codebook, evened channels, error feedback",
    source: "this project; docs/methods.md names what it builds on",
    options: OPTIONS,
    build: || Box::new(VitQ),
    restore: |state| {
        if state.kind == scores::KIND { boxed(ScoreCodebook::restore(state)) } else { None }
    },
};

const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "groups",
        help: "channel groups of a linear input; must divide every channel count",
        kind: OptionKind::Int { min: 1, max: 1024 },
        default: "8",
    },
    OptionSpec {
        name: "token_bits",
        help: "bits of a token: n−1 to n+1 by its range and n on average, or n each",
        kind: OptionKind::Choice(&["mixed", "equal"]),
        default: "mixed",
    },
    OptionSpec {
        name: "scores",
        help: "levels of attention scores: a fitted codebook, or powers of two as in ubb",
        kind: OptionKind::Choice(&["codebook", "log2"]),
        default: "codebook",
    },
    OptionSpec {
        name: "row_scale",
        help: "scale of a row of scores on the codebook: of least error, or its largest score stays",
        kind: OptionKind::Choice(&["least_squares", "largest"]),
        default: "least_squares",
    },
    OptionSpec {
        name: "heads",
        help: "dynamic ranges of q, k and v: of each head, or of all together as in ubb",
        kind: OptionKind::Choice(&["apart", "merged"]),
        default: "apart",
    },
    OptionSpec {
        name: "equalize",
        help: "even out the channels in front of linear layers and of q·kᵀ",
        kind: OptionKind::Bool,
        default: "true",
    },
    OptionSpec {
        name: "correction",
        help: "correct nothing for rounded inputs, weights and biases, or only biases",
        kind: OptionKind::Choice(&["none", "ridge", "bias"]),
        default: "none",
    },
    OptionSpec {
        name: "rounding",
        help: "round weights with error feedback, or each to its nearest code",
        kind: OptionKind::Choice(&["feedback", "nearest"]),
        default: "feedback",
    },
];

#[derive(Debug)]
struct VitQ;

impl Method for VitQ {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let settings = Settings::read(&task.options, task.spec.has_class_token())?;
        calibrator::calibrate(task, settings)
    }
}

/// The options, resolved for a model.
#[derive(Clone, Copy, Debug)]
struct Settings {
    /// The rules of dynamic ranges and token-wise bits.
    tokens: ubb::Settings,
    scores: Scores,
    heads: Heads,
    equalize: bool,
    rules: Rules,
}

/// How attention scores are rounded.
#[derive(Clone, Copy, Debug)]
enum Scores {
    Codebook(RowScale),
    Log2,
}

/// What the dynamic ranges of q, k and v are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Heads {
    Apart,
    Merged,
}

impl Settings {
    fn read(options: &MethodOptions, has_class_token: bool) -> Result<Self> {
        let token_bits = match options.choice("token_bits")? {
            "equal" => TokenBits::Equal,
            _ => TokenBits::Mixed,
        };
        Ok(Self {
            tokens: ubb::Settings::corrected(options.int("groups")?, token_bits, has_class_token),
            scores: match (options.choice("scores")?, options.choice("row_scale")?) {
                ("log2", _) => Scores::Log2,
                (_, "largest") => Scores::Codebook(RowScale::Largest),
                _ => Scores::Codebook(RowScale::LeastSquares),
            },
            heads: match options.choice("heads")? {
                "merged" => Heads::Merged,
                _ => Heads::Apart,
            },
            equalize: options.bool("equalize")?,
            rules: Rules {
                correction: match options.choice("correction")? {
                    "ridge" => Correction::Ridge,
                    "bias" => Correction::Bias,
                    _ => Correction::None,
                },
                rounding: match options.choice("rounding")? {
                    "nearest" => Rounding::Nearest,
                    _ => Rounding::Feedback,
                },
            },
        })
    }

    /// The tokens of an attention operand.
    fn layout(self, site: &Site) -> TokenLayout {
        match self.heads {
            Heads::Apart => TokenLayout::PER_HEAD,
            Heads::Merged => self.tokens.layout(site),
        }
    }
}
