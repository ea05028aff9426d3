// What attentions on codes have in common: scores of 16 queries to a warp, their softmax, and the product of
// its weights, which become codes, with v. Scores are never in memory; they are computed twice.
//
// Compiled once for each HEAD (columns of a head, a multiple of 16).

const float LOG2_E = 1.44269504088896340736f;
const float LOWEST = -3e38f; // of a row before its first score
const int KEYS = 32;         // of a step

constexpr int HEAD_STEPS = (HEAD + 31) / 32;
constexpr int HEAD_PITCH = HEAD_STEPS * 32 + 16; // rows that are read together are in different banks

__device__ __forceinline__ int padded_keys(int tokens) { return (tokens + KEYS - 1) / KEYS * KEYS; }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

__device__ __forceinline__ int quad_sum(int x) {
  x += __shfl_xor_sync(ALL, x, 1);
  return x + __shfl_xor_sync(ALL, x, 2);
}

// Begins to copy the rows of a head, zeros behind them.
__device__ __forceinline__ void copy_head(u32 to, const u8* first_row, int pitch, int tokens) {
  constexpr int CHUNKS = HEAD_STEPS * 2;
  const int chunks = padded_keys(tokens) * CHUNKS;
  for (int i = threadIdx.x; i < chunks; i += blockDim.x) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    const bool inside = row < tokens && chunk < HEAD / 16;
    const u8* const from = first_row + (i64)(inside ? row : 0) * pitch + (inside ? chunk : 0) * 16;
    copy16(to + row * HEAD_PITCH + chunk * 16, from, inside);
  }
}

// A row of queries, number `half` of a lane: 4 codes of every 16 from the fourth of them that is the lane's.
__device__ __forceinline__ void read_query(u32 (&q)[HEAD_STEPS][4], int half, const u8* from) {
#pragma unroll
  for (int step = 0; step < HEAD_STEPS; step++) {
    q[step][half] = __ldg((const u32*)(from + step * 32));
    // Columns that are not of this head meet keys of zeros.
    q[step][half + 2] = HEAD % 32 == 0 || step + 1 < HEAD_STEPS ? __ldg((const u32*)(from + step * 32 + 16)) : 0;
  }
}

// Σ codes of a key.
__device__ __forceinline__ int sum_codes(const u8* key) {
  int sum = 0;
#pragma unroll
  for (int word = 0; word < HEAD / 4; word++) sum = add_codes(((const u32*)key)[word], sum);
  return sum;
}

// Products of 16 queries with KEYS keys. Element e of tile j of a lane: query lane / 4 (+ 8 for e ≥ 2), key
// 8 · j + 2 · (lane % 4) + e % 2.
__device__ __forceinline__ void multiply_keys(const u32 (&q)[HEAD_STEPS][4], u32 keys, int first, int (&sums)[4][4]) {
  const int lane = threadIdx.x % 32;
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
}

// What is added to the scores of a lane's two queries: rows of a bias and of a mask, or null.
struct Terms {
  const float *bias[2], *mask[2];
  bool has_bias, has_mask;
};

// Adds to the scores, in base-2 exponents, of the keys from `at`, the lane's first; those that are not there stay
// infinitely low.
__device__ __forceinline__ void add_terms(float (&scores)[4][4], const Terms& terms, int tokens, int at) {
  if (!terms.has_bias && !terms.has_mask) return;
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = min(at + j * 8 + e % 2, tokens - 1);
      float more = 0.0f;
      if (terms.has_bias) more += __ldg(terms.bias[e / 2] + key);
      if (terms.has_mask) more += __ldg(terms.mask[e / 2] + key);
      scores[j][e] = fmaf(more, LOG2_E, scores[j][e]);
    }
}

// The largest score of each of a lane's queries and the sum of its powers.
struct Sums {
  float most[2] = {LOWEST, LOWEST}, sum[2] = {0.0f, 0.0f};
};

__device__ __forceinline__ void add_scores(Sums& sums, const float (&scores)[4][4]) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float here = sums.most[half];
#pragma unroll
    for (int j = 0; j < 4; j++) here = fmaxf(here, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
    float powers = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++)
      powers += power_of_two(scores[j][half * 2] - here) + power_of_two(scores[j][half * 2 + 1] - here);
    sums.sum[half] = fmaf(sums.sum[half], power_of_two(sums.most[half] - here), powers);
    sums.most[half] = here;
  }
}

// Of all keys, from those of the lanes of a query.
__device__ __forceinline__ void join_lanes(Sums& sums) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float whole = fmaxf(sums.most[half], __shfl_xor_sync(ALL, sums.most[half], 1));
    whole = fmaxf(whole, __shfl_xor_sync(ALL, whole, 2));
    sums.sum[half] = quad_sum(sums.sum[half] * power_of_two(sums.most[half] - whole));
    sums.most[half] = whole;
  }
}

// Adds the products of weights with v, and Σ codes of the weights. `score(first, scores)` gives the scores of KEYS
// keys; `code(half, score)` a number whose last bytes are codes of PLANES planes, which `zero` is added to. Sums of
// a lane: element e of tile t is that of query lane / 4 (+ 8 for e ≥ 2), column
// t / 2 · 16 + lane % 4 · 4 + e % 2 · 2 + t % 2.
template <int PLANES, class Score, class Code>
__device__ __forceinline__ void mix(int padded, u32 values, int zero, const Score& score, const Code& code,
                                    int (&mixed)[PLANES][HEAD / 8][4], int (&counted)[PLANES][2]) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; first < padded; first += KEYS) {
    float scores[4][4];
    score(first, scores);
    // Codes of a lane's keys as the products take them: 2i, 2i + 1, 8 + 2i, 9 + 2i of 16 keys.
    u32 codes[PLANES][4];
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        u32 found[4];
#pragma unroll
        for (int byte = 0; byte < 4; byte++) found[byte] = code(half, scores[pair * 2 + byte / 2][half * 2 + byte % 2]);
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
}
