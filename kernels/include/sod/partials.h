// The partial sums of one row over some of its columns, how they merge, and what they add up to.
// Log2 units: zs = z * log2(e) / temperature - m, ys likewise; derivation in kernels/README.md.
#pragma once
#include "sod/portable.h"

namespace sod {

template <typename T>
struct Partials {
  T m, Z, A, R;  // max, sum 2^zs, sum 2^zs zs, sum 2^zs (zs - ys)
  T u, Y, C, F;  // max, sum 2^ys, sum 2^ys ys, sum 2^ys (zs - ys)
};

template <typename T>
SOD_HD Partials<T> empty_partials() {
  return {T(kSentinel), T(0), T(0), T(0), T(kSentinel), T(0), T(0), T(0)};
}

// The same sums about the maxima m and u, which are at least the old ones.
template <typename T>
SOD_HD Partials<T> rescaled(const Partials<T>& x, T m, T u) {
  const T dm = x.m - m, du = x.u - u;
  const T a = exp2_any(dm), b = exp2_any(du);
  return {m, a * x.Z, a * (x.A + dm * x.Z), a * (x.R + (dm - du) * x.Z),
          u, b * x.Y, b * (x.C + du * x.Y), b * (x.F + (dm - du) * x.Y)};
}

template <typename T>
SOD_HD Partials<T> merged(const Partials<T>& x, const Partials<T>& y) {
  const T m = larger(x.m, y.m), u = larger(x.u, y.u);
  const Partials<T> a = rescaled(x, m, u), b = rescaled(y, m, u);
  return {m, a.Z + b.Z, a.A + b.A, a.R + b.R, u, a.Y + b.Y, a.C + b.C, a.F + b.F};
}

SOD_HD double infinite_if_huge(double x) {
  if (x > kInfiniteAbove) return INFINITY;
  if (x < -kInfiniteAbove) return -INFINITY;
  return x;
}

// One row over all ranks, in rank order and in double: every rank gets the same bits.
// partials: [ranks] x [stride] x kNumPartials values, the row's own start; rows: kNumRowStats out.
template <typename T>
SOD_HD void finish_row(const T* partials, int64_t ranks, int64_t stride, int64_t target, T* rows) {
  if (target < 0) {
    for (int i = 0; i < kNumRowStats; ++i) rows[i] = T(0);
    return;
  }
  double m = partials[0], u = partials[4];
  for (int64_t r = 1; r < ranks; ++r) {
    m = larger(m, double(partials[r * stride + 0]));
    u = larger(u, double(partials[r * stride + 4]));
  }
  Partials<double> sum = {m, 0, 0, 0, u, 0, 0, 0};
  double label = NAN, teacher_label = NAN;  // no owner: the target is outside the vocabulary
  for (int64_t r = 0; r < ranks; ++r) {
    const T* p = partials + r * stride;
    const Partials<double> x = {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
    const Partials<double> y = rescaled(x, m, u);
    sum.Z += y.Z, sum.A += y.A, sum.R += y.R;
    sum.Y += y.Y, sum.C += y.C, sum.F += y.F;
    if (!(p[8] > T(kNotMine) / 2)) {  // true for NaN too, which must come through
      label = double(p[8]) + (x.m - m);
      teacher_label = double(p[9]) + (x.u - u);
    }
  }
  const double log_z = log2(sum.Z), log_y = log2(sum.Y);
  const double nats[6] = {label - log_z,
                          teacher_label - log_y,
                          sum.R / sum.Z - log_z + log_y,
                          -sum.F / sum.Y - log_y + log_z,
                          log_z - sum.A / sum.Z,
                          log_y - sum.C / sum.Y};
  for (int i = 0; i < 6; ++i) rows[i] = T(infinite_if_huge(nats[i] * kLn2));
  rows[6] = T(m), rows[7] = T(log_z), rows[8] = T(u), rows[9] = T(log_y);
}

}  // namespace sod
