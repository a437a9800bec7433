// What kernels are compiled for: numbers of rows of activations, and types of
// integers. Included after the compiler is switched to the instructions; local
// to the file, as all there.

#include "kernels.h"

namespace {

template <int... kRows>
struct TileRows {
  static constexpr int kSizes[] = {kRows..., 0};

  // run(the rows as a type with the constant `value`)
  template <class Run>
  static void run(int rows, const Run& run) {
    const bool found =
        ((rows == kRows &&
          (run(std::integral_constant<int, kRows>()), true)) || ...);
    static_cast<void>(found);
  }
};

// The Of<dense, bits, bits stored>::kernels of a type.
template <template <bool, int, int> class Of>
const kwm::Int8Kernels* int8_kernels_of(int type, bool dense) {
  static constexpr kwm::Int8Kernels kernels[2][kwm::kTypes + 1 - KWM_INT8] = {
      {Of<false, 8, 8>::kernels, Of<false, 4, 4>::kernels},
      {Of<true, 8, 8>::kernels, Of<true, 4, 4>::kernels,
       Of<true, 2, 2>::kernels, Of<true, 3, 3>::kernels,
       Of<true, 5, 5>::kernels, Of<true, 6, 6>::kernels,
       Of<true, 4, 8>::kernels},
  };
  return &kernels[dense][type - KWM_INT8];
}

// Int8Kernels::expand of any machine: the values plus kZero, and kZero where
// there is none.
template <int kBits, int kZero>
void expand_bits(const void* values, const uint32_t* mask, char* bytes) {
  constexpr int kValues = kwm::kBlockSlots * kwm::kLanes;
  auto from = static_cast<const uint8_t*>(values);
  int next = 0;
  for (int i = 0; i < 2 * kValues; ++i) {
    int value = 0;
    if (mask[i / 32] >> i % 32 & 1 && next < kValues) {
      const uint8_t byte = from[next % (kValues * kBits / 8)];
      value = kBits == 8          ? static_cast<int8_t>(byte)
              : next < kValues / 2 ? kwm::low_four(byte)
                                   : kwm::high_four(byte);
      ++next;
    }
    bytes[i] = static_cast<char>(value + kZero);
  }
}

}  // namespace
