// int8 activations on AVX2.

#include "kernels.h"

#if defined(__x86_64__)

// Before the target is set, which the functions of these would have too.
#include <immintrin.h>
#include <math.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "int8_avx2_impl.h"

const kwm::Int8Kernels* kwm::avx2_int8_kernels(int type, bool dense) {
  return int8_kernels(type, dense);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const kwm::Int8Kernels* kwm::avx2_int8_kernels(int, bool) {
  return nullptr;
}

#endif
