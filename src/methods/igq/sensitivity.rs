//! Ω (methods/igq-vit.md, section 6): how far predictions move when one operand is quantized.

use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::exec::{Float, Simulated, Tap, TapSink, WeightSource};
use crate::model::Model;
use crate::quant::QuantPlan;

/// A float forward with its stages kept: whatever precedes the quantized operand need not be computed
/// again.
#[derive(Debug)]
pub(super) struct FloatForward {
    /// Input of every unit.
    inputs: Vec<Tensor>,
    /// Float logits [images, classes].
    logits: Tensor,
}

impl FloatForward {
    /// Runs `model` on `images` and shows its operands to `sink`.
    pub(super) fn run(model: &Model, images: &Tensor, sink: &mut dyn TapSink) -> Result<Self> {
        let mut x = images.shallow_clone();
        let mut inputs = Vec::with_capacity(model.units.len());
        for unit in &model.units {
            let y = unit.forward(&mut Tap::new(&mut Float, sink), &x)?;
            inputs.push(std::mem::replace(&mut x, y));
        }
        Ok(Self { inputs, logits: x })
    }

    /// Mean over the images of KL(softmax(float logits) ‖ softmax(logits under `plan`)), in nats.
    /// `plan` quantizes nothing before `unit`.
    ///
    /// # Errors
    /// `InvalidArgument` when the logits are not finite.
    pub(super) fn divergence(&self, model: &Model, unit: usize, plan: &QuantPlan) -> Result<f64> {
        let mut executor = Simulated::new(plan, WeightSource::Quantize);
        let mut x = self.inputs[unit].shallow_clone();
        for unit in &model.units[unit..] {
            x = unit.forward(&mut executor, &x)?;
        }
        let divergence = divergence(&self.logits, &x)?;
        if divergence.is_finite() {
            return Ok(divergence);
        }
        Err(Error::invalid("calibration", "the logits are not finite"))
    }
}

/// Mean over the rows of KL(softmax(p) ‖ softmax(q)).
fn divergence(p: &Tensor, q: &Tensor) -> Result<f64> {
    let log_p = p.f_log_softmax(-1, Kind::Double)?;
    let log_q = q.f_log_softmax(-1, Kind::Double)?;
    let terms = log_p.f_exp()?.f_mul(&log_p.f_sub(&log_q)?)?;
    Ok(terms
        .f_sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)?
        .f_mean(Kind::Double)?
        .f_double_value(&[])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_divergence_is_the_textbooks() {
        // softmax(0, ln 3) = (¼, ¾); KL(½,½ ‖ ¼,¾) = ½ ln 2 + ½ ln ⅔; the second row does not differ.
        let three = 3f32.ln();
        let p = Tensor::from_slice(&[0.0f32, 0.0, 1.0, 2.0]).view([2, 2]);
        let q = Tensor::from_slice(&[0.0f32, three, 11.0, 12.0]).view([2, 2]);
        let expected = 0.5 * (0.5 * 2f64.ln() + 0.5 * (2.0 / 3.0f64).ln());
        assert!((divergence(&p, &q).unwrap() - expected).abs() < 1e-7);
        assert!(divergence(&p, &p).unwrap().abs() < 1e-15);
    }
}
