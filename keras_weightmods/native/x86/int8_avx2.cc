// int8 activations on AVX2, 32 products in an instruction. int8_avx_vnni.cc
// includes this with KWM_VNNI, for AVX-VNNI.
//
// The activations of 32 rows of W are stored as those of the even groups, then
// those of the odd ones: the four groups of a word of values are 16 bytes, from
// which a shuffle picks.
//
// The instruction multiplies unsigned bytes by signed ones. Sparse, the
// unsigned ones are the activations, plus 128; dense, the values, plus 2^(b-1)
// with b bits. Sums of the other factor undo that.
//
// Without VNNI it adds two products in 16 bits. So that this does not overflow,
// int8 values are |w|, and the activations take their signs. 16 bits hold the
// sum of the products of int4 values in a block, and of fewer with more bits.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>

#if defined(KWM_VNNI)
KWM_TARGET("avx2,fma,avxvnni")
#else
KWM_TARGET("avx2,fma")
#endif

#include "tile_rows.h"

namespace {

using kwm::Int8Kernels;
using kwm::Int8Rows;
using kwm::Packed;
using kwm::kBlockRows;
using kwm::kLanes;

constexpr int kHalf = 8;  // columns in a vector
constexpr int64_t kPrefetchBytes = 8192;

#if defined(KWM_VNNI)
constexpr bool kVnni = true;
#else
constexpr bool kVnni = false;
#endif

// Whether one of the factors is made unsigned by an addition.
constexpr bool is_moved(int bits) { return kVnni || bits != 8; }

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline float largest_of(__m256 v) {
  __m128 four =
      _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline int32_t sum_of(__m256i v) {
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v),
                               _mm256_extracti128_si256(v, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

template <bool kDense, int kBits>
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
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 largest = _mm256_setzero_ps();
    __m256 finite = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    __m256 v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_loadu_ps(from + 8 * i);
      const __m256 size = _mm256_and_ps(v[i], no_sign);
      largest = _mm256_max_ps(largest, size);
      finite = _mm256_and_ps(
          finite,
          _mm256_cmp_ps(size, _mm256_set1_ps(3.4028235e38f), _CMP_LE_OQ));
    }
    const bool is_finite = _mm256_movemask_ps(finite) == 0xff;
    float step = largest_of(largest) / 127;
    if (!(step > 0)) step = 1;
    out.steps[block * out.rows + row] = is_finite ? step : NAN;

    __m256i q[4];
    for (int i = 0; i < 4; ++i) {
      q[i] = _mm256_cvtps_epi32(_mm256_div_ps(v[i], _mm256_set1_ps(step)));
    }
    // Groups 0 2 4 6, then 1 3 5 7. Where the largest is denormal the step is
    // coarse: hence the bounds.
    __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]),
                                       _mm256_packs_epi32(q[2], q[3]));
    bytes = _mm256_max_epi8(bytes, _mm256_set1_epi8(-127));
    if (!is_finite) bytes = _mm256_setzero_si256();
    if (kDense) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), bytes);
      const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
      out.offsets[block * out.rows + row] = -sum_of(fours);
      bytes = _mm256_permutevar8x32_epi32(
          bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    if (!kDense && is_moved(kBits)) {
      bytes = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    }
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out.bytes +
                                   (block * out.rows + row) * kBlockRows),
        bytes);
  }
}

// Dense values of b bits are 2^(b-1) too large, so that they have no sign. This
// takes the sum of their excess away.
template <int kBits>
inline __m256i offset_of(int32_t minus_sum) {
  return _mm256_slli_epi32(_mm256_set1_epi32(minus_sum), kBits - 1);
}

inline __m256i spread(const uint8_t* four) {
  int32_t word;
  memcpy(&word, four, 4);
  return _mm256_set1_epi32(word);
}

