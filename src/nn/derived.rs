//! A tensor that a layer computes from a parameter: a reordered kernel, a looked-up table.

use tch::Tensor;

use crate::error::Result;

/// Computed once at load; computed at each use while the parameter is being trained, because then it
/// changes between uses and needs gradients.
#[derive(Debug)]
pub struct Derived {
    parameter: Tensor,
    compute: fn(&Tensor) -> Result<Tensor>,
    value: Tensor,
}

impl Derived {
    /// `compute(parameter)`.
    ///
    /// # Errors
    /// Whatever `compute` reports.
    pub fn new(parameter: Tensor, compute: fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let value = compute(&parameter.f_detach()?)?;
        Ok(Self { parameter, compute, value })
    }

    /// The present value.
    ///
    /// # Errors
    /// Whatever the computation reports.
    pub fn get(&self) -> Result<Tensor> {
        if self.parameter.requires_grad() {
            (self.compute)(&self.parameter)
        } else {
            Ok(self.value.shallow_clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn a_trained_parameter_is_followed_and_gets_gradients() {
        let doubled = |x: &Tensor| Ok(x.f_mul_scalar(2.0)?);
        let fixed = Derived::new(Tensor::from_slice(&[1.0f32, 2.0]), doubled).unwrap();
        assert_eq!(fixed.get().unwrap(), Tensor::from_slice(&[2.0f32, 4.0]));
        let mut parameter = Tensor::from_slice(&[1.0f32, 2.0]).set_requires_grad(true);
        let trained = Derived::new(parameter.shallow_clone(), doubled).unwrap();
        for _ in 0..2 {
            let y = trained.get().unwrap();
            assert_eq!(y.detach(), parameter.detach() * 2.0);
            let gradients =
                Tensor::run_backward(&[y.sum(Kind::Float)], &[&parameter], false, false);
            assert_eq!(gradients[0], Tensor::from_slice(&[2.0f32, 2.0]));
            tch::no_grad(|| parameter += 1.0);
        }
    }
}
