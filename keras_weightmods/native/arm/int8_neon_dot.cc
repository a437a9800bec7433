// int8 activations on NEON with dot products.

#define KWM_DOT
#include "int8_neon.cc"