// The places of word p: byte q is slot p + 4q, of group p / 2 + 2q.
inline __m256i places(__m256i meta, int p) {
  return _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(meta, 2 * p),
                                          _mm256_set1_epi32(0x03030303)),
                         _mm256_set1_epi32(0x0c080400));
}

// The activations of word p, of a row.
inline __m256i pick(const uint8_t* row, int p, __m256i places) {
  const void* groups = row + p / 2 * 16;
  return _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(
          _mm_loadu_si128(static_cast<const __m128i*>(groups))),
      places);
}

// The int4 values of word p, as bytes.
inline __m256i int4_values(const char* block, int p) {
  const __m256i both = load(block + p % 2 * 64);
  const __m256i four = _mm256_and_si256(
      p < 2 ? both : _mm256_srli_epi16(both, 4), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(
      _mm256_broadcastsi128_si256(_mm_setr_epi8(
          0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1)),
      four);
}

inline __m256i bytes(int value) {
  return _mm256_set1_epi8(static_cast<char>(value));
}

// Word `word` of a block of dense values, made unsigned.
template <int kBits, int kStored>
inline __m256i unsigned_word(const char* block, int word) {
  if (kStored != kBits) return load(block + 64 * word);
  __m256i value = _mm256_setzero_si256();
  int next = 0;
#pragma GCC unroll 8
  for (int bit = 0; bit < kBits; ++bit) {
    if (bit != next) continue;
    const kwm::Place at = kwm::place_of(kBits, word, bit);
    const int mask = (1 << at.run) - 1;
    const __m256i line =
        _mm256_xor_si256(load(block + 64 * at.line),
                         bytes(kwm::sign_bits(kBits, at.line)));
    const __m256i bits = _mm256_and_si256(
        _mm256_srli_epi16(line, at.bit - bit), bytes(mask << bit));
    value = _mm256_or_si256(value, bits);
    next += at.run;
  }
  return value;
}

#if defined(KWM_VNNI)

// The sums of a block for 8 columns and R rows, in 32 bits. `block` and `words`
// point to the first of the columns.
template <bool kDense, int kBits, int kStored, int R>
inline void multiply_block(const uint8_t* x, const int32_t* offsets,
                           const char* block, const char* words,
                           __m256i sum[R]) {
  if constexpr (kDense) {
    for (int r = 0; r < R; ++r) sum[r] = offset_of<kBits>(offsets[r]);
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
      const int g = kwm::word_in_order(kStored, n);
      const __m256i w = unsigned_word<kBits, kStored>(block, g);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r] = _mm256_dpbusd_avx_epi32(sum[r], w,
                                         spread(x + r * kBlockRows + 4 * g));
      }
    }
    return;
  }
  const __m256i meta = load(words);
  __m256i moved = _mm256_setzero_si256();
  for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const __m256i index = places(meta, p);
    const __m256i w =
        kBits == 4 ? int4_values(block, p) : load(block + 64 * p);
    moved = _mm256_dpbusd_avx_epi32(moved, _mm256_set1_epi8(-128), w);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      sum[r] = _mm256_dpbusd_avx_epi32(
          sum[r], pick(x + r * kBlockRows, p, index), w);
    }
  }
  for (int r = 0; r < R; ++r) sum[r] = _mm256_sub_epi32(sum[r], moved);
}

#else

// Has it computed here: compilers put it off, and run out of registers.
inline void keep_here(__m256i* v) { asm("" : "+x"(*v)); }

// sum + the products of four bytes each; w_size is |w|.
inline __m256i add_signed(__m256i sum, __m256i x, __m256i w, __m256i w_size) {
  const __m256i pairs = _mm256_maddubs_epi16(w_size, _mm256_sign_epi8(x, w));
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  keep_here(&sum);
  return sum;
}

