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

struct Case {
  explicit Case(uint64_t seed) : random(seed) {
    k = any_size(random, 300);
    n = any_size(random, 150);
    rows = any_size(random, between(random, 0, 9) ? 70 : 600);
    type = static_cast<int>(between(random, 0, 3));
    valid = between(random, 0, 1) == 1;
    pool.threads = static_cast<int>(between(random, 1, 4));
    threaded = between(random, 0, 1) == 1;
  }

  bool run();
  bool run_products();
  bool run_bfloat16(const Array<float>& floats, const void* values,
                    const uint32_t* meta, Array<float>& kernel,
                    double meeting);
  bool run_int8(bool dense);
  bool run_attend();

  Random random;
  int64_t k, n, rows;
  int type;
  bool valid, threaded;
  Pool pool;
};

bool Case::run() {
  std::vector<int> sets;
  for (int isa = KWM_ISA_SCALAR; isa <= KWM_ISA_AVX_VNNI; ++isa) {
    if (kwm_set_isa(isa) == isa) sets.push_back(isa);
  }
  kwm_set_isa(sets[static_cast<size_t>(
      between(random, 0, static_cast<int64_t>(sets.size()) - 1))]);
  if (type >= KWM_INT8 && !(run_int8(false) && run_int8(true))) return false;
  return run_products() && run_attend();
}

