// Dense to packed and back.

#include <math.h>

#include "layout.h"

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;

uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40);
  const uint32_t round = 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>((bits + round) >> 16);
}

// max |w| / 127 of a column; NaN where it holds a NaN or an infinity.
float column_scale(const float* kernel, int64_t k, int64_t n, int64_t column) {
  float largest = 0;
  for (int64_t row = 0; row < k; ++row) {
    const float size = fabsf(kernel[row * n + column]);
    if (!isfinite(size)) return NAN;
    if (size > largest) largest = size;
  }
  const float scale = largest / 127;
  return scale > 0 ? scale : 1;
}

void store_value(void* values, int type, int64_t offset, float value,
                 float scale) {
  if (type == KWM_FLOAT32) {
    static_cast<float*>(values)[offset] = value;
  } else if (type == KWM_BFLOAT16) {
    static_cast<uint16_t*>(values)[offset] = float_to_bfloat16(value);
  } else {
    // Where the largest |w| is denormal the scale is coarse: hence the bounds.
    const float steps = isnan(scale) ? 0 : nearbyintf(value / scale);
    static_cast<int8_t*>(values)[offset] =
        static_cast<int8_t>(fmaxf(-127, fminf(127, steps)));
  }
}

// The rows of the two values to keep, rising: the nonzeros, then the first free
// ones. Returns whether there were at most two nonzeros.
bool choose(const float group[4], int rows[2]) {
  int nonzeros[4];
  int count = 0;
  for (int i = 0; i < 4; ++i) {
    if (group[i] != 0) nonzeros[count++] = i;
  }
  if (count == 0) {
    rows[0] = 0;
    rows[1] = 1;
  } else if (count == 1) {
    rows[0] = 0;
    rows[1] = nonzeros[0] == 0 ? 1 : nonzeros[0];
  } else {
    rows[0] = nonzeros[0];
    rows[1] = nonzeros[1];
  }
  return count <= 2;
}

}  // namespace

int64_t kwm_values_bytes(int64_t k, int64_t n, int type) {
  const int64_t size = kwm::value_size(type);
  if (size < 0) return -1;
  return kwm::ceil_div(n, kLanes) * kwm::ceil_div(k, kBlockRows) *
         kBlockSlots * kLanes * size;
}

int64_t kwm_meta_bytes(int64_t k, int64_t n) {
  return kwm::ceil_div(n, kLanes) * kwm::ceil_div(k, kBlockRows) * kLanes * 4;
}

int64_t kwm_scale_bytes(int64_t, int64_t n, int type) {
  return type == KWM_INT8 ? kwm::ceil_div(n, kLanes) * kLanes * 4 : 0;
}

int64_t kwm_pack(const float* kernel, int64_t k, int64_t n, int type,
                 void* values, uint32_t* meta, float* scale) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  int64_t bad_groups = 0;
  for (int64_t column = 0; column < kwm::ceil_div(n, kLanes) * kLanes;
       ++column) {
    const bool real = column < n;
    float column_step = 1;
    if (type == KWM_INT8) {
      if (real) column_step = column_scale(kernel, k, n, column);
      scale[column] = column_step;
    }
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t place = column / kLanes * row_blocks + block;
      const int lane = static_cast<int>(column % kLanes);
      uint32_t word = 0;
      for (int g = 0; g < kBlockRows / 4; ++g) {
        float group[4];
        for (int i = 0; i < 4; ++i) {
          const int64_t row = block * kBlockRows + 4 * g + i;
          group[i] = real && row < k ? kernel[row * n + column] : 0;
        }
        int rows[2];
        if (!choose(group, rows)) ++bad_groups;
        for (int t = 0; t < 2; ++t) {
          const int slot = 2 * g + t;
          word |= static_cast<uint32_t>(rows[t]) << (2 * slot);
          store_value(values, type,
                      kwm::value_offset(type, place, slot, lane),
                      group[rows[t]], column_step);
        }
      }
      meta[place * kLanes + lane] = word;
    }
  }
  return bad_groups;
}

void kwm_unpack(const void* values, const uint32_t* meta, const float* scale,
                int64_t k, int64_t n, int type, float* kernel) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  memset(kernel, 0, static_cast<size_t>(k) * static_cast<size_t>(n) * 4);
  for (int64_t column = 0; column < n; ++column) {
    const float step = type == KWM_INT8 ? scale[column] : 1;
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t place = column / kLanes * row_blocks + block;
      const int lane = static_cast<int>(column % kLanes);
      const uint32_t word = meta[place * kLanes + lane];
      for (int slot = 0; slot < kBlockSlots; ++slot) {
        const int64_t row =
            block * kBlockRows + kwm::slot_row(word, slot);
        if (row >= k) continue;
        const float value = kwm::stored_value(
            values, type, kwm::value_offset(type, place, slot, lane));
        kernel[row * n + column] += value * step;
      }
    }
  }
}
