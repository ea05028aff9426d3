// Codes on one grid that is known beforehand.

struct FixedGrid {
  float inverse, zero, max_code; // 1 / scale
};

// Adding 1.5 · 2^23 to a number rounds it to an integer, half to even, which its last bits then are.
const float ROUNDING = 12582912.0f;

__device__ __forceinline__ u32 fixed_code(FixedGrid grid, float x) {
  // Larger numbers have larger bits; far below zero it is the sign that would tell.
  const int rounded = __float_as_int(fmaxf(x * grid.inverse, -4194304.0f) + ROUNDING);
  return clamped_sum(rounded, (int)grid.zero - __float_as_int(ROUNDING), (int)grid.max_code);
}

__device__ __forceinline__ u32 codes_of(FixedGrid grid, float a, float b, float c, float d) {
  return fixed_code(grid, a) | fixed_code(grid, b) << 8 | fixed_code(grid, c) << 16 | fixed_code(grid, d) << 24;
}

// Sum of four codes, added to another.
__device__ __forceinline__ int add_codes(u32 codes, int sum) { return (int)__dp4a(codes, 0x01010101u, (u32)sum); }
