// bfloat16 activations and values on AVX-512 with BF16: an instruction adds
// two products to each of 16 sums.
//
// The two are those of a group. Lanes are the rows of activations, and of each
// group of four the six pairs that a group of W can have kept are laid out side
// by side: one load finds that which the indices name.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

KWM_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")

namespace {

using kwm::kBlockRows;
using kwm::kLanes;

constexpr int kGroups = kBlockRows / 4;
constexpr int kPairs = kwm::BFloat16Kernels::kPairs;
constexpr int kColumnWords = kwm::BFloat16Kernels::kColumnWords;

__m512i load(const void* from) { return _mm512_loadu_si512(from); }

void transpose(const void* in, int64_t in_stride, void* out,
               int64_t out_stride) {
  kwm::avx512_kernels()->transpose(static_cast<const float*>(in), in_stride,
                                   static_cast<float*>(out), out_stride);
}

void pack(const uint16_t* x, int64_t rows, int64_t k, int vectors,
          uint32_t* tile) {
  for (int64_t row = 0; row < k; row += kBlockRows) {
    const int64_t here = kwm::min(kBlockRows, k - row);
    const __mmask32 real = 0xffffffff >> (kBlockRows - here);
    for (int i = 0; i < vectors; ++i) {
      alignas(64) uint32_t in[kLanes][kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t from = i * kLanes + lane;
        _mm512_store_si512(
            in[lane], _mm512_maskz_loadu_epi16(from < rows ? real : 0,
                                               x + from * k + row));
      }
      transpose(in, kLanes, tile + i * kLanes, vectors * kLanes);
    }
    tile += kLanes * vectors * kLanes;
  }
}

void pairs_of_rows(const uint32_t* tile, int64_t row_blocks, int vectors,
                   uint32_t* pairs) {
  const __m512i low = _mm512_set1_epi32(0xffff);
  const int lanes = vectors * kLanes;
  for (int64_t group = 0; group < row_blocks * kGroups; ++group) {
    for (int i = 0; i < lanes; i += kLanes) {
      const __m512i a = load(tile + i);          // rows 0 and 1
      const __m512i b = load(tile + lanes + i);  // rows 2 and 3
      const __m512i a_low = _mm512_and_si512(a, low);
      const __m512i a_high = _mm512_srli_epi32(a, 16);
      const __m512i b_low = _mm512_slli_epi32(b, 16);
      const __m512i b_high = _mm512_andnot_si512(low, b);
      const __m512i found[kPairs] = {
          a,
          _mm512_or_si512(a_low, b_low),
          _mm512_or_si512(a_low, b_high),
          _mm512_or_si512(a_high, b_low),
          _mm512_or_si512(a_high, b_high),
          b,
      };
      for (int pair = 0; pair < kPairs; ++pair) {
        _mm512_store_si512(pairs + pair * lanes + i, found[pair]);
      }
    }
    tile += 2 * lanes;
    pairs += kPairs * lanes;
  }
}

// columns [16, 8] = in [8, 16]^T
void transpose_pairs(const void* in, uint32_t* columns) {
  auto from = static_cast<const char*>(in);
  __m512i a[kGroups], b[kGroups];
  for (int i = 0; i < kGroups; ++i) a[i] = load(from + 64 * i);
  for (int i = 0; i < kGroups; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  // a[4i + j] has column 4l + j of rows 4i .. 4i + 3 in quarter l.
  for (int i = 0; i < kGroups; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int j = 0; j < 4; ++j) {
    for (int l = 0; l < 4; l += 2) {
      const __m512i both =
          _mm512_permutex2var_epi64(a[j], l == 0 ? first : second, a[4 + j]);
      uint32_t* to = columns + (4 * l + j) * kGroups;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                          _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 4 * kGroups),
                          _mm512_extracti64x4_epi64(both, 1));
    }
  }
}

void pairs_of_columns(const void* values, const uint32_t* meta,
                      int64_t row_blocks, uint32_t* columns) {
  // By the four bits of a group, in the order of a tile.
  const __m512i place = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 5, 0));
  const __m512i low = _mm512_set1_epi8(15);
  constexpr int kBlockBytes = kGroups * kLanes * 4;
  auto block = static_cast<const char*>(values);
  for (int64_t b = 0; b < row_blocks; ++b) {
    // What the next call for this block of columns will ask for.
    for (int line = 0; line < kBlockBytes; line += 64) {
      _mm_prefetch(block + row_blocks * kBlockBytes + line, _MM_HINT_T1);
    }
    _mm_prefetch(reinterpret_cast<const char*>(meta + row_blocks * kLanes),
                 _MM_HINT_T1);
    transpose_pairs(block, columns);
    const __m512i words = load(meta);
    const __m512i even =
        _mm512_shuffle_epi8(place, _mm512_and_si512(words, low));
    const __m512i odd = _mm512_shuffle_epi8(
        place, _mm512_and_si512(_mm512_srli_epi32(words, 4), low));
    _mm512_storeu_si512(columns + kGroups * kLanes,
                        _mm512_or_si512(even, _mm512_slli_epi32(odd, 4)));
    block += kBlockBytes;
    meta += kLanes;
    columns += kColumnWords;
  }
}

