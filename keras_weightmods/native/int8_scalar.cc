// int8 activations in plain C++: what the others have to agree with.

#include <math.h>

#include "kernels.h"

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
template <bool kDense>
int32_t multiply_block(const int8_t* x, const Packed& w, int64_t place,
                       int lane) {
  int32_t sum = 0;
  if (kDense) {
    auto values = static_cast<const uint8_t*>(w.values_at(place));
    for (int i = 0; i < kBlockRows; ++i) {
      if (w.type == KWM_INT8) {
        const uint8_t byte = values[(i / 4 * kLanes + lane) * 4 + i % 4];
        sum += x[i] * static_cast<int8_t>(byte);
      } else {
        const uint8_t byte = values[(i / 4 % 4 * kLanes + lane) * 4 + i % 4];
        sum += x[i] * (i < 16 ? kwm::low_four(byte) : kwm::high_four(byte));
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

template <bool kDense>
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
          const int32_t sum = multiply_block<kDense>(
              bytes, w, column_block * row_blocks + b, lane);
          const float scale =
              w.type == KWM_INT4 ? w.scale_at(column_block, b, lane) : 1;
          total += x.steps[b * x.rows + row] * static_cast<float>(sum) *
                   scale;
        }
        if (w.type == KWM_INT8) total *= w.int8_scale(column_block)[lane];
        y[row * y_stride + lane] = total;
      }
    }
  }
}

constexpr int kTileRows[] = {1, 4, 0};

}  // namespace

const Int8Kernels* kwm::scalar_int8_kernels(int, bool dense) {
  static const Int8Kernels kernels[2] = {
      {kTileRows, quantize, multiply<false>},
      {kTileRows, quantize, multiply<true>},
  };
  return &kernels[dense];
}
