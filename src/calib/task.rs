//! A calibration task: the float model, the images, the request, and the way to report and stop.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::calib::progress::{Progress, ProgressUpdate, SiteSqnr};
use crate::error::{Error, Result};
use crate::methods::MethodOptions;
use crate::model::{Model, ModelSpec};
use crate::nn::{Role, WeightEdits, Weights};
use crate::quant::{BitWidth, QuantPlan};

/// What happens to the stem (patch embedding) and the head. Sources differ; it moves 4-bit accuracy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StemHeadPolicy {
    /// Both stay float (what the Yonsei platform's table was made with).
    #[default]
    Float,
    /// Both are quantized at 8 bits.
    Int8,
    /// Both are quantized as every other layer.
    Same,
}

impl StemHeadPolicy {
    /// The policy of that name.
    ///
    /// # Errors
    /// `InvalidArgument` on field `stem_head`.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "float" => Ok(Self::Float),
            "int8" => Ok(Self::Int8),
            "same" => Ok(Self::Same),
            other => Err(Error::invalid(
                "stem_head",
                format!("unknown policy `{other}`, known are float, int8 and same"),
            )),
        }
    }

    /// The name in flags, reports and artifacts.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float => "float",
            Self::Int8 => "int8",
            Self::Same => "same",
        }
    }
}

/// What a client asks of a calibration; part of the artifact's header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantizeSpec {
    /// Method id: `ubb`, `minmax`, ...
    pub method: String,
    /// Options that differ from the defaults, by name, as text.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
    /// Bits of the weights.
    pub weight_bits: BitWidth,
    /// Bits of the activations.
    pub activation_bits: BitWidth,
    /// Treatment of stem and head.
    pub stem_head: StemHeadPolicy,
    /// Seed of everything random.
    pub seed: u64,
}

/// A float model and calibration images, and everything a method may ask about them.
pub struct CalibrationTask<'a> {
    /// The model's description.
    pub spec: Arc<ModelSpec>,
    /// The float weights, on `device`.
    pub weights: Weights,
    /// Normalised calibration images, float32 [n, 3, h, w] on `device`.
    pub images: Tensor,
    /// The request.
    pub request: QuantizeSpec,
    /// The request's options, checked and with defaults filled in.
    pub options: MethodOptions,
    /// Where to compute.
    pub device: Device,
    /// Who watches.
    pub progress: &'a dyn Progress,
}

impl CalibrationTask<'_> {
    /// The float model.
    ///
    /// # Errors
    /// As [`Model::build`].
    pub fn model(&self) -> Result<Model> {
        Model::build(&self.spec, &self.weights)
    }

    /// The model with some parameters replaced.
    ///
    /// # Errors
    /// As [`Model::build`].
    pub fn model_with(&self, edits: &WeightEdits) -> Result<Model> {
        Model::build(&self.spec, &self.weights.with(edits))
    }

    /// Number of calibration images.
    pub fn image_count(&self) -> usize {
        usize::try_from(self.images.size()[0]).unwrap_or(0)
    }

    /// Weight bits of a site, or `None` if the policy leaves it float.
    pub fn weight_bits(&self, role: Role) -> Option<BitWidth> {
        self.policy_bits(role, self.request.weight_bits)
    }

    /// Activation bits of a site, or `None` if the policy leaves it float.
    pub fn activation_bits(&self, role: Role) -> Option<BitWidth> {
        self.policy_bits(role, self.request.activation_bits)
    }

    fn policy_bits(&self, role: Role, bits: BitWidth) -> Option<BitWidth> {
        if !role.is_stem_or_head() {
            return Some(bits);
        }
        match self.request.stem_head {
            StemHeadPolicy::Float => None,
            StemHeadPolicy::Int8 => Some(BitWidth::EIGHT),
            StemHeadPolicy::Same => Some(bits),
        }
    }

    /// Reports a step; to be called at every unit and every few iterations.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn step(&self, stage: &str, unit: usize, units: usize) -> Result<()> {
        self.report(stage, unit, units, None)
    }

    /// Reports a finished site with its quantization error.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn step_site(&self, stage: &str, unit: usize, units: usize, site: SiteSqnr) -> Result<()> {
        self.report(stage, unit, units, Some(site))
    }

    fn report(&self, stage: &str, unit: usize, units: usize, site: Option<SiteSqnr>) -> Result<()> {
        if self.progress.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let images = self.image_count();
        self.progress.report(ProgressUpdate {
            stage: stage.to_owned(),
            unit,
            units,
            images,
            images_total: images,
            site,
        });
        Ok(())
    }
}

/// A method's result: a plan, changed weights, and what was learned on the way.
#[derive(Debug, Default)]
pub struct Quantization {
    /// What is quantized how; weight quantizers included.
    pub plan: QuantPlan,
    /// Float parameters that the method changed (before weight quantization).
    pub edits: WeightEdits,
    /// Quantization errors and remarks.
    pub report: CalibrationReport,
}

/// What a calibration found, for the client and the artifact.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CalibrationReport {
    /// Number of calibration images. (No times here: equal calibrations give equal artifacts.)
    pub images: usize,
    /// Quantization error per operand, in forward order.
    pub sites: Vec<SiteReport>,
    /// Remarks a user should read (caps that were hit, fallbacks taken).
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// The quantization error of one operand on the calibration images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SiteReport {
    /// The site's path.
    pub path: String,
    /// What the site computes.
    pub role: Role,
    /// `input`, `weight`, `lhs` or `rhs`.
    pub operand: String,
    /// Kind of the quantizer.
    pub kind: String,
    /// Nominal bit width.
    pub bits: u8,
    /// 10·log10(Σx² / Σ(x − x̂)²) in dB.
    pub sqnr_db: f64,
}
