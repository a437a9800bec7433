// int8 activations on NEON with dot products.

#include "kernels.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), \
                             apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define KWM_DOT
#include "int8_neon_impl.h"

const kwm::Int8Kernels* kwm::neon_dot_int8_kernels(int type, bool dense) {
  return int8_kernels(type, dense);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const kwm::Int8Kernels* kwm::neon_dot_int8_kernels(int, bool) {
  return nullptr;
}

#endif
