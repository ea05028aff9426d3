//! Fake quantization in float32: every operand that the plan names is rounded to its grid, the
//! product itself is a float product. This is the definition of each method, and differentiable.

use tch::Tensor;

use crate::error::Result;
use crate::exec::{Executor, float};
use crate::nn::{Linear, Operand, Site};
use crate::quant::QuantPlan;

/// Where the executor finds the rounded weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightSource {
    /// The model holds float weights; the plan's weight quantizers round them at every call.
    Quantize,
    /// The model was rebuilt with already rounded weights (decoded from an artifact's codes).
    Decoded,
}

/// Executes what the plan holds with fake quantization, and everything else in float.
#[derive(Debug)]
pub struct Simulated<'a> {
    plan: &'a QuantPlan,
    weights: WeightSource,
}

impl<'a> Simulated<'a> {
    /// An executor of `plan`.
    pub fn new(plan: &'a QuantPlan, weights: WeightSource) -> Self {
        Self { plan, weights }
    }

    fn quantized(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<Tensor> {
        match self.plan.get(site.id, operand) {
            Some(quantizer) => quantizer.fake_quantize(x),
            None => Ok(x.shallow_clone()),
        }
    }
}

impl Executor for Simulated<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let x = self.quantized(&op.site, Operand::Lhs, x)?;
        let weight = match self.weights {
            WeightSource::Quantize => self.quantized(&op.site, Operand::Rhs, &op.weight)?,
            WeightSource::Decoded => op.weight.shallow_clone(),
        };
        float::linear(&op.site, &x, &weight, op.bias.as_ref())
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let lhs = self.quantized(site, Operand::Lhs, lhs)?;
        let rhs = self.quantized(site, Operand::Rhs, rhs)?;
        float::matmul(site, &lhs, &rhs)
    }
}
