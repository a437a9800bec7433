// Runs decode.cu on a CPU: a thread for each lane, and the instructions of the
// GPU from their description in the PTX ISA. Included once, before the variants
// of the kernel, each in a namespace of its own.

#ifndef KWM_EMULATE_H_
#define KWM_EMULATE_H_

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#define KWM_EMULATED
#define __device__
#define __global__
#define __shared__ static
#define __launch_bounds__(threads)

struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};
struct Index {
  int x;
};

namespace {

using std::min;

struct Barrier {
  explicit Barrier(int count) { pthread_barrier_init(&barrier, nullptr, count); }
  ~Barrier() { pthread_barrier_destroy(&barrier); }
  void wait() { pthread_barrier_wait(&barrier); }
  pthread_barrier_t barrier;
};

// What the lanes of a warp show each other.
struct Warp {
  Barrier barrier{32};
  uint32_t a[32][4], b[32][4], meta[32];
  float value[32];
};

thread_local Index threadIdx;
thread_local Warp* warp_of_thread;
Index blockIdx, blockDim;
Barrier* block_barrier;
int x_type;  // KWM_X of the variant that runs
bool bad_meta;  // an instruction met metadata that it does not allow

float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float2 make_float2(float x, float y) { return {x, y}; }

uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const int byte = selector >> 4 * i & 7;
    result |= static_cast<uint32_t>(bytes >> 8 * byte & 0xff) << 8 * i;
  }
  return result;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}

uint2 load_once(const uint2* address) { return *address; }

void __syncthreads() { block_barrier->wait(); }

float __shfl_xor_sync(uint32_t, float value, int mask) {
  Warp& warp = *warp_of_thread;
  const int lane = threadIdx.x % 32;
  warp.value[lane] = value;
  warp.barrier.wait();
  const float other = warp.value[lane ^ mask];
  warp.barrier.wait();
  return other;
}

uint32_t round_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Of finite numbers.
uint32_t round_float16(float value) {
  const uint32_t sign = signbit(value) ? 0x8000 : 0;
  const float size = fabsf(value);
  if (size < ldexpf(1, -14)) {
    return sign | static_cast<uint32_t>(nearbyintf(ldexpf(size, 24)));
  }
  int exponent;
  const float fraction = frexpf(size, &exponent);  // in [1/2, 1)
  const auto steps = static_cast<uint32_t>(nearbyintf(ldexpf(fraction, 11)));
  return sign | min(((exponent + 13u) << 10) + steps, 0x7c00u);
}

uint32_t round_pair(float low, float high) {
  return x_type == 2 ? round_float16(low) | round_float16(high) << 16
                     : round_bfloat16(low) | round_bfloat16(high) << 16;
}

float widen(uint32_t bits) {
  if (x_type != 2) return __uint_as_float(bits << 16);
  const int exponent = bits >> 10 & 31;
  const float fraction = bits & 0x3ff;
  const float size = exponent == 0 ? ldexpf(fraction, -24)
                                   : ldexpf(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -size : size;
}

// mma.sp::ordered_metadata.m16n8k32 with 16-bit types and sparsity selector 0,
// by the figures of the PTX ISA: A and its metadata, B, and the sums.
void sparse_mma(float (&sums)[4], const uint32_t (&a)[4],
                const uint32_t (&b)[4], uint32_t meta) {
  Warp& warp = *warp_of_thread;
  const int lane = threadIdx.x % 32;
  memcpy(warp.a[lane], a, sizeof a);
  memcpy(warp.b[lane], b, sizeof b);
  warp.meta[lane] = meta;
  warp.barrier.wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int group = 0; group < 8; ++group) {
      const uint32_t kept =
          warp.a[row % 8 * 4 + group % 4][row / 8 + group / 4 * 2];
      const uint32_t places = warp.meta[row % 8 * 4 + group / 4] >>
                              (row / 8 * 16 + group % 4 * 4);
      if ((places & 3) >= (places >> 2 & 3)) bad_meta = true;
      for (int t = 0; t < 2; ++t) {
        const int k = 4 * group + (places >> 2 * t & 3);
        const uint32_t pair = warp.b[column * 4 + k % 8 / 2][k / 8];
        sums[i] += widen(kept >> 16 * t & 0xffff) *
                   widen(pair >> k % 2 * 16 & 0xffff);
      }
    }
  }
  warp.barrier.wait();
}

// Runs a grid of blocks one after the other, each lane of a block in a thread.
template <typename Activation>
void emulated(void (*kernel)(const Activation*, int, int, int, const uint2*,
                             const uint2*, const float*, Activation*),
              int type, int warps, const void* x, int rows, int k, int n,
              const void* values, const void* meta, const float* scale,
              void* y) {
  x_type = type;
  blockDim.x = 32 * warps;
  for (blockIdx.x = 0; blockIdx.x < (n + 15) / 16; ++blockIdx.x) {
    Barrier barrier(blockDim.x);
    block_barrier = &barrier;
    std::vector<Warp> states(warps);
    std::vector<std::thread> threads;
    for (int i = 0; i < blockDim.x; ++i) {
      threads.emplace_back([&, i] {
        threadIdx.x = i;
        warp_of_thread = &states[i / 32];
        kernel(static_cast<const Activation*>(x), rows, k, n,
               static_cast<const uint2*>(values),
               static_cast<const uint2*>(meta), scale,
               static_cast<Activation*>(y));
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

// `emulated` for one variant of the kernel.
typedef void (*Runner)(int warps, const void* x, int rows, int k, int n,
                       const void* values, const void* meta,
                       const float* scale, void* y);

}  // namespace

#endif  // KWM_EMULATE_H_
