//! The quantizers of UBB: laws, shifts, codes, and passes against their tensor code.

use super::*;
use crate::quant::uniform::laws::{self, sample};
use crate::tensor::to_vec_f32;

const SCALARS: Scalars = Scalars { mu: 0.0, kappa: 0.2, beta: 1.4, threshold: 2.3 };

fn linear(tau: Option<f64>, groups: i64) -> UbbLinear {
    let bits = BitWidth::new(4, "bits").unwrap();
    UbbLinear {
        allocation: Allocation { bits, mixed: true, token0_priority: true, min_swaps: 1 },
        scalars: SCALARS,
        groups,
        rules: GridRules { tau, constants: ConstantRows::Exact },
    }
}

fn attention(layout: TokenLayout) -> UbbAttention {
    let bits = BitWidth::new(4, "bits").unwrap();
    let allocation = Allocation { bits, mixed: true, token0_priority: false, min_swaps: 0 };
    UbbAttention { allocation, scalars: SCALARS, layout, constants: ConstantRows::Exact }
}

#[test]
fn laws_hold_for_linear_inputs() {
    let x = sample(&[5, 9, 24], 1);
    for tau in [None, Some(0.0), Some(0.4), Some(1.0)] {
        for groups in [1, 4, 8] {
            let q = linear(tau, groups);
            let x = if tau.is_some() { x.gelu("none") } else { x.shallow_clone() };
            laws::terms_add_up(&q, &x);
            laws::images_are_independent(&q, &x, 1);
            laws::state_round_trips(&q, &x);
        }
    }
}

#[test]
fn laws_hold_for_attention_operands() {
    for windows in [1, 4] {
        let x = sample(&[3 * windows, 2, 6, 8], 2);
        let q = attention(TokenLayout::regrouped(windows));
        laws::terms_add_up(&q, &x);
        laws::images_are_independent(&q, &x, windows);
        laws::state_round_trips(&q, &x);
    }
}

#[test]
fn passes_give_the_same_bits() {
    for (tau, groups, shape) in [
        (None, 4, [3, 9, 24]),
        (None, 1, [1, 1, 7]),
        (None, 8, [2, 197, 384]),
        (Some(0.0), 8, [2, 9, 24]),
        (Some(0.4), 2, [3, 50, 96]),
        (Some(1.0), 4, [1, 33, 36]),
    ] {
        for q in [
            linear(tau, groups),
            UbbLinear { scalars: Scalars { beta: 0.0, ..SCALARS }, ..linear(tau, groups) },
        ] {
            for constants in [ConstantRows::Exact, ConstantRows::SmallestScale] {
                let q = UbbLinear { rules: GridRules { constants, ..q.rules }, ..q.clone() };
                let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                laws::pass_is_exact(&shape, |x| q.fake_quantize(x), definition);
            }
        }
    }
    for (layout, shape) in [
        (TokenLayout::PLAIN, [2, 3, 9, 8]),
        (TokenLayout::PLAIN, [1, 6, 197, 64]),
        (TokenLayout::PER_HEAD, [2, 3, 7, 5]),
        (TokenLayout::regrouped(4), [8, 2, 6, 8]),
        (TokenLayout::regrouped(16), [16, 3, 5, 7]),
    ] {
        let q = attention(layout);
        let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
        laws::pass_is_exact(&shape, |x| q.fake_quantize(x), definition);
    }
}

#[test]
fn codes_of_groups_of_one_sign_fit_their_bits() {
    let negative = sample(&[2, 9, 16], 1).abs() * 0.001 + 0.16;
    for x in [-&negative, negative, sample(&[2, 9, 16], 1).gelu("none")] {
        let q = linear(Some(0.4), 4);
        laws::terms_add_up(&q, &x);
        for term in q.quantize(&x).unwrap().unwrap() {
            let (least, largest) = (term.codes.min(), term.codes.max());
            assert!(least.int64_value(&[]) >= 0 && largest.int64_value(&[]) <= 31);
        }
    }
}

#[test]
fn signs_that_fit_a_byte_are_one_term() {
    // Rows whose positive values are as large as the negative ones, and much larger.
    let reach = Tensor::from_slice(&[0.1f32, 1.0, 30.0]).view([1, 3, 1]);
    let x = sample(&[2, 3, 16], 1) * reach;
    let x = x.maximum(&Tensor::from(-0.17f32));
    let (dense, grids) = linear(Some(1.0), 4).pass(&x).unwrap().unwrap();
    let stretches = grids.stretches.as_ref().unwrap();
    let codes = |fold: bool| {
        let mut planes = Planes::of(&dense, 4, 5).unwrap().unwrap();
        for sign in grids.encode_signs(dense.values().unwrap(), stretches, fold) {
            planes.push_up_to(u8::MAX, sign);
        }
        planes.finish()
    };
    let (folded, apart) = (codes(true), codes(false));
    assert_eq!(folded.decoded(), apart.decoded());
    let small = |codes: &Codes| codes.terms.iter().all(|t| t.codes.iter().all(|code| *code < 32));
    assert!(small(&apart) && !small(&folded));
    let is_used = |term: &[u8]| term.iter().any(|code| *code != 0);
    let used: Vec<bool> = folded.terms[1].codes.chunks(16).map(is_used).collect();
    assert!(used.contains(&false), "no token has one term");
    assert!(used.contains(&true), "no token is beyond a byte");
}

