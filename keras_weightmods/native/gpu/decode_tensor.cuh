// Products with 16-bit x, on the tensor cores.

constexpr int kParts = KWM_ROWS / 8;  // matrices B

typedef float Sum[2][2][kParts][4];

struct Multiplier {
  __device__ explicit Multiplier(const Lane& lane) : lane(lane) {
    const int group = lane.group;
    selector = kept(KWM_VALUES == kInt8 ? 0x0400 + group / 2 * 0x0101
                                        : 0x6420 + group / 2 * 0x1111);
    second_selector = kept(selector + 0x0202);
    shift = kept(group % 2 * 4);
    low_bits = kept(KWM_VALUES == kInt4    ? 0x000f000f
                    : KWM_X == kFloat16 ? 0x00ff00ff
                                        : 0x007f007f);
    sign_bits = kept(0x00800080);
    // In 16 bits, 128 + i (bfloat16) and 1024 + i (float16) have the bits of i
    // at their end.
    bias = kept(KWM_X == kFloat16 ? (KWM_VALUES == kInt4 ? 0x64086408 : 0x64806480)
                                  : 0x43084308);

    // Lanes of groups 0 and 1 hold the indices of the upper 32 rows, those of
    // groups 2 and 3 of the lower ones: of two columns the even lanes give
    // groups 0 to 3, the odd ones 4 to 7.
    meta_place = kept(lane.meta() + group / 2 * 64);
    meta_selector = kept(group % 2 == 0 ? 0x5410 : 0x7632);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int chunk = x_chunk(lane.lane % 8, 4 * half + lane.lane / 8);
      x_places[half] = kept(lane.ring + kXAt + 16 * chunk);
    }
  }

  // Two matrices A: columns 0 and 1, and 2 and 3, of each lane's four.
  __device__ void load(int stage, int unit, int half, uint32 (&a)[2][4]) const {
    const auto words = [&](int i, int part) {
      return lane.words(stage, unit, half, i, part);
    };
    if (KWM_VALUES == kFloat32) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint4 low = words(0, part), high = words(1, part);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          a[c / 2][2 * part + c % 2] =
              round_pair(__uint_as_float(word_of(low, c)),
                         __uint_as_float(word_of(high, c)));
        }
      }
    } else if (KWM_VALUES == kBfloat16) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint4 pairs = words(part, 0);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const uint32 pair = word_of(pairs, c);
          a[c / 2][2 * part + c % 2] =
              KWM_X == kBfloat16
                  ? pair
                  : round_pair(__uint_as_float(pair << 16),
                               __uint_as_float(pair & 0xffff0000u));
        }
      }
    } else {
      const uint4 low = words(0, 0), high = words(1, 0);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32 one = word_of(low, c), two = word_of(high, c);
        const uint32 bytes = __byte_perm(one, two, selector);
        if (KWM_VALUES == kInt8) {
          a[c / 2][c % 2] = from_int8(bytes);
          a[c / 2][2 + c % 2] =
              from_int8(__byte_perm(one, two, second_selector));
        } else {
          a[c / 2][c % 2] = from_int4(bytes >> shift);
          a[c / 2][2 + c % 2] = from_int4(bytes >> shift >> 8);
        }
      }
    }
  }

  // The numbers in the low bytes of both halves.
  __device__ uint32 from_int8(uint32 bytes) const {
    if (KWM_X == kFloat16) {
      return subtract_pair((bytes & low_bits) ^ 0x64806480u, bias);
    }
    // There is room for seven bits: 128, or 256 for the sign, is taken from 128
    // + the others.
    return subtract_pair((bytes & low_bits) | 0x43004300u,
                         (bytes & sign_bits) | 0x43004300u);
  }

  __device__ uint32 from_int4(uint32 bytes) const {
    constexpr uint32 kBias = KWM_X == kFloat16 ? 0x64086408u : 0x43084308u;
    return subtract_pair((bytes & low_bits) ^ kBias, bias);
  }

  __device__ __forceinline__ void add(int stage, Sum& sums) const {
    uint32 b[2][kParts][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        load_matrices(b[half][part], x_places[half] + stage +
                                         16 * 8 * kRowChunks * part);
      }
    }
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
      const uint4 words = load4(meta_place + stage + 256 * unit);
      const uint32 meta[] = {__byte_perm(words.x, words.y, meta_selector),
                             __byte_perm(words.z, words.w, meta_selector)};
      // int4 values have a scale for these 64 rows alone.
      float fresh[2][kParts][4] = {};
      auto& to = KWM_VALUES == kInt4 ? fresh : sums[unit];
      uint32 upper[2][4], lower[2][4];
      load(stage, unit, 0, upper);
      load(stage, unit, 1, lower);
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sparse_mma<0>(to[pair][part], upper[pair], b[0][part], meta[pair]);
        }
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          sparse_mma<1>(to[pair][part], lower[pair], b[1][part], meta[pair]);
        }
      }
      if (KWM_VALUES == kInt4) {
        float scale[4];
        lane.scales(stage, unit, scale);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums[unit][pair][part][i] +=
                  scale[2 * pair + i / 2] * fresh[pair][part][i];
            }
          }
        }
      }
    }
  }

  __device__ void write(const Sum& sums, uint32 to) const {
#pragma unroll
    for (int unit = 0; unit < 2; ++unit) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = 8 * part + 2 * lane.group + i % 2;
            const int column =
                32 * unit + 4 * lane.columns + 2 * pair + i / 2;
            store(to + 4 * (row * kColumns + column),
                  sums[unit][pair][part][i]);
          }
        }
      }
    }
  }

  Lane lane;
  uint32 meta_place, x_places[2];
  uint32 selector, second_selector, shift, low_bits, sign_bits, bias;
  uint32 meta_selector;
};
