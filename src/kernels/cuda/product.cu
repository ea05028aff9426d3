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
// in a stage), STAGES, NIBBLES (two codes of the right operand share a byte), SINGLE (one term and one
// group: sums are rescaled only at the end), FIXED (single, and one grid for all of the left operand:
// its codes are summed while they are multiplied), CODES (the result becomes codes on fixed grids) and
// BLOCKS (that share a multiprocessor, at least).

// Rows of codes are in shared memory so that those that are read together are in different banks: 16 codes
// number `chunk` of a row lie at `chunk` ^ turn.
template <int bytes>
__device__ __forceinline__ int turn(int row) {
  constexpr int CHUNKS = bytes / 16;
  return CHUNKS >= 8 ? row % 8 : CHUNKS == 4 ? row / 2 % 4 : row / 4 % 2;
}

extern "C" __global__ void __launch_bounds__(BM / WM * (BN / WN) * 32, BLOCKS) product(Product p) {
  constexpr int THREADS = BM / WM * (BN / WN) * 32;
  constexpr int MT = WM / 16, NT = WN / 8;
  constexpr int RHS_ROW = NIBBLES ? STEP / 2 : STEP;
  constexpr int LHS_BYTES = BM * STEP, STAGE_BYTES = LHS_BYTES + BN * RHS_ROW;
  u8* const memory = shared_memory();
  const u32 base = shared_address(memory);
  // Behind the stages: Σ x̂ of rows, scale and −scale · zero of rows, Σ codes of columns; for a fixed grid Σ
  // codes of rows and what becomes of columns.
  const int segments = p.terms * p.groups;
  float* const row_totals = (float*)(memory + STAGES * STAGE_BYTES); // [BM]
  float2* const row_grids = (float2*)(row_totals + BM);               // [segments][BM]
  float* const column_sums = (float*)(row_grids + segments * BM);     // [groups][BN]
  int* const code_sums = (int*)row_totals;                            // [BM]
  Columns& columns = *(Columns*)(code_sums + BM);

  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp / (BN / WN) * WM, warp_n = warp % (BN / WN) * WN;
  const int first_m = blockIdx.y * BM, first_n = blockIdx.x * BN;
  const int lhs_rows = p.batch * p.m, rhs_rows = p.batch * p.n;
  const int stages_per_term = p.width / STEP, stages = p.terms * stages_per_term;
  const u8* const lhs_codes = p.lhs + (i64)blockIdx.z * p.m * p.width;
  const u8* const rhs_codes = p.rhs + (i64)blockIdx.z * p.n * p.width / (NIBBLES ? 2 : 1);
  const int rhs_pitch = NIBBLES ? p.width / 2 : p.width;

  // A thread copies the same 16 codes of every few rows.
  constexpr int LHS_CHUNKS = STEP / 16, RHS_CHUNKS = RHS_ROW / 16;
  constexpr int LHS_EACH = THREADS / LHS_CHUNKS, RHS_EACH = THREADS / RHS_CHUNKS;
  const int lhs_row = thread / LHS_CHUNKS, lhs_chunk = thread % LHS_CHUNKS;
  const int rhs_row = thread / RHS_CHUNKS, rhs_chunk = thread % RHS_CHUNKS;
  const int lhs_left = p.m - first_m - lhs_row, rhs_left = p.n - first_n - rhs_row; // rows that there are
  const u8* const lhs_first = lhs_codes + (i64)(first_m + lhs_row) * p.width + lhs_chunk * 16;
  const u8* const rhs_first = rhs_codes + (i64)(first_n + rhs_row) * rhs_pitch + rhs_chunk * 16;
  static_assert(LHS_EACH % 8 == 0 && RHS_EACH % 8 == 0, "all rows of a thread have one turn");
  const u32 lhs_to = base + lhs_row * STEP + (lhs_chunk ^ turn<STEP>(lhs_row)) * 16;
  // Columns change places within their groups; a thread's are at the same place every PERIOD rounds.
  constexpr int PERIOD = FIXED && RHS_EACH < GROUP ? GROUP / RHS_EACH : 1;
  u32 rhs_to[PERIOD];
#pragma unroll
  for (int i = 0; i < PERIOD; i++) {
    const int row = rhs_row + i * RHS_EACH, place = FIXED ? place_of(row) : row;
    rhs_to[i] = base + LHS_BYTES + place * RHS_ROW + (rhs_chunk ^ turn<RHS_ROW>(place)) * 16;
  }
  auto load = [&](int stage) {
    const u32 to = stage % STAGES * STAGE_BYTES;
    const int term = SINGLE ? 0 : stage / stages_per_term, k = SINGLE ? stage : stage % stages_per_term;
    const u8* const lhs = lhs_first + (i64)term * lhs_rows * p.width + k * STEP;
#pragma unroll
    for (int i = 0; i < (BM + LHS_EACH - 1) / LHS_EACH; i++)
      if (BM % LHS_EACH == 0 || lhs_row + i * LHS_EACH < BM)
        copy16(lhs_to + to + i * LHS_EACH * STEP, lhs + (i64)i * LHS_EACH * p.width, i * LHS_EACH < lhs_left);
    const u8* const rhs = rhs_first + k * RHS_ROW;
#pragma unroll
    for (int i = 0; i < (BN + RHS_EACH - 1) / RHS_EACH; i++)
      if (BN % RHS_EACH == 0 || rhs_row + i * RHS_EACH < BN)
        copy16(rhs_to[i % PERIOD] + to + i / PERIOD * PERIOD * RHS_EACH * RHS_ROW,
               rhs + (i64)i * RHS_EACH * rhs_pitch, i * RHS_EACH < rhs_left);
  };

#pragma unroll
  for (int stage = 0; stage < STAGES - 1; stage++) {
    if (stage < stages) load(stage);
    commit_copies();
  }

  // While the first stages are under way.
  if (FIXED) {
    for (int row = thread; row < BM; row += THREADS) code_sums[row] = 0;
    for (int i = thread; i < BN; i += THREADS) prepare(p, columns, i, first_n + i);
  } else {
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
  float total[MT][NT][4]; // rescaled sums; those of a fixed grid stay as they are
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[i][j][e] = 0, total[i][j][e] = 0.0f;

  int row_sums[MT][2] = {}; // of codes

  // Element e of a lane: row lane / 4 (+ 8 for e ≥ 2), column 2 · (lane % 4) + e % 2.
  const int row_of_lane = warp_m + lane / 4, column_of_lane = warp_n + lane % 4 * 2;

  // Added to while the stages are under way, behind the barrier of the first of them.
  auto share_sums = [&] {
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int sum = row_sums[i][half];
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        if (lane % 4 == 0) atomicAdd(code_sums + row_of_lane + i * 16 + half * 8, sum);
      }
  };

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

  // Where a lane reads: rows of 16, and columns of 32 or 16.
  const int lhs_lane = lane % 16, rhs_lane = NIBBLES ? lane : lane / 16 * 8 + lane % 8;
  const int lhs_turn = lane / 16 ^ turn<STEP>(lhs_lane);
  const int rhs_turn = (NIBBLES ? 0 : lane / 8 % 2) ^ turn<RHS_ROW>(rhs_lane);
  const u32 lhs_from = base + (warp_m + lhs_lane) * STEP;
  const u32 rhs_from = base + LHS_BYTES + (warp_n + rhs_lane) * RHS_ROW;

  const int group_steps = p.group_width / 32;
  int group = 0, left = group_steps, term = 0, stage_of_term = 0;
  for (int stage = 0; stage < stages; stage++) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    if (stage + STAGES - 1 < stages) load(stage + STAGES - 1);
    commit_copies();
    const u32 lhs = lhs_from + stage % STAGES * STAGE_BYTES, rhs = rhs_from + stage % STAGES * STAGE_BYTES;
#pragma unroll
    for (int step = 0; step < STEP / 32; step++) {
      u32 a[MT][4], b[NT][2];
#pragma unroll
      for (int i = 0; i < MT; i++)
        load4(a[i], lhs + i * 16 * STEP + (lhs_turn ^ step * 2) * 16);
      // The warps of a row share its codes out.
      if (FIXED && step % (BN / WN) == warp % (BN / WN)) {
#pragma unroll
        for (int i = 0; i < MT; i++)
#pragma unroll
          for (int word = 0; word < 4; word++) row_sums[i][word % 2] = add_codes(a[i][word], row_sums[i][word % 2]);
      }
      if (NIBBLES) {
        // Byte i of a chunk holds the codes i and i + 16 of the step.
#pragma unroll
        for (int j = 0; j < NT; j += 4) {
          u32 words[4];
          load4(words, rhs + j * 8 * RHS_ROW + (rhs_turn ^ step) * 16);
#pragma unroll
          for (int i = 0; i < 4; i++) b[j + i][0] = words[i] & 0x0f0f0f0f, b[j + i][1] = words[i] >> 4 & 0x0f0f0f0f;
        }
      } else {
#pragma unroll
        for (int j = 0; j < NT; j += 2) {
          u32 words[4];
          load4(words, rhs + j * 8 * RHS_ROW + (rhs_turn ^ step * 2) * 16);
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
  if (FIXED) {
    share_sums();
    wait_for_copies<0>();
    __syncthreads();
    if (p.gelu) finish<MT, NT, true>(p, sums, columns, code_sums, warp_m, warp_n, first_m, first_n);
    else finish<MT, NT, false>(p, sums, columns, code_sums, warp_m, warp_n, first_m, first_n);
    return;
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
      const i64 row = ((i64)blockIdx.z * p.m + ordered(p, m)) * p.n + lane_n;
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
