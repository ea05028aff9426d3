// between.cu and quantize.cu, whose warps have a row each, against double precision.

#include "cases.h"

namespace between {
#define RUNS 12
#include "between.cu"
#undef RUNS
}

// Names with C linkage are the same in every namespace.
namespace between_short {
#define RUNS 2
#define normed normed_short
#include "between.cu"
#undef normed
#undef RUNS
}

namespace quantize {
#include "tokens.cu"
#include "quantize.cu"

// The dynamic memory that its kernels declare by themselves.
thread_local u32 keys[2048];
}

const int WARPS = 8; // of a block

static uint3 blocks(int rows) { return {(u32)parts(rows, WARPS), 1, 1}; }

// ---- Layer norm

template <class Norm>
static void normed(void (*kernel)(Norm), int rows, int columns, bool has_order) {
  const int width = padded(columns, 64), per_image = rows / 2;
  Numbers numbers{4};
  Buffer<float> x((size_t)rows * columns, "values"), weight(columns, "weight"), bias(columns, "bias");
  Buffer<u8> codes((size_t)rows * width, "codes");
  Buffer<i64> order(per_image, "order");
  fill(x, -3, 5, numbers), fill(weight, 0.5, 1.5, numbers), fill(bias, -1, 1, numbers);
  std::ranges::copy(permutation(per_image, numbers), order.begin());

  Norm arguments{};
  arguments.x = x.begin(), arguments.weight = weight.begin(), arguments.bias = bias.begin();
  arguments.order = has_order ? order.begin() : nullptr, arguments.codes = codes.begin();
  arguments.rows = rows, arguments.per_image = per_image, arguments.columns = columns, arguments.width = width;
  arguments.eps = 0.01f, arguments.grid = {1.0f / 0.02f, 110, 255};
  launch(blocks(rows), WARPS * 32, 0, kernel, arguments);

  Comparison comparison("layer norm of %d rows of %d columns, order %d", rows, columns, has_order);
  for (int row = 0; row < rows; row++) {
    const int place = has_order ? row / per_image * per_image + (int)order[row % per_image] : row;
    const float* const from = x.begin() + (size_t)place * columns;
    double mean = 0, variance = 0;
    for (int i = 0; i < columns; i++) mean += (double)from[i] / columns;
    for (int i = 0; i < columns; i++) variance += (from[i] - mean) * (from[i] - mean) / columns;
    const double factor = 1.0 / sqrt(variance + (double)arguments.eps);
    for (int i = 0; i < width; i++) {
      const int is = codes[(size_t)row * width + i];
      if (i < columns) comparison.code(row, i, is, arguments.grid, (from[i] - mean) * factor * weight[i] + bias[i]);
      else comparison.value(row, i, is, 0, 0);
    }
  }
}

// ---- Surveys and grids

// Values of blocks: windows of heads that lie side by side.
struct Values {
  quantize::Tokens tokens;
  int blocks, rows;
  Buffer<float> x;
  quantize::Memory memory;

  Values(quantize::Tokens tokens, int blocks, int groups, Numbers& numbers)
      : tokens(tokens), blocks(blocks), rows(blocks * tokens.rows), x((size_t)rows * tokens.width, "values") {
    const i64 row = (i64)tokens.heads * tokens.width;
    memory = {x.begin(), tokens.rows * row, tokens.width, row, tokens.heads, tokens.width / groups % 4 == 0};
    for (float& value : x) value = numbers.between(-3, 5);
  }
  const float* at(int block, int row) const {
    return x.begin() + ((size_t)(block / tokens.heads * tokens.rows + row) * tokens.heads + block % tokens.heads) * tokens.width;
  }
  // The set of tokens that a block has its part of: a window's, or those of a quadrant of an image's windows.
  int set_of(int block) const {
    const int window = block / tokens.heads, side = 2 * tokens.half;
    if (!tokens.half) return window;
    const int row = window / side % side, column = window % side;
    return window / (side * side) * 4 + row / tokens.half * 2 + column / tokens.half;
  }
  int sets() const { return set_of(blocks - 1) + 1; }
};

