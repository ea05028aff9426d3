//! Integer matrix products on the CPU: `out = lhs · rhsᵀ (+ bias)` over codes, rescaled to float32.
//!
//! [`product`] multiplies rows of codes with a right operand that was packed once ([`PackedRhs`]);
//! [`product_batch`] multiplies many small pairs (attention heads). A row's result depends on nothing
//! but that row: not on other rows, the thread count, or the instruction set.

mod codes;
pub mod cpu_elementwise;
pub mod cpu_slices;
mod packed;
pub mod reference;

pub use codes::{Codes, CodesTerm, MAX_GROUP_COLUMNS};
pub use packed::PackedRhs;

/// `out[m, n] = lhs · rhsᵀ (+ bias[n])`, row-major.
///
/// # Panics
/// When shapes do not fit, or `lhs` has other groups or larger codes than `rhs` was packed for.
pub fn product(lhs: &Codes, rhs: &PackedRhs, bias: Option<&[f32]>, out: &mut [f32]) {
    assert_eq!(lhs.groups, rhs.lhs_groups, "groups of the left operand");
    assert!(lhs.max_code() <= rhs.lhs_max_code, "codes of the left operand");
    let result = reference::product(lhs, &rhs.codes, bias);
    assert_eq!(out.len(), result.len(), "length of the result");
    out.iter_mut().zip(result).for_each(|(to, from)| *to = from as f32);
}

/// `batch` products of matrices that lie below each other in `lhs` [batch · m, k] and `rhs`
/// [batch · n, k]: `out[batch, m, n]`. For attention: one matrix per image and head.
///
/// # Panics
/// When shapes do not fit, or the rows do not divide into `batch` matrices.
pub fn product_batch(lhs: &Codes, rhs: &Codes, batch: usize, out: &mut [f32]) {
    lhs.check();
    rhs.check();
    assert!(lhs.rows.is_multiple_of(batch) && rhs.rows.is_multiple_of(batch), "rows of a batch");
    let (m, n) = (lhs.rows / batch, rhs.rows / batch);
    assert_eq!(out.len(), batch * m * n, "length of the result");
    for (i, out) in out.chunks_exact_mut((m * n).max(1)).enumerate() {
        let rhs = rows(rhs, i * n, n);
        product(
            &rows(lhs, i * m, m),
            &PackedRhs::pack(&rhs, lhs.groups, lhs.max_code()),
            None,
            out,
        );
    }
}

fn rows(codes: &Codes, first: usize, count: usize) -> Codes {
    let part = |width: usize| first * width..(first + count) * width;
    let terms = codes.terms.iter().map(|term| CodesTerm {
        codes: term.codes[part(codes.columns)].to_vec(),
        scale: term.scale[part(codes.groups)].to_vec(),
        zero_point: term.zero_point[part(codes.groups)].to_vec(),
        max_code: term.max_code,
    });
    Codes { rows: count, columns: codes.columns, groups: codes.groups, terms: terms.collect() }
}
