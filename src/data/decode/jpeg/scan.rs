//! One scan: the entropy-coded data of some components (T.81, annexes F and G).

use super::Tables;
use super::dct::ZIGZAG;
use super::frame::{Component, Frame};
use super::huffman::{BitReader, HuffmanTable};

/// A component's part in a scan.
struct Member<'a> {
    /// Index among the frame's components.
    component: usize,
    dc: Option<&'a HuffmanTable>,
    ac: Option<&'a HuffmanTable>,
    /// The last DC coefficient.
    prediction: i32,
}

/// Which coefficients and which of their bits a progressive scan carries.
#[derive(Clone, Copy)]
struct Band {
    /// First and last coefficient in zigzag order.
    first: usize,
    last: usize,
    /// Lowest bit that the scan brings.
    low: u32,
    /// Whether higher bits have come before.
    refines: bool,
}

/// Decodes the scan with header `payload` from `data`; returns how many bytes it used.
pub(super) fn decode(
    frame: &mut Frame,
    tables: &Tables,
    payload: &[u8],
    data: &[u8],
) -> Result<usize, String> {
    let (mut members, band) = parse(frame, tables, payload)?;
    let mut reader = BitReader::new(data);
    let mut end_of_band_run = 0;
    // A scan of one component holds just the blocks of the image, without padding to MCUs.
    let single = members.len() == 1;
    let (width, height) = match members.as_slice() {
        [only] => {
            let component = &frame.components[only.component];
            (component.width.div_ceil(8), component.height.div_ceil(8))
        }
        _ => frame.mcus,
    };
    for mcu in 0..width * height {
        if tables.restart_interval > 0 && mcu > 0 && mcu % tables.restart_interval == 0 {
            reader.restart();
            end_of_band_run = 0;
            members.iter_mut().for_each(|member| member.prediction = 0);
        }
        // Like libjpeg, damaged data leaves what it does not reach; it may recover at a restart.
        if reader.exhausted() {
            if tables.restart_interval == 0 {
                break;
            }
            continue;
        }
        let (x, y) = (mcu % width, mcu / width);
        for member in &mut members {
            let component = &mut frame.components[member.component];
            let (h, v) = if single { (1, 1) } else { (component.h, component.v) };
            for at in 0..h * v {
                let place = (x * h + at % h, y * v + at / h);
                if frame.progressive {
                    let start = 64 * (place.1 * component.blocks + place.0);
                    let block = component.coefficients[start..].first_chunk_mut();
                    let block = block.ok_or("the JPEG data is damaged")?;
                    refine(&mut reader, member, band, (block, &mut end_of_band_run))?;
                } else {
                    let block = sequential_block(&mut reader, member)?;
                    component.transform(place.0, place.1, &block);
                }
            }
        }
    }
    Ok(reader.position())
}

/// Reads a scan header and picks the tables it names.
fn parse<'a>(
    frame: &mut Frame,
    tables: &'a Tables,
    payload: &[u8],
) -> Result<(Vec<Member<'a>>, Band), String> {
    let bad = || "the JPEG image has a damaged scan header".to_owned();
    let (count, rest) = payload.split_first().ok_or_else(bad)?;
    let (specs, band) = rest.split_at_checked(2 * usize::from(*count)).ok_or_else(bad)?;
    let &[first, last, bits] = band else { return Err(bad()) };
    let mut members: Vec<Member<'_>> = Vec::new();
    for spec in specs.chunks_exact(2) {
        let component = frame.components.iter().position(|component| component.id == spec[0]);
        let component = component.ok_or_else(bad)?;
        if members.iter().any(|member| member.component == component) {
            return Err(bad());
        }
        latch_steps(&mut frame.components[component], tables)?;
        let dc = tables.dc.get(usize::from(spec[1] >> 4)).ok_or_else(bad)?.as_ref();
        let ac = tables.ac.get(usize::from(spec[1] & 15)).ok_or_else(bad)?.as_ref();
        members.push(Member { component, dc, ac, prediction: 0 });
    }
    let band = Band {
        first: first.into(),
        last: last.into(),
        low: u32::from(bits & 15),
        refines: bits >> 4 > 0,
    };
    // Only DC coefficients may be interleaved in a progressive image, and never with AC ones.
    let fits = match band.first {
        0 => band.last == 0,
        first => first <= band.last && band.last < 64 && members.len() == 1,
    };
    if members.is_empty() || frame.progressive && !(fits && band.low <= 13) {
        return Err(bad());
    }
    Ok((members, band))
}

/// Keeps the quantization table that stands when a component first appears.
fn latch_steps(component: &mut Component, tables: &Tables) -> Result<(), String> {
    if component.steps.is_none() {
        let steps = tables.quantization.get(component.quantization).copied().flatten();
        component.steps = Some(steps.ok_or("the JPEG image lacks a quantization table")?);
    }
    Ok(())
}

