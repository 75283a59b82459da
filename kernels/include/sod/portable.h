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

}  // namespace sod
