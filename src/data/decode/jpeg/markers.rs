//! The marker structure of a JPEG file: what is checked before libjpeg-turbo sees a byte, and the
//! stream that it is given.

use super::super::DecodeLimits;

/// What the components mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ColorSpace {
    Gray,
    Rgb,
    YCbCr,
    /// Inverted inks, as Adobe writes them and Pillow assumes always.
    Cmyk,
    /// YCbCr of inverted C, M, Y; and inverted K.
    Ycck,
}

/// A complete image of an accepted size.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) space: ColorSpace,
    /// Passes over the image.
    pub(super) scans: u64,
    /// The image without what does not touch its pixels (metadata, garbage between segments); its
    /// colour space is marked in one way.
    pub(super) bytes: Vec<u8>,
}

/// A marker and its payload, which is empty for markers without one.
struct Segment<'a> {
    marker: u8,
    payload: &'a [u8],
}

/// Walks the segments up to the end-of-image marker or the end of the bytes, skipping
/// entropy-coded data.
struct Segments<'a> {
    rest: &'a [u8],
}

impl Segments<'_> {
    /// The next marker; stuffed zeros and fill bytes are no markers.
    fn marker(&mut self) -> Option<u8> {
        loop {
            let at = self.rest.iter().position(|byte| *byte == 0xff)?;
            match self.rest[at + 1..] {
                [0xff, ..] => self.rest = &self.rest[at + 1..],
                [0x00, ..] => self.rest = &self.rest[at + 2..],
                [marker, ref after @ ..] => {
                    self.rest = after;
                    return Some(marker);
                }
                [] => return None,
            }
        }
    }
}

impl<'a> Iterator for Segments<'a> {
    type Item = Segment<'a>;

    /// The next segment with a payload, or the end-of-image marker.
    fn next(&mut self) -> Option<Segment<'a>> {
        loop {
            let marker = self.marker()?;
            match marker {
                0xd9 => return Some(Segment { marker, payload: &[] }),
                0x01 | 0xd0..=0xd8 => {}
                _ => {
                    let length = usize::from(be16(self.rest, 0).ok()?);
                    let payload = self.rest.get(2..length)?;
                    self.rest = &self.rest[length..];
                    return Some(Segment { marker, payload });
                }
            }
        }
    }
}

/// The frame header: size and components.
struct Frame {
    width: u32,
    height: u32,
    /// Of one, three or four components.
    ids: Vec<u8>,
}

/// What the application segments say about colour.
#[derive(Default)]
struct ColorHints {
    jfif: bool,
    /// The transform byte of Adobe's segment.
    adobe: Option<u8>,
}

/// Checks sizes before anything is allocated, and that the end marker is there: like Pillow, and
/// unlike most decoders, which fill up with gray, a truncated image is refused.
pub(super) fn read(bytes: &[u8], limits: &DecodeLimits) -> Result<Stream, String> {
    let (mut frame, mut hints, mut scans) = (None, ColorHints::default(), 0);
    let mut tables = vec![0xff, 0xd8];
    let mut image = None;
    let mut segments = Segments { rest: bytes };
    while let Some(Segment { marker, payload }) = segments.next() {
        match marker {
            0xd9 => {
                let (frame, (space, bytes)) =
                    frame.zip(image).ok_or("the JPEG image has no frame header or no scan")?;
                let Frame { width, height, .. } = frame;
                return Ok(Stream { width, height, space, scans, bytes });
            }
            // Tables and an extension, among the frame headers' numbers.
            0xc4 | 0xc8 | 0xcc => push(&mut tables, marker, payload),
            0xc0..=0xcf if frame.is_some() => {
                return Err("the JPEG image has more than one frame header".into());
            }
            0xc0..=0xc2 => {
                frame = Some(Frame::parse(payload, limits)?);
                push(&mut tables, marker, payload);
            }
            0xc3..=0xcf => {
                return Err("arithmetic, lossless and hierarchical JPEG are not supported".into());
            }
            0xda => {
                scans += 1;
                if image.is_none() {
                    let frame =
                        frame.as_ref().ok_or("the JPEG image has a scan before its frame")?;
                    let space = hints.color_space(&frame.ids)?;
                    let mut stream = std::mem::take(&mut tables);
                    mark(&mut stream, space);
                    push(&mut stream, marker, payload);
                    stream.extend_from_slice(segments.rest);
                    image = Some((space, stream));
                }
            }
            0xe0 if payload.starts_with(b"JFIF\0") => hints.jfif = true,
            0xee if payload.starts_with(b"Adobe") => hints.adobe = payload.get(11).copied(),
            0xdb | 0xdd => push(&mut tables, marker, payload),
            _ => {}
        }
    }
    Err("the JPEG data ends before the image does".into())
}

