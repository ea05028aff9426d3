// attention.cu and token_attention.cu against softmax(q·kᵀ) · v in double precision.

#include "table.h"

// Their arguments; those of a variant have the same bytes.
namespace arguments {
const int HEAD = 32, STEPPED = 0;
#include "bins.cu"
#include "scores.cu"
#include "attention.cu"
}
using Arguments = arguments::Attention;

namespace token_arguments {
const int HEAD = 32;
#include "tokens.cu"
#include "bins.cu"
#include "scores.cu"
#include "token_attention.cu"
}
using TokenArguments = token_arguments::TokenAttention;

struct Variant {
  int head;
  bool stepped;
  void (*run)(uint3 grid, int threads, int shared_bytes, const Arguments& arguments);
};

static std::vector<Variant>& variants() {
  static std::vector<Variant> all;
  return all;
}

template <class Attention, void (*KERNEL)(Attention)>
static bool list(Variant variant) {
  variant.run = [](uint3 grid, int threads, int shared_bytes, const Arguments& arguments) {
    launch(grid, threads, shared_bytes, KERNEL, std::bit_cast<Attention>(arguments));
  };
  variants().push_back(variant);
  return true;
}

// token_attention.cu.
struct TokenVariant {
  int head;
  void (*sum)(uint3 grid, int threads, int shared_bytes, const TokenArguments& arguments);
  void (*mix)(uint3 grid, int threads, int shared_bytes, const TokenArguments& arguments);
};

static std::vector<TokenVariant>& token_variants() {
  static std::vector<TokenVariant> all;
  return all;
}

template <class Attention, void (*SUM)(Attention), void (*MIX)(Attention)>
static bool list_tokens(int head) {
  const auto sum = [](uint3 grid, int threads, int shared_bytes, const TokenArguments& arguments) {
    launch(grid, threads, shared_bytes, SUM, std::bit_cast<Attention>(arguments));
  };
  const auto mix = [](uint3 grid, int threads, int shared_bytes, const TokenArguments& arguments) {
    launch(grid, threads, shared_bytes, MIX, std::bit_cast<Attention>(arguments));
  };
  token_variants().push_back({head, sum, mix});
  return true;
}

#define HEAD 16
#include "attention_variants.h"
#define HEAD 32
#include "attention_variants.h"
#define HEAD 48
#include "attention_variants.h"
#define HEAD 64
#include "attention_variants.h"

// Stairs of weights: 16 levels, which the codes of three planes make in two turns.
struct Stairs {
  static const int STEPS = 15, PLANES = 3;
  std::vector<float> thresholds;
  float factors[PLANES + 1] = {0.004f, 0.0005f, 0.01f, 0.0f};
  std::vector<std::vector<u8>> codes;

  Stairs() : codes(PLANES) {
    for (int i = 0; i < STEPS; i++) thresholds.push_back(0.9f * exp2f(-0.5f * (STEPS - 1 - i)));
    // Bytes of any size, also of no step, and a plane that is not there.
    for (int steps = 0; steps <= STEPS; steps++) {
      codes[0].push_back(steps * 17), codes[1].push_back(steps > 0 ? 255 - steps : 9);
      codes[2].push_back(steps * steps / 2 + 3);
    }
  }

  double decoded(double weight) const {
    const auto passed = std::ranges::count_if(thresholds, [&](float step) { return weight >= step; });
    double sum = 0;
    for (int plane = 0; plane < PLANES; plane++) sum += (double)factors[plane] * codes[plane][passed];
    return sum;
  }
};

struct Shape {
  int windows, tokens, heads;
  bool has_bias = false, has_mask = false;
  float zero = 0; // point of scores on one grid
};

