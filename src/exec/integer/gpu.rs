//! Integer execution on a GPU. What lies between the products is libtorch's; bias, GELU and residual
//! belong to them.

use tch::Tensor;

use super::sites::{Cuda, Form, IntegerSites, encode};
use crate::error::Result;
use crate::exec::{Executor, Simulated, WeightSource};
use crate::kernels::cuda::{Epilogue, Gpu, GpuCodes, GpuWeight};
use crate::nn::{Linear, Operand, Site, gelu};
use crate::quant::QuantPlan;

/// Executes sites that have an integer form in integers on a GPU, and the others as [`Simulated`] does.
#[derive(Debug)]
pub struct IntegerOnGpu<'a> {
    gpu: &'a Gpu,
    plan: &'a QuantPlan,
    sites: &'a IntegerSites<Cuda>,
    simulated: Simulated<'a>,
}

impl<'a> IntegerOnGpu<'a> {
    /// An executor of `plan` with the forms and weights that a [`Packer`](crate::exec::Packer) found on
    /// that GPU.
    pub fn new(gpu: &'a Gpu, plan: &'a QuantPlan, sites: &'a IntegerSites<Cuda>) -> Self {
        Self { gpu, plan, sites, simulated: Simulated::new(plan, WeightSource::Decoded) }
    }

    fn encode(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<GpuCodes> {
        encode::<Cuda>(self.plan, (site, operand), x)
    }

    /// The linear of x [.., in] by its packed weight.
    fn packed(
        &self,
        (op, weight): (&Linear, &GpuWeight),
        x: &Tensor,
        epilogue: Epilogue<'_>,
    ) -> Result<Tensor> {
        let codes = self.encode(&op.site, Operand::Lhs, x)?;
        let epilogue = Epilogue { bias: op.bias.as_ref(), ..epilogue };
        Ok(self.gpu.product(&codes, weight, epilogue)?.f_reshape(op.output_shape(x))?)
    }
}

impl Executor for IntegerOnGpu<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => self.packed((op, weight), x, Epilogue::default()),
            Form::Matmul | Form::Simulated | Form::Float => self.simulated.linear(op, x),
        }
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        let Form::Matmul = self.sites.form(site) else {
            return self.simulated.matmul(site, lhs, rhs);
        };
        let (b, heads, m, _) = lhs.size4()?;
        let left = self.encode(site, Operand::Lhs, lhs)?;
        let right = self.encode(site, Operand::Rhs, rhs)?;
        let product = self.gpu.product_batch(&left, &right, b * heads)?;
        Ok(product.f_reshape([b, heads, m, rhs.size()[2]])?)
    }

    fn linear_gelu(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => {
                self.packed((op, weight), x, Epilogue { gelu: true, ..Epilogue::default() })
            }
            Form::Matmul | Form::Simulated | Form::Float => gelu(&self.simulated.linear(op, x)?),
        }
    }

    fn linear_add(&mut self, op: &Linear, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => {
                let epilogue = Epilogue { residual: Some(residual), ..Epilogue::default() };
                self.packed((op, weight), x, epilogue)
            }
            Form::Matmul | Form::Simulated | Form::Float => {
                Ok(residual.f_add(&self.simulated.linear(op, x)?)?)
            }
        }
    }
}
