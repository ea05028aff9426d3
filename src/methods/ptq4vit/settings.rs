//! The options, and what they say about each operand (methods/ptq4vit.md, section 2).

use tch::Tensor;

use crate::calib::CalibrationTask;
use crate::error::Result;
use crate::methods::{OptionKind, OptionSpec};
use crate::nn::{Operand, Role, Site};
use crate::quant::BitWidth;

use super::fit::{OperandFit, Parts};
use super::gradient::Gradient;
use super::grid::{Factors, Grid, GridShape, Ratio};
use super::twin_softmax::Overlap;

/// The options' schema.
pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec {
        name: "gradient",
        help: "what weighs output errors: Fisher diagonal, gradient of the network at its initial \
               scales, nothing, or noise (the released code in effect)",
        kind: OptionKind::Choice(&["fisher", "perturbed", "mse", "noise"]),
        default: "fisher",
    },
    OptionSpec {
        name: "sos_overlap",
        help: "the two ranges of scores: one per score, or added as released",
        kind: OptionKind::Choice(&["exclusive", "released"]),
        default: "exclusive",
    },
    OptionSpec {
        name: "gelu_pow2_ratio",
        help: "post-GELU scales differ by a power of two, as in the paper; released: any ratio",
        kind: OptionKind::Bool,
        default: "false",
    },
    OptionSpec {
        name: "stem_input",
        help: "pixels where the stem is quantized: 8 bits, or float as released",
        kind: OptionKind::Choice(&["int8", "float"]),
        default: "int8",
    },
    OptionSpec {
        name: "rounds",
        help: "how often the two operands of a product are searched",
        kind: OptionKind::Int { min: 1, max: 10 },
        default: "3",
    },
    OptionSpec {
        name: "candidates",
        help: "number of scales tried per operand",
        kind: OptionKind::Int { min: 2, max: 1000 },
        default: "100",
    },
    OptionSpec {
        name: "range_low",
        help: "smallest scale tried, as a share of the initial one (alpha)",
        kind: OptionKind::Float { min: 0.001, max: 0.9 },
        default: "0.01",
    },
    OptionSpec {
        name: "range_high",
        help: "end of the scales tried, as a share of the initial one (beta)",
        kind: OptionKind::Float { min: 1.0, max: 2.0 },
        default: "1.2",
    },
    OptionSpec {
        name: "twin_gelu",
        help: "two grids for post-GELU values; false: one symmetric grid (ablation)",
        kind: OptionKind::Bool,
        default: "true",
    },
    OptionSpec {
        name: "twin_softmax",
        help: "two grids for attention scores; false: one symmetric grid per head (ablation)",
        kind: OptionKind::Bool,
        default: "true",
    },
];

/// The options, resolved for a task.
pub(super) struct Settings<'t, 'p> {
    /// What is calibrated.
    pub(super) task: &'t CalibrationTask<'p>,
    /// What weighs the errors.
    pub(super) gradient: Gradient,
    factors: Factors,
    /// Searches of each operand.
    pub(super) rounds: i64,
    post_gelu: GridShape,
    scores: GridShape,
    stem_input: StemInput,
}

/// Treatment of the pixels where the stem is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StemInput {
    /// Pixels are 8-bit data: fewer bits would quantize the image, not the model.
    EightBits,
    /// As released.
    Float,
}

impl<'t, 'p> Settings<'t, 'p> {
    /// Reads the task's options.
    ///
    /// # Errors
    /// `Internal` when an option is missing.
    pub(super) fn read(task: &'t CalibrationTask<'p>) -> Result<Self> {
        let options = &task.options;
        let ratio = if options.bool("gelu_pow2_ratio")? { Ratio::PowerOfTwo } else { Ratio::Free };
        let overlap = match options.choice("sos_overlap")? {
            "released" => Overlap::Released,
            _ => Overlap::Exclusive,
        };
        let twin = |name: &str, shape: GridShape| -> Result<GridShape> {
            Ok(if options.bool(name)? { shape } else { GridShape::Symmetric })
        };
        Ok(Self {
            task,
            gradient: Gradient::parse(options.choice("gradient")?),
            factors: Factors {
                low: options.float("range_low")?,
                high: options.float("range_high")?,
                count: i32::try_from(options.int("candidates")?).unwrap_or(i32::MAX),
            },
            rounds: options.int("rounds")?,
            post_gelu: twin("twin_gelu", GridShape::TwinGelu(ratio))?,
            scores: twin("twin_softmax", GridShape::TwinSoftmax(overlap))?,
            stem_input: match options.choice("stem_input")? {
                "float" => StemInput::Float,
                _ => StemInput::EightBits,
            },
        })
    }

    /// The unsearched scales of an operand; `None` leaves it float.
    ///
    /// # Errors
    /// `Device` when libtorch refuses.
    pub(super) fn fit(
        &self,
        site: &Site,
        operand: Operand,
        x: &Tensor,
    ) -> Result<Option<OperandFit>> {
        let Some((grid, parts)) = self.grid(site, operand) else { return Ok(None) };
        OperandFit::new(x, grid, parts, &self.factors).map(Some)
    }

    /// The grid of an operand and what has a scale of its own; `None` leaves it float.
    pub(super) fn grid(&self, site: &Site, operand: Operand) -> Option<(Grid, Parts)> {
        let role = site.role;
        if operand == Operand::Rhs && !role.is_matmul() {
            let parts = match role {
                Role::Embed => Parts::Rows,
                Role::Qkv => Parts::RowGroups(3), // q, k and v
                Role::QueryKey
                | Role::ScoreValue
                | Role::Proj
                | Role::Fc1
                | Role::Fc2
                | Role::Reduction
                | Role::Head => Parts::RowGroups(1),
            };
            return Some((symmetric(self.task.weight_bits(role)?), parts));
        }
        let bits = self.task.activation_bits(role)?;
        match (role, operand) {
            (Role::Embed, _) if self.stem_input == StemInput::Float => None,
            (Role::Embed, _) => Some((symmetric(BitWidth::EIGHT), Parts::Whole)),
            (Role::ScoreValue, Operand::Lhs) => {
                let shape = self.scores;
                let split = matches!(shape, GridShape::TwinSoftmax(_));
                Some((Grid { shape, bits }, if split { Parts::Whole } else { Parts::Heads }))
            }
            (Role::QueryKey | Role::ScoreValue, _) => Some((symmetric(bits), Parts::Heads)),
            (Role::Fc2, _) => Some((Grid { shape: self.post_gelu, bits }, Parts::Whole)),
            (Role::Qkv | Role::Proj | Role::Fc1 | Role::Reduction | Role::Head, _) => {
                Some((symmetric(bits), Parts::Whole))
            }
        }
    }
}

fn symmetric(bits: BitWidth) -> Grid {
    Grid { shape: GridShape::Symmetric, bits }
}
