// The gradient of any sum of the row statistics with respect to one student logit.
//   dz = p * (alpha + reverse (lp - lq) + entropy lp + mix (lp - lM)) - forward q, + label at target
// with lp = log2 p, lq = log2 q; every factor already carries 1 / temperature and ln 2.
#pragma once
#include "sod/portable.h"

namespace sod {

template <typename T>
struct GradientRow {
  T alpha, reverse, entropy, mix, forward, label;
  T m, log_z, u, log_y;
  bool idle;  // ignored, or nothing asks for a gradient: write exact zeros, read nothing
};

// rows: kNumRowStats values; coefficient: kNumCoefficients upstream gradients, this row's own.
template <typename T>
SOD_HD GradientRow<T> gradient_row(const T* rows, const T* coefficient, int64_t target,
                                   double inv_temperature, double beta) {
  const double logprob = coefficient[0], entropy = coefficient[3];
  const double jsd = coefficient[4] * (1.0 - beta);
  // An infinite divergence has no finite gradient: the row keeps its other terms only.
  const bool reverse_ok = !(rows[2] == T(INFINITY)), forward_ok = !(rows[3] == T(INFINITY));
  const double reverse = reverse_ok ? double(coefficient[1]) : 0.0;
  const double forward = forward_ok ? double(coefficient[2]) : 0.0;
  double alpha = -logprob - entropy * rows[4];
  if (reverse != 0) alpha -= reverse * rows[2];
  if (jsd != 0) alpha -= jsd * coefficient[5];
  alpha += forward;
  GradientRow<T> g;
  g.alpha = T(alpha * inv_temperature);
  g.reverse = T(reverse * kLn2 * inv_temperature);
  g.entropy = T(-entropy * kLn2 * inv_temperature);
  g.mix = T(jsd * kLn2 * inv_temperature);
  g.forward = T(forward * inv_temperature);
  g.label = T(logprob * inv_temperature);
  g.m = rows[6], g.log_z = rows[7], g.u = rows[8], g.log_y = rows[9];
  g.idle = target < 0 || (logprob == 0 && coefficient[1] == 0 && coefficient[2] == 0 &&
                          entropy == 0 && coefficient[4] == 0);
  return g;
}

// log2 of the mixture beta q + (1 - beta) p; finite where both underflow, where it weighs 0.
template <typename T>
SOD_HD T mixture(T p, T q, T beta) {
  return larger((T(1) - beta) * p + beta * q, T(1.1754944e-38f));
}

}  // namespace sod