// The sums of a block for 8 columns and R rows, in 32 bits. `block` and `words`
// point to the first of the columns.
template <bool kDense, int kBits, int kStored, int R>
inline void multiply_block(const uint8_t* x, const int32_t* offsets,
                           const char* block, const char* words,
                           __m256i sum[R]) {
  for (int r = 0; r < R; ++r) sum[r] = _mm256_setzero_si256();
  if constexpr (kDense && kBits == 8) {
    for (int g = 0; g < 8; ++g) {
      const __m256i w = load(block + 64 * g), size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i four = spread(x + r * kBlockRows + 4 * g);
        sum[r] = add_signed(sum[r], four, w, size);
      }
    }
    return;
  }
  if constexpr (kDense && kBits != 8) {
    // Words whose sums of two products fit into 16 bits.
    constexpr int kMost = 32767 / (2 * 127 * ((1 << kBits) - 1));
    constexpr int kWords = kMost < 8 ? kMost / 2 * 2 : 8;
    __m256i total[R];
#pragma GCC unroll 8
    for (int n = 0; n < 8; ++n) {
      const int g = kwm::word_in_order(kStored, n);
      const __m256i w = unsigned_word<kBits, kStored>(block, g);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256i four = spread(x + r * kBlockRows + 4 * g);
        const __m256i pairs = _mm256_maddubs_epi16(w, four);
        sum[r] = n % kWords ? _mm256_add_epi16(sum[r], pairs) : pairs;
        keep_here(&sum[r]);
        if ((n + 1) % kWords == 0) {
          if (n < kWords) total[r] = offset_of<kBits>(offsets[r]);
          total[r] = _mm256_add_epi32(
              total[r], _mm256_madd_epi16(sum[r], _mm256_set1_epi16(1)));
        }
      }
    }
    for (int r = 0; r < R; ++r) sum[r] = total[r];
    return;
  }
  const __m256i meta = load(words);
  __m256i value_sum = _mm256_setzero_si256();
#pragma GCC unroll 4
  for (int p = 0; p < 4; ++p) {
    const __m256i index = places(meta, p);
    if constexpr (kBits == 8) {
      const __m256i w = load(block + 64 * p), size = _mm256_abs_epi8(w);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r] = add_signed(sum[r], pick(x + r * kBlockRows, p, index), w, size);
      }
    } else {
      const __m256i w = int4_values(block, p);
      value_sum = _mm256_add_epi16(
          value_sum, _mm256_maddubs_epi16(_mm256_set1_epi8(-128), w));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sum[r] = _mm256_add_epi16(sum[r], _mm256_maddubs_epi16(
                                      pick(x + r * kBlockRows, p, index), w));
      }
    }
  }
  if constexpr (kBits == 4) {
    for (int r = 0; r < R; ++r) {
      sum[r] = _mm256_madd_epi16(_mm256_sub_epi16(sum[r], value_sum),
                                 _mm256_set1_epi16(1));
    }
  }
}

#endif

// 8 scales of bfloat16.
inline __m256 group_scale(const uint16_t* scale) {
  const __m128i halves =
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(scale));
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

