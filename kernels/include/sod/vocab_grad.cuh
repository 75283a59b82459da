// K2: the gradient with respect to this rank's student logits, possibly into their own storage, and
// the second statistics pass. The thread that reads a column is the one that writes it.
#pragma once
#include "sod/gradient.h"
#include "sod/vocab_stats.cuh"

namespace sod {

template <typename T>
__device__ __forceinline__ T log_prob(T logit, T scale, T shift, T log_sum) {
  return at_least(fma(logit, scale, -shift), T(kSentinel)) - log_sum;
}

template <bool kTeacher, bool kMixture, typename T>
__device__ __forceinline__ T pair_gradient(T z, T y, T scale, const GradientRow<T>& g, T beta) {
  const T lp = log_prob(z, scale, g.m, g.log_z), p = exp2_any(lp);
  T factor = fma(g.entropy, lp, g.alpha);
  if (!kTeacher) return p * factor;
  const T lq = log_prob(y, scale, g.u, g.log_y), q = exp2_any(lq);
  factor = fma(g.reverse, lp - lq, factor);
  if (kMixture) factor = fma(g.mix, lp - log2_fast(mixture(p, q, beta)), factor);
  return fma(p, factor, -g.forward * q);
}

template <typename E, bool kTeacher, bool kMixture>
__device__ __forceinline__ Raw16 vector_gradient(const Raw16& z, const Raw16& y,
                                                 typename Element<E>::T scale,
                                                 const GradientRow<typename Element<E>::T>& g,
                                                 typename Element<E>::T beta, int64_t label) {
  using T = typename Element<E>::T;
  using L = Lanes<E>;
  Raw16 out;
  // the owner of the target's column adds its term before the one rounding to E
  const bool owner = label >= 0 && label < L::kLanes;
#pragma unroll
  for (int i = 0; i < L::kLanes; i += 2) {
    T a = pair_gradient<kTeacher, kMixture>(L::get(z, i), L::get(y, i), scale, g, beta);
    T b = pair_gradient<kTeacher, kMixture>(L::get(z, i + 1), L::get(y, i + 1), scale, g, beta);
    if (owner) {
      a += label == i ? g.label : T(0);
      b += label == i + 1 ? g.label : T(0);
    }
    L::put(out, i, a, b);
  }
  return out;
}

template <typename E, bool kTeacher, bool kMixture, bool kAligned, int kUnroll>
__device__ __forceinline__ void row_gradient(const E* z, const E* y, E* out, int64_t cols,
                                             int64_t label,
                                             const GradientRow<typename Element<E>::T>& g,
                                             typename Element<E>::T scale,
                                             typename Element<E>::T beta) {
  using T = typename Element<E>::T;
  constexpr int kLanes = Lanes<E>::kLanes;
  const int vectors = kAligned ? int(cols / kLanes) : 0;
  int v = threadIdx.x;
  for (; v + (kUnroll - 1) * kThreads < vectors; v += kUnroll * kThreads) {
    Raw16 zr[kUnroll], yr[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = int64_t(v + i * kThreads) * kLanes;
      zr[i] = load_plain(z + at);  // not the read-only path: `out` may be the same storage
      yr[i] = kTeacher ? load_readonly(y + at) : zr[i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t at = int64_t(v + i * kThreads) * kLanes;
      store16(out + at, vector_gradient<E, kTeacher, kMixture>(zr[i], yr[i], scale, g, beta,
                                                               label - at));
    }
  }
  for (; v < vectors; v += kThreads) {
    const int64_t at = int64_t(v) * kLanes;
    const Raw16 zr = load_plain(z + at), yr = kTeacher ? load_readonly(y + at) : zr;
    store16(out + at,
            vector_gradient<E, kTeacher, kMixture>(zr, yr, scale, g, beta, label - at));
  }
  for (int64_t c = int64_t(vectors) * kLanes + threadIdx.x; c < cols; c += kThreads) {
    const T yc = kTeacher ? to_number(y[c]) : T(0);
    T d = pair_gradient<kTeacher, kMixture>(T(to_number(z[c])), yc, scale, g, beta);
    from_number(out + c, c == label ? d + g.label : d);
  }
}

template <typename E, bool kTeacher, bool kMixture, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<E>)
    vocab_grad_kernel(const GradArgs args, int64_t rows) {
  using T = typename Element<E>::T;
  __shared__ GradientRow<T> shared_row;
  const Logits& in = args.logits;
  const T scale = T(in.scale);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t target = in.targets[r];
    if (threadIdx.x == 0) {
      shared_row = gradient_row(static_cast<const T*>(args.rows) + r * kNumRowStats,
                                static_cast<const T*>(args.coefficients) + r * kNumCoefficients,
                                target, in.inv_temperature, args.beta);
    }
    __syncthreads();
    const GradientRow<T> g = shared_row;
    __syncthreads();  // before the next row's is written
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = kTeacher ? static_cast<const E*>(in.teacher) + r * in.teacher_stride : z;
    E* out = static_cast<E*>(args.out) + r * args.out_stride;
    const int64_t cols = g.idle ? 0 : in.valid_cols;
    row_gradient<E, kTeacher, kMixture, kAligned, kInFlight<E>>(z, y, out, cols,
                                                           target - in.vocab_start, g, scale,
                                                           T(args.beta));
    for (int64_t c = cols + threadIdx.x; c < args.width; c += kThreads) from_number(out + c, T(0));
  }
}

