//! Bit widths, as a type of their own.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Smallest bit width a client may ask for.
pub const MIN_BITS: u8 = 3;
/// Largest bit width a client may ask for.
pub const MAX_BITS: u8 = 8;

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

#[cfg(test)]
mod tests {
    use super::*;

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
