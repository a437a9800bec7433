// How the tiles of a warp come into its ring in shared memory, and where what is
// asked for lies in it.

constexpr int kColumns = 64;  // of a tile, which is 64 by 64
constexpr int kRows = 64;
constexpr int kStages = 4;

// The ring is copied in chunks of 16 bytes, 32 by an instruction. This many
// chunks are the values of 32 rows of a packed block of 16 columns.
constexpr int kHalf = KWM_VALUES == kFloat32    ? 64
                      : KWM_VALUES == kBfloat16 ? 32
                      : KWM_VALUES == kInt8     ? 16
                                                : 8;
// A lane has a pointer for each block of the tile; with int4 a copy takes two.
constexpr int kPointers = KWM_VALUES == kInt4 ? 2 : 4;
constexpr int kCopies = 8 * kHalf / 32 / kPointers;

constexpr int kEach = 16 / sizeof(Activation);  // in a chunk of x
constexpr int kRowChunks = kRows / kEach;
constexpr int kXChunks = KWM_ROWS * kRowChunks;
constexpr int kXCopies = (kXChunks + 31) / 32;

constexpr int kMetaAt = 16 * 8 * kHalf;  // in a stage, behind the values
constexpr int kXAt = kMetaAt + 8 * 64;
constexpr int kScaleAt = kXAt + 16 * kXChunks;
constexpr int kStageBytes = kScaleAt + (KWM_VALUES == kInt4 ? 128 : 0);
static_assert(kStages * kStageBytes == KWM_WARP_BYTES,
              "decode.cc counts the shared memory of a warp otherwise");
static_assert(KWM_ROWS * kColumns * 4 <= KWM_WARP_BYTES, "no room for sums");

// Where a chunk of the values lies: 8 lanes that load what the instruction asks
// for then meet 8 different banks.
static __device__ constexpr int swizzled(int chunk) {
  return chunk ^ (chunk >> 2 & 6);
}

// A part of x likewise, for the 8 rows that make a matrix.
static __device__ constexpr int x_chunk(int row, int chunk) {
  return row * kRowChunks + (KWM_X == 0 ? chunk : chunk ^ row % 8);
}

struct Problem {
  const Activation* x;
  int rows, k;
  const byte *values, *meta, *scale;
  int column_blocks, row_blocks;  // of the packed format, 16 by 32
};

// Copies the tiles of a warp, by pointers that run along W and x.
struct Source {
  __device__ Source(const Problem& problem, uint32 ring, int lane,
                    int first_tile, int step)
      : problem(problem),
        lane(kept(lane)),
        tile(first_tile),
        step(step) {
    const int first_block = blockIdx.x * (kColumns / 16);
    const auto block = [&](int b) -> long long {
      return min(first_block + b, problem.column_blocks - 1);
    };
    const long long row_blocks = problem.row_blocks;
#pragma unroll
    for (int p = 0; p < kPointers; ++p) {
      const int chunk = 32 * kCopies * p + lane;
      const long long place =
          block(chunk / (2 * kHalf)) * row_blocks + 2 * first_tile;
      values[p] = problem.values + 16 * (place * kHalf + chunk % (2 * kHalf));
    }
    meta = problem.meta + 64 * (block(lane / 8) * row_blocks + 2 * first_tile) +
           16 * (lane % 8);
    const long long groups = (row_blocks + 1) / 2;
    scale = problem.scale +
            32 * (block(lane / 2 % 4) * groups + first_tile) + 16 * (lane % 2);
    values_to = kept(ring + 16 * swizzled(lane));
    others_to = kept(ring + 16 * lane);
    lower = kept(lane / kHalf % 2);
    meta_back = kept(lane / 4 % 2 * 64);
    first_place = kept(kEach * (lane % kRowChunks));
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      // Rows of x that are not there are the last one again.
      const int row = (32 * i + lane) / kRowChunks;
      x[i] = (const byte*)(problem.x +
                           (long long)min(row, problem.rows - 1) * problem.k +
                           kRows * first_tile) +
             16 * (lane % kRowChunks);
      x_to[i] = kept(ring + kXAt + 16 * x_chunk(row, lane % kRowChunks));
    }
    x_start = ring + kXAt;
  }

  // Begins to copy the next tile into a stage; rows beyond k become zero.
  template <bool kAligned>
  __device__ __forceinline__ void copy_next(int stage) {
    if (2 * tile < problem.row_blocks) {
      // The last tile may be 32 rows high.
      const bool whole = 2 * tile + 1 < problem.row_blocks;
#pragma unroll
      for (int p = 0; p < kPointers; ++p) {
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          const bool there =
              whole || (kHalf < 32 ? lower == 0 : 32 * i / kHalf % 2 == 0);
          copy16(values_to + stage + 16 * 32 * (kCopies * p + i),
                 values[p] + 16 * 32 * i, there ? 16 : 0);
        }
      }
      // Indices that are not there are those of the rows above, for zeros.
      copy16(others_to + stage + kMetaAt,
             meta - (whole ? 0 : meta_back));
      if (KWM_VALUES == kInt4) {
        copy16(others_to + stage + kScaleAt, scale, 16, lane < 8);
      }
      if (kAligned) {
        copy_x(stage);
      } else {
        load_x(x_start + stage);
      }
    }
    commit_copies();
    tile += step;
