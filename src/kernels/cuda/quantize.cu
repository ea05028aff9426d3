// Fake quantization and codes, in a visit or two of memory.
//
// Compiled without fused multiply-adds: every element goes through the operations of the tensor code of
// its quantizer, one by one.

__device__ __forceinline__ float least(float a, float b) { return a < b || a != a ? a : b; }
__device__ __forceinline__ float largest(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float at_least(float a, float bound) { return a < bound ? bound : a; }
__device__ __forceinline__ float at_most(float a, float bound) { return a > bound ? bound : a; }

// Where values are, in floats: those of a row lie side by side.
struct Memory {
  const float* x;
  i64 window, head, row; // from one to the next
  int heads;             // blocks of a window
  int aligned;           // rows, and groups within them, can be read by fours
};

__device__ __forceinline__ const float* row_at(const Memory& m, int block, int row) {
  return m.x + block / m.heads * m.window + block % m.heads * m.head + row * m.row;
}

struct Survey {
  Memory memory;
  Tokens tokens;
  int count;          // tokens
  int groups;         // of a token's row; 1 where several blocks share tokens
  int per_image;      // tokens that are ranked together
  float first_factor; // of an image's first token
  float centre, radius;
  int counts;
  float factor; // of every value, before anything else
  float2* extents; // [tokens][groups]
  float* ranges;   // [tokens]
  float* inside;   // [tokens]: values within centre ± radius · range
};

// Rows are read in runs of V values: 4 where they are aligned, else 1.
template <int V>
struct Run {
  float of[V];
};

template <int V>
__device__ __forceinline__ Run<V> read(const float* x) {
  Run<V> run;
  if constexpr (V == 4) {
    const float4 values = *(const float4*)x;
    run.of[0] = values.x, run.of[1] = values.y, run.of[2] = values.z, run.of[3] = values.w;
  } else {
    run.of[0] = *x;
  }
  return run;
}

// Extends low and high by `width` values, every team of lanes its own; a lane is at `place` in its team.
template <int V>
__device__ __forceinline__ void extend(float& low, float& high, const float* x, int width, int place, int team,
                                       float factor = 1.0f) {
#pragma unroll 4
  for (int i = place * V; i < width; i += team * V) {
    const Run<V> run = read<V>(x + i);
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float value = run.of[e] * factor;
      low = least(low, value), high = largest(high, value);
    }
  }
}

// The extent of a team of lanes, for each of them.
__device__ __forceinline__ void join(float& low, float& high, int team) {
  for (int offset = team / 2; offset; offset /= 2) {
    low = least(low, __shfl_xor_sync(ALL, low, offset));
    high = largest(high, __shfl_xor_sync(ALL, high, offset));
  }
}

template <int V>
__device__ __forceinline__ void survey_token(const Survey& s, int token) {
  const int lane = threadIdx.x % 32;
  const Tokens t = s.tokens;
  const int set = token / t.rows, row = token % t.rows, parts = members(t);
  const int group_width = t.width / s.groups;
  const float inf = __int_as_float(0x7f800000);
  float low = inf, high = -inf;
  if (s.groups == 1) {
    for (int index = 0; index < parts; index++)
      extend<V>(low, high, row_at(s.memory, block_of(t, set, index), row), t.width, lane, 32, s.factor);
    join(low, high, 32);
    if (lane == 0) s.extents[token] = make_float2(low, high);
  } else {
    // Lanes share out the groups: as many to each as there are.
    const float* x = row_at(s.memory, set, row);
    int team = 32;
    while (team > 1 && team * s.groups > 32) team /= 2;
    const int place = lane % team;
    for (int first = 0; first < s.groups; first += 32 / team) {
      const int group = first + lane / team;
      float group_low = inf, group_high = -inf;
      if (group < s.groups)
        extend<V>(group_low, group_high, x + group * group_width, group_width, place, team, s.factor);
      join(group_low, group_high, team);
      if (group < s.groups && place == 0)
        s.extents[(i64)token * s.groups + group] = make_float2(group_low, group_high);
      low = least(low, group_low), high = largest(high, group_high);
    }
    join(low, high, 32);
  }
  if (!s.ranges) return;
  float range = high - low;
  if (token % s.per_image == 0) range *= s.first_factor;
  int inside = 0;
  if (s.counts) {
    const float radius = range * s.radius;
    const float from = -radius + s.centre, to = radius + s.centre;
    for (int index = 0; index < parts; index++) {
      const float* x = row_at(s.memory, block_of(t, set, index), row);
#pragma unroll 4
      for (int i = lane * V; i < t.width; i += 32 * V) {
        const Run<V> run = read<V>(x + i);
#pragma unroll
        for (int e = 0; e < V; e++) {
          const float value = run.of[e] * s.factor;
          inside += value >= from && value < to;
        }
      }
    }
    inside = __reduce_add_sync(ALL, inside);
  }
  if (lane == 0) s.ranges[token] = range, s.inside[token] = (float)inside;
}

