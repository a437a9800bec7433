// Rounding weights to multiples of their scales: split of the work.

#include "work.h"

namespace {

// function(g) for 0 <= g < groups, each of which has `size` weights.
template <class Function>
void for_each_group(int64_t groups, int64_t size, const kwm::Threads& threads,
                    const Function& function) {
  threads.run(groups, kwm::grain(size / kwm::kLanes),
              [&](int64_t begin, int64_t end) {
                for (int64_t g = begin; g < end; ++g) function(g);
              });
}

}  // namespace

void kwm_round_in_order(const float* targets, const float* coupling,
                        const float* kept, const float* scales,
                        const float* before, int64_t rows, int64_t n, float low,
                        float high, float* rounded, float* moved) {
  constexpr int64_t kColumns = kwm::kColumnsToRound;
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  for (int64_t j = 0; j < n; j += kColumns) {
    const kwm::RowsToRound of{
        targets + j, coupling,
        kept + j,    scales + j,
        before == nullptr ? nullptr : before + j,
        rows,        n < j + kColumns ? n - j : kColumns,
        n,           low,
        high};
    kernels.round_in_order(of, rounded + j, moved + j);
  }
}

void kwm_search_scales(const float* matrix, const float* weights, int64_t k,
                       int64_t rows, int64_t n, const float* factors,
                       int64_t count, float low, float high, float split,
                       float* scales) {
  constexpr int64_t kColumns = kwm::kColumnsToRound;
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  for (int64_t first = 0; first < k; first += rows, scales += n) {
    const int64_t own = k < first + rows ? k - first : rows;
    for (int64_t j = 0; j < n; j += kColumns) {
      kernels.search_scales(matrix + first * n + j, n, weights + first, own,
                            n < j + kColumns ? n - j : kColumns, factors, count,
                            low, high, split, scales + j);
    }
  }
}

void kwm_multiples(const float* weights, const float* scales, int64_t groups,
                   int64_t rows, int64_t n, float low, float high,
                   float* values, kwm_parallel_for parallel_for, void* pool) {
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  const int64_t size = rows * n;
  for_each_group(groups, size, {parallel_for, pool}, [&](int64_t g) {
    kernels.multiples(weights + g * size, scales + g * n, rows, n, low, high,
                      values + g * size);
  });
}

void kwm_multiples_gradient(const float* slope, const float* weights,
                            const float* scales, int64_t groups, int64_t rows,
                            int64_t n, float low, float high, float* by_weight,
                            float* by_scale, kwm_parallel_for parallel_for,
                            void* pool) {
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  const int64_t size = rows * n;
  for_each_group(groups, size, {parallel_for, pool}, [&](int64_t g) {
    kernels.multiples_gradient(slope + g * size, weights + g * size,
                               scales + g * n, rows, n, low, high,
                               by_weight + g * size, by_scale + g * n);
  });
}