// Sums that need the finished normalisers; see the CPU kernel for why the series.
template <typename T>
__device__ __forceinline__ void add_second(T (&sum)[4], T z, T y, T scale, const T* rows, T beta) {
  const T lp = log_prob(z, scale, rows[6], rows[7]), lq = log_prob(y, scale, rows[8], rows[9]);
  const T p = exp2_any(lp), q = exp2_any(lq);
  const T mix = log2_fast(mixture(p, q, beta));
  sum[0] = fma(p, lp - mix, sum[0]);
  sum[1] = fma(q, lq - mix, sum[1]);
  const T d = (lq - lp) * T(kLn2), d2 = d * d;
  if (fabs(d) < T(0.05)) {
    const T even = fma(d2, T(1.0 / 24), T(0.5)), odd = d * fma(d2, T(1.0 / 120), T(1.0 / 6));
    sum[2] = fma(p * d2, even + odd, sum[2]);
    sum[3] = fma(q * d2, even - odd, sum[3]);
  } else {
    sum[2] += (q - p) - p * d;
    sum[3] += q * d - (q - p);
  }
}

template <typename E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<E>)
    vocab_second_kernel(const SecondArgs args, int64_t count) {
  using T = typename Element<E>::T;
  __shared__ T of_warp[kWarps][4];
  const Logits& in = args.logits;
  const T scale = T(in.scale), beta = T(args.beta);
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = static_cast<const E*>(in.teacher) + r * in.teacher_stride;
    const T* rows = static_cast<const T*>(args.rows) + r * kNumRowStats;
    const int64_t cols = in.targets[r] < 0 ? 0 : in.valid_cols;
    T sum[4] = {T(0), T(0), T(0), T(0)};
    for (int64_t c = threadIdx.x; c < cols; c += kThreads) {
      add_second(sum, T(to_number(z[c])), T(to_number(y[c])), scale, rows, beta);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      for (int offset = 16; offset > 0; offset /= 2) sum[i] += from_lane(sum[i], offset);
      if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32][i] = sum[i];
    }
    __syncthreads();
    if (threadIdx.x < 4) {
      double total = 0;
      for (int w = 0; w < kWarps; ++w) total += of_warp[w][threadIdx.x];
      if (threadIdx.x < 2) total *= kLn2;
      static_cast<T*>(args.sums)[r * kNumSecond + threadIdx.x] = T(total);
    }
    __syncthreads();
  }
}

}  // namespace sod