// A warp for each token.
extern "C" __global__ void survey(Survey s) {
  const int token = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (token >= s.count) return;
  if (s.memory.aligned) survey_token<4>(s, token);
  else survey_token<1>(s, token);
}

struct Allocation {
  const float* ranges; // [images][tokens]
  const float* inside; // the same
  int tokens;
  int bits, min_swaps, weighted;
  float threshold, floor;
  float* max_codes; // [images][tokens]
};

// Falls as the value rises; NaN comes first.
__device__ __forceinline__ u32 descending(float value) {
  if (value != value) return 0;
  const u32 bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? bits : 0x80000000u - bits;
}

// Bits of an image's tokens (UBB), by a block. Memory: 8 bytes for each token.
__device__ __forceinline__ void allocate_image(const Allocation& a, int image) {
  extern __shared__ u32 keys[];
  float* const gains = (float*)(keys + a.tokens); // by rank
  __shared__ int swaps;
  const float* ranges = a.ranges + (i64)image * a.tokens;
  const float* inside = a.inside + (i64)image * a.tokens;
  float* out = a.max_codes + (i64)image * a.tokens;
  for (int token = threadIdx.x; token < a.tokens; token += blockDim.x) keys[token] = descending(ranges[token]);
  if (threadIdx.x == 0) swaps = a.tokens;
  __syncthreads();
  // Each thread has few tokens: their ranks are kept in `out` meanwhile.
  for (int token = threadIdx.x; token < a.tokens; token += blockDim.x) {
    const u32 key = keys[token];
    int rank = 0;
    for (int other = 0; other < token; other++) rank += keys[other] <= key;
    for (int other = token + 1; other < a.tokens; other++) rank += keys[other] < key;
    const float range = ranges[token];
    gains[rank] = a.weighted ? range * (1.0f / at_least(inside[token], a.floor)) : range * 0.0f;
    out[token] = (float)rank;
  }
  __syncthreads();
  for (int rank = threadIdx.x; rank < a.tokens; rank += blockDim.x)
    if (!(gains[rank] - gains[a.tokens - 1 - rank] * a.threshold > 0.0f)) atomicMin(&swaps, rank);
  __syncthreads();
  const int count = max(swaps, a.min_swaps);
  for (int token = threadIdx.x; token < a.tokens; token += blockDim.x) {
    const int rank = (int)out[token];
    const int bits = a.bits + (rank < count) - (rank >= a.tokens - count);
    out[token] = (float)((1u << bits) - 1);
  }
}

// A block for each image.
extern "C" __global__ void allocate(Allocation a) { allocate_image(a, blockIdx.x); }

struct Grid {
  float scale, zero, max_code;
};

