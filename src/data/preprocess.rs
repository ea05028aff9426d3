//! timm's evaluation transform: resize the shorter side, centre crop, scale to 0..1, normalise.
//!
//! Sizes and rounding are torchvision's, the resampling is Pillow's. Only what the crop keeps is
//! computed, so a one-pixel-wide image never becomes a gigantic one on its way.

use super::RgbImage;
use super::pixel_buffer::PixelBuffer;
use super::resample::{BICUBIC, BILINEAR, Span, Weights, resample};
use crate::error::{Error, Result};
use crate::model::{Interpolation, Preprocessing};

/// Largest accepted model input in pixels a side; published models stay below 2048.
const MAX_INPUT: i64 = 4096;

/// What a centre crop of `size` keeps of one axis, and the zero pixels before it. A resized axis
/// shorter than the crop is kept whole and centred, as in torchvision.
fn crop(source: u32, resized: u32, size: u32) -> (Span, u32) {
    if resized < size {
        return (Span { source, resized, start: 0, kept: resized }, (size - resized) / 2);
    }
    // Python's round(): halves go to the even neighbour.
    let half = (resized - size) / 2;
    let start = if (resized - size) % 2 == 1 { half + half % 2 } else { half };
    (Span { source, resized, start, kept: size }, 0)
}

/// The square image a model sees, before normalisation.
///
/// # Errors
/// `InvalidArgument` for an image whose pixels do not fill it or an unusable preprocessing.
pub fn resize_and_crop(image: &RgbImage, how: &Preprocessing) -> Result<RgbImage> {
    let size = checked_size(how)?;
    let (width, height) = (image.width, image.height);
    let expected = 3 * u64::from(width) * u64::from(height);
    if expected == 0 || image.pixels.len() as u64 != expected {
        return Err(Error::invalid("image", format!("its pixels do not fill {width}x{height}")));
    }
    let short = ((f64::from(size) / how.crop_pct) as u32).max(1);
    let long = u64::from(short) * u64::from(width.max(height)) / u64::from(width.min(height));
    let long = u32::try_from(long)
        .map_err(|_| Error::invalid("image", format!("{width}x{height} is too elongated")))?;
    let (resized_width, resized_height) =
        if width <= height { (short, long) } else { (long, short) };
    let (x, left) = crop(width, resized_width, size);
    let (y, top) = crop(height, resized_height, size);
    let kept = resize(image, how.interpolation, x, y);
    Ok(if x.kept == size && y.kept == size { kept } else { pad(&kept, (left, top), size) })
}

/// A model's input: float32 `[3, size, size]`, normalised.
///
/// # Errors
/// As [`resize_and_crop`].
pub fn preprocess(image: &RgbImage, how: &Preprocessing) -> Result<Vec<f32>> {
    let size = checked_size(how)? as usize;
    let mut out = vec![0.0; 3 * size * size];
    preprocess_into(image, how, &mut out)?;
    Ok(out)
}

/// As [`preprocess`], into `out` of `3 · size · size` values.
pub(super) fn preprocess_into(
    image: &RgbImage,
    how: &Preprocessing,
    out: &mut [f32],
) -> Result<()> {
    let image = resize_and_crop(image, how)?;
    // The float32 steps of ToTensor and Normalize, once for each of the 256 levels.
    let levels: [[f32; 256]; 3] = std::array::from_fn(|channel| {
        let (mean, std) = (how.mean[channel] as f32, how.std[channel] as f32);
        std::array::from_fn(|level| (level as f32 / 255.0 - mean) / std)
    });
    let (pixels, _) = image.pixels.as_chunks::<3>();
    let (red, rest) = out.split_at_mut(pixels.len());
    let (green, blue) = rest.split_at_mut(pixels.len());
    for (((red, green), blue), pixel) in red.iter_mut().zip(green).zip(blue).zip(pixels) {
        let [r, g, b] = pixel.map(usize::from);
        (*red, *green, *blue) = (levels[0][r], levels[1][g], levels[2][b]);
    }
    Ok(())
}

