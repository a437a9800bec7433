// Random kernels, shapes and calls against plain loops in double, on every
// instruction set of this machine, with and without threads. Made to run under
// sanitizers: each array is an allocation of exactly its size.
//
//     check SECONDS SEED
//
// Half of the kernels are valid, the other half random bits.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kwm_native.h"

namespace {

using Random = std::mt19937_64;

// Not a vector: its storage may be larger than its size.
template <class T>
struct Array {
  explicit Array(int64_t size)
      : size(size), data(new T[static_cast<size_t>(size)]()) {}
  T& operator[](int64_t i) { return data[static_cast<size_t>(i)]; }
  T* get() { return data.get(); }
  int64_t size;
  std::unique_ptr<T[]> data;
};

int64_t between(Random& random, int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random);
}

float normal(Random& random) {
  return std::normal_distribution<float>()(random);
}

// A quarter of the sizes lie next to where a kernel or a tile ends.
int64_t any_size(Random& random, int64_t most) {
  if (between(random, 0, 3) > 0) return between(random, 0, most);
  static const int64_t edges[] = {1,  4,  8,  12,  16,  24,  32,
                                  48, 64, 96, 128, 192, 256, 512};
  const int64_t edge = edges[between(random, 0, 13)];
  return std::min(most, edge + between(random, -1, 1));
}

struct Pool {
  int threads;
};

void parallel_for(void* pool, int64_t count, int64_t grain, kwm_task task,
                  void* context) {
  const int64_t parts = static_cast<Pool*>(pool)->threads;
  const int64_t step = std::max(grain, (count + parts - 1) / parts);
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += step) {
    threads.emplace_back(task, context, begin, std::min(count, begin + step));
  }
  for (auto& thread : threads) thread.join();
}

bool close(const char* what, float got, double expected, double size,
           double rounding = 0) {
  // A sum of terms of this size, rounded in float32 at every step; and what
  // the rounding of its activations may add.
  if (fabs(got - expected) <= 1e-5 * size + rounding + 1e-30) return true;
  printf("%s: %.9g, expected %.9g (terms sum up to %.3g)\n", what, got,
         expected, size);
  return false;
}

