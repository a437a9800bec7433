// The kernels, for any instruction set. An instruction set is a struct S:
//
//   Float, Words          vectors of kWidth floats, of kWidth 32-bit words
//   kRegisters            how many of them the machine has
//   prefetch(at)          a line to the second-level cache: memory gives more
//                         to it than to the first-level one
//   load, store, zero, broadcast, add, mul, fma(a, b, c) = a * b + c
//   load_words, low_half, high_half (bfloat16 to float), byte (signed, to
//   float), keep_where(value, words, shift, i): value, or 0 where the two bits
//   of words at `shift` are not i
//   Slots, slots(meta)    the words of meta, ready for
//   table(x, slot), index(slots, slot), pick(table, index)
//                         lane j of pick: x[4 * group + 2-bit index j of slot],
//                         for x of 16 floats and group = slot / 2 % 4
//   OneRow                what to use in place of S for one row of activations
//
//   greater(a, b), select(mask, a, b)
//   spread(slots, i)      lane i of a vector in all lanes
//   transpose(in, in_stride, out, out_stride)   kWidth x kWidth floats
//
// Included by one file for each, after it has switched the compiler to the
// instructions; all is local to that file, or the linker could take a function
// that this machine cannot run.

#include "kernels.h"

#ifndef KWM_UNROLL
#define KWM_UNROLL(n) KWM_PRAGMA(GCC unroll n)
#endif

#include "attend_impl.h"
#include "prune_impl.h"
#include "round_impl.h"
#include "tile_rows.h"

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;
using kwm::Packed;

struct Float32Values {
  static constexpr int kSize = 4;

  template <class S>
  static typename S::Float get(const char* block, int slot, int lane) {
    return S::load(block + 4 * (slot * kLanes + lane));
  }
};

struct BFloat16Values {
  static constexpr int kSize = 2;

  template <class S>
  static typename S::Float get(const char* block, int slot, int lane) {
    const auto pair = S::load_words(block + 4 * (slot / 2 * kLanes + lane));
    return slot % 2 ? S::high_half(pair) : S::low_half(pair);
  }
};

struct Int8Values {
  static constexpr int kSize = 1;

  template <class S>
  static typename S::Float get(const char* block, int slot, int lane) {
    const auto four = S::load_words(block + 4 * (slot % 4 * kLanes + lane));
    return S::byte(four, slot / 4);
  }
};