/// The checked input size in pixels.
pub(super) fn checked_size(how: &Preprocessing) -> Result<u32> {
    let refuse = |reason: String| Err(Error::invalid("preprocessing", reason));
    if !(1..=MAX_INPUT).contains(&how.image_size) {
        return refuse(format!("image_size {} is not within 1..={MAX_INPUT}", how.image_size));
    }
    // timm knows no smaller share; a tiny one would blow the resize up without bound.
    if !(0.05..=2.0).contains(&how.crop_pct) {
        return refuse(format!("crop_pct {} is not within 0.05..=2", how.crop_pct));
    }
    if how.std.iter().any(|std| *std <= 0.0 || !std.is_finite()) {
        return refuse(format!("std {:?} must be positive", how.std));
    }
    Ok(how.image_size as u32)
}

/// The kept part of the resized image: `x.kept` × `y.kept` pixels.
fn resize(image: &RgbImage, filter: Interpolation, x: Span, y: Span) -> RgbImage {
    let kernel = match filter {
        _ if x.source == x.resized && y.source == y.resized => return pick(image, x, y),
        Interpolation::Nearest => return pick(image, x, y),
        Interpolation::Bilinear => BILINEAR,
        Interpolation::Bicubic => BICUBIC,
    };
    resample(image, &Weights::new(kernel, x), &Weights::new(kernel, y))
}

/// The kept pixels by nearest neighbour; the identity when nothing is resized.
fn pick(image: &RgbImage, x: Span, y: Span) -> RgbImage {
    let nearest = |span: Span, at: u32| {
        let scale = f64::from(span.source) / f64::from(span.resized);
        let position = (f64::from(span.start + at) + 0.5) * scale;
        (position as u32).min(span.source - 1) as usize
    };
    let columns: Vec<usize> = (0..x.kept).map(|at| 3 * nearest(x, at)).collect();
    let mut pixels = Vec::with_capacity(3 * x.kept as usize * y.kept as usize);
    for row in (0..y.kept).map(|at| nearest(y, at)) {
        let row = &image.pixels[3 * row * x.source as usize..][..3 * x.source as usize];
        columns.iter().for_each(|column| pixels.extend_from_slice(&row[*column..][..3]));
    }
    RgbImage { width: x.kept, height: y.kept, pixels: pixels.into() }
}

