// AVX2 and FMA.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

KWM_TARGET("avx2,fma")

#include "kernels_impl.h"

namespace {

struct Avx2 {
  using Float = __m256;
  using Words = __m256i;
  using Mask = __m256;
  using Index = __m256i;
  using Slots = Words;
  using OneRow = Avx2;
  static constexpr int kWidth = 8;
  static constexpr int kRegisters = 16;
  static constexpr int kPrefetchBytes = 8192;

  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const void* from) {
    return _mm256_loadu_ps(static_cast<const float*>(from));
  }
  static void store(float* to, Float v) { _mm256_storeu_ps(to, v); }
  static Float broadcast(float v) { return _mm256_set1_ps(v); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  static Mask greater(Float a, Float b) {
    return _mm256_cmp_ps(a, b, _CMP_GT_OQ);
  }
  static Float select(Mask mask, Float a, Float b) {
    return _mm256_blendv_ps(b, a, mask);
  }
  static void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1);
  }

  static Words load_words(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
  }
  static Float low_half(Words pair) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pair, 16));
  }
  static Float high_half(Words pair) {
    const Words mask = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    return _mm256_castsi256_ps(_mm256_and_si256(pair, mask));
  }
  static Float byte(Words four, int i) {
    const Words top = _mm256_slli_epi32(four, 24 - 8 * i);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
  }
  static Float keep_where(Float value, Words words, int shift, int i) {
    const Words bits = _mm256_and_si256(_mm256_srli_epi32(words, shift),
                                        _mm256_set1_epi32(3));
    const Words same = _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(i));
    return _mm256_and_ps(value, _mm256_castsi256_ps(same));
  }

  // The permutation reads the low two bits of a lane only: the rest may stay.
  static Float table(const float* x, int slot) {
    return _mm256_broadcast_ps(
        reinterpret_cast<const __m128*>(x + slot / 2 % 4 * 4));
  }
  static Slots slots(Words meta) { return meta; }
  static Index index(Slots meta, int slot) {
    return _mm256_srli_epi32(meta, 2 * slot);
  }
  static Words upper_slots(Words meta) { return _mm256_srli_epi32(meta, 16); }
  static Float pick(Float table, Index index) {
    return _mm256_permutevar_ps(table, index);
  }

  static Float spread(Float slots, int i) {
    return _mm256_permutevar8x32_ps(slots, _mm256_set1_epi32(i));
  }
  static void transpose(const float* in, int64_t in_stride, float* out,
                        int64_t out_stride) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load(in + i * in_stride);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[4i + j] has column 4l + j of rows 4i .. 4i + 3 in half l.
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m256d low = _mm256_castps_pd(b[i + j]);
        const __m256d high = _mm256_castps_pd(b[i + j + 2]);
        a[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
        a[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {
      store(out + j * out_stride,
            _mm256_permute2f128_ps(a[j], a[4 + j], 0x20));
      store(out + (4 + j) * out_stride,
            _mm256_permute2f128_ps(a[j], a[4 + j], 0x31));
    }
  }
};

}  // namespace

const kwm::Kernels* kwm::avx2_kernels() {
  return kernels<Avx2>(KWM_ISA_AVX2);
}

KWM_END_TARGET

#endif