// R rows by 8 H columns of a block, from column `lane` on.
template <bool kDense, int kBits, int kStored, int R, int H>
void multiply_halves(const Int8Rows& x, const Packed& w, int64_t column_block,
                     int lane, float* y, int64_t y_stride) {
  constexpr int64_t kBytes = (kDense ? 64 : 32) * kStored;
  constexpr int64_t kAhead = kPrefetchBytes / kBytes;
  const int64_t row_blocks = w.row_blocks();
  auto values = static_cast<const char*>(w.values_of(column_block)) + 4 * lane;
  const char* meta = nullptr;
  if (!kDense) {
    meta = reinterpret_cast<const char*>(w.meta_of(column_block)) + 4 * lane;
  }
  __m256 total[H][R];
  for (int h = 0; h < H; ++h) {
    for (int r = 0; r < R; ++r) total[h][r] = _mm256_setzero_ps();
  }
  for (int64_t b = 0; b < row_blocks; ++b) {
    if (H == 2) {
      for (int64_t line = 0; line < kBytes; line += 64) {
        _mm_prefetch(values + (b + kAhead) * kBytes + line, _MM_HINT_T1);
      }
      if (!kDense) {
        _mm_prefetch(meta + (b + kAhead) * 64, _MM_HINT_T1);
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      __m256i sum[R];
      multiply_block<kDense, kBits, kStored, R>(
          x.bytes + b * R * kBlockRows, x.offsets + b * R,
          values + b * kBytes + 32 * h,
          kDense ? nullptr : meta + b * 64 + 32 * h, sum);
      __m256 scale = _mm256_setzero_ps();
      if (kBits != 8) {
        scale = group_scale(w.group_scale(column_block) +
                            b / kwm::kScaleBlocks * kLanes + lane + kHalf * h);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m256 step = _mm256_set1_ps(x.steps[b * R + r]);
        const __m256 floats = _mm256_cvtepi32_ps(sum[r]);
        // In this order denormal steps lose nothing.
        total[h][r] =
            kBits != 8
                ? _mm256_fmadd_ps(_mm256_mul_ps(floats, step), scale,
                                  total[h][r])
                : _mm256_fmadd_ps(floats, step, total[h][r]);
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    const int first = lane + kHalf * h;
    for (int r = 0; r < R; ++r) {
      __m256 sum = total[h][r];
      if (kBits == 8) {
        sum = _mm256_mul_ps(
            sum, _mm256_loadu_ps(w.int8_scale(column_block) + first));
      }
      _mm256_storeu_ps(y + r * y_stride + first, sum);
    }
  }
}

template <bool kDense, int kBits, int kStored, int R>
void multiply_columns(const Int8Rows& x, const Packed& w, int64_t column_block,
                      float* y, int64_t y_stride) {
  // Few rows are bound by memory, and read whole lines.
  constexpr int H = R <= 2 ? 2 : 1;
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  for (; column_block < end; ++column_block) {
    for (int lane = 0; lane < kLanes; lane += H * kHalf) {
      multiply_halves<kDense, kBits, kStored, R, H>(x, w, column_block, lane,
                                                    y, y_stride);
    }
    y += kLanes;
  }
}

using Tiles = TileRows<1, 2, 4, 6, 8>;

template <bool kDense, int kBits, int kStored>
void multiply(const Int8Rows& x, const Packed& w, int64_t column_block,
              float* y, int64_t y_stride) {
  Tiles::run(x.rows, [&](auto rows) {
    multiply_columns<kDense, kBits, kStored, decltype(rows)::value>(
        x, w, column_block, y, y_stride);
  });
}

// int4 values plus 8, as of `unsigned_word`.
template <int kBits>
void expand(const void* values, const uint32_t* mask, char* bytes) {
  expand_by<kBits>(
      values, mask, bytes,
      [](const int8_t* from, const uint8_t* ranks, char* to) {
        // A rank with its highest bit gives zero.
        const __m128i eight = _mm_shuffle_epi8(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)),
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(ranks)));
        _mm_storel_epi64(
            reinterpret_cast<__m128i*>(to),
            _mm_add_epi8(eight, _mm_set1_epi8(kBits == 8 ? 0 : 8)));
      });
}

template <bool kDense, int kBits, int kStored>
struct Own {
  static constexpr Int8Kernels kernels{
      Tiles::kSizes, quantize<kDense, kBits>,
      multiply<kDense, kBits, kStored>,
      expand<kStored == 8 ? kBits : 8>};
};

}  // namespace

#if defined(KWM_VNNI)
const Int8Kernels* kwm::avx_vnni_int8_kernels(int type, bool dense) {
#else
const Int8Kernels* kwm::avx2_int8_kernels(int type, bool dense) {
#endif
  return int8_kernels_of<Own>(type, dense);
}

KWM_END_TARGET

#endif
