// softmax.cu: weights against double precision, and those on stairs against the kernels that find them one after the
// other.

#include "table.h"

namespace program {
#include "tokens.cu"
#include "bins.cu"
#include "softmax.cu"
}

namespace quantize {
#include "tokens.cu"
#include "quantize.cu"

// The dynamic memory that its kernels declare by themselves.
thread_local u32 keys[2048];
}

const int WARPS = program::WARPS; // of a block

static uint3 blocks(int rows) { return {(u32)parts(rows, WARPS), 1, 1}; }

struct SoftmaxShape {
  int tokens;
  bool has_terms, has_grid; // has_terms: bias and mask
};

static void softmax(const SoftmaxShape& of) {
  const int heads = 3, windows = 2, images = 2, tokens = of.tokens;
  const int rows = std::min(images * windows * heads * tokens, 603);
  Numbers numbers{3};
  Buffer<float> scores((size_t)rows * tokens, "scores"), bias((size_t)heads * tokens * tokens, "bias");
  Buffer<float> mask((size_t)windows * tokens * tokens, "mask"), out((size_t)rows * tokens, "results");
  Buffer<float> grid_scale(1, "scale"), grid_zero(1, "zero point");
  fill(scores, -9, 9, numbers), fill(bias, -3, 3, numbers), fill(mask, -5, 0, numbers);
  grid_scale[0] = 0.002f, grid_zero[0] = 3;
  const FixedGrid grid = {1.0f / grid_scale[0], grid_zero[0], 63};

  program::Softmax arguments{};
  arguments.scores = scores.begin(), arguments.out = out.begin(), arguments.rows = rows, arguments.tokens = tokens;
  arguments.heads = heads, arguments.windows = windows, arguments.scale = 0.4f;
  if (of.has_terms) arguments.bias = bias.begin(), arguments.mask = mask.begin();
  if (of.has_grid) arguments.grid_scale = grid_scale.begin(), arguments.grid_zero = grid_zero.begin();
  arguments.max_code = grid.max_code;
  launch(blocks(rows), WARPS * 32, 0, program::softmax, arguments);

  Comparison comparison("softmax of %d tokens, bias and mask %d, grid %d", tokens, of.has_terms, of.has_grid);
  std::vector<double> values(tokens);
  for (int row = 0; row < rows; row++) {
    const int matrix = row / tokens, query = row % tokens;
    double most = -INFINITY, sum = 0;
    for (int i = 0; i < tokens; i++) {
      values[i] = (double)arguments.scale * scores[(size_t)row * tokens + i];
      if (of.has_terms) values[i] += (double)bias[(size_t)(matrix % heads * tokens + query) * tokens + i];
      if (of.has_terms) values[i] += (double)mask[(size_t)(matrix / heads % windows * tokens + query) * tokens + i];
      most = std::max(most, values[i]);
    }
    for (double& x : values) sum += x = exp(x - most);
    for (int i = 0; i < tokens; i++) {
      const double is = out[(size_t)row * tokens + i], expected = values[i] / sum;
      if (of.has_grid) comparison.rounded(row, i, is, grid, expected);
      else comparison.value(row, i, is, expected, 5e-6 * expected);
    }
  }
}

struct SteppedShape {
  int windows, tokens, heads;
  int half = 0; // windows of a quadrant's side
  int bits = 4;
  bool has_extra_zero = true; // a code beside those of exponents
  bool has_bias = false, has_mask = false;
  bool is_per_head = false, has_nan = false;
  bool is_near = false; // weights are so near to steps that a rounding decides
};

// Same bits, whatever they are.
static void same(Comparison& comparison, int row, int column, float is, float expected) {
  const bool are_nan = is != is && expected != expected;
  comparison.value(row, column, are_nan ? 0.0 : std::bit_cast<u32>(is), are_nan ? 0.0 : std::bit_cast<u32>(expected), 0);
}

