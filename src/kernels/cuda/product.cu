// Products of codes on tensor cores (compute capability 8.0 and later).
//
//   out[r, c] = Σ_k x̂[r, k] · ŵ[c, k] (+ bias, GELU, residual)
//   x̂[r, k]  = Σ_terms scale[r, g] · (code[r, k] − zero[r, g]),  g = k / columns of a group
//   ŵ[c, k]  = scale[c] · (code[c, k] − zero[c])
//
// Sums of products of codes are exact in 32 bits; each is rescaled once, in float32. Rows of codes are
// padded with zeros: every group to group_width (a multiple of 32), the row to width (a multiple of
// STEP). A result depends on its row and column alone: neither the batch nor the grid changes it.
//
// Compiled once for each set of BM, BN, WM, WN (results of a block and of a warp), STEP (codes of a row
// in a stage), STAGES, NIBBLES (two codes of the right operand share a byte) and SINGLE (one term and one
// group: sums are rescaled only at the end).

typedef unsigned int u32;
typedef unsigned char u8;
typedef long long i64;

struct Product {
  const u8* lhs;            // [terms][batch · m][width]
  const float4* lhs_grids;  // [terms][groups][batch · m]: scale, −scale · zero, Σ x̂, Σ codes
  const u8* rhs;            // [batch · n][width], or two codes a byte
  const float4* rhs_grids;  // [batch · n]
  const float* rhs_sums;    // [groups][batch · n], each sum_stride floats behind the other: Σ codes
  const float* bias;        // [n] or null
  const float* residual;    // [batch · m][n] or null
  float* out;               // [batch · m][n]
  int m, n, batch;
  int terms, groups;
  int group_width, width;
  int sum_stride;
  int gelu, accumulate;
};

__device__ __forceinline__ void copy16(u32 to, const u8* from, bool inside) {
  const int bytes = inside ? 16 : 0; // the rest is filled with zeros
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ __forceinline__ void load4(u32 (&to)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

__device__ __forceinline__ void multiply(int (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Where 16 codes of a row of `bytes` lie, so that rows that are read together are in different banks.
template <int bytes>
__device__ __forceinline__ u32 place(int row, int chunk) {
  constexpr int CHUNKS = bytes / 16;
  const int turn = CHUNKS >= 8 ? row : CHUNKS == 4 ? row / 2 : row / 4;
  return row * bytes + (chunk ^ turn % (CHUNKS < 8 ? CHUNKS : 8)) * 16;
}

extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32) product(Product p) {
  constexpr int THREADS = BM / WM * (BN / WN) * 32;
  constexpr int MT = WM / 16, NT = WN / 8;
  constexpr int RHS_ROW = NIBBLES ? STEP / 2 : STEP;
  constexpr int LHS_BYTES = BM * STEP, STAGE_BYTES = LHS_BYTES + BN * RHS_ROW;
  extern __shared__ __align__(128) u8 memory[];
  const u32 base = (u32)__cvta_generic_to_shared(memory);
  // Behind the stages: Σ x̂ of rows, scale and −scale · zero of rows, Σ codes of columns.
  const int segments = p.terms * p.groups;
  float* const row_totals = (float*)(memory + STAGES * STAGE_BYTES); // [BM]
  float2* const row_grids = (float2*)(row_totals + BM);               // [segments][BM]
  float* const column_sums = (float*)(row_grids + segments * BM);     // [groups][BN]

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN;
  const int first_m = blockIdx.y * BM, first_n = blockIdx.x * BN;
  const int lhs_rows = p.batch * p.m, rhs_rows = p.batch * p.n;
  const int stages_per_term = p.width / STEP, stages = p.terms * stages_per_term;
  const u8* const lhs_codes = p.lhs + (i64)blockIdx.z * p.m * p.width;
  const u8* const rhs_codes = p.rhs + (i64)blockIdx.z * p.n * p.width / (NIBBLES ? 2 : 1);
  const int rhs_pitch = NIBBLES ? p.width / 2 : p.width;

  auto load = [&](int stage) {
    const u32 to = base + stage % STAGES * STAGE_BYTES;
    const int term = stage / stages_per_term, k = stage % stages_per_term;
    const u8* const lhs = lhs_codes + (i64)term * lhs_rows * p.width + k * STEP;
    constexpr int LHS_CHUNKS = STEP / 16, RHS_CHUNKS = RHS_ROW / 16;
#pragma unroll
    for (int i = thread; i < BM * LHS_CHUNKS; i += THREADS) {
      const int row = i / LHS_CHUNKS, chunk = i % LHS_CHUNKS;
      const bool inside = first_m + row < p.m;
      copy16(to + place<STEP>(row, chunk), lhs + (i64)(inside ? first_m + row : 0) * p.width + chunk * 16, inside);
    }
    const u8* const rhs = rhs_codes + k * RHS_ROW;
#pragma unroll
    for (int i = thread; i < BN * RHS_CHUNKS; i += THREADS) {
      const int row = i / RHS_CHUNKS, chunk = i % RHS_CHUNKS;
      const bool inside = first_n + row < p.n;
      copy16(to + LHS_BYTES + place<RHS_ROW>(row, chunk),
             rhs + (i64)(inside ? first_n + row : 0) * rhs_pitch + chunk * 16, inside);
    }
  };

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < stages) load(stage);
    asm volatile("cp.async.commit_group;\n" ::);
  }

  // While the first stages are under way.
  {
    const float4* const grids = p.lhs_grids + (i64)blockIdx.z * p.m;
    for (int row = thread; row < BM; row += THREADS) {
      const int m = min(first_m + row, p.m - 1);
      float total = 0.0f;
      for (int segment = 0; segment < segments; segment++) {
        const float4 grid = __ldg(grids + (i64)segment * lhs_rows + m);
        row_grids[segment * BM + row] = make_float2(grid.x, grid.y);
        total += grid.z;
      }
      row_totals[row] = total;
    }
    const float* const from = p.rhs_sums + (i64)blockIdx.z * p.n * p.sum_stride;
    for (int i = thread; i < p.groups * BN; i += THREADS) {
      const int n = min(first_n + i % BN, p.n - 1);
      column_sums[i] = __ldg(from + ((i64)(i / BN) * rhs_rows + n) * p.sum_stride);
    }
  }

  int sums[MT][NT][4];
  float total[MT][NT][4];
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0, total[i][j][e] = 0.0f;

  // Element e of a lane: row lane / 4 (+ 8 for e ≥ 2), column 2 · (lane % 4) + e % 2.
  const int row_of_lane = warp_m + lane / 4, column_of_lane = warp_n + lane % 4 * 2;

  auto rescale = [&](int term, int group) {
    const float2* const lows = (const float2*)(column_sums + group * BN + column_of_lane);
    const float2* const grids = row_grids + (term * p.groups + group) * BM + row_of_lane;
    float2 low[NT];
#pragma unroll
    for (int j = 0; j < NT; j++) low[j] = lows[j * 4];
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float2 grid = grids[i * 16 + half * 8];
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int at = half * 2 + e;
            const float value = fmaf(grid.y, e ? low[j].y : low[j].x, total[i][j][at]);
            total[i][j][at] = fmaf(grid.x, (float)sums[i][j][at], value);
            sums[i][j][at] = 0;
          }
      }
  };

  const int group_steps = p.group_width / 32;
  int group = 0, left = group_steps, term = 0, stage_of_term = 0;
  for (int stage = 0; stage < stages; stage++) {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2));
    __syncthreads();
    if (stage + STAGES - 1 < stages) load(stage + STAGES - 1);
    asm volatile("cp.async.commit_group;\n" ::);
    const u32 lhs = base + stage % STAGES * STAGE_BYTES, rhs = lhs + LHS_BYTES;
