//! IGQ-ViT's quantizers: laws, assignment by hand, and the whole method on a small generated model.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::quant::Quantizer;
use crate::quant::uniform::laws::{
    images_are_independent, pass_is_exact, sample, state_round_trips, terms_add_up,
};
use crate::tensor::to_vec_f32;

fn bits(width: u32) -> BitWidth {
    BitWidth::new(width, "bits").unwrap()
}

fn rules(width: u32, bounds: Bounds) -> GridRules {
    GridRules { bits: bits(width), bounds, device: Device::Cpu }
}

/// An operand of every part, two windows per image, five images.
fn operands() -> Vec<(Layout, Tensor)> {
    let layout = |part| Layout { part, windows: 2 };
    let scores = (sample(&[10, 3, 6, 6], 5) * 6.0).softmax(-1, Kind::Float);
    let gains = sample(&[24], 9).exp();
    vec![
        (layout(Part::Channels), sample(&[10, 7, 24], 1) * gains + 0.2),
        (layout(Part::HeadChannels), sample(&[10, 3, 6, 8], 2)),
        (
            layout(Part::ValueChannels),
            sample(&[10, 3, 8, 6], 3).transpose(-2, -1).contiguous().transpose(-2, -1),
        ),
        (layout(Part::ScoreRows), scores),
    ]
}

fn grouped(layout: Layout, x: &Tensor, count: usize, rules: GridRules) -> Grouped {
    Grouped::new(layout, &cluster(&layout.extents(x).unwrap(), count), rules).unwrap()
}

#[test]
fn laws_hold_for_every_part() {
    for (layout, x) in operands() {
        for width in 3..=8 {
            let own = OwnRange { bits: bits(width), layout };
            let mean = grouped(layout, &x, 4, rules(width, Bounds::Mean));
            let max = grouped(layout, &x, 4, rules(width, Bounds::Max));
            for quantizer in [&own as &dyn Quantizer, &mean, &max] {
                terms_add_up(quantizer, &x);
                images_are_independent(quantizer, &x, 2);
                state_round_trips(quantizer, &x);
            }
        }
    }
}

#[test]
fn passes_give_the_same_bits() {
    for (layout, x) in operands() {
        for width in [3, 8] {
            let own = OwnRange { bits: bits(width), layout };
            pass_is_exact(&x.size(), |x| own.fake_quantize(x), |x| own.fake_quantize_by_tensors(x));
            for bounds in [Bounds::Mean, Bounds::Max] {
                let q = grouped(layout, &x, 4, rules(width, bounds));
                let definition = |x: &Tensor| q.fake_quantize_by_tensors(x);
                pass_is_exact(&x.size(), |x| q.fake_quantize(x), definition);
            }
        }
    }
    // One image, and more rows than a task looks at.
    let layout = Layout { part: Part::Channels, windows: 1 };
    let own = OwnRange { bits: bits(4), layout };
    let shape = [1, 197, 384];
    pass_is_exact(&shape, |x| own.fake_quantize(x), |x| own.fake_quantize_by_tensors(x));
}

#[test]
fn the_upper_bound_is_a_grid_of_each_parts_minimum_and_maximum() {
    let x = sample(&[6, 5, 4], 4); // three images of two windows
    let layout = Layout { part: Part::Channels, windows: 2 };
    let quantizer = OwnRange { bits: bits(4), layout };
    let found = quantizer.fake_quantize(&x).unwrap();
    for image in 0..3 {
        for channel in 0..4 {
            let part = |t: &Tensor| t.narrow(0, 2 * image, 2).select(-1, channel).contiguous();
            let range = Range::per_tensor(&part(&x)).unwrap();
            let grid = Uniform::from_range(&range, bits(4), 1e-12).unwrap();
            let expected = grid.fake_quantize(&part(&x)).unwrap();
            assert!(part(&found).allclose(&expected, 1e-6, 1e-7, false));
        }
    }
    let scores = (sample(&[2, 2, 5, 5], 5) * 6.0).softmax(-1, Kind::Float);
    let layout = Layout { part: Part::ScoreRows, windows: 1 };
    let term = OwnRange { layout, ..quantizer }.quantize(&scores).unwrap().unwrap().remove(0);
    let largest = scores.amax([-1i64].as_slice(), true);
    assert!(term.scale.allclose(&(largest / 15.0), 1e-6, 0.0, false));
    assert_eq!(term.zero_point.abs().max().int64_value(&[]), 0);
}

