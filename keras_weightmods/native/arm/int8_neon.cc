// int8 activations on NEON, 16 products at a time; see int8_avx2.cc for the
// order of the bytes. int8_neon_dot.cc includes this with KWM_DOT: by the dot
// product instructions, which not every machine has.

#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>
#include <math.h>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(KWM_DOT) && defined(__clang__)
KWM_TARGET("dotprod")
#elif defined(KWM_DOT)
KWM_TARGET("arch=armv8.2-a+dotprod")
#endif

#include "tile_rows.h"

namespace {

using kwm::Int8Kernels;
using kwm::Int8Rows;
using kwm::Packed;
using kwm::kBlockRows;
using kwm::kLanes;

constexpr int kQuarter = 4;  // columns in a vector

template <bool kDense>
void quantize(const float* x, int64_t k, int row, const Int8Rows& out) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  for (int64_t block = 0; block < row_blocks; ++block) {
    const float* from = x + block * kBlockRows;
    float padded[kBlockRows] = {};
    const int64_t left = k - block * kBlockRows;
    if (left < kBlockRows) {
      memcpy(padded, from, static_cast<size_t>(left) * sizeof(float));
      from = padded;
    }
    float32x4_t v[8];
    float32x4_t largest = vdupq_n_f32(0);
    uint32x4_t finite = vdupq_n_u32(0xffffffff);
    for (int i = 0; i < 8; ++i) {
      v[i] = vld1q_f32(from + 4 * i);
      const float32x4_t size = vabsq_f32(v[i]);
      largest = vmaxq_f32(largest, size);
      finite = vandq_u32(finite, vcleq_f32(size, vdupq_n_f32(3.4028235e38f)));
    }
    const bool is_finite = vminvq_u32(finite) != 0;
    float step = vmaxvq_f32(largest) / 127;
    if (!(step > 0)) step = 1;
    out.steps[block * out.rows + row] = is_finite ? step : NAN;
    auto to = reinterpret_cast<int8_t*>(out.bytes) +
              (block * out.rows + row) * kBlockRows;
    for (int group = 0; group < 8; ++group) {
      const float32x4_t steps = vdivq_f32(v[group], vdupq_n_f32(step));
      const int16x4_t half = vqmovn_s32(vcvtnq_s32_f32(steps));
      // Where the largest is denormal the step is coarse: hence the bounds.
      int8x8_t q = vqmovn_s16(vcombine_s16(half, half));
      q = vmax_s8(q, vdup_n_s8(-127));
      if (!is_finite) q = vdup_n_s8(0);
      const int place = kDense ? group : group % 2 * 4 + group / 2;
      const int32_t four = vget_lane_s32(vreinterpret_s32_s8(q), 0);
      memcpy(to + 4 * place, &four, 4);
    }
  }
}

// sum + the products of four bytes each.
inline int32x4_t add_products(int32x4_t sum, int8x16_t a, int8x16_t b) {
#if defined(KWM_DOT)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
  const int16x8_t high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}

inline int8x16_t load_bytes(const void* from) {
  return vld1q_s8(static_cast<const int8_t*>(from));
}

// Word `word` of a block of values.
template <bool kDense, int kBits>
inline int8x16_t signed_word(const char* block, int word) {
  if constexpr (kBits == 8) {
    return load_bytes(block + 64 * word);
  } else if constexpr (!kDense) {
    int8x16_t w = load_bytes(block + 64 * (word % 2));
    if (word < 2) w = vshlq_n_s8(w, 4);
    return vshrq_n_s8(w, 4);
  } else {
    // At the upper end of each byte, from where it is shifted with its sign.
    constexpr int kUnused = 8 - kBits;
    uint8x16_t value = vdupq_n_u8(0);
    int next = 0;
#pragma GCC unroll 8
    for (int bit = 0; bit < kBits; ++bit) {
      if (bit != next) continue;
      const kwm::Place at = kwm::place_of(kBits, word, bit);
      const auto line = vreinterpretq_u8_s8(load_bytes(block + 64 * at.line));
      const int up = kUnused + bit - at.bit;
      const uint8x16_t bits =
          vshlq_u8(line, vdupq_n_s8(static_cast<int8_t>(up)));
      const auto above = static_cast<uint8_t>(0xff << (kUnused + bit));
      value = bit == 0 ? bits : vbslq_u8(vdupq_n_u8(above), bits, value);
      next += at.run;
    }
    return vshrq_n_s8(vreinterpretq_s8_u8(value), kUnused);
  }
}

