//! The plain form of an integer operand: rows of small unsigned codes with their scales.

/// Largest number of codes in one group: 65 793 · 255 · 128 is the largest sum that fits an `i32`.
pub const MAX_GROUP_COLUMNS: usize = 65_793;

/// Rows of small unsigned codes, one or more terms:
/// `x̂[r, c] = Σ_terms scale[r, g] · (codes[r, c] − zero_point[r, g])`, `g = c / (columns / groups)`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Codes {
    /// Number of rows (tokens, or output channels of a weight).
    pub rows: usize,
    /// Number of columns: the summed axis.
    pub columns: usize,
    /// Contiguous groups of columns with a scale of their own; divides `columns`.
    pub groups: usize,
    /// The terms that are summed.
    pub terms: Vec<CodesTerm>,
}

/// One term of [`Codes`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CodesTerm {
    /// [rows, columns], none larger than `max_code`.
    pub codes: Vec<u8>,
    /// [rows, groups], finite.
    pub scale: Vec<f32>,
    /// [rows, groups], any value.
    pub zero_point: Vec<i32>,
    /// No code is larger. A property of the grid, never of the batch at hand: results may depend on
    /// it in their last bits.
    pub max_code: u8,
}

impl Codes {
    /// Codes in one group of a row.
    pub fn group_columns(&self) -> usize {
        self.columns.checked_div(self.groups).unwrap_or(0)
    }

    /// The largest code that any term may hold.
    pub fn max_code(&self) -> u8 {
        self.terms.iter().map(|term| term.max_code).max().unwrap_or(0)
    }

    /// Panics unless the lengths fit together: kernels rely on them.
    pub(crate) fn check(&self) {
        assert!(self.groups > 0, "operand without a group");
        assert!(self.columns.is_multiple_of(self.groups), "groups of unequal size");
        assert!(self.group_columns() <= MAX_GROUP_COLUMNS, "sums of a group leave 32 bits");
        for term in &self.terms {
            assert_eq!(term.codes.len(), self.rows * self.columns, "number of codes");
            debug_assert!(
                term.codes.iter().all(|&code| code <= term.max_code),
                "code off its grid"
            );
            assert_eq!(term.scale.len(), self.rows * self.groups, "number of scales");
            assert_eq!(term.zero_point.len(), self.rows * self.groups, "number of zero points");
        }
    }
}
