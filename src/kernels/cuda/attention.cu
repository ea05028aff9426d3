// Attention on codes: softmax(q·kᵀ) · v of every head in one kernel, from codes to codes. Scores are
// never in memory: a warp computes those of 16 queries twice, for their softmax and for their codes.
//
// Compiled once for each HEAD (columns of a head, a multiple of 16) and STEPPED (codes of scores are
// found on stairs and have planes, two of which are multiplied in a turn; else one uniform grid).

struct Attention {
  const u8* qkv;     // [batch · tokens][pitch]: q, k and v of all heads, side by side
  const float* bias; // [heads][tokens][tokens] or null
  const float* mask; // [windows][tokens][tokens] or null
  u8* out;           // [batch · tokens][out_pitch]: heads side by side
  // Scores on stairs: a bin has those that begin with the same bits, and {a threshold, the codes of two
  // planes below it and from it on}.
  const uint2* bins;    // [turns][bin_count]
  const float* factors; // [turns][2]: scales of planes
  int tokens, heads, windows; // windows: of the mask
  int pitch, out_pitch;
  float score_factor;    // of a score, its base-2 exponent included
  float q_zero;          // zero point of q
  FixedGrid scores;      // uniform
  float scores_scale;
  int turns, bin_count, first_bin, bin_shift;
  float v_scale, v_zero;
  FixedGrid mixed;
};

const float LOG2_E = 1.44269504088896340736f;
const float LOWEST = -3e38f; // of a row before its first score
const int KEYS = 32;         // of a step

constexpr int HEAD_STEPS = (HEAD + 31) / 32;
constexpr int HEAD_PITCH = HEAD_STEPS * 32 + 16; // rows that are read together are in different banks
constexpr int PLANES = STEPPED ? 2 : 1; // of a turn

// Scores of 16 queries with KEYS keys, in base-2 exponents. Element e of tile j of a lane: query
// lane / 4 (+ 8 for e ≥ 2), key 8 · j + 2 · (lane % 4) + e % 2.
__device__ __forceinline__ void score(const Attention& p, const u32 (&q)[HEAD_STEPS][4], u32 keys, const float* shift,
                                      const float* (&bias)[2], const float* (&mask)[2], int first, float (&out)[4][4]) {
  const int lane = threadIdx.x % 32;
  int sums[4][4] = {};
#pragma unroll
  for (int step = 0; step < HEAD_STEPS; step++)
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      u32 words[4];
      load4(words, keys + (first + j * 8 + lane / 16 * 8 + lane % 8) * HEAD_PITCH + step * 32 + lane / 8 % 2 * 16);
      const u32 left[2] = {words[0], words[1]}, right[2] = {words[2], words[3]};
      multiply(sums[j], q[step], left);
      multiply(sums[j + 1], q[step], right);
    }
  const int at = first + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const float2 low = *(const float2*)(shift + at + j * 8);
#pragma unroll
    for (int e = 0; e < 4; e++) out[j][e] = fmaf((float)sums[j][e], p.score_factor, e % 2 ? low.y : low.x);
  }
  if (!p.bias && !p.mask) return;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = at + j * 8 + e % 2;
      if (key >= p.tokens) continue;
      float more = 0.0f;
      if (p.bias) more += __ldg(bias[e / 2] + key);
      if (p.mask) more += __ldg(mask[e / 2] + key);
      out[j][e] = fmaf(more, LOG2_E, out[j][e]);
    }
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