/// Two bytes, the high one first.
fn be16(bytes: &[u8], at: usize) -> Result<u16, String> {
    let pair = bytes.get(at..).and_then(|rest| rest.first_chunk());
    pair.map(|pair| u16::from_be_bytes(*pair)).ok_or_else(|| "a JPEG segment is too short".into())
}

/// Appends a segment; its payload came from one, so that its length fits.
fn push(stream: &mut Vec<u8>, marker: u8, payload: &[u8]) {
    stream.extend([0xff, marker]);
    stream.extend((payload.len() as u16 + 2).to_be_bytes());
    stream.extend_from_slice(payload);
}

/// Appends the one segment that fixes the colour space: Adobe's with its transform byte.
fn mark(stream: &mut Vec<u8>, space: ColorSpace) {
    let transform = match space {
        ColorSpace::Gray => return,
        ColorSpace::Rgb | ColorSpace::Cmyk => 0,
        ColorSpace::YCbCr => 1,
        ColorSpace::Ycck => 2,
    };
    let version_and_flags = [0, 100, 0, 0, 0, 0];
    push(stream, 0xee, &[&b"Adobe"[..], &version_and_flags, &[transform]].concat());
}

impl Frame {
    fn parse(payload: &[u8], limits: &DecodeLimits) -> Result<Self, String> {
        let (height, width) = (be16(payload, 1)?.into(), be16(payload, 3)?.into());
        limits.check_size(width, height)?;
        let [8, _, _, _, _, count, ref specs @ ..] = *payload else {
            return Err("only JPEG images of 8 bits a sample are supported".into());
        };
        if specs.len() != 3 * usize::from(count) {
            return Err("the JPEG image's frame header is damaged".into());
        }
        Ok(Self { width, height, ids: specs.iter().step_by(3).copied().collect() })
    }
}

impl ColorHints {
    /// libjpeg's rules: JFIF means YCbCr; then Adobe's transform; then the components' ids.
    fn color_space(&self, ids: &[u8]) -> Result<ColorSpace, String> {
        Ok(match (ids.len(), self.adobe) {
            (1, _) => ColorSpace::Gray,
            (3, _) if self.jfif => ColorSpace::YCbCr,
            (3, Some(0)) => ColorSpace::Rgb,
            (3, None) if ids == b"RGB" => ColorSpace::Rgb,
            (3, _) => ColorSpace::YCbCr,
            (4, None | Some(0)) => ColorSpace::Cmyk,
            (4, _) => ColorSpace::Ycck,
            (count, _) => return Err(format!("a JPEG image of {count} components has no meaning")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_follows_jfif_then_adobe_then_the_ids() {
        let space = |jfif, adobe, ids: &[u8]| ColorHints { jfif, adobe }.color_space(ids);
        assert_eq!(space(true, Some(0), b"RGB"), Ok(ColorSpace::YCbCr));
        assert_eq!(space(false, Some(0), &[1, 2, 3]), Ok(ColorSpace::Rgb));
        assert_eq!(space(false, None, b"RGB"), Ok(ColorSpace::Rgb));
        assert_eq!(space(false, None, &[0, 1, 2]), Ok(ColorSpace::YCbCr));
        assert_eq!(space(false, Some(2), &[1, 2, 3, 4]), Ok(ColorSpace::Ycck));
        assert_eq!(space(true, None, &[1, 2, 3, 4]), Ok(ColorSpace::Cmyk));
        assert!(space(false, None, &[1, 2]).is_err());
    }

    #[test]
    fn the_stream_keeps_what_pixels_depend_on() {
        let frame = [0xff, 0xc0, 0, 11, 8, 0, 8, 0, 8, 1, 1, 0x11, 0];
        let scan = [0xff, 0xda, 0, 8, 1, 1, 0, 0, 63, 0, 0b0011_1111, 0xff, 0xd9, 7];
        let restart = [0xff, 0xdd, 0, 4, 0, 9];
        let comment = [0xff, 0xfe, 0, 4, 1, 2];
        let exif = [0xff, 0xe1, 0, 3, 1];
        let start = [0xff, 0xd8];
        let garbage = [3, 0xff, 0x00, 5];
        let parts: [&[u8]; 7] = [&start, &exif, &comment, &garbage, &frame, &restart, &scan];
        let stream = read(&parts.concat(), &DecodeLimits::default()).unwrap();
        assert_eq!((stream.width, stream.height, stream.scans), (8, 8, 1));
        assert_eq!(stream.space, ColorSpace::Gray);
        assert_eq!(stream.bytes, [&start[..], &frame, &restart, &scan].concat());
    }
}