// The sums of a block for 4 columns and R rows.
template <bool kDense, int kBits, int R>  // the bits stored
inline void multiply_block(const uint8_t* x, const char* block,
                           const char* words, int32x4_t sum[R]) {
  for (int r = 0; r < R; ++r) sum[r] = vdupq_n_s32(0);
  constexpr int kWords = kDense ? 8 : 4;
  uint32x4_t meta = vdupq_n_u32(0);
  if (!kDense) meta = vreinterpretq_u32_s8(load_bytes(words));
#pragma GCC unroll 8
  for (int n = 0; n < kWords; ++n) {
    const int p = kDense ? kwm::word_in_order(kBits, n) : n;
    const int8x16_t w = signed_word<kDense, kBits>(block, p);
    uint8x16_t index = vdupq_n_u8(0);
    if (!kDense) {
      // Byte q is slot p + 4q, of group p / 2 + 2q.
      const uint32x4_t bits =
          vandq_u32(vshlq_u32(meta, vdupq_n_s32(-2 * p)),
                    vdupq_n_u32(0x03030303));
      index = vreinterpretq_u8_u32(vorrq_u32(bits, vdupq_n_u32(0x0c080400)));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint8_t* row = x + r * kBlockRows;
      int8x16_t four;
      if (kDense) {
        int32_t word;
        memcpy(&word, row + 4 * p, 4);
        four = vreinterpretq_s8_s32(vdupq_n_s32(word));
      } else {
        four = vqtbl1q_s8(load_bytes(row + p / 2 * 16), index);
      }
      sum[r] = add_products(sum[r], four, w);
    }
  }
}

// R rows by 4 H columns of a block, from column `lane` on.
template <bool kDense, int kBits, int kStored, int R, int H>
void multiply_quarters(const Int8Rows& x, const Packed& w, int64_t column_block,
                       int lane, float* y, int64_t y_stride) {
  constexpr int64_t kBytes = (kDense ? 64 : 32) * kStored;
  const int64_t row_blocks = w.row_blocks();
  auto values = static_cast<const char*>(w.values_of(column_block)) + 4 * lane;
  const char* meta = nullptr;
  if (!kDense) {
    meta = reinterpret_cast<const char*>(w.meta_of(column_block)) + 4 * lane;
  }
  float32x4_t total[H][R];
  for (int h = 0; h < H; ++h) {
    for (int r = 0; r < R; ++r) total[h][r] = vdupq_n_f32(0);
  }
  for (int64_t b = 0; b < row_blocks; ++b) {
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      int32x4_t sum[R];
      multiply_block<kDense, kStored, R>(
          x.bytes + b * R * kBlockRows, values + b * kBytes + 16 * h,
          kDense ? nullptr : meta + b * 64 + 16 * h, sum);
      float32x4_t scale = vdupq_n_f32(1);
      if (kBits != 8) {
        const uint16_t* halves = w.group_scale(column_block) +
                                 b / kwm::kScaleBlocks * kLanes + lane +
                                 kQuarter * h;
        scale = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(halves), 16));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        // In this order denormal steps lose nothing.
        const float32x4_t floats =
            vmulq_n_f32(vcvtq_f32_s32(sum[r]), x.steps[b * R + r]);
        total[h][r] = kBits != 8 ? vfmaq_f32(total[h][r], floats, scale)
                                 : vaddq_f32(total[h][r], floats);
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    const int first = lane + kQuarter * h;
    for (int r = 0; r < R; ++r) {
      float32x4_t sum = total[h][r];
      if (kBits == 8) {
        sum = vmulq_f32(sum, vld1q_f32(w.int8_scale(column_block) + first));
      }
      vst1q_f32(y + r * y_stride + first, sum);
    }
  }
}

template <bool kDense, int kBits, int kStored, int R>
void multiply_columns(const Int8Rows& x, const Packed& w, int64_t column_block,
                      float* y, int64_t y_stride) {
  constexpr int H = R <= 2 ? 4 : R <= 4 ? 2 : 1;
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  for (; column_block < end; ++column_block) {
    for (int lane = 0; lane < kLanes; lane += H * kQuarter) {
      multiply_quarters<kDense, kBits, kStored, R, H>(x, w, column_block, lane,
                                                      y, y_stride);
    }
    y += kLanes;
  }
}

using Tiles = TileRows<1, 2, 4, 8>;

template <bool kDense, int kBits, int kStored>
void multiply(const Int8Rows& x, const Packed& w, int64_t column_block,
              float* y, int64_t y_stride) {
  Tiles::run(x.rows, [&](auto rows) {
    multiply_columns<kDense, kBits, kStored, decltype(rows)::value>(
        x, w, column_block, y, y_stride);
  });
}

template <int kBits>
void expand(const void* values, const uint32_t* mask, char* bytes) {
  expand_by<kBits>(values, mask, bytes,
                   [](const int8_t* from, const uint8_t* ranks, char* to) {
                     // A rank beyond 7 gives zero.
                     const int8x8_t eight = vtbl1_s8(
                         vld1_s8(from), vreinterpret_s8_u8(vld1_u8(ranks)));
                     memcpy(to, &eight, 8);
                   });
}

template <bool kDense, int kBits, int kStored>
struct Own {
  static constexpr Int8Kernels kernels{Tiles::kSizes, quantize<kDense>,
                                       multiply<kDense, kBits, kStored>,
                                       expand<kStored == 8 ? kBits : 8>};
};

#if !defined(KWM_DOT)
bool has_dot() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
#endif

}  // namespace

#if defined(KWM_DOT)
const Int8Kernels* kwm::neon_dot_int8_kernels(int type, bool dense) {
  return int8_kernels_of<Own>(type, dense);
}
KWM_END_TARGET
#else
const Int8Kernels* kwm::neon_int8_kernels(int type, bool dense) {
  static const bool dot = has_dot();
  return dot ? neon_dot_int8_kernels(type, dense)
             : int8_kernels_of<Own>(type, dense);
}
#endif

#endif
