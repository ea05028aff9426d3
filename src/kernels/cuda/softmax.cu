// Softmax of scores, and its weights rounded: on one grid, or on stairs relative to the largest weight of a token.
//
// Compiled without fused multiply-adds: a weight goes through the same operations in every kernel, and has the
// same bits.

const int WARPS = 8; // of a block
const int KEPT = 8;  // values of a lane in registers

struct Softmax {
  const float* scores; // [matrices][tokens][tokens]
  const float* bias;   // [heads][tokens][tokens] or null
  const float* mask;   // [windows][tokens][tokens] or null
  float* out;          // as the scores
  int rows, tokens, heads, windows;
  float scale;
  float max_code;
  const float* grid_scale; // [1]: the grid that results are rounded to, or null
  const float* grid_zero;  // [1]
};

// A row of scores, and what is added to them.
struct Row {
  const float *scores, *bias, *mask;
  float scale;

  __device__ __forceinline__ float operator[](int i) const {
    float value = scores[i] * scale;
    if (bias) value += bias[i];
    if (mask) value += mask[i];
    return value;
  }
};

__device__ __forceinline__ Row row_of(const Softmax& s, int row) {
  const int matrix = row / s.tokens, query = row % s.tokens;
  Row found = {s.scores + (i64)row * s.tokens, nullptr, nullptr, s.scale};
  if (s.bias) found.bias = s.bias + ((i64)(matrix % s.heads) * s.tokens + query) * s.tokens;
  if (s.mask) found.mask = s.mask + ((i64)(matrix / s.heads % s.windows) * s.tokens + query) * s.tokens;
  return found;
}

__device__ __forceinline__ bool is_short(int tokens) { return tokens <= 32 * KEPT; }

// The scores of a short row.
__device__ __forceinline__ void keep(const Row& row, int tokens, float (&kept)[KEPT]) {
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int i = threadIdx.x % 32 + k * 32;
    kept[k] = i < tokens ? row[i] : -__int_as_float(0x7f800000);
  }
}

struct Sums {
  float most;    // of the scores
  float sum;     // of the powers exp(score − most)
  float largest; // of a lane's powers
};

// `kept` becomes the powers of a short row.
__device__ __forceinline__ Sums sum_powers(const Row& row, int tokens, float (&kept)[KEPT]) {
  Sums found = {-__int_as_float(0x7f800000), 0.0f, 0.0f};
  auto add = [&](float score) {
    const float power = expf(score - found.most);
    found.sum += power, found.largest = fmaxf(found.largest, power);
    return power;
  };
  if (is_short(tokens)) {
    keep(row, tokens, kept);
#pragma unroll
    for (int k = 0; k < KEPT; k++) found.most = fmaxf(found.most, kept[k]);
    found.most = warp_max(found.most);
#pragma unroll
    for (int k = 0; k < KEPT; k++) kept[k] = add(kept[k]);
  } else {
    const int lane = threadIdx.x % 32;
    for (int i = lane; i < tokens; i += 32) found.most = fmaxf(found.most, row[i]);
    found.most = warp_max(found.most);
    for (int i = lane; i < tokens; i += 32) add(row[i]);
  }
  found.sum = warp_sum(found.sum);
  return found;
}

// Softmax of scale · scores + bias + mask: a warp for each row.
extern "C" __global__ void softmax(Softmax s) {
  const int at = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (at >= s.rows) return;
  const Row row = row_of(s, at);
  float* const out = s.out + (i64)at * s.tokens;
  const float step = s.grid_scale ? __ldg(s.grid_scale) : 0.0f, zero = s.grid_scale ? __ldg(s.grid_zero) : 0.0f;
  auto rounded = [&](float value) {
    if (!s.grid_scale) return value;
    return (fminf(fmaxf(rintf(value / step) + zero, 0.0f), s.max_code) - zero) * step;
  };
  float kept[KEPT];
  const Sums sums = sum_powers(row, s.tokens, kept);
  if (is_short(s.tokens)) {
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (lane + k * 32 < s.tokens) out[lane + k * 32] = rounded(kept[k] / sums.sum);
    return;
  }
  for (int i = lane; i < s.tokens; i += 32) out[i] = rounded(expf(row[i] - sums.most) / sums.sum);
}

// Softmax on stairs of ratios to the largest weight of a token, over all its rows: two kernels of a warp for each row.
struct Stepped {
  Softmax softmax; // without a grid
  Tokens tokens;
  float2* sums; // [rows]: largest score and Σ powers
  u32* largest; // [tokens]: bits of the largest weight, zeros before the first kernel
  Bins bins;    // of ratios; their codes, a byte in each of two planes, are the upper half of a value
};

__device__ __forceinline__ u32* largest_of(const Stepped& s, int row) {
  const Tokens t = s.tokens;
  return s.largest + (i64)set_of(t, row / t.rows) * t.rows + row % t.rows;
}

extern "C" __global__ void sum_rows(Stepped s) {
  const int at = blockIdx.x * WARPS + threadIdx.x / 32;
  if (at >= s.softmax.rows) return;
  const int tokens = s.softmax.tokens;
  float kept[KEPT];
  const Sums sums = sum_powers(row_of(s.softmax, at), tokens, kept);
  const float power = warp_max(sums.largest);
  if (threadIdx.x % 32 != 0) return;
  s.sums[at] = make_float2(sums.most, sums.sum);
  // Numbers that are not negative are in the order of their bits; NaN comes behind them.
  atomicMax(largest_of(s, at), __float_as_uint(power / sums.sum));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 6) step_rows(Stepped s) {
  uint2* const bins = (uint2*)shared_memory(); // [bins.count]
  const int rows = s.softmax.rows, tokens = s.softmax.tokens, lane = threadIdx.x % 32;
  const int own = blockIdx.x * WARPS + threadIdx.x / 32, at = min(own, rows - 1);
  const Row row = row_of(s.softmax, at);
  float kept[KEPT];
  if (is_short(tokens)) keep(row, tokens, kept);
  const float2 sums = __ldg(s.sums + at); // largest score, Σ powers
  const float largest = __uint_as_float(*largest_of(s, at));
  copy_bins(bins, s.bins, 0);
  __syncthreads();
  if (own >= rows) return;
  auto stepped = [&](float score) {
    const float ratio = expf(score - sums.x) / sums.y / largest;
    return __uint_as_float(step_codes(s.bins, bins, ratio) << 16) * largest;
  };
  float* const out = s.softmax.out + (i64)at * tokens;
  if (is_short(tokens)) {
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (lane + k * 32 < tokens) out[lane + k * 32] = stepped(kept[k]);
    return;
  }
  for (int i = lane; i < tokens; i += 32) out[i] = stepped(row[i]);
}
