//! JPEG to RGB by libjpeg-turbo, with which Pillow reads JPEG too: equal to the bit, because the
//! models' published accuracies were measured on its inverse DCT, chroma upsampling and colour
//! conversion. ITU-T T.81 sequential and progressive Huffman images of 8 bits; the arithmetic,
//! lossless and hierarchical processes are refused.
//!
//! [`markers`] checks sizes and completeness, and leaves out what pixels do not depend on: the
//! library never parses metadata, and refuses no image for a blemish in it.

mod markers;

use turbojpeg::{Decompressor, Error, Image, PixelFormat};

use super::{DecodeLimits, RgbImage};
use crate::data::pixel_buffer::PixelBuffer;
use markers::{ColorSpace, Stream};

/// Scans of a largest allowed image; smaller ones may have accordingly more. Real progressive
/// images have about ten, and each costs a pass over the whole image.
const MAX_SCANS: u64 = 20;

/// Beginnings of the library's warnings about damage that it passes over, as Pillow does. Its
/// interface reports them like failures, but the image is there.
const WARNINGS: [&str; 3] = [
    "Corrupt JPEG data",
    "Inconsistent progression sequence",
    "Invalid SOS parameters for sequential JPEG",
];

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    let Stream { width, height, space, scans, bytes } = markers::read(bytes, limits)?;
    if scans * u64::from(width) * u64::from(height) > MAX_SCANS * limits.max_pixels {
        return Err(format!("{scans} scans are too many for the image's size"));
    }
    let pixels = match space {
        ColorSpace::Cmyk | ColorSpace::Ycck => {
            without_black(&decompress(&bytes, (width, height), PixelFormat::CMYK)?).into()
        }
        ColorSpace::Gray | ColorSpace::Rgb | ColorSpace::YCbCr => {
            decompress(&bytes, (width, height), PixelFormat::RGB)?
        }
    };
    Ok(RgbImage { width, height, pixels })
}

/// The pixels of a stream that [`markers`] has checked.
fn decompress(
    stream: &[u8],
    (width, height): (u32, u32),
    format: PixelFormat,
) -> Result<PixelBuffer, String> {
    let (width, height) = (width as usize, height as usize);
    let pitch = format.size() * width;
    let mut pixels = PixelBuffer::zeroed(pitch * height);
    let output = Image { pixels: &mut *pixels, width, pitch, height, format };
    match Decompressor::new().and_then(|mut library| library.decompress(stream, output)) {
        Ok(()) => Ok(pixels),
        Err(Error::TurboJpegError(text))
            if WARNINGS.iter().any(|start| text.starts_with(start)) =>
        {
            Ok(pixels)
        }
        Err(Error::TurboJpegError(text)) => Err(format!("unreadable JPEG image: {text}")),
        Err(other) => Err(format!("unreadable JPEG image: {other}")),
    }
}

/// RGB of inverted C, M, Y, K.
fn without_black(inks: &[u8]) -> Vec<u8> {
    let (pixels, _) = inks.as_chunks();
    pixels.iter().flat_map(|[c, m, y, k]| [*c, *m, *y].map(|ink| scaled(ink, *k))).collect()
}

/// `a · b / 255`, rounded.
fn scaled(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    ((product + (product >> 8)) >> 8) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A gray 8×8 image: `tables` before the frame, then `scans`, each with one DC symbol.
    fn gray(tables: &[&[u8]], frame: u8, scans: usize) -> Vec<u8> {
        let mut bytes = vec![0xff, 0xd8];
        tables.iter().for_each(|table| bytes.extend_from_slice(table));
        bytes.extend([0xff, frame, 0, 11, 8, 0, 8, 0, 8, 1, 1, 0x11, 0]);
        let last = if frame == 0xc2 { 0 } else { 63 };
        for _ in 0..scans {
            bytes.extend([0xff, 0xda, 0, 8, 1, 1, 0, 0, last, 0, 0b0011_1111]);
        }
        bytes.extend([0xff, 0xd9]);
        bytes
    }

    /// A table with the one code 0 for symbol 0, the end of a block or no difference.
    fn huffman(class: u8) -> Vec<u8> {
        let mut bytes = vec![0xff, 0xc4, 0, 20, class << 4, 1];
        bytes.extend([0; 16]);
        bytes
    }

    fn quantization() -> Vec<u8> {
        [vec![0xff, 0xdb, 0, 67, 0], vec![1; 64]].concat()
    }

    fn outcome(bytes: &[u8], limits: &DecodeLimits) -> Result<Vec<u8>, String> {
        decode(bytes, limits).map(|image| image.pixels.to_vec())
    }

    #[test]
    fn tables_must_be_there_before_their_scan() {
        let (steps, dc, ac) = (quantization(), huffman(0), huffman(1));
        let all: [&[u8]; 3] = [&steps, &dc, &ac];
        let limits = DecodeLimits::default();
        let decoded = outcome(&gray(&all, 0xc0, 1), &limits);
        assert_eq!(decoded, Ok(vec![128; 192]));
        let reason = |tables: &[&[u8]]| outcome(&gray(tables, 0xc0, 1), &limits).unwrap_err();
        let expected = "unreadable JPEG image: Quantization table 0x00 was not defined";
        assert_eq!(reason(&all[1..]), expected);
    }

    #[test]
    fn scans_are_limited_by_the_work_they_make() {
        let (steps, dc) = (quantization(), huffman(0));
        let limits = DecodeLimits { max_pixels: 64, ..DecodeLimits::default() };
        assert!(outcome(&gray(&[&steps, &dc], 0xc2, 20), &limits).is_ok());
        let error = outcome(&gray(&[&steps, &dc], 0xc2, 21), &limits).unwrap_err();
        assert_eq!(error, "21 scans are too many for the image's size");
    }

    #[test]
    fn other_processes_and_depths_are_refused() {
        let limits = DecodeLimits::default();
        for frame in [0xc3, 0xc5, 0xc9, 0xca, 0xcf] {
            let error = outcome(&gray(&[], frame, 1), &limits).unwrap_err();
            assert_eq!(error, "arithmetic, lossless and hierarchical JPEG are not supported");
        }
        let mut deep = gray(&[], 0xc1, 1);
        deep[6] = 12;
        let error = outcome(&deep, &limits).unwrap_err();
        assert_eq!(error, "only JPEG images of 8 bits a sample are supported");
    }

    #[test]
    fn damage_that_pillow_passes_over_is_passed_over() {
        let tables = [quantization(), huffman(0), huffman(1)];
        let whole = gray(&[&tables[0], &tables[1], &tables[2]], 0xc0, 1);
        let limits = DecodeLimits::default();
        // Bytes between the scan and the end marker, and a JFIF segment of a future version.
        let mut noisy = whole.clone();
        noisy.splice(whole.len() - 2..whole.len() - 2, [1, 2, 3]);
        let jfif = [0xff, 0xe0, 0, 16, b'J', b'F', b'I', b'F', 0, 9, 9, 0, 0, 1, 0, 1, 0, 0];
        noisy.splice(2..2, jfif);
        assert_eq!(outcome(&noisy, &limits), Ok(vec![128; 192]));
        // No code begins with a one; the library takes such codes for zeros.
        let mut bad_code = whole.clone();
        bad_code[whole.len() - 3] = 0xfe;
        assert_eq!(outcome(&bad_code, &limits), Ok(vec![128; 192]));
        // A scan that ends early leaves the rest gray.
        let mut early = whole.clone();
        early.remove(whole.len() - 3);
        assert_eq!(outcome(&early, &limits), Ok(vec![128; 192]));
    }
}
