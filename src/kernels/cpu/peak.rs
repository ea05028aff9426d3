//! What the inner instructions could do if nothing else had to be done.

use super::vector::Vector;

/// Multiplies from registers into `ROWS` · `WIDTH` independent sums, `steps` times.
/// Returns the number of multiplications.
///
/// # Safety
/// The instruction set of `V` must be available.
#[inline(always)]
pub(super) unsafe fn spin<V: Vector, const ROWS: usize, const WIDTH: usize>(
    steps: u64,
    opaque: impl Fn(V::Codes) -> V::Codes,
) -> u64 {
    let ones = [1u8; 64];
    // SAFETY: `ones` holds a vector; the instruction set is available.
    unsafe {
        let mut sums = [[V::no_sums(); WIDTH]; ROWS];
        let mut row = V::row(ones.as_ptr());
        let mut columns = [V::columns(ones.as_ptr()); WIDTH];
        for columns in &mut columns {
            *columns = opaque(*columns);
        }
        for _ in 0..steps {
            for sums in &mut sums {
                row = opaque(row);
                for (sums, &columns) in sums.iter_mut().zip(&columns) {
                    *sums = V::dot(*sums, row, columns);
                }
            }
        }
        std::hint::black_box(&sums);
    }
    steps * (ROWS * WIDTH * V::LANES * V::STEP) as u64
}
