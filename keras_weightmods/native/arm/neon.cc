// NEON of 64-bit Arm, which every such machine has.

#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "kernels_impl.h"

namespace {

struct Neon {
  using Float = float32x4_t;
  using Words = uint32x4_t;
  using Mask = uint32x4_t;
  using Index = uint8x16_t;
  using Slots = Words;
  using OneRow = Neon;
  static constexpr int kWidth = 4;
  static constexpr int kRegisters = 32;
  static constexpr int kPrefetchBytes = 1024;

  static Float zero() { return vdupq_n_f32(0); }
  static Float load(const void* from) {
    return vreinterpretq_f32_u8(vld1q_u8(static_cast<const uint8_t*>(from)));
  }
  static void store(float* to, Float v) { vst1q_f32(to, v); }
  static Float broadcast(float v) { return vdupq_n_f32(v); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Mask greater(Float a, Float b) { return vcgtq_f32(a, b); }
  static Float select(Mask mask, Float a, Float b) {
    return vbslq_f32(mask, a, b);
  }
  static void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }

  static Words load_words(const void* from) {
    return vreinterpretq_u32_u8(vld1q_u8(static_cast<const uint8_t*>(from)));
  }
  static Float low_half(Words pair) {
    return vreinterpretq_f32_u32(vshlq_n_u32(pair, 16));
  }
  static Float high_half(Words pair) {
    return vreinterpretq_f32_u32(vandq_u32(pair, vdupq_n_u32(0xffff0000)));
  }
  static Float byte(Words four, int i) {
    const int32x4_t left = vdupq_n_s32(24 - 8 * i);
    const int32x4_t top = vshlq_s32(vreinterpretq_s32_u32(four), left);
    return vcvtq_f32_s32(vshrq_n_s32(top, 24));
  }
  static Words two_bits(Words words, int shift) {
    return vandq_u32(vshlq_u32(words, vdupq_n_s32(-shift)), vdupq_n_u32(3));
  }
  static Float keep_where(Float value, Words words, int shift, int i) {
    const Words same =
        vceqq_u32(two_bits(words, shift),
                  vdupq_n_u32(static_cast<uint32_t>(i)));
    return vreinterpretq_f32_u32(
        vandq_u32(vreinterpretq_u32_f32(value), same));
  }

  // The table lookup is by byte: four bytes 4i .. 4i + 3 for index i.
  static Float table(const float* x, int slot) {
    return vld1q_f32(x + slot / 2 % 4 * 4);
  }
  static Slots slots(Words meta) { return meta; }
  static Index index(Slots meta, int slot) {
    return vreinterpretq_u8_u32(
        vmlaq_u32(vdupq_n_u32(0x03020100), two_bits(meta, 2 * slot),
                  vdupq_n_u32(0x04040404)));
  }
  static Words upper_slots(Words meta) { return vshrq_n_u32(meta, 16); }
  static Float pick(Float table, Index index) {
    return vreinterpretq_f32_u8(
        vqtbl1q_u8(vreinterpretq_u8_f32(table), index));
  }

  static Float spread(Float slots, int i) { return vdupq_n_f32(slots[i]); }
  static void transpose(const float* in, int64_t in_stride, float* out,
                        int64_t out_stride) {
    const Float a0 = load(in), a1 = load(in + in_stride);
    const Float a2 = load(in + 2 * in_stride), a3 = load(in + 3 * in_stride);
    const float32x4x2_t low = vtrnq_f32(a0, a1), high = vtrnq_f32(a2, a3);
    for (int i = 0; i < 2; ++i) {
      float* to = out + i * out_stride;
      store(to, vcombine_f32(vget_low_f32(low.val[i]),
                             vget_low_f32(high.val[i])));
      store(to + 2 * out_stride, vcombine_f32(vget_high_f32(low.val[i]),
                                              vget_high_f32(high.val[i])));
    }
  }
};

}  // namespace

const kwm::Kernels* kwm::neon_kernels() {
  return kernels<Neon>(KWM_ISA_NEON);
}

#endif