__device__ __forceinline__ int quad_sum(int x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// A block for each head of a window, or for some of its queries: 16 to a warp.
extern "C" __global__ void __launch_bounds__(STEPPED ? 128 : 256, STEPPED ? 3 : 2) attention(Attention p) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, threads = blockDim.x;
  const int padded = (p.tokens + KEYS - 1) / KEYS * KEYS;
  u8* const memory = shared_memory();
  const u32 keys = shared_address(memory), values = keys + padded * HEAD_PITCH;
  float* const shift = (float*)(memory + 2 * padded * HEAD_PITCH); // [padded]: what zero points make of scores
  float* const totals = shift + padded;                           // [HEAD]: Σ codes of v
  uint2* const bins = (uint2*)(totals + HEAD);                    // [bin_count]
  const int window = blockIdx.x / p.heads, head = blockIdx.x % p.heads, columns = p.heads * HEAD;
  const u8* const first_row = p.qkv + (i64)window * p.tokens * p.pitch + head * HEAD;

  // k and v, zeros behind them.
  constexpr int CHUNKS = HEAD_STEPS * 2;
  for (int i = thread; i < padded * CHUNKS; i += threads) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool inside = row < p.tokens && chunk < HEAD / 16;
    const u8* const from = first_row + columns + (i64)(inside ? row : 0) * p.pitch + (inside ? chunk : 0) * 16;
    const u32 to = row * HEAD_PITCH + chunk * 16;
    copy16(keys + to, from, inside);
    copy16(values + to, from + columns, inside);
  }
  commit_copies();

  // Queries, while they are under way.
  const int tile = blockIdx.y * (threads / 32) + warp, query = tile * 16 + lane / 4;
  u32 q[HEAD_STEPS][4];
  const float* bias[2];
  const float* mask[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int row = min(query + half * 8, p.tokens - 1);
    const u8* const from = first_row + (i64)row * p.pitch + lane % 4 * 4;
#pragma unroll
    for (int step = 0; step < HEAD_STEPS; step++) {
      q[step][half] = __ldg((const u32*)(from + step * 32));
      // Columns that are not of this head meet keys of zeros.
      q[step][half + 2] = HEAD % 32 == 0 || step + 1 < HEAD_STEPS ? __ldg((const u32*)(from + step * 32 + 16)) : 0;
    }
    bias[half] = p.bias + ((i64)head * p.tokens + row) * p.tokens;
    mask[half] = p.mask + ((i64)(window % p.windows) * p.tokens + row) * p.tokens;
  }
  if (STEPPED)
    for (int i = thread; i < p.bin_count; i += threads) bins[i] = __ldg(p.bins + i);
  wait_for_copies<0>();
  __syncthreads();
  for (int key = thread; key < padded; key += threads) {
    const u32* const codes = (const u32*)(memory + key * HEAD_PITCH);
    int sum = 0;
#pragma unroll
    for (int word = 0; word < HEAD / 4; word++) sum = add_codes(codes[word], sum);
    shift[key] = key < p.tokens ? -p.q_zero * p.score_factor * (float)sum : -__int_as_float(0x7f800000);
  }
  if (!STEPPED && p.scores.zero != 0.0f)
    for (int column = thread; column < HEAD; column += threads) {
      int sum = 0;
      for (int key = 0; key < p.tokens; key++) sum += memory[(padded + key) * HEAD_PITCH + column];
      totals[column] = (float)sum;
    }
  __syncthreads();

  // The largest score of a row and the sum of its powers.
  float most[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
  for (int first = 0; first < padded; first += KEYS) {
    float scores[4][4];
    score(p, q, keys, shift, bias, mask, first, scores);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float here = most[half];
#pragma unroll
      for (int j = 0; j < 4; j++) here = fmaxf(here, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
      float powers = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++)
        powers += power_of_two(scores[j][half * 2] - here) + power_of_two(scores[j][half * 2 + 1] - here);
      sum[half] = fmaf(sum[half], power_of_two(most[half] - here), powers);
      most[half] = here;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float whole = fmaxf(most[half], __shfl_xor_sync(ALL, most[half], 1));
    whole = fmaxf(whole, __shfl_xor_sync(ALL, whole, 2));
    sum[half] = quad_sum(sum[half] * power_of_two(most[half] - whole));
    most[half] = whole;
  }

  float total[HEAD / 8][4] = {};
  const int turns = STEPPED ? p.turns : 1;
  for (int turn = 0; turn < turns; turn++) {
    if (turn > 0) {
      __syncthreads();
      for (int i = thread; i < p.bin_count; i += threads) bins[i] = __ldg(p.bins + turn * p.bin_count + i);
      __syncthreads();
    }
    // From a power to its share of the row, or to its code.
    float share[2];
#pragma unroll
    for (int half = 0; half < 2; half++) share[half] = (STEPPED ? 1.0f : p.scores.inverse) / sum[half];
    const float most_code = p.scores.max_code - p.scores.zero;
    const int zero = STEPPED ? 0 : (int)p.scores.zero;
    int mixed[PLANES][HEAD / 8][4] = {};
    int counted[PLANES][2] = {};
    for (int first = 0; first < padded; first += KEYS) {
      float scores[4][4];
      score(p, q, keys, shift, bias, mask, first, scores);
      // Codes of a lane's keys as the products take them: 2i, 2i + 1, 8 + 2i, 9 + 2i of 16 keys.
      u32 codes[PLANES][4];
#pragma unroll
      for (int half = 0; half < 2; half++)
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
          u32 found[4]; // codes of two planes, or a number whose last byte is a code
#pragma unroll
          for (int byte = 0; byte < 4; byte++) {
            const float power = power_of_two(scores[pair * 2 + byte / 2][half * 2 + byte % 2] - most[half]);
            const float weight = power * share[half];
            if constexpr (STEPPED) {
              const int bin = max((int)(__float_as_uint(weight) >> p.bin_shift) - p.first_bin, 0);
              const uint2 step = bins[min(bin, p.bin_count - 1)];
              found[byte] = weight >= __uint_as_float(step.x) ? step.y >> 16 : step.y;
            } else {
              found[byte] = __float_as_uint(fminf(weight, most_code) + ROUNDING);
            }
          }
          u32 packed[PLANES];
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++) {
            // That byte of each of them.
            const u32 low = __byte_perm(found[0], found[1], plane | plane + 4 << 4);
            const u32 high = __byte_perm(found[2], found[3], plane | plane + 4 << 4);
            packed[plane] = __byte_perm(low, high, 0x5410) + (u32)zero * 0x01010101u;
          }
#pragma unroll
          for (int plane = 0; plane < PLANES; plane++) {
            codes[plane][half + pair * 2] = packed[plane];
            counted[plane][half] = add_codes(packed[plane], counted[plane][half]);
          }
        }
#pragma unroll
      for (int block = 0; block < HEAD / 16; block++) {
        u32 words[4];
        load4_transposed(words, values + (first + lane) * HEAD_PITCH + block * 16);
        const u32 even[2] = {__byte_perm(words[0], words[1], 0x6420), __byte_perm(words[2], words[3], 0x6420)};
        const u32 odd[2] = {__byte_perm(words[0], words[1], 0x7531), __byte_perm(words[2], words[3], 0x7531)};
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) {
          multiply(mixed[plane][block * 2], codes[plane], even);
          multiply(mixed[plane][block * 2 + 1], codes[plane], odd);
        }
      }
    }
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
      const float factor = STEPPED ? __ldg(p.factors + turn * PLANES + plane) : p.scores_scale;
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
