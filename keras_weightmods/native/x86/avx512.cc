// AVX-512 (F, BW, DQ, VL).

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

KWM_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")

#include "kernels_impl.h"

namespace {

struct Avx512OneRow;

struct Avx512 {
  using OneRow = Avx512OneRow;
  using Float = __m512;
  using Words = __m512i;
  using Mask = __mmask16;
  using Index = __m512i;
  struct Slots {
    __m512i of_parity[2];
  };
  static constexpr int kWidth = 16;
  static constexpr int kRegisters = 32;
  static constexpr int kPrefetchBytes = 8192;

  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const void* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Float v) { _mm512_storeu_ps(to, v); }
  static Float broadcast(float v) { return _mm512_set1_ps(v); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  static Mask greater(Float a, Float b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
  }
  static Float select(Mask mask, Float a, Float b) {
    return _mm512_mask_blend_ps(mask, b, a);
  }
  static void prefetch(const void* at) {
    _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T1);
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

  // The permutation reads the low four bits of a lane: without those of the
  // other slot of the group, they stay among the four floats of a table. To
  // broadcast these would compete with it for its port.
  static Float table(const float* x, int slot) {
    return _mm512_castps128_ps512(_mm_loadu_ps(x + slot / 2 % 4 * 4));
  }
  static Slots slots(Words meta) {
    const Words low = _mm512_set1_epi32(0x33333333);
    return {{_mm512_and_si512(meta, low),
             _mm512_and_si512(_mm512_srli_epi32(meta, 2), low)}};
  }
  static Index index(const Slots& slots, int slot) {
    return _mm512_srli_epi32(slots.of_parity[slot % 2], slot / 2 * 4);
  }
  static Words upper_slots(Words meta) { return _mm512_srli_epi32(meta, 16); }
  static Float pick(Float table, Index index) {
    return _mm512_permutexvar_ps(index, table);
  }

  static Float spread(Float slots, int i) {
    const Float four = quarter(slots, i / 4);
    switch (i % 4) {
      case 0:
        return _mm512_permute_ps(four, 0x00);
      case 1:
        return _mm512_permute_ps(four, 0x55);
      case 2:
        return _mm512_permute_ps(four, 0xaa);
      default:
        return _mm512_permute_ps(four, 0xff);
    }
  }
  static Float quarter(Float v, int i) {
    switch (i) {
      case 0:
        return _mm512_shuffle_f32x4(v, v, 0x00);
      case 1:
        return _mm512_shuffle_f32x4(v, v, 0x55);
      case 2:
        return _mm512_shuffle_f32x4(v, v, 0xaa);
      default:
        return _mm512_shuffle_f32x4(v, v, 0xff);
    }
  }
  static void transpose(const float* in, int64_t in_stride, float* out,
                        int64_t out_stride) {
    __m512 a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(in + i * in_stride);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[4i + j] has column 4l + j of rows 4i .. 4i + 3 in quarter l.
    for (int i = 0; i < 16; i += 4) {
      for (int j = 0; j < 2; ++j) {
        const __m512d low = _mm512_castps_pd(b[i + j]);
        const __m512d high = _mm512_castps_pd(b[i + j + 2]);
        a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
        a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
      }
    }
    for (int j = 0; j < 4; ++j) {
      const __m512 even_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88);
      const __m512 odd_low = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
      const __m512 even_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
      const __m512 odd_high = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
      float* to = out + j * out_stride;
      store(to, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
      store(to + 4 * out_stride,
            _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
      store(to + 8 * out_stride,
            _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
      store(to + 12 * out_stride,
            _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
    }
  }
};

// One index for both slots of a group: of its four bits the first slot goes by
// the low two in a table x0 x1 x2 x3 x0 .., the second one by the high two in
// x0 x0 x0 x0 x1 ... More work for the tables, which several columns share.
struct Avx512OneRow : Avx512 {
  using Slots = Words;
  static Slots slots(Words meta) { return meta; }
  static Index index(Slots meta, int slot) {
    return _mm512_srli_epi32(meta, slot / 2 * 4);
  }
  static Float table(const float* x, int slot) {
    const Float four =
        _mm512_broadcast_f32x4(_mm_loadu_ps(x + slot / 2 % 4 * 4));
    const Index repeat = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2,
                                           3, 3, 3, 3);
    return slot % 2 ? _mm512_permutexvar_ps(repeat, four) : four;
  }
};

}  // namespace

const kwm::Kernels* kwm::avx512_kernels() {
  return kernels<Avx512>(KWM_ISA_AVX512);
}

KWM_END_TARGET

#endif
