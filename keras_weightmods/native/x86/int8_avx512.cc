// int8 activations on AVX-512 with VNNI, VBMI and VBMI2: 64 products in one
// instruction, of unsigned bytes and signed ones.
//
// Sparse: of two blocks of rows the 64 activations, plus 128, are the table
// from which a permutation picks; the sums of the values, which all rows of
// activations share, undo the 128. int4 values are multiplied by 16 where they
// stand in their byte, and the sums divided by it.
//
// Dense: the values are made unsigned, and four activations are read into all
// lanes. Their sums, one for a block, undo that. Those that a mask keeps are
// spread to where they are in dense values.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstddef>
#include <type_traits>

KWM_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,avx2,"
    "fma,popcnt")

#include "tile_rows.h"
#include "words_avx512.h"

namespace {

using kwm::Int8Kernels;
using kwm::Int8Rows;
using kwm::kBlockRows;

// Values are fetched ahead of their use. For a row or two they are read once, as
// fast as the memory gives them. Found on Zen 4: bytes for one row come fastest
// by way of the second-level cache, all else past it. On a Xeon all come fastest
// by way of it, a quarter faster in a language model. More rows read them again
// for each tile.
template <int kStored, int R>
struct Fetch {
  static constexpr bool kIsOnce = R <= 2;
  static constexpr bool kIsPast = kIsOnce && (R == 2 || kStored < 8);
  static constexpr int64_t kAhead = kIsPast ? 4096 : kIsOnce ? 2048 : 8192;

  static void line(const char* at) {
    if (kIsPast && kwm::kReadsPastCache) {
      _mm_prefetch(at + kAhead, _MM_HINT_NTA);
    } else {
      _mm_prefetch(at + kAhead, _MM_HINT_T1);
    }
  }
  // Looks the address of a small page up before its lines are fetched.
  static void page(const char* at) {
    if (kIsOnce) _mm_prefetch(at + 12288, _MM_HINT_T1);
  }
};

template <bool kSparse>
void quantize(const float* x, int64_t k, int row, const Int8Rows& out) {
  const int64_t row_blocks = kwm::ceil_div(k, kBlockRows);
  for (int64_t block = 0; block < row_blocks; ++block) {
    const int64_t left = k - block * kBlockRows;
    const float* from = x + block * kBlockRows;
    const __m512 a = _mm512_maskz_loadu_ps(first_lanes(left), from);
    const __m512 b = _mm512_maskz_loadu_ps(first_lanes(left - 16), from + 16);
    const __m512 a_size = _mm512_abs_ps(a), b_size = _mm512_abs_ps(b);
    const __m512 most = _mm512_set1_ps(3.4028235e38f);
    const bool finite =
        (_mm512_cmp_ps_mask(a_size, most, _CMP_LE_OQ) &
         _mm512_cmp_ps_mask(b_size, most, _CMP_LE_OQ)) == 0xffff;
    float step = _mm512_reduce_max_ps(_mm512_max_ps(a_size, b_size)) / 127;
    if (!(step > 0)) step = 1;
    out.steps[block * out.rows + row] = finite ? step : __builtin_nanf("");

    const __mmask16 kept = finite ? 0xffff : 0;
    const __m512 steps = _mm512_set1_ps(step);
    const auto rounded = [&](__m512 v) {
      const __m512i q =
          _mm512_maskz_cvtps_epi32(kept, _mm512_div_ps(v, steps));
      // Where the largest is denormal the step is coarse: hence the bounds.
      return _mm512_max_epi32(_mm512_min_epi32(q, _mm512_set1_epi32(127)),
                              _mm512_set1_epi32(-127));
    };
    const __m512i a_q = rounded(a), b_q = rounded(b);
    const __m128i sign = _mm_set1_epi8(kSparse ? -128 : 0);
    const __m128i a_bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(a_q), sign);
    const __m128i b_bytes = _mm_xor_si128(_mm512_cvtepi32_epi8(b_q), sign);
    uint8_t* to = out.bytes;
    if (kSparse) {
      to += (block / 2 * out.rows + row) * 64 + block % 2 * kBlockRows;
    } else {
      to += (block * out.rows + row) * kBlockRows;
      out.offsets[block * out.rows + row] =
          -_mm512_reduce_add_epi32(_mm512_add_epi32(a_q, b_q));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), a_bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), b_bytes);
  }
}

// total + sum * step, and * scale. In this order denormal steps lose nothing.
template <int kBits>
__m512 add_block(__m512 total, __m512i sum, float step, __m512 scale) {
  const __m512 floats = _mm512_cvtepi32_ps(sum), steps = _mm512_set1_ps(step);
  if (kBits == 8) return _mm512_fmadd_ps(floats, steps, total);
  return _mm512_fmadd_ps(_mm512_mul_ps(floats, steps), scale, total);
}

