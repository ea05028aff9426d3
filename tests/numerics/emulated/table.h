// Stairs as kernels look them up.
#pragma once

#include "cases.h"

// Stairs as a table: bins of numbers up to 1 that have the same bits above `shift`, none of which has two steps.
struct Table {
  std::vector<uint2> bins; // [turns][count]
  int turns, count, first, shift = 22;

  // `codes[plane]`: of every number of steps passed; all numbers have passed the first `always` thresholds.
  Table(const std::vector<float>& thresholds, const std::vector<std::vector<u8>>& codes, size_t always = 0) {
    turns = parts((int)codes.size(), 2);
    while (!fits(thresholds, codes, always)) shift--;
  }

 private:
  bool fits(const std::vector<float>& thresholds, const std::vector<std::vector<u8>>& codes, size_t always) {
    auto bin_of = [&](float x) { return (int)(std::bit_cast<u32>(x) >> shift); };
    first = bin_of(thresholds[always]), count = bin_of(1.0f) - first + 1;
    bins.clear();
    for (int plane = 0; plane < 2 * turns; plane += 2)
      for (int bin = first; bin < first + count; bin++) {
        int below = (int)always, inside = 0;
        for (size_t i = always; i < thresholds.size(); i++)
          below += bin_of(thresholds[i]) < bin, inside += bin_of(thresholds[i]) == bin;
        if (inside > 1) return false;
        auto code = [&](int plane, int steps) { return plane < (int)codes.size() ? (u32)codes[plane][steps] : 0; };
        auto pair = [&](int steps) { return code(plane, steps) | code(plane + 1, steps) << 8; };
        const float step = inside ? thresholds[below] : INFINITY;
        bins.push_back({std::bit_cast<u32>(step), pair(below) | (inside ? pair(below + 1) : 0) << 16});
      }
    return true;
  }
};
