//! The marker structure of a JPEG file.

use super::super::DecodeLimits;
use super::frame::be16;

/// What the markers alone tell.
pub(super) struct Summary {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) scans: u64,
}

/// A marker and its payload, which is empty for markers without one.
pub(super) struct Segment<'a> {
    pub(super) marker: u8,
    pub(super) payload: &'a [u8],
}

/// Walks the segments up to the end-of-image marker or the end of the bytes, skipping
/// entropy-coded data.
pub(super) struct Segments<'a> {
    rest: &'a [u8],
}

impl<'a> Segments<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// What follows the last segment.
    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Leaves out `count` bytes of the rest.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.rest = self.rest.get(count..).unwrap_or_default();
    }

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

/// Checks sizes before anything is allocated, and that the end marker is there: like Pillow, and
/// unlike most decoders, which fill up with gray, a truncated image is refused.
pub(super) fn check(bytes: &[u8], limits: &DecodeLimits) -> Result<Summary, String> {
    let (mut size, mut scans) = (None, 0);
    for Segment { marker, payload } in Segments::new(bytes) {
        match marker {
            0xd9 => {
                let (width, height) = size.ok_or("the JPEG image has no frame header")?;
                return Ok(Summary { width, height, scans });
            }
            0xc4 | 0xc8 | 0xcc => {} // tables and an extension, among the frame headers' numbers
            0xc0..=0xcf if size.is_some() => {
                return Err("the JPEG image has more than one frame header".into());
            }
            0xc0..=0xcf => {
                let (width, height) = (be16(payload, 3)?.into(), be16(payload, 1)?.into());
                limits.check_size(width, height)?;
                size = Some((width, height));
            }
            0xda => scans += 1,
            _ => {}
        }
    }
    Err("the JPEG data ends before the image does".into())
}
