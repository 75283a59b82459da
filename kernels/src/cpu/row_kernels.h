// The row kernels, written once over a vector type `Vec` and an element type `E`.
// A row is walked in blocks of kBlock columns: the block's maximum first, then one pass of
// exponentials and sums; blocks merge in double, so a row's rounding does not grow with V.
#pragma once
#include "sod/cpu_api.h"
#include "sod/gradient.h"
#include "sod/partials.h"
#include "vec_scalar.h"

namespace sod {
inline namespace SOD_ISA {

constexpr int64_t kBlock = 1024;

// Columns [begin, end) of a row as whole vectors; a ragged end is copied out and padded with -inf,
// which adds exactly 0 to every sum.
template <typename Vec, typename E>
struct Tail {
  E student[2 * Vec::kLanes], teacher[2 * Vec::kLanes];
  SOD_HD void fill(E* to, const E* from, int64_t count) {
    for (int64_t i = 0; i < 2 * Vec::kLanes; ++i) {
      if (i < count) {
        to[i] = from[i];
      } else {
        store_one(to + i, -INFINITY);
      }
    }
  }
};

template <typename T, typename E>
SOD_HD T shifted(const E* logits, int64_t column, T scale, T shift) {
  const T x = std::fma(T(load_one(logits + column)), scale, -shift);
  return x < T(kSentinel) ? T(kSentinel) : x;
}

template <typename Vec, typename E, bool kTeacher>
struct Stats {
  using T = typename Vec::T;
  using V = typename Vec::V;

  // Sums of `pairs` double-vectors about the maxima m and u.
  SOD_HD void accumulate(const E* z, const E* y, int64_t pairs, T scale, T m, T u, V (&sum)[6]) {
    const V k = Vec::set(scale), vm = Vec::set(m), vu = Vec::set(u), low = Vec::set(T(kSentinel));
    for (int64_t i = 0; i < pairs; ++i) {
      V za, zb, ya, yb;
      Vec::load2(z + i * 2 * Vec::kLanes, za, zb);
      if constexpr (kTeacher) Vec::load2(y + i * 2 * Vec::kLanes, ya, yb);
      for (int half = 0; half < 2; ++half) {
        const V zs = Vec::at_least(low, Vec::fms(half ? zb : za, k, vm));
        const V ez = Vec::exp2(zs);
        sum[0] = Vec::add(sum[0], ez);
        sum[1] = Vec::fma(ez, zs, sum[1]);
        if constexpr (kTeacher) {
          const V ys = Vec::at_least(low, Vec::fms(half ? yb : ya, k, vu));
          const V ey = Vec::exp2(ys), gap = Vec::sub(zs, ys);
          sum[2] = Vec::fma(ez, gap, sum[2]);
          sum[3] = Vec::add(sum[3], ey);
          sum[4] = Vec::fma(ey, ys, sum[4]);
          sum[5] = Vec::fma(ey, gap, sum[5]);
        }
      }
    }
  }

  SOD_HD T block_max(const E* logits, int64_t pairs, const E* tail) {
    V best = Vec::set(T(-INFINITY)), other = best, a, b;
    for (int64_t i = 0; i < pairs; ++i) {
      Vec::load2(logits + i * 2 * Vec::kLanes, a, b);
      best = Vec::max_skip_nan(a, best);
      other = Vec::max_skip_nan(b, other);
    }
    if (tail) {
      Vec::load2(tail, a, b);
      best = Vec::max_skip_nan(a, best);
      other = Vec::max_skip_nan(b, other);
    }
    return Vec::max(Vec::max_skip_nan(best, other));
  }

  static void row(const StatsArgs& args, int64_t r) {
    const Logits& in = args.logits;
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = kTeacher ? static_cast<const E*>(in.teacher) + r * in.teacher_stride : nullptr;
    T* out = static_cast<T*>(args.partials) + r * kNumPartials;
    const T scale = T(in.scale);
    Partials<double> total = empty_partials<double>();
    if (in.targets[r] >= 0) {
      for (int64_t c = 0; c < in.valid_cols; c += kBlock) {
        block(z + c, kTeacher ? y + c : z, in.valid_cols - c, scale, total);
      }
    }
    out[0] = T(total.m), out[1] = T(total.Z), out[2] = T(total.A), out[3] = T(total.R);
    out[4] = T(total.u), out[5] = T(total.Y), out[6] = T(total.C), out[7] = T(total.F);
    const int64_t label = in.targets[r] - in.vocab_start;
    const bool mine = in.targets[r] >= 0 && label >= 0 && label < in.valid_cols;
    out[8] = mine ? shifted(z, label, scale, out[0]) : T(kNotMine);
    out[9] = mine && kTeacher ? shifted(y, label, scale, out[4]) : T(kNotMine);
  }

  SOD_HD void block(const E* z, const E* y, int64_t left, T scale, Partials<double>& total) {
    const int64_t cols = left < kBlock ? left : kBlock, step = 2 * Vec::kLanes;
    const int64_t pairs = cols / step, ragged = cols - pairs * step;
    Tail<Vec, E> tail;
    if (ragged) {
      tail.fill(tail.student, z + pairs * step, ragged);
      if constexpr (kTeacher) tail.fill(tail.teacher, y + pairs * step, ragged);
    }
    // The maxima only shift the sums, so a running maximum over blocks is as good as the row's.
    const T zmax = block_max(z, pairs, ragged ? tail.student : nullptr) * scale;
    T m = larger(T(total.m), zmax), u = T(total.u);
    if constexpr (kTeacher) {
      u = larger(u, block_max(y, pairs, ragged ? tail.teacher : nullptr) * scale);
    }
    if (m != T(total.m) || u != T(total.u)) total = rescaled(total, double(m), double(u));
    V sum[6] = {};
    accumulate(z, y, pairs, scale, m, u, sum);
    if (ragged) accumulate(tail.student, tail.teacher, 1, scale, m, u, sum);
    total.Z += Vec::sum(sum[0]), total.A += Vec::sum(sum[1]), total.R += Vec::sum(sum[2]);
    total.Y += Vec::sum(sum[3]), total.C += Vec::sum(sum[4]), total.F += Vec::sum(sum[5]);
  }
};

// Sums that need the finished normalisers: mixture divergences and cancellation-free KLs.
template <typename Vec, typename E>
struct Second {
  using T = typename Vec::T;
  using V = typename Vec::V;

  SOD_HD void accumulate(const E* z, const E* y, int64_t pairs, T scale, const T* rows, T beta,
                         V (&sum)[4]) {
    const V k = Vec::set(scale), m = Vec::set(rows[6]), u = Vec::set(rows[8]);
    const V log_z = Vec::set(rows[7]), log_y = Vec::set(rows[9]), low = Vec::set(T(kSentinel));
    const V share = Vec::set(beta), rest = Vec::set(T(1) - beta), tiny = Vec::set(T(1.1754944e-38));
    const V ln2 = Vec::set(T(kLn2));
    for (int64_t i = 0; i < pairs; ++i) {
      V za, zb, ya, yb;
      Vec::load2(z + i * 2 * Vec::kLanes, za, zb);
      Vec::load2(y + i * 2 * Vec::kLanes, ya, yb);
      for (int half = 0; half < 2; ++half) {
        const V lp = Vec::sub(Vec::at_least(low, Vec::fms(half ? zb : za, k, m)), log_z);
        const V lq = Vec::sub(Vec::at_least(low, Vec::fms(half ? yb : ya, k, u)), log_y);
        const V p = Vec::exp2(lp), q = Vec::exp2(lq);
        const V mix = Vec::log2(Vec::at_least(tiny, Vec::fma(share, q, Vec::mul(rest, p))));
        sum[0] = Vec::fma(p, Vec::sub(lp, mix), sum[0]);
        sum[1] = Vec::fma(q, Vec::sub(lq, mix), sum[1]);
        // p (e^d - 1 - d) and q (e^-d - 1 + d), d = ln q - ln p; the series where d is small,
        // because there q - p - p d is a difference of nearly equal numbers
        const V d = Vec::mul(Vec::sub(lq, lp), ln2), near = Vec::set(T(0.05));
        const V d2 = Vec::mul(d, d);
        const V even = Vec::fma(d2, Vec::set(T(1.0 / 24)), Vec::set(T(0.5)));
        const V odd = Vec::mul(d, Vec::fma(d2, Vec::set(T(1.0 / 120)), Vec::set(T(1.0 / 6))));
        const V small = Vec::abs(d), diff = Vec::sub(q, p);
        const V forward_series = Vec::mul(q, Vec::mul(d2, Vec::sub(even, odd)));
        const V reverse_series = Vec::mul(p, Vec::mul(d2, Vec::add(even, odd)));
        const V reverse = Vec::sub(diff, Vec::mul(p, d));
        const V forward = Vec::sub(Vec::mul(q, d), diff);
        sum[2] = Vec::add(sum[2], Vec::select_less(small, near, reverse_series, reverse));
        sum[3] = Vec::add(sum[3], Vec::select_less(small, near, forward_series, forward));
      }
    }
  }

  static void row(const SecondArgs& args, int64_t r) {
    const Logits& in = args.logits;
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = static_cast<const E*>(in.teacher) + r * in.teacher_stride;
    const T* rows = static_cast<const T*>(args.rows) + r * kNumRowStats;
    T* out = static_cast<T*>(args.sums) + r * kNumSecond;
    const T scale = T(in.scale);
    double total[4] = {0, 0, 0, 0};
    const int64_t cols = in.targets[r] >= 0 ? in.valid_cols : 0, step = 2 * Vec::kLanes;
    for (int64_t c = 0; c < cols; c += kBlock) {
      const int64_t here = cols - c < kBlock ? cols - c : kBlock;
      const int64_t pairs = here / step, ragged = here - pairs * step;
      V sum[4] = {};
      accumulate(z + c, y + c, pairs, scale, rows, T(args.beta), sum);
      if (ragged) {
        Tail<Vec, E> tail;
        tail.fill(tail.student, z + c + pairs * step, ragged);
        tail.fill(tail.teacher, y + c + pairs * step, ragged);
        accumulate(tail.student, tail.teacher, 1, scale, rows, T(args.beta), sum);
      }
      for (int i = 0; i < 4; ++i) total[i] += Vec::sum(sum[i]);
    }
    out[0] = T(total[0] * kLn2), out[1] = T(total[1] * kLn2);
    out[2] = T(total[2]), out[3] = T(total[3]);
  }
};

template <typename Vec, typename E, bool kTeacher, bool kMixture>
struct Grad {
  using T = typename Vec::T;
  using V = typename Vec::V;

  SOD_HD void sweep(const E* z, const E* y, E* out, int64_t pairs, T scale,
                    const GradientRow<T>& g, T beta) {
    const V k = Vec::set(scale), m = Vec::set(g.m), u = Vec::set(g.u);
    const V log_z = Vec::set(g.log_z), log_y = Vec::set(g.log_y), low = Vec::set(T(kSentinel));
    const V alpha = Vec::set(g.alpha), reverse = Vec::set(g.reverse);
    const V entropy = Vec::set(g.entropy), forward = Vec::set(g.forward), eta = Vec::set(g.mix);
    const V share = Vec::set(beta), rest = Vec::set(T(1) - beta), tiny = Vec::set(T(1.1754944e-38));
    for (int64_t i = 0; i < pairs; ++i) {
      V za, zb, ya, yb, grad[2];
      Vec::load2(z + i * 2 * Vec::kLanes, za, zb);
      if constexpr (kTeacher) Vec::load2(y + i * 2 * Vec::kLanes, ya, yb);
      for (int half = 0; half < 2; ++half) {
        const V lp = Vec::sub(Vec::at_least(low, Vec::fms(half ? zb : za, k, m)), log_z);
        const V p = Vec::exp2(lp);
        V factor = Vec::fma(entropy, lp, alpha);
        if constexpr (kTeacher) {
          const V lq = Vec::sub(Vec::at_least(low, Vec::fms(half ? yb : ya, k, u)), log_y);
          const V q = Vec::exp2(lq);
          factor = Vec::fma(reverse, Vec::sub(lp, lq), factor);
          if constexpr (kMixture) {
            const V mix = Vec::log2(Vec::at_least(tiny, Vec::fma(share, q, Vec::mul(rest, p))));
            factor = Vec::fma(eta, Vec::sub(lp, mix), factor);
          }
          grad[half] = Vec::fms(p, factor, Vec::mul(forward, q));
        } else {
          grad[half] = Vec::mul(p, factor);
        }
      }
      Vec::store2(out + i * 2 * Vec::kLanes, grad[0], grad[1]);
    }
  }

  static void row(const GradArgs& args, int64_t r) {
    const Logits& in = args.logits;
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = kTeacher ? static_cast<const E*>(in.teacher) + r * in.teacher_stride : z;
    E* out = static_cast<E*>(args.out) + r * args.out_stride;
    const GradientRow<T> g = gradient_row(static_cast<const T*>(args.rows) + r * kNumRowStats,
                                          static_cast<const T*>(args.coefficients) +
                                              r * kNumCoefficients,
                                          in.targets[r], in.inv_temperature, args.beta);
    if (g.idle) {
      for (int64_t c = 0; c < args.width; ++c) store_one(out + c, T(0));
      return;
    }
    const T scale = T(in.scale), beta = T(args.beta);
    const int64_t cols = in.valid_cols, step = 2 * Vec::kLanes, pairs = cols / step;
    const int64_t ragged = cols - pairs * step, label = in.targets[r] - in.vocab_start;
    const bool mine = label >= 0 && label < cols && g.label != 0;
    // The target's own element in one rounding; read before its storage is overwritten.
    E at_label = {};
    if (mine) store_one(&at_label, element(z, y, label, scale, g, beta) + g.label);
    sweep(z, y, out, pairs, scale, g, beta);
    if (ragged) {
      Tail<Vec, E> tail;
      E result[2 * Vec::kLanes];
      tail.fill(tail.student, z + pairs * step, ragged);
      tail.fill(tail.teacher, kTeacher ? y + pairs * step : tail.student, ragged);
      sweep(tail.student, tail.teacher, result, 1, scale, g, beta);
      for (int64_t i = 0; i < ragged; ++i) out[pairs * step + i] = result[i];
    }
    if (mine) out[label] = at_label;
    for (int64_t c = cols; c < args.width; ++c) store_one(out + c, T(0));
  }

  SOD_HD T element(const E* z, const E* y, int64_t column, T scale, const GradientRow<T>& g,
                   T beta) {
    const T lp = shifted(z, column, scale, g.m) - g.log_z, p = std::exp2(lp);
    T factor = g.alpha + g.entropy * lp;
    if (!kTeacher) return p * factor;
    const T lq = shifted(y, column, scale, g.u) - g.log_y, q = std::exp2(lq);
    factor += g.reverse * (lp - lq);
    if (kMixture) factor += g.mix * (lp - std::log2(mixture(p, q, beta)));
    return p * factor - g.forward * q;
  }
};

}  // namespace SOD_ISA
}  // namespace sod