__device__ __forceinline__ Grid grid_over(float low, float high, float max_code, bool exact) {
  const float width = high - low, min_scale = 1e-8f;
  float scale = at_least(width / max_code, min_scale);
  if (exact && width < min_scale) scale = fabsf(low) > 0.0f ? fabsf(low) : 1.0f;
  Grid grid = {scale, rintf(-low / scale), max_code};
  return grid;
}

__device__ __forceinline__ float code_of(Grid grid, float x) {
  return at_most(at_least(rintf(x / grid.scale) + grid.zero, 0.0f), grid.max_code);
}

// What becomes of codes: rows padded for the products, and what a product needs of every group.
struct Codes {
  u8* codes;     // [terms][rows][width]
  float4* grids; // [terms][groups][rows]: scale, −scale · zero, Σ x̂, Σ codes
  int group_width, width;
};

__device__ __forceinline__ u8* codes_at(const Codes& c, int rows, int term, int row) {
  return c.codes + ((i64)term * rows + row) * c.width;
}

// Zeros behind every group and behind the row.
__device__ __forceinline__ void pad(const Codes& c, u8* codes, int groups, int columns) {
  const int lane = threadIdx.x % 32;
  for (int group = 0; group < groups; group++) {
    const int end = group + 1 == groups ? c.width - group * c.group_width : c.group_width;
    for (int i = columns + lane; i < end; i += 32) codes[group * c.group_width + i] = 0;
  }
}

__device__ __forceinline__ void put_grid(const Codes& c, int rows, int place, int row, int columns,
                                         float scale, float zero, int sum) {
  const float total = (float)sum;
  c.grids[(i64)place * rows + row] =
      make_float4(scale, -scale * zero, scale * (total - (float)columns * zero), total);
}

template <int V>
__device__ __forceinline__ void put_codes(u8* to, const int (&codes)[V]) {
  if constexpr (V == 4) *(u32*)to = codes[0] | codes[1] << 8 | codes[2] << 16 | codes[3] << 24;
  else *to = (u8)codes[0];
}

struct Affine {
  Memory memory;
  Tokens tokens;
  int rows; // in memory
  int groups;
  const float2* extents;  // [tokens][groups], or null: the grid of `scale` and `zero`, or of the row
  const float* max_codes; // [tokens], or null: max_code
  const float* scale;     // [1] or null
  const float* zero;      // the same
  float max_code;
  int exact;          // a group without width is its value
  int gelu;           // of every value, before it is rounded on a given grid
  const float* steps; // ratios at which the exponent of the stretch rises, or null: no stretch
  int step_count;
  float factor;  // −τ
  float* values; // x̂, or null: codes
  Codes codes;
};

const int WARPS = 8;       // of a block
const int MAX_GROUPS = 64; // of a row

struct GroupGrid {
  float scale, zero, stretch;
};

__device__ __forceinline__ GroupGrid group_grid(const Affine& a, float2 extent, float max_code) {
  float stretch = 1.0f;
  if (a.steps && extent.x < 0.0f && extent.y > 0.0f) {
    const float ratio = at_least(extent.y / extent.x * a.factor, 1.0f);
    int exponent = 0;
    while (exponent < a.step_count && ratio >= a.steps[exponent]) exponent++;
    stretch = ratio != ratio ? ratio : (float)(1u << exponent);
  }
  const Grid grid = grid_over(a.steps ? extent.x * stretch : extent.x, extent.y, max_code, a.exact);
  GroupGrid result = {grid.scale, grid.zero, stretch};
  return result;
}

