//! A tap shows operands and outputs of the products on their way through another executor.

use tch::Tensor;

use crate::error::Result;
use crate::exec::Executor;
use crate::nn::{Linear, Operand, Site};

/// Receives what a [`Tap`] sees. Every method has an empty default.
pub trait TapSink {
    /// An operand, before the wrapped executor quantizes it.
    ///
    /// # Errors
    /// An error stops the forward pass.
    fn operand(&mut self, _site: &Site, _operand: Operand, _x: &Tensor) -> Result<()> {
        Ok(())
    }

    /// The product's result.
    ///
    /// # Errors
    /// An error stops the forward pass.
    fn output(&mut self, _site: &Site, _y: &Tensor) -> Result<()> {
        Ok(())
    }
}

/// Wraps an executor and shows each product to a sink.
pub struct Tap<'a> {
    inner: &'a mut dyn Executor,
    sink: &'a mut dyn TapSink,
}

impl<'a> Tap<'a> {
    /// Taps `inner` into `sink`.
    pub fn new(inner: &'a mut dyn Executor, sink: &'a mut dyn TapSink) -> Self {
        Self { inner, sink }
    }
}

impl Executor for Tap<'_> {
    fn linear(&mut self, op: &Linear, x: &Tensor) -> Result<Tensor> {
        self.sink.operand(&op.site, Operand::Lhs, x)?;
        self.sink.operand(&op.site, Operand::Rhs, &op.weight)?;
        let y = self.inner.linear(op, x)?;
        self.sink.output(&op.site, &y)?;
        Ok(y)
    }

    fn matmul(&mut self, site: &Site, lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
        self.sink.operand(site, Operand::Lhs, lhs)?;
        self.sink.operand(site, Operand::Rhs, rhs)?;
        let y = self.inner.matmul(site, lhs, rhs)?;
        self.sink.output(site, &y)?;
        Ok(y)
    }
}
