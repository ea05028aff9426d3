//! A calibration task: the float model, the images, the request, and the way to report and stop.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::calib::progress::{Progress, ProgressUpdate, SiteSqnr};
use crate::calib::role_bits::RoleBits;
use crate::error::{Error, Result};
use crate::methods::MethodOptions;
use crate::model::{Model, ModelSpec};
use crate::nn::{Role, WeightEdits, Weights};
use crate::quant::{BitWidth, Precision, QuantPlan};

/// What happens to the stem (patch embedding) and the head. Sources differ; it moves 4-bit accuracy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StemHeadPolicy {
    /// Both stay float (what the Yonsei platform's table was made with).
    #[default]
    Float,
    /// Both are quantized at 8 bits, in so far as the request quantizes weights and activations.
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
    /// Bits of the weights; float leaves them all float but for `role_bits`.
    pub weight_bits: Precision,
    /// Bits of the activations; float leaves them all float but for `role_bits`.
    pub activation_bits: Precision,
    /// Treatment of stem and head.
    pub stem_head: StemHeadPolicy,
    /// Seed of everything random.
    pub seed: u64,
    /// Roles with bits of their own, over everything above. (Absent from headers without any, so
    /// that those stay as they were before there were exceptions.)
    #[serde(default, skip_serializing_if = "RoleBits::is_empty")]
    pub role_bits: RoleBits,
}

impl QuantizeSpec {
    /// Weight bits of a role, or `None` if they stay float. Exceptions come before the stem/head
    /// policy, and that before the widths.
    pub fn role_weight_bits(&self, role: Role) -> Option<BitWidth> {
        match self.role_bits.get(role) {
            Some(exception) => exception.weights.bits(),
            None => self.policy_bits(role, self.weight_bits.bits()),
        }
    }

    /// Activation bits of a role, or `None` if they stay float; precedence as for weights.
    pub fn role_activation_bits(&self, role: Role) -> Option<BitWidth> {
        match self.role_bits.get(role) {
            Some(exception) => exception.activations.bits(),
            None => self.policy_bits(role, self.activation_bits.bits()),
        }
    }

    fn policy_bits(&self, role: Role, bits: Option<BitWidth>) -> Option<BitWidth> {
        if !role.is_stem_or_head() {
            return bits;
        }
        match self.stem_head {
            StemHeadPolicy::Float => None,
            StemHeadPolicy::Int8 => bits.map(|_| BitWidth::EIGHT),
            StemHeadPolicy::Same => bits,
        }
    }
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

    /// Weight bits of a site, or `None` if they stay float.
    pub fn weight_bits(&self, role: Role) -> Option<BitWidth> {
        self.request.role_weight_bits(role)
    }

    /// Activation bits of a site, or `None` if they stay float.
    pub fn activation_bits(&self, role: Role) -> Option<BitWidth> {
        self.request.role_activation_bits(role)
    }

    /// Reports a step; to be called at every unit and every few iterations.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn step(&self, stage: &str, unit: usize, units: usize) -> Result<()> {
        self.report(stage, unit, units, ProgressUpdate::default())
    }

    /// Reports a finished site with its quantization error.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn step_site(&self, stage: &str, unit: usize, units: usize, site: SiteSqnr) -> Result<()> {
        let update = ProgressUpdate { site: Some(site), ..ProgressUpdate::default() };
        self.report(stage, unit, units, update)
    }

    /// Reports an iteration of learning with its loss.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn step_loss(&self, stage: &str, unit: usize, units: usize, loss: f64) -> Result<()> {
        let update = ProgressUpdate { loss: Some(loss), ..ProgressUpdate::default() };
        self.report(stage, unit, units, update)
    }

    fn report(&self, stage: &str, unit: usize, units: usize, update: ProgressUpdate) -> Result<()> {
        self.progress.check_cancelled()?;
        let images = self.image_count();
        self.progress.report(ProgressUpdate {
            stage: stage.to_owned(),
            unit,
            units,
            images,
            images_total: images,
            ..update
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

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(bits: (u32, u32), stem_head: StemHeadPolicy, exceptions: &[&str]) -> QuantizeSpec {
        let mut role_bits = RoleBits::default();
        for text in exceptions {
            role_bits.insert_text(text).unwrap();
        }
        QuantizeSpec {
            method: "minmax".to_owned(),
            options: BTreeMap::new(),
            weight_bits: Precision::new(bits.0, "weight_bits").unwrap(),
            activation_bits: Precision::new(bits.1, "activation_bits").unwrap(),
            stem_head,
            seed: 0,
            role_bits,
        }
    }

    fn bits(spec: &QuantizeSpec, role: Role) -> (Option<u8>, Option<u8>) {
        let get = |bits: Option<BitWidth>| bits.map(BitWidth::get);
        (get(spec.role_weight_bits(role)), get(spec.role_activation_bits(role)))
    }

    #[test]
    fn exceptions_come_before_the_policy_and_that_before_the_widths() {
        let exceptions = ["fc2=8/float", "head=6/5", "query_key=7"];
        let all = spec((4, 3), StemHeadPolicy::Int8, &exceptions);
        assert_eq!(bits(&all, Role::Qkv), (Some(4), Some(3)));
        assert_eq!(bits(&all, Role::Embed), (Some(8), Some(8)));
        assert_eq!(bits(&all, Role::Fc2), (Some(8), None));
        assert_eq!(bits(&all, Role::Head), (Some(6), Some(5)));
        assert_eq!(bits(&all, Role::QueryKey), (None, Some(7)));
        assert_eq!(bits(&all, Role::ScoreValue).1, Some(3));
    }

    #[test]
    fn weights_only_leaves_every_activation_float() {
        for policy in [StemHeadPolicy::Float, StemHeadPolicy::Int8, StemHeadPolicy::Same] {
            let spec = spec((4, 32), policy, &[]);
            assert!(Role::ALL.iter().all(|role| bits(&spec, *role).1.is_none()), "{policy:?}");
            assert_eq!(bits(&spec, Role::Qkv).0, Some(4));
        }
    }

    #[test]
    fn a_request_without_exceptions_reads_as_before_there_were_any() {
        let plain = spec((4, 4), StemHeadPolicy::Float, &[]);
        let json = serde_json::to_string(&plain).unwrap();
        let before = r#"{"method":"minmax","options":{},"weight_bits":4,"activation_bits":4,"stem_head":"float","seed":0}"#;
        assert_eq!(json, before);
        assert_eq!(serde_json::from_str::<QuantizeSpec>(before).unwrap(), plain);
        let mixed = spec((4, 32), StemHeadPolicy::Float, &["fc2=8/8"]);
        let json = serde_json::to_string(&mixed).unwrap();
        assert_eq!(serde_json::from_str::<QuantizeSpec>(&json).unwrap(), mixed);
    }
}
