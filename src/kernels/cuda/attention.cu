// Attention on codes: softmax(q·kᵀ) · v of every head in one kernel, from codes to codes, on grids that are
// known beforehand.
//
// Compiled once for each HEAD (see scores.cu) and STEPPED (codes of scores are found on stairs and have planes,
// two of which are multiplied in a turn; else one uniform grid).

struct Attention {
  const u8* qkv;     // [batch · tokens][pitch]: q, k and v of all heads, side by side
  const float* bias; // [heads][tokens][tokens] or null
  const float* mask; // [windows][tokens][tokens] or null
  u8* out;           // [batch · tokens][out_pitch]: heads side by side
  Bins bins;         // scores on stairs
  int tokens, heads, windows; // windows: of the mask
  int pitch, out_pitch;
  float score_factor;    // of a score, its base-2 exponent included
  float q_zero;          // zero point of q
  FixedGrid scores;      // uniform
  float scores_scale;
  float v_scale, v_zero;
  FixedGrid mixed;
};

constexpr int PLANES = STEPPED ? 2 : 1; // of a turn

// A block for each head of a window, or for some of its queries: 16 to a warp.
extern "C" __global__ void __launch_bounds__(STEPPED ? 128 : 256, STEPPED ? 3 : 2) attention(Attention p) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x;
  const int padded = padded_keys(p.tokens);
  u8* const memory = shared_memory();
  const u32 keys = shared_address(memory), values = keys + padded * HEAD_PITCH;
  float* const shift = (float*)(memory + 2 * padded * HEAD_PITCH); // [padded]: what zero points make of scores
  float* const totals = shift + padded;                           // [HEAD]: Σ codes of v
  uint2* const bins = (uint2*)(totals + HEAD);                    // [bins.count]
  const int window = blockIdx.x / p.heads, head = blockIdx.x % p.heads, columns = p.heads * HEAD;
  const u8* const first_row = p.qkv + (i64)window * p.tokens * p.pitch + head * HEAD;
  copy_head(keys, first_row + columns, p.pitch, p.tokens);
  copy_head(values, first_row + 2 * columns, p.pitch, p.tokens);
  commit_copies();

  // Queries, while they are under way.
  const int tile = blockIdx.y * (threads / 32) + warp, query = tile * 16 + lane / 4;
  u32 q[HEAD_STEPS][4];
  Terms terms;
  terms.has_bias = p.bias, terms.has_mask = p.mask;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = min(query + half * 8, p.tokens - 1);
    read_query(q, half, first_row + (i64)row * p.pitch + lane % 4 * 4);
    terms.bias[half] = p.bias + ((i64)head * p.tokens + row) * p.tokens;
    terms.mask[half] = p.mask + ((i64)(window % p.windows) * p.tokens + row) * p.tokens;
  }
  if (STEPPED) copy_bins(bins, p.bins, 0);
  wait_for_copies<0>();
  __syncthreads();
  for (int key = thread; key < padded; key += threads) {
    const float sum = (float)sum_codes(memory + key * HEAD_PITCH);
    shift[key] = key < p.tokens ? -p.q_zero * p.score_factor * sum : -infinity();
  }
  if (!STEPPED && p.scores.zero != 0.0f)
    for (int column = thread; column < HEAD; column += threads) {
      int sum = 0;
      for (int key = 0; key < p.tokens; key++) sum += memory[(padded + key) * HEAD_PITCH + column];
      totals[column] = (float)sum;
    }
  __syncthreads();

  // Scores with KEYS keys, in base-2 exponents.
  auto score = [&](int first, float (&scores)[4][4]) {
    int sums[4][4] = {};
    multiply_keys(q, keys, first, sums);
    const int at = first + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 low = *(const float2*)(shift + at + j * 8);
#pragma unroll
      for (int e = 0; e < 4; e++) scores[j][e] = fmaf((float)sums[j][e], p.score_factor, e % 2 ? low.y : low.x);
    }
    add_terms(scores, terms, p.tokens, at);
  };
  Sums sums;
  for (int first = 0; first < padded; first += KEYS) {
    float scores[4][4];
    score(first, scores);
    add_scores(sums, scores);
  }
  join_lanes(sums);

  float total[HEAD / 8][4] = {};
  const int turns = STEPPED ? p.bins.turns : 1;
  for (int turn = 0; turn < turns; turn++) {
    if (turn > 0) {
      __syncthreads();
      copy_bins(bins, p.bins, turn);
      __syncthreads();
    }
    // From a power to its share of the row, or to its code.
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; half++) share[half] = (STEPPED ? 1.0f : p.scores.inverse) / sums.sum[half];
    const float most_code = p.scores.max_code - p.scores.zero;
    const int zero = STEPPED ? 0 : (int)p.scores.zero;
    int mixed[PLANES][HEAD / 8][4] = {};
    int counted[PLANES][2] = {};
    auto code = [&](int half, float score) {
      const float weight = power_of_two(score - sums.most[half]) * share[half];
      if constexpr (STEPPED) return step_codes(p.bins, bins, weight);
      else return __float_as_uint(fminf(weight, most_code) + ROUNDING);
    };
    mix<PLANES>(padded, values, zero, score, code, mixed, counted);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const float factor = STEPPED ? __ldg(p.bins.factors + turn * PLANES + plane) : p.scores_scale;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        // Keys that are not there have the code of zero.
        const int absent = STEPPED ? bins[0].y >> plane * 8 & 0xff : (u32)zero;
        const int codes = quad_sum(counted[plane][half]) - (padded - p.tokens) * absent;
#pragma unroll
        for (int tile = 0; tile < HEAD / 8; tile++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            float value = fmaf(-p.v_zero, (float)codes, (float)mixed[plane][tile][half * 2 + e]);
            if (!STEPPED && p.scores.zero != 0.0f) {
              const int column = tile / 2 * 16 + lane % 4 * 4 + e * 2 + tile % 2;
              value -= p.scores.zero * fmaf(-p.v_zero, (float)p.tokens, totals[column]);
            }
            total[tile][half * 2 + e] = fmaf(factor, value, total[tile][half * 2 + e]);
          }
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = query + half * 8;
    if (row >= p.tokens) continue;
    u8* const out = p.out + ((i64)window * p.tokens + row) * p.out_pitch + head * HEAD + lane % 4 * 4;
#pragma unroll
    for (int block = 0; block < HEAD / 16; block++) {
      const float(&even)[4] = total[block * 2];
      const float(&odd)[4] = total[block * 2 + 1];
      *(u32*)(out + block * 16) =
          codes_of(p.mixed, even[half * 2] * p.v_scale, odd[half * 2] * p.v_scale, even[half * 2 + 1] * p.v_scale,
                   odd[half * 2 + 1] * p.v_scale);
    }
  }
  // Zeros behind the last head.
  if (head + 1 < p.heads) return;
  const int rest = p.out_pitch - columns;
  for (int i = lane; i < 16 * rest; i += 32) {
    const int row = tile * 16 + i / rest;
    if (row < p.tokens) p.out[((i64)window * p.tokens + row) * p.out_pitch + columns + i % rest] = 0;
  }
}