// R rows of the panel, C blocks of columns.
template <class S, class V, int R, int C>
void multiply_tile(const float* x, const Packed& w, int64_t column_block,
                   float* y, int64_t y_stride) {
  constexpr int kParts = kLanes / S::kWidth;
  constexpr int kTile = C * R * kParts;
  // Independent sums enough to hide the latency of the fused multiply-add.
  constexpr int kSums = kTile < 4 ? 4 / kTile : 1;
  constexpr int kBlockBytes = kBlockSlots * kLanes * V::kSize;
  constexpr int kSlotBytes = kLanes * V::kSize;
  // Four bytes for so little work are fetched as fast without a hint.
  constexpr bool kPrefetch = V::kSize < 4 || R > 4;
  // Blocks of rows from the one in use to the one to fetch.
  constexpr int64_t kAhead = S::kPrefetchBytes / kBlockBytes;

  typename S::Float sum[C][R][kParts][kSums];
  KWM_UNROLL(4)
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      for (int part = 0; part < kParts; ++part) {
        for (int i = 0; i < kSums; ++i) sum[c][r][part][i] = S::zero();
      }
    }
  }
  auto values = static_cast<const char*>(w.values_of(column_block));
  auto meta = reinterpret_cast<const char*>(w.meta_of(column_block));
  const int64_t row_blocks = w.row_blocks();
  for (int64_t b = 0; b < row_blocks; ++b) {
    const int64_t next = kwm::row_block_ahead(b, kAhead, row_blocks, C);
    typename S::Slots slots[C][kParts];
    KWM_UNROLL(4)
    for (int c = 0; c < C; ++c) {
      const char* words = meta + (c * row_blocks + b) * 4 * kLanes;
      if (kPrefetch) S::prefetch(meta + (c * row_blocks + next) * 4 * kLanes);
      KWM_UNROLL(4)
      for (int part = 0; part < kParts; ++part) {
        slots[c][part] = S::slots(S::load_words(words + 4 * part * S::kWidth));
      }
    }
    KWM_UNROLL(16)
    for (int slot = 0; slot < kBlockSlots; ++slot) {
      KWM_UNROLL(4)
      for (int c = 0; c < C; ++c) {
        const char* block = values + (c * row_blocks + b) * kBlockBytes;
        if (kPrefetch && slot * kSlotBytes % 64 == 0) {
          S::prefetch(values + (c * row_blocks + next) * kBlockBytes +
                      slot * kSlotBytes);
        }
        KWM_UNROLL(4)
        for (int part = 0; part < kParts; ++part) {
          const auto index = S::index(slots[c][part], slot);
          const auto value = V::template get<S>(block, slot, part * S::kWidth);
          KWM_UNROLL(16)
          for (int r = 0; r < R; ++r) {
            const auto table = S::table(x + (slot / 8 * R + r) * 16, slot);
            auto& s = sum[c][r][part][slot % kSums];
            s = S::fma(S::pick(table, index), value, s);
          }
        }
      }
    }
    x += kBlockRows * R;
  }
  for (int c = 0; c < C; ++c) {
    for (int part = 0; part < kParts; ++part) {
      const int64_t column = c * kLanes + part * S::kWidth;
      for (int r = 0; r < R; ++r) {
        auto total = sum[c][r][part][0];
        for (int i = 1; i < kSums; ++i) {
          total = S::add(total, sum[c][r][part][i]);
        }
        if constexpr (V::kSize == 1) {
          const float* scale = w.int8_scale(column_block) + column;
          total = S::mul(total, S::load(scale));
        }
        S::store(y + r * y_stride + column, total);
      }
    }
  }
}

template <class S, class V, int R>
void multiply_columns(const float* x, const Packed& w, int64_t column_block,
                      float* y, int64_t y_stride) {
  // Three quarters of the registers hold sums and slots.
  constexpr int kMost =
      S::kRegisters * 3 / 4 / (kLanes / S::kWidth * (R + 1));
  constexpr int C = kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
  static_assert(kwm::kCallBlocks % C == 0, "");
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  for (; column_block + C <= end; column_block += C) {
    multiply_tile<S, V, R, C>(x, w, column_block, y, y_stride);
    y += C * kLanes;
  }
  for (; C > 1 && column_block < end; ++column_block) {
    multiply_tile<S, V, R, 1>(x, w, column_block, y, y_stride);
    y += kLanes;
  }
}

template <class S>
using TilesOf =
    std::conditional_t<(S::kRegisters * S::kWidth >= 512),
                       TileRows<1, 2, 3, 4, 6, 8, 12, 16>,
                       TileRows<1, 2, 3, 4>>;

template <class S, class V>
void multiply(const float* x, int rows, const Packed& w, int64_t column_block,
              float* y, int64_t y_stride) {
  TilesOf<S>::run(rows, [&](auto count) {
    constexpr int R = decltype(count)::value;
    using Own = std::conditional_t<R == 1, typename S::OneRow, S>;
    multiply_columns<Own, V, R>(x, w, column_block, y, y_stride);
  });
}

