// Turns the row kernels into one function table for the instruction set this file is compiled for.
#pragma once
#include "row_kernels.h"
#include "step_kernels.h"

namespace sod {
inline namespace SOD_ISA {

template <typename Vec, typename E>
void stats_rows(const StatsArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    args.logits.teacher ? Stats<Vec, E, true>::row(args, r) : Stats<Vec, E, false>::row(args, r);
  }
}

template <typename Vec, typename E>
void second_rows(const SecondArgs& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) Second<Vec, E>::row(args, r);
}

template <typename Vec, typename E>
void grad_rows(const GradArgs& args, int64_t begin, int64_t end) {
  using T = typename Vec::T;
  const T* coefficients = static_cast<const T*>(args.coefficients);
  for (int64_t r = begin; r < end; ++r) {
    if (!args.logits.teacher) {
      Grad<Vec, E, false, false>::row(args, r);
    } else if (coefficients[r * kNumCoefficients + 4] != T(0)) {
      Grad<Vec, E, true, true>::row(args, r);
    } else {
      Grad<Vec, E, true, false>::row(args, r);
    }
  }
}

// Vec works on float lanes; float64 logits always go through the one-lane double vectors.
#define SOD_BY_DTYPE(fn, args, begin, end)                                              \
  switch ((args).logits.dtype) {                                                        \
    case DType::kBFloat16: return fn<Vec, bf16>(args, begin, end);                      \
    case DType::kFloat16: return fn<Vec, fp16>(args, begin, end);                       \
    case DType::kFloat32: return fn<Vec, float>(args, begin, end);                      \
    case DType::kFloat64: return fn<VecScalar<double>, double>(args, begin, end);       \
  }

template <typename Vec>
struct Table {
  static void stats(const StatsArgs& a, int64_t b, int64_t e) { SOD_BY_DTYPE(stats_rows, a, b, e) }
  static void second(const SecondArgs& a, int64_t b, int64_t e) {
    SOD_BY_DTYPE(second_rows, a, b, e)
  }
  static void grad(const GradArgs& a, int64_t b, int64_t e) { SOD_BY_DTYPE(grad_rows, a, b, e) }
};

}  // namespace SOD_ISA
}  // namespace sod
