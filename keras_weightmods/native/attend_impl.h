// Attention of some queries to one sequence of keys and values, for any
// instruction set S as described in kernels_impl.h, which includes this.

#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

using kwm::HeadOfKeys;
using kwm::kLanes;

// 2^t - 1 as a polynomial in t without a constant term, exact to 1e-8 on
// [-0.5, 0.5]. Highest power first.
constexpr float kPowerOfTwo[] = {0.000154531634f, 0.00133908633f,
                                 0.00961808302f,  0.0555035695f,
                                 0.240226507f,    0.693147182f};
constexpr float kLog2E = 1.44269504f;

// x = exp(x) for x <= 0, and 0 below the smallest normal number.
inline void exponentials(float* x, int64_t count) {
  // Its last bits hold an integer that was added.
  constexpr float kShift = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    const bool vanishes = x[i] < -87.0f;
    const float power = (vanishes ? -87.0f : x[i]) * kLog2E;
    const float shifted = power + kShift;
    const float rest = power - (shifted - kShift);
    float sum = kPowerOfTwo[0];
    for (int j = 1; j < 6; ++j) sum = sum * rest + kPowerOfTwo[j];
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof(bits));
    bits = (bits << 23) + 0x3f800000u;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    x[i] = vanishes ? 0.0f : (sum * rest + 1.0f) * scale;
  }
}

// scores [places] = scale * keys @ q; places in blocks of a vector. `square` has
// room for two of kLanes x kLanes.
template <class S>
void scores_of(const float* q, const HeadOfKeys& head, float scale,
               float* square, float* scores) {
  constexpr int kWidth = S::kWidth;
  float* parts = square;
  float* columns = square + kLanes * kLanes;
  const auto factor = S::broadcast(scale);
  for (int64_t first = 0; first < head.places; first += kWidth) {
    for (int j = 0; j < kWidth; ++j) {
      // Scores beyond the last place have room, and are not read.
      const int64_t place = first + j < head.places ? first + j : first;
      const float* key = head.keys + place * head.stride;
      auto sum = S::zero();
      for (int64_t i = 0; i < head.size; i += kWidth) {
        sum = S::fma(S::load(q + i), S::load(key + i), sum);
      }
      S::store(parts + j * kWidth, sum);
    }
    S::transpose(parts, kWidth, columns, kWidth);
    auto sum = S::load(columns);
    for (int i = 1; i < kWidth; ++i) {
      sum = S::add(sum, S::load(columns + i * kWidth));
    }
    S::store(scores + first, S::mul(sum, factor));
  }
}

// out [kQueries, size] = weights [kQueries, weights_stride] @ values, times
// `inverse` of each; kQueries 1 or 2.
template <class S, int kQueries>
void average(const float* weights, int64_t weights_stride,
             const float* inverse, const HeadOfKeys& head, float* out) {
  constexpr int kVectors = kLanes / S::kWidth;
  for (int64_t at = 0; at < head.size; at += kLanes) {
    typename S::Float sum[kQueries][kVectors];
    for (int query = 0; query < kQueries; ++query) {
      for (int v = 0; v < kVectors; ++v) sum[query][v] = S::zero();
    }
    const float* value = head.values + at;
    for (int64_t place = 0; place < head.places; ++place) {
      for (int query = 0; query < kQueries; ++query) {
        const auto weight =
            S::broadcast(weights[query * weights_stride + place]);
        for (int v = 0; v < kVectors; ++v) {
          sum[query][v] =
              S::fma(weight, S::load(value + v * S::kWidth), sum[query][v]);
        }
      }
      value += head.stride;
    }
    for (int query = 0; query < kQueries; ++query) {
      const auto factor = S::broadcast(inverse[query]);
      for (int v = 0; v < kVectors; ++v) {
        S::store(out + query * head.size + at + v * S::kWidth,
                 S::mul(sum[query][v], factor));
      }
    }
  }
}

template <class S>
void attend(const float* q, int queries, const HeadOfKeys& head, float scale,
            float* scratch, float* out) {
  const int64_t room = HeadOfKeys::room(head.places);
  float* square = scratch;
  float* inverse = square + 2 * kLanes * kLanes;
  float* scores = inverse + HeadOfKeys::room(queries);
  for (int query = 0; query < queries; ++query) {
    float* own = scores + query * room;
    scores_of<S>(q + query * head.size, head, scale, square, own);
    float largest = -kwm::kHidden;
    for (int64_t i = 0; i < head.places; ++i) {
      if (head.mask != nullptr && head.mask[i] == 0) own[i] = -kwm::kHidden;
      largest = own[i] > largest ? own[i] : largest;
    }
    for (int64_t i = 0; i < head.places; ++i) own[i] -= largest;
    exponentials(own, head.places);
    float sum = 0;
    for (int64_t i = 0; i < head.places; ++i) sum += own[i];
    inverse[query] = 1 / sum;
  }
  int query = 0;
  for (; query + 2 <= queries; query += 2) {
    average<S, 2>(scores + query * room, room, inverse + query, head,
                  out + query * head.size);
  }
  if (query < queries) {
    average<S, 1>(scores + query * room, room, inverse + query, head,
                  out + query * head.size);
  }
}

}  // namespace
