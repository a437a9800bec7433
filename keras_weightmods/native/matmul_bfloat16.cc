// Products of bfloat16 activations with bfloat16 values: in pairs where the
// CPU has instructions for these, else by those of float32.

#include "work.h"

namespace {

using kwm::BFloat16Kernels;
using kwm::kBlockRows;
using kwm::kLanes;
using kwm::Packed;
using kwm::Scratch;
using kwm::Threads;
using kwm::grain;

constexpr int64_t kPanelRows = 256;  // rows of activations packed at a time

// Null where there are none for the instruction set in use or the CPU.
const BFloat16Kernels* bfloat16_kernels() {
#if defined(__x86_64__)
  static const bool here = kwm::has(kwm::Feature::kAvx512BFloat16);
  const bool in_use = kwm_isa() == KWM_ISA_AVX512 || kwm_isa() == KWM_ISA_AMX;
  if (here && in_use) return kwm::avx512_bf16_kernels();
#endif
  return nullptr;
}

// Whether the indices of all groups are strictly rising, as they are packed.
bool is_rising(const uint32_t* meta, int64_t count) {
  uint32_t rises = ~uint32_t{0};
  for (int64_t i = 0; i < count; ++i) {
    // The low bit of each pair of bits; of the first index and the second.
    const uint32_t word = meta[i], next = word >> 2;
    const uint32_t high = ~word & next, same = ~(word ^ next);
    rises &= high >> 1 | (same >> 1 & high);
  }
  return (rises & 0x11111111) == 0x11111111;
}

struct Matmul {
  const Packed w;
  const Threads threads;

  void run(const uint16_t* x, int64_t rows, uint16_t* y) const {
    if (w.n == 0) return;
    const BFloat16Kernels* kernels = w.k == 0 ? nullptr : bfloat16_kernels();
    for (int64_t row = 0; row < rows; row += kPanelRows) {
      const uint16_t* in = x + row * w.k;
      uint16_t* out = y + row * w.n;
      const int64_t here = kwm::min(kPanelRows, rows - row);
      int64_t done = 0;
      for (const Tile& tile : kTiles) {
        if (kernels == nullptr) break;
        done += run_pairs(*kernels, tile, in + done * w.k, here - done,
                          out + done * w.n);
      }
      run_floats(w, threads, in + done * w.k, here - done,
                 out + done * w.n);
    }
  }

  // So many vectors, and the rows for which that is faster than floats: of all
  // rows at most, and of the last tile at least.
  struct Tile {
    int vectors;
    int64_t most, least;
  };
  static constexpr Tile kTiles[] = {{4, kPanelRows, 40}, {2, 32, 28}};

  // As in matmul.cc.
  static constexpr int64_t kRowBlocks = 2;
  static constexpr int64_t kColumnBlocks = 16;
  static constexpr int64_t kChunkWords =
      kRowBlocks * BFloat16Kernels::kColumnWords;

  // By float32, of some blocks of columns of W.
  void run_floats(const Packed& part, Threads own, const uint16_t* x,
                  int64_t rows, uint16_t* y) const {
    if (rows == 0) return;
    const Scratch<float> in(rows * w.k), out(rows * part.n);
    for (int64_t i = 0; i < rows * w.k; ++i) {
      in.get()[i] = kwm::bfloat16_to_float(x[i]);
    }
    kwm_matmul(in.get(), rows, w.k, part.n, w.type, part.values, part.meta,
               nullptr, out.get(), own.parallel_for, own.pool);
    for (int64_t row = 0; row < rows; ++row) {
      const float* from = out.get() + row * part.n;
      uint16_t* to = y + row * w.n;
      for (int64_t i = 0; i < part.n; ++i) {
        to[i] = kwm::float_to_bfloat16(from[i]);
      }
    }
  }

