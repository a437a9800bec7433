// The public products: choice of the instruction set, panels of activations,
// split of the work.

#include <atomic>

#include "work.h"

#if KWM_HAS_AVX_VNNI
#include <cpuid.h>
#endif

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;
using kwm::Kernels;
using kwm::Packed;
using kwm::Scratch;
using kwm::Threads;
using kwm::Tiling;
using kwm::grain;

constexpr int64_t kPanelRows = 512;  // rows of activations packed at a time

#if defined(__x86_64__)
bool has_avx_vnni() {
#if KWM_HAS_AVX_VNNI
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
#else
  return false;
#endif
}

// All but the products of int8 activations are those of AVX2.
const Kernels* avx_vnni_kernels() {
  static const Kernels own = [] {
    Kernels kernels = *kwm::avx2_kernels();
    kernels.isa = KWM_ISA_AVX_VNNI;
    return kernels;
  }();
  return &own;
}
#endif

const Kernels* supported(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  switch (isa) {
    case KWM_ISA_SCALAR:
      return kwm::scalar_kernels();
#if defined(__x86_64__)
    case KWM_ISA_AVX2:
      if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return nullptr;
      }
      return kwm::avx2_kernels();
    case KWM_ISA_AVX_VNNI:
      return has_avx_vnni() ? avx_vnni_kernels() : nullptr;
    case KWM_ISA_AVX512:
      if (!__builtin_cpu_supports("avx512f") ||
          !__builtin_cpu_supports("avx512bw") ||
          !__builtin_cpu_supports("avx512dq") ||
          !__builtin_cpu_supports("avx512vl")) {
        return nullptr;
      }
      return kwm::avx512_kernels();
#endif
#if defined(__aarch64__)
    case KWM_ISA_NEON:
      return kwm::neon_kernels();
#endif
    default:
      return nullptr;
  }
}

const Kernels* best() {
  const int from_best[] = {KWM_ISA_NEON, KWM_ISA_AVX512, KWM_ISA_AVX_VNNI,
                           KWM_ISA_AVX2};
  for (int isa : from_best) {
    if (const Kernels* kernels = supported(isa)) return kernels;
  }
  return kwm::scalar_kernels();
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

// Rows of `in`, (rows, columns), to blocks [columns/16, panel_rows, 16], zero
// where there is nothing to copy.
void pack_panel(const float* in, int64_t rows, int64_t columns,
                int64_t panel_rows, int64_t blocks, float* panel) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t column = block * kLanes;
    const int64_t here = kwm::clamp(columns - column, 0, kLanes);
    for (int64_t row = 0; row < panel_rows; ++row) {
      float* out = panel + (block * panel_rows + row) * kLanes;
      const int64_t copied = row < rows ? here : 0;
      const float* from = in + row * columns + column;
      if (copied == kLanes) {
        memcpy(out, from, kLanes * sizeof(float));
        continue;
      }
      for (int64_t j = 0; j < kLanes; ++j) out[j] = j < copied ? from[j] : 0;
    }
  }
}

// out (columns, rows) = in (rows, columns)^T
void transpose(const Kernels& kernels, const float* in, int64_t in_stride,
               int64_t rows, int64_t columns, float* out, int64_t out_stride) {
  const int width = kernels.width;
  for (int64_t row = 0; row < rows; row += width) {
    for (int64_t column = 0; column < columns; column += width) {
      const float* from = in + row * in_stride + column;
      float* to = out + column * out_stride + row;
      if (row + width <= rows && column + width <= columns) {
        kernels.transpose(from, in_stride, to, out_stride);
        continue;
      }
      const int64_t rows_left = kwm::min(width, rows - row);
      const int64_t columns_left = kwm::min(width, columns - column);
      for (int64_t i = 0; i < rows_left; ++i) {
        for (int64_t j = 0; j < columns_left; ++j) {
          to[j * out_stride + i] = from[i * in_stride + j];
        }
      }
    }
  }
}

// Rows of `in`, (rows, columns), transposed to [panel_columns, lanes], zero
// where there is nothing to copy.
void pack_transposed(const Kernels& kernels, const float* in, int64_t stride,
                     int64_t rows, int64_t columns, int64_t panel_columns,
                     int64_t lanes, float* panel) {
  if (rows < lanes || columns < panel_columns) {
    memset(panel, 0,
           static_cast<size_t>(panel_columns * lanes) * sizeof(float));
  }
  transpose(kernels, in, stride, rows, columns, panel, lanes);
}