static void stepped(const SteppedShape& of) {
  const int tokens = of.tokens, heads = of.heads, rows = of.windows * heads * tokens, masks = 2;
  const size_t count = (size_t)rows * tokens;
  const int sharing = of.is_per_head ? 1 : heads, members = sharing * std::max(of.half * of.half, 1);
  const int largest_count = rows / members;
  Numbers numbers{31};
  Buffer<float> scores(count, "scores"), bias((size_t)heads * tokens * tokens, "bias");
  Buffer<float> mask((size_t)masks * tokens * tokens, "mask"), weights(count, "weights");
  Buffer<float> expected(count, "weights on stairs"), out(count, "results");
  fill(scores, -30, 30, numbers), fill(bias, -3, 3, numbers);
  for (float& x : mask) x = numbers.below(3) == 0 ? -100.0f : 0.0f;
  if (of.has_nan) scores[count / 2] = NAN;
  if (of.is_near)
    for (size_t i = 0; i < count; i++) {
      const double ratio = exp2(-0.5 - numbers.below(10)), error = numbers.between(-6, 6) * 0x1p-24;
      scores[i] = i % tokens ? (float)(log(ratio) * (1 + error) / 0.4) : 0.0f;
    }

  program::Softmax softmax{};
  softmax.scores = scores.begin(), softmax.bias = of.has_bias ? bias.begin() : nullptr;
  softmax.mask = of.has_mask ? mask.begin() : nullptr, softmax.out = weights.begin();
  softmax.rows = rows, softmax.tokens = tokens, softmax.heads = heads, softmax.windows = masks, softmax.scale = 0.4f;
  launch(blocks(rows), WARPS * 32, 0, program::softmax, softmax);

  // Powers of two; ratios that are too small are the least.
  const float least_ratio = 1e-8f;
  const int last = std::min((1 << of.bits) - (of.has_extra_zero ? 1 : 2), 27), steps = last + 1;
  std::vector<float> decoded = {0};
  std::vector<std::vector<u8>> codes(2);
  for (int e = last; e >= 0; e--) decoded.push_back(exp2f((float)-e));
  for (float value : decoded)
    codes[0].push_back(std::bit_cast<u32>(value) >> 16 & 255), codes[1].push_back(std::bit_cast<u32>(value) >> 24);
  Buffer<float> thresholds(steps, "thresholds"), values(steps + 1, "decoded values");
  for (int e = last; e >= 0; e--) thresholds[last - e] = exp2f(-0.5f - (float)e);
  std::ranges::copy(decoded, values.begin());

  const i64 square = (i64)tokens * tokens;
  Buffer<float2> extents(largest_count, "extents");
  quantize::Survey survey{};
  survey.memory = {weights.begin(), heads * square, square, tokens, heads, tokens % 4 == 0};
  survey.tokens = {tokens, tokens, sharing, of.half}, survey.count = largest_count, survey.groups = 1;
  survey.per_image = 1, survey.factor = 1, survey.extents = extents.begin();
  launch(blocks(largest_count), WARPS * 32, 0, quantize::survey, survey);
  quantize::Stairs stairs{};
  stairs.memory = survey.memory, stairs.tokens = survey.tokens, stairs.rows = rows, stairs.extents = extents.begin();
  stairs.least_ratio = least_ratio, stairs.thresholds = thresholds.begin(), stairs.steps = steps;
  stairs.decoded = values.begin(), stairs.values = expected.begin();
  launch(blocks(rows), WARPS * 32, 0, quantize::stairs, stairs);

  const std::vector<float> from(thresholds.begin(), thresholds.end());
  const Table table(from, codes, std::ranges::count_if(from, [&](float x) { return x <= least_ratio; }));
  Buffer<uint2> bins(table.bins.size(), "bins");
  Buffer<float2> sums(rows, "sums");
  Buffer<u32> largest(largest_count, "largest weights");
  std::ranges::copy(table.bins, bins.begin()), std::ranges::fill(largest, 0);
  program::Stepped arguments{};
  arguments.softmax = softmax, arguments.softmax.out = out.begin(), arguments.tokens = {tokens, tokens, sharing, of.half};
  arguments.sums = sums.begin(), arguments.largest = largest.begin();
  arguments.bins = {bins.begin(), nullptr, table.turns, table.count, table.first, table.shift};
  launch(blocks(rows), WARPS * 32, 0, program::sum_rows, arguments);
  launch(blocks(rows), WARPS * 32, 8 * table.count, program::step_rows, arguments);

  Comparison comparison("softmax on stairs: %d windows of %d tokens, %d heads, quadrants of %d, %d bits, extra zero %d, bias "
                        "%d, mask %d", of.windows, tokens, heads, of.half, of.bits, of.has_extra_zero, of.has_bias, of.has_mask);
  for (int token = 0; token < largest_count; token++)
    same(comparison, token, -1, std::bit_cast<float>(largest[token]), extents[token].y);
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < tokens; i++) same(comparison, row, i, out[(size_t)row * tokens + i], expected[(size_t)row * tokens + i]);
}

static void cases() {
  for (int tokens : {1, 7, 49, 256, 257, 300})
    for (bool has_grid : {false, true}) softmax({tokens, tokens != 49, has_grid});

  for (int bits : {3, 4, 6, 8})
    for (bool has_extra_zero : {false, true})
      stepped({.windows = 2, .tokens = 50, .heads = 3, .bits = bits, .has_extra_zero = has_extra_zero});
  stepped({.windows = 1, .tokens = 197, .heads = 6}), stepped({.windows = 2, .tokens = 1, .heads = 3});
  stepped({.windows = 2, .tokens = 257, .heads = 2, .bits = 8, .has_bias = true, .has_mask = true});
  stepped({.windows = 8, .tokens = 49, .heads = 3, .half = 1, .has_bias = true});
  stepped({.windows = 32, .tokens = 17, .heads = 2, .half = 2, .bits = 6, .has_bias = true, .has_mask = true});
  stepped({.windows = 4, .tokens = 33, .heads = 3, .has_mask = true, .is_per_head = true});
  stepped({.windows = 2, .tokens = 49, .heads = 3, .has_nan = true});
  stepped({.windows = 3, .tokens = 100, .heads = 2, .is_per_head = true, .is_near = true});
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
