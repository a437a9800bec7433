// int8 values on AVX-512 with VNNI and VBMI: 64 of them in one instruction.
//
// That takes integers. The activations of a row become 24-bit ones, x = step *
// q, as exact as float32 next to the largest of the row, and these three
// unsigned bytes: q + 2^23 = 65536 a + 256 b + c. So
//
//   sum w x = step * (65536 (sum w a - 128 sum w) + 256 sum w b + sum w c)
//
// Each entry is off by half a step at most: a sum, by step / 2 * sum |w|, which
// may be far more than float32 loses where x is small next to its row's most.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni," \
                          "avx512vbmi,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target( \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx2,fma")
#endif

namespace {

using kwm::kDigitColumns;
using kwm::kDigits;
using kwm::kLanes;
using kwm::Packed;

// A little less than 2^23, which a product that is rounded must not reach.
constexpr float kLargest = 8388600;

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1 << count) - 1);
}

bool to_digits(const float* x, int64_t k, int rows, int64_t blocks,
               uint8_t* panel, float* step) {
  __m512 largest = _mm512_setzero_ps();
  __mmask16 finite = 0xffff;
  for (int64_t i = 0; i < k; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(k - i), x + i);
    const __m512 size = _mm512_abs_ps(v);
    largest = _mm512_max_ps(largest, size);
    finite &= _mm512_cmp_ps_mask(
        size, _mm512_set1_ps(3.4028235e38f), _CMP_LE_OQ);
  }
  if (finite != 0xffff) return false;
  const float most = _mm512_reduce_max_ps(largest);
  if (most > 0 && most < 1e-30f) return false;
  *step = most > 0 ? most / kLargest : 1;

  const __m512 steps_in_one = _mm512_set1_ps(most > 0 ? kLargest / most : 0);
  const __m512i zero = _mm512_set1_epi32(1 << 23);
  for (int64_t block = 0; block < blocks; ++block) {
    uint8_t* out = panel + block * rows * kDigits * kDigitColumns;
    for (int part = 0; part < kDigitColumns; part += 16) {
      const int64_t column = block * kDigitColumns + part;
      const __mmask16 real = column < k ? first_lanes(k - column) : 0;
      const __m512 v = _mm512_maskz_loadu_ps(real, x + column);
      const __m512i q = _mm512_add_epi32(
          _mm512_cvtps_epi32(_mm512_mul_ps(v, steps_in_one)), zero);
      for (int digit = 0; digit < kDigits; ++digit) {
        const __m512i bits = _mm512_srl_epi32(q, _mm_cvtsi32_si128(8 * digit));
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(out + digit * kDigitColumns + part),
            _mm512_cvtepi32_epi8(bits));
      }
    }
  }
  return true;
}