// A kernel as it is or, of int4 values, with float32 ones.
class FloatCopy {
 public:
  FloatCopy(const Packed& w, Threads threads)
      : w_(w), values_(w.type == KWM_INT4 ? places(w) * kPlaceFloats : 0) {
    if (w.type != KWM_INT4) return;
    threads.run(places(w), kwm::grain(kPlaceFloats / kLanes),
                [&](int64_t begin, int64_t end) {
                  for (int64_t place = begin; place < end; ++place) {
                    copy(w, place);
                  }
                });
    w_.type = KWM_FLOAT32;
    w_.values = values_.get();
    w_.scale = nullptr;
  }

  const Packed& packed() const { return w_; }

 private:
  static constexpr int64_t kPlaceFloats = kBlockSlots * kLanes;

  static int64_t places(const Packed& w) {
    return w.row_blocks() * w.column_blocks();
  }

  void copy(const Packed& w, int64_t place) const {
    const int64_t row_block = place % w.row_blocks();
    const int64_t column_block = place / w.row_blocks();
    for (int lane = 0; lane < kLanes; ++lane) {
      const float scale = w.scale_at(column_block, row_block, lane);
      for (int slot = 0; slot < kBlockSlots; ++slot) {
        values_.get()[place * kPlaceFloats + slot * kLanes + lane] =
            scale *
            kwm::stored_value(w.values, KWM_INT4, place, slot, lane);
      }
    }
  }

  Packed w_;
  const Scratch<float> values_;
};

class Matmul {
 public:
  Matmul(const Kernels& kernels, const Packed& w, Threads threads)
      : kernels_(kernels), w_(w), threads_(threads) {}

  void run(const float* x, int64_t rows, float* y) const {
    if (w_.n == 0) return;
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const float* in = x + row * w_.k;
      float* out = y + row * w_.n;
      const int64_t here = kwm::min(kPanelRows, rows - row);
      const int64_t many = run_many(in, here, out);
      run_few(in + many * w_.k, here - many, out + many * w_.n);
    }
  }

 private:
  // Blocks of rows of W in a tile of x, which stays in a first-level cache of
  // 32 KiB; blocks of columns, whose sums stay in a second-level one.
  static constexpr int64_t kRowBlocks = 3;
  static constexpr int64_t kColumnBlocks = 8;
  static constexpr int64_t kChunkWords = kRowBlocks * kLanes;

  // As many of the rows as make tiles that are nearly full, where their lanes
  // do more than run_few would; returns how many.
  int64_t run_many(const float* x, int64_t rows, float* y) const {
    const int64_t lanes = kwm::kManyVectors * kernels_.width;
    int64_t tiles = rows / lanes;
    if (8 * (rows - tiles * lanes) >= 7 * lanes) ++tiles;
    if (tiles == 0 || w_.k == 0) return 0;
    rows = kwm::min(rows, tiles * lanes);
    const int64_t tile_floats = w_.padded_k() * lanes;
    const Scratch<float> panel(tiles * tile_floats);
    threads_.run(tiles, grain(tile_floats / kLanes),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t tile = begin; tile < end; ++tile) {
                     const int64_t row = tile * lanes;
                     pack_transposed(kernels_, x + row * w_.k, w_.k,
                                     kwm::min(lanes, rows - row), w_.k,
                                     w_.padded_k(), lanes,
                                     panel.get() + tile * tile_floats);
                   }
                 });
    // Few columns: the tiles are split among the threads too.
    const int64_t chunks = kwm::ceil_div(w_.column_blocks(), kColumnBlocks);
    const int64_t groups =
        threads_.parallel_for == nullptr
            ? 1
            : kwm::min(tiles, kwm::ceil_div(32, chunks));
    const int64_t tiles_in_group = kwm::ceil_div(tiles, groups);
    threads_.run(chunks * groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> sums(tiles_in_group * kColumnBlocks * kLanes *
                                lanes);
      const Scratch<float> slots(kColumnBlocks * kChunkWords * kBlockSlots);
      const Scratch<uint32_t> words(kColumnBlocks * kChunkWords);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % groups * tiles_in_group;
        const int64_t here = kwm::min(tiles_in_group, tiles - first);
        if (here <= 0) continue;
        multiply_many(panel.get() + first * tile_floats, here,
                      item / groups * kColumnBlocks,
                      kwm::min(here * lanes, rows - first * lanes),
                      slots.get(), words.get(), sums.get(),
                      y + first * lanes * w_.n);
      }
    });
    return rows;
  }

  // A chunk of columns. The values are made ready once for all tiles.
  void multiply_many(const float* x, int64_t tiles, int64_t first_column_block,
                     int64_t rows, float* slots, uint32_t* words, float* sums,
                     float* y) const {
    const int64_t lanes = kwm::kManyVectors * kernels_.width;
    const int64_t column_blocks =
        kwm::min(kColumnBlocks, w_.column_blocks() - first_column_block);
    for (int64_t b = 0; b < w_.row_blocks(); b += kRowBlocks) {
      const int64_t row_blocks = kwm::min(kRowBlocks, w_.row_blocks() - b);
      for (int64_t i = 0; i < column_blocks; ++i) {
        const int64_t place =
            (first_column_block + i) * w_.row_blocks() + b;
        float* slots_here = slots + i * kChunkWords * kBlockSlots;
        kernels_.slots_of_columns[w_.type](
            w_.values_at(place), w_.meta + place * kLanes, row_blocks,
            slots_here, words + i * kChunkWords);
        if (w_.type == KWM_INT8) {
          scale_columns(first_column_block + i, row_blocks * kBlockSlots,
                        slots_here);
        }
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t i = 0; i < column_blocks; ++i) {
          kernels_.multiply_many(
              x + (tile * w_.row_blocks() + b) * kBlockRows * lanes,
              slots + i * kChunkWords * kBlockSlots, words + i * kChunkWords,
              row_blocks, b == 0,
              sums + (tile * kColumnBlocks + i) * kLanes * lanes);
        }
      }
    }
    for (int64_t row = 0; row < rows; row += lanes) {
      const int64_t column = first_column_block * kLanes;
      transpose(kernels_, sums + row * kColumnBlocks * kLanes, lanes,
                kwm::min(column_blocks * kLanes, w_.n - column),
                kwm::min(lanes, rows - row), y + row * w_.n + column, w_.n);
    }
  }

  void run_few(const float* x, int64_t rows, float* y) const {
    if (rows == 0) return;
    const Tiling tiling(rows, kernels_.tile_rows);
    const int64_t tile_floats = tiling.padded * w_.padded_k();
    const Scratch<float> panel(tiling.count * tile_floats);
    threads_.run(
        tiling.count, grain(tile_floats / kLanes),
        [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            pack_panel(x + tiling.first(tile) * w_.k, tiling.rows_of(tile),
                       w_.k, tiling.padded, w_.padded_k() / kLanes,
                       panel.get() + tile * tile_floats);
          }
        });
    const kwm::Product product{w_, y};
    kwm::multiply_tiles(
        threads_, tiling, &product, 1, tiling.padded,
        [&](int64_t tile, const Packed& w, int64_t column_block, float* out,
            int64_t out_stride) {
          kernels_.multiply[w.type](panel.get() + tile * tile_floats,
                                    tiling.padded, w, column_block, out,
                                    out_stride);
        });
  }

  void scale_columns(int64_t column_block, int64_t size, float* slots) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float scale = w_.int8_scale(column_block)[lane];
      for (int64_t i = 0; i < size; ++i) slots[lane * size + i] *= scale;
    }
  }

  const Kernels& kernels_;
  const Packed w_;
  const Threads threads_;
};