static void survey(const quantize::Tokens& tokens, int blocks, int groups) {
  Numbers numbers{8};
  const Values values(tokens, blocks, groups, numbers);
  const int count = values.sets() * tokens.rows, width = tokens.width / groups;
  Buffer<float2> extents((size_t)count * groups, "extents");
  Buffer<float> ranges(count, "ranges"), inside(count, "numbers of values inside");
  const float first_factor = 0.5f, centre = 0.1f, radius = 0.25f;
  quantize::Survey arguments{};
  arguments.memory = values.memory, arguments.tokens = tokens, arguments.count = count, arguments.groups = groups;
  arguments.per_image = tokens.rows, arguments.first_factor = first_factor;
  arguments.centre = centre, arguments.radius = radius, arguments.counts = 1, arguments.factor = 1;
  arguments.extents = extents.begin(), arguments.ranges = ranges.begin(), arguments.inside = inside.begin();
  launch(::blocks(count), WARPS * 32, 0, quantize::survey, arguments);

  Comparison comparison("survey of %d blocks of %d rows of %d in %d groups, %d heads, quadrants of %d", blocks, tokens.rows,
                        tokens.width, groups, tokens.heads, tokens.half);
  for (int token = 0; token < count; token++) {
    const int set = token / tokens.rows, row = token % tokens.rows;
    std::vector<float> of_group[64], all;
    for (int block = 0; block < blocks; block++) {
      if (values.set_of(block) != set) continue;
      const float* const x = values.at(block, row);
      all.insert(all.end(), x, x + tokens.width);
      for (int group = 0; group < groups; group++)
        of_group[group].insert(of_group[group].end(), x + group * width, x + (group + 1) * width);
    }
    for (int group = 0; group < groups; group++) {
      const auto [low, high] = std::ranges::minmax(of_group[group]);
      comparison.value(token, group, extents[(size_t)token * groups + group].x, low, 0);
      comparison.value(token, group, extents[(size_t)token * groups + group].y, high, 0);
    }
    const auto [low, high] = std::ranges::minmax(all);
    const double range = ((double)high - low) * (row == 0 ? first_factor : 1.0);
    comparison.value(token, 0, ranges[token], range, 1e-6);
    auto within = [&](double of) {
      return (double)std::ranges::count_if(all, [&](double x) { return x >= centre - of && x < centre + of; });
    };
    const double fewest = within(range * radius - 1e-5), most = within(range * radius + 1e-5);
    comparison.value(token, 0, inside[token], (fewest + most) / 2, (most - fewest) / 2);
  }
}

enum class GridOf { ROW, TOKEN, ALL };

struct AffineShape {
  int width, groups;
  bool to_codes;
  GridOf grid_of = GridOf::ROW;
  bool has_gelu = false;
  int heads = 1, half = 0; // half: windows of a quadrant's side
};