float from_high_half(uint32_t half) {
  const uint32_t bits = half << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint16_t high_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// A packed kernel of random bits, and what it holds by the layout.
struct Weights {
  Weights(Random& random, int64_t k, int64_t n, int type, bool dense,
          bool valid, bool masked = false)
      : row_blocks((k + 31) / 32),
        places((n + 15) / 16 * row_blocks),
        dense(dense),
        values(places * 256 * (dense ? 2 : 1) * kBits[type] / 8),
        meta(dense ? 0 : places * 16),
        scale(type == KWM_INT8  ? (n + 15) / 16 * 64
              : type > KWM_INT8 ? (n + 15) / 16 * ((row_blocks + 1) / 2) * 32
                                : 0),
        kernel(32 * row_blocks * n),
        scale_of(row_blocks * n) {
    fill(random, type, valid && !masked);
    // Words without a bit, with all of them, and with a quarter.
    for (int64_t i = 0; masked && valid && i < meta.size; ++i) {
      const int64_t kind = between(random, 0, 5);
      meta[i] = kind < 2 ? 0 - static_cast<uint32_t>(kind)
                         : meta[i] & static_cast<uint32_t>(random());
    }
    std::vector<int> numbers;
    if (masked) numbers = numbers_of_bits();
    for (int64_t column = 0; column < n; ++column) {
      const int64_t lane = column % 16;
      for (int64_t b = 0; b < row_blocks; ++b) {
        const int64_t place = column / 16 * row_blocks + b;
        for (int slot = 0; slot < (dense || masked ? 32 : 16); ++slot) {
          int64_t row = 32 * b + slot;
          int at = slot;
          int64_t from = lane;
          if (masked) {
            const int number = numbers[static_cast<size_t>(
                place * 512 + slot / 4 * 64 + lane * 4 + slot % 4)];
            if (number < 0) continue;
            // Which slot of the layout of 2:4 values has it.
            at = number / 64 + number % 4 * 4;
            from = number / 4 % 16;
          } else if (!dense) {
            const uint32_t bits = meta[place * 16 + lane];
            row = 32 * b + slot / 2 * 4 + (bits >> (2 * slot) & 3);
          }
          const double value = value_at(type, place, at, from);
          kernel[row * n + column] += value;
          largest = std::max(largest, fabs(value));
        }
        double& own = scale_of[b * n + column];
        own = 1;
        if (type == KWM_INT8) {
          float value;
          memcpy(&value, scale.get() + 4 * column, 4);
          own = value;
        }
        if (type > KWM_INT8) {
          const int64_t group = column / 16 * ((row_blocks + 1) / 2) + b / 2;
          uint16_t half;
          memcpy(&half, scale.get() + 2 * (group * 16 + lane), 2);
          own = from_high_half(half);
        }
        largest_scale = std::max(largest_scale, fabs(own));
      }
    }
  }

  const void* scale_or_null() { return scale.size ? scale.get() : nullptr; }
  const uint32_t* meta_or_null() { return dense ? nullptr : meta.get(); }
  double at(int64_t row, int64_t column, int64_t n) {
    return kernel[row * n + column] * scale_of[row / 32 * n + column];
  }

  static constexpr int kBits[] = {32, 16, 8, 4, 2, 3, 5, 6};
  int64_t row_blocks, places;
  bool dense;
  Array<unsigned char> values;
  Array<uint32_t> meta;
  Array<unsigned char> scale;
  Array<double> kernel, scale_of;  // without its scale, and that of each block
  double largest = 0, largest_scale = 0;

 private:
  void fill(Random& random, int type, bool valid) {
    for (int64_t i = 0; i < values.size; ++i) {
      values[i] = static_cast<unsigned char>(random());
      if (type == KWM_INT8 && values[i] == 128) values[i] = 127;
    }
    // Of floats and scales no random bits.
    auto* array = type >= KWM_INT8 ? &scale : &values;
    const bool halves = type == KWM_BFLOAT16 || type > KWM_INT8;
    for (int64_t i = 0; i < array->size; i += halves ? 2 : 4) {
      const float value = normal(random);
      const uint16_t half = high_half(value);
      if (halves) memcpy(array->get() + i, &half, 2);
      if (!halves) memcpy(array->get() + i, &value, 4);
    }
    // Rising places of two values in each group.
    static const uint32_t pairs[] = {4, 8, 12, 9, 13, 14};
    for (int64_t i = 0; i < meta.size; ++i) {
      meta[i] = static_cast<uint32_t>(random());
      if (!valid) continue;
      meta[i] = 0;
      for (int g = 0; g < 8; ++g) {
        meta[i] |= pairs[between(random, 0, 5)] << (4 * g);
      }
    }
  }

  // Of each bit of a mask, how many come before it in its block; -1 where it is
  // not set, or there is no value for it.
  std::vector<int> numbers_of_bits() {
    std::vector<int> numbers;
    int next = 0;
    for (int64_t i = 0; i < places * 512; ++i) {
      if (i % 512 == 0) next = 0;
      const bool kept = (meta[i / 32] >> (i % 32) & 1) != 0 && next < 256;
      numbers.push_back(kept ? next++ : -1);
    }
    return numbers;
  }

  double value_at(int type, int64_t place, int slot, int64_t lane) {
    if (type == KWM_FLOAT32) {
      float value;
      memcpy(&value, values.get() + 4 * ((place * 16 + slot) * 16 + lane), 4);
      return value;
    }
    if (type == KWM_BFLOAT16) {
      const int64_t pair = (place * 8 + slot / 2) * 16 + lane;
      uint16_t half;
      memcpy(&half, values.get() + 2 * (2 * pair + slot % 2), 2);
      return from_high_half(half);
    }
    if (dense && type > KWM_INT8) {
      return dense_at(kBits[type], place, slot, lane);
    }
    const int64_t words = (dense ? 8 : 4) / (type == KWM_INT4 ? 2 : 1);
    int64_t word = dense ? slot / 4 : slot % 4;
    const int64_t q = dense ? slot % 4 : slot / 4;
    const bool high = type == KWM_INT4 && word >= words;
    if (high) word -= words;
    const int byte = values[((place * words + word) * 16 + lane) * 4 + q];
    if (type == KWM_INT8) return byte < 128 ? byte : byte - 256;
    const int half = high ? byte >> 4 : byte & 15;
    return half < 8 ? half : half - 16;
  }

  // Bit by bit: those of words that a line holds whole, then those of the rest.
  double dense_at(int bits, int64_t place, int row, int64_t lane) {
    const int whole = 8 / bits * bits, word = row / 4;
    int value = 0;
    for (int bit = 0; bit < bits; ++bit) {
      int line = word % bits, at = word / bits * bits + bit;
      if (word >= whole) {
        const int rest = (word - whole) * bits + bit;
        line = rest / (8 - whole);
        at = whole + rest % (8 - whole);
      }
      const int64_t first = ((place * bits + line) * 16 + lane) * 4;
      value |= (values[first + row % 4] >> at & 1) << bit;
    }
    return value < 1 << (bits - 1) ? value : value - (1 << bits);
  }
};

struct Case {
  explicit Case(uint64_t seed) : random(seed) {
    k = any_size(random, 300);
    n = any_size(random, 150);
    rows = any_size(random, between(random, 0, 9) ? 70 : 600);
    type = static_cast<int>(between(random, 0, 7));
    valid = between(random, 0, 1) == 1;
    pool.threads = static_cast<int>(between(random, 1, 4));
    threaded = between(random, 0, 1) == 1;
  }

  bool run();
  bool run_products();
  bool run_bfloat16(const Array<float>& floats, Weights& w, double meeting);
  bool run_int8(bool dense, bool masked = false);
  bool run_attend();

  Random random;
  int64_t k, n, rows;
  int type;
  bool valid, threaded;
  Pool pool;
};

bool Case::run() {
  std::vector<int> sets;
  for (int isa = KWM_ISA_SCALAR; isa <= KWM_ISA_AMX; ++isa) {
    if (kwm_set_isa(isa) == isa) sets.push_back(isa);
  }
  kwm_set_isa(sets[static_cast<size_t>(
      between(random, 0, static_cast<int64_t>(sets.size()) - 1))]);
  if (type >= KWM_INT8 && !run_int8(true)) return false;
  if (type > KWM_INT4) return true;
  if (type >= KWM_INT8 && (!run_int8(false) || !run_int8(false, true))) {
    return false;
  }
  return run_products() && run_attend();
}

// int8 activations by random bits, in exact integers.
bool Case::run_int8(bool dense, bool masked) {
  Weights w(random, k, n, type, dense, valid, masked);
  Array<float> x(rows * k), y(rows * n);
  for (int64_t i = 0; i < x.size; ++i) x[i] = normal(random);
  // A row of zeros, an outlier and something that is not finite, at times.
  const int64_t bad_row = rows > 1 ? between(random, 0, 4 * rows) : rows;
  if (bad_row < rows && k > 0) {
    const float odd[] = {INFINITY, -INFINITY, NAN};
    x[bad_row * k + between(random, 0, k - 1)] = odd[between(random, 0, 2)];
  }
  if (k > 0 && rows > 0) {
    const int64_t row = between(random, 0, rows - 1);
    if (row != bad_row) {
      const bool zeros = between(random, 0, 1) == 1;
      for (int64_t i = 0; zeros && i < k; ++i) x[row * k + i] = 0;
      x[row * k + between(random, 0, k - 1)] = 1e4f * normal(random);
    }
  }
  for (int64_t i = 0; i < y.size; ++i) y[i] = 0.125f;
  kwm_matmul_int8(x.get(), rows, k, n, type + (masked ? KWM_MASKED : 0),
                  w.values.get(), w.meta_or_null(), w.scale_or_null(), y.get(),
                  threaded ? parallel_for : nullptr, &pool);

  // Those of tiles are rounded to bfloat16, and so are the scaled values.
  const bool tiles = kwm_isa() == KWM_ISA_AMX && rows >= 32;
  const double rounding = tiles ? 0.01 : 0;
  Array<double> q(32);
  Array<double> sum(n), size(n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < n; ++i) sum[i] = size[i] = 0;
    for (int64_t b = 0; b < w.row_blocks; ++b) {
      const int64_t here = std::min<int64_t>(32, k - 32 * b);
      const float* from = x.get() + row * k + 32 * b;
      float largest = 0;
      for (int64_t i = 0; i < here; ++i) {
        largest = std::max(largest, fabsf(from[i]));
      }
      const float step = largest > 0 && !tiles ? largest / 127 : 1;
      for (int64_t i = 0; i < here; ++i) {
        q[i] = tiles ? from[i] : nearbyintf(from[i] / step);
        if (row == bad_row) q[i] = 0;
      }
      for (int64_t column = 0; column < n; ++column) {
        double exact = 0, terms = 0;
        for (int64_t i = 0; i < here; ++i) {
          const double term = q[i] * w.kernel[(32 * b + i) * n + column];
          exact += term;
          terms += fabs(term);
        }
        const double scale = step * w.scale_of[b * n + column];
        sum[column] += exact * scale;
        size[column] += fabs(scale) * (tiles ? terms : fabs(exact));
      }
    }
    for (int64_t column = 0; column < n; ++column) {
      const float got = y[row * n + column];
      if (row == bad_row && k > 0) {
        if (got != got) continue;
        printf("int8: a row that is not finite gave %.9g\n", got);
        return false;
      }
      const char* what = dense ? "dense int8" : masked ? "masked int8" : "int8";
      if (!close(what, got, sum[column], size[column],
                 rounding * size[column])) {
        return false;
      }
    }
  }
  return true;
}

