// product.cu and finish.cu against sums of products in 64 bits.

#include "cases.h"

// Tilings, and which of the kernel's forms runs.
#define LARGE 0
#define MIDDLE 1
#define SMALL 2
#define WIDE 3
#define NARROW 4
#define SEGMENTS 0
#define ONE_SEGMENT 1
#define TO_VALUES 2
#define TO_CODES 3

// finish.cu has the arguments of all products; those of a variant have the same bytes.
namespace arguments {
const int BN = 1, CODES = 0;
#include "finish.cu"
}
using Arguments = arguments::Product;

struct Variant {
  const char* tiling;
  int form;
  int block_m, block_n, step, stages, threads;
  bool nibbles;
  void (*run)(const Variant& variant, uint3 grid, int shared_bytes, const Arguments& arguments);
};

static std::vector<Variant>& variants() {
  static std::vector<Variant> all;
  return all;
}

template <class Product, void (*KERNEL)(Product)>
static bool list(Variant variant) {
  variant.run = [](const Variant& variant, uint3 grid, int shared_bytes, const Arguments& arguments) {
    launch(grid, variant.threads, shared_bytes, KERNEL, std::bit_cast<Product>(arguments));
  };
  variants().push_back(variant);
  return true;
}

#define TILING LARGE
#define STEP 128
#define FORM SEGMENTS
#include "product_variants.h"
#define TILING SMALL
#define STEP 128
#define FORM SEGMENTS
#include "product_variants.h"
#define TILING SMALL
#define STEP 64
#define FORM SEGMENTS
#include "product_variants.h"
#define TILING MIDDLE
#define STEP 128
#define FORM ONE_SEGMENT
#include "product_variants.h"
#define TILING SMALL
#define STEP 64
#define FORM ONE_SEGMENT
#include "product_variants.h"
#define TILING WIDE
#define STEP 128
#define FORM TO_CODES
#include "product_variants.h"
#define TILING WIDE
#define STEP 64
#define FORM TO_CODES
#include "product_variants.h"
#define TILING NARROW
#define STEP 128
#define FORM TO_CODES
#include "product_variants.h"
#define TILING NARROW
#define STEP 64
#define FORM TO_CODES
#include "product_variants.h"
#define TILING NARROW
#define STEP 128
#define FORM TO_VALUES
#include "product_variants.h"
#define TILING NARROW
#define STEP 64
#define FORM TO_VALUES
#include "product_variants.h"

// Codes of a right operand, and as the kernel reads them.
struct Weight {
  std::vector<int> codes; // [rows][width]
  Buffer<u8> packed;

  Weight(int rows, int width, bool nibbles)
      : codes((size_t)rows * width), packed((size_t)rows * width / (nibbles ? 2 : 1), "the right operand") {
    std::fill(packed.begin(), packed.end(), 0);
  }
  void set(int row, int width, int place, int code, bool nibbles) {
    codes[(size_t)row * width + place] = code;
    // Byte i of 16 holds the codes i and i + 16 of 32.
    if (nibbles) packed[(size_t)row * width / 2 + place / 32 * 16 + place % 16] |= code << place % 32 / 16 * 4;
    else packed[(size_t)row * width + place] = code;
  }
};

struct Shape {
  int m, n, k;
  int batch = 1, terms = 1, groups = 1, sum_stride = 1;
  bool has_gelu = false, accumulates = false, has_more = true; // has_more: bias and, if nothing else is added, residual
  bool has_order = false; // of the rows of half the result
};

