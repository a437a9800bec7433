// Runs rounding.cu on a CPU: a thread for each lane, one block after the other.

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <thread>
#include <vector>

#define KWM_EMULATED
#define __device__
#define __forceinline__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  int x;
};

namespace {

struct Barrier {
  explicit Barrier(int count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
  pthread_barrier_t barrier;
};

// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier{32};
  uint32_t bits[32];
};

thread_local Index threadIdx;
thread_local Warp* warp_of_thread;
Index blockIdx, blockDim;
Barrier* block_barrier;
int x_type;  // KWM_X of the kernel that runs

void __syncthreads() { block_barrier->wait(); }

uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int __float2int_rn(float value) { return static_cast<int>(nearbyintf(value)); }

uint32_t largest_of_warp(uint32_t bits) {
  Warp& warp = *warp_of_thread;
  warp.bits[threadIdx.x % 32] = bits;
  warp.barrier.wait();
  const uint32_t largest = *std::max_element(warp.bits, warp.bits + 32);
  warp.barrier.wait();
  return largest;
}

float widen(uint32_t bits) {
  if (x_type != 2) return __uint_as_float(bits << 16);
  const int exponent = bits >> 10 & 31;
  const float fraction = bits & 0x3ff;
  float size = ldexpf(fraction, -24);
  if (exponent > 0) size = ldexpf(1024 + fraction, exponent - 25);
  if (exponent == 31) size = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -size : size;
}

void widen_pair(uint32_t pair, float* x) {
  x[0] = widen(pair & 0xffff);
  x[1] = widen(pair >> 16);
}

#define KWM_X 0
#define kwm_round_rows kwm_round_rows_0
namespace float32 {
#include "rounding.cu"
}
#undef KWM_X
#undef kwm_round_rows
#define KWM_X 1
#define kwm_round_rows kwm_round_rows_1
namespace bfloat16 {
#include "rounding.cu"
}
#undef KWM_X
#undef kwm_round_rows
#define KWM_X 2
#define kwm_round_rows kwm_round_rows_2
namespace float16 {
#include "rounding.cu"
}
#undef KWM_X
#undef kwm_round_rows

template <typename Four>
void run(void (*kernel)(const Four*, int, int, uint32_t*, float*), int blocks,
         int threads, const void* x, int rows, int k, void* steps,
         void* scales) {
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    Barrier barrier(threads);
    block_barrier = &barrier;
    std::vector<Warp> warps(threads / 32);
    std::vector<std::thread> lanes;
    for (int i = 0; i < threads; ++i) {
      lanes.emplace_back([&, i] {
        threadIdx.x = i;
        warp_of_thread = &warps[i / 32];
        kernel(static_cast<const Four*>(x), rows, k,
               static_cast<uint32_t*>(steps), static_cast<float*>(scales));
      });
    }
    for (std::thread& lane : lanes) lane.join();
  }
}

}  // namespace

// Launches the kernel; false for what a GPU would refuse.
bool round_rows(int type, int blocks, int threads, const void* x, int rows,
                int k, void* steps, void* scales) {
  if (threads % 32 != 0 || threads == 0 || threads > 256 || k % 4 != 0) {
    return false;
  }
  x_type = type;
  const auto with = [&](auto kernel) {
    run(kernel, blocks, threads, x, rows, k, steps, scales);
  };
  if (type == 0) with(float32::kwm_round_rows_0);
  if (type == 1) with(bfloat16::kwm_round_rows_1);
  if (type == 2) with(float16::kwm_round_rows_2);
  return type >= 0 && type <= 2;
}
