//! What an operand costs at run time: bits per element, and what dynamic and grouped grids add.
//!
//! docs/methods.md ("Effective bits and bit operations") defines how products add these up.

use crate::quant::BitWidth;
use crate::quant::bits::FLOAT_BITS;

/// Bits of a scale that is found at run time: float32.
pub const SCALE_BITS: f64 = 32.0;
/// Bits of a scale and a zero point that are found at run time: float32 and int32.
pub const RANGE_BITS: f64 = 64.0;

/// The cost of one image's operand.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OperandCost {
    /// Bits of an element: log2 of the number of its symbols, the mean where elements differ.
    pub element_bits: f64,
    /// Bits of the parameters found at run time: scales, zero points, bit widths, assignments.
    pub metadata_bits: f64,
    /// 32-bit operations that find those parameters.
    pub operations: f64,
    /// Sums that a product with this operand keeps apart: 1 where one scale factors out of the sum.
    pub partial_sums: f64,
}

impl OperandCost {
    /// A static grid of 2^bits symbols whose scale factors out of a sum.
    pub fn of_grid(bits: BitWidth) -> Self {
        Self::of_bits(bits.get().into())
    }

    /// A static grid of 2^bits symbols and one more.
    pub fn with_extra_symbol(bits: BitWidth) -> Self {
        Self::of_bits((bits.max_code() + 2.0).log2())
    }

    /// An operand that stays float32.
    pub fn float() -> Self {
        Self::of_bits(FLOAT_BITS.into())
    }

    fn of_bits(element_bits: f64) -> Self {
        Self { element_bits, metadata_bits: 0.0, operations: 0.0, partial_sums: 1.0 }
    }
}

/// Elements of an operand of that shape.
pub fn elements(shape: &[i64]) -> f64 {
    shape.iter().map(|n| *n as f64).product()
}

/// Rows of an operand of that shape: all axes but the last.
pub fn rows(shape: &[i64]) -> f64 {
    elements(shape.split_last().map_or(&[], |(_, rows)| rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extra_symbol_is_a_fraction_of_a_bit() {
        let four = BitWidth::new(4, "bits").unwrap();
        assert_eq!(OperandCost::of_grid(four).element_bits, 4.0);
        let extra = OperandCost::with_extra_symbol(four).element_bits;
        assert!((extra - 17f64.log2()).abs() < 1e-12);
        assert_eq!(OperandCost::float().element_bits, 32.0);
    }

    #[test]
    fn shapes_are_counted() {
        assert_eq!((elements(&[2, 3, 4]), rows(&[2, 3, 4])), (24.0, 6.0));
        assert_eq!((elements(&[]), rows(&[])), (1.0, 1.0));
    }
}
