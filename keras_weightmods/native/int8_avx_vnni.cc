// int8 activations on AVX2 with AVX-VNNI, as processors for laptops have it.

#include "kernels.h"

#if KWM_HAS_AVX_VNNI

// Before the target is set, which the functions of these would have too.
#include <immintrin.h>
#include <math.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avxvnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avxvnni")
#endif

#define KWM_VNNI
#include "int8_avx2_impl.h"

const kwm::Int8Kernels* kwm::avx_vnni_int8_kernels(int type, bool dense) {
  return int8_kernels(type, dense);
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

const kwm::Int8Kernels* kwm::avx_vnni_int8_kernels(int, bool) {
  return nullptr;
}

#endif
