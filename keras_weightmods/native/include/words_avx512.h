// Integers of packed matrices as bytes, on AVX-512 with VBMI2. Included after
// the compiler is switched to the instructions; local to the file, as all
// there.

#ifndef KWM_WORDS_AVX512_H_
#define KWM_WORDS_AVX512_H_

#include <immintrin.h>

#include "kernels.h"

namespace {

using kwm::Packed;
using kwm::kLanes;

// A load that stays in a register. Compilers fold a load into every instruction
// that reads it, and a 64-byte one takes a cycle each time.
inline __m512i load_once(const void* from) {
  __m512i v = _mm512_loadu_si512(from);
  asm("" : "+v"(v));
  return v;
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16  ? 0xffff
                                : count <= 0 ? 0
                                             : (1 << count) - 1);
}

// Word `word` of a block of dense values, made unsigned.
template <int kBits, int kStored>
inline __attribute__((always_inline)) __m512i unsigned_word(const char* block,
                                                            int word) {
  if (kStored != kBits) return load_once(block + 64 * word);
  if (kBits == 8) {
    return _mm512_xor_si512(load_once(block + 64 * word),
                            _mm512_set1_epi8(-128));
  }
  __m512i value = _mm512_setzero_si512();
  int next = 0;
#pragma GCC unroll 8
  for (int bit = 0; bit < kBits; ++bit) {
    if (bit != next) continue;
    const kwm::Place at = kwm::place_of(kBits, word, bit);
    const __m512i line = load_once(block + 64 * at.line);
    const __m512i bits = _mm512_srli_epi32(line, at.bit - bit);
    constexpr int kSelect = 0xca;  // a ? b : c
    const auto before = static_cast<char>((1 << bit) - 1);
    value = bit == 0 ? bits
                     : _mm512_ternarylogic_epi32(_mm512_set1_epi8(before),
                                                 value, bits, kSelect);
    next += at.run;
  }
  constexpr int kAndXor = 0x6a;  // (a & b) ^ c
  return _mm512_ternarylogic_epi32(
      value, _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1)),
      _mm512_set1_epi8(static_cast<char>(1 << (kBits - 1))), kAndXor);
}

// The values of a block with a mask, one after the other, from which `words`
// gives those of the dense layout, plus kZero.
template <int kBits, int kZero>
class Kept {
 public:
  Kept() { memset(bytes_, kZero, sizeof bytes_); }

  inline __attribute__((always_inline)) void load(const char* block) {
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(kZero));
    constexpr int kAndXor = 0x6a;  // (a & b) ^ c
    for (int i = 0; i < kBits / 2; ++i) {
      const __m512i v = load_once(block + 64 * i);
      if (kBits == 8) {
        _mm512_store_si512(bytes_ + 64 * i, _mm512_xor_si512(v, zero));
        continue;
      }
      // Two's complement plus 8 is the bits with the highest one changed.
      for (int half = 0; half < 2; ++half) {
        const __m512i bits = half ? _mm512_srli_epi32(v, 4) : v;
        _mm512_store_si512(
            bytes_ + 64 * (i + 2 * half),
            _mm512_ternarylogic_epi32(bits, _mm512_set1_epi8(15), zero,
                                      kAndXor));
      }
    }
  }

  // words(i, word i) for all eight.
  template <class Use>
  inline __attribute__((always_inline)) void words(const char* mask,
                                                   const Use& use) const {
    const uint8_t* next = bytes_;
    // Not known to be zero: to clear the others takes twice as long.
    __m512i zero = _mm512_set1_epi8(static_cast<char>(kZero));
    asm("" : "+v"(zero));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      uint64_t bits;
      memcpy(&bits, mask + 8 * i, 8);
      use(i, _mm512_mask_expand_epi8(zero, bits, load_once(next)));
      next += _mm_popcnt_u64(bits);
    }
  }

 private:
  // A mask can have more bits than there are values. The others give kZero.
  alignas(64) uint8_t bytes_[2 * kwm::kBlockSlots * kLanes];
};

// The scales of a block of columns in 64 rows.
inline __m512 group_scale(const Packed& w, int64_t column_block, int64_t b) {
  const uint16_t* scale =
      w.group_scale(column_block) + b / kwm::kScaleBlocks * kLanes;
  const __m256i halves =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale));
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

}  // namespace

#endif  // KWM_WORDS_AVX512_H_