// Rows on grids of their own, in terms and groups.
static void grids_of_rows(const Variant& variant, const Shape& of) {
  const int group = of.k / of.groups, group_width = padded(group, 32);
  const int width = padded(group_width * of.groups, variant.step);
  const int lhs_rows = of.batch * of.m, rhs_rows = of.batch * of.n, most = variant.nibbles ? 15 : 255;
  auto place = [&](int k) { return k / group * group_width + k % group; };
  Numbers numbers{7};

  Buffer<u8> lhs((size_t)of.terms * lhs_rows * width, "the left operand");
  Buffer<float4> lhs_grids((size_t)of.terms * of.groups * lhs_rows, "grids of the left operand");
  Buffer<float4> rhs_grids(rhs_rows, "grids of the right operand");
  Buffer<float> rhs_sums((size_t)(of.groups * rhs_rows - 1) * of.sum_stride + 1, "sums of the right operand");
  Buffer<float> bias(of.n, "bias"), residual((size_t)lhs_rows * of.n, "residual");
  Buffer<float> out((size_t)lhs_rows * of.n, "results");
  const int per_image = of.has_order ? of.m / 2 : of.m;
  Buffer<i64> order(per_image, "order");
  std::ranges::copy(permutation(per_image, numbers), order.begin());
  Weight rhs(rhs_rows, width, variant.nibbles);
  std::fill(lhs.begin(), lhs.end(), 0);
  std::vector<int> lhs_zeros(lhs_grids.size()), rhs_zeros(rhs_rows);
  for (int row = 0; row < of.terms * lhs_rows; row++) {
    for (int k = 0; k < of.k; k++) lhs[(size_t)row * width + place(k)] = numbers.below(256);
    for (int g = 0; g < of.groups; g++) {
      int sum = 0;
      for (int k = 0; k < group; k++) sum += lhs[(size_t)row * width + g * group_width + k];
      const size_t at = ((size_t)row / lhs_rows * of.groups + g) * lhs_rows + row % lhs_rows;
      const float scale = numbers.between(0.002f, 0.01f), zero = lhs_zeros[at] = numbers.below(256);
      lhs_grids[at] = make_float4(scale, -scale * zero, scale * (sum - group * zero), sum);
    }
  }
  for (int row = 0; row < rhs_rows; row++) {
    for (int k = 0; k < of.k; k++) rhs.set(row, width, place(k), numbers.below(most + 1), variant.nibbles);
    const float scale = numbers.between(0.2f, 1.0f) / most, zero = rhs_zeros[row] = numbers.below(most + 1);
    rhs_grids[row] = make_float4(scale, -scale * zero, NAN, NAN);
    for (int g = 0; g < of.groups; g++) {
      int sum = 0;
      for (int k = 0; k < group; k++) sum += rhs.codes[(size_t)row * width + g * group_width + k];
      rhs_sums[((size_t)g * rhs_rows + row) * of.sum_stride] = sum;
    }
  }
  fill(bias, -1, 1, numbers), fill(residual, -1, 1, numbers);
  if (of.accumulates) fill(out, -1, 1, numbers);
  const std::vector<float> before(out.begin(), out.end());
  const bool has_residual = of.has_more && !of.accumulates;

  Arguments arguments{};
  arguments.lhs = lhs.begin(), arguments.lhs_grids = lhs_grids.begin();
  arguments.rhs = rhs.packed.begin(), arguments.rhs_grids = rhs_grids.begin(), arguments.rhs_sums = rhs_sums.begin();
  arguments.bias = of.has_more ? bias.begin() : nullptr, arguments.residual = has_residual ? residual.begin() : nullptr;
  arguments.out = out.begin(), arguments.m = of.m, arguments.n = of.n, arguments.batch = of.batch;
  arguments.terms = of.terms, arguments.groups = of.groups, arguments.group_width = group_width;
  arguments.width = width, arguments.sum_stride = of.sum_stride;
  arguments.gelu = of.has_gelu, arguments.accumulate = of.accumulates;
  arguments.order = of.has_order ? order.begin() : nullptr, arguments.per_image = per_image;
  const int stage = variant.block_m * variant.step + variant.block_n * variant.step / (variant.nibbles ? 2 : 1);
  const int grids = 4 * variant.block_m * (1 + 2 * of.terms * of.groups) + 4 * variant.block_n * of.groups;
  const uint3 grid = {(u32)parts(of.n, variant.block_n), (u32)parts(of.m, variant.block_m), (u32)of.batch};
  variant.run(variant, grid, variant.stages * stage + grids, arguments);

  Comparison comparison("%s tiling, steps of %d, nibbles %d: %d products [%d, %d] of %d terms and %d groups of %d columns",
                        variant.tiling, variant.step, variant.nibbles, of.batch, of.m, of.n, of.terms, of.groups, group);
  for (int row = 0; row < lhs_rows; row++)
    for (int n = 0; n < of.n; n++) {
      const int column = row / of.m * of.n + n;
      double sum = 0, magnitude = 0; // magnitude: of what cancels out
      for (int term = 0; term < of.terms; term++)
        for (int g = 0; g < of.groups; g++) {
          const size_t at = ((size_t)term * of.groups + g) * lhs_rows + row;
          const u8* const x = lhs.begin() + ((size_t)term * lhs_rows + row) * width + g * group_width;
          const int* const w = rhs.codes.data() + (size_t)column * width + g * group_width;
          const int x_zero = lhs_zeros[at], w_zero = rhs_zeros[column];
          i64 products = 0, sizes = 0;
          for (int k = 0; k < group; k++)
            products += (x[k] - x_zero) * (w[k] - w_zero), sizes += (x[k] + x_zero) * (w[k] + w_zero);
          const double scale = (double)lhs_grids[at].x * rhs_grids[column].x;
          sum += scale * (double)products, magnitude += scale * (double)sizes;
        }
      if (of.has_more) sum += bias[n];
      if (of.has_gelu) sum = exact_gelu(sum);
      const int place = of.has_order ? row / per_image * per_image + (int)order[row % per_image] : row;
      const size_t at = (size_t)place * of.n + n;
      if (has_residual) sum += residual[at];
      if (of.accumulates) sum += before[at];
      comparison.value(row, n, out[at], sum, 2e-7 * magnitude + 1e-6);
    }
}

