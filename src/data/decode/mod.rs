//! JPEG, PNG and WebP bytes to 8-bit RGB, as Pillow's `convert("RGB")` gives it.
//!
//! The content decides the format, never a name. Sizes are checked from the header before
//! anything is allocated, and whatever is wrong with the bytes is `InvalidArgument`. EXIF
//! orientation is not applied, because the models were trained and measured without it.

#[cfg(test)]
pub(crate) mod encoded;
mod jpeg;
mod png;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::pixel_buffer::PixelBuffer;
use crate::error::{Error, Result};

/// An 8-bit RGB image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row-major R, G, B: `3 · width · height` bytes.
    pub pixels: PixelBuffer,
}

/// How large an image may be before it is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Encoded bytes.
    pub max_bytes: usize,
    /// Pixels of the longer side.
    pub max_side: u32,
    /// Width × height.
    pub max_pixels: u64,
}

impl Default for DecodeLimits {
    fn default() -> Self {
        Self { max_bytes: 32 << 20, max_side: 8192, max_pixels: 50_000_000 }
    }
}

impl DecodeLimits {
    /// Refuses more encoded bytes than allowed.
    fn check_bytes(&self, bytes: usize) -> Result<(), String> {
        if bytes > self.max_bytes {
            return Err(format!("{bytes} bytes exceed the limit of {} bytes", self.max_bytes));
        }
        Ok(())
    }

    /// Refuses empty images and larger ones than allowed.
    fn check_size(&self, width: u32, height: u32) -> Result<(), String> {
        if width == 0 || height == 0 {
            return Err(format!("an image of {width}x{height} pixels is empty"));
        }
        if width.max(height) > self.max_side {
            let limit = self.max_side;
            return Err(format!("{width}x{height} pixels exceed the limit of {limit} a side"));
        }
        if u64::from(width) * u64::from(height) > self.max_pixels {
            let limit = self.max_pixels;
            return Err(format!("{width}x{height} pixels exceed the limit of {limit} in all"));
        }
        Ok(())
    }
}

/// Decodes a JPEG, PNG or WebP image; the first frame of an animation.
///
/// # Errors
/// `InvalidArgument` on `field` for bytes that are no complete image of these formats and for
/// images over the limits.
pub fn decode(bytes: &[u8], limits: &DecodeLimits, field: &str) -> Result<RgbImage> {
    // A decoder's panic on hostile bytes is one bad image, not the end of the caller's batch.
    catch_unwind(AssertUnwindSafe(|| decode_by_content(bytes, limits)))
        .unwrap_or_else(|_| Err("the image decoder failed on these bytes".to_owned()))
        .map_err(|reason| Error::invalid(field, reason))
}

/// Refuses what [`decode`] would refuse by its size and its first bytes.
///
/// # Errors
/// As [`decode`].
pub fn check_start(bytes: &[u8], limits: &DecodeLimits, field: &str) -> Result<()> {
    format(bytes, limits).map(drop).map_err(|reason| Error::invalid(field, reason))
}

/// As [`decode`], but a decoder's panic is not caught.
pub(crate) fn decode_by_content(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    match format(bytes, limits)? {
        Format::Jpeg => jpeg::decode(bytes, limits),
        Format::Png => png::decode(bytes, limits),
        Format::Webp => webp::decode(bytes, limits),
    }
}

fn format(bytes: &[u8], limits: &DecodeLimits) -> Result<Format, String> {
    limits.check_bytes(bytes.len())?;
    Format::of(bytes).ok_or_else(|| match bytes {
        [] => "the image is empty (zero bytes)".to_owned(),
        _ => "the bytes are neither a JPEG nor a PNG nor a WebP image".to_owned(),
    })
}

/// Whether a file that begins like this (12 bytes are enough) claims to be an image that
/// [`decode`] knows.
pub fn is_image(start: &[u8]) -> bool {
    Format::of(start).is_some()
}

/// What an image is encoded in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Jpeg,
    Png,
    Webp,
}

