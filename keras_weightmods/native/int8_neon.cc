// int8 activations on NEON, and which of its kernels.

#include "kernels.h"

#if defined(__aarch64__)

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "int8_neon_impl.h"

namespace {

bool has_dot() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0;
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}

}  // namespace

const kwm::Int8Kernels* kwm::neon_int8_kernels(int type, bool dense) {
  static const bool dot = has_dot();
  return dot ? neon_dot_int8_kernels(type, dense) : int8_kernels(type, dense);
}

#else

const kwm::Int8Kernels* kwm::neon_int8_kernels(int, bool) { return nullptr; }

#endif
