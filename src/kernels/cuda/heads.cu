// q, k and v of all heads, which lie side by side, as codes or rounded: rows of q and k, and columns of the heads of v,
// are tokens that all heads share. Behind quantize.cu: the same operations.

struct HeadSurveys {
  Survey q, k, v; // the tokens of v are columns: `rows` of a head, of `width` values each
  int row_blocks; // for the tokens of q, and for those of k
};

const int COLUMNS = 8; // of v in a block: as many as memory is read at once

// Tokens of v, which lie side by side and have no factor: a block for COLUMNS of them.
__device__ __forceinline__ void survey_columns(const Survey& s, int block) {
  __shared__ float lows[WARPS][COLUMNS], highs[WARPS][COLUMNS];
  __shared__ int counts[COLUMNS];
  const Tokens t = s.tokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int chunks = t.rows / COLUMNS, set = block / chunks, first = block % chunks * COLUMNS;
  // A thread has four columns of every so many rows.
  const int own = threadIdx.x % 2 * 4, from = threadIdx.x / 2, step = blockDim.x / 2, rows = members(t) * t.width;
  auto values_of = [&](int row) {
    return read<4>(row_at(s.memory, block_of(t, set, row / t.width), row % t.width) + first + own);
  };
  const float inf = __int_as_float(0x7f800000);
  float low[4] = {inf, inf, inf, inf}, high[4] = {-inf, -inf, -inf, -inf};
#pragma unroll 4
  for (int row = from; row < rows; row += step) {
    const Run<4> run = values_of(row);
#pragma unroll
    for (int e = 0; e < 4; e++) low[e] = least(low[e], run.of[e]), high[e] = largest(high[e], run.of[e]);
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    for (int offset = 16; offset > 1; offset /= 2) {
      low[e] = least(low[e], __shfl_xor_sync(ALL, low[e], offset));
      high[e] = largest(high[e], __shfl_xor_sync(ALL, high[e], offset));
    }
    if (lane < 2) lows[warp][own + e] = low[e], highs[warp][own + e] = high[e];
  }
  if (threadIdx.x < COLUMNS) counts[threadIdx.x] = 0;
  __syncthreads();
  const int token = set * t.rows + first + own;
  float range[4];
#pragma unroll
  for (int e = 0; e < 4; e++) {
    low[e] = lows[0][own + e], high[e] = highs[0][own + e];
    for (int other = 1; other < (int)blockDim.x / 32; other++)
      low[e] = least(low[e], lows[other][own + e]), high[e] = largest(high[e], highs[other][own + e]);
    range[e] = high[e] - low[e];
    if ((token + e) % s.per_image == 0) range[e] *= s.first_factor;
    if (from == 0) s.extents[token + e] = make_float2(low[e], high[e]);
  }
  if (!s.ranges) return;
  if (s.counts) {
    int inside[4] = {};
#pragma unroll 4
    for (int row = from; row < rows; row += step) {
      const Run<4> run = values_of(row);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const float radius = range[e] * s.radius;
        inside[e] += run.of[e] >= -radius + s.centre && run.of[e] < radius + s.centre;
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      for (int offset = 16; offset > 1; offset /= 2) inside[e] += __shfl_xor_sync(ALL, inside[e], offset);
      if (lane < 2) atomicAdd(&counts[own + e], inside[e]);
    }
    __syncthreads();
  }
  if (from == 0) {
#pragma unroll
    for (int e = 0; e < 4; e++) s.ranges[token + e] = range[e], s.inside[token + e] = (float)counts[own + e];
  }
}

// Blocks for q, then as many for k, whose warps have a token each, then those for v.
extern "C" __global__ void survey_heads(HeadSurveys h) {
  const int block = (int)blockIdx.x - 2 * h.row_blocks;
  if (block >= 0) return survey_columns(h.v, block);
  const bool is_key = block >= -h.row_blocks;
  const Survey s = is_key ? h.k : h.q;
  const int token = (block + (is_key ? 1 : 2) * h.row_blocks) * WARPS + threadIdx.x / 32;
  if (token < s.count) survey_token<4>(s, token);
}

struct HeadAllocations {
  Allocation q, k, v; // without `max_codes`, all tokens have the same bits
};

// A block for each image and operand.
extern "C" __global__ void allocate_heads(HeadAllocations h) {
  const Allocation a = blockIdx.y == 0 ? h.q : blockIdx.y == 1 ? h.k : h.v;
  if (a.max_codes) allocate_image(a, blockIdx.x);
}

// Grids of the tokens of an operand.
struct TokenGrids {
  const float2* extents;
  const float* max_codes; // or null: max_code
  float max_code;
  int exact; // a token without width is its value
};

