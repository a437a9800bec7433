// Numbers of rows of activations that a kernel is compiled for. Included after
// the compiler is switched to the instructions; local to the file, as all there.

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

}  // namespace
