// attention.cu against softmax(q·kᵀ) · v in double precision.

#include "cases.h"

// Its arguments; those of a variant have the same bytes.
namespace arguments {
const int HEAD = 32, STEPPED = 0;
#include "attention.cu"
}
using Arguments = arguments::Attention;

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

#define HEAD 16
#include "attention_variants.h"
#define HEAD 32
#include "attention_variants.h"
#define HEAD 48
#include "attention_variants.h"
#define HEAD 64
#include "attention_variants.h"

// Stairs of weights: 16 levels, which the codes of four planes make in two turns.
struct Stairs {
  static const int STEPS = 15, PLANES = 4;
  float thresholds[STEPS], factors[PLANES] = {0.004f, 0.0005f, 0.01f, 0.0f};
  u8 codes[PLANES][STEPS + 1];
  std::vector<uint2> bins; // [turns][count]
  int count, first, shift;

  Stairs() {
    for (int i = 0; i < STEPS; i++) thresholds[i] = 0.9f * exp2f(-0.5f * (STEPS - 1 - i));
    // Bytes of any size, also of no step, and a plane that is not there.
    for (int steps = 0; steps <= STEPS; steps++) {
      codes[0][steps] = steps * 17, codes[1][steps] = steps > 0 ? 255 - steps : 9;
      codes[2][steps] = steps * steps / 2 + 3, codes[3][steps] = 0;
    }
    for (shift = 22; !fits();) shift--;
  }

  // The number of steps that a weight has passed.
  int passed(double weight) const {
    return (int)std::count_if(thresholds, thresholds + STEPS, [&](float step) { return weight >= step; });
  }
  double decoded(double weight) const {
    double sum = 0;
    for (int plane = 0; plane < PLANES; plane++) sum += (double)factors[plane] * codes[plane][passed(weight)];
    return sum;
  }

 private:
  // Makes bins of the numbers that have the same bits above `shift`, if none has two steps.
  bool fits() {
    auto bin_of = [&](float x) { return (int)(std::bit_cast<u32>(x) >> shift); };
    first = bin_of(thresholds[0]), count = bin_of(1.0f) - first + 1;
    bins.clear();
    for (int plane = 0; plane < PLANES; plane += 2)
      for (int bin = first; bin < first + count; bin++) {
        int below = 0, inside = 0;
        for (float step : thresholds) below += bin_of(step) < bin, inside += bin_of(step) == bin;
        if (inside > 1) return false;
        auto pair = [&](int steps) { return codes[plane][steps] | (u32)codes[plane + 1][steps] << 8; };
        const float step = inside ? thresholds[below] : INFINITY;
        bins.push_back({std::bit_cast<u32>(step), pair(below) | (inside ? pair(below + 1) : 0) << 16});
      }
    return true;
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
  Buffer<uint2> bins(stairs.bins.size(), "bins");
  Buffer<float> factors(Stairs::PLANES, "factors");
  std::ranges::copy(stairs.bins, bins.begin());
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
    arguments.bins = bins.begin(), arguments.factors = factors.begin(), arguments.turns = Stairs::PLANES / 2;
    arguments.bin_count = stairs.count, arguments.first_bin = stairs.first, arguments.bin_shift = stairs.shift;
  } else {
    arguments.scores = scores, arguments.scores_scale = score_scale;
  }
  const int keys = padded(tokens, 32), head_pitch = padded(head, 32) + 16, tiles = parts(tokens, 16);
  const int shares = parts(tiles, variant.stepped ? 4 : 8), threads = parts(tiles, shares) * 32;
  const int shared_bytes = 2 * keys * head_pitch + 4 * keys + 4 * head + 8 * arguments.bin_count;
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

static void cases() {
  for (const Variant& variant : variants()) {
    check(variant, {.windows = 4, .tokens = 49, .heads = 3, .has_bias = true, .has_mask = true});
    check(variant, {.windows = 1, .tokens = 1, .heads = 1});
    if (!variant.stepped) check(variant, {.windows = 2, .tokens = 65, .heads = 1, .has_mask = true, .zero = 3});
    // Queries of several blocks.
    if (variant.head == 64) check(variant, {.windows = 1, .tokens = 197, .heads = 2, .has_bias = true});
  }
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
