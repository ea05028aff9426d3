//! The searches against the released code: tests/fixtures/ptq4vit, layers with given inputs and
//! gradients. (Its whole models use gradients of rounding noise, which nothing can repeat.)

use tch::Kind;

use super::fit::{OperandFit, Parts};
use super::grid::{Factors, Grid, GridShape, Ratio};
use super::twin_softmax::Overlap;
use super::*;
use crate::methods::goldens::{self, Case, FLIPPED_OF_PRODUCT};
use crate::tensor::to_vec_f32;

/// The released search.
const FACTORS: Factors = Factors { low: 0.01, high: 1.2, count: 100 };
const ROUNDS: i64 = 3;

fn cases(prefix: &str) -> Vec<Case> {
    let cases = goldens::cases("ptq4vit", |name| name.rsplit_once("_b").unwrap().0 == prefix);
    assert_eq!(cases.len(), 2, "{prefix}");
    cases
}

/// How the two operands of a case are quantized.
struct Grids {
    lhs: Option<(GridShape, Parts)>,
    rhs: (GridShape, Parts),
    order: [Operand; 2],
}

impl Case {
    fn search(&self, lhs: Tensor, rhs: Tensor, grids: &Grids) -> Found<'_> {
        let output = lhs.matmul(&rhs.transpose(-2, -1));
        let gradient = self.get("raw_grad").abs();
        let importance = Some(if gradient.size() == output.size() {
            gradient
        } else {
            gradient.flatten(-2, -1).transpose(-2, -1) // a convolution's [images, out, h, w]
        });
        let product = Product { lhs, rhs, output, importance };
        let fit = |x: &Tensor, (shape, parts): (GridShape, Parts)| {
            OperandFit::new(x, Grid { shape, bits: self.bits() }, parts, &FACTORS).unwrap()
        };
        let mut site = SiteFit {
            lhs: grids.lhs.map(|grid| fit(&product.lhs, grid)),
            rhs: Some(fit(&product.rhs, grids.rhs)),
        };
        let schedule = Schedule { order: grids.order, rounds: ROUNDS };
        site.search(&product, schedule, &|| Ok(())).unwrap();
        Found { case: self, site }
    }
}

struct Found<'a> {
    case: &'a Case,
    site: SiteFit,
}

impl Found<'_> {
    fn fit(&self, operand: Operand) -> &OperandFit {
        match operand {
            Operand::Lhs => self.site.lhs.as_ref().unwrap(),
            Operand::Rhs => self.site.rhs.as_ref().unwrap(),
        }
    }

    /// The scales are the released code's.
    fn assert_scales(&self, operand: Operand, key: &str) {
        let found = self.fit(operand).scales();
        let expected = to_vec_f32(self.case.get(key)).unwrap();
        assert_eq!(found.len(), expected.len(), "{} {key}", self.case.name);
        for (found, expected) in found.iter().zip(&expected) {
            let difference = (found - expected).abs();
            assert!(difference <= 1e-6 * expected, "{} {key}: {found} {expected}", self.case.name);
        }
    }

    fn assert_output(&self, lhs: &Tensor, rhs: &Tensor, bias: Option<&Tensor>) {
        let round = |fit: Option<&OperandFit>, x: &Tensor| match fit {
            Some(fit) => fit.quantizer(x).unwrap().fake_quantize(x).unwrap(),
            None => x.shallow_clone(),
        };
        let lhs = round(self.site.lhs.as_ref(), lhs);
        let rhs = round(self.site.rhs.as_ref(), rhs);
        let mut output = lhs.matmul(&rhs.transpose(-2, -1));
        if let Some(bias) = bias {
            output += bias;
        }
        let expected = self.case.get("eval_output");
        let expected = if expected.size() == output.size() {
            expected.shallow_clone()
        } else {
            expected.flatten(-2, -1).transpose(-2, -1)
        };
        self.case.assert_values(&output, &expected, ("eval_output", FLIPPED_OF_PRODUCT));
    }
}

