// Memory to work in, threads to share the work, and rows of activations in tiles.

#ifndef KWM_WORK_H_
#define KWM_WORK_H_

#include <memory>
#include <new>

#include "kernels.h"

namespace kwm {

// Memory that begins at a cache line.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(
            static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Delete> data_;
};

struct Threads {
  kwm_parallel_for parallel_for;
  void* pool;

  // work(begin, end) over 0 <= i < count.
  template <class Work>
  void run(int64_t count, int64_t grain, const Work& work) const {
    if (count <= 0) return;
    if (parallel_for == nullptr || count <= grain) return work(0, count);
    parallel_for(
        pool, count, grain,
        [](void* context, int64_t begin, int64_t end) {
          (*static_cast<const Work*>(context))(begin, end);
        },
        const_cast<Work*>(&work));
  }
};

// So many items that a thread has work for some microseconds. An item costs as
// much as that many multiply-adds of 16 lanes.
inline int64_t grain(int64_t cost_of_item) {
  return ceil_div(int64_t{1} << 14, cost_of_item > 0 ? cost_of_item : 1);
}

// `rows` rows in `count` tiles of up to `step`, padded to `padded`, one of
// `sizes` (rising, ends with 0).
struct Tiling {
  Tiling(int64_t rows, const int* sizes) : rows(rows) {
    const int* most = sizes;
    while (most[1] != 0) ++most;
    count = ceil_div(rows, *most);
    step = ceil_div(rows, count);
    while (*sizes < step) ++sizes;
    padded = *sizes;
  }

  int64_t first(int64_t tile) const { return tile * step; }
  int64_t rows_of(int64_t tile) const { return min(step, rows - first(tile)); }

  int64_t rows, count, step;
  int padded;
};

// A matrix, and where its product goes: y (rows, w.n).
struct Product {
  Packed w;
  float* y;
};

// multiply_tile(tile, w, column block, out, its stride) of all, kCallBlocks
// blocks of columns at a time; start() gives one for each range of work. All matrices have as many rows. A value is
// multiplied as often as by that many rows of floats.
template <class Start>
void multiply_tiles(const Threads& threads, const Tiling& tiling,
                    const Product* products, int64_t count,
                    int64_t cost_in_rows, const Start& start) {
  constexpr int64_t kColumns = kCallBlocks * kLanes;
  const auto parts_of = [](const Product& product) {
    return ceil_div(product.w.n, kColumns);
  };
  int64_t parts = 0;
  for (int64_t i = 0; i < count; ++i) parts += parts_of(products[i]);
  // Tiles innermost: the values of these columns stay in the cache.
  // Fetching the values costs as much as three rows more.
  threads.run(
      parts * tiling.count,
      grain(products->w.padded_k() / 2 * (cost_in_rows + 3) * kCallBlocks),
      [&](int64_t begin, int64_t end) {
        alignas(64) float padded[kMostTileRows * kColumns];
        const auto multiply_tile = start();
        for (int64_t item = begin; item < end; ++item) {
          const int64_t tile = item % tiling.count;
          const int64_t rows = tiling.rows_of(tile);
          int64_t part = item / tiling.count;
          const Product* product = products;
          while (part >= parts_of(*product)) part -= parts_of(*product++);
          const Packed& w = product->w;
          const int64_t column = part * kColumns;
          const int64_t columns = min(kColumns, w.n - column);
          float* out = product->y + tiling.first(tile) * w.n + column;
          if (rows == tiling.padded && columns % kLanes == 0) {
            multiply_tile(tile, w, column / kLanes, out, w.n);
            continue;
          }
          multiply_tile(tile, w, column / kLanes, padded, kColumns);
          for (int64_t row = 0; row < rows; ++row) {
            memcpy(out + row * w.n, padded + row * kColumns,
                   static_cast<size_t>(columns) * sizeof(float));
          }
        }
      });
}

}  // namespace kwm

#endif  // KWM_WORK_H_
