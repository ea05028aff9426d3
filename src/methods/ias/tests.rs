//! I&S-ViT's quantizers against the released code: tests/fixtures/ias.

use tch::Tensor;

use super::*;
use crate::methods::goldens::{self, Case};
use crate::quant::Quantizer;

fn cases(prefix: &str) -> Vec<Case> {
    goldens::cases("ias", |name| name.starts_with(prefix))
}

/// The recipe without its scores, which have a test of their own.
fn rules() -> Recipe<'static> {
    recipe(Variant::Released, &|_, _| unreachable!())
}

#[test]
fn weights_equal_the_released_code() {
    let cases = cases("weight_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let matrix = case.tensors["input"].view([64, -1]);
        let grid = rules().per_row(&matrix, case.bits()).unwrap();
        case.assert_close(grid.scale(), "delta");
        case.assert_outputs(&grid, &matrix);
    }
}

#[test]
fn scores_equal_the_released_code() {
    let cases = cases("softmax");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let found = ShiftUniformLog2::search(input, case.bits(), Levels::Released).unwrap();
        let scalar = |name: &str| found.state().scalars[name];
        case.assert_close(&Tensor::from_slice(&[scalar("shift")]), "delta");
        // Together, because the logarithm of the largest score is nearly zero.
        let ends = Tensor::stack(&[case.get("minv"), case.get("maxv")], 0);
        case.assert_values(
            &Tensor::from_slice(&[scalar("low"), scalar("high")]),
            &ends,
            ("ends", 0.0),
        );
        case.assert_outputs(&found, input);
        // As scored, each value is at least as close on average as on any other shift's grid.
        let corrected = ShiftUniformLog2::search(input, case.bits(), Levels::Corrected).unwrap();
        assert_eq!(corrected.state().scalars["shift"], found.state().scalars["shift"]);
    }
}
