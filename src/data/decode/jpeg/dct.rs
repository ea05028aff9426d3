//! The inverse DCT after Loeffler, Ligtenberg and Moschytz with 13-bit constants: the integer
//! steps and roundings of libjpeg's accurate method.

use std::num::Wrapping;

/// Natural (row-major) position of the n-th coefficient in zigzag order.
pub(super) const ZIGZAG: [usize; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Fractional bits of the constants.
const CONSTANT_BITS: usize = 13;
/// Fractional bits kept between the passes.
const PASS_BITS: usize = 2;

/// Damaged data may overflow; then any value will do.
type Int = Wrapping<i32>;

/// 8 samples' worth of one-dimensional transform; `shift` is the scaling at its end.
#[inline(always)]
fn transform(c: [Int; 8], shift: usize) -> [Int; 8] {
    let constant = |value: i32| Wrapping(value);
    // Even part: cosines of multiples of π/8.
    let z = (c[2] + c[6]) * constant(4433);
    let low = z - c[6] * constant(15137);
    let high = z + c[2] * constant(6270);
    let sum = (c[0] + c[4]) << CONSTANT_BITS;
    let difference = (c[0] - c[4]) << CONSTANT_BITS;
    let even = [sum + high, difference + low, difference - low, sum - high];
    // Odd part: cosines of odd multiples of π/16.
    let (z1, z2, z3, z4) = (c[7] + c[1], c[5] + c[3], c[7] + c[3], c[5] + c[1]);
    let z5 = (z3 + z4) * constant(9633);
    let (z1, z2) = (z1 * constant(-7373), z2 * constant(-20995));
    let (z3, z4) = (z3 * constant(-16069) + z5, z4 * constant(-3196) + z5);
    let odd = [
        c[1] * constant(12299) + z1 + z4,
        c[3] * constant(25172) + z2 + z3,
        c[5] * constant(16819) + z2 + z4,
        c[7] * constant(2446) + z1 + z3,
    ];
    let half = Wrapping(1 << (shift - 1));
    std::array::from_fn(|n| {
        let value = if n < 4 { even[n] + odd[n] } else { even[7 - n] - odd[7 - n] };
        (value + half) >> shift
    })
}

/// Dequantizes and transforms a block into the 8×8 samples at the start of `out`, whose rows are
/// `stride` apart.
pub(super) fn inverse(block: &[i16; 64], steps: &[u16; 64], out: &mut [u8], stride: usize) {
    if block[1..].iter().all(|coefficient| *coefficient == 0) {
        // The same result as below: a constant block.
        let dc = Wrapping(i32::from(block[0])) * Wrapping(i32::from(steps[0]));
        let level = sample(((dc << PASS_BITS) + Wrapping(16)) >> (PASS_BITS + 3));
        out.chunks_mut(stride).take(8).for_each(|row| row[..8].fill(level));
        return;
    }
    let mut columns = [[Wrapping(0); 8]; 8];
    for (x, column) in columns.iter_mut().enumerate() {
        let coefficients = std::array::from_fn(|y| {
            Wrapping(i32::from(block[8 * y + x])) * Wrapping(i32::from(steps[8 * y + x]))
        });
        *column = transform(coefficients, CONSTANT_BITS - PASS_BITS);
    }
    for (y, row) in out.chunks_mut(stride).take(8).enumerate() {
        let values = std::array::from_fn(|x| columns[x][y]);
        let values = transform(values, CONSTANT_BITS + PASS_BITS + 3);
        for (out, value) in row.iter_mut().zip(values) {
            *out = sample(value);
        }
    }
}

/// Undoes the level shift.
#[inline(always)]
fn sample(value: Int) -> u8 {
    (value + Wrapping(128)).0.clamp(0, 255) as u8
}
