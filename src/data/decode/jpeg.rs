//! JPEG: a walk over the markers for sizes and completeness, then zune-jpeg for the pixels.
//!
//! Four-component images hold inverted inks, as Adobe writes them and Pillow assumes always;
//! then R = C·K/255, which is what zune-jpeg computes for CMYK and YCCK.

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::{DecodeLimits, RgbImage};

/// Real progressive files have about ten scans; each costs a pass over the whole image.
const MAX_SCANS: usize = 100;

/// What the markers say.
struct Header {
    width: u32,
    height: u32,
    scans: usize,
}

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    let Header { width, height, scans } = read_header(bytes, limits)?;
    if scans > MAX_SCANS {
        return Err(format!("{scans} scans exceed the limit of {MAX_SCANS}"));
    }
    // Not strict: like libjpeg, accept stray bytes and odd tables as long as pixels come out.
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(limits.max_side as usize)
        .set_max_height(limits.max_side as usize)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let pixels = decoder.decode().map_err(|error| format!("unreadable JPEG image: {error}"))?;
    if pixels.len() as u64 != 3 * u64::from(width) * u64::from(height) {
        return Err("the JPEG image's headers contradict each other".to_owned());
    }
    Ok(RgbImage { width, height, pixels })
}

/// Walks all markers up to the end of the image. The decoder itself pads a truncated image with
/// gray; here a missing end marker is an error, as it is in Pillow.
fn read_header(bytes: &[u8], limits: &DecodeLimits) -> Result<Header, String> {
    let truncated = || "the JPEG data ends before the image does".to_owned();
    let mut size = None;
    let mut scans = 0;
    let mut rest = bytes;
    loop {
        let marker;
        (marker, rest) = next_marker(rest).ok_or_else(truncated)?;
        match marker {
            0xd9 => break,                  // end of image
            0x01 | 0xd0..=0xd8 => continue, // no payload
            _ => {}
        }
        let length = rest.first_chunk().map(|length| usize::from(u16::from_be_bytes(*length)));
        let segment = length.and_then(|length| rest.get(..length)).ok_or_else(truncated)?;
        rest = &rest[segment.len()..];
        match marker {
            0xc4 | 0xc8 | 0xcc => {} // Huffman tables, reserved, arithmetic tables
            0xc0..=0xcf => {
                // length (2), precision (1), height (2), width (2)
                let [_, _, _, h1, h0, w1, w0, ..] = *segment else { return Err(truncated()) };
                let (width, height) = (u16::from_be_bytes([w1, w0]), u16::from_be_bytes([h1, h0]));
                if size.is_some() {
                    return Err("the JPEG image has more than one frame header".to_owned());
                }
                limits.check_size(width.into(), height.into())?;
                size = Some((width.into(), height.into()));
            }
            0xda => scans += 1,
            _ => {}
        }
    }
    let (width, height) = size.ok_or("the JPEG image has no frame header")?;
    Ok(Header { width, height, scans })
}

/// The next marker and what follows it; skips entropy-coded data, stuffed zeros and fill bytes.
fn next_marker(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let mut rest = bytes;
    loop {
        let at = rest.iter().position(|byte| *byte == 0xff)?;
        match rest[at + 1..] {
            [0xff, ..] => rest = &rest[at + 1..],
            [0x00, ..] => rest = &rest[at + 2..],
            [marker, ref after @ ..] => return Some((marker, after)),
            [] => return None,
        }
    }
}