static void affine(const AffineShape& of) {
  const quantize::Tokens tokens = {7, of.width, of.heads, of.half};
  const int windows = of.half ? 4 * of.half * of.half : 3;
  Numbers numbers{9};
  const Values values(tokens, windows * of.heads, of.groups, numbers);
  const int rows = values.rows, count = values.sets() * tokens.rows, width = of.width / of.groups;
  const int group_width = padded(width, 32), pitch = padded(group_width * of.groups, 64);
  Buffer<float2> extents((size_t)count * of.groups, "extents");
  Buffer<float> max_codes(count, "largest codes"), scale(1, "scale"), zero(1, "zero point");
  Buffer<float> out((size_t)rows * of.width, "results");
  Buffer<u8> codes((size_t)rows * pitch, "codes");
  Buffer<float4> grids((size_t)of.groups * rows, "grids");
  // Some values are beyond these.
  for (float2& extent : extents) extent = make_float2(numbers.between(-3.5f, -1), numbers.between(2, 5.5f));
  for (float& most : max_codes) most = (float)((1 << (4 + numbers.below(4))) - 1);
  scale[0] = 0.02f, zero[0] = 100;

  quantize::Affine arguments{};
  arguments.memory = values.memory, arguments.tokens = tokens, arguments.rows = rows, arguments.groups = of.groups;
  arguments.max_code = 255, arguments.gelu = of.has_gelu;
  if (of.grid_of == GridOf::TOKEN) arguments.extents = extents.begin(), arguments.max_codes = max_codes.begin();
  if (of.grid_of == GridOf::ALL) arguments.scale = scale.begin(), arguments.zero = zero.begin();
  arguments.values = of.to_codes ? nullptr : out.begin();
  if (of.to_codes) arguments.codes = {codes.begin(), grids.begin(), group_width, pitch};
  launch(blocks(rows), WARPS * 32, 0, quantize::affine, arguments);

  Comparison comparison("affine of rows of %d in %d groups, codes %d, grids of %d, gelu %d, %d heads, quadrants of %d", of.width,
                        of.groups, of.to_codes, (int)of.grid_of, of.has_gelu, of.heads, of.half);
  for (int row = 0; row < rows; row++) {
    const int block = row / tokens.rows, token = values.set_of(block) * tokens.rows + row % tokens.rows;
    for (int group = 0; group < of.groups; group++) {
      const float* const x = values.at(block, row % tokens.rows) + group * width;
      double most = 255, low = *std::min_element(x, x + width), high = *std::max_element(x, x + width);
      if (of.grid_of == GridOf::TOKEN) {
        const float2 extent = extents[(size_t)token * of.groups + group];
        low = extent.x, high = extent.y, most = max_codes[token];
      }
      double step = (high - low) / most, offset = -low / step;
      if (of.grid_of == GridOf::ALL) step = scale[0], offset = zero[0];
      const float4 found = of.to_codes ? grids[(size_t)group * rows + row] : float4{};
      // A zero point at the border of two may be either.
      const double point = of.to_codes ? rint(-(double)found.y / found.x) : rint(offset);
      comparison.value(row, group, point, offset, 0.5 + BORDER);
      const FixedGrid grid = {(float)(1 / step), (float)point, (float)most};
      int sum = 0;
      for (int i = 0; i < width; i++) {
        const double value = of.has_gelu ? exact_gelu(x[i]) : x[i];
        if (!of.to_codes) {
          comparison.rounded(row, group * width + i, out[(size_t)row * of.width + group * width + i], grid, value);
          continue;
        }
        const int code = codes[(size_t)row * pitch + group * group_width + i];
        comparison.code(row, group * width + i, code, grid, value);
        sum += code;
      }
      if (!of.to_codes) continue;
      comparison.value(row, group, found.x, step, 1e-6 * step);
      comparison.value(row, group, found.y, -step * point, 1e-6 * fabs(step * point));
      comparison.value(row, group, found.z, step * (sum - width * point), 1e-6 * step * (sum + width * fabs(point)));
      comparison.value(row, group, found.w, sum, 0);
      const int end = group + 1 == of.groups ? pitch - group * group_width : group_width;
      for (int i = width; i < end; i++) comparison.value(row, i, codes[(size_t)row * pitch + group * group_width + i], 0, 0);
    }
  }
}

static void cases() {
  for (int columns : {4, 96, 132, 256}) normed(between_short::normed_short, 10, columns, columns != 96);
  for (int columns : {32, 384, 1020, 1536}) normed(between::normed, 14, columns, columns != 384);

  survey({13, 384, 1, 0}, 3, 1), survey({13, 384, 1, 0}, 3, 6), survey({5, 99, 1, 0}, 4, 3), survey({3, 96, 1, 0}, 2, 32);
  survey({9, 32, 3, 0}, 6, 1), survey({4, 17, 2, 2}, 2 * 16 * 2, 1);

  for (bool to_codes : {false, true}) {
    for (GridOf grid_of : {GridOf::ROW, GridOf::TOKEN, GridOf::ALL})
      for (int width : {3, 49, 197, 301, 96, 384}) affine({width, 1, to_codes, grid_of});
    for (int width : {96, 99, 384}) affine({width, 3, to_codes, GridOf::TOKEN});
    affine({32, 1, to_codes, GridOf::TOKEN, false, 3}), affine({17, 1, to_codes, GridOf::TOKEN, false, 3, 2});
    for (int width : {45, 384}) affine({width, 1, to_codes, GridOf::ALL, true});
  }
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