// Every row of W meets every column here and the pattern saves nothing: blocks
// are expanded, and multiplied as dense ones.
class MatmulTransposed {
 public:
  MatmulTransposed(const Kernels& kernels, const Packed& w, Threads threads)
      : kernels_(kernels), w_(w), threads_(threads) {}

  void run(const float* dy, int64_t rows, float* dx) const {
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      run_panel(dy + row * w_.n, kwm::min(kPanelRows, rows - row),
                dx + row * w_.k);
    }
  }

 private:
  static constexpr int64_t kChunk = 32;  // blocks of columns expanded at once

  void run_panel(const float* dy, int64_t rows, float* dx) const {
    const int lanes =
        kernels_.width * (rows <= kernels_.width ? 1 : kwm::kDenseVectors);
    const int64_t tiles = kwm::ceil_div(rows, lanes);
    const int64_t blocks = w_.column_blocks();
    const int64_t block_floats = kLanes * lanes;
    const Scratch<float> panel(tiles * blocks * block_floats);
    threads_.run(
        tiles * blocks, grain(block_floats / kLanes),
        [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item / blocks * lanes;
            const int64_t column = item % blocks * kLanes;
            pack_transposed(kernels_, dy + row * w_.n + column, w_.n,
                            kwm::min(lanes, rows - row),
                            kwm::min(kLanes, w_.n - column), kLanes, lanes,
                            panel.get() + item * block_floats);
          }
        });
    threads_.run(w_.row_blocks(),
                 grain(kBlockRows * w_.n * tiles * lanes / kLanes),
                 [&](int64_t begin, int64_t end) {
                   multiply(panel.get(), lanes, rows, begin, end, dx);
                 });
  }

  void multiply(const float* panel, int lanes, int64_t rows, int64_t begin,
                int64_t end, float* dx) const {
    const int64_t blocks = w_.column_blocks();
    const int64_t tiles = kwm::ceil_div(rows, lanes);
    const int64_t tile_floats = kBlockRows * lanes;
    const Scratch<float> dense(kChunk * kBlockRows * kLanes);
    const Scratch<float> sums(tiles * tile_floats);
    for (int64_t row_block = begin; row_block < end; ++row_block) {
      // Without columns the product is zero: one round all the same.
      for (int64_t first = 0; first == 0 || first < blocks; first += kChunk) {
        const int64_t here = kwm::min(kChunk, blocks - first);
        for (int64_t i = 0; i < here; ++i) {
          expand(first + i, row_block,
                 dense.get() + i * kBlockRows * kLanes);
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const float* in =
              panel + (tile * blocks + first) * kLanes * lanes;
          for (int i = 0; i < kBlockRows; i += 8) {
            kernels_.multiply_dense(dense.get() + i * kLanes, in, lanes, here,
                                    first == 0,
                                    sums.get() + tile * tile_floats +
                                        i * lanes);
          }
        }
      }
      store(sums.get(), lanes, rows, row_block, dx);
    }
  }

  void expand(int64_t column_block, int64_t row_block, float* dense) const {
    const int64_t place = column_block * w_.row_blocks() + row_block;
    kernels_.expand[w_.type](w_.values_at(place), w_.meta + place * kLanes,
                             dense);
    if (w_.type != KWM_INT8) return;
    const float* scale = w_.int8_scale(column_block);
    for (int i = 0; i < kBlockRows * kLanes; ++i) dense[i] *= scale[i % kLanes];
  }

  void store(const float* sums, int lanes, int64_t rows, int64_t row_block,
             float* dx) const {
    const int64_t first = row_block * kBlockRows;
    const int64_t here = kwm::min(kBlockRows, w_.k - first);
    for (int64_t row = 0; row < rows; row += lanes) {
      transpose(kernels_, sums + row * kBlockRows, lanes, here,
                kwm::min(lanes, rows - row), dx + row * w_.k + first, w_.k);
    }
  }

  const Kernels& kernels_;
  const Packed w_;
  const Threads threads_;
};

}  // namespace

