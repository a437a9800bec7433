// Plain C++: vectors of one.

#define KWM_UNROLL(n)  // vectors of one: too much code
#include "kernels_impl.h"

namespace {

struct Scalar {
  using Float = float;
  using Words = uint32_t;
  using Mask = bool;
  using Index = uint32_t;
  using Slots = Words;
  using OneRow = Scalar;
  static constexpr int kWidth = 1;
  static constexpr int kRegisters = 16;
  static constexpr int kPrefetchBytes = 0;

  static Float zero() { return 0; }
  static Float load(const void* from) {
    Float value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  static void store(float* to, Float v) { *to = v; }
  static Float broadcast(float v) { return v; }
  static Float add(Float a, Float b) { return a + b; }
  static Float mul(Float a, Float b) { return a * b; }
  static Float fma(Float a, Float b, Float c) { return a * b + c; }
  static Mask greater(Float a, Float b) { return a > b; }
  static Float select(Mask mask, Float a, Float b) { return mask ? a : b; }
  static void prefetch(const void*) {}

  static Words load_words(const void* from) {
    Words words;
    memcpy(&words, from, sizeof words);
    return words;
  }
  static Float low_half(Words pair) {
    return kwm::bfloat16_to_float(static_cast<uint16_t>(pair));
  }
  static Float high_half(Words pair) {
    return kwm::bfloat16_to_float(static_cast<uint16_t>(pair >> 16));
  }
  static Float byte(Words four, int i) {
    return static_cast<int8_t>(four >> (8 * i));
  }
  static Float keep_where(Float value, Words words, int shift, int i) {
    return ((words >> shift) & 3) == static_cast<uint32_t>(i) ? value : 0;
  }

  static const float* table(const float* x, int slot) {
    return x + slot / 2 % 4 * 4;
  }
  static Slots slots(Words meta) { return meta; }
  static Index index(Slots meta, int slot) { return (meta >> (2 * slot)) & 3; }
  static Words upper_slots(Words meta) { return meta >> 16; }
  static Float pick(const float* table, Index index) { return table[index]; }

  static Float spread(Float slot, int) { return slot; }
  static void transpose(const float* in, int64_t, float* out, int64_t) {
    *out = *in;
  }
};

}  // namespace

const kwm::Kernels* kwm::scalar_kernels() {
  return kernels<Scalar>(KWM_ISA_SCALAR);
}
