// The public products: choice of the instruction set, panels of activations,
// split of the work.

#include <atomic>
#include <memory>
#include <new>

#include "kernels.h"

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;
using kwm::Kernels;
using kwm::Packed;

constexpr int64_t kPanelRows = 512;  // rows of activations packed at a time

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
    case KWM_ISA_AVX512:
      if (!__builtin_cpu_supports("avx512f") ||
          !__builtin_cpu_supports("avx512bw") ||
          !__builtin_cpu_supports("avx512dq") ||
          !__builtin_cpu_supports("avx512vl")) {
        return nullptr;
      }
      return kwm::avx512_kernels();
#endif
    case KWM_ISA_NEON:
      return kwm::neon_kernels();
    default:
      return nullptr;
  }
}

// Null where there are none for this instruction set or CPU.
const kwm::DigitKernels* digit_kernels(const Kernels& kernels) {
  if (kernels.isa != KWM_ISA_AVX512) return nullptr;
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_supports("avx512vnni") &&
                           __builtin_cpu_supports("avx512vbmi");
  if (here) return kwm::avx512_vnni_kernels();
#endif
  return nullptr;
}

const Kernels* best() {
  const int from_best[] = {KWM_ISA_NEON, KWM_ISA_AVX512, KWM_ISA_AVX2};
  for (int isa : from_best) {
    if (const Kernels* kernels = supported(isa)) return kernels;
  }
  return kwm::scalar_kernels();
}

std::atomic<const Kernels*>& in_use() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

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
int64_t grain(int64_t cost_of_item) {
  return kwm::ceil_div(int64_t{1} << 14, cost_of_item > 0 ? cost_of_item : 1);
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
      if (copied > 0) {
        memcpy(out, in + row * columns + column,
               static_cast<size_t>(copied) * sizeof(float));
      }
      for (int64_t j = copied; j < kLanes; ++j) out[j] = 0;
    }
  }
}

// The transpose of columns begin <= j < end, [end - begin, lanes].
void pack_transposed(const float* in, int64_t rows, int64_t columns,
                     int64_t begin, int64_t end, int lanes, float* panel) {
  for (int64_t j = begin; j < end; ++j) {
    float* out = panel + (j - begin) * lanes;
    for (int64_t row = 0; row < lanes; ++row) {
      out[row] = row < rows && j < columns ? in[row * columns + j] : 0;
    }
  }
}

// `rows` rows in `count` tiles of up to `step`, padded to `padded`.
struct Tiling {
  Tiling(int64_t rows, const int* sizes) : rows(rows) {
    const int* most = sizes;
    while (most[1] != 0) ++most;
    count = kwm::ceil_div(rows, *most);
    step = kwm::ceil_div(rows, count);
    while (*sizes < step) ++sizes;
    padded = *sizes;
  }

  int64_t first(int64_t tile) const { return tile * step; }
  int64_t rows_of(int64_t tile) const {
    return kwm::min(step, rows - first(tile));
  }

  int64_t rows, count, step;
  int padded;
};

class Matmul {
 public:
  Matmul(const Kernels& kernels, const Packed& w, Threads threads)
      : kernels_(kernels), w_(w), threads_(threads) {}

