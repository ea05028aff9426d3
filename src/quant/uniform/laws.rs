//! Shared laws of quantizers, used by the tests of every kind.

use super::*;
use crate::tensor::to_vec_f32;

/// Deterministic values with outliers, shape as given.
pub(crate) fn sample(shape: &[i64], seed: i64) -> Tensor {
    let n: i64 = shape.iter().product();
    let index = Tensor::arange(n, (Kind::Double, tch::Device::Cpu)) + (seed * 7919) as f64;
    let noise = (&index * 12.9898).sin() * 43758.5453;
    let uniform = &noise - noise.floor() - 0.5;
    let spread = (&index * 0.37).cos().square() * 4.0 + 0.1;
    (uniform * spread).to_kind(Kind::Float).view(shape)
}

/// `fake_quantize` equals the sum of the integer terms to float32 rounding.
pub(crate) fn terms_add_up(quantizer: &dyn Quantizer, x: &Tensor) {
    let fake = quantizer.fake_quantize(x).unwrap();
    let terms = quantizer.quantize(x).unwrap().expect("integer form");
    let mut sum = Tensor::zeros_like(&fake);
    for term in &terms {
        assert_eq!(term.codes.size(), x.size());
        sum += term.dequantize().unwrap();
    }
    let scale = fake.abs().max().double_value(&[]).max(1e-30);
    let worst = (&sum - &fake).abs().max().double_value(&[]);
    assert!(worst <= 1e-6 * scale, "terms differ from fake_quantize by {worst}");
    let (found, expected) = (quantizer.encode(x).unwrap(), quantizer.encode_by_tensors(x).unwrap());
    found.iter().for_each(Codes::check);
    // The same numbers; a pass may have them in other terms.
    let decoded = |codes: Option<Codes>| codes.map(|codes| codes.decoded());
    assert!(decoded(found) == decoded(expected), "codes differ from those of the terms");
}

/// The planes of static stairs, or of those relative to 1, the largest of x, are the terms of x̂.
pub(crate) fn planes_add_up(quantizer: &dyn Quantizer, x: &Tensor) {
    let relative = || quantizer.relative_stairs(x.size().try_into().unwrap()).unwrap();
    let stairs = quantizer.static_stairs().or_else(relative).unwrap();
    let values = to_vec_f32(&x.contiguous().view([-1])).unwrap();
    let mut counts = vec![0; values.len()];
    stairs.stairs.count(&values, &mut counts);
    let sum = |steps: u8| -> f64 {
        let planes = stairs.planes.iter();
        planes.map(|p| f64::from(p.codes[usize::from(steps)]) * f64::from(p.factor)).sum()
    };
    let expected = to_vec_f32(&quantizer.fake_quantize(x).unwrap().view([-1])).unwrap();
    for (steps, expected) in counts.into_iter().zip(expected) {
        assert!((sum(steps) - f64::from(expected)).abs() <= 1e-6, "{steps} steps: {expected}");
    }
}

/// Two images together give what they give apart, bit for bit.
pub(crate) fn images_are_independent(quantizer: &dyn Quantizer, x: &Tensor, rows_per_image: i64) {
    let together = quantizer.fake_quantize(x).unwrap();
    let images = x.size()[0] / rows_per_image;
    for image in 0..images {
        let alone = x.narrow(0, image * rows_per_image, rows_per_image);
        let alone = quantizer.fake_quantize(&alone).unwrap();
        let part = together.narrow(0, image * rows_per_image, rows_per_image);
        assert!(part.equal(&alone), "image {image} depends on its neighbours");
    }
}

