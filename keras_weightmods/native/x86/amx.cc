// Many rows of activations on AMX: tiles of bfloat16, whose products add up in
// float32. Integers are multiplied by their scales before they are rounded to
// bfloat16, once for all rows.

#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

KWM_TARGET(
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,"
    "fma,popcnt,amx-tile,amx-bf16")

#include "words_avx512.h"

namespace {

using kwm::TileKernels;
using kwm::kBlockRows;

// The compiler does not know that tiles read memory: all is to be there.
inline void written() { asm volatile("" ::: "memory"); }

void pack(const float* x, int64_t rows, int64_t k, int padded, uint16_t* out) {
  const __m512 most = _mm512_set1_ps(3.4028235e38f);
  // What rounds to an infinity is the largest bfloat16.
  const __m512 above = _mm512_castsi512_ps(_mm512_set1_epi32(0x7f7f0000));
  const __m512 below = _mm512_sub_ps(_mm512_setzero_ps(), above);
  const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
  const auto load = [&](const float* from, int64_t left) {
    const __m512 v = _mm512_maskz_loadu_ps(first_lanes(left), from);
    const __mmask16 finite =
        _mm512_cmp_ps_mask(_mm512_abs_ps(v), most, _CMP_LE_OQ);
    return _mm512_mask_blend_ps(
        finite, nan, _mm512_max_ps(_mm512_min_ps(v, above), below));
  };
  for (int64_t block = 0; block * kBlockRows < k; ++block) {
    for (int64_t row = 0; row < padded; ++row, out += kBlockRows) {
      // What pads a tile may be any row.
      const float* from = x + kwm::min(row, rows - 1) * k + block * kBlockRows;
      const int64_t left = k - block * kBlockRows;
      const __m512 low = load(from, left), high = load(from + 16, left - 16);
      _mm512_storeu_si512(
          out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    }
  }
}

// A tile: line i has rows 2i and 2i + 1 of each column side by side. rows(g, f)
// gives the floats of rows 4g to 4g + 3.
template <class Rows>
inline __attribute__((always_inline)) void store_tile(uint16_t* out,
                                                      const Rows& rows) {
  alignas(64) static constexpr uint16_t kInTurns[32] = {
      0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i in_turns = _mm512_load_si512(kInTurns);
#pragma GCC unroll 8
  for (int g = 0; g < kBlockRows / 4; ++g) {
    __m512 f[4];
    rows(g, f);
    for (int pair = 0; pair < 2; ++pair) {
      const auto both = reinterpret_cast<__m512i>(
          _mm512_cvtne2ps_pbh(f[2 * pair + 1], f[2 * pair]));
      _mm512_storeu_si512(out + (2 * g + pair) * 32,
                          _mm512_permutexvar_epi16(in_turns, both));
    }
  }
}

// The values times `scale`, of bytes q of 16 words: each a value plus
// 2^(kBits - 1).
template <int kBits>
inline __attribute__((always_inline)) __m512 scaled(__m512i words, int q,
                                                    __m512 scale) {
  const __m512i byte = _mm512_and_si512(
      _mm512_srli_epi32(words, 8 * q), _mm512_set1_epi32(255));
  const __m512 zero = _mm512_set1_ps(-(1 << (kBits - 1)));
  return _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(byte), zero), scale);
}

// use(block, its scales, its tile) of all blocks of rows.
template <int kBits, class Use>
void each_block(const Packed& w, int64_t column_block, uint16_t* out,
                const Use& use) {
  __m512 scale = _mm512_setzero_ps();
  if (kBits == 8) scale = _mm512_loadu_ps(w.int8_scale(column_block));
  for (int64_t b = 0; b < w.row_blocks(); ++b) {
    if (kBits < 8 && b % kwm::kScaleBlocks == 0) {
      scale = group_scale(w, column_block, b);
    }
    const int64_t place = column_block * w.row_blocks() + b;
    use(static_cast<const char*>(w.values_at(place)), place, scale,
        out + b * TileKernels::kBlockWords);
  }
}

template <int kBits>
void expand_dense(const Packed& w, int64_t column_block, uint16_t* out) {
  each_block<kBits>(w, column_block, out,
                    [](const char* block, int64_t, __m512 scale, uint16_t* to) {
                      store_tile(to, [&](int g, __m512* f) {
                        const __m512i word =
                            unsigned_word<kBits, kBits>(block, g);
#pragma GCC unroll 4
                        for (int q = 0; q < 4; ++q) {
                          f[q] = scaled<kBits>(word, q, scale);
                        }
                      });
                    });
}

template <int kBits>
void expand_masked(const Packed& w, int64_t column_block, uint16_t* out) {
  Kept<kBits, 1 << (kBits - 1)> kept;
  each_block<kBits>(
      w, column_block, out,
      [&](const char* block, int64_t place, __m512 scale, uint16_t* to) {
        __m512i words[8];
        kept.load(block);
        kept.words(reinterpret_cast<const char*>(w.meta + place * kLanes),
                   [&](int i, __m512i word) { words[i] = word; });
        store_tile(to, [&](int g, __m512* f) {
#pragma GCC unroll 4
          for (int q = 0; q < 4; ++q) f[q] = scaled<kBits>(words[g], q, scale);
        });
      });
}

// 2:4. Equal places add.
template <int kBits>
void expand_sparse(const Packed& w, int64_t column_block, uint16_t* out) {
  each_block<kBits>(
      w, column_block, out,
      [&](const char* block, int64_t place, __m512 scale, uint16_t* to) {
        constexpr int kZero = 1 << (kBits - 1);
        const __m512i meta = _mm512_loadu_si512(w.meta + place * kLanes);
        store_tile(to, [&](int g, __m512* f) {
          for (int q = 0; q < 4; ++q) f[q] = _mm512_setzero_ps();
#pragma GCC unroll 2
          for (int t = 0; t < 2; ++t) {
            const int slot = 2 * g + t;
            int p = slot % 4;
            const bool high = kBits == 4 && p >= 2;
            if (high) p -= 2;
            __m512i word = _mm512_loadu_si512(block + 64 * p);
            if (high) word = _mm512_srli_epi32(word, 4);
            // Plus kZero is the bits with the highest one changed.
            word = _mm512_xor_si512(
                _mm512_and_si512(_mm512_srli_epi32(word, slot / 4 * 8),
                                 _mm512_set1_epi32((1 << kBits) - 1)),
                _mm512_set1_epi32(kZero));
            const __m512 value = scaled<kBits>(word, 0, scale);
            const __m512i row = _mm512_and_si512(
                _mm512_srli_epi32(meta, 2 * slot), _mm512_set1_epi32(3));
#pragma GCC unroll 4
            for (int q = 0; q < 4; ++q) {
              f[q] = _mm512_mask_add_ps(
                  f[q], _mm512_cmpeq_epi32_mask(row, _mm512_set1_epi32(q)),
                  f[q], value);
            }
          }
        });
      });
}

void expand(const Packed& w, bool dense, int64_t column_block, uint16_t* out) {
  using Expand = void (*)(const Packed&, int64_t, uint16_t*);
  static constexpr Expand kDense[] = {expand_dense<8>, expand_dense<4>,
                                      expand_dense<2>, expand_dense<3>,
                                      expand_dense<5>, expand_dense<6>};
  static constexpr Expand kMasked[] = {expand_masked<8>, expand_masked<4>};
  static constexpr Expand kSparse[] = {expand_sparse<8>, expand_sparse<4>};
  const Expand* of = w.meta == nullptr ? kDense : dense ? kMasked : kSparse;
  of[w.type - KWM_INT8](w, column_block, out);
}

struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns.
void begin(int rows) {
  Configuration own;
  for (int tile = 0; tile < 8; ++tile) {
    own.bytes[tile] = 64;
    own.rows[tile] = static_cast<uint8_t>(tile < 6 ? rows / 2 : 16);
  }
  written();
  _tile_loadconfig(&own);
}

void end() { _tile_release(); }

void multiply(const uint16_t* x, int rows, const uint16_t* columns,
              int64_t row_blocks, int64_t column_blocks, float* y,
              int64_t y_stride) {
  written();
  const int half = rows / 2;
  const auto stride = static_cast<int64_t>(y_stride * sizeof(float));
  for (int64_t first = 0; first < column_blocks; first += 2) {
    const bool two = first + 1 < column_blocks;
    const int64_t words = row_blocks * TileKernels::kBlockWords;
    const uint16_t* left = columns + first * words;
    const uint16_t* right = two ? left + words : left;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t b = 0; b < row_blocks; ++b) {
      const uint16_t* from = x + b * rows * kBlockRows;
      _tile_loadd(4, from, 64);
      _tile_loadd(6, left + b * TileKernels::kBlockWords, 64);
      _tile_loadd(5, from + half * kBlockRows, 64);
      _tile_loadd(7, right + b * TileKernels::kBlockWords, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* out = y + first * kLanes;
    _tile_stored(0, out, stride);
    _tile_stored(1, out + half * y_stride, stride);
    if (!two) continue;
    _tile_stored(2, out + kLanes, stride);
    _tile_stored(3, out + half * y_stride + kLanes, stride);
  }
  written();
}

}  // namespace

const kwm::TileKernels* kwm::amx_kernels() {
  // Linux gives a process tiles that asks for them.
  constexpr long kRequest = 0x1023, kTileData = 18;
  static const bool given =
      has(Feature::kAmxTile) && has(Feature::kAmxBFloat16) &&
      has(Feature::kAvx512BFloat16) && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vbmi2") &&
      syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  static constexpr TileKernels kernels = {pack, expand, begin, multiply, end};
  return given ? &kernels : nullptr;
}

KWM_END_TARGET

#else

const kwm::TileKernels* kwm::amx_kernels() { return nullptr; }

#endif
