//! Plain loops: what every kernel is held against.

use crate::kernels::Codes;

/// `lhs · rhsᵀ (+ bias)` in 64-bit integers and float64: [lhs.rows, rhs.rows].
///
/// # Panics
/// When the operands' shapes do not fit each other.
pub fn product(lhs: &Codes, rhs: &Codes, bias: Option<&[f32]>) -> Vec<f64> {
    lhs.check();
    rhs.check();
    assert_eq!(lhs.columns, rhs.columns, "length of the summed axis");
    assert_eq!(rhs.groups, 1, "groups of the right operand");
    let mut out = vec![0.0; lhs.rows * rhs.rows];
    for row in 0..lhs.rows {
        for channel in 0..rhs.rows {
            let start = bias.map_or(0.0, |bias| f64::from(bias[channel]));
            out[row * rhs.rows + channel] = start + dot(lhs, row, rhs, channel);
        }
    }
    out
}

/// Σ over terms and groups of scale · scale · Σ (code − zero point) · (code − zero point).
fn dot(lhs: &Codes, row: usize, rhs: &Codes, channel: usize) -> f64 {
    let size = lhs.group_columns();
    let mut total = 0.0;
    for left in &lhs.terms {
        for right in &rhs.terms {
            for group in 0..lhs.groups {
                let parameter = row * lhs.groups + group;
                let columns = group * size..(group + 1) * size;
                let sum: i64 = columns
                    .map(|column| {
                        let x = i64::from(left.codes[row * lhs.columns + column])
                            - i64::from(left.zero_point[parameter]);
                        let w = i64::from(right.codes[channel * rhs.columns + column])
                            - i64::from(right.zero_point[channel]);
                        x * w
                    })
                    .sum();
                total +=
                    f64::from(left.scale[parameter]) * f64::from(right.scale[channel]) * sum as f64;
            }
        }
    }
    total
}
