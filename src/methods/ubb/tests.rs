//! Tests of the whole method live with the goldens (tests/ubb_goldens.rs); here: its statistics.

use tch::Tensor;

use super::statistics;

#[test]
fn statistics_of_a_constant_tensor_are_defined() {
    let x = Tensor::from_slice(&[2.5f32; 12]).view([2, 3, 2]);
    let found = statistics(&x).unwrap();
    assert_eq!((found.kappa, found.mu), (0.0, 2.5));
}

#[test]
fn the_median_is_the_lower_one() {
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 10.0]).view([1, 2, 2]);
    assert_eq!(statistics(&x).unwrap().mu, 2.0);
}
