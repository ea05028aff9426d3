//! The right operand, packed once for many products.

use crate::kernels::Codes;

/// A weight or the right operand of an attention product,
/// `ŵ[o, k] = Σ_terms scale[o] · (codes[o, k] − zero_point[o])`, laid out for the kernels.
#[derive(Clone, Debug)]
pub struct PackedRhs {
    pub(super) codes: Codes,
    pub(super) lhs_groups: usize,
    pub(super) lhs_max_code: u8,
}

impl PackedRhs {
    /// Packs `codes` (one group) for left operands of `lhs_groups` groups and codes up to
    /// `lhs_max_code`.
    ///
    /// # Panics
    /// When the lengths of `codes` do not fit together, or a group has more than
    /// [`MAX_GROUP_COLUMNS`](crate::kernels::MAX_GROUP_COLUMNS) columns.
    pub fn pack(codes: &Codes, lhs_groups: usize, lhs_max_code: u8) -> Self {
        codes.check();
        Self { codes: codes.clone(), lhs_groups, lhs_max_code }
    }

    /// Bytes of memory that it holds.
    pub fn resident_bytes(&self) -> u64 {
        let terms = self.codes.terms.iter();
        terms.map(|t| (t.codes.len() + 4 * t.scale.len() + 4 * t.zero_point.len()) as u64).sum()
    }

    /// Number of rows: columns of the result.
    pub fn rows(&self) -> usize {
        self.codes.rows
    }

    /// Length of the summed axis.
    pub fn columns(&self) -> usize {
        self.codes.columns
    }
}
