// What becomes of sums of products whose left operand is on one grid, and the arguments of all products.

struct Product {
  const u8* lhs;            // [terms][batch · m][width]
  const float4* lhs_grids;  // [terms][groups][batch · m]: scale, −scale · zero, Σ x̂, Σ codes
  const u8* rhs;            // [batch · n][width], or two codes a byte
  const float4* rhs_grids;  // [batch · n]
  const float* rhs_sums;    // [groups][batch · n], each sum_stride floats behind the other: Σ codes
  const float* bias;        // [n] or null
  const float* residual;    // [batch · m][n] or null
  float* out;               // [batch · m][n], or null: codes
  const i64* order;         // [per_image]: the row of an image that a row of the product belongs to, or null
  u8* codes;                // [batch · m][codes_width]
  int m, n, batch;
  int terms, groups;
  int group_width, width;
  int columns; // that are summed, padding not counted
  int sum_stride;
  int gelu, accumulate;
  int per_image;
  int codes_width;
  int grid_columns;          // of the result for each of its grids
  float first_factor;        // of the columns on the first of them
  float lhs_scale, lhs_zero; // of a fixed grid
  FixedGrid grids[3];
};

// The row of the result that a row of the product is.
__device__ __forceinline__ int ordered(const Product& p, int m) {
  return p.order ? m / p.per_image * p.per_image + (int)__ldg(p.order + m % p.per_image) : m;
}

// GELU to 2.2e-7, by Φ(−|x|) = erfc(|x| / √2) / 2 (Abramowitz and Stegun, 7.1.26).
__device__ __forceinline__ float gelu(float x) {
  const float size = fabsf(x), t = reciprocal(fmaf(0.3275911f * 0.70710678118654752440f, size, 1.0f));
  float sum = fmaf(0.5f * 1.061405429f, t, 0.5f * -1.453152027f);
  sum = fmaf(sum, t, 0.5f * 1.421413741f);
  sum = fmaf(sum, t, 0.5f * -0.284496736f);
  sum = fmaf(sum, t, 0.5f * 0.254829592f);
  const float tail = sum * t * power_of_two(x * x * -0.72134752044448170368f);
  return fmaf(-size, tail, fmaxf(x, 0.0f));
}

// Columns of the result, which are rows of the right operand, are permuted in groups so that a lane's results
// lie side by side: column GROUP · g + LANE · l + 2 · j + e is column 2 · l + e of tile j of group g.
constexpr int LANE = CODES ? 8 : 4, GROUP = 4 * LANE;

// Where a column is among the tiles.
__device__ __forceinline__ int place_of(int column) {
  const int within = column % GROUP;
  return column - within + within % LANE / 2 * 8 + within / LANE * 2 + within % 2;
}

// From sums of codes to products, for the columns of a block.
struct Columns {
  float factors[BN]; // scale of both operands
  float slopes[BN];  // −scale · zero of the column: times Σ x̂ of a row
  float offsets[BN]; // what the zero point of the left operand makes, and the bias
};

__device__ __forceinline__ void prepare(const Product& p, Columns& columns, int i, int column) {
  const int n = min(column, p.n - 1);
  const float4 grid = __ldg(p.rhs_grids + n);
  const float factor = grid.x * p.lhs_scale, bias = p.bias ? __ldg(p.bias + n) : 0.0f;
  columns.factors[i] = factor, columns.slopes[i] = grid.y;
  // Columns behind the last are no numbers, of which the code is 0.
  columns.offsets[i] = column < p.n ? fmaf(-factor * p.lhs_zero, __ldg(p.rhs_sums + (i64)n * p.sum_stride), bias)
                                    : __int_as_float(0x7fc00000);
}

template <int N>
__device__ __forceinline__ void read(float (&to)[N], const float* from) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 four = *(const float4*)(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// Tiles (i, j) of a warp, whose rows begin at `row` and columns at `column` of a block that begins at `first_m`,
// `first_n`. In shared memory: `columns` and Σ codes of rows.
template <int MT, int NT, bool GELU>
__device__ __forceinline__ void finish(const Product& p, const int (&sums)[MT][NT][4], const Columns& columns,
                                       const int* code_sums, int row, int column, int first_m, int first_n) {
  const int lane = threadIdx.x % 32;
  row += lane / 4;
  column += lane % 4 * LANE;
#pragma unroll
  for (int group = 0; group < NT * 8 / GROUP; group++) {
    const int at = column + group * GROUP;
    float factors[LANE], slopes[LANE], offsets[LANE];
    read(factors, columns.factors + at), read(slopes, columns.slopes + at), read(offsets, columns.offsets + at);
    FixedGrid grid;
    if (CODES) {
      // The columns of a group are on one grid.
      const int part = min((first_n + at) / p.grid_columns, 2);
      grid = p.grids[part];
      if (part == 0) grid.inverse *= p.first_factor;
    }
#pragma unroll
    for (int index = 0; index < MT * 2; index++) {
      const int m = first_m + row + index * 8;
      // Σ x̂ of the row.
      const float total = p.lhs_scale * ((float)code_sums[row + index * 8] - (float)p.columns * p.lhs_zero);
      float values[LANE];
#pragma unroll
      for (int i = 0; i < LANE; i++) {
        const int sum = sums[index / 2][group * (LANE / 2) + i / 2][index % 2 * 2 + i % 2];
        values[i] = fmaf(factors[i], (float)sum, fmaf(slopes[i], total, offsets[i]));
        if (GELU) values[i] = gelu(values[i]);
      }
      if constexpr (CODES) {
        if (m < p.m && first_n + at < p.codes_width)
          *(uint2*)(p.codes + (i64)m * p.codes_width + first_n + at) =
              make_uint2(codes_of(grid, values[0], values[1], values[2], values[3]),
                         codes_of(grid, values[4], values[5], values[6], values[7]));
      } else if (m < p.m && first_n + at < p.n) {
        const i64 first = (i64)ordered(p, m) * p.n + first_n + at;
        const float4 more = __ldg((const float4*)(p.residual + first));
        *(float4*)(p.out + first) =
            make_float4(values[0] + more.x, values[1] + more.y, values[2] + more.z, values[3] + more.w);
      }
    }
  }
}
