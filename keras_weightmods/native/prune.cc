// Pruning and swapping weights of groups: split into columns.

#include "work.h"

namespace {

// function(groups, first) for some columns from the first on.
template <class Function>
void for_columns(const float* weights, int64_t rows, int64_t n, int64_t m,
                 int64_t kept, const Function& function) {
  constexpr int64_t kColumns = kwm::kColumnsToRound;
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t columns = n < j + kColumns ? n - j : kColumns;
    function(kwm::GroupsOfRows{weights + j, rows, columns, n, m, kept}, j);
  }
}

}  // namespace

void kwm_prune_in_order(const float* weights, const float* factor, int64_t rows,
                        int64_t n, int64_t m, int64_t kept, float* pruned,
                        float* errors) {
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  for_columns(weights, rows, n, m, kept,
              [&](const kwm::GroupsOfRows& of, int64_t j) {
                kernels.prune_in_order(of, factor, pruned + j, errors + j);
              });
}

void kwm_swap_in_order(const float* weights, const float* dense,
                       const float* moment, const float* inverse, int64_t rows,
                       int64_t n, int64_t m, int64_t kept, float* slope,
                       float* swapped) {
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  for_columns(weights, rows, n, m, kept,
              [&](const kwm::GroupsOfRows& of, int64_t j) {
                kernels.swap_in_order(of, dense + j, moment, inverse, slope + j,
                                      swapped + j);
              });
}