static void check(const Variant& variant, const Shape& of) {
  const int head = variant.head, tokens = of.tokens, columns = of.heads * head, rows = of.windows * tokens;
  const int pitch = padded(3 * columns, 64), out_pitch = padded(columns, 64), masks = of.has_mask ? 2 : 1;
  Numbers numbers{5};

  Buffer<u8> qkv((size_t)rows * pitch, "q, k and v"), out((size_t)rows * out_pitch, "results");
  Buffer<float> bias((size_t)of.heads * tokens * tokens, "bias"), mask((size_t)masks * tokens * tokens, "mask");
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < pitch; i++) qkv[(size_t)row * pitch + i] = i < 3 * columns ? numbers.below(256) : 0;
  fill(bias, -1, 1, numbers);
  for (size_t i = 0; i < mask.size(); i++) {
    const int key = (int)(i % tokens), query = (int)(i / tokens % tokens);
    mask[i] = key != query && numbers.below(3) == 0 ? -100.0f : 0.0f;
  }
  const Stairs stairs;
  const Table table(stairs.thresholds, stairs.codes);
  Buffer<uint2> bins(table.bins.size(), "bins");
  Buffer<float> factors(Stairs::PLANES + 1, "factors");
  std::ranges::copy(table.bins, bins.begin());
  std::ranges::copy(stairs.factors, factors.begin());

  const float q_scale = 0.011f, k_scale = 0.013f, v_scale = 0.02f, factor = 1.0f / sqrtf((float)head);
  const int q_zero = 120, k_zero = 99, v_zero = 140;
  const float score_scale = 0.01f, out_scale = 0.015f;
  const FixedGrid scores = {1.0f / score_scale, of.zero, 15}, mixed = {1.0f / out_scale, 110, 255};
  Arguments arguments{};
  arguments.qkv = qkv.begin(), arguments.out = out.begin(), arguments.pitch = pitch, arguments.out_pitch = out_pitch;
  arguments.bias = of.has_bias ? bias.begin() : nullptr, arguments.mask = of.has_mask ? mask.begin() : nullptr;
  arguments.tokens = tokens, arguments.heads = of.heads, arguments.windows = masks;
  arguments.score_factor = q_scale * k_scale * factor * (float)M_LOG2E, arguments.q_zero = q_zero;
  arguments.v_scale = v_scale, arguments.v_zero = v_zero, arguments.mixed = mixed;
  if (variant.stepped) {
    arguments.bins = {bins.begin(), factors.begin(), table.turns, table.count, table.first, table.shift};
  } else {
    arguments.scores = scores, arguments.scores_scale = score_scale;
  }
  const int keys = padded(tokens, 32), head_pitch = padded(head, 32) + 16, tiles = parts(tokens, 16);
  const int shares = parts(tiles, variant.stepped ? 4 : 8), threads = parts(tiles, shares) * 32;
  const int shared_bytes = 2 * keys * head_pitch + 4 * keys + 4 * head + 8 * arguments.bins.count;
  variant.run({(u32)(of.windows * of.heads), (u32)shares, 1}, threads, shared_bytes, arguments);

  // What a weight becomes. In float32 it is one of those near it.
  auto decoded = [&](double weight) {
    if (variant.stepped) return stairs.decoded(weight);
    return score_scale * (std::clamp(rint(weight / score_scale) + of.zero, 0.0, 15.0) - of.zero);
  };
  const double NEAR = 2e-5;
  Comparison comparison("attention of %d columns, stepped %d: %d windows of %d tokens, %d heads, bias %d, mask %d, zero %g", head,
                        variant.stepped, of.windows, tokens, of.heads, of.has_bias, of.has_mask, of.zero);
  std::vector<double> weights(tokens);
  for (int window = 0; window < of.windows; window++)
    for (int at = 0; at < of.heads; at++)
      for (int query = 0; query < tokens; query++) {
        const int row = window * tokens + query;
        const u8* const q = qkv.begin() + (size_t)row * pitch + at * head;
        double most = -INFINITY, sum = 0;
        for (int key = 0; key < tokens; key++) {
          const u8* const k = qkv.begin() + (size_t)(window * tokens + key) * pitch + columns + at * head;
          int products = 0;
          for (int i = 0; i < head; i++) products += (q[i] - q_zero) * (k[i] - k_zero);
          double score = (double)q_scale * k_scale * factor * products;
          if (of.has_bias) score += bias[((size_t)at * tokens + query) * tokens + key];
          if (of.has_mask) score += mask[((size_t)(window % masks) * tokens + query) * tokens + key];
          weights[key] = score, most = std::max(most, score);
        }
        for (double& weight : weights) sum += weight = exp(weight - most);
        std::vector<double> low(head), high(head);
        for (int key = 0; key < tokens; key++) {
          const double weight = weights[key] / sum;
          const double one = decoded(weight * (1 - NEAR)), other = decoded(weight * (1 + NEAR));
          const u8* const v = qkv.begin() + (size_t)(window * tokens + key) * pitch + 2 * columns + at * head;
          for (int i = 0; i < head; i++) {
            const double a = one * v_scale * (v[i] - v_zero), b = other * v_scale * (v[i] - v_zero);
            low[i] += std::min(a, b), high[i] += std::max(a, b);
          }
        }
        const u8* const is = out.begin() + (size_t)row * out_pitch;
        for (int i = 0; i < head; i++) comparison.code(row, at * head + i, is[at * head + i], mixed, low[i], high[i]);
        for (int i = columns; i < out_pitch; i++) comparison.value(row, i, is[i], 0, 0);
      }
}

