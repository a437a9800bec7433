// y (rows, n) = x (rows, k) @ W for a few rows and a packed 2:4 kernel W, in
// the format of kwm_native.h. The time is that of reading W once.
//
// NVRTC compiles this at run time, for the GPU that is there, with
//   KWM_X       type of x and y: 0 float32, 1 bfloat16, 2 float16
//   KWM_VALUES  type of the packed values: 0 float32, 1 bfloat16, 2 int8
//   KWM_ROWS    rows that fit: 8 or 16; if x is float32 1, 2, 4 or 8
//
// A block of threads makes 16 columns of y. Its warps share out the tiles of
// 32 rows of W; a lane takes the column pair lane / 4 and, of the 8 groups of a
// tile, the groups lane % 4 and lane % 4 + 4. That is how the sparse matrix
// instruction of sm_80 and later wants the tile in registers, with a row of its
// 16 x 32 matrix A for each column of W: lane L holds rows L / 4 and L / 4 + 8
// of A, here columns 2 (L / 4) and 2 (L / 4) + 1 of the block. (PTX ISA, matrix
// fragments for sparse mma.m16n8k32 with .f16 and .bf16 types.)
//
// 16-bit x goes through that instruction, with W rounded to the type of x and
// sums in float32. float32 x is multiplied in float32 on the ordinary cores.

enum { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 2 };

typedef unsigned int uint32;

// The tests compile this file for a CPU and bring their own.
#ifndef KWM_EMULATED

// Nothing is read twice: past the L1 cache, which is left to x.
static __device__ __forceinline__ uint2 load_once(const uint2* address) {
  uint2 value;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(address));
  return value;
}

#if KWM_X != 0

// Two floats rounded to 16 bits, the first in the low half.
static __device__ __forceinline__ uint32 round_pair(float low, float high) {
  uint32 pair;
#if KWM_X == 2
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#endif
  return pair;
}

// Rising indices, as ours are, have a faster form of the instruction.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define KWM_MMA "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define KWM_MMA "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#if KWM_X == 2
#define KWM_MMA_TYPES "f16.f16.f32 "
#else
#define KWM_MMA_TYPES "bf16.bf16.f32 "
#endif

// sums (16, 8) += A (16, 32) @ B (32, 8); lanes with lane % 4 < 2 give `meta`.
static __device__ __forceinline__ void sparse_mma(float (&sums)[4],
                                                  const uint32 (&a)[4],
                                                  const uint32 (&b)[4],
                                                  uint32 meta) {
  asm volatile(KWM_MMA KWM_MMA_TYPES
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "
               "{%0, %1, %2, %3}, %12, 0x0;"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                 "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
}

#endif  // KWM_X
#endif  // KWM_EMULATED

constexpr int kColumns = 16;  // of W, in a block
constexpr int kTileRows = 32;
constexpr int kMaxWarps = 16;
constexpr int kTilesInFlight = KWM_X == 0 ? 2 : 4;  // for each warp

// A packed tile is this many rows of 16 words, of which a lane loads some.
constexpr int kWordRows =
    KWM_VALUES == kFloat32 ? 16 : KWM_VALUES == kBfloat16 ? 8 : 4;
constexpr int kLoads = KWM_VALUES == kFloat32 ? 4 : 2;

// What a lane holds of a tile. Of each pair x is the left column.
struct Tile {
  uint2 values[kLoads];
  uint2 meta;
};

struct Lane {
  __device__ explicit Lane(int lane) : columns(lane / 4), group(lane % 4) {}

  // The row of words of this lane's load i.
  __device__ int word_row(int i) const {
    if (KWM_VALUES == kFloat32) return 2 * (group + i / 2 * 4) + i % 2;
    if (KWM_VALUES == kBfloat16) return group + 4 * i;
    return group % 2 * 2 + i;
  }

  __device__ Tile load(const uint2* values, const uint2* meta,
                       long long tile) const {
    Tile loaded;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const long long row = tile * kWordRows + word_row(i);
      loaded.values[i] = load_once(values + row * (kColumns / 2) + columns);
    }
    loaded.meta = load_once(meta + tile * (kColumns / 2) + columns);
    return loaded;
  }

  // The two kept values of group `group + 4 half` in a column.
  __device__ float2 kept(const Tile& tile, int column, int half) const {
    const auto word = [&](int i) {
      return column == 0 ? tile.values[i].x : tile.values[i].y;
    };
    if (KWM_VALUES == kFloat32) {
      return make_float2(__uint_as_float(word(2 * half)),
                         __uint_as_float(word(2 * half + 1)));
    }
    if (KWM_VALUES == kBfloat16) {
      return make_float2(__uint_as_float(word(half) << 16),
                         __uint_as_float(word(half) & 0xffff0000u));
    }
    const int byte = group / 2 + 2 * half;
    return make_float2(from_int8(word(0), byte), from_int8(word(1), byte));
  }

  // 2^23 + 128 + value has the value's bits, the sign's flipped, at its end.
  static __device__ float from_int8(uint32 word, int byte) {
    const uint32 bits =
        __byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7650 + byte);
    return __uint_as_float(bits) - 8388736.0f;
  }

  int columns;  // which pair of the block's columns
  int group;    // which groups of a tile: this one and the fourth after it
};

#if KWM_X == 0

