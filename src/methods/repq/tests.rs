//! RepQ-ViT's quantizers against the released code: tests/fixtures/repq.

use tch::Tensor;

use super::*;
use crate::methods::goldens::{self, Case};
use crate::quant::Quantizer;
use crate::quant::uniform::Uniform;

fn cases(prefix: &str) -> Vec<Case> {
    goldens::cases("repq", |name| name.starts_with(prefix))
}

fn assert_grid(case: &Case, found: &Uniform, matrix: &Tensor) {
    case.assert_close(found.scale(), "delta");
    let zero_point = case.tensors["zero_point"].view_as(found.zero_point());
    assert!(found.zero_point().equal(&zero_point), "{}", case.name);
    case.assert_outputs(found, matrix);
}

/// The recipe without its scores, which have a test of their own.
fn rules() -> Recipe<'static> {
    recipe(CommonGrid::Mean, &|_, _| unreachable!())
}

#[test]
fn activations_per_tensor_equal_the_released_code() {
    let mut count = 0;
    for prefix in ["act_ln_tensor", "act_gelu", "act_qk"] {
        for case in cases(prefix) {
            let input = &case.tensors["input"];
            assert_grid(&case, &rules().per_tensor(input, case.bits()).unwrap(), input);
            count += 1;
        }
    }
    assert_eq!(count, 9);
}

#[test]
fn activations_per_channel_equal_the_released_code() {
    let cases = cases("act_ln_channel");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let channels = rules().per_channel(input, case.bits()).unwrap();
        assert_eq!(channels.constant_channels().unwrap(), 0);
        assert_grid(&case, &channels.grids, input);
    }
}

#[test]
fn weights_equal_the_released_code() {
    let cases = cases("weight_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let matrix = case.tensors["input"].view([64, -1]);
        assert_grid(&case, &rules().per_row(&matrix, case.bits()).unwrap(), &matrix);
    }
}

#[test]
fn scores_equal_the_released_code() {
    let cases = cases("softmax");
    assert_eq!(cases.len(), 3);
    for case in cases {
        let input = &case.tensors["input"];
        let found = LogSqrt2::search(input, case.bits(), ZeroCode::Extra).unwrap();
        let largest = Tensor::from_slice(&[found.state().scalars["largest"]]);
        case.assert_close(&largest, "delta");
        case.assert_outputs(&found, input);
    }
}
