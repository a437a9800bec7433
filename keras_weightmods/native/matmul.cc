// The public products: choice of the instruction set, panels of activations,
// split of the work.

#include <atomic>
#include <optional>

#include "work.h"

#if defined(__x86_64__)
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
// These differ in the products of int8 activations alone.
Kernels renamed(Kernels kernels, int isa) {
  kernels.isa = isa;
  return kernels;
}
const Kernels* avx_vnni_kernels() {
  static const Kernels own = renamed(*kwm::avx2_kernels(), KWM_ISA_AVX_VNNI);
  return &own;
}
const Kernels* amx_kernels() {
  static const Kernels own = renamed(*kwm::avx512_kernels(), KWM_ISA_AMX);
  return &own;
}
#endif

const Kernels* supported(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  switch (isa) {
    case KWM_ISA_SCALAR:
      return kwm::scalar_kernels();
#if defined(__x86_64__)
    case KWM_ISA_AVX2:
      return has_avx2 ? kwm::avx2_kernels() : nullptr;
    case KWM_ISA_AVX_VNNI:
      return kwm::has(kwm::Feature::kAvxVnni) ? avx_vnni_kernels() : nullptr;
    case KWM_ISA_AVX512:
      return has_avx512 ? kwm::avx512_kernels() : nullptr;
    case KWM_ISA_AMX:
      return has_avx512 && kwm::amx_kernels() ? amx_kernels() : nullptr;
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
  const int from_best[] = {KWM_ISA_NEON, KWM_ISA_AMX, KWM_ISA_AVX512,
                           KWM_ISA_AVX_VNNI, KWM_ISA_AVX2};
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
    const int64_t here = kwm::min(columns - column, kLanes);
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

// A kernel as it is or, of int4 values, with float32 ones in `room`.
Packed with_floats(const Packed& w, const Threads& threads,
                   std::optional<Scratch<float>>* room) {
  if (w.type != KWM_INT4) return w;
  constexpr int64_t kPlaceFloats = kBlockSlots * kLanes;
  const int64_t places = w.row_blocks() * w.column_blocks();
  float* out = room->emplace(places * kPlaceFloats).get();
  threads.run(places, grain(kBlockSlots), [&](int64_t begin, int64_t end) {
    for (int64_t place = begin; place < end; ++place) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const float scale = w.scale_at(place / w.row_blocks(),
                                       place % w.row_blocks(), lane);
        for (int slot = 0; slot < kBlockSlots; ++slot) {
          out[place * kPlaceFloats + slot * kLanes + lane] =
              scale * kwm::stored_value(w.values, KWM_INT4, place, slot, lane);
        }
      }
    }
  });
  return {w.k, w.n, KWM_FLOAT32, out, w.meta, nullptr};
}

struct Matmul {
  const Kernels& kernels;
  const Packed w;
  const Threads threads;

