// Products with float32 x, on the ordinary cores.

typedef float Sum[2][4][KWM_ROWS];  // of 32 columns a lane has four

struct Multiplier {
  __device__ explicit Multiplier(const Lane& lane) : lane(lane) {
    meta_place = kept(lane.meta());
    x_place = kept(lane.ring + kXAt + 16 * lane.group);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int group = lane.group + 4 * part;
      const int slot = KWM_VALUES == kInt8 ? group / 2 : group;
      left[part] = kept(32 - kBits - kBits * slot);
      right[part] = kept(4 * group);
    }
  }

  // The two kept values of a group, for four columns.
  __device__ void load(int stage, int unit, int half, int part,
                       float (&first)[4], float (&second)[4]) const {
    if (KWM_VALUES == kFloat32) {
      const uint4 low = lane.words(stage, unit, half, 0, part);
      const uint4 high = lane.words(stage, unit, half, 1, part);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        first[c] = __uint_as_float(word_of(low, c));
        second[c] = __uint_as_float(word_of(high, c));
      }
    } else if (KWM_VALUES == kBfloat16) {
      const uint4 pairs = lane.words(stage, unit, half, part);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        first[c] = __uint_as_float(word_of(pairs, c) << 16);
        second[c] = __uint_as_float(word_of(pairs, c) & 0xffff0000u);
      }
    } else {
      const uint4 low = lane.words(stage, unit, half, 0);
      const uint4 high = lane.words(stage, unit, half, 1);
      float scale[4] = {1, 1, 1, 1};
      if (KWM_VALUES == kInt4) lane.scales(stage, unit, scale);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        first[c] = from_slot(word_of(low, c), part) * scale[c];
        second[c] = from_slot(word_of(high, c), part) * scale[c];
      }
    }
  }

  // A slot is a byte, or half of one: its sign is moved to the top and back.
  __device__ float from_slot(uint32 word, int part) const {
    return (float)((int)(word << left[part]) >> (32 - kBits));
  }

  __device__ __forceinline__ void add(int stage, Sum& sums) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        const uint4 meta =
            load4(meta_place + stage + 256 * unit + 64 * half);
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float first[4], second[4];
          load(stage, unit, half, part, first, second);
          const uint32 x = x_place + stage + 128 * half + 64 * part;
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const uint32 places = word_of(meta, c) >> right[part];
            const uint32 one = x + 4 * (places & 3);
            const uint32 two = x + 4 * (places >> 2 & 3);
#pragma unroll
            for (int row = 0; row < KWM_ROWS; ++row) {
              sums[unit][c][row] += first[c] * load_float(one + 4 * kRows * row);
              sums[unit][c][row] +=
                  second[c] * load_float(two + 4 * kRows * row);
            }
          }
        }
      }
    }
  }

  // Adds the four lanes of the same columns; one of them writes.
  __device__ void write(const Sum& sums, uint32 to) const {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
#pragma unroll
        for (int row = 0; row < KWM_ROWS; ++row) {
          float sum = sums[unit][c][row];
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (lane.group == 0) {
            const int column = 32 * unit + 4 * lane.columns + c;
            store(to + 4 * (row * kColumns + column), sum);
          }
        }
      }
    }
  }

  static constexpr int kBits = KWM_VALUES == kInt4 ? 4 : 8;

  Lane lane;
  uint32 meta_place, x_place, left[2], right[2];
};