/// The values are those without a gradient, the gradient is the definition's.
pub(crate) fn gradients_agree(quantizer: &dyn Quantizer, x: &Tensor) {
    assert!(quantizer.slope(x, x).unwrap().is_some(), "only the definition has a gradient");
    let weights = sample(&x.size(), 9);
    let gradient = |forward: &dyn Fn(&Tensor) -> Tensor| {
        let leaf = x.detach().copy().set_requires_grad(true);
        let y = forward(&leaf);
        (&y * &weights).sum(Kind::Float).backward();
        (y.detach(), leaf.grad())
    };
    let (values, found) = gradient(&|x| quantizer.fake_quantize(x).unwrap());
    let (_, expected) = gradient(&|x| quantizer.fake_quantize_by_tensors(x).unwrap());
    assert!(values.equal(&quantizer.fake_quantize(x).unwrap()), "a gradient changes the values");
    let worst = (&found - &expected).abs().max().double_value(&[]);
    assert!(worst <= 1e-5 * expected.abs().max().double_value(&[]), "gradients differ by {worst}");
    let flat = expected.eq(0.0).sum(Kind::Int64).int64_value(&[]);
    assert!(flat > 0 && flat < x.numel() as i64, "{flat} elements are beyond the grid");
}

/// Values that arithmetic stumbles over, in tensors of that shape.
pub(crate) fn awkward(shape: &[i64], seed: i64) -> Vec<Tensor> {
    let plain = sample(shape, seed);
    let with = |values: &[f32], every: usize| {
        let mut all = crate::tensor::to_vec_f32(&plain).unwrap();
        for (at, value) in values.iter().cycle().enumerate().take(all.len() / every + 1) {
            let at = (at * every + seed as usize) % all.len();
            all[at] = *value;
        }
        Tensor::from_slice(&all).view(shape)
    };
    let halves: Vec<f32> = (-40..40).map(|i| i as f32 * 0.05).collect();
    vec![
        plain.shallow_clone(),
        &plain * 1e30,
        &plain * 1e-39,
        plain.zeros_like(),
        -plain.zeros_like(),
        plain.full_like(-3.7),
        plain.abs(),
        -plain.abs() - 0.5,
        (&plain * 8.0).softmax(-1, Kind::Float),
        plain.gelu("none"),
        with(&[0.0, -0.0], 2),
        with(&[1e-40, -1e-40, 1e-45, f32::MIN_POSITIVE, 1e-8, 3.0], 3),
        with(&halves, 1),
        with(&[f32::NAN], 61),
        with(&[f32::INFINITY], 67),
        with(&[f32::NEG_INFINITY], 71),
        with(&[f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN], 53),
        with(&[f32::MAX, f32::MIN], 43),
    ]
}

/// A pass gives the bits of the definition (any NaN for a NaN), in either order of memory.
pub(crate) fn pass_is_exact(
    shape: &[i64],
    pass: impl Fn(&Tensor) -> Result<Tensor>,
    definition: impl Fn(&Tensor) -> Result<Tensor>,
) {
    let swapped = |x: &Tensor| x.transpose(-2, -1).contiguous().transpose(-2, -1);
    for (index, x) in awkward(shape, 1).into_iter().enumerate() {
        for x in [swapped(&x), x] {
            // Of the same order of memory: libtorch's sums depend on it.
            let (found, expected) = (pass(&x).unwrap(), definition(&x).unwrap());
            assert_eq!(found.size(), expected.size());
            let values = |x: &Tensor| crate::tensor::to_vec_f32(x).unwrap();
            let (found, expected) = (values(&found), values(&expected));
            for (at, (a, b)) in found.iter().zip(&expected).enumerate() {
                assert!(
                    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
                    "sample {index} of {shape:?}, element {at}: {a:e} for {b:e} of {:e}",
                    values(&x)[at]
                );
            }
        }
    }
}

/// Storing and restoring changes nothing.
pub(crate) fn state_round_trips(quantizer: &dyn Quantizer, x: &Tensor) {
    let restored = crate::methods::restore(&quantizer.state()).unwrap();
    let (before, after) = (quantizer.fake_quantize(x).unwrap(), restored.fake_quantize(x).unwrap());
    assert!(before.equal(&after));
    assert_eq!(restored.bits(), quantizer.bits());
}