impl Format {
    fn of(start: &[u8]) -> Option<Self> {
        match start {
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => Some(Self::Webp),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(width: u32, height: u32, format: Format) -> Vec<u8> {
        let pixel = |x: u32, y: u32| [(9 * x) as u8, (7 * y) as u8, (x * y) as u8];
        let pixels: Vec<u8> =
            (0..height).flat_map(|y| (0..width).flat_map(move |x| pixel(x, y))).collect();
        super::encoded::encoded(format, width, &pixels)
    }

    const FORMATS: [Format; 3] = [Format::Jpeg, Format::Png, Format::Webp];

    fn reason(bytes: &[u8], limits: &DecodeLimits) -> String {
        match decode(bytes, limits, "images[3].content") {
            Err(Error::InvalidArgument { field, reason }) if field == "images[3].content" => reason,
            other => panic!("{other:?}"),
        }
    }

    fn refused(bytes: &[u8]) -> String {
        reason(bytes, &DecodeLimits::default())
    }

    /// A PNG of nothing but its header.
    fn png_header(width: u32, height: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut encoder = ::png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(::png::ColorType::Rgb);
        drop(encoder.write_header().unwrap());
        bytes
    }

    #[test]
    fn content_decides_the_format() {
        for format in FORMATS {
            let image =
                decode(&encoded(19, 11, format), &DecodeLimits::default(), "image").unwrap();
            assert_eq!((image.width, image.height, image.pixels.len()), (19, 11, 627));
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_a_reason() {
        assert_eq!(refused(b""), "the image is empty (zero bytes)");
        for bytes in [&b"GIF89a......"[..], b"BM", b"<svg/>", b"RIFF....WAVE", b"\xff\xd8"] {
            assert!(refused(bytes).starts_with("the bytes are neither"), "{bytes:?}");
        }
    }

    #[test]
    fn truncated_images_are_refused_wherever_they_end() {
        for format in FORMATS {
            let bytes = encoded(19, 11, format);
            // The end of a PNG's image data is followed by a chunk of 12 bytes that says only so.
            let needed = if format == Format::Png { bytes.len() - 12 } else { bytes.len() };
            for length in 0..needed {
                assert!(!refused(&bytes[..length]).is_empty());
            }
        }
    }

    #[test]
    fn limits_hold_before_anything_is_decoded() {
        let mut jpeg = encoded(8, 8, Format::Jpeg);
        let frame = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xc3, 0x50, 0xc3, 0x50]);
        let expected = "50000x50000 pixels exceed the limit of 8192 a side";
        assert_eq!(refused(&png_header(50_000, 50_000)), expected);
        assert_eq!(refused(&jpeg), expected);
        let expected = "8000x8000 pixels exceed the limit of 50000000 in all";
        assert_eq!(refused(&png_header(8000, 8000)), expected);
        for format in FORMATS {
            let bytes = encoded(19, 11, format);
            let limits = DecodeLimits { max_side: 18, ..DecodeLimits::default() };
            assert_eq!(reason(&bytes, &limits), "19x11 pixels exceed the limit of 18 a side");
            let limits = DecodeLimits { max_pixels: 208, ..DecodeLimits::default() };
            assert_eq!(reason(&bytes, &limits), "19x11 pixels exceed the limit of 208 in all");
            let limits = DecodeLimits { max_bytes: 40, ..DecodeLimits::default() };
            assert!(reason(&bytes, &limits).ends_with("bytes exceed the limit of 40 bytes"));
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes: Vec<u8>, format in 0usize..3) {
            let _ = decode_by_content(&bytes, &DecodeLimits::default());
            let mut signed = encoded(1, 1, FORMATS[format])[..12].to_vec();
            signed.extend(bytes);
            let _ = decode_by_content(&signed, &DecodeLimits::default());
        }

        #[test]
        fn damaged_images_never_panic(
            format in 0usize..3,
            flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6),
        ) {
            let mut bytes = encoded(19, 11, FORMATS[format]);
            for (at, bit) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= 1 << bit;
            }
            if let Ok(image) = decode_by_content(&bytes, &small()) {
                let expected = 3 * image.width as usize * image.height as usize;
                prop_assert_eq!(image.pixels.len(), expected);
            }
        }
    }

    /// Keeps damaged headers from asking for large images in tests.
    fn small() -> DecodeLimits {
        DecodeLimits { max_side: 512, ..DecodeLimits::default() }
    }
}