__device__ __forceinline__ Grid token_grid(const TokenGrids& grids, int token) {
  const float2 extent = grids.extents[token];
  return grid_over(extent.x, extent.y, grids.max_codes ? grids.max_codes[token] : grids.max_code, grids.exact);
}

struct Heads {
  const float* qkv; // [windows · tokens][3 · columns]
  Tokens tokens;    // of q and of k: rows of the columns of all heads
  int width;        // of a head
  float query_factor;
  TokenGrids q, k, v;
  int windows;
};

const int MAX_HEAD = 64; // columns

// A row of a window, which a warp has.
struct HeadRow {
  bool is_inside;
  int window, row, token;
  i64 place;    // among the rows of all windows
  Grid q, k;
  const Grid* v; // [width]
};

// A block has WARPS rows of a window.
__device__ __forceinline__ HeadRow head_row(const Heads& h) {
  __shared__ Grid grids[MAX_HEAD]; // of v
  const Tokens t = h.tokens;
  const int parts = (t.rows + WARPS - 1) / WARPS;
  HeadRow at;
  at.window = blockIdx.x / parts, at.row = blockIdx.x % parts * WARPS + threadIdx.x / 32;
  const int set = set_of(t, at.window);
  for (int i = threadIdx.x; i < h.width; i += blockDim.x) grids[i] = token_grid(h.v, set * h.width + i);
  __syncthreads();
  at.v = grids, at.is_inside = at.row < t.rows;
  if (!at.is_inside) return at;
  at.token = set * t.rows + at.row, at.place = (i64)at.window * t.rows + at.row;
  at.q = token_grid(h.q, at.token), at.k = token_grid(h.k, at.token);
  return at;
}

// Calls `put(column, values, grids)` for every four columns of a row.
template <class Put>
__device__ __forceinline__ void for_columns(const Heads& h, const HeadRow& at, const Put& put) {
  const int columns = h.tokens.width;
  const float* const x = h.qkv + at.place * 3 * columns;
#pragma unroll 2
  for (int i = threadIdx.x % 32 * 4; i < 3 * columns; i += 128) {
    Run<4> run = read<4>(x + i);
    const bool is_query = i < columns, is_value = i >= 2 * columns;
    const float factor = is_query ? h.query_factor : 1.0f;
    Grid grids[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      grids[e] = is_value ? at.v[i % h.width + e] : is_query ? at.q : at.k;
      run.of[e] *= factor;
    }
    put(i, run.of, grids);
  }
}

struct HeadCodes {
  Heads heads;
  u8* codes;       // as qkv
  float2* grids;   // [2][windows · tokens]: scale and zero point of q and k
  float2* columns; // [windows][width]: those of v
  float* least;    // [tokens of q]: infinity, which an attention lowers
};

extern "C" __global__ void encode_heads(HeadCodes c) {
  const Tokens t = c.heads.tokens;
  const HeadRow at = head_row(c.heads);
  if (!at.is_inside) return;
  const int lane = threadIdx.x % 32;
  if (at.row == 0)
    for (int i = lane; i < c.heads.width; i += 32)
      c.columns[(i64)at.window * c.heads.width + i] = make_float2(at.v[i].scale, at.v[i].zero);
  if (lane == 0) {
    c.grids[at.place] = make_float2(at.q.scale, at.q.zero);
    c.grids[(i64)c.heads.windows * t.rows + at.place] = make_float2(at.k.scale, at.k.zero);
    c.least[at.token] = __int_as_float(0x7f800000);
  }
  u8* const out = c.codes + at.place * 3 * t.width;
  for_columns(c.heads, at, [&](int column, const float (&x)[4], const Grid (&grids)[4]) {
    int codes[4];
#pragma unroll
    for (int e = 0; e < 4; e++) codes[e] = (int)code_of(grids[e], x[e]);
    put_codes<4>(out + column, codes);
  });
}

struct RoundedHeads {
  Heads heads;
  float* values; // [3][windows][heads][tokens][width]
};

extern "C" __global__ void round_heads(RoundedHeads r) {
  const Tokens t = r.heads.tokens;
  const HeadRow at = head_row(r.heads);
  if (!at.is_inside) return;
  const int width = r.heads.width, count = t.width / width;
  for_columns(r.heads, at, [&](int column, const float (&x)[4], const Grid (&grids)[4]) {
    float values[4];
#pragma unroll
    for (int e = 0; e < 4; e++) values[e] = (code_of(grids[e], x[e]) - grids[e].zero) * grids[e].scale;
    const int part = column / t.width, head = column % t.width / width;
    const i64 block = ((i64)part * r.heads.windows + at.window) * count + head;
    *(float4*)(r.values + (block * t.rows + at.row) * width + column % width) =
        make_float4(values[0], values[1], values[2], values[3]);
  });
}