template <int V>
__device__ __forceinline__ void affine_row(const Affine& a, int row, GroupGrid* grids, int (*sums)[MAX_GROUPS]) {
  const int lane = threadIdx.x % 32;
  const Tokens t = a.tokens;
  const int width = t.width / a.groups;
  const float* x = row_at(a.memory, row / t.rows, row % t.rows);
  float max_code = a.max_code;
  if (a.extents) {
    const i64 token = (i64)set_of(t, row / t.rows) * t.rows + row % t.rows;
    if (a.max_codes) max_code = a.max_codes[token];
    for (int group = lane; group < a.groups; group += 32)
      grids[group] = group_grid(a, a.extents[token * a.groups + group], max_code);
  } else if (a.scale) {
    if (lane == 0) grids[0].scale = *a.scale, grids[0].zero = *a.zero, grids[0].stretch = 1.0f;
  } else {
    // One group, over the extent of the row itself.
    const float inf = __int_as_float(0x7f800000);
    float low = inf, high = -inf;
    extend<V>(low, high, x, t.width, lane, 32);
    join(low, high, 32);
    if (lane == 0) grids[0] = group_grid(a, make_float2(low, high), max_code);
  }
  const bool codes = !a.values;
  if (codes)
    for (int group = lane; group < a.groups; group += 32) sums[0][group] = sums[1][group] = 0;
  __syncwarp();
  u8* const above = codes_at(a.codes, a.rows, 0, row);
  u8* const below = codes_at(a.codes, a.rows, 1, row);
#pragma unroll 2
  for (int i = lane * V; i < t.width; i += 32 * V) {
    const int group = a.groups == 1 ? 0 : i / width;
    const GroupGrid found = grids[group];
    const Grid grid = {found.scale, found.zero, max_code};
    Run<V> run = read<V>(x + i);
    if (a.gelu) {
#pragma unroll
      for (int e = 0; e < V; e++) run.of[e] = run.of[e] * 0.5f * (1.0f + erff(run.of[e] * 0.70710678118654752440f));
    }
    if (a.values) {
      Run<V> out;
#pragma unroll
      for (int e = 0; e < V; e++) {
        const float value = run.of[e];
        const bool negative = a.steps && value < 0.0f;
        const float decoded =
            (code_of(grid, negative ? value * found.stretch : value) - grid.zero) * grid.scale;
        out.of[e] = negative ? decoded / found.stretch : decoded;
      }
      float* const to = a.values + (i64)row * t.width + i;
      if constexpr (V == 4) *(float4*)to = make_float4(out.of[0], out.of[1], out.of[2], out.of[3]);
      else *to = out.of[0];
      continue;
    }
    const int place = group * a.codes.group_width + i - group * width;
    int first[V], sum = 0;
    if (!a.steps) {
#pragma unroll
      for (int e = 0; e < V; e++) first[e] = (int)code_of(grid, run.of[e]), sum += first[e];
      put_codes<V>(above + place, first);
      atomicAdd(&sums[0][group], sum);
      continue;
    }
    // Codes of either sign; a value of the other sign has the code that decodes to zero.
    const float zero_above = at_most(grid.zero, max_code), zero_below = at_least(grid.zero, 0.0f);
    int second[V], second_sum = 0;
#pragma unroll
    for (int e = 0; e < V; e++) {
      const float code = code_of(grid, run.of[e] < 0.0f ? run.of[e] * found.stretch : run.of[e]);
      first[e] = (int)at_most(at_least(code, zero_above), max_code);
      second[e] = (int)at_most(at_least(code, 0.0f), zero_below);
      sum += first[e], second_sum += second[e];
    }
    put_codes<V>(above + place, first);
    put_codes<V>(below + place, second);
    atomicAdd(&sums[0][group], sum);
    atomicAdd(&sums[1][group], second_sum);
  }
  if (!codes) return;
  __syncwarp();
  pad(a.codes, above, a.groups, width);
  if (a.steps) pad(a.codes, below, a.groups, width);
  for (int group = lane; group < a.groups; group += 32) {
    const GroupGrid grid = grids[group];
    if (!a.steps) {
      put_grid(a.codes, a.rows, group, row, width, grid.scale, grid.zero, sums[0][group]);
      continue;
    }
    put_grid(a.codes, a.rows, group, row, width, grid.scale, at_most(grid.zero, max_code), sums[0][group]);
    put_grid(a.codes, a.rows, a.groups + group, row, width, grid.scale / grid.stretch,
             at_least(grid.zero, 0.0f), sums[1][group]);
  }
}

