//! Packing of n-bit codes: little-endian bit order, every row starts on a byte.

use crate::error::{Error, Result};

/// Bytes of a packed row of `count` codes.
pub fn packed_row_bytes(count: usize, bits: u8) -> usize {
    (count * usize::from(bits)).div_ceil(8)
}

/// Packs rows of `row` codes each; every code must be below 2^bits.
///
/// # Errors
/// `Internal` when a code does not fit.
pub fn pack(codes: &[u8], row: usize, bits: u8) -> Result<Vec<u8>> {
    let limit = 1u16 << bits;
    let mut packed = Vec::with_capacity(codes.len() / row.max(1) * packed_row_bytes(row, bits));
    for codes in codes.chunks(row.max(1)) {
        let (mut buffer, mut filled) = (0u32, 0u32);
        for code in codes {
            if u16::from(*code) >= limit {
                return Err(Error::internal(format!("code {code} does not fit {bits} bits")));
            }
            buffer |= u32::from(*code) << filled;
            filled += u32::from(bits);
            while filled >= 8 {
                packed.push((buffer & 0xff) as u8);
                buffer >>= 8;
                filled -= 8;
            }
        }
        if filled > 0 {
            packed.push((buffer & 0xff) as u8);
        }
    }
    Ok(packed)
}

/// The inverse of [`pack`]: one code per byte.
pub fn unpack(packed: &[u8], row: usize, bits: u8) -> Vec<u8> {
    let mask = (1u32 << bits) - 1;
    let row_bytes = packed_row_bytes(row, bits).max(1);
    let mut codes = Vec::with_capacity(packed.len() / row_bytes * row);
    for bytes in packed.chunks(row_bytes) {
        let (mut buffer, mut filled) = (0u32, 0u32);
        let mut source = bytes.iter();
        for _ in 0..row {
            while filled < u32::from(bits) {
                buffer |= u32::from(source.next().copied().unwrap_or(0)) << filled;
                filled += 8;
            }
            codes.push((buffer & mask) as u8);
            buffer >>= bits;
            filled -= u32::from(bits);
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn four_bits_are_two_codes_a_byte() {
        assert_eq!(pack(&[1, 2, 3, 4, 5, 6], 3, 4).unwrap(), [0x21, 0x03, 0x54, 0x06]);
        assert_eq!(packed_row_bytes(384, 4), 192);
    }

    #[test]
    fn a_code_that_does_not_fit_is_refused() {
        assert!(pack(&[8], 1, 3).is_err());
    }

    proptest! {
        #[test]
        fn packing_round_trips(bits in 3u8..=8, row in 1usize..40, rows in 1usize..5, seed in any::<u64>()) {
            let codes: Vec<u8> = (0..row * rows)
                .map(|i| (seed.wrapping_mul(i as u64 + 1) >> 40) as u8 & ((1u16 << bits) - 1) as u8)
                .collect();
            let packed = pack(&codes, row, bits).unwrap();
            prop_assert_eq!(packed.len(), rows * packed_row_bytes(row, bits));
            prop_assert_eq!(unpack(&packed, row, bits), codes);
        }
    }
}