template <class S, class V>
void slots_of_columns(const void* values, const uint32_t* meta,
                      int64_t row_blocks, float* slots, uint32_t* words) {
  auto block = static_cast<const char*>(values);
  constexpr int kBlockBytes = kBlockSlots * kLanes * V::kSize;
  const int64_t stride = row_blocks * kBlockSlots;
  for (int64_t b = 0; b < row_blocks; ++b) {
    alignas(64) float floats[kBlockSlots * kLanes];
    // What the next call for this block of columns will ask for.
    for (int line = 0; line < kBlockBytes; line += 64) {
      S::prefetch(block + row_blocks * kBlockBytes + line);
    }
    S::prefetch(meta + (row_blocks + b) * kLanes);
    for (int lane = 0; lane < kLanes; lane += S::kWidth) {
      KWM_UNROLL(16)
      for (int slot = 0; slot < kBlockSlots; ++slot) {
        S::store(floats + slot * kLanes + lane,
                 V::template get<S>(block, slot, lane));
      }
    }
    for (int slot = 0; slot < kBlockSlots; slot += S::kWidth) {
      for (int lane = 0; lane < kLanes; lane += S::kWidth) {
        S::transpose(floats + slot * kLanes + lane, kLanes,
                     slots + lane * stride + b * kBlockSlots + slot, stride);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      words[lane * row_blocks + b] = meta[b * kLanes + lane];
    }
    block += kBlockBytes;
  }
}

// Every kept value is one multiply-add for each vector of rows, on the row of
// x^T that its index names: half of the work of the dense product.
template <class S>
void multiply_many(const float* x, const float* slots, const uint32_t* words,
                   int64_t row_blocks, bool first, float* y) {
  constexpr int R = kwm::kManyVectors;
  constexpr int kTile = R * S::kWidth;
  constexpr int C = 2;  // columns at a time
  for (int column = 0; column < kLanes; column += C) {
    typename S::Float sum[C][R];
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) {
        const float* from = y + (column + c) * kTile + r * S::kWidth;
        sum[c][r] = first ? S::zero() : S::load(from);
      }
    }
    for (int64_t b = 0; b < row_blocks; ++b) {
      const float* rows = x + b * kBlockRows * kTile;
      uint32_t word[C];
      for (int c = 0; c < C; ++c) {
        word[c] = words[(column + c) * row_blocks + b];
      }
      KWM_UNROLL(4)
      for (int s0 = 0; s0 < kBlockSlots; s0 += S::kWidth) {
        typename S::Float some[C];
        KWM_UNROLL(4)
        for (int c = 0; c < C; ++c) {
          const int64_t place = (column + c) * row_blocks + b;
          some[c] = S::load(slots + place * kBlockSlots + s0);
        }
        KWM_UNROLL(16)
        for (int s = s0; s < s0 + S::kWidth; ++s) {
          // Columns innermost: more sums that do not wait for one another.
          KWM_UNROLL(4)
          for (int c = 0; c < C; ++c) {
            const auto value = S::spread(some[c], s - s0);
            const float* row = rows + s / 2 * 4 * kTile +
                               (word[c] >> (2 * s) & 3) * kTile;
            KWM_UNROLL(4)
            for (int r = 0; r < R; ++r) {
              sum[c][r] = S::fma(S::load(row + r * S::kWidth), value,
                                 sum[c][r]);
            }
          }
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) {
        S::store(y + (column + c) * kTile + r * S::kWidth, sum[c][r]);
      }
    }
  }
}

template <class S, class V>
void expand(const void* values, const uint32_t* meta, float* dense) {
  auto block = static_cast<const char*>(values);
  for (int lane = 0; lane < kLanes; lane += S::kWidth) {
    const auto words =
        S::load_words(reinterpret_cast<const char*>(meta) + 4 * lane);
    KWM_UNROLL(8)
    for (int group = 0; group < kBlockRows / 4; ++group) {
      const auto a = V::template get<S>(block, 2 * group, lane);
      const auto b = V::template get<S>(block, 2 * group + 1, lane);
      KWM_UNROLL(4)
      for (int i = 0; i < 4; ++i) {
        const auto value =
            S::add(S::keep_where(a, words, 4 * group, i),
                   S::keep_where(b, words, 4 * group + 2, i));
        S::store(dense + (4 * group + i) * kLanes + lane, value);
      }
    }
  }
}

