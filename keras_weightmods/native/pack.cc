// Dense to packed and back.

#include <math.h>

#include "layout.h"

namespace {

using kwm::kBlockRows;
using kwm::kBlockSlots;
using kwm::kLanes;

// Scales of int4 are max |w| over one of these. 1 to 8 find the grid of values
// that lie on one. The others round the largest, or clip it so that the rest is
// finer. With a negative scale the largest can be -8 times it.
constexpr float kDivisors[] = {1, 2,    3, 4,     5,  6,     7, 7.5f,
                               8, 8.5f, 9, -7.5f, -8, -8.5f, -9};
constexpr int kCandidates = sizeof(kDivisors) / sizeof(float);
constexpr int kGroupSlots = kwm::kScaleBlocks * kBlockSlots;

// Rounded to nearest even, in -8 to 7.
float int4_steps(float value, float scale) {
  float steps = value / scale;
  // In this order a NaN becomes 7.
  steps = steps < 7 ? steps : 7;
  steps = steps > -8 ? steps : -8;
  constexpr float kNoFraction = 12582912;  // 1.5 * 2^23
  return steps + kNoFraction - kNoFraction;
}

// The bfloat16 scale of the 32 kept values of a column in 64 rows: of the
// candidates the first with the least squared error. 1 where all are zero or
// next to it, NaN where not all are finite.
//
// The terms are added up slot by slot in double, unfused: quantize.py does the
// same, and finds the same bits.
uint16_t int4_scale(const float values[kGroupSlots]) {
  constexpr uint16_t kOne = 0x3f80, kNan = 0x7fc0;
  float largest = 0;
  for (int i = 0; i < kGroupSlots; ++i) {
    const float size = fabsf(values[i]);
    if (!isfinite(size)) return kNan;
    if (size > largest) largest = size;
  }
  uint16_t scales[kCandidates];
  float floats[kCandidates];
  double errors[kCandidates] = {};
  for (int c = 0; c < kCandidates; ++c) {
    scales[c] = kwm::float_to_bfloat16(largest / kDivisors[c]);
    floats[c] = kwm::bfloat16_to_float(scales[c]);
  }
  for (int i = 0; i < kGroupSlots; ++i) {
    for (int c = 0; c < kCandidates; ++c) {
      const float rounded = int4_steps(values[i], floats[c]);
      const double error =
          values[i] - static_cast<double>(rounded) * floats[c];
      errors[c] += error * error;
    }
  }
  int best = -1;
  for (int c = 0; c < kCandidates; ++c) {
    if (floats[c] == 0 || !isfinite(floats[c])) continue;
    if (best < 0 || errors[c] < errors[best]) best = c;
  }
  return best < 0 ? kOne : scales[best];
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
    static_cast<uint16_t*>(values)[offset] = kwm::float_to_bfloat16(value);
  } else {
    // Where the largest |w| is denormal the scale is coarse: hence the bounds.
    const float steps = isnan(scale) ? 0 : nearbyintf(value / scale);
    static_cast<int8_t*>(values)[offset] =
        static_cast<int8_t>(fmaxf(-127, fminf(127, steps)));
  }
}

