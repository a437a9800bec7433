// The packed format of kwm_native.h in code: where a slot of a column lies.

#ifndef KWM_LAYOUT_H_
#define KWM_LAYOUT_H_

#include <stdint.h>
#include <string.h>

#include "kwm_native.h"

namespace kwm {

constexpr int kLanes = 16;       // columns in a block
constexpr int kBlockRows = 32;   // rows of W that one word of meta covers
constexpr int kBlockSlots = 16;  // kept values of a column in these rows

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

inline float bfloat16_to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to nearest even; NaN stays NaN.
inline uint16_t float_to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  // Without a branch, for the compiler's vectors.
  const bool is_nan = static_cast<int32_t>(bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>((is_nan ? bits | 0x400000 : rounded) >> 16);
}

// The bits of a value, by its type.
constexpr int kTypeBits[] = {32, 16, 8, 4, 2, 3, 5, 6, 8};
constexpr int kTypes = 8;
// Of int4 with a byte each: dense blocks that were expanded from a mask.
constexpr int kInt4InBytes = kTypes;

// Bytes of the values kept in 32 rows of 16 columns.
inline int64_t block_bytes(int type) {
  return kBlockSlots * kLanes * kTypeBits[type] / 8;
}

// Blocks of rows that share a scale of integers of fewer than 8 bits.
constexpr int kScaleBlocks = 2;

// Sizes of the arrays of a (k, n) kernel in bytes. Dense values have no meta.
inline int64_t values_bytes(int64_t k, int64_t n, int type, bool dense) {
  return ceil_div(n, kLanes) * ceil_div(k, kBlockRows) * block_bytes(type) *
         (dense ? 2 : 1);
}
inline int64_t meta_bytes(int64_t k, int64_t n) {
  return ceil_div(n, kLanes) * ceil_div(k, kBlockRows) * kLanes * 4;
}
inline int64_t scale_bytes(int64_t k, int64_t n, int type) {
  const int64_t lanes = ceil_div(n, kLanes) * kLanes;
  return type == KWM_INT8
             ? lanes * 4
             : lanes * ceil_div(k, kScaleBlocks * kBlockRows) * 2;
}

// A packed kernel; `values` and `scale` as the type says. Without meta it is
// dense, with twice the values.
struct Packed {
  int64_t k, n;
  int type;
  const void* values;
  const uint32_t* meta;
  const void* scale;

  int64_t padded_k() const { return row_blocks() * kBlockRows; }
  int64_t row_blocks() const { return ceil_div(k, kBlockRows); }
  int64_t column_blocks() const { return ceil_div(n, kLanes); }