// I rows of `dense` at a time, as many as the registers hold.
template <class S, int I, int R>
void multiply_dense_tile(const float* dense, const float* dy,
                         int64_t column_blocks, bool first, float* y) {
  constexpr int kTile = R * S::kWidth;
  for (int i0 = 0; i0 < 8; i0 += I) {
    typename S::Float sum[I][R];
    for (int i = 0; i < I; ++i) {
      for (int r = 0; r < R; ++r) {
        const float* from = y + (i0 + i) * kTile + r * S::kWidth;
        sum[i][r] = first ? S::zero() : S::load(from);
      }
    }
    for (int64_t block = 0; block < column_blocks; ++block) {
      const float* w = dense + block * kBlockRows * kLanes + i0 * kLanes;
      const float* in = dy + block * kLanes * kTile;
      for (int j = 0; j < kLanes; ++j) {
        typename S::Float row[R];
        KWM_UNROLL(4)
        for (int r = 0; r < R; ++r) {
          row[r] = S::load(in + j * kTile + r * S::kWidth);
        }
        KWM_UNROLL(8)
        for (int i = 0; i < I; ++i) {
          const auto value = S::broadcast(w[i * kLanes + j]);
          KWM_UNROLL(4)
          for (int r = 0; r < R; ++r) {
            sum[i][r] = S::fma(row[r], value, sum[i][r]);
          }
        }
      }
    }
    for (int i = 0; i < I; ++i) {
      for (int r = 0; r < R; ++r) {
        S::store(y + (i0 + i) * kTile + r * S::kWidth, sum[i][r]);
      }
    }
  }
}

template <class S>
void multiply_dense(const float* dense, const float* dy, int lanes,
                    int64_t column_blocks, bool first, float* y) {
  constexpr int kRows = S::kRegisters >= 32 ? 8 : 4;
  if (lanes == S::kWidth) {
    multiply_dense_tile<S, 8, 1>(dense, dy, column_blocks, first, y);
  } else {
    multiply_dense_tile<S, kRows, kwm::kDenseVectors>(dense, dy, column_blocks,
                                                      first, y);
  }
}

template <class S>
void gradient(const float* x, const float* dy, int64_t rows,
              const uint32_t* meta, int first_slot, bool first,
              float* dvalues) {
  constexpr int kSlots = S::kRegisters >= 32 ? 8 : 4;
  for (int lane = 0; lane < kLanes; lane += S::kWidth) {
    const auto words =
        S::load_words(reinterpret_cast<const char*>(meta) + 4 * lane);
    const auto slots =
        S::slots(first_slot == 0 ? words : S::upper_slots(words));
    KWM_UNROLL(2)
    for (int s0 = 0; s0 < 8; s0 += kSlots) {
      typename S::Float sum[kSlots];
      typename S::Index index[kSlots];
      KWM_UNROLL(8)
      for (int i = 0; i < kSlots; ++i) {
        const float* from = dvalues + (s0 + i) * kLanes + lane;
        sum[i] = first ? S::zero() : S::load(from);
        index[i] = S::index(slots, s0 + i);
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto d = S::load(dy + r * kLanes + lane);
        KWM_UNROLL(8)
        for (int i = 0; i < kSlots; ++i) {
          const auto table = S::table(x + r * 16, s0 + i);
          sum[i] = S::fma(S::pick(table, index[i]), d, sum[i]);
        }
      }
      for (int i = 0; i < kSlots; ++i) {
        S::store(dvalues + (s0 + i) * kLanes + lane, sum[i]);
      }
    }
  }
}

template <class S>
const kwm::Kernels* kernels(int isa) {
  static const kwm::Kernels table = {
      isa,
      TilesOf<S>::kSizes,
      {multiply<S, Float32Values>, multiply<S, BFloat16Values>,
       multiply<S, Int8Values>},
      S::kWidth,
      S::transpose,
      {slots_of_columns<S, Float32Values>, slots_of_columns<S, BFloat16Values>,
       slots_of_columns<S, Int8Values>},
      multiply_many<S>,
      {expand<S, Float32Values>, expand<S, BFloat16Values>,
       expand<S, Int8Values>},
      multiply_dense<S>,
      gradient<S>,
      attend<S>,
      round_in_order,
      search_scales,
      multiples,
      multiples_gradient,
      prune_in_order,
      swap_in_order,
  };
  return &table;
}

}  // namespace