/// Puts a too small image onto black, `left` and `top` pixels from the corner.
fn pad(image: &RgbImage, (left, top): (u32, u32), size: u32) -> RgbImage {
    let mut pixels = PixelBuffer::zeroed(3 * size as usize * size as usize);
    let rows = pixels.chunks_exact_mut(3 * size as usize).skip(top as usize);
    for (to, from) in rows.zip(image.pixels.chunks_exact(3 * image.width as usize)) {
        to[3 * left as usize..][..from.len()].copy_from_slice(from);
    }
    RgbImage { width: size, height: size, pixels }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn how(image_size: i64, crop_pct: f64, interpolation: Interpolation) -> Preprocessing {
        Preprocessing { image_size, crop_pct, interpolation, mean: [0.5; 3], std: [0.5; 3] }
    }

    /// Each pixel tells its place: red the column, green the row.
    fn places(width: u32, height: u32) -> RgbImage {
        let pixels = (0..height).flat_map(|y| (0..width).flat_map(move |x| [x as u8, y as u8, 7]));
        RgbImage { width, height, pixels: pixels.collect::<Vec<u8>>().into() }
    }

    fn corner(image: &RgbImage) -> (u8, u8) {
        (image.pixels[0], image.pixels[1])
    }

    #[test]
    fn an_image_of_the_right_size_is_left_alone() {
        let image = places(32, 32);
        for filter in [Interpolation::Bicubic, Interpolation::Bilinear, Interpolation::Nearest] {
            assert_eq!(resize_and_crop(&image, &how(32, 1.0, filter)).unwrap(), image);
        }
    }

    #[test]
    fn the_crop_rounds_halves_to_even_like_python() {
        // Resized to 35 (32 / 0.9), which each image has already on its shorter side.
        for (height, expected) in [(35, 2), (37, 2), (39, 4), (41, 4), (36, 2)] {
            let cropped =
                resize_and_crop(&places(35, height), &how(32, 0.9, Interpolation::Bicubic));
            assert_eq!(corner(&cropped.unwrap()), (2, expected), "{height}");
        }
    }

    #[test]
    fn a_crop_larger_than_the_image_is_padded_with_zeros() {
        let image = RgbImage { width: 2, height: 3, pixels: vec![9; 18].into() };
        let padded = resize_and_crop(&image, &how(4, 2.0, Interpolation::Bicubic)).unwrap();
        let lit: Vec<usize> = (0..16).filter(|at| padded.pixels[3 * at] > 0).collect();
        assert_eq!(lit, [1, 2, 5, 6, 9, 10]);
    }

    #[test]
    fn elongated_images_cost_no_more_than_their_crop() {
        for (width, height) in [(16_384, 1), (1, 16_384), (1, 1)] {
            let pixels = vec![200; 3 * width as usize * height as usize];
            let image = RgbImage { width, height, pixels: pixels.into() };
            for filter in [Interpolation::Bicubic, Interpolation::Bilinear, Interpolation::Nearest]
            {
                let cropped = resize_and_crop(&image, &how(224, 0.9, filter)).unwrap();
                assert_eq!(*cropped.pixels, [200; 3 * 224 * 224]);
            }
        }
    }

    #[test]
    fn planes_are_normalised_and_separate() {
        let image = RgbImage {
            width: 2,
            height: 2,
            pixels: vec![0, 255, 51, 0, 255, 51, 0, 255, 51, 0, 255, 51].into(),
        };
        let values = preprocess(&image, &how(2, 1.0, Interpolation::Bicubic)).unwrap();
        assert_eq!(values[..8], [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]);
        assert!(values[8..].iter().all(|value| (value + 0.6).abs() < 1e-6));
    }

    #[test]
    fn unusable_requests_are_refused() {
        let image = places(4, 4);
        let bicubic = |size, share| how(size, share, Interpolation::Bicubic);
        for bad in [bicubic(0, 1.0), bicubic(1 << 40, 1.0), bicubic(4, 0.0), bicubic(4, f64::NAN)] {
            assert!(matches!(preprocess(&image, &bad), Err(Error::InvalidArgument { .. })));
        }
        let flat = Preprocessing { std: [1.0, 0.0, 1.0], ..bicubic(4, 1.0) };
        assert!(matches!(preprocess(&image, &flat), Err(Error::InvalidArgument { .. })));
        for bad in [RgbImage { width: 5, ..image.clone() }, RgbImage { width: 0, ..image.clone() }]
        {
            let result = preprocess(&bad, &bicubic(4, 1.0));
            assert!(matches!(result, Err(Error::InvalidArgument { .. })));
        }
    }

    proptest! {
        #[test]
        fn flat_images_stay_flat(
            (width, height) in (1u32..80, 1u32..80), size in 1i64..40, share in 0.3f64..1.0, gray: u8,
        ) {
            let pixels = vec![gray; 3 * width as usize * height as usize];
            let image = RgbImage { width, height, pixels: pixels.into() };
            for filter in [Interpolation::Bicubic, Interpolation::Bilinear, Interpolation::Nearest] {
                let cropped = resize_and_crop(&image, &how(size, share, filter)).unwrap();
                prop_assert_eq!(cropped.pixels.len() as i64, 3 * size * size);
                prop_assert!(cropped.pixels.iter().all(|level| *level == gray));
            }
        }
    }
}