const int KEPT = 8; // values of a lane in registers

// Short rows that cannot be read by fours, such as scores: one group, read once.
__device__ __forceinline__ void affine_short(const Affine& a, int row) {
  const int lane = threadIdx.x % 32;
  const Tokens t = a.tokens;
  const float* x = row_at(a.memory, row / t.rows, row % t.rows);
  float kept[KEPT];
#pragma unroll
  for (int k = 0; k < KEPT; k++) kept[k] = lane + k * 32 < t.width ? x[lane + k * 32] : 0.0f;
  Grid grid = {0.0f, 0.0f, a.max_code};
  if (a.extents) {
    const i64 token = (i64)set_of(t, row / t.rows) * t.rows + row % t.rows;
    if (a.max_codes) grid.max_code = a.max_codes[token];
    const float2 extent = a.extents[token];
    grid = grid_over(extent.x, extent.y, grid.max_code, a.exact);
  } else if (a.scale) {
    grid.scale = *a.scale, grid.zero = *a.zero;
  } else {
    const float inf = __int_as_float(0x7f800000);
    float low = inf, high = -inf;
#pragma unroll
    for (int k = 0; k < KEPT; k++)
      if (lane + k * 32 < t.width) low = least(low, kept[k]), high = largest(high, kept[k]);
    join(low, high, 32);
    grid = grid_over(low, high, grid.max_code, a.exact);
  }
  float* const values = a.values + (i64)row * t.width;
  u8* const codes = codes_at(a.codes, a.rows, 0, row);
  int sum = 0;
#pragma unroll
  for (int k = 0; k < KEPT; k++) {
    const int i = lane + k * 32;
    if (i >= t.width) continue;
    const float code = code_of(grid, kept[k]);
    if (a.values) {
      values[i] = (code - grid.zero) * grid.scale;
    } else {
      codes[i] = (u8)(int)code;
      sum += (int)code;
    }
  }
  if (a.values) return;
  sum = __reduce_add_sync(ALL, sum);
  pad(a.codes, codes, 1, t.width);
  if (lane == 0) put_grid(a.codes, a.rows, 0, row, t.width, grid.scale, grid.zero, sum);
}

// A warp for each row.
extern "C" __global__ void affine(Affine a) {
  __shared__ GroupGrid grids[WARPS][MAX_GROUPS];
  __shared__ int sums[WARPS][2][MAX_GROUPS];
  const int warp = threadIdx.x / 32, row = blockIdx.x * WARPS + warp;
  if (row >= a.rows) return;
  const bool is_short = a.groups == 1 && a.tokens.width <= 32 * KEPT && !a.steps && !a.gelu;
  if (!a.memory.aligned && is_short) affine_short(a, row);
  else if (a.memory.aligned) affine_row<4>(a, row, grids[warp], sums[warp]);
  else affine_row<1>(a, row, grids[warp], sums[warp]);
}

struct Stairs {
  Memory memory;
  Tokens tokens;
  int rows;
  const float2* extents;  // [tokens]: x is divided by its token's largest; null: it is not
  float least_ratio;      // of x to the largest
  const float* thresholds; // [steps], ascending
  int steps;
  int passed;              // one of Passed
  const float* decoded; // [steps + 1], times the largest
  float* values;        // x̂, or null: codes
  int planes;
  const u8* codes_of;   // [planes][256]: codes of every number of steps passed
  const float* factors; // [planes], times the largest: scales
  Codes codes;
};

const int COMPARED = 32; // steps up to which all are compared; more are searched by halving

enum Passed { AT_LEAST, NOT_BELOW, ABOVE };

