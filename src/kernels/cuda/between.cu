// What lies between products.

const int WARPS = 8; // of a block

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
