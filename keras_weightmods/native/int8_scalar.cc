// int8 activations in plain C++: what the others have to agree with.

#include <math.h>

#include "tile_rows.h"

namespace {

using kwm::Int8Kernels;
using kwm::Int8Rows;
using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;
using kwm::Packed;

void quantize(const float* x, int64_t k, int row, const Int8Rows& out) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  for (int64_t block = 0; block < row_blocks; ++block) {
    const int64_t here = kwm::min(kBlockRows, k - block * kBlockRows);
    const float* from = x + block * kBlockRows;
    auto to = reinterpret_cast<int8_t*>(out.bytes) +
              (block * out.rows + row) * kBlockRows;
    float largest = 0;
    bool finite = true;
    for (int64_t i = 0; i < here; ++i) {
      finite &= isfinite(from[i]) != 0;
      largest = fmaxf(largest, fabsf(from[i]));
    }
    float step = largest / 127;
    if (!(step > 0)) step = 1;
    out.steps[block * out.rows + row] = finite ? step : NAN;
    for (int64_t i = 0; i < kBlockRows; ++i) {
      const float q = i < here && finite ? nearbyintf(from[i] / step) : 0;
      // Where the largest is denormal the step is coarse: hence the bounds.
      to[i] = static_cast<int8_t>(fmaxf(-127, fminf(127, q)));
    }
  }
}

// Entries of x by values of a column, in 32 rows.
template <bool kDense, int kBits>  // those stored
int32_t multiply_block(const int8_t* x, const Packed& w, int64_t place,
                       int lane) {
  int32_t sum = 0;
  if (kDense) {
    auto values = static_cast<const uint8_t*>(w.values_at(place)) + lane * 4;
    constexpr int kSign = 1 << (kBits - 1);
#pragma GCC unroll 8
    for (int word = 0; word < 8; ++word) {
      int value[4] = {};
#pragma GCC unroll 8
      for (int bit = 0, next = 0; bit < kBits; ++bit) {
        if (bit != next) continue;
        const kwm::Place at = kwm::place_of(kBits, word, bit);
        const uint8_t* four = values + at.line * kLanes * 4;
        const int mask = (1 << at.run) - 1;
        for (int q = 0; q < 4; ++q) {
          value[q] |= (four[q] >> at.bit & mask) << bit;
        }
        next += at.run;
      }
      for (int q = 0; q < 4; ++q) {
        sum += x[4 * word + q] * ((value[q] ^ kSign) - kSign);
      }
    }
    return sum;
  }
  const uint32_t word = w.meta[place * kLanes + lane];
  for (int slot = 0; slot < kBlockSlots; ++slot) {
    const float value =
        kwm::stored_value(w.values, w.type, place, slot, lane);
    sum += x[kwm::slot_row(word, slot)] * static_cast<int32_t>(value);
  }
  return sum;
}

template <bool kDense, int kBits, int kStored>
void multiply(const Int8Rows& x, const Packed& w, int64_t column_block,
              float* y, int64_t y_stride) {
  const int64_t row_blocks = w.row_blocks();
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  for (; column_block < end; ++column_block, y += kLanes) {
    for (int row = 0; row < x.rows; ++row) {
      for (int lane = 0; lane < kLanes; ++lane) {
        float total = 0;
        for (int64_t b = 0; b < row_blocks; ++b) {
          auto bytes = reinterpret_cast<const int8_t*>(x.bytes) +
                       (b * x.rows + row) * kBlockRows;
          const int32_t sum = multiply_block<kDense, kStored>(
              bytes, w, column_block * row_blocks + b, lane);
          const float scale =
              kBits == 8 ? 1 : w.scale_at(column_block, b, lane);
          total += x.steps[b * x.rows + row] * static_cast<float>(sum) *
                   scale;
        }
        if (kBits == 8) total *= w.int8_scale(column_block)[lane];
        y[row * y_stride + lane] = total;
      }
    }
  }
}

template <int kBits>
void expand(const void* values, const uint32_t* mask, char* bytes) {
  expand_by<kBits>(values, mask, bytes,
                   [](const int8_t* from, const uint8_t* ranks, char* to) {
                     for (int i = 0; i < 8; ++i) {
                       const bool kept = ranks[i] != kwm::Ranks::kNone;
                       to[i] = static_cast<char>(kept ? from[ranks[i]] : 0);
                     }
                   });
}

template <bool kDense, int kBits, int kStored>
struct Own {
  static constexpr Int8Kernels kernels{TileRows<1, 4>::kSizes, quantize,
                                       multiply<kDense, kBits, kStored>,
                                       expand<kStored == 8 ? kBits : 8>};
};

}  // namespace

const Int8Kernels* kwm::scalar_int8_kernels(int type, bool dense) {
  return int8_kernels_of<Own>(type, dense);
}
