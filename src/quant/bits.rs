//! Bit widths, and bit widths or float, as types of their own.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Smallest bit width a client may ask for.
pub const MIN_BITS: u8 = 3;
/// Largest bit width a client may ask for.
pub const MAX_BITS: u8 = 8;
/// The number that stands for float32 among bit widths.
pub const FLOAT_BITS: u8 = 32;

/// Number of bits of a code. Clients choose 3..=8; token-wise methods use n−1 and n+1 inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BitWidth(u8);

impl BitWidth {
    /// 8 bits, the width of the `int8` stem/head policy.
    pub const EIGHT: Self = Self(8);

    /// A bit width a client may ask for.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` outside 3..=8.
    pub fn new(bits: u32, field: &str) -> Result<Self> {
        u8::try_from(bits).ok().filter(|b| (MIN_BITS..=MAX_BITS).contains(b)).map(Self).ok_or_else(
            || {
                Error::invalid(
                    field,
                    format!("{bits} bits are not supported, choose {MIN_BITS} to {MAX_BITS}"),
                )
            },
        )
    }

    /// The number of bits.
    pub fn get(self) -> u8 {
        self.0
    }

    /// Largest code of an unsigned grid: 2^bits − 1.
    pub fn max_code(self) -> f64 {
        f64::from((1u32 << self.0) - 1)
    }
}

impl fmt::Display for BitWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a client asks for an operand: a bit width, or to be left float. As a number, float is 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Precision {
    /// Quantized.
    Bits(BitWidth),
    /// Left float.
    Float,
}

impl Precision {
    /// 3 to 8 bits, or 32 for float.
    ///
    /// # Errors
    /// `InvalidArgument` on `field` for another number.
    pub fn new(bits: u32, field: &str) -> Result<Self> {
        if bits == u32::from(FLOAT_BITS) {
            return Ok(Self::Float);
        }
        BitWidth::new(bits, field).map(Self::Bits).map_err(|_| {
            let range = format!("choose {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float");
            Error::invalid(field, format!("{bits} bits are not supported, {range}"))
        })
    }

    /// A number as for [`Precision::new`], or `float`.
    ///
    /// # Errors
    /// `InvalidArgument` on `field`.
    pub fn parse(text: &str, field: &str) -> Result<Self> {
        if text == "float" {
            return Ok(Self::Float);
        }
        let number = text.parse().map_err(|_| {
            Error::invalid(field, format!("`{text}` is neither a whole number nor float"))
        })?;
        Self::new(number, field)
    }

    /// The number: 3 to 8, or 32.
    pub fn get(self) -> u8 {
        self.bits().map_or(FLOAT_BITS, BitWidth::get)
    }

    /// The bit width, unless float.
    pub fn bits(self) -> Option<BitWidth> {
        match self {
            Self::Bits(bits) => Some(bits),
            Self::Float => None,
        }
    }
}

impl From<BitWidth> for Precision {
    fn from(bits: BitWidth) -> Self {
        Self::Bits(bits)
    }
}

impl From<Precision> for u32 {
    fn from(precision: Precision) -> Self {
        precision.get().into()
    }
}

impl TryFrom<u32> for Precision {
    type Error = Error;

    fn try_from(bits: u32) -> Result<Self> {
        Self::new(bits, "bits")
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bits(bits) => bits.fmt(f),
            Self::Float => f.write_str("float"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_precision_is_three_to_eight_bits_or_float() {
        for (text, number) in [("3", 3), ("8", 8), ("float", 32), ("32", 32)] {
            let precision = Precision::parse(text, "bits").unwrap();
            assert_eq!(precision.get(), number);
            assert_eq!(precision.bits().is_none(), number == FLOAT_BITS);
            let json = serde_json::to_value(precision).unwrap();
            assert_eq!(json, number);
            assert_eq!(serde_json::from_value::<Precision>(json).unwrap(), precision);
            assert_eq!(Precision::parse(&precision.to_string(), "bits").unwrap(), precision);
        }
        for text in ["2", "16", "4.0", "Float", ""] {
            let error = Precision::parse(text, "weight_bits").unwrap_err();
            assert!(
                matches!(error, Error::InvalidArgument { field, .. } if field == "weight_bits")
            );
        }
    }

    #[test]
    fn only_three_to_eight_bits_are_accepted() {
        for bits in 3..=8 {
            assert_eq!(
                BitWidth::new(bits, "bits").unwrap().max_code(),
                2f64.powi(bits as i32) - 1.0
            );
        }
        for bits in [0, 1, 2, 9, 256, 260] {
            let error = BitWidth::new(bits, "weight_bits").unwrap_err();
            assert!(
                matches!(error, Error::InvalidArgument { field, .. } if field == "weight_bits")
            );
        }
    }
}
