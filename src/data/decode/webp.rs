//! WebP, lossy and lossless; alpha is dropped, and of an animation the first frame is read.

use std::io::Cursor;

use image_webp::WebPDecoder;

use super::{DecodeLimits, RgbImage};

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    let unreadable = |error: image_webp::DecodingError| format!("unreadable WebP image: {error}");
    // The container's length: lossy data that stops early would decode to garbage without error.
    let declared = bytes.get(4..8).and_then(|n| n.try_into().ok()).map(u32::from_le_bytes);
    if declared.is_none_or(|length| length as usize > bytes.len() - 8) {
        return Err("the WebP data ends before the image does".to_owned());
    }
    let mut decoder = WebPDecoder::new(Cursor::new(bytes)).map_err(unreadable)?;
    let (width, height) = decoder.dimensions();
    limits.check_size(width, height)?;
    let size = decoder.output_buffer_size().ok_or("the WebP image is too large for memory")?;
    let mut pixels = vec![0; size];
    decoder.read_image(&mut pixels).map_err(unreadable)?;
    if decoder.has_alpha() {
        pixels = pixels.chunks_exact(4).flat_map(|v| [v[0], v[1], v[2]]).collect();
    }
    Ok(RgbImage { width, height, pixels: pixels.into() })
}