  // `place` counts the blocks of rows of all blocks of columns.
  const void* values_at(int64_t place) const {
    return static_cast<const char*>(values) +
           place * block_bytes(type) * (meta == nullptr ? 2 : 1);
  }
  const void* values_of(int64_t column_block) const {
    return values_at(column_block * row_blocks());
  }
  const uint32_t* meta_of(int64_t column_block) const {
    return meta + column_block * row_blocks() * kLanes;
  }
  // The 16 scales of int8 columns.
  const float* int8_scale(int64_t column_block) const {
    return static_cast<const float*>(scale) + column_block * kLanes;
  }
  // Those of fewer bits, bfloat16, 16 for every 2 blocks of rows. Not always
  // aligned.
  const uint16_t* group_scale(int64_t column_block) const {
    return static_cast<const uint16_t*>(scale) +
           column_block * ceil_div(row_blocks(), kScaleBlocks) * kLanes;
  }
  // Of a value, which is 1 without scales.
  float scale_at(int64_t column_block, int64_t row_block, int lane) const {
    if (type < KWM_INT8) return 1;
    if (type == KWM_INT8) return int8_scale(column_block)[lane];
    return bfloat16_to_float(
        group_scale(column_block)[row_block / kScaleBlocks * kLanes + lane]);
  }
};

// The block of rows to fetch while block `b` is used, of blocks of columns that
// are read side by side: `ahead` blocks on or, past their end, in the next ones.
inline int64_t row_block_ahead(int64_t b, int64_t ahead, int64_t row_blocks,
                               int64_t columns_together) {
  const int64_t next = b + ahead;
  return next < row_blocks ? next : next + (columns_together - 1) * row_blocks;
}

// Position of a kept value in the array of values, in elements. Two int4 ones
// share a byte: it is the low half where slot % 4 < 2.
inline int64_t value_offset(int type, int64_t place, int slot, int lane) {
  const int64_t start = place * kBlockSlots * kLanes;
  switch (type) {
    case KWM_FLOAT32:
      return start + slot * kLanes + lane;
    case KWM_BFLOAT16:
      return start + ((slot / 2) * kLanes + lane) * 2 + slot % 2;
    case KWM_INT4:
      return start / 2 + ((slot % 2) * kLanes + lane) * 4 + slot / 4;
    default:
      return start + ((slot % 4) * kLanes + lane) * 4 + slot / 4;
  }
}

// Half of a byte as a signed number.
inline int low_four(uint8_t byte) { return ((byte & 15) ^ 8) - 8; }
inline int high_four(uint8_t byte) { return ((byte >> 4) ^ 8) - 8; }

// A kept value as stored: one of int8 or int4 without its scale.
inline float stored_value(const void* values, int type, int64_t place, int slot,
                          int lane) {
  const int64_t offset = value_offset(type, place, slot, lane);
  switch (type) {
    case KWM_FLOAT32:
      return static_cast<const float*>(values)[offset];
    case KWM_BFLOAT16:
      return bfloat16_to_float(static_cast<const uint16_t*>(values)[offset]);
    case KWM_INT8:
      return static_cast<const int8_t*>(values)[offset];
    default: {
      const uint8_t byte = static_cast<const uint8_t*>(values)[offset];
      return static_cast<float>(slot % 4 < 2 ? low_four(byte)
                                             : high_four(byte));
    }
  }
}

// Where a bit of a word of dense integers lies: at `bit` of the bytes of a
// line. There begin `run` bits of the word, itself the first.
struct Place {
  int line, bit, run;
};
constexpr Place place_of(int bits, int word, int bit) {
  const int whole = 8 / bits * bits, left = 8 - whole;
  if (word < whole) {
    return {word % bits, word / bits * bits + bit, bits - bit};
  }
  const int at = (word - whole) * bits + bit, in_line = at % left;
  const int run = bits - bit < left - in_line ? bits - bit : left - in_line;
  return {at / left, whole + in_line, run};
}

// The highest bits of words, among those of a byte of a line.
constexpr int sign_bits(int bits, int line) {
  int found = 0;
  for (int word = 0; word < 8; ++word) {
    const Place at = place_of(bits, word, bits - 1);
    if (at.line == line) found |= 1 << at.bit;
  }
  return found;
}

// The n-th word, where all that a line holds whole come before the next line.
constexpr int word_in_order(int bits, int n) {
  const int in_line = 8 / bits;
  return n < in_line * bits ? n / in_line + n % in_line * bits : n;
}

// Of each bit of a byte of a mask how many come before it, if it is set.
struct Ranks {
  static constexpr uint8_t kNone = 128;
  uint8_t ranks[8] = {}, count = 0;
};
struct RanksOfBytes {
  constexpr RanksOfBytes() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0; bit < 8; ++bit) {
        const bool kept = (byte >> bit & 1) != 0;
        of[byte].ranks[bit] = kept ? of[byte].count++ : Ranks::kNone;
      }
    }
  }
  Ranks of[256] = {};
};
inline constexpr RanksOfBytes kRanks;

// The row, within a block of 32, that a slot was taken from.
inline int slot_row(uint32_t meta, int slot) {
  return slot / 2 * 4 + ((meta >> (2 * slot)) & 3);
}

}  // namespace kwm

#endif  // KWM_LAYOUT_H_
