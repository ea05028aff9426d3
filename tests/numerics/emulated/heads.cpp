// heads.cu: surveys, allocations, codes and rounded values of q, k and v on grids that heads and windows share, against
// plain loops over the values of a token.

#include "cases.h"

#include <functional>
#include <string>

namespace quantize {
#include "tokens.cu"
#include "quantize.cu"
#include "heads.cu"

// The dynamic memory that its kernels declare by themselves.
thread_local u32 keys[2048];
}

struct Shape {
  int windows, tokens, heads, width;
  int half = 0; // windows of a quadrant's side
  float query_factor = 1;
  bool is_mixed = true, has_counts = true, is_exact = true;
  int bits = 4;
};

// q, k or v: values of tokens by (row, column) of qkv, and what is found of them.
struct Operand {
  int tokens_per_image, count;
  float factor, centre, radius, floor;
  std::function<int(int row, int column)> token_of; // −1: none of it
  Buffer<float2> extents;
  Buffer<float> ranges, inside, max_codes;

  Operand(int per_image, int count, float factor, float centre, float radius, float floor)
      : tokens_per_image(per_image), count(count), factor(factor), centre(centre), radius(radius), floor(floor),
        extents(count, "extents"), ranges(count, "ranges"), inside(count, "numbers of values inside"),
        max_codes(count, "largest codes") {}
};

const float THRESHOLD = 1.1f;
const int WARPS = quantize::WARPS; // of a block

// What is compared, of which operand and shape.
static std::string title(const char* what, const char* name, const Shape& of) {
  char text[120];
  snprintf(text, sizeof text, "%s of %s: %d windows of %d tokens, %d heads of %d, quadrants of %d", what, name, of.windows,
           of.tokens, of.heads, of.width, of.half);
  return text;
}

static quantize::Survey survey_of(const Operand& of, const Shape& shape, quantize::Memory memory, quantize::Tokens tokens) {
  quantize::Survey s{};
  s.memory = memory, s.tokens = tokens, s.count = of.count, s.groups = 1, s.per_image = of.tokens_per_image;
  s.first_factor = 1.5f, s.centre = of.centre, s.radius = of.radius, s.counts = shape.has_counts, s.factor = of.factor;
  s.extents = of.extents.begin();
  if (shape.is_mixed) s.ranges = of.ranges.begin(), s.inside = of.inside.begin();
  return s;
}

static quantize::Allocation allocation_of(const Operand& of, const Shape& shape) {
  quantize::Allocation a{};
  a.ranges = of.ranges.begin(), a.inside = of.inside.begin(), a.tokens = of.tokens_per_image, a.bits = shape.bits;
  a.min_swaps = 1, a.weighted = shape.has_counts, a.threshold = THRESHOLD, a.floor = of.floor;
  a.max_codes = shape.is_mixed ? of.max_codes.begin() : nullptr;
  return a;
}

static quantize::TokenGrids grids_of(const Operand& of, const Shape& shape) {
  return {of.extents.begin(), shape.is_mixed ? of.max_codes.begin() : nullptr, (float)((1 << shape.bits) - 1), shape.is_exact};
}

static void check_survey(const char* name, const Operand& of, const Shape& shape, const std::vector<std::vector<float>>& values) {
  Comparison comparison("%s", title("survey", name, shape).c_str());
  for (int token = 0; token < of.count; token++) {
    const auto [low, high] = std::ranges::minmax(values[token]);
    comparison.value(token, 0, of.extents[token].x, low, 0), comparison.value(token, 1, of.extents[token].y, high, 0);
    if (!shape.is_mixed) continue;
    const float range = (high - low) * (token % of.tokens_per_image == 0 ? 1.5f : 1.0f);
    comparison.value(token, 2, of.ranges[token], range, 0);
    const float radius = range * of.radius;
    const float from = of.centre - radius, to = of.centre + radius;
    const auto count = std::ranges::count_if(values[token], [&](float x) { return x >= from && x < to; });
    comparison.value(token, 3, of.inside[token], shape.has_counts ? (double)count : 0, 0);
  }
}