// R rows by a block of columns.
template <int kBits, int R>
void sparse_tile(const Int8Rows& x, const Packed& w, int64_t column_block,
                 float* y, int64_t y_stride) {
  using Next = Fetch<kBits, R>;
  constexpr bool kInt4 = kBits == 4;
  constexpr int64_t kBytes = 32 * kBits;
  const int64_t row_blocks = w.row_blocks();
  auto values = static_cast<const char*>(w.values_of(column_block));
  auto meta = reinterpret_cast<const char*>(w.meta_of(column_block));
  const uint8_t* bytes = x.bytes;
  const float* steps = x.steps;
  __m512 total[R];
  for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
  __m512 scale = _mm512_setzero_ps();
  const auto multiply_block = [&](int64_t b, __m512i half) {
    const char* block = values + b * kBytes;
    Next::line(meta + b * 64);
#pragma GCC unroll 4
    for (int64_t line = 0; line < kBytes; line += 64) Next::line(block + line);
    __m512i value[4], index[4];
    if (kInt4) {
      const __m512i high = _mm512_set1_epi8(-16);
      for (int p = 0; p < 2; ++p) {
        const __m512i pair = load_once(block + 64 * p);
        value[p] = _mm512_and_si512(_mm512_slli_epi32(pair, 4), high);
        value[p + 2] = _mm512_and_si512(pair, high);
      }
    } else {
      for (int p = 0; p < 4; ++p) {
        value[p] = load_once(block + 64 * p);
      }
    }
    const __m512i words = load_once(meta + b * 64);
    __m512i value_sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int p = 0; p < 4; ++p) {
      value_sum =
          _mm512_dpbusd_epi32(value_sum, _mm512_set1_epi8(-128), value[p]);
      // Byte q is slot p + 4q, of group p / 2 + 2q.
      const __m512i group = _mm512_or_si512(
          half, _mm512_set1_epi32(0x18100800 + p / 2 * 0x04040404));
      constexpr int kAndOr = 0xea;  // (a & b) | c
      index[p] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 2 * p),
                                           _mm512_set1_epi32(0x03030303),
                                           group, kAndOr);
    }
    const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), value_sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i table = load_once(bytes + r * 64);
      __m512i sum = start;
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        sum = _mm512_dpbusd_epi32(
            sum, _mm512_permutexvar_epi8(index[p], table), value[p]);
      }
      total[r] = add_block<kBits>(total[r], sum, steps[b * R + r], scale);
    }
  };
  const __m512i first = _mm512_setzero_si512(), second = _mm512_set1_epi8(32);
  for (int64_t b = 0; b < row_blocks; b += kwm::kScaleBlocks) {
    if (kInt4) scale = group_scale(w, column_block, b);
    multiply_block(b, first);
    if (b + 1 < row_blocks) multiply_block(b + 1, second);
    bytes += R * 64;
  }
  __m512 last = _mm512_set1_ps(1.0f / 16);
  if (!kInt4) last = _mm512_loadu_ps(w.int8_scale(column_block));
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(y + r * y_stride, _mm512_mul_ps(total[r], last));
  }
}

template <int kBits>
void expand(const void* values, const uint32_t* mask, char* bytes) {
  Kept<kBits, kBits == 8 ? 0 : 8> kept;
  kept.load(static_cast<const char*>(values));
  kept.words(reinterpret_cast<const char*>(mask), [&](int i, __m512i word) {
    _mm512_storeu_si512(bytes + 64 * i, word);
  });
}

// The next blocks of a matrix with a mask. They are stored long before they are
// used: to be read across the lines in which they were stored, they have to be
// in the cache.
template <int kBits>
struct Ahead {
  static constexpr uint64_t kBlocks = 4;
  using Block = Kept<kBits, 1 << (kBits - 1)>;

  Ahead(const Packed& w, int64_t begin, int64_t end, Block* blocks)
      : blocks(blocks),
        next(static_cast<const char*>(w.values_at(begin))),
        end(static_cast<const char*>(w.values_at(end))) {
    for (uint64_t i = 0; i < kBlocks; ++i) load();
  }
  inline __attribute__((always_inline)) void load() {
    if (next != end) {
      blocks[first].load(next);
      next += 32 * kBits;
    }
    first = (first + 1) % kBlocks;
  }
  // use(i, word i) of the first block, whose place the next one takes.
  template <class Use>
  inline __attribute__((always_inline)) void words(const char* mask,
                                                   const Use& use) {
    blocks[first].words(mask, use);
    load();
  }

  Block* blocks;
  const char *next, *end;
  uint64_t first = 0;
};

