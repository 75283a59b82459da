// Checks and argument packing that both bindings share: what would otherwise read or write out of
// bounds. The user's input is validated, in words, in Python.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "sod/cpu_api.h"
#include "sod/portable.h"

namespace sod_binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline sod::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return sod::DType::kBFloat16;
    case ScalarType::Half: return sod::DType::kFloat16;
    case ScalarType::Float: return sod::DType::kFloat32;
    case ScalarType::Double: return sod::DType::kFloat64;
    default: STD_TORCH_CHECK(false, "logits must be bfloat16, float16, float32 or float64");
  }
}

inline ScalarType sums_type(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_rows(const Tensor& x, ScalarType type, int64_t rows, int64_t cols, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.dim() == 2 && x.size(0) == rows &&
                      x.size(1) == cols && x.is_contiguous(),
                  name, " must be a contiguous [T, ", cols, "] tensor of the statistics' dtype");
}

inline sod::Logits logits_of(const Tensor& student, const std::optional<Tensor>& teacher,
                      const Tensor& targets, int64_t vocab_start, int64_t valid_cols,
                      double inv_temperature) {
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(student.dim() == 2 && (student.size(1) < 2 || student.stride(1) == 1),
                  "student logits must be [T, Vp] with unit column stride");
  STD_TORCH_CHECK(valid_cols >= 0 && valid_cols <= student.size(1), "valid_cols out of range");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 &&
                      targets.size(0) == rows && targets.is_contiguous(),
                  "targets must be contiguous int64 [T]");
  if (teacher) {
    STD_TORCH_CHECK(teacher->dim() == 2 && teacher->size(0) == rows &&
                        teacher->size(1) >= valid_cols &&
                        (teacher->size(1) < 2 || teacher->stride(1) == 1) &&
                        teacher->scalar_type() == student.scalar_type(),
                    "teacher logits must match the student's rows, columns and dtype");
  }
  return {student.const_data_ptr(),
          teacher ? teacher->const_data_ptr() : nullptr,
          student.stride(0),
          teacher ? teacher->stride(0) : 0,
          static_cast<const int64_t*>(targets.const_data_ptr()),
          vocab_start,
          valid_cols,
          inv_temperature,
          inv_temperature / sod::kLn2,
          dtype_of(student)};
}

inline sod::StepSumArgs step_args(const Tensor& step_ids, const Tensor& trajectory_ids,
                           int64_t num_trajectories, int64_t num_steps) {
  const ScalarType type = step_ids.scalar_type();
  STD_TORCH_CHECK((type == ScalarType::Long || type == ScalarType::Int) &&
                      trajectory_ids.scalar_type() == type && step_ids.is_contiguous() &&
                      trajectory_ids.is_contiguous() && step_ids.dim() == 1 &&
                      trajectory_ids.dim() == 1 && trajectory_ids.size(0) == step_ids.size(0),
                  "step and trajectory ids must be contiguous [T], both int32 or both int64");
  STD_TORCH_CHECK(num_trajectories >= 0 && num_steps >= 0, "negative sizes");
  return {nullptr,
          nullptr,
          step_ids.const_data_ptr(),
          trajectory_ids.const_data_ptr(),
          type == ScalarType::Long,
          num_trajectories,
          num_steps};
}

inline const float* values_of(const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.dim() == 1 &&
                      x.size(0) == like.size(0),
                  "per-token values must be contiguous float32 [T]");
  return static_cast<const float*>(x.const_data_ptr());
}


inline void check_partials(const Tensor& partials, const Tensor& targets) {
  STD_TORCH_CHECK(partials.dim() == 3 && partials.size(2) == sod::kNumPartials &&
                      partials.is_contiguous() && partials.size(0) > 0 &&
                      (partials.scalar_type() == ScalarType::Float ||
                       partials.scalar_type() == ScalarType::Double),
                  "partials must be contiguous float32 or float64 [R, T, 10]");
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous() &&
                      targets.dim() == 1 && targets.size(0) == partials.size(1),
                  "targets must be contiguous int64 [T]");
}

inline void check_gradient(const Tensor& student, const Tensor& rows, const Tensor& coefficients,
                           const Tensor& out) {
  check_rows(rows, sums_type(student), student.size(0), sod::kNumRowStats, "rows");
  check_rows(coefficients, sums_type(student), student.size(0), sod::kNumCoefficients,
             "coefficients");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == student.size(0) &&
                      out.size(1) == student.size(1) &&
                      (out.size(1) < 2 || out.stride(1) == 1) &&
                      out.scalar_type() == student.scalar_type(),
                  "out must match the student logits");
}

inline void check_step_sums(const Tensor& sums, int64_t num_trajectories, int64_t num_steps) {
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Double && sums.is_contiguous() &&
                      sums.dim() == 2 && sums.size(0) == 2 &&
                      sums.size(1) == num_trajectories * num_steps,
                  "sums must be contiguous float64 [2, N * K]");
}

inline void check_step_weights(const Tensor& weights) {
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float && weights.is_contiguous() &&
                      weights.dim() == 2,
                  "weights must be contiguous float32 [N, K]");
}

}  // namespace sod_binding
