// Runs rounding.cu on a CPU, as emulate.h does decode.cu; after that file.

#ifndef KWM_EMULATE_ROUNDING_H_
#define KWM_EMULATE_ROUNDING_H_

#define __forceinline__

struct float4 {
  float x, y, z, w;
};

namespace {

uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

int __float2int_rn(float value) {
  return static_cast<int>(nearbyintf(value));
}

uint32_t largest_of_warp(uint32_t bits) {
  Warp& warp = *warp_of_thread;
  warp.meta[threadIdx.x % 32] = bits;
  warp.barrier.wait();
  const uint32_t largest = *std::max_element(warp.meta, warp.meta + 32);
  warp.barrier.wait();
  return largest;
}

// `widen` of emulate.h, but for what is not finite.
float widen_any(uint32_t bits) {
  if (x_type != 2) return __uint_as_float(bits << 16);
  if ((bits & 0x7c00) != 0x7c00) return widen(bits);
  return bits & 0x3ff ? NAN : bits & 0x8000 ? -INFINITY : INFINITY;
}

void widen_pair(uint32_t pair, float* x) {
  x[0] = widen_any(pair & 0xffff);
  x[1] = widen_any(pair >> 16);
}

#define kwm_round_rows round_rows_0
#define KWM_X 0
namespace rounding_0 {
#include "rounding.cu"
}
#undef kwm_round_rows
#undef KWM_X
#define kwm_round_rows round_rows_1
#define KWM_X 1
namespace rounding_1 {
#include "rounding.cu"
}
#undef kwm_round_rows
#undef KWM_X
#define kwm_round_rows round_rows_2
#define KWM_X 2
namespace rounding_2 {
#include "rounding.cu"
}
#undef kwm_round_rows
#undef KWM_X

template <typename Four>
void emulated(void (*kernel)(const Four*, int, int, uint32_t*, float*),
              int type, int blocks, int warps, const void* x, int rows, int k,
              void* steps, void* scales) {
  x_type = type;
  blockDim.x = 32 * warps;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    Barrier barrier(blockDim.x);
    block_barrier = &barrier;
    std::vector<Warp> states(warps);
    std::vector<std::thread> threads;
    for (int i = 0; i < blockDim.x; ++i) {
      threads.emplace_back([&, i] {
        threadIdx.x = i;
        warp_of_thread = &states[i / 32];
        kernel(static_cast<const Four*>(x), rows, k,
               static_cast<uint32_t*>(steps), static_cast<float*>(scales));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

void round_rows(int type, int blocks, int warps, const void* x, int rows,
                int k, void* steps, void* scales) {
  const auto run = [&](auto kernel) {
    emulated(kernel, type, blocks, warps, x, rows, k, steps, scales);
  };
  if (type == 0) run(rounding_0::round_rows_0);
  if (type == 1) run(rounding_1::round_rows_1);
  if (type == 2) run(rounding_2::round_rows_2);
}

}  // namespace

#endif  // KWM_EMULATE_ROUNDING_H_