fn linear(prefix: &str, input: GridShape, groups: i64) {
    let grids = Grids {
        lhs: Some((input, Parts::Whole)),
        rhs: (GridShape::Symmetric, Parts::RowGroups(groups)),
        order: [Operand::Rhs, Operand::Lhs],
    };
    for case in cases(prefix) {
        let weight = case.get("weight");
        let found = case.search(case.get("raw_input").copy(), weight.copy(), &grids);
        found.assert_scales(Operand::Rhs, "w_interval");
        found.assert_scales(Operand::Lhs, "a_interval");
        found.assert_output(case.get("eval_input"), weight, Some(case.get("bias")));
    }
}

#[test]
fn linear_scales_equal_the_released_code() {
    linear("linear", GridShape::Symmetric, 1);
}

#[test]
fn qkv_scales_equal_the_released_code() {
    linear("linear_qkv", GridShape::Symmetric, 3);
}

#[test]
fn post_gelu_scales_equal_the_released_code() {
    linear("linear_gelu", GridShape::TwinGelu(Ratio::Free), 1);
    for case in cases("linear_gelu") {
        let expected = case.get("a_neg_interval").double_value(&[]);
        assert!((twin_gelu::negative_scale(case.bits()) - expected).abs() < 1e-8);
    }
}

#[test]
fn query_and_key_scales_equal_the_released_code() {
    let both = (GridShape::Symmetric, Parts::Heads);
    let grids = Grids { lhs: Some(both), rhs: both, order: [Operand::Lhs, Operand::Rhs] };
    for case in cases("matmul_qk") {
        let rhs = |key: &str| case.get(key).transpose(-2, -1);
        let found = case.search(case.get("raw_A").copy(), rhs("raw_B"), &grids);
        found.assert_scales(Operand::Lhs, "A_interval");
        found.assert_scales(Operand::Rhs, "B_interval");
        found.assert_output(case.get("eval_A"), &rhs("eval_B"), None);
    }
}

#[test]
fn split_points_and_value_scales_equal_the_released_code() {
    for case in cases("matmul_scorev") {
        let grids = Grids {
            lhs: Some((GridShape::TwinSoftmax(Overlap::Released), Parts::Whole)),
            rhs: (GridShape::Symmetric, Parts::Heads),
            order: [Operand::Lhs, Operand::Rhs],
        };
        let rhs = |key: &str| case.get(key).transpose(-2, -1);
        let found = case.search(case.get("raw_A").copy(), rhs("raw_B"), &grids);
        found.assert_scales(Operand::Lhs, "split");
        found.assert_scales(Operand::Rhs, "B_interval");
        found.assert_output(case.get("eval_A"), &rhs("eval_B"), None);
    }
}

#[test]
fn stem_scales_equal_the_released_code() {
    let grids = Grids {
        lhs: None,
        rhs: (GridShape::Symmetric, Parts::Rows),
        order: [Operand::Rhs, Operand::Lhs],
    };
    for case in cases("conv") {
        let weight = case.get("weight");
        let patch = weight.size()[3];
        let patches = |key: &str| {
            let side = [patch, patch];
            let (x, side) = (case.get(key), side.as_slice());
            x.im2col(side, [1i64, 1].as_slice(), [0i64, 0].as_slice(), side).transpose(-2, -1)
        };
        let matrix = weight.flatten(1, -1);
        let found = case.search(patches("raw_input"), matrix.copy(), &grids);
        found.assert_scales(Operand::Rhs, "w_interval");
        found.assert_output(&patches("eval_input"), &matrix, Some(case.get("bias")));
    }
}

#[test]
fn exclusive_ranges_lose_less_than_the_released_ones() {
    for case in cases("matmul_scorev") {
        let scores = case.get("raw_A");
        let values = case.get("raw_B").transpose(-2, -1);
        let error = |overlap| {
            let grids = Grids {
                lhs: Some((GridShape::TwinSoftmax(overlap), Parts::Whole)),
                rhs: (GridShape::Symmetric, Parts::Heads),
                order: [Operand::Lhs, Operand::Rhs],
            };
            let found = case.search(scores.copy(), values.copy(), &grids);
            let rounded = found.fit(Operand::Lhs).quantizer(scores).unwrap();
            let difference = rounded.fake_quantize(scores).unwrap() - scores;
            difference.square().sum(Kind::Double).double_value(&[])
        };
        assert!(error(Overlap::Exclusive) < error(Overlap::Released), "{}", case.name);
    }
}
