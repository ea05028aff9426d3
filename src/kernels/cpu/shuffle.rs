//! Moving bytes and numbers between the lanes of a register, of which compilers make no vector code.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Entries of a table that fits a register.
pub(crate) const TABLE: usize = 16;

/// `out = table[count − first]` of every count, 0 of those that the table does not have.
///
/// # Panics
/// When the lengths differ.
pub(crate) fn look_up(counts: &[u8], (first, table): (u8, &[u8; TABLE]), out: &mut [u8]) {
    assert_eq!(counts.len(), out.len(), "number of counts");
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has AVX2.
        done = unsafe { look_up_avx2(counts, (first, table), out) };
    }
    for (out, count) in out[done..].iter_mut().zip(&counts[done..]) {
        *out = table.get(usize::from(count.wrapping_sub(first))).copied().unwrap_or(0);
    }
}

/// As many as fill registers; returns how many.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn look_up_avx2(counts: &[u8], (first, table): (u8, &[u8; TABLE]), out: &mut [u8]) -> usize {
    const LANES: usize = 32;
    // SAFETY: a table is 16 bytes; the load is unaligned.
    let table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())) };
    let (counts, _) = counts.as_chunks::<LANES>();
    let (out, _) = out.as_chunks_mut::<LANES>();
    let first = _mm256_set1_epi8(first.cast_signed());
    // A sum beyond this and 15 has the bit for which a shuffle gives 0; the last four bits stay.
    let bound = _mm256_set1_epi8(0x70);
    for (count, out) in counts.iter().zip(out) {
        // SAFETY: both are 32 bytes; load and store are unaligned.
        unsafe {
            let index = _mm256_sub_epi8(_mm256_loadu_si256(count.as_ptr().cast()), first);
            let found = _mm256_shuffle_epi8(table, _mm256_adds_epu8(index, bound));
            _mm256_storeu_si256(out.as_mut_ptr().cast(), found);
        }
    }
    counts.len() * LANES
}

