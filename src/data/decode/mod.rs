//! JPEG, PNG and WebP bytes to 8-bit RGB, as Pillow's `convert("RGB")` gives it.
//!
//! The content decides the format, never a name. Sizes are checked from the header before
//! anything is allocated, and whatever is wrong with the bytes is `InvalidArgument`. EXIF
//! orientation is not applied, because the models were trained and measured without it.

mod jpeg;
mod png;
mod webp;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};

/// An 8-bit RGB image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RgbImage {
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
    /// Row-major R, G, B: `3 · width · height` bytes.
    pub pixels: Vec<u8>,
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
        Self { max_bytes: 32 << 20, max_side: 16_384, max_pixels: 50_000_000 }
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

fn decode_by_content(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    limits.check_bytes(bytes.len())?;
    match bytes {
        [] => Err("the image is empty (zero bytes)".to_owned()),
        [0xff, 0xd8, 0xff, ..] => jpeg::decode(bytes, limits),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => png::decode(bytes, limits),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => {
            webp::decode(bytes, limits)
        }
        _ => Err("the bytes are neither a JPEG nor a PNG nor a WebP image".to_owned()),
    }
}