// R rows of the panel, C blocks of columns.
template <int R, int C>
void multiply_tile(const uint8_t* x, const float* steps, const Packed& w,
                   int64_t column_block, float* y, int64_t y_stride) {
  // Blocks of rows from the one in use to the one to fetch: measured, 16 and
  // 48 are slower out of memory.
  constexpr int64_t kAhead = 32;
  __m512i sum[C][R][kDigits], value_sum[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    for (int r = 0; r < R; ++r) {
      for (int d = 0; d < kDigits; ++d) sum[c][r][d] = _mm512_setzero_si512();
    }
    value_sum[c] = _mm512_setzero_si512();
  }
  auto values = static_cast<const char*>(w.values_of(column_block));
  auto meta = reinterpret_cast<const char*>(w.meta_of(column_block));
  const int64_t row_blocks = w.row_blocks();
  // A permutation chooses among the 64 columns of two blocks of rows.
  const __m512i first = _mm512_setzero_si512(), second = _mm512_set1_epi8(32);
  const auto multiply_block = [&](int64_t b, __m512i half) {
    const int64_t next = kwm::row_block_ahead(b, kAhead, row_blocks, C);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const char* block = values + (c * row_blocks + b) * 256;
      const char* words_at = meta + (c * row_blocks + b) * 64;
      const __m512i words = _mm512_loadu_si512(words_at);
      const char* next_block = values + (c * row_blocks + next) * 256;
      _mm_prefetch(meta + (c * row_blocks + next) * 64, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        _mm_prefetch(next_block + 64 * p, _MM_HINT_T1);
        const __m512i value = _mm512_loadu_si512(block + 64 * p);
        value_sum[c] =
            _mm512_dpbusd_epi32(value_sum[c], _mm512_set1_epi8(1), value);
        // Byte q is slot p + 4q, of group p / 2 + 2q.
        const __m512i group = _mm512_or_si512(
            half, _mm512_set1_epi32(0x18100800 + p / 2 * 0x04040404));
        constexpr int kAndOr = 0xea;  // (a & b) | c
        const __m512i index = _mm512_ternarylogic_epi32(
            _mm512_srli_epi32(words, 2 * p), _mm512_set1_epi32(0x03030303),
            group, kAndOr);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 3
          for (int d = 0; d < kDigits; ++d) {
            const __m512i table =
                _mm512_loadu_si512(x + (r * kDigits + d) * kDigitColumns);
            sum[c][r][d] = _mm512_dpbusd_epi32(
                sum[c][r][d], _mm512_permutexvar_epi8(index, table), value);
          }
        }
      }
    }
  };
  constexpr int64_t kStep = R * kDigits * kDigitColumns;
  if constexpr (R <= 4) {  // which half it is, is known when this is compiled
    for (int64_t b = 0; b < row_blocks; b += 2) {
      multiply_block(b, first);
      if (b + 1 < row_blocks) multiply_block(b + 1, second);
      x += kStep;
    }
  } else {  // unrolled like that, 8 rows took 1.8 times as long
    __m512i half = first;
    for (int64_t b = 0; b < row_blocks; ++b) {
      multiply_block(b, half);
      half = _mm512_xor_si512(half, second);
      x += b % 2 * kStep;
    }
  }
  for (int c = 0; c < C; ++c) {
    const __m512 scale = _mm512_loadu_ps(w.int8_scale(column_block + c));
    for (int r = 0; r < R; ++r) {
      const __m512i high =
          _mm512_sub_epi32(sum[c][r][2], _mm512_slli_epi32(value_sum[c], 7));
      __m512 total = _mm512_cvtepi32_ps(sum[c][r][0]);
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[c][r][1]),
                              _mm512_set1_ps(256), total);
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high),
                              _mm512_set1_ps(65536), total);
      total = _mm512_mul_ps(total, _mm512_set1_ps(steps[r]));
      _mm512_storeu_ps(y + r * y_stride + c * kLanes,
                       _mm512_mul_ps(total, scale));
    }
  }
}

template <int R>
void multiply_columns(const uint8_t* x, const float* steps, const Packed& w,
                      int64_t column_block, float* y, int64_t y_stride) {
  constexpr int C = R <= 2 ? 2 : 1;
  const int64_t end =
      kwm::min(column_block + kwm::kCallBlocks, w.column_blocks());
  for (; column_block + C <= end; column_block += C) {
    multiply_tile<R, C>(x, steps, w, column_block, y, y_stride);
    y += C * kLanes;
  }
  for (; C > 1 && column_block < end; ++column_block) {
    multiply_tile<R, 1>(x, steps, w, column_block, y, y_stride);
    y += kLanes;
  }
}

void multiply(const uint8_t* x, const float* steps, int rows, const Packed& w,
              int64_t column_block, float* y, int64_t y_stride) {
  switch (rows) {
    case 1:
      return multiply_columns<1>(x, steps, w, column_block, y, y_stride);
    case 2:
      return multiply_columns<2>(x, steps, w, column_block, y, y_stride);
    case 4:
      return multiply_columns<4>(x, steps, w, column_block, y, y_stride);
    case 6:
      return multiply_columns<6>(x, steps, w, column_block, y, y_stride);
    case 8:
      return multiply_columns<8>(x, steps, w, column_block, y, y_stride);
  }
}

constexpr int kTileRows[] = {1, 2, 4, 6, 8, 0};

}  // namespace

const kwm::DigitKernels* kwm::avx512_vnni_kernels() {
  static const DigitKernels kernels = {kTileRows, to_digits, multiply};
  return &kernels;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const kwm::DigitKernels* kwm::avx512_vnni_kernels() { return nullptr; }

#endif
