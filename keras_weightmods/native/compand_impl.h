// The compander w = a arctan(v / b), for any instruction set S as described in
// kernels_impl.h, which includes this.

#include <string.h>

#include "kernels.h"

namespace {

using kwm::kLanes;

// arctan(t) / t - 1 as a polynomial in t * t without a constant term, exact to
// 3e-8 on [-1, 1]. Highest power first.
constexpr float kArctan[] = {0.00284993384f, -0.0160688699f, 0.0426920354f,
                             -0.0750435169f, 0.106409696f,   -0.14203657f,
                             0.199926218f,   -0.333330736f};
constexpr float kHalfPi = 1.57079632679f;

template <class S>
typename S::Float arctan(typename S::Float u) {
  auto t = u;
  auto offset = S::zero();
  const auto outside = S::greater(S::mul(u, u), S::broadcast(1));
  // Most weights are small, and the division is what takes longest.
  if (S::any(outside)) {
    // arctan(u) = +-pi / 2 - arctan(1 / u)
    t = S::select(outside, S::div(S::broadcast(-1), u), u);
    const auto half_pi =
        S::select(S::greater(u, S::zero()), S::broadcast(kHalfPi),
                  S::broadcast(-kHalfPi));
    offset = S::select(outside, half_pi, offset);
  }
  const auto square = S::mul(t, t);
  auto series = S::broadcast(kArctan[0]);
  KWM_UNROLL(8)
  for (int i = 1; i < 8; ++i) {
    series = S::fma(series, square, S::broadcast(kArctan[i]));
  }
  return S::add(offset, S::fma(S::mul(t, square), series, t));
}

template <class S>
void compand(const float* v, int64_t count, float a, float b, float* w) {
  const auto height = S::broadcast(a), rate = S::broadcast(1 / b);
  const auto one = [&](const float* from, float* to) {
    S::store(to, S::mul(height, arctan<S>(S::mul(S::load(from), rate))));
  };
  int64_t i = 0;
  for (; i + S::kWidth <= count; i += S::kWidth) one(v + i, w + i);
  if (i == count) return;
  const size_t bytes = static_cast<size_t>(count - i) * sizeof(float);
  float rest[S::kWidth] = {};
  memcpy(rest, v + i, bytes);
  one(rest, rest);
  memcpy(w + i, rest, bytes);
}

// The sums are of kLanes numbers each, in float32.
template <class S, bool kWithSums>
struct CompandGradient {
  static constexpr int kParts = kLanes / S::kWidth;

  CompandGradient(float a, float b)
      : slope(S::broadcast(a / b)), rate(S::broadcast(1 / b)) {
    for (int part = 0; part < kParts; ++part) {
      upstream_w[part] = dv_v[part] = S::zero();
    }
  }

  // kLanes entries; dv may be upstream.
  void run(const float* v, const float* w, const float* upstream, float* dv) {
    KWM_UNROLL(4)
    for (int part = 0; part < kParts; ++part) {
      const int at = part * S::kWidth;
      const auto stored = S::load(v + at), up = S::load(upstream + at);
      const auto u = S::mul(stored, rate);
      const auto result = S::div(S::mul(up, slope),
                                 S::fma(u, u, S::broadcast(1)));
      S::store(dv + at, result);
      if (kWithSums) {
        upstream_w[part] = S::fma(up, S::load(w + at), upstream_w[part]);
        dv_v[part] = S::fma(result, stored, dv_v[part]);
      }
    }
  }

  static double total(const typename S::Float (&parts)[kParts]) {
    float lanes[kLanes];
    for (int part = 0; part < kParts; ++part) {
      S::store(lanes + part * S::kWidth, parts[part]);
    }
    double sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
  }

  const typename S::Float slope, rate;
  typename S::Float upstream_w[kParts], dv_v[kParts];
};

template <class S, bool kWithSums>
void compand_gradient(const float* v, const float* w, const float* upstream,
                      int64_t count, float a, float b, float* dv,
                      double* sums) {
  CompandGradient<S, kWithSums> gradient(a, b);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    gradient.run(v + i, kWithSums ? w + i : nullptr, upstream + i, dv + i);
  }
  if (i < count) {
    const size_t bytes = static_cast<size_t>(count - i) * sizeof(float);
    float v_rest[kLanes] = {}, w_rest[kLanes] = {}, rest[kLanes] = {};
    memcpy(v_rest, v + i, bytes);
    if (kWithSums) memcpy(w_rest, w + i, bytes);
    memcpy(rest, upstream + i, bytes);
    gradient.run(v_rest, w_rest, rest, rest);
    memcpy(dv + i, rest, bytes);
  }
  if (kWithSums) {
    sums[0] = gradient.total(gradient.upstream_w);
    sums[1] = gradient.total(gradient.dv_v);
  }
}

}  // namespace