struct FixedShape {
  int m, n, k;
  int grids = 1; // of the result
  bool has_gelu = false, has_order = false;
};

// Rows on one fixed grid, to codes or to sums with a residual.
static void fixed_grid(const Variant& variant, const FixedShape& of) {
  const int width = padded(padded(of.k, 32), variant.step), most = variant.nibbles ? 15 : 255;
  const int codes_width = padded(of.n, 64), per_image = of.has_order ? of.m / 2 : of.m;
  const bool to_codes = variant.form == TO_CODES;
  Numbers numbers{11};

  Buffer<u8> lhs((size_t)of.m * width, "the left operand");
  Buffer<float4> rhs_grids(of.n, "grids of the right operand");
  Buffer<float> rhs_sums(of.n, "sums of the right operand"), bias(of.n, "bias");
  Buffer<float> residual((size_t)of.m * of.n, "residual"), out((size_t)of.m * of.n, "results");
  Buffer<u8> codes((size_t)of.m * codes_width, "codes");
  Buffer<i64> order(per_image, "order");
  Weight rhs(of.n, width, variant.nibbles);
  std::vector<int> rhs_zeros(of.n);
  std::fill(lhs.begin(), lhs.end(), 0);
  for (int row = 0; row < of.m; row++)
    for (int k = 0; k < of.k; k++) lhs[(size_t)row * width + k] = numbers.below(256);
  for (int row = 0; row < of.n; row++) {
    int sum = 0;
    for (int k = 0; k < of.k; k++) {
      const int code = numbers.below(most + 1);
      rhs.set(row, width, k, code, variant.nibbles);
      sum += code;
    }
    const float scale = numbers.between(0.5f, 1.0f) / most;
    rhs_zeros[row] = numbers.below(most + 1), rhs_sums[row] = sum;
    rhs_grids[row] = make_float4(scale, -scale * rhs_zeros[row], NAN, NAN);
  }
  fill(bias, -1, 1, numbers), fill(residual, -1, 1, numbers);
  std::ranges::copy(permutation(per_image, numbers), order.begin());

  Arguments arguments{};
  arguments.lhs = lhs.begin(), arguments.rhs = rhs.packed.begin();
  arguments.rhs_grids = rhs_grids.begin(), arguments.rhs_sums = rhs_sums.begin(), arguments.bias = bias.begin();
  arguments.m = of.m, arguments.n = of.n, arguments.batch = arguments.terms = arguments.groups = 1;
  arguments.group_width = padded(of.k, 32), arguments.width = width, arguments.columns = of.k;
  arguments.sum_stride = 1, arguments.gelu = of.has_gelu;
  arguments.lhs_scale = 0.01f, arguments.lhs_zero = 100;
  if (to_codes) {
    arguments.codes = codes.begin(), arguments.codes_width = codes_width;
    arguments.grid_columns = of.grids == 1 ? codes_width : of.n / of.grids;
    arguments.first_factor = of.grids == 1 ? 1.0f : 0.5f;
    // Some values are beyond the ends of each.
    arguments.grids[0] = {1.0f / 0.05f, 20, 255};
    arguments.grids[1] = {1.0f / 0.04f, 130, 255};
    arguments.grids[2] = {1.0f / 0.5f, 7, 15};
  } else {
    arguments.out = out.begin(), arguments.residual = residual.begin();
    arguments.order = of.has_order ? order.begin() : nullptr, arguments.per_image = per_image;
  }
  const int stage = variant.block_m * variant.step + variant.block_n * variant.step / (variant.nibbles ? 2 : 1);
  const int shared_bytes = variant.stages * stage + 4 * variant.block_m + 12 * variant.block_n;
  const int written = to_codes ? codes_width : of.n;
  variant.run(variant, {(u32)parts(written, variant.block_n), (u32)parts(of.m, variant.block_m), 1}, shared_bytes, arguments);

  Comparison comparison("%s tiling, steps of %d, nibbles %d: [%d, %d] of %d columns on a fixed grid, gelu %d, %s", variant.tiling,
                        variant.step, variant.nibbles, of.m, of.n, of.k, of.has_gelu, to_codes ? "to codes" : "to values");
  for (int row = 0; row < of.m; row++) {
    for (int n = 0; n < of.n; n++) {
      i64 products = 0, sizes = 0;
      const u8* const x = lhs.begin() + (size_t)row * width;
      const int *const w = rhs.codes.data() + (size_t)n * width, zero = rhs_zeros[n];
      for (int k = 0; k < of.k; k++) products += (x[k] - 100) * (w[k] - zero), sizes += (x[k] + 100) * (w[k] + zero);
      const double scale = (double)arguments.lhs_scale * rhs_grids[n].x;
      double value = scale * (double)products + bias[n];
      if (of.has_gelu) value = exact_gelu(value);
      if (to_codes) {
        const int part = n / arguments.grid_columns;
        const double factor = part == 0 ? arguments.first_factor : 1.0;
        comparison.code(row, n, codes[(size_t)row * codes_width + n], arguments.grids[part], value * factor);
      } else {
        const int place = of.has_order ? row / per_image * per_image + (int)order[row % per_image] : row;
        const size_t at = (size_t)place * of.n + n;
        comparison.value(row, n, out[at], value + residual[at], 2e-7 * scale * (double)sizes + 1e-6);
      }
    }
    for (int n = of.n; to_codes && n < codes_width; n++) comparison.value(row, n, codes[(size_t)row * codes_width + n], 0, 0);
  }
}

