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

// c [kRows, kVectors vectors] = a [kRows, depth] @ b [depth, kVectors vectors],
// each row times a factor.
template <class S, int kRows, int kVectors>
void multiply_small(const float* a, int64_t a_stride, const float* b,
                    int64_t b_stride, int64_t depth, const float* factors,
                    float* c, int64_t c_stride) {
  typename S::Float sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = S::zero();
  }
  for (int64_t i = 0; i < depth; ++i) {
    typename S::Float row[kVectors];
    for (int v = 0; v < kVectors; ++v) row[v] = S::load(b + v * S::kWidth);
    for (int r = 0; r < kRows; ++r) {
      const auto entry = S::broadcast(a[r * a_stride + i]);
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] = S::fma(entry, row[v], sum[r][v]);
      }
    }
    b += b_stride;
  }
  for (int r = 0; r < kRows; ++r) {
    const auto factor = S::broadcast(factors[r]);
    for (int v = 0; v < kVectors; ++v) {
      S::store(c + r * c_stride + v * S::kWidth, S::mul(sum[r][v], factor));
    }
  }
}

// multiply_small for `rows` rows and `columns` columns, a multiple of kLanes.
template <class S>
void multiply_rows(const float* a, int64_t a_stride, int rows, const float* b,
                   int64_t b_stride, int64_t depth, int64_t columns,
                   const float* factors, float* c, int64_t c_stride) {
  // Sums in most of the registers.
  constexpr int kRows = 6;
  constexpr int kLeast = kLanes / S::kWidth;
  constexpr int kMost = S::kRegisters >= 32 && kLeast < 4 ? 4 : kLeast;
  const auto strip = [&](auto vectors, int64_t at) {
    constexpr int kVectors = decltype(vectors)::value;
    int row = 0;
    for (; row + kRows <= rows; row += kRows) {
      multiply_small<S, kRows, kVectors>(a + row * a_stride, a_stride, b + at,
                                          b_stride, depth, factors + row,
                                          c + row * c_stride + at, c_stride);
    }
    for (; row < rows; ++row) {
      multiply_small<S, 1, kVectors>(a + row * a_stride, a_stride, b + at,
                                      b_stride, depth, factors + row,
                                      c + row * c_stride + at, c_stride);
    }
  };
  int64_t at = 0;
  for (; at + kMost * S::kWidth <= columns; at += kMost * S::kWidth) {
    strip(std::integral_constant<int, kMost>(), at);
  }
  for (; at < columns; at += kLanes) {
    strip(std::integral_constant<int, kLeast>(), at);
  }
}

// columns [size, room] = the keys across, zeros beyond the last place.
template <class S>
void keys_across(const HeadOfKeys& head, float* square, float* columns) {
  constexpr int kWidth = S::kWidth;
  constexpr int64_t kAhead = 2 * kLanes;
  const int64_t room = HeadOfKeys::room(head.places);
  for (int64_t place = 0; place < room; place += kWidth) {
    const int64_t left = head.places - place;
    // The values of these places, and the next keys.
    for (int64_t j = 0; j < kWidth; ++j) {
      const int64_t here = kwm::min(place + j, head.places - 1);
      const int64_t next = kwm::min(place + kAhead + j, head.places - 1);
      for (int64_t i = 0; i < head.size; i += kLanes) {
        S::prefetch(head.values + here * head.stride + i);
        S::prefetch(head.keys + next * head.stride + i);
      }
    }
    for (int64_t i = 0; i < head.size; i += kWidth) {
      const float* from = head.keys + place * head.stride + i;
      int64_t stride = head.stride;
      if (left < kWidth) {
        for (int64_t j = 0; j < kWidth; ++j) {
          S::store(square + j * kWidth,
                   j < left ? S::load(from + j * stride) : S::zero());
        }
        from = square, stride = kWidth;
      }
      S::transpose(from, stride, columns + i * room + place, room);
    }
  }
}

// Scores of a row become weights, not yet divided by their sum, which is
// returned. There is room beyond the last place, which gets zeros.
template <class S>
float weights_of(float* scores, const uint8_t* mask, int64_t places) {
  constexpr int kWidth = S::kWidth;
  const int64_t room = HeadOfKeys::room(places);
  if (mask != nullptr) {
    for (int64_t i = 0; i < places; ++i) {
      scores[i] = mask[i] == 0 ? -kwm::kHidden : scores[i];
    }
  }
  for (int64_t i = places; i < room; ++i) scores[i] = -3 * kwm::kHidden;
  float lanes[kLanes];
  const auto lane = [&](auto vector) {
    S::store(lanes, vector);
    return lanes;
  };
  auto most = S::load(scores);
  for (int64_t i = kWidth; i < room; i += kWidth) {
    const auto own = S::load(scores + i);
    most = S::select(S::greater(most, own), most, own);
  }
  float largest = lane(most)[0];
  for (int j = 1; j < kWidth; ++j) {
    largest = largest > lanes[j] ? largest : lanes[j];
  }
  for (int64_t i = 0; i < room; ++i) scores[i] -= largest;
  exponentials(scores, room);
  auto total = S::load(scores);
  for (int64_t i = kWidth; i < room; i += kWidth) {
    total = S::add(total, S::load(scores + i));
  }
  float sum = lane(total)[0];
  for (int j = 1; j < kWidth; ++j) sum += lanes[j];
  return sum;
}

template <class S>
void attend(const float* q, int64_t stride, int queries, int heads,
                 const HeadOfKeys& head, int64_t mask_stride, float scale,
                 float* scratch, float* out) {
  const int64_t room = HeadOfKeys::room(head.places);
  float* square = scratch;
  float* factors = square + kLanes * kLanes;
  float* columns = factors + HeadOfKeys::kQueries;
  float* scores = columns + head.size * room;
  keys_across<S>(head, square, columns);
  for (int h = 0; h < heads; ++h) {
    for (int i = 0; i < queries; ++i) factors[i] = scale;
    multiply_rows<S>(q + h * head.size, stride, queries, columns, room,
                     head.size, room, factors, scores, room);
    for (int i = 0; i < queries; ++i) {
      const uint8_t* mask =
          head.mask == nullptr ? nullptr : head.mask + i * mask_stride;
      factors[i] = 1 / weights_of<S>(scores + i * room, mask, head.places);
    }
    multiply_rows<S>(scores, room, queries, head.values, head.stride,
                     head.places, head.size, factors, out + h * head.size,
                     stride);
  }
}

}  // namespace
