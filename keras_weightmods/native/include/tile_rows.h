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

// The Of<dense, bits>::kernels of a type.
template <template <bool, int> class Of>
const kwm::Int8Kernels* int8_kernels_of(int type, bool dense) {
  static constexpr kwm::Int8Kernels kernels[2][kwm::kTypes - KWM_INT8] = {
      {Of<false, 8>::kernels, Of<false, 4>::kernels},
      {Of<true, 8>::kernels, Of<true, 4>::kernels, Of<true, 2>::kernels,
       Of<true, 3>::kernels, Of<true, 5>::kernels, Of<true, 6>::kernels},
  };
  return &kernels[dense][type - KWM_INT8];
}

}  // namespace