// The values of a column in 64 rows, of which `blocks` blocks are there, and
// their scale.
void store_int4(void* values, uint16_t* scale, int64_t place, int blocks,
                int lane, const float kept[kGroupSlots]) {
  const uint16_t bits = int4_scale(kept);
  const float step = kwm::bfloat16_to_float(bits);
  memcpy(scale, &bits, sizeof bits);
  for (int i = 0; i < blocks * kBlockSlots; ++i) {
    const int slot = i % kBlockSlots;
    const float steps = isnan(step) ? 0 : int4_steps(kept[i], step);
    const unsigned half = static_cast<unsigned>(static_cast<int>(steps)) & 15;
    unsigned char* byte =
        static_cast<unsigned char*>(values) +
        kwm::value_offset(KWM_INT4, place + i / kBlockSlots, slot, lane);
    // The low half of a byte is written first.
    *byte = static_cast<unsigned char>(
        slot % 4 < 2 ? half : (*byte & 15) | half << 4);
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
  const int64_t size = kwm::block_bytes(type);
  if (size < 0) return -1;
  return kwm::ceil_div(n, kLanes) * kwm::ceil_div(k, kBlockRows) * size;
}

int64_t kwm_dense_values_bytes(int64_t k, int64_t n, int type) {
  if (type != KWM_INT8 && type != KWM_INT4) return -1;
  return 2 * kwm_values_bytes(k, n, type);
}

int64_t kwm_meta_bytes(int64_t k, int64_t n) {
  return kwm::ceil_div(n, kLanes) * kwm::ceil_div(k, kBlockRows) * kLanes * 4;
}

int64_t kwm_scale_bytes(int64_t k, int64_t n, int type) {
  const int64_t lanes = kwm::ceil_div(n, kLanes) * kLanes;
  switch (type) {
    case KWM_INT8:
      return lanes * 4;
    case KWM_INT4:
      return lanes * kwm::ceil_div(k, kwm::kScaleBlocks * kBlockRows) * 2;
    default:
      return kwm::block_bytes(type) < 0 ? -1 : 0;
  }
}

int64_t kwm_pack(const float* kernel, int64_t k, int64_t n, int type,
                 void* values, uint32_t* meta, void* scale) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  int64_t bad_groups = 0;
  for (int64_t column = 0; column < kwm::ceil_div(n, kLanes) * kLanes;
       ++column) {
    const bool real = column < n;
    float column_step = 1;
    if (type == KWM_INT8) {
      if (real) column_step = column_scale(kernel, k, n, column);
      static_cast<float*>(scale)[column] = column_step;
    }
    float kept[kGroupSlots] = {};
    uint16_t* scales =
        static_cast<uint16_t*>(scale) +
        column / kLanes * kwm::ceil_div(row_blocks, kwm::kScaleBlocks) * kLanes;
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
          const float value = group[rows[t]];
          if (type == KWM_INT4) {
            kept[block % kwm::kScaleBlocks * kBlockSlots + slot] = value;
            continue;
          }
          store_value(values, type,
                      kwm::value_offset(type, place, slot, lane),
                      value, column_step);
        }
      }
      meta[place * kLanes + lane] = word;
      if (type != KWM_INT4) continue;
      const int64_t here = block % kwm::kScaleBlocks;
      if (here + 1 == kwm::kScaleBlocks || block + 1 == row_blocks) {
        store_int4(values, scales + block / kwm::kScaleBlocks * kLanes + lane,
                   place - here, static_cast<int>(here) + 1, lane, kept);
        memset(kept, 0, sizeof kept);
      }
    }
  }
  return bad_groups;
}

void kwm_unpack(const void* values, const uint32_t* meta, const void* scale,
                int64_t k, int64_t n, int type, float* kernel) {
  const kwm::Packed w{k, n, type, values, meta, scale};
  const int64_t row_blocks = w.row_blocks();
  memset(kernel, 0, static_cast<size_t>(k) * static_cast<size_t>(n) * 4);
  for (int64_t column = 0; column < n; ++column) {
    const int lane = static_cast<int>(column % kLanes);
    for (int64_t block = 0; block < row_blocks; ++block) {
      const int64_t place = column / kLanes * row_blocks + block;
      const float step = w.scale_at(column / kLanes, block, lane);
      const uint32_t word = meta[place * kLanes + lane];
      for (int slot = 0; slot < kBlockSlots; ++slot) {
        const int64_t row =
            block * kBlockRows + kwm::slot_row(word, slot);
        if (row >= k) continue;
        const float value =
            kwm::stored_value(values, type, place, slot, lane);
        kernel[row * n + column] += value * step;
      }
    }
  }
}
