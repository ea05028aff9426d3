//! Pillow's antialiased 8-bit resampling: columns first, rounded to whole levels, then rows.
//!
//! Weights are rounded to 22 fractional bits as in Pillow; they and the levels are exact in
//! float32, and sums are good to 1e-5 of a level, so that only a sum that close to a half can
//! round differently. Four float32 lanes (R, G, B, unused) per pixel keep the inner loop simple
//! enough for the compiler to vectorise on any processor.

use super::RgbImage;

/// 2²²: Pillow's fixed-point weights.
const WEIGHT_ONE: f64 = 4_194_304.0;

/// A resampling kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// Half its width in source pixels, when not shrinking.
    pub(super) radius: f64,
    /// Its value at a distance ≥ 0.
    pub(super) value: fn(f64) -> f64,
}

/// The triangle kernel.
pub(super) const BILINEAR: Kernel = Kernel { radius: 1.0, value: |x| (1.0 - x).max(0.0) };

/// Keys' cubic convolution with a = −1/2.
pub(super) const BICUBIC: Kernel = Kernel {
    radius: 2.0,
    value: |x| match x {
        _ if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        _ if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5,
        _ => 0.0,
    },
};

/// What one axis of the result is made of.
#[derive(Debug)]
pub(super) struct Weights {
    /// First source pixel of each result pixel.
    first: Vec<usize>,
    /// `taps` weights for each result pixel, summing to one.
    values: Vec<f32>,
    /// Source pixels per result pixel; the same for all, filled up with zero weights.
    taps: usize,
}

/// Pixels `start..start + kept` of `source` pixels resized to `resized`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) source: u32,
    pub(super) resized: u32,
    pub(super) start: u32,
    pub(super) kept: u32,
}

impl Weights {
    /// The weights of the kept pixels; a span that is not resized copies.
    pub(super) fn new(kernel: Kernel, span: Span) -> Self {
        let source = span.source as usize;
        let scale = f64::from(span.source) / f64::from(span.resized);
        let stretch = scale.max(1.0);
        let radius = kernel.radius * stretch;
        let taps = (2 * radius.ceil() as usize + 1).min(source);
        let mut first = Vec::with_capacity(span.kept as usize);
        let mut values = Vec::with_capacity(span.kept as usize * taps);
        for at in span.start..span.start + span.kept {
            let center = (f64::from(at) + 0.5) * scale;
            let from = (center - radius + 0.5).max(0.0) as usize;
            let to = ((center + radius + 0.5) as usize).min(source);
            let weight = |x: usize| (kernel.value)((x as f64 - center + 0.5).abs() / stretch);
            let total: f64 = (from..to).map(weight).sum();
            // Windows at the far edge are shifted back so that all have `taps` pixels.
            let begin = from.min(source - taps);
            first.push(begin);
            values.extend((begin..begin + taps).map(|x| {
                let weight = if (from..to).contains(&x) { weight(x) / total } else { 0.0 };
                ((weight * WEIGHT_ONE).round() / WEIGHT_ONE) as f32
            }));
        }
        Self { first, values, taps }
    }

    /// First and one past the last source pixel that is used.
    fn reach(&self) -> (usize, usize) {
        let first = self.first.first().copied().unwrap_or(0);
        (first, self.first.last().map_or(0, |last| last + self.taps))
    }

    /// The first source pixel and the weights of each result pixel.
    fn iter(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.first.iter().copied().zip(self.values.chunks_exact(self.taps))
    }
}

/// Resamples an image along both axes.
pub(super) fn resample(image: &RgbImage, x: &Weights, y: &Weights) -> RgbImage {
    let (width, height) = (x.first.len(), y.first.len());
    let (top, bottom) = y.reach();
    let mut columns = vec![0; 3 * width * (bottom - top)];
    let mut lanes = vec![[0.0; 4]; image.width as usize];
    let rows = image.pixels.chunks_exact(3 * image.width as usize).skip(top);
    for (row, out) in rows.zip(columns.chunks_exact_mut(3 * width)) {
        resample_row(row, &mut lanes, x, out);
    }
    let mut pixels = vec![0; 3 * width * height];
    let mut sums = vec![0.0; 3 * width];
    for (out, (first, weights)) in pixels.chunks_exact_mut(3 * width).zip(y.iter()) {
        sums.fill(0.0);
        let rows = columns.chunks_exact(3 * width).skip(first - top);
        for (row, weight) in rows.zip(weights) {
            for (sum, level) in sums.iter_mut().zip(row) {
                *sum += weight * f32::from(*level);
            }
        }
        for (out, sum) in out.iter_mut().zip(&sums) {
            *out = level(*sum);
        }
    }
    RgbImage { width: width as u32, height: height as u32, pixels }
}

/// Resamples a row of RGB bytes; `lanes` is room for as many pixels as `row` has.
fn resample_row(row: &[u8], lanes: &mut [[f32; 4]], x: &Weights, out: &mut [u8]) {
    for (lane, pixel) in lanes.iter_mut().zip(row.chunks_exact(3)) {
        *lane = [pixel[0].into(), pixel[1].into(), pixel[2].into(), 0.0];
    }
    for (out, (first, weights)) in out.chunks_exact_mut(3).zip(x.iter()) {
        let mut sum = [0.0; 4];
        for (lane, weight) in lanes[first..first + weights.len()].iter().zip(weights) {
            for (sum, level) in sum.iter_mut().zip(lane) {
                *sum += weight * level;
            }
        }
        out.copy_from_slice(&[level(sum[0]), level(sum[1]), level(sum[2])]);
    }
}

/// The nearest level, halves upwards; out of range saturates.
fn level(value: f32) -> u8 {
    (value + 0.5) as u8
}