#pragma unroll
    for (int p = 0; p < kPointers; ++p) {
      values[p] += (long long)step * 2 * 16 * kHalf;
    }
    meta += (long long)step * 128;
    scale += (long long)step * 32;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      x[i] += (long long)step * kRows * sizeof(Activation);
    }
  }

  __device__ void copy_x(int stage) const {
    const int size = tile * kRows + first_place < problem.k ? 16 : 0;
#pragma unroll
    for (int i = 0; i < kXCopies; ++i) {
      copy16(x_to[i] + stage, x[i], size,
             kXChunks % 32 == 0 || lane < kXChunks);
    }
  }

  // For an x whose rows do not begin at multiples of 16 bytes.
  __device__ void load_x(uint32 to) const {
    for (int i = lane; i < KWM_ROWS * kRows; i += 32) {
      const int row = min(i / kRows, problem.rows - 1), column = i % kRows;
      const int place = tile * kRows + column;
      const Activation zero = 0;
      store(to + 16 * x_chunk(i / kRows, column / kEach) +
                column % kEach * sizeof(Activation),
            place < problem.k ? problem.x[(long long)row * problem.k + place]
                              : zero);
    }
  }

  const Problem& problem;
  int lane, tile, step;
  int lower, meta_back, first_place;
  uint32 values_to, others_to, x_to[kXCopies], x_start;
  const byte *values[kPointers], *meta, *scale, *x[kXCopies];
};

// Which words of a stage a lane reads.
struct Lane {
  __device__ Lane(uint32 ring, int lane)
      : lane(lane), columns(lane / 4), group(lane % 4), ring(ring) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // Of int8, group g is byte g / 2 of the words 2 (g % 2) and
        // 2 (g % 2) + 1; of int4 the four bits from 4 g on of words 0 and 1.
        const int row = KWM_VALUES == kFloat32    ? 2 * group + i
                        : KWM_VALUES == kBfloat16 ? group + 4 * i
                        : KWM_VALUES == kInt8     ? group % 2 * 2 + i
                                                  : i;
        const int inside = kHalf < 32 ? half * kHalf : 0;
        const int chunk = swizzled(columns / 4 * 2 * kHalf + inside + 4 * row +
                                   columns % 4);
        places[half][i] = half > 0 && kHalf >= 32 ? places[0][i]
                                                  : kept(ring + 16 * chunk);
      }
    }
    scale_place = kept(ring + kScaleAt + 8 * columns);
  }

  // The lane's four columns, of the 32 columns `unit` and the 32 rows `half`, of
  // a packed row of words: of two groups, the fourth after the other, float32
  // has slot i of group `part`, bfloat16 both slots of group i, and int8 and int4
  // have slot i of both.
  __device__ uint4 words(int stage, int unit, int half, int i,
                         int part = 0) const {
    const int outside = kHalf < 32 ? 0 : half * kHalf;
    return load4(places[half][i] + stage +
                 16 * (outside + unit * 4 * kHalf + part * 32));
  }

  // The int4 scales of these columns.
  __device__ void scales(int stage, int unit, float (&scale)[4]) const {
    const uint2 pairs = load2(scale_place + stage + 64 * unit);
    scale[0] = __uint_as_float(pairs.x << 16);
    scale[1] = __uint_as_float(pairs.x & 0xffff0000u);
    scale[2] = __uint_as_float(pairs.y << 16);
    scale[3] = __uint_as_float(pairs.y & 0xffff0000u);
  }

  // Where the indices of the upper 32 rows and the first 32 columns are.
  __device__ uint32 meta() const {
    return ring + kMetaAt + columns / 4 * 128 + columns % 4 * 16;
  }

  int lane;
  int columns;  // which four of 32
  int group;    // of 8, this one and the fourth after it
  uint32 ring, places[2][2], scale_place;
};

static __device__ uint32 word_of(const uint4& words, int i) {
  return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
}
