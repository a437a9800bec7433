// Pruning groups of weights, and swapping those that are kept. Plain loops, as in
// round_impl.h.

#include <math.h>
#include <stdint.h>

#include "kernels.h"

namespace {

void prune_in_order(const kwm::GroupsOfRows& of, const float* factor,
                    float* pruned, float* errors) {
  unsigned char rank[kwm::kMostGroupedRows][kwm::kColumnsToRound];
  const int64_t n = of.stride, columns = of.columns;
  for (int64_t i = 0; i < of.rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      pruned[i * n + j] = of.weights[i * n + j];
    }
  }
  for (int64_t group = 0; group < of.rows; group += of.m) {
    const int64_t end = group + of.m;
    // The cost of removing a weight, as a root. It is infinite for NaN.
    for (int64_t i = group; i < end; ++i) {
      const float root = factor[i * of.rows + i];
      for (int64_t j = 0; j < columns; ++j) {
        const float cost = fabsf(pruned[i * n + j] / root);
        errors[i * n + j] = cost == cost ? cost : INFINITY;
        rank[i][j] = 0;
      }
    }
    for (int64_t i = group; i < end; ++i) {
      for (int64_t other = group; other < end; ++other) {
        const float *own = errors + i * n, *cost = errors + other * n;
        const bool wins_tie = other < i;
        for (int64_t j = 0; j < columns; ++j) {
          rank[i][j] += cost[j] > own[j] || (wins_tie && cost[j] == own[j]);
        }
      }
    }
    for (int64_t i = group; i < end; ++i) {
      const float root = factor[i * of.rows + i];
      float removed[kwm::kColumnsToRound];
      for (int64_t j = 0; j < columns; ++j) {
        const float weight = pruned[i * n + j];
        removed[j] = rank[i][j] < of.kept ? 0.0f : weight;
        pruned[i * n + j] = weight - removed[j];
        errors[i * n + j] = removed[j] / root;
      }
      for (int64_t later = i + 1; later < of.rows; ++later) {
        const float share = factor[i * of.rows + later] / root;
        float* row = pruned + later * n;
        for (int64_t j = 0; j < columns; ++j) row[j] -= share * removed[j];
      }
    }
  }
}

void swap_in_order(const kwm::GroupsOfRows& of, const float* dense,
                   const float* moment, const float* inverse, float* slope,
                   float* swapped) {
  // A change that float32 does not resolve is no improvement.
  constexpr float kResolved = 1.0f - 1e-6f;
  constexpr int64_t kMost = kwm::kColumnsToRound;
  enum : unsigned char { kKept, kFree, kRemoved };
  unsigned char state[kwm::kMostGroupedRows][kMost];
  const int64_t n = of.stride, columns = of.columns;
  for (int64_t group = 0; group < of.rows; group += of.m) {
    const int64_t end = group + of.m;
    int64_t spare[kMost], worst[kMost];
    float gain[kMost], least[kMost];
    for (int64_t j = 0; j < columns; ++j) {
      spare[j] = of.kept - of.m;
      worst[j] = -1;
      least[j] = 0.0f;
    }
    for (int64_t i = group; i < end; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        spare[j] += of.weights[i * n + j] == 0.0f;
      }
    }
    // In a group with too many zeros, the first of these are kept.
    for (int64_t i = group; i < end; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const bool zero = of.weights[i * n + j] == 0.0f;
        state[i][j] = !zero ? kKept : spare[j] > 0 ? kFree : kRemoved;
        spare[j] -= zero;
        swapped[i * n + j] = of.weights[i * n + j];
      }
    }
    // The weight p of each column whose swap for the best q lowers the error
    // most.
    for (int64_t p = group; p < end; ++p) {
      const float *weight = of.weights + p * n, *own = slope + p * n;
      for (int64_t j = 0; j < columns; ++j) {
        gain[j] = state[p][j] == kFree ? own[j] * own[j] * inverse[p] : 0.0f;
      }
      for (int64_t q = group; q < end; ++q) {
        const float pair = moment[p * of.rows + q], root = inverse[q];
        for (int64_t j = 0; j < columns; ++j) {
          const float rest = slope[q * n + j] + weight[j] * pair;
          const float other = rest * rest * root;
          gain[j] = state[q][j] == kRemoved && other > gain[j] ? other : gain[j];
        }
      }
      const float variance = moment[p * of.rows + p];
      for (int64_t j = 0; j < columns; ++j) {
        const float price = weight[j] * (2.0f * own[j] + weight[j] * variance);
        const float change = price - kResolved * gain[j];
        const bool is_least = state[p][j] != kRemoved && change < least[j];
        least[j] = is_least ? change : least[j];
        worst[j] = is_least ? p : worst[j];
      }
    }
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t p = worst[j];
      if (p < 0) continue;
      const float weight = of.weights[p * n + j];
      int64_t added = -1;
      float best = -1.0f, value = 0.0f;
      for (int64_t q = group; q < end; ++q) {
        if (state[q][j] != (q == p ? kFree : kRemoved)) continue;
        const float rest = slope[q * n + j] + weight * moment[q * of.rows + p];
        if (rest * rest * inverse[q] <= best) continue;
        best = rest * rest * inverse[q];
        added = q;
        value = inverse[q] > 0.0f ? rest * inverse[q] : dense[q * n + j];
      }
      // Where a group keeps all, a weight may go and none can come.
      swapped[p * n + j] = 0.0f;
      if (added >= 0) swapped[added * n + j] = value;
      const float gone = added == p ? 0.0f : -weight;
      const float come = added < 0 ? 0.0f : added == p ? value - weight : value;
      const int64_t q = added < 0 ? p : added;
      for (int64_t i = 0; i < of.rows; ++i) {
        const float* row = moment + i * of.rows;
        slope[i * n + j] -= row[p] * gone + row[q] * come;
      }
    }
  }
}

}  // namespace
