// Attention on codes: softmax(q·kᵀ) · v of every head, on grids that tokens share over all heads (heads.cu), with
// weights on stairs relative to the largest of their token over all heads. What is largest is known when all
// heads are through: a kernel finds the sums of all rows, another computes the scores again and mixes v.
//
// Compiled once for each HEAD (see scores.cu).

struct TokenAttention {
  const u8* qkv;         // [windows · tokens][pitch]: q, k and v of all heads, side by side
  const float2* grids;   // [2][windows · tokens]: scale and zero point of q and k
  const float2* columns; // [windows][HEAD]: those of v
  const float* bias;     // [heads][tokens][tokens] or null
  const float* mask;     // [masks][tokens][tokens] or null
  float2* sums;          // [windows][heads][tokens]: largest score and Σ powers
  float* least;          // [sets][tokens]: the least of a token's Σ powers, whose inverse is the largest weight
  float* out;            // [windows · tokens][heads · HEAD]
  Bins bins;             // of ratios to the largest weight
  Tokens tokens;         // rows of all heads
  int heads, windows, masks;
  int pitch;
  float score_factor; // of a score, its base-2 exponent included
};

const int PLANES = 2; // of a turn

// A lane's two queries. Of a row: δq · factor, zero point and Σ codes.
struct Queries {
  u32 codes[HEAD_STEPS][4];
  float scale[2], zero[2], sum[2];
  Terms terms;
};

struct Place {
  int window, head, query; // query: the first of a lane's
};

__device__ __forceinline__ Place place_of(const TokenAttention& p) {
  const int tile = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32;
  return {(int)blockIdx.x / p.heads, (int)blockIdx.x % p.heads, tile * 16 + (int)threadIdx.x % 32 / 4};
}

__device__ __forceinline__ const u8* first_row(const TokenAttention& p, Place at) {
  return p.qkv + (i64)at.window * p.tokens.rows * p.pitch + at.head * HEAD;
}

__device__ __forceinline__ int row_of(const TokenAttention& p, Place at, int half) {
  return min(at.query + half * 8, p.tokens.rows - 1);
}

// Of a lane's query, in a table of every head's.
__device__ __forceinline__ i64 of_head(const TokenAttention& p, Place at, int row) {
  return ((i64)at.window * p.heads + at.head) * p.tokens.rows + row;
}

__device__ __forceinline__ int of_token(const TokenAttention& p, Place at, int row) {
  return set_of(p.tokens, at.window) * p.tokens.rows + row;
}

__device__ __forceinline__ Queries read_queries(const TokenAttention& p, Place at) {
  const int tokens = p.tokens.rows;
  Queries q;
  q.terms.has_bias = p.bias, q.terms.has_mask = p.mask;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row_of(p, at, half);
    read_query(q.codes, half, first_row(p, at) + (i64)row * p.pitch + threadIdx.x % 4 * 4);
    const float2 grid = __ldg(p.grids + (i64)at.window * tokens + row);
    q.scale[half] = grid.x * p.score_factor, q.zero[half] = grid.y;
    q.terms.bias[half] = p.bias + ((i64)at.head * tokens + row) * tokens;
    q.terms.mask[half] = p.mask + ((i64)(at.window % p.masks) * tokens + row) * tokens;
    int sum = 0;
#pragma unroll
    for (int step = 0; step < HEAD_STEPS; step++)
      sum = add_codes(q.codes[step][half], add_codes(q.codes[step][half + 2], sum));
    q.sum[half] = (float)quad_sum(sum);
  }
  return q;
}

// What a key makes of products, {δk, Σ codes − HEAD · zero, zero}, has room behind its codes.
__device__ __forceinline__ float4& numbers_of(u8* keys, int key) {
  return *(float4*)(keys + key * HEAD_PITCH + HEAD_STEPS * 32);
}

// Of keys that are in shared memory; those that are not there are zeros.
__device__ __forceinline__ void prepare(const TokenAttention& p, Place at, u8* keys) {
  const int tokens = p.tokens.rows;
  const float2* const grids = p.grids + (i64)(p.windows + at.window) * tokens;
  for (int key = threadIdx.x; key < padded_keys(tokens); key += blockDim.x) {
    const float2 grid = key < tokens ? __ldg(grids + key) : make_float2(0.0f, 0.0f);
    const float total = fmaf((float)-HEAD, grid.y, (float)sum_codes(keys + key * HEAD_PITCH));
    numbers_of(keys, key) = make_float4(grid.x, total, grid.y, 0.0f);
  }
}

// Scores with KEYS keys, in base-2 exponents: δq · δk · (Σqk − zq · (Σk − HEAD · zk) − zk · Σq), in whole numbers up
// to the scales.
__device__ __forceinline__ void score(const TokenAttention& p, const Queries& q, u8* keys, int first,
                                      float (&scores)[4][4]) {
  int sums[4][4] = {};
  multiply_keys(q.codes, shared_address(keys), first, sums);
  const int at = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float4 two[2] = {numbers_of(keys, at + j * 8), numbers_of(keys, at + j * 8 + 1)};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float4 key = two[e % 2];
      const float whole = fmaf(-q.zero[e / 2], key.y, fmaf(-key.z, q.sum[e / 2], (float)sums[j][e]));
      scores[j][e] = whole * key.x * q.scale[e / 2];
    }
  }
  add_terms(scores, q.terms, p.tokens.rows, at);
  if (first + KEYS <= p.tokens.rows) return;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (at + j * 8 + e % 2 >= p.tokens.rows) scores[j][e] = -infinity();
}