// Some queries of each sequence; what the mask hides at the end is not there.
bool Case::run_attend() {
  const int64_t batch = between(random, 0, 3), places = any_size(random, 80),
                queries = threaded ? any_size(random, 60) : 1,
                key_heads = between(random, 1, 3),
                heads = key_heads * between(random, 1, 5),
                size = 16 * between(random, 1, 5);
  const float scale = static_cast<float>(between(random, 0, 4)) / 8;
  Array<float> q(batch * queries * heads * size), out(q.size);
  for (int64_t i = 0; i < out.size; ++i) out[i] = 1;
  // More than that of a sequence, but for the last one.
  const int64_t sequence = places * key_heads * size,
                stride = sequence + between(random, 0, 40);
  Array<float> keys(batch ? (batch - 1) * stride + sequence : 0),
      values(keys.size);
  Array<unsigned char> mask(batch * queries * places);
  for (auto* array : {&q, &keys, &values}) {
    for (int64_t i = 0; i < array->size; ++i) (*array)[i] = normal(random);
  }
  for (int64_t i = 0; i < mask.size; ++i) mask[i] = between(random, 0, 2) > 0;
  const bool masked = between(random, 0, 3) > 0;
  kwm_attend(q.get(), keys.get(), values.get(), stride,
             masked ? mask.get() : nullptr, batch, queries, places, heads,
             key_heads, size, scale, out.get(),
             threaded ? parallel_for : nullptr, &pool);
  if (places == 0) {
    for (int64_t i = 0; i < out.size; ++i) {
      if (out[i] != 0) return false;
    }
    return true;
  }
  for (int64_t item = 0; item < batch * queries * heads; ++item) {
    const int64_t query = item / heads, row = query / queries,
                  head = item % heads / (heads / key_heads);
    const auto at = [&](int64_t place) {
      return row * stride + (place * key_heads + head) * size;
    };
    std::vector<double> weights;
    bool any = false;
    for (int64_t place = 0; place < places; ++place) {
      any = any || mask[query * places + place];
    }
    double sum = 0;
    for (int64_t place = 0; place < places; ++place) {
      double score = 0;
      for (int64_t i = 0; i < size; ++i) {
        score += double{q[item * size + i]} * keys[at(place) + i];
      }
      const bool seen = !masked || mask[query * places + place];
      weights.push_back(masked && !any ? 1 : seen ? exp(scale * score) : 0);
      sum += weights.back();
    }
    for (int64_t i = 0; i < size; ++i) {
      double exact = 0, terms = 0;
      for (int64_t place = 0; place < places; ++place) {
        const double term =
            weights[static_cast<size_t>(place)] / sum * values[at(place) + i];
        exact += term;
        terms += fabs(term);
      }
      if (!close("attend", out[item * size + i], exact, terms)) return false;
    }
  }
  return true;
}