  void run(const float* x, int64_t rows, float* y) const {
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const float* in = x + row * w_.k;
      float* out = y + row * w_.n;
      const int64_t here = kwm::min(kPanelRows, rows - row);
      if (!run_digits(in, here, out)) run_floats(in, here, out);
    }
  }

 private:
  void run_floats(const float* x, int64_t rows, float* y) const {
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
    multiply(tiling, y, [&](int64_t tile, int64_t column_block, float* out) {
      kernels_.multiply[w_.type](panel.get() + tile * tile_floats,
                                 tiling.padded, w_.values_of(column_block),
                                 w_.meta_of(column_block), w_.row_blocks(),
                                 out);
    });
  }

  // False where floats have to do.
  bool run_digits(const float* x, int64_t rows, float* y) const {
    const kwm::DigitKernels* digits = digit_kernels(kernels_);
    if (digits == nullptr || w_.type != KWM_INT8 ||
        w_.row_blocks() > kwm::kMostRowBlocks) {
      return false;
    }
    const Tiling tiling(rows, digits->tile_rows);
    const int64_t blocks = kwm::ceil_div(w_.k, kwm::kDigitColumns);
    const int64_t row_bytes = kwm::kDigits * kwm::kDigitColumns;
    const int64_t tile_bytes = tiling.padded * blocks * row_bytes;
    const Scratch<uint8_t> panel(tiling.count * tile_bytes);
    const Scratch<float> steps(tiling.count * tiling.padded);
    std::atomic<bool> all{true};
    threads_.run(
        tiling.count, grain(tile_bytes / kLanes),
        [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            uint8_t* out = panel.get() + tile * tile_bytes;
            float* step = steps.get() + tile * tiling.padded;
            for (int row = 0; row < tiling.padded; ++row) {
              // What pads a tile may be any row; its sums are not looked at.
              const int64_t from = kwm::min(row, tiling.rows_of(tile) - 1);
              if (!digits->to_digits(x + (tiling.first(tile) + from) * w_.k,
                                     w_.k, tiling.padded, blocks,
                                     out + row * row_bytes, step + row)) {
                all = false;
              }
            }
          }
        });
    if (!all) return false;
    multiply(tiling, y, [&](int64_t tile, int64_t column_block, float* out) {
      digits->multiply(panel.get() + tile * tile_bytes,
                       steps.get() + tile * tiling.padded, tiling.padded,
                       w_.values_of(column_block), w_.meta_of(column_block),
                       w_.row_blocks(), out);
    });
    return true;
  }

  // multiply_tile(tile, column block, [padded, 16]) of all into y.
  template <class MultiplyTile>
  void multiply(const Tiling& tiling, float* y,
                const MultiplyTile& multiply_tile) const {
    // Tiles innermost: the values of a block of columns stay in the cache.
    // Fetching the values costs as much as three rows more.
    threads_.run(
        w_.column_blocks() * tiling.count,
        grain(w_.padded_k() / 2 * (tiling.padded + 3)),
        [&](int64_t begin, int64_t end) {
          alignas(64) float sums[16 * kLanes];
          for (int64_t item = begin; item < end; ++item) {
            const int64_t tile = item % tiling.count;
            const int64_t column_block = item / tiling.count;
            multiply_tile(tile, column_block, sums);
            store(sums, tiling.rows_of(tile), column_block,
                  y + tiling.first(tile) * w_.n);
          }
        });
  }

  void store(const float* sums, int64_t rows, int64_t column_block,
             float* y) const {
    const int64_t column = column_block * kLanes;
    const int64_t columns = kwm::min(kLanes, w_.n - column);
    for (int64_t row = 0; row < rows; ++row) {
      float* out = y + row * w_.n + column;
      for (int64_t j = 0; j < columns; ++j) {
        const float scale = w_.type == KWM_INT8 ? w_.scale[column + j] : 1;
        out[j] = sums[row * kLanes + j] * scale;
      }
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
    const int lanes = rows <= kernels_.few_lanes ? kernels_.few_lanes
                                                 : kernels_.many_lanes;
    const int64_t tiles = kwm::ceil_div(rows, lanes);
    const int64_t blocks = w_.column_blocks();
    const int64_t block_floats = kLanes * lanes;
    const Scratch<float> panel(tiles * blocks * block_floats);
    threads_.run(
        tiles * blocks, grain(block_floats / kLanes), [&](int64_t begin, int64_t end) {
          for (int64_t item = begin; item < end; ++item) {
            const int64_t row = item / blocks * lanes;
            const int64_t column = item % blocks * kLanes;
            pack_transposed(dy + row * w_.n, rows - row, w_.n, column,
                            column + kLanes, lanes,
                            panel.get() + item * block_floats);
          }
        });
    threads_.run(w_.row_blocks(), grain(kBlockRows * w_.n * tiles * lanes / kLanes),
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
    const float* scale = w_.scale + column_block * kLanes;
    for (int i = 0; i < kBlockRows * kLanes; ++i) dense[i] *= scale[i % kLanes];
  }

  void store(const float* sums, int lanes, int64_t rows, int64_t row_block,
             float* dx) const {
    const int64_t first = row_block * kBlockRows;
    const int64_t here = kwm::min(kBlockRows, w_.k - first);
    for (int64_t row = 0; row < rows; ++row) {
      const float* in = sums + row / lanes * kBlockRows * lanes + row % lanes;
      for (int64_t i = 0; i < here; ++i) {
        dx[row * w_.k + first + i] = in[i * lanes];
      }
    }
  }

  const Kernels& kernels_;
  const Packed w_;
  const Threads threads_;
};

}  // namespace

int kwm_abi_version(void) { return KWM_ABI_VERSION; }

int kwm_isa(void) { return in_use().load()->isa; }

int kwm_set_isa(int isa) {
  const Kernels* kernels = supported(isa);
  if (kernels == nullptr) return -1;
  in_use().store(kernels);
  return isa;
}

void kwm_matmul(const float* x, int64_t rows, int64_t k, int64_t n, int type,
                const void* values, const uint32_t* meta, const float* scale,
                float* y, kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, type, values, meta, scale};
  Matmul(*in_use().load(), w, {parallel_for, pool}).run(x, rows, y);
}

void kwm_matmul_transposed(const float* dy, int64_t rows, int64_t k, int64_t n,
                           int type, const void* values, const uint32_t* meta,
                           const float* scale, float* dx,
                           kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, type, values, meta, scale};
  MatmulTransposed(*in_use().load(), w, {parallel_for, pool}).run(dy, rows, dx);
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
  const Scratch<float> x_panel(kPanelRows * w.padded_k());
  const Scratch<float> dy_panel(kPanelRows * dy_blocks * kLanes);
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

int kwm_is_faster_than_dense(int64_t, int64_t, int64_t, int) {
  return kwm_isa() != KWM_ISA_SCALAR;
}
