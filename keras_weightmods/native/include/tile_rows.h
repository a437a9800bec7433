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

// Int8Kernels::expand, by a function that writes the 8 bytes from[ranks[i]], or
// 0 where a rank is kNone.
template <int kBits, class Spread>
void expand_by(const void* values, const uint32_t* mask, char* bytes,
               const Spread& spread) {
  constexpr int kValues = kwm::kBlockSlots * kwm::kLanes;
  auto from = static_cast<const uint8_t*>(values);
  // Bits beyond the values have zeros.
  int8_t kept[2 * kValues + 8] = {};
  for (int i = 0; i < kValues * kBits / 8; ++i) {
    kept[i] = static_cast<int8_t>(kBits == 8 ? from[i] : kwm::low_four(from[i]));
    if (kBits == 4) {
      kept[i + kValues / 2] = static_cast<int8_t>(kwm::high_four(from[i]));
    }
  }
  const int8_t* next = kept;
  for (int i = 0; i < 2 * kValues / 8; ++i) {
    const kwm::Ranks& ranks = kwm::kRanks.of[mask[i / 4] >> (i % 4 * 8) & 255];
    spread(next, ranks.ranks, bytes + 8 * i);
    next += ranks.count;
  }
}

}  // namespace