static void check_allocation(const char* name, const Operand& of, const Shape& shape) {
  if (!shape.is_mixed) return;
  Comparison comparison("%s", title("allocation", name, shape).c_str());
  for (int first = 0; first < of.count; first += of.tokens_per_image) {
    std::vector<int> order(of.tokens_per_image);
    for (int i = 0; i < of.tokens_per_image; i++) order[i] = first + i;
    std::ranges::stable_sort(order, [&](int a, int b) { return of.ranges[a] > of.ranges[b]; });
    auto gain = [&](int rank) {
      const float weight = shape.has_counts ? 1.0f / std::max(of.inside[order[rank]], of.floor) : 0.0f;
      return of.ranges[order[rank]] * weight;
    };
    int swaps = 0;
    while (swaps < of.tokens_per_image && gain(swaps) - gain(of.tokens_per_image - 1 - swaps) * THRESHOLD > 0) swaps++;
    swaps = std::max(swaps, 1);
    for (int rank = 0; rank < of.tokens_per_image; rank++) {
      const int bits = shape.bits + (rank < swaps) - (rank >= of.tokens_per_image - swaps);
      comparison.value(first, rank, of.max_codes[order[rank]], (1 << bits) - 1, 0);
    }
  }
}

static void check(const Shape& of) {
  const int columns = of.heads * of.width, windows = of.windows, rows = windows * of.tokens;
  const int side = 2 * of.half, sets = of.half ? windows / (of.half * of.half) : windows, images = of.half ? sets / 4 : sets;
  Numbers numbers{21};
  Buffer<float> qkv((size_t)rows * 3 * columns, "q, k and v");
  // Tokens of many ranges, some far from zero, and one without a range.
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < 3 * columns; column++) {
      const bool is_value = column >= 2 * columns;
      const int token = is_value ? column % of.width : row;
      float x = numbers.between(-1, 1.5f) * (float)(1 + token % 7) + (token % 5 == 0 ? 30.0f : token % 5 == 1 ? -40.0f : 0.0f);
      if (is_value ? token == 3 : row % of.tokens == 2) x = -0.75f;
      qkv[(size_t)row * 3 * columns + column] = x;
    }
  auto set_of = [&](int window) {
    if (!of.half) return window;
    const int row = window / side % side, column = window % side;
    return window / (side * side) * 4 + row / of.half * 2 + column / of.half;
  };
  const int quadrants = of.half ? 4 : 1, members = of.half ? of.half * of.half : 1;
  Operand q(quadrants * of.tokens, sets * of.tokens, of.query_factor, 0.1f, 0.2f, 0.1f * columns * members);
  Operand k(quadrants * of.tokens, sets * of.tokens, 1, -0.1f, 0.3f, 0.1f * columns * members);
  Operand v(quadrants * of.width, sets * of.width, 1, 0.2f, 0.25f, 0.1f * of.heads * of.tokens * members);
  auto of_row = [&](int part) {
    return [&, part](int row, int column) {
      return column / columns == part ? set_of(row / of.tokens) * of.tokens + row % of.tokens : -1;
    };
  };
  q.token_of = of_row(0), k.token_of = of_row(1);
  v.token_of = [&](int row, int column) {
    return column < 2 * columns ? -1 : set_of(row / of.tokens) * of.width + column % of.width;
  };

  const i64 pitch = 3 * columns;
  const float* const x = qkv.begin();
  const quantize::Tokens of_rows = {of.tokens, columns, 1, of.half}, of_v = {of.width, of.tokens, of.heads, of.half};
  const int row_blocks = parts(q.count, WARPS), threads = WARPS * 32;
  const quantize::HeadSurveys surveys = {
      survey_of(q, of, {x, of.tokens * pitch, 0, pitch, 1, 1}, of_rows),
      survey_of(k, of, {x + columns, of.tokens * pitch, 0, pitch, 1, 1}, of_rows),
      survey_of(v, of, {x + 2 * columns, of.tokens * pitch, of.width, pitch, of.heads, 1}, of_v),
      row_blocks,
  };
  launch({(u32)(2 * row_blocks + sets * of.width / quantize::COLUMNS), 1, 1}, threads, 0, quantize::survey_heads, surveys);
  if (of.is_mixed) {
    const quantize::HeadAllocations allocations = {allocation_of(q, of), allocation_of(k, of), allocation_of(v, of)};
    launch({(u32)images, 3, 1}, 96, 0, quantize::allocate_heads, allocations);
  }
  Buffer<u8> codes(qkv.size(), "codes");
  Buffer<float2> grids(2 * (size_t)rows, "grids of rows"), of_columns((size_t)windows * of.width, "grids of columns");
  Buffer<float> least(q.count, "least sums");
  const quantize::Heads heads = {x, of_rows, of.width, of.query_factor, grids_of(q, of), grids_of(k, of), grids_of(v, of), windows};
  const quantize::HeadCodes encoded = {heads, codes.begin(), grids.begin(), of_columns.begin(), least.begin()};
  const uint3 blocks = {(u32)(windows * parts(of.tokens, WARPS)), 1, 1};
  launch(blocks, threads, 0, quantize::encode_heads, encoded);
  Buffer<float> rounded(qkv.size(), "rounded values");
  launch(blocks, threads, 0, quantize::round_heads, quantize::RoundedHeads{heads, rounded.begin()});

  for (const auto& [name, operand] : {std::pair("q", &q), std::pair("k", &k), std::pair("v", &v)}) {
    std::vector<std::vector<float>> values(operand->count);
    for (int row = 0; row < rows; row++)
      for (int column = 0; column < pitch; column++)
        if (const int token = operand->token_of(row, column); token >= 0)
          values[token].push_back(qkv[(size_t)row * pitch + column] * operand->factor);
    check_survey(name, *operand, of, values);
    check_allocation(name, *operand, of);

    Comparison comparison("%s", title("codes", name, of).c_str());
    for (int row = 0; row < rows; row++)
      for (int column = 0; column < pitch; column++) {
        const int token = operand->token_of(row, column);
        if (token < 0) continue;
        const float2 extent = operand->extents[token];
        const float most = of.is_mixed ? operand->max_codes[token] : (float)((1 << of.bits) - 1);
        const int window = row / of.tokens, code = codes[(size_t)row * pitch + column];
        const float2 grid = operand == &v ? of_columns[(size_t)window * of.width + column % of.width]
                                          : grids[(operand == &k ? rows : 0) + (size_t)row];
        const float value = qkv[(size_t)row * pitch + column] * operand->factor;
        const int part = column / columns, head = column % columns / of.width;
        const size_t block = ((size_t)part * windows + window) * of.heads + head;
        const float is = rounded[(block * of.tokens + row % of.tokens) * of.width + column % of.width];
        comparison.value(row, column, is, ((float)code - grid.y) * grid.x, 0);
        if (extent.x == extent.y) {
          // As the rules say: the value itself, or a step too small for it.
          if (of.is_exact) comparison.value(row, column, (code - grid.y) * grid.x, value, 0);
          else comparison.value(row, column, grid.x, 1e-8f, 0);
          continue;
        }
        const double step = ((double)extent.y - extent.x) / most, offset = -extent.x / step;
        comparison.value(row, column, grid.x, step, 1e-6 * step);
        comparison.value(row, column, grid.y, rint(grid.y), 0), comparison.value(row, column, grid.y, offset, 0.5 + BORDER);
        comparison.code(row, column, code, {(float)(1 / step), grid.y, most}, value);
      }
  }
  Comparison comparison("least sums: %d windows of %d tokens", windows, of.tokens);
  for (int token = 0; token < q.count; token++) comparison.value(token, 0, 1 / least[token], 0, 0);
}

static void cases() {
  check({.windows = 3, .tokens = 50, .heads = 3, .width = 64});
  check({.windows = 2, .tokens = 65, .heads = 2, .width = 32, .has_counts = false, .is_exact = false, .bits = 6});
  check({.windows = 8, .tokens = 49, .heads = 3, .width = 32, .half = 1, .query_factor = 0.17677669f});
  check({.windows = 32, .tokens = 9, .heads = 2, .width = 48, .half = 2, .query_factor = 0.3f, .is_exact = false});
  check({.windows = 2, .tokens = 7, .heads = 4, .width = 16, .is_mixed = false, .bits = 8});
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
