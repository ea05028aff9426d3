//! Integer execution: operands become codes, products are products of integers, and scales and zero
//! points come in at the end of each sum. The same numbers as [`Simulated`], summed in another order:
//! within a group of columns a sum has no rounding at all.
//!
//! A sum of integers is the same in any order, so that an image does not depend on its batch.

mod sites;

use tch::Tensor;

use crate::error::{Error, Result};
use crate::exec::{Executor, Simulated, WeightSource};
use crate::kernels::{self, Codes, cpu_slices};
use crate::nn::{Linear, Operand, Site};
use crate::quant::QuantPlan;

use sites::Form;

pub use sites::{IntegerSites, Packer, SiteCounts};

/// Executes sites that have an integer form in integers, and the others as [`Simulated`] does.
#[derive(Debug)]
pub struct Integer<'a> {
    plan: &'a QuantPlan,
    sites: &'a IntegerSites,
    simulated: Simulated<'a>,
}

impl<'a> Integer<'a> {
    /// An executor of `plan` with the forms and weights that a [`Packer`] found.
    pub fn new(plan: &'a QuantPlan, sites: &'a IntegerSites) -> Self {
        Self { plan, sites, simulated: Simulated::new(plan, WeightSource::Decoded) }
    }

    fn encode(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<Codes> {
        let quantizer = self.plan.get(site.id, operand);
        let codes = quantizer.map(|quantizer| quantizer.encode(x)).transpose()?.flatten();
        codes.ok_or_else(|| {
            let name = site.operand_name(operand);
            Error::internal(format!("{}: {name} has lost its integer form", site.path))
        })
    }
}

impl Executor for Integer<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        let Form::Linear(weight) = self.sites.form(&op.site) else {
            return self.simulated.linear(op, x);
        };
        let codes = self.encode(&op.site, Operand::Lhs, x)?;
        let bias = op.bias.as_ref().map(|bias| cpu_slices::floats(bias)).transpose()?;
        let mut shape = x.size();
        if let Some(last) = shape.last_mut() {
            *last = op.weight.size()[0];
        }
        cpu_slices::filled(&shape, |out| {
            kernels::product(&codes, weight, bias, out);
            Ok(())
        })
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let Form::Matmul = self.sites.form(site) else {
            return self.simulated.matmul(site, lhs, rhs);
        };
        let (b, heads, m, _) = lhs.size4()?;
        let n = rhs.size()[2];
        let left = self.encode(site, Operand::Lhs, lhs)?;
        let right = self.encode(site, Operand::Rhs, rhs)?;
        cpu_slices::filled(&[b, heads, m, n], |out| {
            kernels::product_batch(&left, &right, (b * heads) as usize, out);
            Ok(())
        })
    }
}
