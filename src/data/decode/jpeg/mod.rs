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
        decode(bytes, limits).map(|image| image.pixels)
    }

    #[test]
    fn tables_must_be_there_before_their_scan() {
        let (steps, dc, ac) = (quantization(), huffman(0), huffman(1));
        let all: [&[u8]; 3] = [&steps, &dc, &ac];
        let limits = DecodeLimits::default();
        let decoded = outcome(&gray(&all, 0xc0, 1), &limits);
        assert_eq!(decoded, Ok(vec![128; 192]));
        let reason = |tables: &[&[u8]]| outcome(&gray(tables, 0xc0, 1), &limits).unwrap_err();
        assert_eq!(reason(&all[1..]), "the JPEG image lacks a quantization table");
        assert_eq!(reason(&all[..2]), "the JPEG image lacks a Huffman table");
        assert_eq!(reason(&[&steps, &ac]), "the JPEG image lacks a Huffman table");
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
    fn colour_follows_jfif_then_adobe_then_the_ids() {
        let space = |jfif, adobe, ids: &[u8]| {
            let count = ids.len() as u8;
            let specs = ids.iter().flat_map(|id| [*id, 0x11, 0]);
            let header: Vec<u8> = [8, 0, 8, 0, 8, count].into_iter().chain(specs).collect();
            let frame = Frame::parse(&header, false).unwrap();
            ColorHints { jfif, adobe }.color_space(&frame.components)
        };
        assert_eq!(space(true, Some(0), b"RGB"), Ok(ColorSpace::YCbCr));
        assert_eq!(space(false, Some(0), &[1, 2, 3]), Ok(ColorSpace::Rgb));
        assert_eq!(space(false, None, b"RGB"), Ok(ColorSpace::Rgb));
        assert_eq!(space(false, None, &[0, 1, 2]), Ok(ColorSpace::YCbCr));
        assert_eq!(space(false, Some(2), &[1, 2, 3, 4]), Ok(ColorSpace::Ycck));
        assert_eq!(space(true, None, &[1, 2, 3, 4]), Ok(ColorSpace::Cmyk));
        assert!(space(false, None, &[1, 2]).is_err());
    }
}
