//! JPEG to RGB, equal to libjpeg-turbo to the bit: its slow-but-accurate inverse DCT, its smooth
//! ("fancy") chroma upsampling and its colour conversion, because that is what the pixels that
//! published accuracies were measured on went through. ITU-T T.81 sequential and progressive
//! Huffman images of 8 bits; the arithmetic, lossless and hierarchical processes are refused.
//!
//! [`markers`] checks sizes and completeness → [`frame`] holds the components → [`scan`] decodes
//! coefficients with [`huffman`] → [`dct`] → [`color`] upsamples and converts.

mod color;
mod dct;
mod frame;
mod huffman;
mod markers;
mod scan;

use super::{DecodeLimits, RgbImage};
use color::ColorSpace;
use frame::{Component, Frame, be16};
use huffman::HuffmanTable;
use markers::{Segment, Segments};

/// Scans of a largest allowed image; smaller ones may have accordingly more. Real progressive
/// images have about ten, and each costs a pass over the whole image.
const MAX_SCANS: u64 = 20;

/// Tables by destination number, as they stand at a point of the file.
#[derive(Default)]
struct Tables {
    /// Quantization steps, in natural (row-major) order.
    quantization: [Option<[u16; 64]>; 4],
    dc: [Option<HuffmanTable>; 4],
    ac: [Option<HuffmanTable>; 4],
    /// MCUs between restart markers; 0 for none.
    restart_interval: usize,
}

/// What the application segments say about colour.
#[derive(Default)]
struct ColorHints {
    jfif: bool,
    /// The transform byte of Adobe's segment.
    adobe: Option<u8>,
}

pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<RgbImage, String> {
    let summary = markers::check(bytes, limits)?;
    let pixels = u64::from(summary.width) * u64::from(summary.height);
    if summary.scans * pixels > MAX_SCANS * limits.max_pixels {
        return Err(format!("{} scans are too many for the image's size", summary.scans));
    }

    let mut tables = Tables::default();
    let mut hints = ColorHints::default();
    let mut frame = None;
    let mut segments = Segments::new(bytes);
    while let Some(Segment { marker, payload }) = segments.next() {
        match marker {
            0xd9 => break,
            0xc0..=0xc2 => frame = Some(Frame::parse(payload, marker == 0xc2)?),
            0xc4 => tables.read_huffman(payload)?,
            0xdb => tables.read_quantization(payload)?,
            0xdd => tables.restart_interval = be16(payload, 0)?.into(),
            0xda => {
                let frame = frame.as_mut().ok_or("the JPEG image has a scan before its frame")?;
                let used = scan::decode(frame, &tables, payload, segments.rest())?;
                segments.drop_front(used);
            }
            0xe0 if payload.starts_with(b"JFIF\0") => hints.jfif = true,
            0xee if payload.starts_with(b"Adobe") => hints.adobe = payload.get(11).copied(),
            0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                return Err("arithmetic, lossless and hierarchical JPEG are not supported".into());
            }
            _ => {}
        }
    }
    let mut frame = frame.ok_or("the JPEG image has no frame header")?;
    frame.finish();
    let space = hints.color_space(&frame.components)?;
    Ok(RgbImage {
        width: frame.width as u32,
        height: frame.height as u32,
        pixels: color::to_rgb(&frame, space)?,
    })
}

impl ColorHints {
    /// libjpeg's rules: JFIF means YCbCr; then Adobe's transform; then the components' ids.
    fn color_space(&self, components: &[Component]) -> Result<ColorSpace, String> {
        let ids: Vec<u8> = components.iter().map(|component| component.id).collect();
        Ok(match (ids.len(), self.adobe) {
            (1, _) => ColorSpace::Gray,
            (3, _) if self.jfif => ColorSpace::YCbCr,
            (3, Some(0)) => ColorSpace::Rgb,
            (3, None) if ids == *b"RGB" => ColorSpace::Rgb,
            (3, _) => ColorSpace::YCbCr,
            (4, None | Some(0)) => ColorSpace::Cmyk,
            (4, _) => ColorSpace::Ycck,
            (count, _) => return Err(format!("a JPEG image of {count} components has no meaning")),
        })
    }
}

impl Tables {
    /// A DHT segment: any number of tables.
    fn read_huffman(&mut self, mut payload: &[u8]) -> Result<(), String> {
        while let [head, rest @ ..] = payload {
            let (class, slot) = (head >> 4, usize::from(head & 15));
            let family = match class {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return Err("the JPEG image has a bad Huffman table".into()),
            };
            let slot = family.get_mut(slot).ok_or("the JPEG image has a bad Huffman table")?;
            let (table, rest) = HuffmanTable::parse(rest)?;
            *slot = Some(table);
            payload = rest;
        }
        Ok(())
    }

    /// A DQT segment: any number of tables of 8- or 16-bit steps in zigzag order.
    fn read_quantization(&mut self, mut payload: &[u8]) -> Result<(), String> {
        let bad = || "the JPEG image has a bad quantization table".to_owned();
        while let [head, rest @ ..] = payload {
            let slot = self.quantization.get_mut(usize::from(head & 15)).ok_or_else(bad)?;
            let wide = match head >> 4 {
                0 => 1,
                1 => 2,
                _ => return Err(bad()),
            };
            let (values, rest) = rest.split_at_checked(64 * wide).ok_or_else(bad)?;
            let mut table = [0; 64];
            for (value, position) in values.chunks_exact(wide).zip(dct::ZIGZAG) {
                table[position] = value.iter().fold(0, |sum, byte| sum << 8 | u16::from(*byte));
            }
            *slot = Some(table);
            payload = rest;
        }
        Ok(())
    }
}