typedef float Activation;

static __device__ Activation rounded(float value) { return value; }

// Which activations a lane needs for a tile, meta says: none is loaded ahead.
struct Operand {
  __device__ void load(const Lane&, int, const float*, int, int) {}
};

// A lane's share of the sums for its two columns.
struct Sums {
  __device__ void add(const Lane& lane, const Tile& tile, const Operand&,
                      int first_row, const float* x, int rows, int k) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int group = lane.group + 4 * half;
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const float2 weight = lane.kept(tile, column, half);
        const uint32 meta = column == 0 ? tile.meta.x : tile.meta.y;
        const int first = first_row + 4 * group + (meta >> 4 * group & 3);
        const int second = first_row + 4 * group + (meta >> (4 * group + 2) & 3);
#pragma unroll
        for (int row = 0; row < KWM_ROWS; ++row) {
          const float* x_row = x + (long long)min(row, rows - 1) * k;
          if (first < k) sums[column][row] += weight.x * __ldg(x_row + first);
          if (second < k) sums[column][row] += weight.y * __ldg(x_row + second);
        }
      }
    }
  }

  // Adds the four lanes of a column pair; one of them writes.
  __device__ void write(const Lane& lane, float (*to)[kColumns]) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
#pragma unroll
      for (int row = 0; row < KWM_ROWS; ++row) {
        float sum = sums[column][row];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane.group == 0) to[row][2 * lane.columns + column] = sum;
      }
    }
  }

  float sums[2][KWM_ROWS] = {};
};

#else

typedef unsigned short Activation;

static __device__ Activation rounded(float value) {
  return (Activation)round_pair(value, 0);
}

// A lane's part of the matrices B of a tile: 32 rows, which are columns of x,
// and 8 columns, which are rows of x.
struct Operand {
  __device__ void load(const Lane& lane, int first_row, const Activation* x,
                       int rows, int k) {
#pragma unroll
    for (int part = 0; part < KWM_ROWS / 8; ++part) {
      const int row = 8 * part + lane.columns;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int place = first_row + 8 * i + 2 * lane.group;
        b[part][i] = row < rows && place < k
                         ? __ldg((const uint32*)(x + (long long)row * k + place))
                         : 0;
      }
    }
  }

  uint32 b[KWM_ROWS / 8][4];
};

struct Sums {
  __device__ void add(const Lane& lane, const Tile& tile,
                      const Operand& operand, int, const Activation*, int,
                      int) {
    uint32 a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 weight = lane.kept(tile, i % 2, i / 2);
      a[i] = round_pair(weight.x, weight.y);
    }
    // Of two columns, the groups 0 to 3 (lanes with group 0) or 4 to 7.
    const uint32 meta = __byte_perm(tile.meta.x, tile.meta.y,
                                    lane.group % 2 == 0 ? 0x5410 : 0x7632);
#pragma unroll
    for (int part = 0; part < KWM_ROWS / 8; ++part) {
      sparse_mma(sums[part], a, operand.b[part], meta);
    }
  }

  __device__ void write(const Lane& lane, float (*to)[kColumns]) {
#pragma unroll
    for (int part = 0; part < KWM_ROWS / 8; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[8 * part + 2 * lane.group + i % 2][2 * lane.columns + i / 2] =
            sums[part][i];
      }
    }
  }

  float sums[KWM_ROWS / 8][4] = {};
};

#endif  // KWM_X

// Grid: a block for each 16 columns, of 1 to kMaxWarps warps. `scale` is read
// with int8 values only. k is even unless x is float32.
extern "C" __global__ void __launch_bounds__(32 * kMaxWarps)
    kwm_decode(const Activation* __restrict__ x, int rows, int k, int n,
               const uint2* __restrict__ values, const uint2* __restrict__ meta,
               const float* __restrict__ scale, Activation* __restrict__ y) {
  __shared__ float partial[kMaxWarps][KWM_ROWS][kColumns];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int tiles = (k + kTileRows - 1) / kTileRows;
  const long long first_tile = (long long)blockIdx.x * tiles;
  const Lane lane(threadIdx.x % 32);

  Sums sums;
  for (int tile = warp; tile < tiles; tile += kTilesInFlight * warps) {
    Tile loaded[kTilesInFlight];
    Operand operands[kTilesInFlight];
#pragma unroll
    for (int i = 0; i < kTilesInFlight; ++i) {
      const int each = tile + i * warps;
      if (each < tiles) {
        loaded[i] = lane.load(values, meta, first_tile + each);
        operands[i].load(lane, each * kTileRows, x, rows, k);
      }
    }
#pragma unroll
    for (int i = 0; i < kTilesInFlight; ++i) {
      const int each = tile + i * warps;
      if (each < tiles) {
        sums.add(lane, loaded[i], operands[i], each * kTileRows, x, rows, k);
      }
    }
  }
  sums.write(lane, partial[warp]);
  __syncthreads();

  for (int i = threadIdx.x; i < rows * kColumns; i += blockDim.x) {
    const int row = i / kColumns, column = blockIdx.x * kColumns + i % kColumns;
    if (column >= n) continue;
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += partial[w][row][i % kColumns];
    if (KWM_VALUES == kInt8) sum *= scale[column];
    y[(long long)row * n + column] = rounded(sum);
  }
}