template <int RULE>
__device__ __forceinline__ bool has_passed(float value, float threshold) {
  if constexpr (RULE == AT_LEAST) return value >= threshold;
  if constexpr (RULE == NOT_BELOW) return !(threshold > value);
  return !(threshold >= value);
}

// Numbers of steps passed by a lane's values.
template <int RULE, int N>
__device__ __forceinline__ void count_steps(const float* thresholds, int steps, const float (&x)[N],
                                            int (&counts)[N]) {
  if (steps <= COMPARED) {
#pragma unroll
    for (int k = 0; k < N; k++) counts[k] = 0;
    for (int step = 0; step < steps; step++) {
      const float threshold = thresholds[step];
#pragma unroll
      for (int k = 0; k < N; k++) counts[k] += has_passed<RULE>(x[k], threshold);
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < N; k++) {
    int from = 0, to = steps;
    while (from < to) {
      const int middle = (from + to) / 2;
      if (has_passed<RULE>(x[k], thresholds[middle])) from = middle + 1;
      else to = middle;
    }
    counts[k] = from;
  }
}

// Functions of few steps, such as logarithms: a warp for each row.
extern "C" __global__ void stairs(Stairs s) {
  __shared__ float thresholds[256];
  __shared__ float decoded[256];
  for (int i = threadIdx.x; i < s.steps; i += blockDim.x) thresholds[i] = s.thresholds[i];
  if (s.values)
    for (int i = threadIdx.x; i <= s.steps; i += blockDim.x) decoded[i] = s.decoded[i];
  __syncthreads();
  const int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= s.rows) return;
  const Tokens t = s.tokens;
  const float* x = row_at(s.memory, row / t.rows, row % t.rows);
  float whole = 1.0f;
  if (s.extents) whole = s.extents[(i64)set_of(t, row / t.rows) * t.rows + row % t.rows].y;
  for (int first = 0; first < t.width; first += 32 * KEPT) {
    float kept[KEPT];
    int counts[KEPT];
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
      const int i = first + lane + k * 32;
      kept[k] = i < t.width ? x[i] : 0.0f;
      if (s.extents) kept[k] = at_least(kept[k] / whole, s.least_ratio);
    }
    if (s.passed == AT_LEAST) count_steps<AT_LEAST>(thresholds, s.steps, kept, counts);
    else if (s.passed == NOT_BELOW) count_steps<NOT_BELOW>(thresholds, s.steps, kept, counts);
    else count_steps<ABOVE>(thresholds, s.steps, kept, counts);
    if (s.values) {
      float* const out = s.values + (i64)row * t.width;
#pragma unroll
      for (int k = 0; k < KEPT; k++) {
        const int i = first + lane + k * 32;
        const float value = decoded[counts[k]];
        if (i < t.width) out[i] = s.extents ? value * whole : value;
      }
      continue;
    }
    for (int plane = 0; plane < s.planes; plane++) {
      u8* const codes = codes_at(s.codes, s.rows, plane, row);
      const u8* const code_of_count = s.codes_of + plane * 256;
      int sum = 0;
#pragma unroll
      for (int k = 0; k < KEPT; k++) {
        const int i = first + lane + k * 32;
        if (i >= t.width) continue;
        const u8 code = __ldg(code_of_count + counts[k]);
        codes[i] = code;
        sum += code;
      }
      sum = __reduce_add_sync(ALL, sum);
      if (lane == 0) {
        // Rows that take several turns add to what the turns before have left.
        const i64 at = (i64)plane * s.rows + row;
        const int before = first ? (int)s.codes.grids[at].w : 0;
        put_grid(s.codes, s.rows, plane, row, t.width, s.factors[plane] * whole, 0.0f, before + sum);
      }
    }
  }
  if (s.values) return;
  for (int plane = 0; plane < s.planes; plane++) pad(s.codes, codes_at(s.codes, s.rows, plane, row), 1, t.width);
}
