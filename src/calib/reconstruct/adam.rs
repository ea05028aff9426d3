//! Adam (arXiv 1412.6980) with PyTorch's defaults and order of operations, and the cosine schedule.

use std::f64::consts::PI;

use tch::Tensor;

use crate::error::Result;

const BETA1: f64 = 0.9;
const BETA2: f64 = 0.999;
const EPS: f64 = 1e-8;

/// The optimizer's state: two running moments per parameter.
#[derive(Debug)]
pub(super) struct Adam {
    parameters: Vec<Tensor>,
    moments: Vec<(Tensor, Tensor)>,
    steps: i32,
}

impl Adam {
    /// Moments of zero for `parameters`, which are changed in place.
    pub(super) fn new(parameters: Vec<Tensor>) -> Result<Self> {
        let zeros = |x: &Tensor| Ok((x.f_zeros_like()?, x.f_zeros_like()?));
        let moments = parameters.iter().map(zeros).collect::<Result<_>>()?;
        Ok(Self { parameters, moments, steps: 0 })
    }

    /// What is trained.
    pub(super) fn parameters(&self) -> &[Tensor] {
        &self.parameters
    }

    /// One step; `gradients` in the parameters' order. A parameter that the loss does not depend on
    /// has an undefined gradient and stays.
    pub(super) fn step(&mut self, gradients: &[Tensor], learning_rate: f64) -> Result<()> {
        self.steps += 1;
        let (first, second) = (1.0 - BETA1.powi(self.steps), 1.0 - BETA2.powi(self.steps));
        let states = self.parameters.iter_mut().zip(&mut self.moments).zip(gradients);
        for ((parameter, (mean, square)), gradient) in states {
            if !gradient.defined() {
                continue;
            }
            // In-place operations return another handle of their first operand.
            let _ = mean.f_lerp_(gradient, 1.0 - BETA1)?;
            let _ = square.f_lerp_(&gradient.f_square()?, 1.0 - BETA2)?;
            let mut root = square.f_sqrt()?;
            let _ = root.f_div_scalar_(second.sqrt())?.f_add_scalar_(EPS)?;
            let update = mean.f_div(&root)?.f_mul_scalar(learning_rate / first)?;
            let _ = parameter.f_sub_(&update)?;
        }
        Ok(())
    }
}

/// Cosine decay from `initial` to 0: ½·initial·(1 + cos(π·iteration/iterations)).
pub(super) fn cosine(initial: f64, iteration: usize, iterations: usize) -> f64 {
    0.5 * initial * (1.0 + (PI * iteration as f64 / iterations as f64).cos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::to_vec_f64;

    /// torch.optim.Adam(lr=0.1) on (x − [1, −2])² from 0 under CosineAnnealingLR(T_max=4).
    #[test]
    fn steps_are_those_of_pytorch() {
        let target = Tensor::from_slice(&[1.0f64, -2.0]);
        let mut adam = Adam::new(vec![target.zeros_like()]).unwrap();
        let expected = [
            [0.1, -0.1],
            [0.185_003_48, -0.185_213_23],
            [0.234_476_69, -0.235_005_38],
            [0.248_874_70, -0.249_553_54],
        ];
        for (iteration, expected) in expected.iter().enumerate() {
            let gradient = (&adam.parameters()[0] - &target) * 2.0;
            adam.step(&[gradient], cosine(0.1, iteration, 4)).unwrap();
            let found = to_vec_f64(&adam.parameters()[0]).unwrap();
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-6, "{iteration}: {found} {expected}");
            }
        }
        adam.step(&[Tensor::new()], 1.0).unwrap();
        assert!((adam.parameters()[0].double_value(&[0]) - expected[3][0]).abs() < 1e-6);
    }

    #[test]
    fn the_rate_falls_from_its_start_to_zero() {
        assert_eq!(cosine(2.0, 0, 10), 2.0);
        assert!((cosine(2.0, 5, 10) - 1.0).abs() < 1e-12);
        assert!(cosine(2.0, 9, 10) < 0.05);
    }
}