fn present(table: Option<&HuffmanTable>) -> Result<&HuffmanTable, String> {
    table.ok_or_else(|| "the JPEG image lacks a Huffman table".into())
}

/// The next DC coefficient: the last one plus a coded difference.
#[inline]
fn dc(reader: &mut BitReader<'_>, member: &mut Member<'_>) -> Result<i32, String> {
    let size = reader.symbol(present(member.dc)?)?;
    if size > 15 {
        return Err("the JPEG data is damaged".into());
    }
    member.prediction = member.prediction.wrapping_add(reader.signed(size.into()));
    Ok(member.prediction)
}

/// All coefficients of a block of a sequential image, in natural order.
fn sequential_block(
    reader: &mut BitReader<'_>,
    member: &mut Member<'_>,
) -> Result<[i16; 64], String> {
    let mut block = [0; 64];
    block[0] = dc(reader, member)? as i16;
    let table = present(member.ac)?;
    let mut at = 1;
    while at < 64 {
        let symbol = reader.symbol(table)?;
        let (zeros, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if size == 0 {
            if zeros < 15 {
                break;
            }
            at += 16;
            continue;
        }
        at += zeros;
        let value = reader.signed(size) as i16;
        // A run past the end of the block is damage that libjpeg passes over.
        if let Some(position) = ZIGZAG.get(at) {
            block[*position] = value;
        }
        at += 1;
    }
    Ok(block)
}

/// One block of a progressive scan; the run counts blocks whose band has ended.
fn refine(
    reader: &mut BitReader<'_>,
    member: &mut Member<'_>,
    band: Band,
    (block, run): (&mut [i16; 64], &mut i32),
) -> Result<(), String> {
    match (band.first, band.refines) {
        (0, false) => block[0] = (dc(reader, member)? << band.low) as i16,
        (0, true) => {
            if reader.bit() {
                block[0] |= 1 << band.low;
            }
        }
        (_, false) => first_bits(reader, present(member.ac)?, band, (block, run))?,
        (_, true) => next_bit(reader, present(member.ac)?, band, (block, run))?,
    }
    Ok(())
}

/// The first scan of a band of AC coefficients (T.81, G.1.2.2).
fn first_bits(
    reader: &mut BitReader<'_>,
    table: &HuffmanTable,
    band: Band,
    (block, run): (&mut [i16; 64], &mut i32),
) -> Result<(), String> {
    if *run > 0 {
        *run -= 1;
        return Ok(());
    }
    let mut at = band.first;
    while at <= band.last {
        let symbol = reader.symbol(table)?;
        let (zeros, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if size == 0 && zeros < 15 {
            *run = (1 << zeros) - 1 + reader.take(zeros as u32);
            break;
        }
        at += zeros;
        let value = reader.signed(size) << band.low;
        if let Some(position) = ZIGZAG.get(at) {
            block[*position] = value as i16;
        }
        at += 1;
    }
    Ok(())
}

/// One more bit for a band of AC coefficients (T.81, G.1.2.3): a correction bit for each that is
/// not zero, and new coefficients of one bit among those that are.
fn next_bit(
    reader: &mut BitReader<'_>,
    table: &HuffmanTable,
    band: Band,
    (block, run): (&mut [i16; 64], &mut i32),
) -> Result<(), String> {
    let bit = 1_i16 << band.low;
    let correct = |reader: &mut BitReader<'_>, value: &mut i16| {
        if reader.bit() && *value & bit == 0 {
            *value = value.saturating_add(if *value > 0 { bit } else { -bit });
        }
    };
    let mut at = band.first;
    while *run == 0 && at <= band.last {
        let symbol = reader.symbol(table)?;
        let (mut zeros, size) = (symbol >> 4, symbol & 15);
        let mut value = 0;
        if size > 0 {
            value = if reader.bit() { bit } else { -bit };
        } else if zeros < 15 {
            *run = (1 << zeros) + reader.take(zeros.into());
            break;
        }
        // Goes past `zeros` coefficients that are still zero, to the next of them.
        while at <= band.last {
            let current = &mut block[ZIGZAG[at]];
            at += 1;
            if *current != 0 {
                correct(reader, current);
            } else if zeros == 0 {
                *current = value;
                break;
            } else {
                zeros -= 1;
            }
        }
    }
    if *run > 0 {
        for position in &ZIGZAG[at..=band.last.max(at) - usize::from(at > band.last)] {
            if block[*position] != 0 {
                correct(reader, &mut block[*position]);
            }
        }
        *run -= 1;
    }
    Ok(())
}
