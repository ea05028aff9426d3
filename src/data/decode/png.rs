//! PNG: every colour type and depth to 8-bit RGB by Pillow's rules.
//!
//! Alpha is dropped, not blended; a palette's transparency is ignored; 16-bit colours keep their
//! high byte; 16-bit gray is clipped at 255, because Pillow reads it as plain integers.

use std::io::Cursor;

use png::{BitDepth, ColorType, Decoder, Transformations};

use super::{DecodeLimits, RgbImage};

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    let unreadable = |error: png::DecodingError| format!("unreadable PNG image: {error}");
    let mut decoder = Decoder::new(Cursor::new(bytes));
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    let header = decoder.read_header_info().map_err(unreadable)?;
    let (width, height) = (header.width, header.height);
    limits.check_size(width, height)?;
    let gray16 = header.bit_depth == BitDepth::Sixteen && header.color_type == ColorType::Grayscale;
    decoder.set_transformations(if gray16 {
        Transformations::IDENTITY
    } else {
        Transformations::EXPAND | Transformations::STRIP_16
    });
    let mut reader = decoder.read_info().map_err(unreadable)?;
    let size = reader.output_buffer_size().ok_or("the PNG image is too large for memory")?;
    let mut pixels = vec![0; size];
    reader.next_frame(&mut pixels).map_err(unreadable)?;

    let pixels = match reader.output_color_type().0 {
        _ if gray16 => spread(pixels.chunks_exact(2).map(|v| if v[0] > 0 { 255 } else { v[1] })),
        ColorType::Rgb => pixels,
        ColorType::Rgba => pixels.chunks_exact(4).flat_map(|v| [v[0], v[1], v[2]]).collect(),
        ColorType::Grayscale => spread(pixels.into_iter()),
        ColorType::GrayscaleAlpha => spread(pixels.chunks_exact(2).map(|v| v[0])),
        ColorType::Indexed => return Err("the PNG image has no palette".to_owned()),
    };
    Ok(RgbImage { width, height, pixels: pixels.into() })
}

/// One gray value becomes three equal ones.
fn spread(gray: impl Iterator<Item = u8>) -> Vec<u8> {
    gray.flat_map(|v| [v, v, v]).collect()
}