  void run(const float* x, int64_t rows, float* y) const {
    if (w.n == 0) return;
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const float* in = x + row * w.k;
      float* out = y + row * w.n;
      const int64_t here = kwm::min(kPanelRows, rows - row);
      const int64_t many = run_many(in, here, out);
      run_few(in + many * w.k, here - many, out + many * w.n);
    }
  }

  // Blocks of rows of W in a tile of x, which stays in a first-level cache of
  // 32 KiB; blocks of columns, whose sums stay in a second-level one.
  static constexpr int64_t kRowBlocks = 3;
  static constexpr int64_t kColumnBlocks = 8;
  static constexpr int64_t kChunkWords = kRowBlocks * kLanes;

  // As many of the rows as make tiles that are nearly full, where their lanes
  // do more than run_few would; returns how many.
  int64_t run_many(const float* x, int64_t rows, float* y) const {
    const int64_t lanes = kwm::kManyVectors * kernels.width;
    int64_t tiles = rows / lanes;
    if (8 * (rows - tiles * lanes) >= 7 * lanes) ++tiles;
    if (tiles == 0 || w.k == 0) return 0;
    rows = kwm::min(rows, tiles * lanes);
    const int64_t tile_floats = w.padded_k() * lanes;
    const Scratch<float> panel(tiles * tile_floats);
    threads.run(tiles, grain(tile_floats / kLanes),
                [&](int64_t begin, int64_t end) {
                  for (int64_t tile = begin; tile < end; ++tile) {
                    const int64_t row = tile * lanes;
                    pack_transposed(kernels, x + row * w.k, w.k,
                                    kwm::min(lanes, rows - row), w.k,
                                    w.padded_k(), lanes,
                                    panel.get() + tile * tile_floats);
                  }
                });
    // Few columns: the tiles are split among the threads too.
    const int64_t chunks = kwm::ceil_div(w.column_blocks(), kColumnBlocks);
    const int64_t groups =
        threads.parallel_for == nullptr
            ? 1
            : kwm::min(tiles, kwm::ceil_div(32, chunks));
    const int64_t tiles_in_group = kwm::ceil_div(tiles, groups);
    threads.run(chunks * groups, 1, [&](int64_t begin, int64_t end) {
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
                      y + first * lanes * w.n);
      }
    });
    return rows;
  }

  // A chunk of columns. The values are made ready once for all tiles.
  void multiply_many(const float* x, int64_t tiles, int64_t first_column_block,
                     int64_t rows, float* slots, uint32_t* words, float* sums,
                     float* y) const {
    const int64_t lanes = kwm::kManyVectors * kernels.width;
    const int64_t column_blocks =
        kwm::min(kColumnBlocks, w.column_blocks() - first_column_block);
    for (int64_t b = 0; b < w.row_blocks(); b += kRowBlocks) {
      const int64_t row_blocks = kwm::min(kRowBlocks, w.row_blocks() - b);
      for (int64_t i = 0; i < column_blocks; ++i) {
        const int64_t place =
            (first_column_block + i) * w.row_blocks() + b;
        float* slots_here = slots + i * kChunkWords * kBlockSlots;
        kernels.slots_of_columns[w.type](
            w.values_at(place), w.meta + place * kLanes, row_blocks,
            slots_here, words + i * kChunkWords);
        const int64_t size = row_blocks * kBlockSlots;
        for (int lane = 0; w.type == KWM_INT8 && lane < kLanes; ++lane) {
          const float scale = w.int8_scale(first_column_block + i)[lane];
          float* own = slots_here + lane * size;
          for (int64_t j = 0; j < size; ++j) own[j] *= scale;
        }
      }
      for (int64_t tile = 0; tile < tiles; ++tile) {
        for (int64_t i = 0; i < column_blocks; ++i) {
          kernels.multiply_many(
              x + (tile * w.row_blocks() + b) * kBlockRows * lanes,
              slots + i * kChunkWords * kBlockSlots, words + i * kChunkWords,
              row_blocks, b == 0,
              sums + (tile * kColumnBlocks + i) * kLanes * lanes);
        }
      }
    }
    for (int64_t row = 0; row < rows; row += lanes) {
      const int64_t column = first_column_block * kLanes;
      transpose(kernels, sums + row * kColumnBlocks * kLanes, lanes,
                kwm::min(column_blocks * kLanes, w.n - column),
                kwm::min(lanes, rows - row), y + row * w.n + column, w.n);
    }
  }

  void run_few(const float* x, int64_t rows, float* y) const {
    if (rows == 0) return;
    const Tiling tiling(rows, kernels.tile_rows);
    const int64_t tile_floats = tiling.padded * w.padded_k();
    const Scratch<float> panel(tiling.count * tile_floats);
    threads.run(
        tiling.count, grain(tile_floats / kLanes),
        [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            pack_panel(x + tiling.first(tile) * w.k, tiling.rows_of(tile),
                       w.k, tiling.padded, w.padded_k() / kLanes,
                       panel.get() + tile * tile_floats);
          }
        });
    const kwm::Product product{w, y};
    kwm::multiply_tiles(
        threads, tiling, &product, 1, tiling.padded,
        [&] {
          return [&](int64_t tile, const Packed& w, int64_t column_block,
                     float* out, int64_t out_stride) {
            kernels.multiply[w.type](panel.get() + tile * tile_floats,
                                     tiling.padded, w, column_block, out,
                                     out_stride);
          };
        });
  }

};