#pragma unroll
    for (int step = 0; step < STEP / 32; step++) {
      u32 a[MT][4], b[NT][2];
#pragma unroll
      for (int i = 0; i < MT; i++)
        load4(a[i], lhs + place<STEP>(warp_m + i * 16 + lane % 16, step * 2 + lane / 16));
      if (NIBBLES) {
        // Byte i of a chunk holds the codes i and i + 16 of the step.
#pragma unroll
        for (int j = 0; j < NT; j += 4) {
          u32 words[4];
          load4(words, rhs + place<RHS_ROW>(warp_n + j * 8 + lane, step));
#pragma unroll
          for (int i = 0; i < 4; i++) b[j + i][0] = words[i] & 0x0f0f0f0f, b[j + i][1] = words[i] >> 4 & 0x0f0f0f0f;
        }
      } else {
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
          u32 words[4];
          load4(words, rhs + place<RHS_ROW>(warp_n + j * 8 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
          b[j][0] = words[0], b[j][1] = words[1], b[j + 1][0] = words[2], b[j + 1][1] = words[3];
        }
      }
#pragma unroll
      for (int i = 0; i < MT; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) multiply(sums[i][j], a[i], b[j]);
      if (!SINGLE && --left == 0) {
        if (group < p.groups) rescale(term, group);
        group++, left = group_steps;
      }
    }
    if (!SINGLE && ++stage_of_term == stages_per_term) {
      stage_of_term = group = 0, left = group_steps;
      term++;
    }
  }
  if (SINGLE) rescale(0, 0);

  const int lane_m = first_m + row_of_lane, lane_n = first_n + column_of_lane;
  float2 column[NT][2]; // scale, −scale · zero
  float bias[NT][2];
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int n = min(lane_n + j * 8 + e, p.n - 1);
      const float4 grid = __ldg(p.rhs_grids + (i64)blockIdx.z * p.n + n);
      column[j][e] = make_float2(grid.x, grid.y);
      bias[j][e] = p.bias ? __ldg(p.bias + n) : 0.0f;
    }
  const bool pairs = p.n % 2 == 0;
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int m = lane_m + i * 16 + half * 8;
      if (m >= p.m) continue;
      const float row_total = row_totals[row_of_lane + i * 16 + half * 8];
      const i64 row = ((i64)blockIdx.z * p.m + m) * p.n + lane_n;
      float* const out = p.out + row;
      const float* const residual = p.residual + row;
#pragma unroll
      for (int j = 0; j < NT; j++) {
        float values[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float value = fmaf(column[j][e].x, total[i][j][half * 2 + e], bias[j][e]);
          value = fmaf(column[j][e].y, row_total, value);
          if (p.gelu) value = 0.5f * value * (1.0f + erff(value * 0.70710678118654752440f));
          values[e] = value;
        }
        if (pairs && lane_n + j * 8 < p.n) {
          if (p.residual) {
            const float2 more = *(const float2*)(residual + j * 8);
            values[0] += more.x, values[1] += more.y;
          }
          if (p.accumulate) {
            const float2 more = *(const float2*)(out + j * 8);
            values[0] += more.x, values[1] += more.y;
          }
          *(float2*)(out + j * 8) = make_float2(values[0], values[1]);
        } else {
#pragma unroll
          for (int e = 0; e < 2; e++) {
            if (lane_n + j * 8 + e >= p.n) continue;
            if (p.residual) values[e] += residual[j * 8 + e];
            if (p.accumulate) values[e] += out[j * 8 + e];
            out[j * 8 + e] = values[e];
          }
        }
      }
    }
}
