// Rounding weights to multiples of their scales. Plain loops, which a compiler
// makes vectors of, for the instruction set of kernels_impl.h, which includes
// this.

#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace {

inline float clipped(float ratio, float low, float high) {
  ratio = ratio < low ? low : ratio;
  return ratio > high ? high : ratio;
}

// The nearest integer, to even, of |x| < 2^22.
inline float nearest_integer(float x) {
  constexpr float kShift = 12582912.0f;
  return (x + kShift) - kShift;
}

void round_in_order(const kwm::RowsToRound& of, float* rounded, float* moved) {
  float target[kwm::kColumnsToRound];
  const int64_t columns = of.columns;
  for (int64_t i = 0; i < of.rows; ++i) {
    const int64_t at = i * of.stride;
    for (int64_t j = 0; j < columns; ++j) target[j] = of.targets[at + j];
    for (int64_t above = 0; above < i; ++above) {
      const float share = of.coupling[i * of.rows + above];
      const float* change = moved + above * of.stride;
      for (int64_t j = 0; j < columns; ++j) target[j] -= share * change[j];
    }
    for (int64_t j = 0; j < columns; ++j) {
      const float wanted = target[j] * of.kept[at + j], scale = of.scales[at + j];
      const float ratio = clipped(wanted / scale, of.low, of.high);
      target[j] = wanted;
      rounded[at + j] = nearest_integer(ratio) * scale;
    }
    const float* before = of.before == nullptr ? target : of.before + at;
    for (int64_t j = 0; j < columns; ++j) {
      moved[at + j] = rounded[at + j] - before[j];
    }
  }
}

void search_scales(const float* matrix, int64_t stride, const float* weights,
                   int64_t rows, int64_t columns, const float* factors,
                   int64_t count, float low, float high, float split,
                   float* scales) {
  // Smaller weights are rounded to zero.
  constexpr float kTiny = 1e-30f;
  constexpr int64_t kMost = kwm::kColumnsToRound;
  float largest[kMost], tried[kMost], error[kMost], best[kMost], least[kMost];
  for (int64_t j = 0; j < columns; ++j) largest[j] = least[j] = matrix[j];
  for (int64_t i = 1; i < rows; ++i) {
    const float* row = matrix + i * stride;
    for (int64_t j = 0; j < columns; ++j) {
      largest[j] = row[j] > largest[j] ? row[j] : largest[j];
      least[j] = row[j] < least[j] ? row[j] : least[j];
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    largest[j] = largest[j] > -least[j] ? largest[j] : least[j];
    best[j] = INFINITY;
    scales[j] = 1.0f;
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t j = 0; j < columns; ++j) {
      const float scale = largest[j] * factors[k];
      const float shifted = scale * split + scale;
      const bool is_tiny = largest[j] < kTiny && largest[j] > -kTiny;
      tried[j] = is_tiny ? 1.0f : shifted - (shifted - scale);
      error[j] = 0.0f;
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = matrix + i * stride;
      for (int64_t j = 0; j < columns; ++j) {
        const float ratio = clipped(row[j] / tried[j], low, high);
        const float change = row[j] - nearest_integer(ratio) * tried[j];
        error[j] += weights[i] * (change * change);
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      const bool is_better = error[j] < best[j];
      scales[j] = is_better ? tried[j] : scales[j];
      best[j] = is_better ? error[j] : best[j];
    }
  }
}

void multiples(const float* weights, const float* scales, int64_t rows,
               int64_t columns, float low, float high, float* values) {
  for (int64_t i = 0; i < rows * columns; i += columns) {
    for (int64_t j = 0; j < columns; ++j) {
      const float ratio = clipped(weights[i + j] / scales[j], low, high);
      values[i + j] = nearest_integer(ratio) * scales[j];
    }
  }
}

void multiples_gradient(const float* slope, const float* weights,
                        const float* scales, int64_t rows, int64_t columns,
                        float low, float high, float* by_weight,
                        float* by_scale) {
  for (int64_t j = 0; j < columns; ++j) by_scale[j] = 0.0f;
  for (int64_t i = 0; i < rows * columns; i += columns) {
    for (int64_t j = 0; j < columns; ++j) {
      const float ratio = weights[i + j] / scales[j];
      const float within = clipped(ratio, low, high);
      const float integer = nearest_integer(within), own = slope[i + j];
      const bool inside = within == ratio;
      by_weight[i + j] = inside ? own : 0.0f;
      by_scale[j] += own * (inside ? integer - ratio : integer);
    }
  }
}

}  // namespace
