//! Integer execution: operands become codes, products are products of integers, and scales and zero
//! points come in at the end of each sum. The same numbers as [`Simulated`], summed in another order:
//! within a group of columns a sum has no rounding at all.
//!
//! A sum of integers is the same in any order, and what lies between products is computed row by row,
//! so that an image does not depend on its batch.

mod between;
mod blocks;
mod gpu;
mod sites;

use tch::Tensor;

use crate::error::Result;
use crate::exec::{AttentionTerms, Executor, ScoreTerms, Simulated, WeightSource, attention};
use crate::kernels::{self, Codes, Finish, PackedRhs, cpu_elementwise, cpu_slices};
use crate::nn::{Attention, LayerNorm, Linear, Mlp, Operand, Site};
use crate::quant::QuantPlan;

use sites::{Form, encode};

pub use gpu::IntegerOnGpu;
pub use sites::{Cpu, Cuda, IntegerSites, Kernels, Packer, SiteCounts};

/// Executes sites that have an integer form in integers, and the others as [`Simulated`] does.
#[derive(Debug)]
pub struct Integer<'a> {
    plan: &'a QuantPlan,
    sites: &'a IntegerSites<Cpu>,
    simulated: Simulated<'a>,
}

impl<'a> Integer<'a> {
    /// An executor of `plan` with the forms and weights that a [`Packer`] found.
    pub fn new(plan: &'a QuantPlan, sites: &'a IntegerSites<Cpu>) -> Self {
        Self { plan, sites, simulated: Simulated::new(plan, WeightSource::Decoded) }
    }

    fn encode(&self, site: &Site, operand: Operand, x: &Tensor) -> Result<Codes> {
        encode::<Cpu>(self.plan, (site, operand), x)
    }

    /// The linear of `x` by its packed weight, and what is done to parts of its rows at once.
    fn packed(
        &self,
        (op, weight): (&Linear, &PackedRhs),
        x: &Tensor,
        finish: Option<Finish<'_>>,
    ) -> Result<Tensor> {
        let codes = self.encode(&op.site, Operand::Lhs, x)?;
        let bias = op.bias.as_ref().map(cpu_slices::floats).transpose()?;
        cpu_slices::filled(&op.output_shape(x), |out| {
            kernels::product(&codes, weight, bias, finish, out);
            codes.recycle();
            Ok(())
        })
    }

    /// `lhs · rhsᵀ` [b, heads, m, n] in integers.
    fn multiplied(&self, site: &Site, [lhs, rhs]: [&Tensor; 2]) -> Result<Tensor> {
        let (b, heads, m, _) = lhs.size4()?;
        let shape = [b, heads, m, rhs.size()[2]];
        let left = self.encode(site, Operand::Lhs, lhs)?;
        let right = self.encode(site, Operand::Rhs, rhs)?;
        let matrices = usize::try_from(b * heads).unwrap_or(0);
        cpu_slices::filled(&shape, |out| {
            kernels::product_batch(&left, &right, matrices, out);
            left.recycle();
            right.recycle();
            Ok(())
        })
    }
}

impl Executor for Integer<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => self.packed((op, weight), x, None),
            Form::Matmul | Form::Simulated | Form::Float => self.simulated.linear(op, x),
        }
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        match self.sites.form(site) {
            Form::Matmul => self.multiplied(site, [lhs, rhs]),
            Form::Linear(_) | Form::Simulated | Form::Float => {
                self.simulated.matmul(site, lhs, rhs)
            }
        }
    }

    fn layer_norm(&mut self, norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
        between::layer_norm(norm, x)
    }

    fn linear_gelu(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        match self.sites.form(&op.site) {
            Form::Linear(weight) => {
                self.packed((op, weight), x, Some(&|_, _, part| cpu_elementwise::gelu(part)))
            }
            Form::Matmul | Form::Simulated | Form::Float => {
                between::changed(&self.simulated.linear(op, x)?, between::gelu)
            }
        }
    }

    fn linear_add(&mut self, op: &Linear, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        let Form::Linear(weight) = self.sites.form(&op.site) else {
            return Ok(residual.f_add(&self.simulated.linear(op, x)?)?);
        };
        let residual = residual.f_contiguous()?;
        let (residual, width) = (cpu_slices::floats(&residual)?, op.output_width());
        let add = |row: usize, column: usize, part: &mut [f32]| {
            cpu_elementwise::add(part, &residual[row * width + column..]);
        };
        self.packed((op, weight), x, Some(&add))
    }

    fn split_heads(&mut self, qkv: &Tensor, heads: i64) -> Result<[Tensor; 3]> {
        between::split_heads(qkv, heads)
    }

    fn attention_weights(
        &mut self,
        site: &Site,
        [q, k]: [&Tensor; 2],
        terms: &ScoreTerms<'_>,
    ) -> Result<Tensor> {
        let (_, heads, t, _) = q.size4()?;
        let softmax = between::Softmax::new(terms, heads, t)?;
        let softmax = softmax.rows()?;
        let scores = self.matmul(site, q, k)?;
        between::changed(&scores, |out| softmax.apply_to_all(out))
    }

    fn attention_mix(&mut self, site: &Site, weights: &Tensor, v: &Tensor) -> Result<Tensor> {
        between::merge_heads(&self.matmul(site, weights, &v.f_transpose(-2, -1)?)?)
    }

    fn add_attention(
        &mut self,
        norm: &LayerNorm,
        op: &Attention,
        terms: &AttentionTerms<'_>,
        x: &Tensor,
    ) -> Result<Tensor> {
        match self.attention_of_integers(norm, op, terms, x)? {
            Some(y) => Ok(y),
            None => attention::add_attention(self, norm, op, terms, x),
        }
    }

    fn add_mlp(&mut self, norm: &LayerNorm, op: &Mlp, x: &Tensor) -> Result<Tensor> {
        match self.mlp_of_integers(norm, op, x)? {
            Some(y) => Ok(y),
            None => attention::add_mlp(self, norm, op, x),
        }
    }
}
