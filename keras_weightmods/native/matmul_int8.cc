// Products with int8 activations: choice of the kernels, panels of
// activations, split of the work.

#include <memory>
#include <vector>

#include "work.h"

namespace {

using kwm::Int8Kernels;
using kwm::Int8Rows;
using kwm::Packed;
using kwm::Product;
using kwm::Scratch;
using kwm::Threads;
using kwm::TileKernels;
using kwm::Tiling;
using kwm::kBlockRows;

constexpr int64_t kPanelRows = 512;  // rows of activations rounded at a time

const Int8Kernels& int8_kernels(int type, bool dense) {
  switch (kwm_isa()) {
#if defined(__x86_64__)
    case KWM_ISA_AMX:
    case KWM_ISA_AVX512: {
      static const bool here = __builtin_cpu_supports("avx512vnni") &&
                               __builtin_cpu_supports("avx512vbmi") &&
                               __builtin_cpu_supports("avx512vbmi2");
      if (here) return *kwm::avx512_int8_kernels(type, dense);
      return *kwm::avx2_int8_kernels(type, dense);
    }
    case KWM_ISA_AVX2:
      return *kwm::avx2_int8_kernels(type, dense);
    case KWM_ISA_AVX_VNNI:
      return *kwm::avx_vnni_int8_kernels(type, dense);
#endif
#if defined(__aarch64__)
    case KWM_ISA_NEON:
      return *kwm::neon_int8_kernels(type, dense);
#endif
  }
  return *kwm::scalar_int8_kernels(type, dense);
}

// Those of a matrix with a mask are of the values that it is expanded to.
const Int8Kernels& kernels_of(const Packed& w, bool dense) {
  const bool in_bytes = dense && w.meta != nullptr && w.type == KWM_INT4;
  return int8_kernels(in_bytes ? kwm::kInt4InBytes : w.type, dense);
}

// Blocks of columns with a byte for each value, from those of a matrix with a
// mask.
class Expanded {
 public:
  // The kCallBlocks from `column_block` on, or those left.
  const Packed& at(const Int8Kernels& kernels, const Packed& w,
                   int64_t column_block) {
    if (&w == from_ && column_block == first_) return part_;
    const int64_t row_blocks = w.row_blocks();
    const int64_t blocks =
        kwm::min(kwm::kCallBlocks, w.column_blocks() - column_block);
    constexpr int64_t kBytes = kBlockRows * kwm::kLanes;
    if (from_ == nullptr || w.k != from_->k) {
      bytes_ = std::make_unique<Scratch<char>>(kwm::kCallBlocks * row_blocks *
                                               kBytes);
    }
    for (int64_t i = 0; i < blocks * row_blocks; ++i) {
      const int64_t place = column_block * row_blocks + i;
      kernels.expand(w.values_at(place), w.meta + place * kwm::kLanes,
                      bytes_->get() + i * kBytes);
    }
    from_ = &w, first_ = column_block;
    const int64_t column = column_block * kwm::kLanes;
    const bool is_int8 = w.type == KWM_INT8;
    const void* scale = w.group_scale(column_block);
    if (is_int8) scale = w.int8_scale(column_block);
    return part_ = {w.k,  kwm::min(kwm::kCallBlocks * kwm::kLanes, w.n - column),
                    is_int8 ? KWM_INT8 : kwm::kInt4InBytes, bytes_->get(),
                    nullptr, scale};
  }

 private:
  const Packed* from_ = nullptr;
  int64_t first_ = 0;
  std::unique_ptr<Scratch<char>> bytes_;
  Packed part_{};
};

// Expanded to bfloat16 and multiplied by its tiles, `dense` as below.
void run_tiles(const TileKernels& kernels, bool dense, const float* x,
               int64_t rows, int64_t k, const std::vector<Product>& products,
               const Threads& threads) {
  constexpr int kSizes[] = {TileKernels::kRows, 0};
  Tiling tiling(rows, kSizes);
  tiling.padded = static_cast<int>(tiling.step + tiling.step % 2);
  const int64_t row_blocks = products[0].w.row_blocks();
  const int64_t tile_words = row_blocks * tiling.padded * kBlockRows;
  const Scratch<uint16_t> panel(tiling.count * tile_words);
  threads.run(tiling.count, kwm::grain(tile_words / 16),
              [&](int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) {
                  kernels.pack(x + tiling.first(tile) * k,
                               tiling.rows_of(tile), k, tiling.padded,
                               panel.get() + tile * tile_words);
                }
              });
  // The columns that a thread multiplies by.
  struct Columns {
    Columns(const TileKernels& kernels, int padded, int64_t words)
        : kernels(kernels), words(words) {
      kernels.begin(padded);
    }
    ~Columns() { kernels.end(); }
    const TileKernels& kernels;
    const Scratch<uint16_t> words;
    const Packed* from = nullptr;
    int64_t first = 0;
  };
  const int64_t column_words = row_blocks * TileKernels::kBlockWords;
  kwm::multiply_tiles(
      threads, tiling, products.data(), static_cast<int64_t>(products.size()),
      kwm::ceil_div(tiling.padded, 16), [&] {
        return [&, columns = std::make_unique<Columns>(
                       kernels, tiling.padded,
                       kwm::kCallBlocks * column_words)](
                   int64_t tile, const Packed& w, int64_t column_block,
                   float* out, int64_t out_stride) {
          const int64_t blocks =
              kwm::min(kwm::kCallBlocks, w.column_blocks() - column_block);
          if (&w != columns->from || column_block != columns->first) {
            columns->from = &w, columns->first = column_block;
            for (int64_t i = 0; i < blocks; ++i) {
              kernels.expand(w, dense, column_block + i,
                             columns->words.get() + i * column_words);
            }
          }
          kernels.multiply(panel.get() + tile * tile_words, tiling.padded,
                           columns->words.get(), row_blocks, blocks, out,
                           out_stride);
        };
      });
}