struct TokenShape {
  int windows, tokens, heads;
  int half = 0; // windows of a quadrant's side
  int bits = 4; // of weights
  bool has_bias = false, has_mask = false;
  float least_ratio = 1e-8f; // of a weight to the largest
};

static void check_tokens(const TokenVariant& variant, const TokenShape& of) {
  const int head = variant.head, tokens = of.tokens, columns = of.heads * head, rows = of.windows * tokens;
  const int pitch = 3 * columns, masks = of.has_mask ? 2 : 1, side = 2 * of.half;
  const int sets = of.half ? of.windows / (of.half * of.half) : of.windows;
  auto set_of = [&](int window) {
    if (!of.half) return window;
    const int row = window / side % side, column = window % side;
    return window / (side * side) * 4 + row / of.half * 2 + column / of.half;
  };
  Numbers numbers{6};
  Buffer<u8> qkv((size_t)rows * pitch, "q, k and v");
  Buffer<float2> grids(2 * (size_t)rows, "grids of q and k"), of_columns((size_t)of.windows * head, "grids of v");
  Buffer<float2> sums((size_t)rows * of.heads, "sums");
  Buffer<float> bias((size_t)of.heads * tokens * tokens, "bias"), mask((size_t)masks * tokens * tokens, "mask");
  Buffer<float> least((size_t)sets * tokens, "least sums"), out((size_t)rows * columns, "results");
  // Zero points within the codes and beyond them.
  const int points[] = {7, 0, 15, -20, 40};
  for (u8& code : qkv) code = numbers.below(32);
  for (float2& grid : grids) grid = make_float2(numbers.between(0.02f, 0.06f), (float)points[numbers.below(5)]);
  for (float2& grid : of_columns) grid = make_float2(numbers.between(0.05f, 0.2f), (float)points[numbers.below(5)]);
  std::ranges::fill(least, INFINITY);
  fill(bias, -1, 1, numbers);
  for (size_t i = 0; i < mask.size(); i++) {
    const int key = (int)(i % tokens), query = (int)(i / tokens % tokens);
    mask[i] = key != query && numbers.below(3) == 0 ? -100.0f : 0.0f;
  }

  // Powers of two by planes of eight exponents; ratios that are too small are the least.
  const int last = std::min((1 << of.bits) - 1, 27);
  std::vector<float> thresholds;
  for (int e = last; e >= 0; e--) thresholds.push_back(exp2f(-0.5f - e));
  std::vector<std::vector<u8>> codes;
  std::vector<float> scales;
  for (int first = 0; first <= last; first += 8) {
    codes.emplace_back(), scales.push_back(exp2f(-(first + 7)));
    for (int steps = 0; steps <= last + 1; steps++) {
      const int e = last + 1 - steps;
      codes.back().push_back(steps > 0 && e >= first && e < first + 8 ? 1 << (first + 7 - e) : 0);
    }
  }
  if (scales.size() % 2) scales.push_back(0);
  const Table table(thresholds, codes, std::ranges::count_if(thresholds, [&](float x) { return x <= of.least_ratio; }));
  Buffer<uint2> bins(table.bins.size(), "bins");
  Buffer<float> factors(scales.size(), "factors");
  std::ranges::copy(table.bins, bins.begin()), std::ranges::copy(scales, factors.begin());

  const float factor = 1.0f / sqrtf((float)head);
  TokenArguments arguments{};
  arguments.qkv = qkv.begin(), arguments.grids = grids.begin(), arguments.columns = of_columns.begin();
  arguments.bias = of.has_bias ? bias.begin() : nullptr, arguments.mask = of.has_mask ? mask.begin() : nullptr;
  arguments.sums = sums.begin(), arguments.least = least.begin(), arguments.out = out.begin();
  arguments.bins = {bins.begin(), factors.begin(), table.turns, table.count, table.first, table.shift};
  arguments.tokens = {tokens, columns, 1, of.half};
  arguments.heads = of.heads, arguments.windows = of.windows, arguments.masks = masks, arguments.pitch = pitch;
  arguments.score_factor = factor * (float)M_LOG2E;
  const int keys = padded(tokens, 32), head_pitch = padded(head, 32) + 16, tiles = parts(tokens, 16);
  const u32 blocks = (u32)(of.windows * of.heads);
  int shares = parts(tiles, 8);
  variant.sum({blocks, (u32)shares, 1}, parts(tiles, shares) * 32, keys * head_pitch, arguments);
  shares = parts(tiles, 4);
  variant.mix({blocks, (u32)shares, 1}, parts(tiles, shares) * 32, 2 * keys * head_pitch + 8 * table.count, arguments);

  // Weights of all rows, and the largest of every token.
  std::vector<double> weights((size_t)rows * of.heads * tokens), largest((size_t)sets * tokens);
  for (int row = 0; row < rows; row++)
    for (int at = 0; at < of.heads; at++) {
      const int window = row / tokens, query = row % tokens;
      const u8* const q = qkv.begin() + (size_t)row * pitch + at * head;
      double* const to = weights.data() + ((size_t)row * of.heads + at) * tokens;
      double most = -INFINITY, sum = 0;
      for (int key = 0; key < tokens; key++) {
        const u8* const k = qkv.begin() + (size_t)(window * tokens + key) * pitch + columns + at * head;
        const float2 q_grid = grids[row], k_grid = grids[rows + window * tokens + key];
        double products = 0;
        for (int i = 0; i < head; i++) products += (q[i] - q_grid.y) * (k[i] - k_grid.y);
        double score = (double)q_grid.x * k_grid.x * factor * products;
        if (of.has_bias) score += bias[((size_t)at * tokens + query) * tokens + key];
        if (of.has_mask) score += mask[((size_t)(window % masks) * tokens + query) * tokens + key];
        to[key] = score, most = std::max(most, score);
      }
      for (int key = 0; key < tokens; key++) sum += to[key] = exp(to[key] - most);
      double& of_token = largest[(size_t)set_of(window) * tokens + query];
      for (int key = 0; key < tokens; key++) of_token = std::max(of_token, to[key] /= sum);
    }

  auto decoded = [&](double ratio) {
    const double e = rint(-log2(std::max(ratio, (double)of.least_ratio)));
    return e > last ? 0.0 : exp2(-std::max(e, 0.0));
  };
  const double NEAR = 2e-5;
  Comparison comparison("attention of tokens, %d columns: %d windows of %d tokens, %d heads, quadrants of %d, %d bits, bias %d",
                        head, of.windows, tokens, of.heads, of.half, of.bits, of.has_bias);
  for (int row = 0; row < rows; row++)
    for (int at = 0; at < of.heads; at++) {
      const int window = row / tokens;
      const double whole = largest[(size_t)set_of(window) * tokens + row % tokens];
      const double* const of_row = weights.data() + ((size_t)row * of.heads + at) * tokens;
      std::vector<double> low(head), high(head), magnitude(head);
      for (int key = 0; key < tokens; key++) {
        const double ratio = of_row[key] / whole;
        const double one = whole * decoded(ratio * (1 - NEAR)), other = whole * decoded(ratio * (1 + NEAR));
        for (int i = 0; i < head; i++) {
          const float2 grid = of_columns[(size_t)window * head + i];
          const double v = grid.x * (qkv[(size_t)(window * tokens + key) * pitch + 2 * columns + at * head + i] - (double)grid.y);
          low[i] += std::min(one * v, other * v), high[i] += std::max(one * v, other * v);
          magnitude[i] += other * grid.x * (32 + fabs(grid.y));
        }
      }
      for (int i = 0; i < head; i++) {
        const double middle = (low[i] + high[i]) / 2, slack = (high[i] - low[i]) / 2 + 1e-5 * magnitude[i];
        comparison.value(row, at * head + i, out[(size_t)row * columns + at * head + i], middle, slack);
      }
    }
}

