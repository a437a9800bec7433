// y (rows, n) = x (rows, k) @ W for a few rows and a packed 2:4 kernel W, in
// the format of kwm_native.h. The time is that of reading W once. Not yet run
// on a GPU: tests/gpu runs this source on a CPU, lane by lane, and counts the
// instructions of its assembly.
//
// NVRTC compiles this at run time, for the GPU that is there, with
//   KWM_X           type of x and y: 0 float32, 1 bfloat16, 2 float16
//   KWM_VALUES      type of the packed values, as in kwm_native.h
//   KWM_ROWS        rows that fit: 8 or 16; if x is float32 1, 2, 4 or 8
//   KWM_WARP_BYTES  shared memory of a warp, as decode.cc counts it
//
// A block of threads makes 64 columns of y. Its warps, and those of the other
// blocks of its cluster, share out the tiles of 64 rows of W. A warp copies its
// tiles into a ring of its own, kStages deep, asynchronously, with the part of x
// that belongs to them; no other warp is waited for before the end.
//
// The sparse matrix instruction multiplies A, 16 columns of W by 32 rows, and B,
// 32 rows by 8 rows of x. Lane L holds rows L / 4 and L / 4 + 8 of A, and of its
// 8 groups of 4 those numbered L % 4 and L % 4 + 4; the PTX ISA has the figures.
// Which column of W is which row of A is free: lane L takes columns 4 (L / 4) to
// 4 (L / 4) + 3 of each 32, which 16 bytes of a packed row hold, for two
// instructions. So the words of bfloat16 are the instruction's as they are.
//
// 16-bit x goes through that instruction, with W rounded to the type of x and
// sums in float32. float32 x is multiplied in float32 on the ordinary cores.

enum { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 2, kInt4 = 3 };

typedef unsigned char byte;
typedef unsigned int uint32;

// The tests compile the rest for a CPU and bring their own.
#ifndef KWM_EMULATED
#include "decode_device.cuh"
#endif

#if KWM_X == 0
typedef float Activation;
static __device__ Activation rounded(float value) { return value; }
#else
typedef unsigned short Activation;
static __device__ Activation rounded(float value) {
  return (Activation)round_pair(value, 0);
}
#endif

#include "decode_ring.cuh"
#if KWM_X == 0
#include "decode_float32.cuh"
#else
#include "decode_tensor.cuh"
#endif

constexpr int kMaxWarps = 8;

template <bool kAligned>
static __device__ void accumulate(const Problem& problem, const Lane& lane,
                                  int first_tile, int step) {
  Source source(problem, lane.ring, lane.lane, first_tile, step);
  for (int i = 0; i < kStages - 1; ++i) {
    source.copy_next<kAligned>(i * kStageBytes);
  }
  const Multiplier multiplier(lane);
  Sum sums = {};
  int stage = 0, last_stage = (kStages - 1) * kStageBytes;
  for (int tile = first_tile; 2 * tile < problem.row_blocks; tile += step) {
    wait_for_copies<kStages - 2>();
    // Of all lanes, which are also done with the stage that is filled next.
    __syncwarp();
    source.copy_next<kAligned>(last_stage);
    multiplier.add(stage, sums);
    last_stage = stage;
    stage = stage == (kStages - 1) * kStageBytes ? 0 : stage + kStageBytes;
  }
  wait_for_copies<0>();
  __syncwarp();
  multiplier.write(sums, lane.ring);
}

// Grid: for each 64 columns the blocks of one cluster, of 1 to kMaxWarps warps.
// `scale` is read with int8 and int4 values only. `values`, `meta` and the
// scales of int4 are aligned to 16 bytes.
extern "C" __global__ void __launch_bounds__(32 * kMaxWarps)
    kwm_decode(const Activation* __restrict__ x, int rows, int k, int n,
               const byte* __restrict__ values, const byte* __restrict__ meta,
               const byte* __restrict__ scale, Activation* __restrict__ y) {
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int split = gridDim.y, rank = blockIdx.y;
  const Lane lane(shared_memory() + warp * KWM_WARP_BYTES, threadIdx.x % 32);
  const Problem problem = {x,    rows,  k,     values,
                           meta, scale, (n + 15) / 16, (k + 31) / 32};
  const int first_tile = rank * warps + warp, step = split * warps;
  if (k % kEach == 0 && (unsigned long long)x % 16 == 0) {
    accumulate<true>(problem, lane, first_tile, step);
  } else {
    accumulate<false>(problem, lane, first_tile, step);
  }
  __syncthreads();

  // Always in the same order: the warps of a block, then the blocks.
  const uint32 total = shared_memory();
  for (int i = threadIdx.x; i < rows * kColumns; i += blockDim.x) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) {
      sum += load_float(total + w * KWM_WARP_BYTES + 4 * i);
    }
    store(total + 4 * i, sum);
  }
  if (split > 1) sync_cluster();
  // A thread of the only block reads what it has written itself.
  for (int i = threadIdx.x + rank * blockDim.x; i < rows * kColumns;
       i += blockDim.x * split) {
    const int row = i / kColumns, column = blockIdx.x * kColumns + i % kColumns;
    if (column >= n) continue;
    float sum = 0;
    for (int peer = 0; peer < split; ++peer) {
      sum += split > 1 ? load_from_peer(total + 4 * i, peer)
                       : load_float(total + 4 * i);
    }
    if (KWM_VALUES == kInt8) sum *= ((const float*)scale)[column];
    y[(long long)row * n + column] = rounded(sum);
  }
  // What the others read must stay until they have.
  if (split > 1) sync_cluster();
}
