//! `minmax`: static per-tensor asymmetric activations and per-channel asymmetric weights from
//! minimum and maximum. The plain baseline that every other method is compared with.

use tch::Tensor;

use crate::calib::report::{Seen, SiteLog, require_finite};
use crate::calib::{CalibrationTask, Quantization};
use crate::error::Result;
use crate::exec::{Float, Tap, TapSink};
use crate::methods::{Method, MethodEntry};
use crate::nn::{Operand, Role, Site};
use crate::quant::dynamic::MIN_ACTIVATION_SCALE;
use crate::quant::uniform::{MIN_WEIGHT_SCALE, Range, Uniform};
use crate::quant::{BitWidth, QuantPlan, Quantizer};

/// The registry line.
pub(super) const METHOD: MethodEntry = MethodEntry {
    id: "minmax",
    summary: "static per-tensor activations, per-channel weights, ranges from minimum and maximum",
    source: "the usual baseline; no paper",
    options: &[],
    build: || Box::new(MinMax),
    restore: |_| None,
};

#[derive(Debug)]
struct MinMax;

impl Method for MinMax {
    fn calibrate(&self, task: &mut CalibrationTask<'_>) -> Result<Quantization> {
        let model = task.model()?;
        let log = SiteLog::new(task, "calibrate", model.units.len());
        let mut observer = Observer { log, plan: QuantPlan::default() };
        let images = task.images.shallow_clone();
        let _logits = model.forward(&mut Tap::new(&mut Float, &mut observer), &images)?;
        let Observer { log, plan } = observer;
        Ok(Quantization { plan, report: log.finish(), ..Quantization::default() })
    }
}

/// Makes a quantizer of every operand of the float forward (parallel calibration).
struct Observer<'t, 'p> {
    log: SiteLog<'t, 'p>,
    plan: QuantPlan,
}

impl TapSink for Observer<'_, '_> {
    fn operand(&mut self, site: &Site, operand: Operand, x: &Tensor) -> Result<()> {
        require_finite(site, operand, x)?;
        let task = self.log.task();
        let is_weight = operand == Operand::Rhs && !site.role.is_matmul();
        let quantizer = if is_weight {
            let Some(bits) = task.weight_bits(site.role) else { return Ok(()) };
            Uniform::from_range(&Range::per_row(x)?, bits, MIN_WEIGHT_SCALE)?
        } else {
            let Some(bits) = task.activation_bits(site.role) else { return Ok(()) };
            // Pixels are 8-bit data: fewer bits would quantize the image, not the model.
            let bits = if site.role == Role::Embed { BitWidth::EIGHT } else { bits };
            Uniform::from_range(&Range::per_tensor(x)?, bits, MIN_ACTIVATION_SCALE)?
        };
        let x_hat = quantizer.fake_quantize(x)?;
        self.log.record(&Seen { site, operand, quantizer: &quantizer, x, x_hat: &x_hat })?;
        self.plan.insert(site.id, operand, Box::new(quantizer));
        Ok(())
    }
}