#[test]
fn what_is_found_at_run_time_is_counted() {
    let shape = [1, 9, 24];
    let plain = linear(None, 8).cost(&shape);
    assert_eq!((plain.element_bits, plain.partial_sums), (4.0, 8.0));
    // Nine tokens: a width each, and eight grids.
    assert_eq!(plain.metadata_bits, 9.0 * (2.0 + 8.0 * 64.0));
    // Ranges and densities of 216 values, and a sort of nine tokens.
    assert_eq!(plain.operations, 4.0 * 216.0 + 9.0 * 4.0);
    let shifted = linear(Some(0.4), 8).cost(&shape);
    assert_eq!(shifted.partial_sums, 16.0);
    assert_eq!(shifted.metadata_bits, plain.metadata_bits + 9.0 * 8.0 * 4.0);
    // One grid per token of four quadrants, over all heads and the windows of a quadrant.
    let windows = attention(TokenLayout::regrouped(16)).cost(&[16, 2, 6, 8]);
    assert_eq!((windows.metadata_bits, windows.partial_sums), (24.0 * 66.0, 1.0));
    let fixed = Allocation { mixed: false, ..linear(None, 8).allocation };
    assert_eq!(fixed.cost(&shape, 9.0).metadata_bits, 0.0);
}

#[test]
fn permuting_the_tokens_of_v_leaves_its_scales() {
    // vᵀ is [b, h, d, tokens]: its "tokens" are the head channels d.
    let v = sample(&[2, 3, 4, 7], 3);
    let permuted = v.index_select(3, &Tensor::from_slice(&[6i64, 2, 0, 5, 1, 3, 4]));
    let scale =
        |v: &Tensor| attention(TokenLayout::PLAIN).quantize(v).unwrap().unwrap().remove(0).scale;
    assert!(scale(&v).equal(&scale(&permuted)));
    let mut scaled = v.copy();
    let _ = scaled.narrow(2, 1, 1).fill_(0.0);
    scaled = scaled.contiguous();
    let changed = scale(&v).ne_tensor(&scale(&scaled)).squeeze().to_kind(Kind::Int64);
    // Bits of the others may move with the ranking; with a fixed allocation only row 1 changes.
    assert_eq!(changed.select(1, 1).sum(Kind::Int64).int64_value(&[]), 2);
}

#[test]
fn scaling_one_head_channel_changes_only_its_scale_without_mixing() {
    let v = sample(&[2, 3, 4, 7], 3);
    let mut q = attention(TokenLayout::PLAIN);
    q.allocation.mixed = false;
    let factor = Tensor::from_slice(&[1.0f32, 3.0, 1.0, 1.0]).view([1, 1, 4, 1]);
    let scale = |v: &Tensor| q.quantize(v).unwrap().unwrap().remove(0).scale;
    let ratio = scale(&(&v * &factor)) / scale(&v);
    assert!(ratio.allclose(&factor.expand([2, 1, 4, 1], false), 1e-5, 1e-6, false));
}

#[test]
fn the_shift_handles_every_sign_pattern() {
    let rows: [[f32; 4]; 6] = [
        [0.5, 1.0, 2.0, 3.0],     // all positive
        [-0.5, -1.0, -0.1, -0.2], // all negative
        [0.0, 1.0, 2.0, 0.5],     // lo = 0
        [-1e-30, 1.0, 2.0, 0.5],  // tiny lo: the shift is capped
        [0.0, 0.0, 0.0, 0.0],     // constant
        [-0.17, 3.0, 1.0, -0.05], // the usual post-GELU group
    ];
    let flat: Vec<f32> = rows.iter().flatten().copied().collect();
    let x = Tensor::from_slice(&flat).view([1, 6, 4]);
    for tau in [0.0, 0.5, 1.0] {
        let q = linear(Some(tau), 1);
        let y = q.fake_quantize(&x).unwrap();
        assert!(y.isfinite().all().int64_value(&[]) == 1);
        let error = to_vec_f32(&(&y - &x).abs().amax([-1i64].as_slice(), false)).unwrap();
        // 3 bits is the least that a token can get: half a step of the row's range.
        for (row, error) in rows.iter().zip(&error) {
            let high = row.iter().copied().fold(f32::MIN, f32::max);
            let low = row.iter().copied().fold(f32::MAX, f32::min);
            let widest = (high - low).max(2.0 * high * tau as f32 + high);
            assert!(*error <= 0.51 * widest / 7.0 + 1e-6, "{row:?}: {error}");
        }
        laws::terms_add_up(&q, &x);
    }
    let range = Range { low: Tensor::from_slice(&[-0.17f32]), high: Tensor::from_slice(&[3.0f32]) };
    // −τ·hi/lo = 17.6 → log2 = 4.1 → s = 4
    assert_eq!(shift_exponent(&range, 1.0).unwrap().double_value(&[0]), 4.0);
}