/// Bounds (0, 1), (−4, 4) and (−1, 1), four channels of two images.
#[test]
fn each_channel_of_each_image_takes_the_nearest_grid() {
    let extent = |low, high| Extent { low, high };
    let clusters = [extent(0.0, 1.0), extent(-4.0, 4.0), extent(-1.0, 1.0)]
        .map(|mean| clusters::Cluster { mean, hull: mean });
    let layout = Layout { part: Part::Channels, windows: 1 };
    let q = Grouped::new(layout, &clusters, rules(4, Bounds::Mean)).unwrap();
    // Tokens × channels: the second image's channels have other extents than the first's.
    let low = [[0.1f32, -0.9, -3.0, -0.5], [-5.0, 0.0, -0.4, -0.6]];
    let high = [[1.2f32, 0.8, 2.0, 1.0], [5.0, 0.0, 0.9, 1.0]];
    let rows: Vec<f32> = low
        .iter()
        .zip(high)
        .flat_map(|(l, h)| l.iter().copied().chain(h).collect::<Vec<_>>())
        .collect();
    let x = Tensor::from_slice(&rows).view([2, 2, 4]);
    let term = q.quantize(&x).unwrap().unwrap().remove(0);
    assert_eq!(term.scale.size(), [2, 1, 4]);
    let steps = [1.0f32 / 15.0, 8.0 / 15.0, 2.0 / 15.0];
    // (−0.5, 1) is as far from (0, 1) as from (−1, 1): the lowest number of equals.
    let expected = [0, 2, 1, 0, 1, 0, 0, 2].map(|group: usize| steps[group]);
    let found = to_vec_f32(&term.scale).unwrap();
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}

#[test]
fn windows_of_an_image_share_the_assignment() {
    let (layout, x) = operands().remove(0);
    let term =
        grouped(layout, &x, 6, rules(4, Bounds::Mean)).quantize(&x).unwrap().unwrap().remove(0);
    let scale = term.scale.view([5, 2, 24]);
    assert!(scale.select(1, 0).equal(&scale.select(1, 1)));
    assert!(!scale.get(0).equal(&scale.get(1)), "images differ");
}

#[test]
fn a_range_that_lacks_zero_is_widened_not_cut_off() {
    let x = sample(&[1, 40, 1], 6) * 0.1 + 5.0;
    let own = OwnRange { bits: bits(4), layout: Layout { part: Part::Channels, windows: 1 } };
    let term = own.quantize(&x).unwrap().unwrap().remove(0);
    assert_eq!(term.zero_point.int64_value(&[0, 0, 0]), 0);
    let worst = (own.fake_quantize(&x).unwrap() - &x).abs().max().double_value(&[]);
    assert!(worst <= 0.5001 * term.scale.double_value(&[0, 0, 0]), "{worst}");
}

#[test]
fn grids_span_the_members_or_their_mean() {
    // Channels (0, 1) and (0, 3) in one group.
    let x = Tensor::from_slice(&[0.0f32, 0.0, 1.0, 3.0]).view([1, 2, 2]);
    let layout = Layout { part: Part::Channels, windows: 1 };
    for (bounds, high) in [(Bounds::Mean, 2.0), (Bounds::Max, 3.0)] {
        let found = grouped(layout, &x, 1, rules(4, bounds)).fake_quantize(&x).unwrap();
        assert!((found.max().double_value(&[]) - high).abs() < 1e-6);
    }
}

#[test]
fn constants_are_exact_and_huge_values_finite() {
    let channel = |a: f32, b: f32| [a, b];
    let columns =
        [channel(7e4, 7e4), channel(-3.25, -3.25), channel(0.0, 0.0), channel(-3e38, 3e38)];
    let rows: Vec<f32> = (0..2).flat_map(|row| columns.map(|column| column[row])).collect();
    let x = Tensor::from_slice(&rows).view([1, 2, 4]);
    let layout = Layout { part: Part::Channels, windows: 1 };
    let own = OwnRange { bits: bits(4), layout };
    // Four groups for four channels: each is its own.
    let groups = grouped(layout, &x, 4, rules(4, Bounds::Mean));
    for quantizer in [&own as &dyn Quantizer, &groups] {
        let found = quantizer.fake_quantize(&x).unwrap();
        assert!(found.narrow(2, 0, 3).allclose(&x.narrow(2, 0, 3), 1e-6, 0.0, false));
        assert_eq!(found.isfinite().all().int64_value(&[]), 1);
        terms_add_up(quantizer, &x.narrow(2, 0, 3));
    }
}

#[test]
fn an_incomplete_state_is_corrupt() {
    let (layout, x) = operands().remove(0);
    let quantizer = grouped(layout, &x, 4, rules(4, Bounds::Mean));
    let broken = |change: &dyn Fn(&mut crate::quant::QuantizerState)| {
        let mut state = quantizer.state();
        change(&mut state);
        assert!(matches!(crate::methods::restore(&state), Err(Error::CorruptArtifact { .. })));
    };
    broken(&|state| drop(state.tensors.remove("high")));
    broken(&|state| *state.tensors.get_mut("scale").unwrap() = Tensor::from_slice(&[1.0f32]));
    broken(&|state| *state.scalars.get_mut("part").unwrap() = 4.0);
    broken(&|state| *state.scalars.get_mut("windows").unwrap() = 0.0);
}

#[test]
fn the_allocation_refuses_means_outside_its_candidates() {
    let read = |pairs: &[(&str, &str)]| {
        let given: BTreeMap<String, String> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Settings::read(&MethodOptions::resolve(OPTIONS, &given).unwrap())
    };
    for name in ["groups", "row_groups"] {
        for count in ["3", "17"] {
            let error = read(&[("allocation", "true"), (name, count)]).unwrap_err();
            assert!(error.to_string().starts_with(&format!("options.{name}: ")), "{error}");
            read(&[("allocation", "false"), (name, count)]).unwrap();
            read(&[("assignment", "upper_bound"), (name, count)]).unwrap();
        }
    }
}