static void cases() {
  for (const Variant& variant : variants()) {
    check(variant, {.windows = 4, .tokens = 49, .heads = 3, .has_bias = true, .has_mask = true});
    check(variant, {.windows = 1, .tokens = 1, .heads = 1});
    if (!variant.stepped) check(variant, {.windows = 2, .tokens = 65, .heads = 1, .has_mask = true, .zero = 3});
    // Queries of several blocks.
    if (variant.head == 64) check(variant, {.windows = 1, .tokens = 197, .heads = 2, .has_bias = true});
  }
  for (const TokenVariant& variant : token_variants()) {
    check_tokens(variant, {.windows = 2, .tokens = 50, .heads = 3});
    check_tokens(variant, {.windows = 8, .tokens = 49, .heads = 2, .half = 1, .has_bias = true, .has_mask = true});
    // Queries of several blocks.
    if (variant.head == 64) check_tokens(variant, {.windows = 1, .tokens = 145, .heads = 2, .bits = 6});
    if (variant.head != 32) continue;
    check_tokens(variant, {.windows = 32, .tokens = 9, .heads = 3, .half = 2, .bits = 6, .has_bias = true});
    check_tokens(variant, {.windows = 1, .tokens = 1, .heads = 1, .bits = 3});
    // A weight of zero is none of zero.
    check_tokens(variant, {.windows = 1, .tokens = 37, .heads = 2, .bits = 4, .least_ratio = 0.1f});
  }
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
