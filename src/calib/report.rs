//! The log of a calibration: quantization error per operand, reported as it is found.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::calib::progress::SiteSqnr;
use crate::calib::task::{CalibrationReport, CalibrationTask, SiteReport};
use crate::error::{Error, Result};
use crate::nn::{Operand, Site, SiteId};
use crate::quant::Quantizer;
use crate::tensor::sqnr_db;

/// Collects a [`CalibrationReport`] and tells the task's watcher about every finished operand.
pub struct SiteLog<'t, 'p> {
    task: &'t CalibrationTask<'p>,
    stage: &'static str,
    units: usize,
    sites: BTreeMap<(SiteId, Operand), SiteReport>,
    warnings: Vec<String>,
}

impl<'t, 'p> SiteLog<'t, 'p> {
    /// A log of one stage over a model of `units` units.
    pub fn new(task: &'t CalibrationTask<'p>, stage: &'static str, units: usize) -> Self {
        Self { task, stage, units, sites: BTreeMap::new(), warnings: Vec::new() }
    }

    /// The task that is logged.
    pub fn task(&self) -> &'t CalibrationTask<'p> {
        self.task
    }

    /// Notes the error of an operand and reports it. A later note of the same operand replaces it.
    ///
    /// # Errors
    /// `Cancelled` when the client asked to stop.
    pub fn record(&mut self, seen: &Seen<'_>) -> Result<()> {
        let sqnr = sqnr_db(seen.x, seen.x_hat)?;
        let state = seen.quantizer.state();
        let operand = seen.site.operand_name(seen.operand).to_owned();
        let report = SiteReport {
            path: seen.site.path.clone(),
            role: seen.site.role,
            operand: operand.clone(),
            kind: state.kind,
            bits: state.bits,
            // JSON has no infinity: an exactly represented operand is capped at 200 dB.
            sqnr_db: sqnr.clamp(-200.0, 200.0),
        };
        self.sites.insert((seen.site.id, seen.operand), report);
        let site =
            SiteSqnr { path: seen.site.path.clone(), operand, sqnr_db: sqnr.clamp(-200.0, 200.0) };
        self.task.step_site(self.stage, seen.site.unit + 1, self.units, site)
    }

    /// Adds a remark for the user.
    pub fn warn(&mut self, remark: String) {
        tracing::warn!(remark);
        self.warnings.push(remark);
    }

    /// The finished report, sites in forward order.
    pub fn finish(self) -> CalibrationReport {
        let images = self.task.image_count();
        CalibrationReport {
            images,
            sites: self.sites.into_values().collect(),
            warnings: self.warnings,
        }
    }
}

/// An operand before and after quantization.
#[derive(Debug)]
pub struct Seen<'a> {
    /// Its site.
    pub site: &'a Site,
    /// Which side of the product.
    pub operand: Operand,
    /// The quantizer that was applied.
    pub quantizer: &'a dyn Quantizer,
    /// Before.
    pub x: &'a Tensor,
    /// After.
    pub x_hat: &'a Tensor,
}

/// Refuses NaN and infinity, which would spoil every statistic silently.
///
/// # Errors
/// `InvalidArgument` on field `calibration`, naming the operand.
pub fn require_finite(site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
    // A sum is finite only if every element is: one pass, no mask.
    let sum = x.f_sum(tch::Kind::Double)?.f_double_value(&[])?;
    if sum.is_finite() {
        return Ok(());
    }
    let name = site.operand_name(operand);
    Err(Error::invalid("calibration", format!("the {name} of {} is not finite", site.path)))
}