// `dense` matrices can have a mask. All have the tiles and the rounding of the
// first one's kernels.
void run_panel(bool dense, const float* x, int64_t rows, int64_t k,
               const std::vector<Product>& products, const Threads& threads) {
  if (kwm_isa() == KWM_ISA_AMX && rows >= TileKernels::kRows) {
    return run_tiles(*kwm::amx_kernels(), dense, x, rows, k, products, threads);
  }
  const Int8Kernels& first = kernels_of(products[0].w, dense);
  const Tiling tiling(rows, first.tile_rows);
  const int64_t row_blocks = products[0].w.row_blocks();
  const int64_t tile_bytes = Int8Rows::size_of_bytes(row_blocks, tiling.padded);
  const int64_t tile_steps = row_blocks * tiling.padded;
  const Scratch<uint8_t> bytes(tiling.count * tile_bytes);
  const Scratch<float> steps(tiling.count * tile_steps);
  const Scratch<int32_t> offsets(tiling.count * tile_steps);
  const auto rows_of = [&](int64_t tile) {
    return Int8Rows{tiling.padded, bytes.get() + tile * tile_bytes,
                    steps.get() + tile * tile_steps,
                    offsets.get() + tile * tile_steps};
  };
  threads.run(tiling.count, kwm::grain(tile_bytes / 4),
              [&](int64_t begin, int64_t end) {
                for (int64_t tile = begin; tile < end; ++tile) {
                  for (int row = 0; row < tiling.padded; ++row) {
                    // What pads a tile may be any row.
                    const int64_t from =
                        kwm::min(row, tiling.rows_of(tile) - 1);
                    first.quantize(x + (tiling.first(tile) + from) * k, k,
                                     row, rows_of(tile));
                  }
                }
              });
  // An integer costs a quarter of a float.
  kwm::multiply_tiles(
      threads, tiling, products.data(),
      static_cast<int64_t>(products.size()), kwm::ceil_div(tiling.padded, 4),
      [&] {
        return [&, expanded = std::make_unique<Expanded>()](
                   int64_t tile, const Packed& w, int64_t column_block,
                   float* out, int64_t out_stride) {
          const Int8Kernels& kernels = kernels_of(w, dense);
          if (!dense || w.meta == nullptr) {
            kernels.multiply(rows_of(tile), w, column_block, out, out_stride);
            return;
          }
          if (tiling.count == 1 && kernels.multiply_masked != nullptr) {
            kernels.multiply_masked(rows_of(tile), w, column_block, out,
                                    out_stride);
            return;
          }
          kernels.multiply(rows_of(tile), expanded->at(kernels, w, column_block),
                           0, out, out_stride);
        };
      });
}

}  // namespace

void kwm_matmul_int8(const float* x, int64_t rows, int64_t k, int64_t n,
                     int type, const void* values, const uint32_t* meta,
                     const void* scale, float* y, kwm_parallel_for parallel_for,
                     void* pool) {
  const kwm_product product{n, type, values, meta, scale, y};
  kwm_matmul_int8_many(x, rows, k, &product, 1, parallel_for, pool);
}

void kwm_matmul_int8_many(const float* x, int64_t rows, int64_t k,
                          const kwm_product* products, int64_t count,
                          kwm_parallel_for parallel_for, void* pool) {
  std::vector<Product> panel;
  panel.reserve(static_cast<size_t>(count));
  bool dense = false;
  for (const kwm_product* p = products; p != products + count; ++p) {
    if (p->n == 0) continue;
    const int type = static_cast<int>(p->type % KWM_MASKED);
    dense = p->meta == nullptr || p->type >= KWM_MASKED;
    panel.push_back({{k, p->n, type, p->values, p->meta, p->scale}, p->y});
  }
  if (panel.empty()) return;
  // Panels alike, or the last might have few rows.
  const int64_t panels = kwm::ceil_div(rows, kPanelRows);
  const int64_t step = panels == 0 ? 0 : kwm::ceil_div(rows, panels);
  for (int64_t row = 0; row < rows; row += step) {
    const int64_t here = kwm::min(step, rows - row);
    run_panel(dense, x + row * k, here, k, panel, {parallel_for, pool});
    for (Product& product : panel) product.y += here * product.w.n;
  }
}
