// Rows of activations in tiles, and how their products are split.

#ifndef KWM_TILES_H_
#define KWM_TILES_H_

#include "kernels.h"
#include "work.h"

namespace kwm {

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
// blocks of columns at a time. All matrices have as many rows. A value is
// multiplied as often as by that many rows of floats.
template <class MultiplyTile>
void multiply_tiles(const Threads& threads, const Tiling& tiling,
                    const Product* products, int64_t count,
                    int64_t cost_in_rows, const MultiplyTile& multiply_tile) {
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

#endif  // KWM_TILES_H_
