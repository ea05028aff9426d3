//! Tensors as the protocol carries them: shapes, and elements as bytes. Pure functions of what came
//! in, so that they can be tested with anything.
//!
//! Raw elements lie in row-major order without padding. FP32 is little-endian; an element of BYTES
//! is its length, as four bytes little-endian, and then the bytes themselves.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

use crate::error::{Error, Result};

/// Bytes of an FP32 element, and of the length in front of a BYTES element.
const WORD: usize = size_of::<u32>();

/// The element types that models here have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataType {
    /// Strings of bytes.
    Bytes,
    /// Floats.
    Fp32,
}

impl DataType {
    /// The protocol's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bytes => "BYTES",
            Self::Fp32 => "FP32",
        }
    }
}

/// A tensor's elements in row-major order.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// Of type BYTES.
    Bytes(Vec<Bytes>),
    /// Of type FP32.
    Fp32(Vec<f32>),
}

impl Elements {
    /// Reads `count` raw elements. BYTES elements share memory with `raw`. Allocates for no element
    /// that is not there.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` when `raw` does not hold exactly `count` elements.
    pub fn from_raw(kind: DataType, count: usize, raw: &Bytes, field: &str) -> Result<Self> {
        match kind {
            DataType::Bytes => strings(count, raw.clone(), field).map(Self::Bytes),
            DataType::Fp32 => floats(count, raw, field).map(Self::Fp32),
        }
    }

