//! Codes of an operand in a pass or two, for the integer kernels: the bytes that `encode::codes_of`
//! makes of integer terms, without the terms.

use crate::error::Result;
use crate::kernels::passes::affine::Grid;
use crate::kernels::passes::groups::SignCodes;
use crate::kernels::passes::staircase::translate;
use crate::kernels::{Codes, CodesTerm};
use crate::quant::dense::Dense;
use crate::quant::encode::{BYTE, is_taken, max_code};

/// Codes under construction.
pub(crate) struct Planes {
    codes: Codes,
    code_bits: u32,
}

impl Planes {
    /// No terms yet, of codes of `code_bits` bits in `groups` groups; `None` where kernels take none.
    ///
    /// # Errors
    /// As [`Dense::values`].
    pub(crate) fn of(dense: &Dense, groups: usize, code_bits: u32) -> Result<Option<Self>> {
        let rows = dense.values()?.len() / dense.width().max(1);
        Ok(Self::new(rows, dense.width(), groups, code_bits))
    }

    /// As [`Planes::of`], for rows of `columns`.
    pub(crate) fn new(rows: usize, columns: usize, groups: usize, code_bits: u32) -> Option<Self> {
        let codes = Codes { rows, columns, groups, terms: Vec::new() };
        let fits = columns > 0 && is_taken(columns, groups, code_bits);
        fits.then_some(Self { codes, code_bits })
    }

    /// One value for every row and group.
    pub(crate) fn repeated<T: Clone>(&self, value: T) -> Vec<T> {
        vec![value; self.codes.rows * self.codes.groups]
    }

    /// Adds a term of single bytes.
    pub(crate) fn push(&mut self, codes: Vec<u8>, scale: Vec<f32>, zero_point: Vec<i32>) {
        let max_code = max_code(self.code_bits);
        self.codes.terms.push(CodesTerm { codes, scale, zero_point, max_code });
    }

    /// Adds a term of single bytes, none larger than `max_code`.
    pub(crate) fn push_up_to(&mut self, max_code: u8, sign: SignCodes) {
        let SignCodes { codes, scale, zero_point } = sign;
        self.codes.terms.push(CodesTerm { codes, scale, zero_point, max_code });
    }

    /// Adds a term of single bytes on the grids of rows and groups.
    pub(crate) fn push_grids(&mut self, codes: Vec<u8>, grids: &[Grid]) {
        let scale = grids.iter().map(|grid| grid.scale).collect();
        self.push(codes, scale, grids.iter().map(|grid| grid.zero_point as i32).collect());
    }

    /// Adds scale·(0 − 1), in as many planes as other terms.
    pub(crate) fn push_constant(&mut self, scale: Vec<f32>) {
        let nothing = vec![0; self.codes.rows * self.codes.columns];
        self.push_steps((&nothing, 0), |_| 0, scale);
        let planes = if self.code_bits > u8::BITS { 2 } else { 1 };
        let first = self.codes.terms.len() - planes;
        self.codes.terms[first].zero_point.fill(1);
    }

    /// Adds a term without zero points whose code is `code` of a staircase's steps: one plane of
    /// bytes, or two of which the second counts 256.
    /// No more than `most` steps have been passed.
    pub(crate) fn push_steps(
        &mut self,
        (steps, most): (&[u8], usize),
        code: impl Fn(u8) -> u32,
        scale: Vec<f32>,
    ) {
        let plane = |byte: u32| {
            let table = std::array::from_fn(|steps| (code(steps as u8) >> (8 * byte)) as u8);
            translate(steps, most, &table)
        };
        let Some(high_bits) = self.code_bits.checked_sub(u8::BITS).filter(|bits| *bits > 0) else {
            return self.push(plane(0), scale, self.repeated(0));
        };
        let coarse = scale.iter().map(|scale| scale * BYTE as f32).collect();
        for (byte, scale, max_code) in [(0, scale, u8::MAX), (1, coarse, max_code(high_bits))] {
            let (codes, zero_point) = (plane(byte), self.repeated(0));
            self.codes.terms.push(CodesTerm { codes, scale, zero_point, max_code });
        }
    }

    /// The codes.
    pub(crate) fn finish(self) -> Codes {
        self.codes
    }
}
