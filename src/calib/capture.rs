//! The calibrated forward: a quantizer is made for each operand at its first appearance.
//!
//! Operands upstream are already quantized when a site is reached, so the pass is sequential by
//! construction. Methods that calibrate in parallel use [`crate::exec::Tap`] over `Float` instead.

use tch::Tensor;

use crate::calib::report::{Seen, require_finite};
use crate::error::Result;
use crate::exec::{Executor, Float};
use crate::nn::{Linear, Operand, Site};
use crate::quant::{QuantPlan, Quantizer};

/// Makes the quantizer of an operand from the tensor at hand; `None` leaves the operand float.
pub trait QuantizerSource {
    /// Called once per site and operand, in forward order, the input before the weight.
    ///
    /// # Errors
    /// `Cancelled` when the task was asked to stop.
    fn quantizer(
        &mut self,
        site: &Site,
        operand: Operand,
        x: &Tensor,
    ) -> Result<Option<Box<dyn Quantizer>>>;

    /// Shown every operand right after its first quantization.
    ///
    /// # Errors
    /// As [`QuantizerSource::quantizer`].
    fn quantized(&mut self, seen: &Seen<'_>) -> Result<()>;
}

/// An executor that fills a plan while it runs the whole calibration batch once.
#[derive(Debug)]
pub struct LazyCalibration<'a, S> {
    source: &'a mut S,
    /// What has been found so far.
    pub plan: QuantPlan,
}

impl<'a, S: QuantizerSource> LazyCalibration<'a, S> {
    /// Starts with an empty plan.
    pub fn new(source: &'a mut S) -> Self {
        Self { source, plan: QuantPlan::default() }
    }

    fn calibrated(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<Tensor> {
        if let Some(quantizer) = self.plan.get(site.id, operand) {
            return quantizer.fake_quantize(x);
        }
        require_finite(site, operand, x)?;
        let Some(quantizer) = self.source.quantizer(site, operand, x)? else {
            return Ok(x.shallow_clone());
        };
        let x_hat = quantizer.fake_quantize(x)?;
        self.source.quantized(&Seen {
            site,
            operand,
            quantizer: quantizer.as_ref(),
            x,
            x_hat: &x_hat,
        })?;
        self.plan.insert(site.id, operand, quantizer);
        Ok(x_hat)
    }
}

impl<S: QuantizerSource> Executor for LazyCalibration<'_, S> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let x = self.calibrated(&op.site, Operand::Lhs, x)?;
        let weight = self.calibrated(&op.site, Operand::Rhs, &op.weight)?;
        let rounded = Linear {
            site: op.site.clone(),
            weight,
            bias: op.bias.as_ref().map(Tensor::shallow_clone),
        };
        Float.linear(&rounded, &x)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let lhs = self.calibrated(site, Operand::Lhs, lhs)?;
        let rhs = self.calibrated(site, Operand::Rhs, rhs)?;
        Float.matmul(site, &lhs, &rhs)
    }
}
