// int8 activations on AVX2 with AVX-VNNI, as processors for laptops have it.

#define KWM_VNNI
#include "int8_avx2.cc"