// `ahead` is null, or the Ahead of a matrix with a mask. It is returned moved on,
// and not changed in place, so that its members stay in registers.
template <int kBits, int kStored, int R, class Given>
Given dense_tile(const Int8Rows& x, const Packed& w, int64_t column_block,
                 float* y, int64_t y_stride, Given ahead) {
  constexpr bool kMasked = !std::is_same_v<Given, std::nullptr_t>;
  // Those of a mask go through the cache, to be spread.
  using Next = Fetch<kStored, kMasked ? kwm::kMostTileRows : R>;
  constexpr int64_t kBytes = (kMasked ? 32 : 64) * kStored;
  const int64_t row_blocks = w.row_blocks();
  auto values = static_cast<const char*>(w.values_of(column_block));
  const char* masks = nullptr;
  if (kMasked) masks = reinterpret_cast<const char*>(w.meta_of(column_block));
  // All loops over rows are unrolled, so that these stay in registers.
  __m512 total[R], part[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) total[r] = part[r] = _mm512_setzero_ps();
  for (int64_t first = 0; first < row_blocks; first += kwm::kScaleBlocks) {
    const int64_t end = kwm::min(first + kwm::kScaleBlocks, row_blocks);
    for (int64_t b = first; b < end; ++b) {
      const uint8_t* bytes = x.bytes + b * R * kBlockRows;
      const char* block = values + b * kBytes;
#pragma GCC unroll 8
      for (int line = 0; line < kBytes / 64; ++line) {
        Next::line(block + 64 * line);
      }
      Next::page(block);
      if constexpr (kMasked) Next::line(masks + b * 64);
      __m512i sum[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        sum[r] = _mm512_slli_epi32(_mm512_set1_epi32(x.offsets[b * R + r]),
                                   kBits - 1);
      }
      const auto add_word = [&](int word, __m512i value) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          int32_t activations;
          memcpy(&activations, bytes + r * kBlockRows + 4 * word, 4);
          sum[r] = _mm512_dpbusd_epi32(sum[r], value,
                                       _mm512_set1_epi32(activations));
        }
      };
      if constexpr (kMasked) {
        ahead.words(masks + b * 64, add_word);
      } else {
#pragma GCC unroll 8
        for (int n = 0; n < 8; ++n) {
          const int word = kwm::word_in_order(kStored, n);
          add_word(word, unsigned_word<kBits, kStored>(block, word));
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        part[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]),
                                  _mm512_set1_ps(x.steps[b * R + r]), part[r]);
      }
    }
    if (kBits == 8) continue;
    // The scale comes last: so denormal steps lose nothing.
    const __m512 scale = group_scale(w, column_block, first);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      total[r] = _mm512_fmadd_ps(part[r], scale, total[r]);
      part[r] = _mm512_setzero_ps();
    }
  }
  __m512 last = _mm512_setzero_ps();
  if (kBits == 8) last = _mm512_loadu_ps(w.int8_scale(column_block));
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    _mm512_storeu_ps(y + r * y_stride,
                     kBits == 8 ? _mm512_mul_ps(part[r], last) : total[r]);
  }
  return ahead;
}

enum class Form { kSparse, kDense, kMasked };

template <Form kForm, int kBits, int kStored, int R>
void multiply_columns(const Int8Rows& x, const Packed& w, int64_t column_block,
                      float* y, int64_t y_stride) {
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  const auto each = [&](const auto& tile) {
    for (; column_block < end; ++column_block, y += kLanes) tile();
  };
  if constexpr (kForm == Form::kSparse) {
    each([&] { sparse_tile<kBits, R>(x, w, column_block, y, y_stride); });
  } else if constexpr (kForm == Form::kDense) {
    each([&] {
      dense_tile<kBits, kStored, R>(x, w, column_block, y, y_stride, nullptr);
    });
  } else {
    typename Ahead<kBits>::Block blocks[Ahead<kBits>::kBlocks];
    Ahead<kBits> ahead(w, column_block * w.row_blocks(), end * w.row_blocks(),
                       blocks);
    each([&] {
      ahead =
          dense_tile<kBits, kStored, R>(x, w, column_block, y, y_stride, ahead);
    });
  }
}

// For a dense matrix the sums of more rows do not fit into the registers.
template <bool kDense>
using Tiles = std::conditional_t<kDense, TileRows<1, 2, 4, 6, 8, 9>,
                                 TileRows<1, 2, 4, 6, 8, 12, 16>>;

template <Form kForm, int kBits, int kStored>
void multiply(const Int8Rows& x, const Packed& w, int64_t column_block,
              float* y, int64_t y_stride) {
  Tiles<kForm != Form::kSparse>::run(x.rows, [&](auto rows) {
    multiply_columns<kForm, kBits, kStored, decltype(rows)::value>(
        x, w, column_block, y, y_stride);
  });
}

template <bool kDense, int kBits, int kStored>
struct Own {
  static constexpr int kMaskedBits = kStored == 8 ? kBits : 8;
  static constexpr Int8Kernels kernels{
      Tiles<kDense>::kSizes, quantize<!kDense>,
      multiply<kDense ? Form::kDense : Form::kSparse, kBits, kStored>,
      expand<kMaskedBits>, multiply<Form::kMasked, kMaskedBits, kMaskedBits>};
};

}  // namespace

const Int8Kernels* kwm::avx512_int8_kernels(int type, bool dense) {
  return int8_kernels_of<Own>(type, dense);
}

KWM_END_TARGET

#endif