// The same product of activations cut to bfloat16.
bool Case::run_bfloat16(const Array<float>& floats, Weights& w,
                        double meeting) {
  Array<uint16_t> x(rows * k), y(rows * n);
  Array<float> cut(rows * k);
  for (int64_t i = 0; i < x.size; ++i) {
    x[i] = high_half(floats.data[static_cast<size_t>(i)]);
    cut[i] = from_high_half(x[i]);
  }
  for (int64_t i = 0; i < y.size; ++i) y[i] = 0x7fc0;
  kwm_matmul_bfloat16(x.get(), rows, k, n, w.values.get(), w.meta.get(),
                      y.get(), threaded ? parallel_for : nullptr, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    double activations = 0;
    for (int64_t i = 0; i < k; ++i) activations += fabs(cut[row * k + i]);
    for (int64_t column = 0; column < n; ++column) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term =
            double{cut[row * k + i]} * w.at(i, column, n);
        sum += term;
        size += fabs(term);
      }
      const float got = from_high_half(y[row * n + column]);
      // Rounded to 8 bits of significand, once.
      if (!close("bfloat16", got, sum, size,
                 fabs(sum) / 256 + meeting * activations)) {
        return false;
      }
    }
  }
  return true;
}

bool Case::run_products() {
  Weights w(random, k, n, type, false, valid);
  // Where two values of a group meet in one row they may cancel, but not their
  // roundings.
  const double meeting = valid ? 0 : 1e-7 * w.largest * w.largest_scale;
  const kwm_parallel_for loop = threaded ? parallel_for : nullptr;
  Array<float> x(rows * k), dy(rows * n), y(rows * n), dx(rows * k);
  for (int64_t i = 0; i < x.size; ++i) x[i] = normal(random);
  for (int64_t i = 0; i < dy.size; ++i) dy[i] = normal(random);
  for (int64_t i = 0; i < y.size; ++i) y[i] = NAN;
  for (int64_t i = 0; i < dx.size; ++i) dx[i] = NAN;

  kwm_matmul(x.get(), rows, k, n, type, w.values.get(), w.meta.get(),
             w.scale_or_null(), y.get(), loop, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double sum = 0, size = 0, activations = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term = x[row * k + i] * w.at(i, column, n);
        activations += fabs(x[row * k + i]);
        sum += term;
        size += fabs(term);
      }
      if (!close("matmul", y[row * n + column], sum, size,
                 meeting * activations)) {
        return false;
      }
    }
  }

  if (type == KWM_BFLOAT16 && !run_bfloat16(x, w, meeting)) return false;

  kwm_matmul_transposed(dy.get(), rows, k, n, type, w.values.get(),
                        w.meta.get(), w.scale_or_null(), dx.get(), loop, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0, size = 0, activations = 0;
      for (int64_t column = 0; column < n; ++column) {
        activations += fabs(dy[row * n + column]);
        const double term =
            static_cast<double>(dy[row * n + column]) * w.at(i, column, n);
        sum += term;
        size += fabs(term);
      }
      if (!close("transposed", dx[row * k + i], sum, size,
                 meeting * activations)) {
        return false;
      }
    }
  }

  Array<float> dvalues(w.places * 256);
  for (int64_t i = 0; i < dvalues.size; ++i) dvalues[i] = NAN;
  kwm_values_gradient(x.get(), dy.get(), rows, k, n, w.meta.get(),
                      dvalues.get(), loop, &pool);
  for (int64_t i = 0; i < dvalues.size; ++i) {
    const int64_t lane = i % 16, slot = i / 16 % 16;
    const int64_t block = i / 256 % w.row_blocks;
    const int64_t column = i / 256 / w.row_blocks * 16 + lane;
    const uint32_t word = w.meta[i / 256 * 16 + lane];
    const int64_t row = block * 32 + slot / 2 * 4 + (word >> (2 * slot) & 3);
    double sum = 0, size = 0;
    if (row < k && column < n) {
      for (int64_t r = 0; r < rows; ++r) {
        const double term =
            static_cast<double>(x[r * k + row]) * dy[r * n + column];
        sum += term;
        size += fabs(term);
      }
    }
    if (!close("gradient", dvalues[i], sum, size)) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto end = std::chrono::steady_clock::now() +
                   std::chrono::duration<double>(atof(argv[1]));
  uint64_t seed = strtoull(argv[2], nullptr, 10);
  int64_t count = 0;
  do {
    Case random_case(seed);
    if (!random_case.run()) {
      printf("seed %llu: k %lld, n %lld, rows %lld, type %d, valid %d, isa %d, "
             "threads %d\n",
             static_cast<unsigned long long>(seed),
             static_cast<long long>(random_case.k),
             static_cast<long long>(random_case.n),
             static_cast<long long>(random_case.rows), random_case.type,
             random_case.valid, kwm_isa(),
             random_case.threaded ? random_case.pool.threads : 0);
      return 1;
    }
    ++seed;
    ++count;
  } while (std::chrono::steady_clock::now() < end);
  printf("%lld cases\n", static_cast<long long>(count));
  return 0;
}
