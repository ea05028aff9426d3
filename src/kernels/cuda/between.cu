// What lies between products.

const int WARPS = 8; // of a block

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
  const float step = s.grid_scale ? __ldg(s.grid_scale) : 0.0f, zero = s.grid_scale ? __ldg(s.grid_zero) : 0.0f;
  auto rounded = [&](float value) {
    if (!s.grid_scale) return value;
    return (fminf(fmaxf(rintf(value / step) + zero, 0.0f), s.max_code) - zero) * step;
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
      if (lane + k * 32 < s.tokens) out[lane + k * 32] = rounded(kept[k] / sum);
    return;
  }
  for (int i = lane; i < s.tokens; i += 32) most = fmaxf(most, score(i));
  most = warp_max(most);
  for (int i = lane; i < s.tokens; i += 32) sum += expf(score(i) - most);
  sum = warp_sum(sum);
  for (int i = lane; i < s.tokens; i += 32) out[i] = rounded(expf(score(i) - most) / sum);
}

struct Norm {
  const float* x;      // [rows][columns]
  const float* weight; // [columns]
  const float* bias;   // the same
  const i64* order;    // [per_image]: the row of an image at every place; null: as they are
  u8* codes;           // [rows][width]
  int rows, per_image, columns, width;
  float eps;
  FixedGrid grid;
};

// Codes of the layer norm of rows of a multiple of 4 columns, at most 128 · RUNS: a warp for each row.
#ifdef RUNS
extern "C" __global__ void normed(Norm n) {
  const int place = blockIdx.x * WARPS + threadIdx.x / 32;
  if (place >= n.rows) return;
  const int lane = threadIdx.x % 32;
  const i64 row = n.order ? place / n.per_image * n.per_image + __ldg(n.order + place % n.per_image) : place;
  const float4* const x = (const float4*)(n.x + row * n.columns);
  float4 kept[RUNS];
  float sum = 0.0f;
#pragma unroll
  for (int run = 0; run < RUNS; run++) {
    const bool inside = (lane + run * 32) * 4 < n.columns;
    kept[run] = inside ? x[lane + run * 32] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    sum += (kept[run].x + kept[run].y) + (kept[run].z + kept[run].w);
  }
  const float mean = warp_sum(sum) / (float)n.columns;
  float squares = 0.0f;
#pragma unroll
  for (int run = 0; run < RUNS; run++) {
    if ((lane + run * 32) * 4 >= n.columns) continue;
    kept[run].x -= mean, kept[run].y -= mean, kept[run].z -= mean, kept[run].w -= mean;
    squares += kept[run].x * kept[run].x + kept[run].y * kept[run].y + kept[run].z * kept[run].z +
               kept[run].w * kept[run].w;
  }
  const float factor = 1.0f / sqrtf(warp_sum(squares) / (float)n.columns + n.eps);
  u32* const codes = (u32*)(n.codes + (i64)place * n.width);
#pragma unroll
  for (int run = 0; run < RUNS; run++) {
    const int at = lane + run * 32;
    if (at * 4 >= n.columns) continue;
    const float4 weight = __ldg((const float4*)n.weight + at), bias = __ldg((const float4*)n.bias + at);
    codes[at] = codes_of(n.grid, fmaf(kept[run].x * factor, weight.x, bias.x), fmaf(kept[run].y * factor, weight.y, bias.y),
                         fmaf(kept[run].z * factor, weight.z, bias.z), fmaf(kept[run].w * factor, weight.w, bias.w));
  }
  for (int at = n.columns / 4 + lane; at < n.width / 4; at += 32) codes[at] = 0;
}
#endif