static void cases() {
  for (const Variant& variant : variants()) {
    const int m = variant.block_m + 3, n = variant.block_n + 3; // more than one block
    switch (variant.form) {
      case SEGMENTS:
        grids_of_rows(variant, {.m = m, .n = n, .k = 150, .batch = 2, .terms = 2, .has_more = false});
        if (variant.block_m == 128 && !variant.nibbles) break; // Grids of more do not fit the smallest shared memory.
        grids_of_rows(variant, {.m = 5, .n = n + 1, .k = 384, .terms = 2, .groups = 6});
        grids_of_rows(variant, {.m = m, .n = n, .k = 48 * 8, .terms = 2, .groups = 8, .sum_stride = 4, .has_gelu = true});
        grids_of_rows(variant, {.m = m / 2 * 2, .n = n, .k = 48 * 4, .groups = 4, .has_order = true});
        grids_of_rows(variant, {.m = 1, .n = 1, .k = 99, .groups = 3, .sum_stride = 4, .accumulates = true});
        break;
      case ONE_SEGMENT:
        grids_of_rows(variant, {.m = m, .n = n, .k = 500, .sum_stride = 4, .has_gelu = true, .accumulates = true});
        grids_of_rows(variant, {.m = 70, .n = 70, .k = 31, .batch = 2, .has_gelu = true});
        grids_of_rows(variant, {.m = 70, .n = n, .k = 64, .has_order = true});
        grids_of_rows(variant, {.m = 1, .n = n + 1, .k = 200, .has_more = false});
        break;
      default:
        fixed_grid(variant, {.m = 66, .n = 3 * 96, .k = 90, .grids = 3, .has_order = true});
        fixed_grid(variant, {.m = 70, .n = 100, .k = 2 * variant.step + 30, .has_gelu = true});
        fixed_grid(variant, {.m = 1, .n = 36, .k = 64});
    }
  }
}

int main(int count, char** arguments) { return run(count, arguments, cases); }
