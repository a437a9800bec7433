// Rounds each row of x (rows, k) to int8: to multiples, -127 to 127, of its
// own scale, max |x| / 127. A row that holds NaN or infinity gets a NaN for its
// scale, and zeros; one too small for a normal scale gets 1, and zeros. Rows
// beyond those of x get zeros, and no scale. Not yet run on a GPU: tests/gpu runs
// this source on a CPU.
//
// NVRTC compiles this at run time, for the GPU that is there, with
//   KWM_X  type of x: 0 float32, 1 bfloat16, 2 float16
//
// A block of threads takes a row, k a multiple of 4. It reads the row twice,
// the second time from the cache; the time is that of reading x once and
// writing half of it or less.

typedef unsigned int uint32;

// The tests compile this file for a CPU and bring their own.
#ifndef KWM_EMULATED

static __device__ __forceinline__ uint32 largest_of_warp(uint32 bits) {
  return __reduce_max_sync(0xffffffffu, bits);
}

#if KWM_X == 2
static __device__ __forceinline__ void widen_pair(uint32 pair, float* x) {
  asm("{\n.reg .f16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
      : "=f"(x[0]), "=f"(x[1])
      : "r"(pair));
}
#elif KWM_X == 1
static __device__ __forceinline__ void widen_pair(uint32 pair, float* x) {
  x[0] = __uint_as_float(pair << 16);
  x[1] = __uint_as_float(pair & 0xffff0000u);
}
#endif

#endif  // KWM_EMULATED

#if KWM_X == 0

typedef float4 Four;

static __device__ __forceinline__ void load(const Four* address, float* x) {
  const Four four = *address;
  x[0] = four.x;
  x[1] = four.y;
  x[2] = four.z;
  x[3] = four.w;
}

#else

typedef uint2 Four;

static __device__ __forceinline__ void load(const Four* address, float* x) {
  const Four four = *address;
  widen_pair(four.x, x);
  widen_pair(four.y, x + 2);
}

#endif

extern "C" __global__ void __launch_bounds__(256)
    kwm_round_rows(const Four* x, int rows, int k, uint32* steps,
                   float* scales) {
  __shared__ uint32 largest_of[8];
  const int row = blockIdx.x, count = k / 4;
  const long long start = static_cast<long long>(row) * count;
  if (row >= rows) {
    for (int i = threadIdx.x; i < count; i += blockDim.x) steps[start + i] = 0;
    return;
  }

  // The bits of numbers >= 0 rise as they do, then infinity, then NaN.
  uint32 largest = 0;
  float four[4];
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    load(x + start + i, four);
    for (int t = 0; t < 4; ++t) {
      const uint32 size = __float_as_uint(four[t]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
  }
  largest = largest_of_warp(largest);
  if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int warp = 0; warp < blockDim.x / 32; ++warp) {
    largest = largest_of[warp] > largest ? largest_of[warp] : largest;
  }

  const bool is_finite = largest < 0x7f800000u;
  float scale = __uint_as_float(largest) / 127.0f;
  if (scale < 1.17549435e-38f) scale = 1.0f;
  if (!is_finite) scale = __uint_as_float(0x7fc00000u);
  if (threadIdx.x == 0) scales[row] = scale;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    load(x + start + i, four);
    uint32 word = 0;
    for (int t = 0; t < 4; ++t) {
      const int step = is_finite ? __float2int_rn(four[t] / scale) : 0;
      word |= (static_cast<uint32>(step) & 0xffu) << 8 * t;
    }
    steps[start + i] = word;
  }
}
