//! UBB against the released code: quantizers and small models of tests/fixtures/platform.

use tch::{Device, Kind, Tensor};

use super::*;
use crate::methods::goldens::{self, Case};

fn cases(prefix: &str) -> Vec<Case> {
    goldens::cases("platform", |name| name.starts_with(prefix))
}

fn scalar(case: &Case, key: &str) -> f64 {
    case.get(key).double_value(&[])
}

fn assert_same(case: &Case, found: &Tensor, key: &str) {
    assert_eq!(found.size(), case.get(key).size(), "{} {key}", case.name);
    case.assert_close(found, key);
}

fn released() -> Settings {
    let given = [("variant".to_owned(), "released".to_owned())].into_iter().collect();
    Settings::read(&MethodOptions::resolve(OPTIONS, &given).unwrap(), false).unwrap()
}

fn never_stop() -> Result<()> {
    Ok(())
}

#[test]
fn weights_equal_the_released_code() {
    let cases = cases("weight_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let input = case.get("input");
        let per_row = case.meta["dim"].as_i64().is_some();
        let matrix = if per_row { input.shallow_clone() } else { input.view([1, -1]) };
        let (low, high) = quantile_range(&matrix, 1.0 - 1e-4).unwrap();
        let quantizer =
            Uniform::from_range(&Range { low, high }, case.bits(), MIN_WEIGHT_SCALE).unwrap();
        assert_same(&case, &quantizer.fake_quantize(&matrix).unwrap().view_as(input), "output");
        let parameter = case.get("delta");
        assert_same(&case, &quantizer.scale().view_as(parameter), "delta");
        assert!(
            quantizer.zero_point().view_as(parameter).equal(case.get("zero_point")),
            "{}",
            case.name
        );
    }
}

fn assert_scalars(case: &Case, found: &Scalars) {
    let close = |found: f64, key: &str| {
        let expected = scalar(case, key);
        assert!(
            (found - expected).abs() <= 1e-5 * expected.abs().max(1e-3),
            "{} {key}: {found} {expected}",
            case.name
        );
    };
    close(found.kappa, "coeff");
    close(found.mu, "mean");
    close(found.beta, "constraint");
    close(found.threshold, "threshold");
}

fn assert_token_bits(case: &Case, found: &Tensor, key: &str) {
    assert!(found.to_kind(Kind::Int).equal(case.get(key)), "{} {key}", case.name);
}

#[test]
fn linear_inputs_equal_the_released_code() {
    let cases = cases("act_");
    assert_eq!(cases.len(), 6);
    for case in cases {
        let post_gelu = case.meta["post_gelu"].as_bool().unwrap();
        let shift = if post_gelu { Shift::PostGelu } else { Shift::None };
        let input = case.get("calib_input");
        let quantizer = released().linear(input, case.bits(), shift, &never_stop).unwrap();
        assert_scalars(&case, &quantizer.scalars);
        if post_gelu {
            assert!((quantizer.rules.tau.unwrap() - scalar(&case, "threshold_shift")).abs() < 1e-6);
        }
        for phase in ["calib", "eval"] {
            let input = case.get(&format!("{phase}_input"));
            assert_same(
                &case,
                &quantizer.fake_quantize(input).unwrap(),
                &format!("{phase}_output"),
            );
            let bits = quantizer.allocation.token_bits(input, &quantizer.scalars).unwrap();
            assert_token_bits(&case, &bits, &format!("{phase}_token_bits"));
        }
    }
}

#[test]
fn attention_operands_equal_the_released_code() {
    let cases = cases("qkv_");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let windows = case.meta["windows_per_image"].as_i64().unwrap_or(1);
        let layout = TokenLayout::regrouped(windows);
        let input = case.get("calib_input");
        let quantizer = released().attention(input, case.bits(), layout, &never_stop).unwrap();
        assert_scalars(&case, &quantizer.scalars);
        for phase in ["calib", "eval"] {
            let input = case.get(&format!("{phase}_input"));
            assert_same(
                &case,
                &quantizer.fake_quantize(input).unwrap(),
                &format!("{phase}_output"),
            );
            let tokens = layout.to_tokens(input).unwrap();
            let bits = quantizer.allocation.token_bits(&tokens, &quantizer.scalars).unwrap();
            assert_token_bits(&case, &bits, &format!("{phase}_token_bits"));
        }
    }
}

#[test]
fn softmax_outputs_equal_the_released_code() {
    let cases = cases("softmax_");
    assert_eq!(cases.len(), 4);
    for case in cases {
        let windows = case.meta["windows_per_image"].as_i64().unwrap_or(1);
        let quantizer = Log2Row::new(case.bits(), ZeroCode::Extra, TokenLayout::regrouped(windows));
        for phase in ["calib", "eval"] {
            let output = quantizer.fake_quantize(case.get(&format!("{phase}_input"))).unwrap();
            case.assert_close(&output, &format!("{phase}_output"));
        }
    }
}

#[test]
fn statistics_of_a_constant_tensor_are_defined() {
    let x = Tensor::from_slice(&[2.5f32; 12]).view([2, 3, 2]);
    let found = statistics(&x).unwrap();
    assert_eq!((found.kappa, found.mu), (0.0, 2.5));
    let quantizer = Settings { released: false, ..released() };
    let quantizer = Settings { groups: 2, ..quantizer };
    let bits = BitWidth::new(4, "bits").unwrap();
    let quantizer = quantizer.linear(&x, bits, Shift::PostGelu, &never_stop).unwrap();
    assert_eq!(quantizer.scalars.beta, 0.0);
    assert!(quantizer.fake_quantize(&x).unwrap().equal(&x));
}

#[test]
fn the_median_is_the_lower_one() {
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 10.0]).view([1, 2, 2]);
    assert_eq!(statistics(&x).unwrap().mu, 2.0);
}

#[test]
fn eight_bits_are_not_mixed_unless_as_released() {
    let x = crate::quant::uniform::laws::sample(&[2, 9, 16], 1);
    for (settings, mixed) in
        [(released(), true), (Settings { released: false, ..released() }, false)]
    {
        let quantizer = settings.linear(&x, BitWidth::EIGHT, Shift::None, &never_stop).unwrap();
        let bits = quantizer.allocation.token_bits(&x, &quantizer.scalars).unwrap();
        let nominal = Tensor::full_like(&bits, 8.0);
        assert_eq!(!bits.equal(&nominal), mixed);
    }
    assert_eq!(x.device(), Device::Cpu);
}