// Every row of W meets every column here and the pattern saves nothing: blocks
// are expanded, and multiplied as dense ones.
struct MatmulTransposed {
  const Kernels& kernels;
  const Packed w;
  const Threads threads;

  void run(const float* dy, int64_t rows, float* dx) const {
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      run_panel(dy + row * w.n, kwm::min(kPanelRows, rows - row),
                dx + row * w.k);
    }
  }

  static constexpr int64_t kChunk = 32;  // blocks of columns expanded at once

  void run_panel(const float* dy, int64_t rows, float* dx) const {
    const int lanes =
        kernels.width * (rows <= kernels.width ? 1 : kwm::kDenseVectors);
    const int64_t tiles = kwm::ceil_div(rows, lanes);
    const int64_t blocks = w.column_blocks();
    const int64_t block_floats = kLanes * lanes;
    const Scratch<float> panel(tiles * blocks * block_floats);
    threads.run(
        tiles * blocks, grain(block_floats / kLanes),
        [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item / blocks * lanes;
            const int64_t column = item % blocks * kLanes;
            pack_transposed(kernels, dy + row * w.n + column, w.n,
                            kwm::min(lanes, rows - row),
                            kwm::min(kLanes, w.n - column), kLanes, lanes,
                            panel.get() + item * block_floats);
          }
        });
    threads.run(w.row_blocks(),
                grain(kBlockRows * w.n * tiles * lanes / kLanes),
                [&](int64_t begin, int64_t end) {
                  multiply(panel.get(), lanes, rows, begin, end, dx);
                });
  }

  void multiply(const float* panel, int lanes, int64_t rows, int64_t begin,
                int64_t end, float* dx) const {
    const int64_t blocks = w.column_blocks();
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
            kernels.multiply_dense(dense.get() + i * kLanes, in, lanes, here,
                                   first == 0,
                                   sums.get() + tile * tile_floats +
                                       i * lanes);
          }
        }
      }
      const int64_t first = row_block * kBlockRows;
      const int64_t here = kwm::min(kBlockRows, w.k - first);
      for (int64_t row = 0; row < rows; row += lanes) {
        transpose(kernels, sums.get() + row * kBlockRows, lanes, here,
                  kwm::min(lanes, rows - row), dx + row * w.k + first, w.k);
      }
    }
  }

  void expand(int64_t column_block, int64_t row_block, float* dense) const {
    const int64_t place = column_block * w.row_blocks() + row_block;
    kernels.expand[w.type](w.values_at(place), w.meta + place * kLanes, dense);
    if (w.type != KWM_INT8) return;
    const float* scale = w.int8_scale(column_block);
    for (int i = 0; i < kBlockRows * kLanes; ++i) dense[i] *= scale[i % kLanes];
  }
};

}  // namespace

const Kernels& kwm::kernels_in_use() { return *in_use().load(); }

#if defined(__x86_64__)
const bool kwm::kReadsPastCache =
    (__builtin_cpu_init(), !__builtin_cpu_is("intel"));

bool kwm::has(Feature feature) {
  const int bit = static_cast<int>(feature);
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, bit < 32 ? 1 : 0, &a, &b, &c, &d) != 0 &&
         ((bit < 32 ? a : d) >> bit % 32 & 1) != 0;
}
#endif

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
  std::optional<Scratch<float>> room;
  Matmul{*in_use().load(), with_floats(w, threads, &room), threads}.run(
      x, rows, y);
}

void kwm_matmul_transposed(const float* dy, int64_t rows, int64_t k, int64_t n,
                           int type, const void* values, const uint32_t* meta,
                           const void* scale, float* dx,
                           kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, type, values, meta, scale};
  const Threads threads{parallel_for, pool};
  std::optional<Scratch<float>> room;
  MatmulTransposed{*in_use().load(), with_floats(w, threads, &room), threads}
      .run(dy, rows, dx);
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