const Kernels& kwm::kernels_in_use() { return *in_use().load(); }

bool kwm::has_avx512_vnni() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512vbmi");
  return here;
#else
  return false;
#endif
}

int kwm_abi_version(void) { return KWM_ABI_VERSION; }

int kwm_isa(void) { return in_use().load()->isa; }

int kwm_set_isa(int isa) {
  const Kernels* kernels = supported(isa);
  if (kernels == nullptr) return -1;
  in_use().store(kernels);
  return isa;
}

void kwm_matmul(const float* x, int64_t rows, int64_t k, int64_t n, int type,
                const void* values, const uint32_t* meta, const void* scale,
                float* y, kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, type, values, meta, scale};
  const Threads threads{parallel_for, pool};
  const FloatCopy copy(w, threads);
  Matmul(*in_use().load(), copy.packed(), threads).run(x, rows, y);
}

void kwm_matmul_transposed(const float* dy, int64_t rows, int64_t k, int64_t n,
                           int type, const void* values, const uint32_t* meta,
                           const void* scale, float* dx,
                           kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, type, values, meta, scale};
  const Threads threads{parallel_for, pool};
  const FloatCopy copy(w, threads);
  MatmulTransposed(*in_use().load(), copy.packed(), threads).run(dy, rows, dx);
}

void kwm_values_gradient(const float* x, const float* dy, int64_t rows,
                         int64_t k, int64_t n, const uint32_t* meta,
                         float* dvalues, kwm_parallel_for parallel_for,
                         void* pool) {
  const Packed w{k, n, KWM_FLOAT32, nullptr, meta, nullptr};
  const Kernels& kernels = *in_use().load();
  const Threads threads{parallel_for, pool};
  const int64_t x_blocks = w.padded_k() / kLanes;
  const int64_t dy_blocks = w.column_blocks();
  const int64_t most = kwm::min(kPanelRows, rows);
  const Scratch<float> x_panel(most * w.padded_k());
  const Scratch<float> dy_panel(most * dy_blocks * kLanes);
  // Without rows the gradient is zero: one round all the same.
  for (int64_t row = 0; row == 0 || row < rows; row += kPanelRows) {
    const int64_t here = kwm::min(kPanelRows, rows - row);
    pack_panel(x + row * k, here, k, here, x_blocks, x_panel.get());
    pack_panel(dy + row * n, here, n, here, dy_blocks, dy_panel.get());
    threads.run(
        dy_blocks * x_blocks, grain(here * kBlockSlots / 2),
        [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t x_block = item % x_blocks;
            const int64_t place =
                item / x_blocks * w.row_blocks() + x_block / 2;
            const int slot = static_cast<int>(x_block % 2) * 8;
            kernels.gradient(
                x_panel.get() + x_block * here * kLanes,
                dy_panel.get() + item / x_blocks * here * kLanes, here,
                meta + place * kLanes, slot, row == 0,
                dvalues + (place * kBlockSlots + slot) * kLanes);
          }
        });
  }
}
