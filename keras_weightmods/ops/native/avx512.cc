// AVX-512 (F, BW, DQ, VL).

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "kernels_impl.h"

namespace {

struct Avx512 {
  using Float = __m512;
  using Words = __m512i;
  using Index = __m512i;
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kPrefetchBytes = 4096;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const void* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float fma(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0);
  }

  static Words load_words(const void* from) {
    return _mm512_loadu_si512(from);
  }
  static Float low_half(Words pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  }
  static Float high_half(Words pair) {
    const Words mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return _mm512_castsi512_ps(_mm512_and_si512(pair, mask));
  }
  static Float byte(Words four, int i) {
    const Words top = _mm512_slli_epi32(four, 24 - 8 * i);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
  }
  static Float keep_where(Float value, Words words, int shift, int i) {
    const Words bits = _mm512_and_si512(_mm512_srli_epi32(words, shift),
                                        _mm512_set1_epi32(3));
    return _mm512_maskz_mov_ps(
        _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(i)), value);
  }

  // One permutation chooses among four groups, so that the activations are
  // loaded as they lie: a broadcast would compete with it for its port.
  static Float table(const float* x, int) { return _mm512_loadu_ps(x); }
  static Index index(Words meta, int slot) {
    constexpr int kAndOr = 0xea;  // (a & b) | c
    const Words bits = _mm512_srli_epi32(meta, 2 * slot);
    const Words group = _mm512_set1_epi32(slot / 2 % 4 * 4);
    return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), group, kAndOr);
  }
  static Words upper_slots(Words meta) { return _mm512_srli_epi32(meta, 16); }
  static Float pick(Float table, Index index) {
    return _mm512_permutexvar_ps(index, table);
  }
};

}  // namespace

const kwm::Kernels* kwm::avx512_kernels() {
  return kernels<Avx512>(KWM_ISA_AVX512);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const kwm::Kernels* kwm::avx512_kernels() { return nullptr; }

#endif