__m512i quarter(__m512i v, int i) {
  return i == 0 ? _mm512_shuffle_i32x4(v, v, 0x00)
                : _mm512_shuffle_i32x4(v, v, 0x55);
}

// Lane i of the first eight in all lanes.
__m512i spread(__m512i v, int i) {
  const __m512i four = quarter(v, i / 4);
  switch (i % 4) {
    case 0:
      return _mm512_shuffle_epi32(four, _MM_PERM_AAAA);
    case 1:
      return _mm512_shuffle_epi32(four, _MM_PERM_BBBB);
    case 2:
      return _mm512_shuffle_epi32(four, _MM_PERM_CCCC);
    default:
      return _mm512_shuffle_epi32(four, _MM_PERM_DDDD);
  }
}

// R vectors of rows, C columns at a time.
template <int R, int C>
void multiply_tile(const uint32_t* pairs, const uint32_t* columns,
                   int64_t row_blocks, bool first, float* y) {
  constexpr int kTile = R * kLanes;
  for (int column = 0; column < kLanes; column += C) {
    __m512 sum[C][R];
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) {
        const float* from = y + (column + c) * kTile + r * kLanes;
        sum[c][r] = first ? _mm512_setzero_ps() : _mm512_load_ps(from);
      }
    }
    for (int64_t b = 0; b < row_blocks; ++b) {
      auto rows = reinterpret_cast<const char*>(
          pairs + b * kGroups * kPairs * kTile);
      const uint32_t* block = columns + b * kColumnWords;
      __m512i values[C];
      // In registers: to load a place for each pair would take half as long
      // again.
      uint32_t places[C];
      for (int c = 0; c < C; ++c) {
        values[c] = _mm512_castsi256_si512(_mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(block + (column + c) * kGroups)));
        places[c] = block[kGroups * kLanes + column + c];
      }
#pragma GCC unroll 8
      for (int group = 0; group < kGroups; ++group) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
          const __m512i value = spread(values[c], group);
          const char* row =
              rows + (group * kPairs + (places[c] >> (4 * group) & 15)) *
                         (kTile * sizeof(float));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            sum[c][r] = _mm512_dpbf16_ps(
                sum[c][r], reinterpret_cast<__m512bh>(value),
                reinterpret_cast<__m512bh>(load(row + r * 64)));
          }
        }
      }
    }
    for (int c = 0; c < C; ++c) {
      for (int r = 0; r < R; ++r) {
        _mm512_store_ps(y + (column + c) * kTile + r * kLanes, sum[c][r]);
      }
    }
  }
}

void multiply(const uint32_t* pairs, const uint32_t* columns,
              int64_t row_blocks, int vectors, bool first, float* y) {
  if (vectors == 2) {
    multiply_tile<2, 8>(pairs, columns, row_blocks, first, y);
  } else {
    multiply_tile<4, 4>(pairs, columns, row_blocks, first, y);
  }
}

void store(const float* sums, int vectors, int64_t rows, int64_t columns,
           uint16_t* y, int64_t y_stride) {
  const auto real = static_cast<__mmask16>(0xffff >> (kLanes - columns));
  for (int64_t first = 0; first < rows; first += kLanes) {
    alignas(64) float out[kLanes][kLanes];
    transpose(sums + first, vectors * kLanes, out, kLanes);
    for (int64_t i = 0; i < kwm::min(kLanes, rows - first); ++i) {
      const __m256bh halves = _mm512_cvtneps_pbh(_mm512_load_ps(out[i]));
      _mm256_mask_storeu_epi16(y + (first + i) * y_stride, real,
                               reinterpret_cast<__m256i>(halves));
    }
  }
}

}  // namespace

const kwm::BFloat16Kernels* kwm::avx512_bf16_kernels() {
  static constexpr BFloat16Kernels kernels = {pack, pairs_of_rows,
                                               pairs_of_columns, multiply,
                                               store};
  return &kernels;
}

KWM_END_TARGET

#endif
