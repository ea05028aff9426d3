//! From components at their own resolution to RGB: libjpeg's upsampling and colour conversion.

use super::frame::{Component, Frame};

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

/// How a component is brought to full resolution.
#[derive(Clone, Copy)]
enum Upsampling {
    /// Each sample as many times as it needs, horizontally and vertically.
    Repeat(usize, usize),
    /// Twice the columns, ¾ the nearer and ¼ the farther sample.
    Columns,
    /// Twice the rows, likewise.
    Rows,
    /// Both.
    Both,
}

impl Upsampling {
    fn new(frame: &Frame, component: &Component) -> Result<Self, String> {
        if frame.h_max % component.h != 0 || frame.v_max % component.v != 0 {
            return Err("JPEG images with fractional sampling factors are not supported".into());
        }
        let smooth = component.width > 2;
        Ok(match (frame.h_max / component.h, frame.v_max / component.v) {
            (2, 1) if smooth => Self::Columns,
            (1, 2) => Self::Rows,
            (2, 2) if smooth => Self::Both,
            (h, v) => Self::Repeat(h, v),
        })
    }

    /// Row `y` of the full-resolution image into `out`, which may be longer than the image is
    /// wide; `sums` is scratch space.
    fn row(self, component: &Component, y: usize, (out, sums): (&mut [u8], &mut Vec<u16>)) {
        let near = component.row(y as isize / 2);
        // An even row is nearer to the sample row above, an odd one to that below.
        let far = component.row(y as isize / 2 + if y % 2 == 0 { -1 } else { 1 });
        match self {
            Self::Repeat(h, v) => {
                let row = component.row((y / v) as isize);
                if h == 1 {
                    out[..row.len()].copy_from_slice(row);
                    return;
                }
                for (out, sample) in out.chunks_mut(h).zip(row) {
                    out.fill(*sample);
                }
            }
            Self::Columns => {
                let row = component.row(y as isize);
                sums.clear();
                sums.extend(row.iter().map(|sample| u16::from(*sample)));
                spread(sums, out, [1, 2], 2);
            }
            Self::Rows => {
                let bias = 1 + y as u16 % 2;
                for (out, (near, far)) in out.iter_mut().zip(near.iter().zip(far)) {
                    *out = ((3 * u16::from(*near) + u16::from(*far) + bias) >> 2) as u8;
                }
            }
            Self::Both => {
                sums.clear();
                let pairs = near.iter().zip(far);
                sums.extend(pairs.map(|(near, far)| 3 * u16::from(*near) + u16::from(*far)));
                spread(sums, out, [8, 7], 4);
            }
        }
    }
}

/// Doubles the columns: (3·this + left + biases[0]) >> shift and (3·this + right + biases[1]) >>
/// shift, where the outermost have themselves for a neighbour.
fn spread(sums: &[u16], out: &mut [u8], biases: [u16; 2], shift: u32) {
    let last = sums.len() - 1;
    let pair = |left: u16, this: u16, right: u16| {
        let value = |other: u16, bias: u16| ((3 * this + other + bias) >> shift) as u8;
        [value(left, biases[0]), value(right, biases[1])]
    };
    let (pairs, _) = out.as_chunks_mut::<2>();
    pairs[0] = pair(sums[0], sums[0], sums[1]);
    for (out, window) in pairs[1..].iter_mut().zip(sums.windows(3)) {
        *out = pair(window[0], window[1], window[2]);
    }
    pairs[last] = pair(sums[last - 1], sums[last], sums[last]);
}

/// The whole image as RGB bytes.
pub(super) fn to_rgb(frame: &Frame, space: ColorSpace) -> Result<Vec<u8>, String> {
    let components = &frame.components;
    let ways: Vec<Upsampling> = components
        .iter()
        .map(|component| Upsampling::new(frame, component))
        .collect::<Result<_, _>>()?;
    // Room for what upsampling writes beyond the width.
    let mut rows = vec![vec![0; frame.width + 8]; components.len()];
    let mut sums = Vec::new();
    let mut pixels = vec![0; 3 * frame.width * frame.height];
    for (y, out) in pixels.chunks_exact_mut(3 * frame.width).enumerate() {
        for ((way, component), row) in ways.iter().zip(components).zip(&mut rows) {
            way.row(component, y, (row, &mut sums));
        }
        convert(space, &rows, out.as_chunks_mut().0);
    }
    Ok(pixels)
}

/// One row of RGB from the components' rows.
fn convert(space: ColorSpace, rows: &[Vec<u8>], out: &mut [[u8; 3]]) {
    match (space, rows) {
        (ColorSpace::Gray, [gray]) => {
            out.iter_mut().zip(gray).for_each(|(out, gray)| *out = [*gray; 3]);
        }
        (ColorSpace::Rgb, [a, b, c]) => {
            for (out, ((a, b), c)) in out.iter_mut().zip(a.iter().zip(b).zip(c)) {
                *out = [*a, *b, *c];
            }
        }
        (ColorSpace::YCbCr, [a, b, c]) => {
            for (out, ((a, b), c)) in out.iter_mut().zip(a.iter().zip(b).zip(c)) {
                *out = rgb(*a, *b, *c);
            }
        }
        (ColorSpace::Cmyk, [a, b, c, k]) => {
            for (out, (((a, b), c), k)) in out.iter_mut().zip(a.iter().zip(b).zip(c).zip(k)) {
                *out = [*a, *b, *c].map(|ink| scaled(ink, *k));
            }
        }
        (ColorSpace::Ycck, [a, b, c, k]) => {
            for (out, (((a, b), c), k)) in out.iter_mut().zip(a.iter().zip(b).zip(c).zip(k)) {
                *out = rgb(*a, *b, *c).map(|ink| scaled(255 - ink, *k));
            }
        }
        // The colour space was chosen by the number of components.
        (_, _) => {}
    }
}

/// BT.601 at full range, with libjpeg's 16-bit constants and roundings.
#[inline(always)]
fn rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    const HALF: i32 = 1 << 15;
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let level = |value: i32| value.clamp(0, 255) as u8;
    [
        level(y + ((91_881 * cr + HALF) >> 16)),
        level(y + ((HALF - 22_554 * cb - 46_802 * cr) >> 16)),
        level(y + ((116_130 * cb + HALF) >> 16)),
    ]
}

/// `a · b / 255`, rounded.
#[inline(always)]
fn scaled(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    ((product + (product >> 8)) >> 8) as u8
}
