// What the cases of all kernels share.
#pragma once

#include "emulator.h"

#include "codes.cu"

using emulator::Buffer;
using emulator::launch;
using emulator::Numbers;

// In steps of a grid: a number that close to the border of two codes may get either.
const double BORDER = 1e-3;

inline int failures = 0;

inline int parts(int count, int of) { return (count + of - 1) / of; }
inline int padded(int count, int to) { return parts(count, to) * to; }

// Compares a case with its reference, and prints a line at its end if anything differs.
class Comparison {
  char name[160];
  char first[160] = "";
  long compared = 0, wrong = 0;

  void note(bool is_right, int row, int column, double from, double to, double is) {
    compared++;
    if (is_right) return;
    if (wrong++ == 0)
      snprintf(first, sizeof first, "at %d, %d it is %.9g, not within %.9g and %.9g", row, column, is, from, to);
  }

 public:
  __attribute__((format(printf, 2, 3))) explicit Comparison(const char* format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
  }
  ~Comparison() {
    if (compared > 0 && wrong == 0) return;
    failures++;
    printf("FAILED: %s: %ld of %ld are wrong; %s\n", name, wrong, compared, first);
  }
  Comparison(const Comparison&) = delete;
  Comparison& operator=(const Comparison&) = delete;

  // Not true of NaN.
  void value(int row, int column, double is, double expected, double tolerance) {
    note(fabs(is - expected) <= tolerance, row, column, expected - tolerance, expected + tolerance, is);
  }

  // The code of a value between two.
  void code(int row, int column, int is, FixedGrid grid, double from, double to) {
    auto position = [&](double x) { return std::clamp(x * grid.inverse + grid.zero, 0.0, (double)grid.max_code); };
    const double low = position(from) - 0.5 - BORDER, high = position(to) + 0.5 + BORDER;
    note(low <= is && is <= high, row, column, low, high, is);
  }
  void code(int row, int column, int is, FixedGrid grid, double x) { code(row, column, is, grid, x, x); }

  // A value rounded to a grid.
  void rounded(int row, int column, double is, FixedGrid grid, double x) {
    const double position = is * grid.inverse + grid.zero, whole = rint(position);
    if (fabs(position - whole) <= BORDER) code(row, column, (int)whole, grid, x);
    else note(false, row, column, whole, whole, position);
  }
};

inline double exact_gelu(double x) { return 0.5 * x * (1.0 + erf(x * M_SQRT1_2)); }

// A place for every number below `count`.
inline std::vector<u32> permutation(u32 count, Numbers& numbers) {
  std::vector<u32> order(count);
  for (u32 i = 0; i < count; i++) order[i] = i;
  numbers.shuffle(order);
  return order;
}

inline void fill(const Buffer<float>& to, float low, float high, Numbers& numbers) {
  for (float& x : to) x = numbers.between(low, high);
}

// Runs the cases with threads in the order that the first argument names; what `main` returns.
inline int run(int count, char** arguments, void (*cases)()) {
  const char* const orders[] = {"ascending", "descending", "shuffled"};
  for (int i = 0; i < 3; i++)
    if (count == 2 && !strcmp(arguments[1], orders[i])) {
      emulator::order = (emulator::Order)i;
      emulator::catch_bad_addresses();
      cases();
      return failures > 0;
    }
  printf("usage: %s ascending|descending|shuffled\n", arguments[0]);
  return 2;
}