  // As many of the rows as make tiles that are full enough; returns how many.
  int64_t run_pairs(const BFloat16Kernels& kernels, const Tile& size,
                    const uint16_t* x, int64_t rows, uint16_t* y) const {
    const int vectors = size.vectors;
    const int64_t lanes = vectors * kLanes;
    int64_t tiles = rows / lanes;
    if (rows - tiles * lanes >= size.least) ++tiles;
    if (tiles == 0 || rows > size.most) return 0;
    rows = kwm::min(rows, tiles * lanes);
    const int64_t tile_words = w.row_blocks() * kLanes * lanes;
    const Scratch<uint32_t> panel(tiles * tile_words);
    threads.run(tiles, grain(tile_words / kLanes),
                [&](int64_t begin, int64_t end) {
                  for (int64_t tile = begin; tile < end; ++tile) {
                    const int64_t row = tile * lanes;
                    kernels.pack(x + row * w.k, kwm::min(lanes, rows - row),
                                 w.k, vectors,
                                 panel.get() + tile * tile_words);
                  }
                });
    // Few columns: the tiles are split among the threads too.
    const int64_t chunks = kwm::ceil_div(w.column_blocks(), kColumnBlocks);
    const int64_t groups = threads.parallel_for == nullptr
                               ? 1
                               : kwm::min(tiles, kwm::ceil_div(32, chunks));
    const int64_t tiles_in_group = kwm::ceil_div(tiles, groups);
    threads.run(chunks * groups, 1, [&](int64_t begin, int64_t end) {
      const Scratch<float> sums(tiles_in_group * kColumnBlocks * kLanes *
                                lanes);
      const Scratch<uint32_t> pairs(kRowBlocks * kBlockRows / 4 *
                                    BFloat16Kernels::kPairs * lanes);
      const Scratch<uint32_t> columns(kColumnBlocks * kChunkWords);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item % groups * tiles_in_group;
        const int64_t here = kwm::min(tiles_in_group, tiles - first);
        if (here <= 0) continue;
        const int64_t row = first * lanes;
        const int64_t rows_here = kwm::min(here * lanes, rows - row);
        const int64_t block = item / groups * kColumnBlocks;
        const Packed part = columns_from(block);
        uint16_t* out = y + row * w.n + block * kLanes;
        if (!is_rising(part.meta, part.column_blocks() * part.row_blocks() *
                                     kLanes)) {
          run_floats(part, {nullptr, nullptr}, x + row * w.k, rows_here, out);
          continue;
        }
        for (int64_t b = 0; b < part.row_blocks(); b += kRowBlocks) {
          multiply(kernels, vectors, part, b, panel.get() + first * tile_words,
                   here, pairs.get(), columns.get(), sums.get());
        }
        for (int64_t i = 0; i < here * part.column_blocks(); ++i) {
          const int64_t tile = i / part.column_blocks();
          const int64_t b = i % part.column_blocks();
          kernels.store(
              sums.get() + (tile * kColumnBlocks + b) * kLanes * lanes, vectors,
              kwm::min(lanes, rows_here - tile * lanes),
              kwm::min(kLanes, part.n - b * kLanes),
              out + tile * lanes * w.n + b * kLanes, w.n);
        }
      }
    });
    return rows;
  }

  // The kernel of up to kColumnBlocks blocks of columns.
  Packed columns_from(int64_t block) const {
    Packed part = w;
    part.n = kwm::min(kColumnBlocks * kLanes, w.n - block * kLanes);
    part.values = w.values_of(block);
    part.meta = w.meta_of(block);
    return part;
  }

  // Some blocks of rows. The values are made ready once for all tiles.
  static void multiply(const BFloat16Kernels& kernels, int vectors,
                       const Packed& w, int64_t b, const uint32_t* x,
                       int64_t tiles, uint32_t* pairs, uint32_t* columns,
                       float* sums) {
    const int64_t lanes = vectors * kLanes;
    const int64_t row_blocks = kwm::min(kRowBlocks, w.row_blocks() - b);
    for (int64_t i = 0; i < w.column_blocks(); ++i) {
      const int64_t place = i * w.row_blocks() + b;
      kernels.pairs_of_columns(w.values_at(place), w.meta + place * kLanes,
                               row_blocks, columns + i * kChunkWords);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      kernels.pairs_of_rows(x + (tile * w.row_blocks() + b) * kLanes * lanes,
                            row_blocks, vectors, pairs);
      for (int64_t i = 0; i < w.column_blocks(); ++i) {
        kernels.multiply(
            pairs, columns + i * kChunkWords, row_blocks, vectors, b == 0,
            sums + (tile * kColumnBlocks + i) * kLanes * lanes);
      }
    }
  }
};

}  // namespace

void kwm_matmul_bfloat16(const uint16_t* x, int64_t rows, int64_t k, int64_t n,
                         const void* values, const uint32_t* meta, uint16_t* y,
                         kwm_parallel_for parallel_for, void* pool) {
  const Packed w{k, n, KWM_BFLOAT16, values, meta, nullptr};
  Matmul{w, {parallel_for, pool}}.run(x, rows, y);
}
