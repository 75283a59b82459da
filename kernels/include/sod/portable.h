// What host and device code share. Torch-free: raw pointers and plain structs only.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SOD_HD __host__ __device__ __forceinline__ static
#else
// static and always inlined: the same header is compiled for several instruction sets, and the
// linker must never keep one copy (say, the AVX-512 one) for all of them.
#define SOD_HD __attribute__((always_inline)) static inline
#endif

namespace sod {

constexpr float kSentinel = -1.0e30f;       // stands for -inf; finite, so 0 * kSentinel is 0
constexpr float kNotMine = 2.0e30f;         // target logit that another rank owns
constexpr double kInfiniteAbove = 1.0e20;   // a statistic this large came from a kSentinel
constexpr double kLn2 = 0.6931471805599453094;

constexpr int kNumPartials = 10;      // m Z A R u Y C F label teacher_label
constexpr int kNumRowStats = 10;      // logp_s logp_t rkl fkl H_s H_t m log2Z u log2Y
constexpr int kNumSecond = 4;         // sum p(lp-lM), sum q(lq-lM), exact reverse, exact forward
constexpr int kNumCoefficients = 6;   // c_logprob c_reverse c_forward c_entropy c_jsd mix

template <typename T>
SOD_HD T larger(T a, T b) {
  return a > b ? a : b;
}

// 2^x for x <= 0. On the device the hardware's own (2 ulp, 0 below 2^-126) in float.
SOD_HD double exp2_any(double x) { return exp2(x); }
SOD_HD float exp2_any(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2(x);
#endif
}

}  // namespace sod
