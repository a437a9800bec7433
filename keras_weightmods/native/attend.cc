// Attention: what is seen, split of the work.

#include <string.h>

#include <algorithm>

#include "work.h"

namespace {

// The places up to the last one that the mask shows beyond `least`; `least` where
// none is there, but all places where it shows none at all: each then has the
// same weight.
int64_t places_seen(const uint8_t* mask, int64_t places, int64_t least) {
  int64_t last = places;
  // Mostly in steps of eight.
  for (uint64_t eight; last - 8 >= least; last -= 8) {
    memcpy(&eight, mask + last - 8, sizeof(eight));
    if (eight != 0) break;
  }
  for (; last > least; --last) {
    if (mask[last - 1] != 0) return last;
  }
  const bool any =
      std::any_of(mask, mask + least, [](uint8_t seen) { return seen != 0; });
  return any ? least : places;
}

}  // namespace

void kwm_attend(const float* q, const float* keys, const float* values,
                int64_t stride, const uint8_t* mask, int64_t batch,
                int64_t queries, int64_t places, int64_t heads,
                int64_t key_heads, int64_t size, float scale, float* out,
                kwm_parallel_for parallel_for, void* pool) {
  if (places == 0) std::fill_n(out, batch * queries * heads * size, 0.0f);
  if (batch == 0 || queries == 0 || places == 0) return;
  const kwm::Kernels& kernels = kwm::kernels_in_use();
  const int64_t group = heads / key_heads;
  const kwm::Threads threads{parallel_for, pool};
  // The keys of an item are used for all of its queries and heads.
  const int64_t tile = std::min<int64_t>(queries, kwm::HeadOfKeys::kQueries),
                tiles = kwm::ceil_div(queries, tile),
                cost = 2 * tile * group * places * size / kwm::kLanes,
                room = kwm::HeadOfKeys::scratch(places, size);
  threads.run(
      batch * key_heads * tiles, kwm::grain(cost),
      [&](int64_t begin, int64_t end) {
        const kwm::Scratch<float> scratch(room);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t row = item / tiles / key_heads,
                        head = item / tiles % key_heads;
          // The last queries see most: they come first.
          const int64_t first = (tiles - 1 - item % tiles) * tile;
          const int64_t count = std::min(tile, queries - first);
          const uint8_t* seen = nullptr;
          int64_t last = places;
          if (mask != nullptr) {
            seen = mask + (row * queries + first) * places;
            last = 0;
            for (int64_t i = count - 1; i >= 0 && last < places; --i) {
              last = places_seen(seen + i * places, places, last);
            }
          }
          const int64_t from = row * stride + head * size;
          const int64_t query =
              ((row * queries + first) * heads + head * group) * size;
          const kwm::HeadOfKeys of{keys + from, values + from, seen,
                                   last,        key_heads * size, size};
          // The heads of one query are as many queries with one mask.
          const bool is_one =
              queries == 1 && group <= kwm::HeadOfKeys::kQueries;
          kernels.attend(q + query, is_one ? size : heads * size,
                         static_cast<int>(is_one ? group : count),
                         static_cast<int>(is_one ? 1 : group), of,
                         is_one ? 0 : places, scale, scratch.get(),
                         out + query);
        }
      });
}