/// `to[column, row] = from[row, column]`; rows of `from` begin `stride` numbers apart.
///
/// # Panics
/// When `from` is too short for as many rows, or `to` is not as large.
pub fn transpose(from: &[f32], stride: usize, [rows, columns]: [usize; 2], to: &mut [f32]) {
    assert_eq!(to.len(), rows * columns, "size of the transposed matrix");
    if to.is_empty() {
        return;
    }
    assert!(stride >= columns && from.len() >= (rows - 1) * stride + columns, "size of the matrix");
    #[cfg(target_arch = "x86_64")]
    let (whole_rows, whole_columns) = if is_x86_feature_detected!("avx") {
        // SAFETY: the machine has AVX; the sizes are checked above.
        unsafe { transpose_avx(from, stride, [rows, columns], to) }
    } else {
        (0, 0)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let (whole_rows, whole_columns) = (0, 0);
    transpose_rest((from, stride), [rows, columns], [whole_rows, whole_columns], to);
}

/// What is left of a transposition after the first rows and columns. Rows of `from` begin `stride` elements apart.
fn transpose_rest<T: Copy>(
    (from, stride): (&[T], usize),
    [rows, columns]: [usize; 2],
    [whole_rows, whole_columns]: [usize; 2],
    to: &mut [T],
) {
    for column in 0..columns {
        let first = if column < whole_columns { whole_rows } else { 0 };
        for row in first..rows {
            to[column * rows + row] = from[row * stride + column];
        }
    }
}

/// `to[column, row] = from[row, column]`, of bytes.
///
/// # Panics
/// When the lengths are not those of the matrix.
pub(crate) fn transpose_bytes(from: &[u8], [rows, columns]: [usize; 2], to: &mut [u8]) {
    assert!(from.len() == rows * columns && to.len() == from.len(), "size of the matrix");
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has SSE2; the sizes are checked above.
    let (whole_rows, whole_columns) = unsafe { transpose_sse2(from, [rows, columns], to) };
    #[cfg(not(target_arch = "x86_64"))]
    let (whole_rows, whole_columns) = (0, 0);
    transpose_rest((from, columns), [rows, columns], [whole_rows, whole_columns], to);
}

/// As many rows and columns as make squares of 16; returns these numbers.
///
/// # Safety
/// Both must hold `rows` times `columns` bytes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse2")]
unsafe fn transpose_sse2(
    from: &[u8],
    [rows, columns]: [usize; 2],
    to: &mut [u8],
) -> (usize, usize) {
    const SIDE: usize = 16;
    let (whole_rows, whole_columns) = (rows - rows % SIDE, columns - columns % SIDE);
    for row in (0..whole_rows).step_by(SIDE) {
        for column in (0..whole_columns).step_by(SIDE) {
            let mut lines = [_mm_setzero_si128(); SIDE];
            for (index, line) in lines.iter_mut().enumerate() {
                // SAFETY: rows row..row + 16 and columns column..column + 16 exist; the load is unaligned.
                *line = unsafe {
                    _mm_loadu_si128(from.as_ptr().add((row + index) * columns + column).cast())
                };
            }
            // Four times, each line and the one 8 further on are dealt out in turns: the four bits of a place go
            // round by one, and with them those of row and column change places.
            for _ in 0..4 {
                let mut dealt = lines;
                for index in 0..SIDE / 2 {
                    let (low, high) = (lines[index], lines[index + SIDE / 2]);
                    dealt[2 * index] = _mm_unpacklo_epi8(low, high); // punpcklbw
                    dealt[2 * index + 1] = _mm_unpackhi_epi8(low, high); // punpckhbw
                }
                lines = dealt;
            }
            for (index, line) in lines.into_iter().enumerate() {
                // SAFETY: as above, with rows and columns exchanged.
                unsafe {
                    let out = to.as_mut_ptr().add((column + index) * rows + row);
                    _mm_storeu_si128(out.cast(), line);
                }
            }
        }
    }
    (whole_rows, whole_columns)
}

/// As many rows and columns as make squares of 8; returns these numbers.
///
/// # Safety
/// `from` must hold `rows` rows of `columns` numbers `stride` apart, and `to` as many.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn transpose_avx(
    from: &[f32],
    stride: usize,
    [rows, columns]: [usize; 2],
    to: &mut [f32],
) -> (usize, usize) {
    const SIDE: usize = 8;
    let (whole_rows, whole_columns) = (rows - rows % SIDE, columns - columns % SIDE);
    for row in (0..whole_rows).step_by(SIDE) {
        for column in (0..whole_columns).step_by(SIDE) {
            let mut lines = [_mm256_setzero_ps(); SIDE];
            for (index, line) in lines.iter_mut().enumerate() {
                // SAFETY: rows row..row + 8 and columns column..column + 8 exist.
                *line =
                    unsafe { _mm256_loadu_ps(from.as_ptr().add((row + index) * stride + column)) };
            }
            let [a, b, c, d, e, f, g, h] = lines;
            // Pairs, fours and halves change places.
            let [ab, cd, ef, gh] = [[a, b], [c, d], [e, f], [g, h]]
                .map(|[x, y]| [_mm256_unpacklo_ps(x, y), _mm256_unpackhi_ps(x, y)]);
            let fours = |x: [__m256; 2], y: [__m256; 2]| {
                [
                    _mm256_shuffle_ps::<0b01_00_01_00>(x[0], y[0]),
                    _mm256_shuffle_ps::<0b11_10_11_10>(x[0], y[0]),
                    _mm256_shuffle_ps::<0b01_00_01_00>(x[1], y[1]),
                    _mm256_shuffle_ps::<0b11_10_11_10>(x[1], y[1]),
                ]
            };
            let (upper, lower) = (fours(ab, cd), fours(ef, gh));
            for index in 0..SIDE / 2 {
                let low = _mm256_permute2f128_ps::<0x20>(upper[index], lower[index]);
                let high = _mm256_permute2f128_ps::<0x31>(upper[index], lower[index]);
                // SAFETY: as above, with rows and columns exchanged.
                unsafe {
                    let out = to.as_mut_ptr().add((column + index) * rows + row);
                    _mm256_storeu_ps(out, low);
                    _mm256_storeu_ps(out.add(SIDE / 2 * rows), high);
                }
            }
        }
    }
    (whole_rows, whole_columns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_looked_up() {
        let table = std::array::from_fn(|index| (index * 37 + 5) as u8);
        for first in [0, 1, 100, 239, 240, 250] {
            for len in [0, 1, 31, 32, 33, 300] {
                let counts: Vec<u8> = (0..len).map(|index| (index * 7) as u8).collect();
                let mut out = vec![99; len];
                look_up(&counts, (first, &table), &mut out);
                let code = |count: &u8| match usize::from(count.wrapping_sub(first)) {
                    index @ 0..TABLE => table[index],
                    _ => 0,
                };
                assert_eq!(out, counts.iter().map(code).collect::<Vec<u8>>());
            }
        }
    }

    #[test]
    fn matrices_are_transposed() {
        for (rows, columns, stride) in
            [(1, 1, 1), (8, 8, 8), (197, 64, 100), (5, 19, 20), (9, 16, 16)]
        {
            let from: Vec<f32> = (0..rows * stride).map(|index| index as f32).collect();
            let mut to = vec![0.0; rows * columns];
            transpose(&from, stride, [rows, columns], &mut to);
            for (index, found) in to.iter().enumerate() {
                assert_eq!(*found, from[index % rows * stride + index / rows]);
            }
        }
    }

    #[test]
    fn matrices_of_bytes_are_transposed() {
        for [rows, columns] in [[1, 1], [16, 16], [197, 64], [49, 32], [5, 40], [32, 3], [0, 7]] {
            let from: Vec<u8> = (0..rows * columns).map(|index| (index * 7 % 251) as u8).collect();
            let mut to = vec![0; from.len()];
            transpose_bytes(&from, [rows, columns], &mut to);
            for (index, found) in to.iter().enumerate() {
                assert_eq!(*found, from[index % rows * columns + index / rows]);
            }
        }
    }
}