// int8 activations by random bits, in exact integers.
bool Case::run_int8(bool dense) {
  const int64_t row_blocks = (k + 31) / 32;
  Array<unsigned char> values(dense ? kwm_dense_values_bytes(k, n, type)
                                    : kwm_values_bytes(k, n, type));
  Array<uint32_t> meta(dense ? 0 : kwm_meta_bytes(k, n) / 4);
  for (int64_t i = 0; i < values.size; ++i) {
    values[i] = static_cast<unsigned char>(random());
    if (type == KWM_INT8 && values[i] == 128) values[i] = 127;
  }
  for (int64_t i = 0; i < meta.size; ++i) {
    meta[i] = static_cast<uint32_t>(random());
  }
  const int64_t scales =
      kwm_scale_bytes(k, n, type) / (type == KWM_INT8 ? 4 : 2);
  Array<float> scale(type == KWM_INT8 ? scales : 0);
  Array<uint16_t> halves(type == KWM_INT8 ? 0 : scales);
  for (int64_t i = 0; i < scale.size; ++i) scale[i] = normal(random);
  for (int64_t i = 0; i < halves.size; ++i) {
    const float value = normal(random);
    uint32_t bits;
    memcpy(&bits, &value, 4);
    halves[i] = static_cast<uint16_t>(bits >> 16);
  }

  // The integers of W, and their scales, from the layout.
  Array<int> kernel(32 * row_blocks * n);
  Array<double> scale_of(row_blocks * n);
  for (int64_t column = 0; column < n; ++column) {
    const int64_t lane = column % 16;
    for (int64_t b = 0; b < row_blocks; ++b) {
      const int64_t place = column / 16 * row_blocks + b;
      const int64_t words = (dense ? 8 : 4) / (type == KWM_INT4 ? 2 : 1);
      for (int slot = 0; slot < (dense ? 32 : 16); ++slot) {
        int64_t word = dense ? slot / 4 : slot % 4;
        const int64_t q = dense ? slot % 4 : slot / 4;
        const bool high = type == KWM_INT4 && word >= words;
        if (high) word -= words;
        const int byte = values[((place * words + word) * 16 + lane) * 4 + q];
        int value = byte < 128 ? byte : byte - 256;
        if (type == KWM_INT4) {
          const int half = high ? byte >> 4 : byte & 15;
          value = half < 8 ? half : half - 16;
        }
        int64_t row = 32 * b + slot;
        if (!dense) {
          const uint32_t bits = meta[place * 16 + lane];
          row = 32 * b + slot / 2 * 4 + (bits >> (2 * slot) & 3);
        }
        kernel[row * n + column] += value;
      }
      if (type == KWM_INT8) {
        scale_of[b * n + column] = scale[column];
      } else {
        const int64_t group = column / 16 * ((row_blocks + 1) / 2) + b / 2;
        const uint32_t bits = static_cast<uint32_t>(halves[group * 16 + lane])
                              << 16;
        float value;
        memcpy(&value, &bits, 4);
        scale_of[b * n + column] = value;
      }
    }
  }

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
  kwm_matmul_int8(x.get(), rows, k, n, type, values.get(),
                  dense ? nullptr : meta.get(),
                  type == KWM_INT8 ? static_cast<const void*>(scale.get())
                                   : halves.get(),
                  y.get(), threaded ? parallel_for : nullptr, &pool);

  Array<int> q(32);
  Array<double> sum(n), size(n);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < n; ++i) sum[i] = size[i] = 0;
    for (int64_t b = 0; b < row_blocks; ++b) {
      const int64_t here = std::min<int64_t>(32, k - 32 * b);
      const float* from = x.get() + row * k + 32 * b;
      float largest = 0;
      for (int64_t i = 0; i < here; ++i) {
        largest = std::max(largest, fabsf(from[i]));
      }
      const float step = largest > 0 ? largest / 127 : 1;
      for (int64_t i = 0; i < here; ++i) {
        const float steps = nearbyintf(from[i] / step);
        q[i] = row == bad_row ? 0 : static_cast<int>(steps);
      }
      for (int64_t column = 0; column < n; ++column) {
        int64_t exact = 0;
        for (int64_t i = 0; i < here; ++i) {
          exact += q[i] * kernel[(32 * b + i) * n + column];
        }
        const double term = static_cast<double>(exact) * step *
                            scale_of[b * n + column];
        sum[column] += term;
        size[column] += fabs(term);
      }
    }
    for (int64_t column = 0; column < n; ++column) {
      const float got = y[row * n + column];
      if (row == bad_row && k > 0) {
        if (got != got) continue;
        printf("int8: a row that is not finite gave %.9g\n", got);
        return false;
      }
      if (!close(dense ? "dense int8" : "int8", got, sum[column],
                 size[column])) {
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
bool Case::run_bfloat16(const Array<float>& floats, const void* values,
                        const uint32_t* meta, Array<float>& kernel,
                        double meeting) {
  Array<uint16_t> x(rows * k), y(rows * n);
  Array<float> cut(rows * k);
  for (int64_t i = 0; i < x.size; ++i) {
    uint32_t bits;
    memcpy(&bits, floats.data.get() + i, 4);
    x[i] = static_cast<uint16_t>(bits >> 16);
    bits &= 0xffff0000;
    memcpy(cut.get() + i, &bits, 4);
  }
  for (int64_t i = 0; i < y.size; ++i) y[i] = 0x7fc0;
  kwm_matmul_bfloat16(x.get(), rows, k, n, values, meta, y.get(),
                      threaded ? parallel_for : nullptr, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    double activations = 0;
    for (int64_t i = 0; i < k; ++i) activations += fabs(cut[row * k + i]);
    for (int64_t column = 0; column < n; ++column) {
      double sum = 0, size = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double term =
            double{cut[row * k + i]} * kernel[i * n + column];
        sum += term;
        size += fabs(term);
      }
      const uint32_t bits = static_cast<uint32_t>(y[row * n + column]) << 16;
      float got;
      memcpy(&got, &bits, 4);
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
  Array<float> kernel(k * n);
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t group = 0; group < k; group += 4) {
      for (int kept = 0; kept < 2; ++kept) {
        const int64_t row = group + between(random, 0, 3);
        if (row < k) kernel[row * n + column] = normal(random);
      }
    }
  }
  Array<unsigned char> values(kwm_values_bytes(k, n, type));
  Array<uint32_t> meta(kwm_meta_bytes(k, n) / 4);
  Array<float> floats(type == KWM_INT8 ? kwm_scale_bytes(k, n, type) / 4 : 0);
  Array<uint16_t> halves(type == KWM_INT4 ? kwm_scale_bytes(k, n, type) / 2
                                          : 0);
  void* scale_or_null = nullptr;
  if (type == KWM_INT8) scale_or_null = floats.get();
  if (type == KWM_INT4) scale_or_null = halves.get();
  if (kwm_pack(kernel.get(), k, n, type, values.get(), meta.get(),
               scale_or_null) != 0) {
    printf("a valid kernel was refused\n");
    return false;
  }
  // Where two values of a group meet in one row they may cancel, but not their
  // roundings.
  double meeting = 0;
  if (!valid) {
    for (int64_t i = 0; i < kernel.size; ++i) {
      meeting = std::max(meeting, fabs(1e-7 * kernel[i]));
    }
    for (int64_t i = 0; i < meta.size; ++i) {
      meta[i] = static_cast<uint32_t>(random());
    }
  }
  kwm_unpack(values.get(), meta.get(), scale_or_null, k, n, type, kernel.get());

  const kwm_parallel_for loop = threaded ? parallel_for : nullptr;
  Array<float> x(rows * k), dy(rows * n), y(rows * n), dx(rows * k);
  for (int64_t i = 0; i < x.size; ++i) x[i] = normal(random);
  for (int64_t i = 0; i < dy.size; ++i) dy[i] = normal(random);
  for (int64_t i = 0; i < y.size; ++i) y[i] = NAN;
  for (int64_t i = 0; i < dx.size; ++i) dx[i] = NAN;

  kwm_matmul(x.get(), rows, k, n, type, values.get(), meta.get(), scale_or_null,
             y.get(), loop, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      double sum = 0, size = 0, activations = 0;
      for (int64_t i = 0; i < k; ++i) {
        const double w = kernel[i * n + column];
        activations += fabs(x[row * k + i]);
        sum += x[row * k + i] * w;
        size += fabs(x[row * k + i] * w);
      }
      if (!close("matmul", y[row * n + column], sum, size,
                 meeting * activations)) {
        return false;
      }
    }
  }

  if (type == KWM_BFLOAT16 &&
      !run_bfloat16(x, values.get(), meta.get(), kernel, meeting)) {
    return false;
  }

  kwm_matmul_transposed(dy.get(), rows, k, n, type, values.get(), meta.get(),
                        scale_or_null, dx.get(), loop, &pool);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      double sum = 0, size = 0, activations = 0;
      for (int64_t column = 0; column < n; ++column) {
        activations += fabs(dy[row * n + column]);
        const double term =
            static_cast<double>(dy[row * n + column]) * kernel[i * n + column];
        sum += term;
        size += fabs(term);
      }
      if (!close("transposed", dx[row * k + i], sum, size,
                 meeting * activations)) {
        return false;
      }
    }
  }

  Array<float> dvalues(kwm_values_bytes(k, n, KWM_FLOAT32) / 4);
  for (int64_t i = 0; i < dvalues.size; ++i) dvalues[i] = NAN;
  kwm_values_gradient(x.get(), dy.get(), rows, k, n, meta.get(), dvalues.get(),
                      loop, &pool);
  const int64_t row_blocks = (k + 31) / 32;
  for (int64_t i = 0; i < dvalues.size; ++i) {
    const int64_t lane = i % 16, slot = i / 16 % 16;
    const int64_t block = i / 256 % row_blocks;
    const int64_t column = i / 256 / row_blocks * 16 + lane;
    const uint32_t word = meta[i / 256 * 16 + lane];
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