// Sums of powers: a block for each head of a window, or for some of its queries, 16 to a warp.
extern "C" __global__ void __launch_bounds__(256, 3) attention_sums(TokenAttention p) {
  u8* const keys = shared_memory();
  const Place at = place_of(p);
  copy_head(shared_address(keys), first_row(p, at) + p.heads * HEAD, p.pitch, p.tokens.rows);
  commit_copies();
  const Queries q = read_queries(p, at);
  wait_for_copies<0>();
  __syncthreads();
  prepare(p, at, keys);
  __syncthreads();

  Sums sums;
  for (int first = 0; first < p.tokens.rows; first += KEYS) {
    float scores[4][4];
    score(p, q, keys, first, scores);
    add_scores(sums, scores);
  }
  join_lanes(sums);
  if (threadIdx.x % 4 != 0) return;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = at.query + half * 8;
    if (row >= p.tokens.rows) continue;
    p.sums[of_head(p, at, row)] = make_float2(sums.most[half], sums.sum[half]);
    // Positive numbers are in the order of their bits.
    atomicMin((int*)p.least + of_token(p, at, row), __float_as_int(sums.sum[half]));
  }
}

// Codes of weights and their product with v; blocks as those of the sums.
extern "C" __global__ void __launch_bounds__(128, 3) attention_mix(TokenAttention p) {
  const int padded = padded_keys(p.tokens.rows), columns = p.heads * HEAD;
  u8* const keys = shared_memory();
  const u32 values = shared_address(keys + padded * HEAD_PITCH);
  uint2* const bins = (uint2*)(keys + 2 * padded * HEAD_PITCH); // [bins.count]
  const Place at = place_of(p);
  copy_head(shared_address(keys), first_row(p, at) + columns, p.pitch, p.tokens.rows);
  copy_head(values, first_row(p, at) + 2 * columns, p.pitch, p.tokens.rows);
  commit_copies();
  const Queries q = read_queries(p, at);
  copy_bins(bins, p.bins, 0);
  // From a power to its ratio to the token's largest weight.
  float most[2], share[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = row_of(p, at, half);
    const float2 sums = __ldg(p.sums + of_head(p, at, row));
    most[half] = sums.x, share[half] = __ldg(p.least + of_token(p, at, row)) / sums.y;
  }
  wait_for_copies<0>();
  __syncthreads();
  prepare(p, at, keys);
  __syncthreads();

  float total[HEAD / 8][4] = {}, counts[2] = {}; // Σ ratio · code of v, Σ ratio
  for (int turn = 0; turn < p.bins.turns; turn++) {
    if (turn > 0) {
      __syncthreads();
      copy_bins(bins, p.bins, turn);
      __syncthreads();
    }
    int mixed[PLANES][HEAD / 8][4] = {};
    int counted[PLANES][2] = {};
    auto scores = [&](int first, float (&scores)[4][4]) { score(p, q, keys, first, scores); };
    auto code = [&](int half, float score) {
      return step_codes(p.bins, bins, power_of_two(score - most[half]) * share[half]);
    };
    mix<PLANES>(padded, values, 0, scores, code, mixed, counted);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const float factor = __ldg(p.bins.factors + turn * PLANES + plane);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Keys that are not there have the code of zero.
        const int absent = bins[0].y >> plane * 8 & 0xff;
        const int codes = quad_sum(counted[plane][half]) - (padded - p.tokens.rows) * absent;
        counts[half] = fmaf(factor, (float)codes, counts[half]);
#pragma unroll
        for (int tile = 0; tile < HEAD / 8; tile++)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; e++)
            total[tile][e] = fmaf(factor, (float)mixed[plane][tile][e], total[tile][e]);
      }
    }
  }

  const float2* const of_v = p.columns + (i64)at.window * HEAD;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = at.query + half * 8;
    if (row >= p.tokens.rows) continue;
    const float largest = 1.0f / p.least[of_token(p, at, row)];
    float* const out = p.out + ((i64)at.window * p.tokens.rows + row) * columns + at.head * HEAD;
#pragma unroll
    for (int block = 0; block < HEAD / 16; block++) {
      const int column = block * 16 + threadIdx.x % 4 * 4;
      float mixed[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 grid = __ldg(of_v + column + i);
        mixed[i] = fmaf(-grid.y, counts[half], total[block * 2 + i % 2][half * 2 + i / 2]) * grid.x * largest;
      }
      *(float4*)(out + column) = make_float4(mixed[0], mixed[1], mixed[2], mixed[3]);
    }
  }
}
