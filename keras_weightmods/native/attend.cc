// Attention of one query of each sequence: what is seen, split of the work.

#include <algorithm>

#include "kernels.h"
#include "work.h"

namespace {

// The places up to the last one that the mask shows; all if it shows none.
int64_t places_seen(const uint8_t* mask, int64_t places) {
  if (mask == nullptr) return places;
  for (int64_t last = places; last > 0; --last) {
    if (mask[last - 1] != 0) return last;
  }
  return places;
}

}  // namespace

void kwm_attend(const float* q, const float* keys, const float* values,
                int64_t stride, const uint8_t* mask, int64_t batch,
                int64_t places, int64_t heads, int64_t key_heads, int64_t size,
                float scale, float* out, kwm_parallel_for parallel_for,
                void* pool) {
  if (places == 0) std::fill_n(out, batch * heads * size, 0.0f);
  if (batch == 0 || places == 0) return;
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  const int64_t queries = heads / key_heads;
  const kwm::Threads threads{parallel_for, pool};
  const int64_t cost = 2 * queries * places * size / kwm::kLanes;
  threads.run(
      batch * key_heads, kwm::grain(cost), [&](int64_t begin, int64_t end) {
        const kwm::Scratch<float> scratch(
            kwm::HeadOfKeys::scratch(queries, places));
        for (int64_t item = begin; item < end; ++item) {
          const int64_t row = item / key_heads, head = item % key_heads;
          const uint8_t* seen = mask == nullptr ? nullptr : mask + row * places;
          const int64_t from = row * stride + head * size;
          const int64_t query = (row * heads + head * queries) * size;
          kernels.attend(q + query, static_cast<int>(queries),
                         {keys + from, values + from, seen,
                          places_seen(seen, places), key_heads * size, size},
                         scale, scratch.get(), out + query);
        }
      });
}