    /// The elements as [`Elements::from_raw`] reads them.
    ///
    /// # Errors
    /// `Internal` for an element of 4 GiB.
    pub fn to_raw(&self) -> Result<Bytes> {
        match self {
            Self::Bytes(elements) => raw_strings(elements),
            Self::Fp32(values) => Ok(values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        }
    }
}

/// The number of elements of a shape; 1 for the empty shape.
///
/// # Errors
/// `InvalidArgument` on `field` for a negative size, or for more elements than memory has bytes.
pub fn element_count(shape: &[i64], field: &str) -> Result<usize> {
    let mut count = 1_usize;
    for &size in shape {
        let Ok(size) = usize::try_from(size) else {
            return Err(Error::invalid(field, format!("{size} is no size")));
        };
        count = count.checked_mul(size).ok_or_else(|| {
            Error::invalid(field, format!("{shape:?} has more elements than fit into memory"))
        })?;
    }
    Ok(count)
}

fn floats(count: usize, raw: &[u8], field: &str) -> Result<Vec<f32>> {
    let (words, rest) = raw.as_chunks::<WORD>();
    if words.len() != count || !rest.is_empty() {
        let reason = format!("{} bytes, the shape's {count} elements have 4 each", raw.len());
        return Err(Error::invalid(field, reason));
    }
    Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
}

fn strings(count: usize, mut raw: Bytes, field: &str) -> Result<Vec<Bytes>> {
    // Every element has a length, so that many can be there at most.
    if count > raw.len() / WORD {
        let reason = format!("{} bytes cannot hold the shape's {count} elements", raw.len());
        return Err(Error::invalid(field, reason));
    }
    let mut elements = Vec::with_capacity(count);
    for index in 0..count {
        let ends = || Error::invalid(field, format!("ends within element {index}"));
        let size = raw.try_get_u32_le().map_err(|_| ends())?;
        let size = usize::try_from(size).map_err(|_| ends())?;
        if size > raw.len() {
            return Err(ends());
        }
        elements.push(raw.split_to(size));
    }
    if raw.is_empty() {
        return Ok(elements);
    }
    let reason = format!("{} bytes behind the shape's {count} elements", raw.len());
    Err(Error::invalid(field, reason))
}

fn raw_strings(elements: &[Bytes]) -> Result<Bytes> {
    let mut raw = BytesMut::with_capacity(elements.iter().map(|e| WORD + e.len()).sum());
    for element in elements {
        let size = u32::try_from(element.len())
            .map_err(|_| Error::internal(format!("an element of {} bytes", element.len())))?;
        raw.put_u32_le(size);
        raw.put_slice(element);
    }
    Ok(raw.freeze())
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn refused(kind: DataType, count: usize, raw: &[u8]) -> String {
        let raw = Bytes::copy_from_slice(raw);
        let error = Elements::from_raw(kind, count, &raw, "raw[0]").unwrap_err();
        let Error::InvalidArgument { field, reason } = error else { panic!("{error}") };
        assert_eq!(field, "raw[0]");
        reason
    }

    #[test]
    fn bytes_have_their_length_in_front() {
        let raw = Bytes::from_static(b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c");
        let read = Elements::from_raw(DataType::Bytes, 3, &raw, "raw").unwrap();
        assert_eq!(read, Elements::Bytes(vec!["ab".into(), "".into(), "c".into()]));
        assert_eq!(read.to_raw().unwrap(), raw);
    }

    #[test]
    fn floats_are_little_endian() {
        let raw = Bytes::from_static(&[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
        let read = Elements::from_raw(DataType::Fp32, 2, &raw, "raw").unwrap();
        assert_eq!(read, Elements::Fp32(vec![1.0, -2.0]));
    }

    #[test]
    fn what_is_too_short_or_too_long_is_refused_with_the_reason() {
        use DataType::{Bytes, Fp32};
        assert!(refused(Fp32, 2, &[0; 7]).starts_with("7 bytes"));
        assert!(refused(Fp32, 2, &[0; 9]).starts_with("9 bytes"));
        assert!(refused(Fp32, usize::MAX, &[0; 8]).starts_with("8 bytes"));
        assert!(refused(Bytes, usize::MAX, &[0; 8]).starts_with("8 bytes cannot hold"));
        assert!(refused(Bytes, 1, b"\x02\0\0\0a").contains("within element 0"));
        assert!(refused(Bytes, 2, b"\x04\0\0\0abcd").contains("within element 1"));
        assert!(refused(Bytes, 1, b"\xff\xff\xff\xffabcd").contains("within element 0"));
        assert!(refused(Bytes, 1, b"\0\0\0\0ab").starts_with("2 bytes behind"));
        assert!(refused(Bytes, 0, b"a").starts_with("1 bytes behind"));
    }

    #[test]
    fn shapes_are_counted_without_overflow() {
        assert_eq!(element_count(&[], "shape").unwrap(), 1);
        assert_eq!(element_count(&[2, 3, 32, 32], "shape").unwrap(), 6144);
        assert_eq!(element_count(&[0, 3], "shape").unwrap(), 0);
        for bad in [&[-1_i64, 3][..], &[i64::MIN], &[i64::MAX, 4], &[1 << 32, 1 << 32]] {
            let error = element_count(bad, "shape").unwrap_err();
            let Error::InvalidArgument { field, .. } = error else { panic!("{error}") };
            assert_eq!(field, "shape");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            strings in vec(vec(any::<u8>(), 0..40), 0..8),
            values in vec(any::<f32>(), 0..40),
        ) {
            let strings = Elements::Bytes(strings.into_iter().map(Bytes::from).collect());
            let count = |elements: &Elements| match elements {
                Elements::Bytes(elements) => elements.len(),
                Elements::Fp32(values) => values.len(),
            };
            let raw = strings.to_raw().unwrap();
            let read = Elements::from_raw(DataType::Bytes, count(&strings), &raw, "raw").unwrap();
            prop_assert_eq!(&read, &strings);
            let floats = Elements::Fp32(values);
            let raw = floats.to_raw().unwrap();
            let read = Elements::from_raw(DataType::Fp32, count(&floats), &raw, "raw").unwrap();
            // By their bits: NaN is not equal to itself.
            prop_assert_eq!(read.to_raw().unwrap(), raw);
        }

        #[test]
        fn whatever_is_accepted_is_written_as_it_came(
            raw in vec(prop_oneof![Just(0_u8), 0_u8..4, any::<u8>()], 0..64),
            count in 0_usize..10,
            shape in vec(prop_oneof![-1_i64..5, any::<i64>()], 0..5),
        ) {
            let raw = Bytes::from(raw);
            for kind in [DataType::Bytes, DataType::Fp32] {
                if let Ok(read) = Elements::from_raw(kind, count, &raw, "raw") {
                    prop_assert_eq!(&read.to_raw().unwrap(), &raw);
                }
            }
            if let Ok(count) = element_count(&shape, "shape") {
                let exact: i128 = shape.iter().map(|size| i128::from(*size)).product();
                prop_assert_eq!(i128::try_from(count).unwrap(), exact);
            }
        }
    }
}
