//! Pillow's antialiased 8-bit resampling: columns first, rounded to whole levels, then rows.
//!
//! Weights are rounded to 22 fractional bits as in Pillow; they and the levels are exact in
//! float32, and sums are good to 1e-4 of a level. A sum closer than that to a rounding boundary is
//! computed again in Pillow's integers, so that every level is Pillow's. Four float32 lanes (R, G,
//! B, unused) per pixel keep the inner loop simple enough for the compiler to vectorise on any
//! processor.

use super::RgbImage;
use super::pixel_buffer::PixelBuffer;

/// Fractional bits of Pillow's fixed-point weights.
const WEIGHT_BITS: u32 = 22;

/// Distance of a float32 sum from a rounding boundary below which integers decide: several times
/// the rounding errors of a sum of some dozen products.
const DOUBTFUL: f32 = 1e-3;

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
    /// Each weight four times, once for each lane of a pixel.
    lanes: Vec<[f32; 4]>,
    /// The same weights as Pillow's fixed-point integers.
    exact: Vec<i32>,
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
        let windows = (span.start..span.start + span.kept).map(|at| {
            let center = (f64::from(at) + 0.5) * scale;
            let from = (center - radius + 0.5).max(0.0) as usize;
            (center, from, ((center + radius + 0.5) as usize).min(source))
        });
        let taps = windows.clone().map(|(_, from, to)| to - from).max().unwrap_or(0);
        let mut first = Vec::with_capacity(span.kept as usize);
        let mut exact = Vec::with_capacity(span.kept as usize * taps);
        for (center, from, to) in windows {
            // Operations in Pillow's order: another order can move a weight's last bit.
            let weight =
                |x: usize| (kernel.value)(((x as f64 - center + 0.5) * (1.0 / stretch)).abs());
            let total: f64 = (from..to).map(weight).sum();
            // Windows at the far edge are shifted back so that all have `taps` pixels.
            let begin = from.min(source - taps);
            first.push(begin);
            exact.extend((begin..begin + taps).map(|x| {
                let weight = if (from..to).contains(&x) { weight(x) / total } else { 0.0 };
                (weight * f64::from(1 << WEIGHT_BITS)).round() as i32
            }));
        }
        let values: Vec<f32> =
            exact.iter().map(|weight| *weight as f32 / (1 << WEIGHT_BITS) as f32).collect();
        let lanes = values.iter().map(|weight| [*weight; 4]).collect();
        Self { first, values, lanes, exact, taps }
    }

    /// First and one past the last source pixel that is used.
    fn reach(&self) -> (usize, usize) {
        let first = self.first.first().copied().unwrap_or(0);
        (first, self.first.last().map_or(0, |last| last + self.taps))
    }

    /// The first source pixel and the weights of each result pixel.
    fn iter(&self) -> impl Iterator<Item = Taps<'_>> {
        let weights = self.values.chunks_exact(self.taps).zip(self.exact.chunks_exact(self.taps));
        self.first.iter().zip(weights).map(|(first, (weights, exact))| Taps {
            first: *first,
            weights,
            exact,
        })
    }
}

/// What one result pixel of an axis is made of.
#[derive(Clone, Copy)]
struct Taps<'a> {
    first: usize,
    weights: &'a [f32],
    exact: &'a [i32],
}

/// Resamples an image along both axes.
pub(super) fn resample(image: &RgbImage, x: &Weights, y: &Weights) -> RgbImage {
    let (width, height) = (x.first.len(), y.first.len());
    let (top, bottom) = y.reach();
    let mut columns = PixelBuffer::zeroed(3 * width * (bottom - top));
    let mut lanes = vec![[0.0; 4]; image.width as usize];
    // One more than a row has: pixels are written with their unused lane.
    let mut sums = vec![0.0; 3 * width + 1];
    let rows = image.pixels.chunks_exact(3 * image.width as usize).skip(top);
    for (row, out) in rows.zip(columns.chunks_exact_mut(3 * width)) {
        sum_row(row, &mut lanes, x, &mut sums);
        round(&sums[..3 * width], out, |at| {
            let (start, exact) = (x.first[at / 3], &x.exact[at / 3 * x.taps..][..x.taps]);
            exact_level(row[3 * start + at % 3..].iter().step_by(3).copied(), exact)
        });
    }
    let mut pixels = PixelBuffer::zeroed(3 * width * height);
    let sums = &mut sums[..3 * width];
    for (out, taps) in pixels.chunks_exact_mut(3 * width).zip(y.iter()) {
        sums.fill(0.0);
        let source = &columns[3 * width * (taps.first - top)..];
        for (row, weight) in source.chunks_exact(3 * width).zip(taps.weights) {
            for (sum, level) in sums.iter_mut().zip(row) {
                *sum += weight * f32::from(*level);
            }
        }
        round(sums, out, |at| {
            exact_level(source[at..].iter().step_by(3 * width).copied(), taps.exact)
        });
    }
    RgbImage { width: width as u32, height: height as u32, pixels }
}

/// Weighted sums of a row of RGB bytes; `lanes` is room for as many pixels as `row` has.
fn sum_row(row: &[u8], lanes: &mut [[f32; 4]], x: &Weights, sums: &mut [f32]) {
    for (lane, pixel) in lanes.iter_mut().zip(row.as_chunks::<3>().0) {
        *lane = [pixel[0].into(), pixel[1].into(), pixel[2].into(), 0.0];
    }
    let weights = x.lanes.chunks_exact(x.taps);
    for (at, (first, weights)) in x.first.iter().zip(weights).enumerate() {
        let mut sum = [0.0; 4];
        for (lane, weight) in lanes[*first..][..x.taps].iter().zip(weights) {
            for ((sum, level), weight) in sum.iter_mut().zip(lane).zip(weight) {
                *sum += weight * level;
            }
        }
        sums[3 * at..3 * at + 4].copy_from_slice(&sum);
    }
}

/// Each sum's nearest level, saturating; `exact` decides where float32 leaves a doubt.
fn round(sums: &[f32], out: &mut [u8], exact: impl Fn(usize) -> u8) {
    // Added to a level, it leaves the nearest integer in the lowest bits.
    const INTEGERS: f32 = (1 << 23) as f32;
    const CHUNK: usize = 32;
    let is_doubtful = |sum: f32, nearest: f32| (sum - nearest).abs() > 0.5 - DOUBTFUL;
    for (index, (sums, out)) in sums.chunks(CHUNK).zip(out.chunks_mut(CHUNK)).enumerate() {
        let mut doubts = 0;
        for (sum, out) in sums.iter().zip(out.iter_mut()) {
            let sum = sum.clamp(0.0, 255.0);
            let shifted = sum + INTEGERS;
            *out = shifted.to_bits() as u8;
            doubts |= u32::from(is_doubtful(sum, shifted - INTEGERS));
        }
        if doubts != 0 {
            for (at, (sum, out)) in sums.iter().zip(out).enumerate() {
                if is_doubtful(sum.clamp(0.0, 255.0), f32::from(*out)) {
                    *out = exact(CHUNK * index + at);
                }
            }
        }
    }
}

/// Pillow's own sum: fixed-point weights, halves upwards, saturating.
fn exact_level(source: impl Iterator<Item = u8>, weights: &[i32]) -> u8 {
    let sum: i64 =
        source.zip(weights).map(|(level, weight)| i64::from(level) * i64::from(*weight)).sum();
    ((sum + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS).clamp(0, 255) as u8
}
