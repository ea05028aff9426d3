// What lies between products.

typedef long long i64;

const unsigned ALL = 0xffffffffu;
const int WARPS = 8; // of a block

struct Softmax {
  const float* scores; // [matrices][tokens][tokens]
  const float* bias;   // [heads][tokens][tokens] or null
  const float* mask;   // [windows][tokens][tokens] or null
  float* out;          // as the scores
  int rows, tokens, heads, windows;
  float scale;
};

__device__ __forceinline__ float warp_max(float x) {
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, offset));
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = 16; offset; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
  return x;
}

// Softmax of scale · scores + bias + mask: a warp for each row.
extern "C" __global__ void softmax(Softmax s) {
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= s.rows) return;
  const int matrix = row / s.tokens, query = row % s.tokens;
  const float* const scores = s.scores + (i64)row * s.tokens;
  float* const out = s.out + (i64)row * s.tokens;
  const float* const bias = s.bias ? s.bias + ((i64)(matrix % s.heads) * s.tokens + query) * s.tokens : nullptr;
  const float* const mask =
      s.mask ? s.mask + ((i64)(matrix / s.heads % s.windows) * s.tokens + query) * s.tokens : nullptr;
  auto score = [&](int i) {
    float value = scores[i] * s.scale;
    if (bias) value += bias[i];
    if (mask) value += mask[i];
    return value;
  };
  constexpr int KEPT = 8; // values of a lane in registers
  float kept[KEPT], most = -__int_as_float(0x7f800000), sum = 0.0f;
  const bool fits = s.tokens <= 32 * KEPT;
  if (fits) {
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      const int i = lane + k * 32;
      kept[k] = i < s.tokens ? score(i) : -__int_as_float(0x7f800000);
      most = fmaxf(most, kept[k]);
    }
    most = warp_max(most);
#pragma unroll
    for (int k = 0; k < KEPT; k++) sum += kept[k] = expf(kept[k] - most);
    sum = warp_sum(sum);
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (lane + k * 32 < s.tokens) out[lane + k * 32] = kept[k] / sum;
    return;
  }
  for (int i = lane; i < s.tokens; i += 32) most = fmaxf(most, score(i));
  most = warp_max(most);
  for (int i = lane; i < s.tokens; i += 32) sum += expf(score(i) - most);
  sum = warp_sum(sum);
  for (int i = lane; i < s.tokens; i += 32) out[i] = expf(score(i) - most) / sum;
}
