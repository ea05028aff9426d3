//! The plain form of an integer operand: rows of small unsigned codes with their scales.

use std::cell::RefCell;
use std::collections::VecDeque;

/// Largest number of codes in one group: 65 793 · 255 · 128 is the largest sum that fits an `i32`.
pub const MAX_GROUP_COLUMNS: usize = 65_793;

/// Buffers that a thread keeps for its next codes: a forward has few sizes of them, and some of each at a
/// time.
const SPARE: usize = 8;

thread_local! {
    static BUFFERS: RefCell<VecDeque<Vec<u8>>> = const { RefCell::new(VecDeque::new()) };
}

/// `len` bytes for codes, whatever they hold; all have to be written. Making them zero would cost another
/// visit of memory.
pub(crate) fn buffer(len: usize) -> Vec<u8> {
    BUFFERS.with_borrow_mut(|spare| {
        let found = spare.iter().position(|buffer| buffer.len() == len);
        found.and_then(|index| spare.remove(index)).unwrap_or_else(|| vec![0; len])
    })
}

/// Keeps a buffer for the next one of its size.
pub(crate) fn recycle(buffer: Vec<u8>) {
    BUFFERS.with_borrow_mut(|spare| {
        spare.truncate(SPARE - 1);
        spare.push_front(buffer);
    });
}

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

    /// Keeps what they hold for the calling thread's next codes.
    pub fn recycle(self) {
        self.terms.into_iter().for_each(|term| recycle(term.codes));
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

    /// x̂, row by row.
    #[cfg(test)]
    pub(crate) fn decoded(&self) -> Vec<f32> {
        let value = |at: usize, term: &CodesTerm| {
            let (row, column) = (at / self.columns, at % self.columns);
            let group = row * self.groups + column / self.group_columns();
            term.scale[group] * (i32::from(term.codes[at]) - term.zero_point[group]) as f32
        };
        let count = self.rows * self.columns;
        (0..count).map(|at| self.terms.iter().map(|term| value(at, term)).sum()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_buffers_are_kept_for_their_size() {
        for len in 1..=SPARE + 1 {
            recycle(vec![len as u8; len]);
        }
        assert_eq!(buffer(SPARE + 1), vec![SPARE as u8 + 1; SPARE + 1], "the last one is there");
        assert_eq!(buffer(SPARE + 1), vec![0; SPARE + 1], "and was taken");
        assert_eq!(buffer(1), [0], "the first one had to go");
        assert_eq!(buffer(SPARE + 2), [0; SPARE + 2], "there was none");
    }
}
