// Stairs between 0 and 1 as a table.

// Codes of weights on stairs: a bin has those that begin with the same bits, and {a threshold, the codes of two
// planes below it and from it on}.
struct Bins {
  const uint2* table;   // [turns][count]
  const float* factors; // [turns][2]: scales of planes
  int turns, count, first, shift;
};

__device__ __forceinline__ void copy_bins(uint2* to, const Bins& bins, int turn) {
  for (int i = threadIdx.x; i < bins.count; i += blockDim.x) to[i] = __ldg(bins.table + turn * bins.count + i);
}

// A number whose last bytes are the codes.
__device__ __forceinline__ u32 step_codes(const Bins& bins, const uint2* table, float weight) {
  const int bin = max((int)(__float_as_uint(weight) >> bins.shift) - bins.first, 0);
  const uint2 step = table[min(bin, bins.count - 1)];
  return weight >= __uint_as_float(step.x) ? step.y >> 16 : step.y;
}
