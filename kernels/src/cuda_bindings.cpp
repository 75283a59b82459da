// The CUDA implementation as PyTorch operators, through the stable ABI. Every kernel goes to torch's
// current stream; nothing here waits for the device.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding_checks.h"
#include "sod/cuda_api.h"

namespace {

using namespace sod_binding;
using torch::stable::accelerator::DeviceGuard;

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, error ? error : ""); }

Tensor vp_stats(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& targets,
                int64_t vocab_start, int64_t valid_cols, double inv_temperature) {
  const DeviceGuard guard(student.get_device_index());
  Tensor out =
      torch::stable::new_empty(student, {student.size(0), sod::kNumPartials}, sums_type(student));
  const sod::StatsArgs args = {
      logits_of(student, teacher, targets, vocab_start, valid_cols, inv_temperature),
      out.mutable_data_ptr()};
  check_launch(sod::launch_stats(args, student.size(0), stream_of(student)));
  return out;
}

Tensor vp_finish(const Tensor& partials, const Tensor& targets) {
  check_partials(partials, targets);
  const DeviceGuard guard(partials.get_device_index());
  Tensor out = torch::stable::new_empty(partials, {partials.size(1), sod::kNumRowStats});
  check_launch(sod::launch_finish(partials.const_data_ptr(), partials.size(0), partials.size(1),
                                  static_cast<const int64_t*>(targets.const_data_ptr()),
                                  out.mutable_data_ptr(),
                                  partials.scalar_type() == ScalarType::Double,
                                  stream_of(partials)));
  return out;
}

Tensor vp_second(const Tensor& student, const Tensor& teacher, const Tensor& targets,
                 const Tensor& rows, int64_t valid_cols, double inv_temperature, double beta) {
  check_rows(rows, sums_type(student), student.size(0), sod::kNumRowStats, "rows");
  const DeviceGuard guard(student.get_device_index());
  Tensor out =
      torch::stable::new_empty(student, {student.size(0), sod::kNumSecond}, sums_type(student));
  const sod::SecondArgs args = {
      logits_of(student, teacher, targets, 0, valid_cols, inv_temperature), rows.const_data_ptr(),
      out.mutable_data_ptr(), beta};
  check_launch(sod::launch_second(args, student.size(0), stream_of(student)));
  return out;
}

void vp_grad_out(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& targets,
                 const Tensor& rows, const Tensor& coefficients, int64_t vocab_start,
                 int64_t valid_cols, double inv_temperature, double beta, Tensor out) {
  check_gradient(student, rows, coefficients, out);
  const DeviceGuard guard(student.get_device_index());
  const sod::GradArgs args = {
      logits_of(student, teacher, targets, vocab_start, valid_cols, inv_temperature),
      rows.const_data_ptr(),
      coefficients.const_data_ptr(),
      out.mutable_data_ptr(),
      out.stride(0),
      out.size(1),
      beta};
  check_launch(sod::launch_grad(args, student.size(0), stream_of(student)));
}

Tensor step_sums(const Tensor& values, const std::optional<Tensor>& teacher, const Tensor& step_ids,
                 const Tensor& trajectory_ids, int64_t num_trajectories, int64_t num_steps) {
  sod::StepSumArgs args = step_args(step_ids, trajectory_ids, num_trajectories, num_steps);
  args.student = values_of(values, step_ids);
  args.teacher = teacher ? values_of(*teacher, step_ids) : nullptr;
  const DeviceGuard guard(values.get_device_index());
  const int64_t keys = num_trajectories * num_steps;
  Tensor scratch = torch::stable::new_zeros(values, {4, keys}, ScalarType::Long);
  Tensor out = torch::stable::new_empty(values, {2, keys}, ScalarType::Double);
  check_launch(sod::launch_step_sums(args, step_ids.size(0),
                                     static_cast<int64_t*>(scratch.mutable_data_ptr()),
                                     static_cast<double*>(out.mutable_data_ptr()),
                                     stream_of(values)));
  return out;
}

std::tuple<Tensor, Tensor> step_weights(const Tensor& sums, int64_t num_trajectories,
                                        int64_t num_steps, double delta, double epsilon) {
  check_step_sums(sums, num_trajectories, num_steps);
  const DeviceGuard guard(sums.get_device_index());
  Tensor d = torch::stable::new_empty(sums, {num_trajectories, num_steps}, ScalarType::Float);
  Tensor w = torch::stable::new_empty(sums, {num_trajectories, num_steps}, ScalarType::Float);
  check_launch(sod::launch_step_weights(
      static_cast<const double*>(sums.const_data_ptr()), num_trajectories, num_steps, delta,
      epsilon, static_cast<float*>(d.mutable_data_ptr()), static_cast<float*>(w.mutable_data_ptr()),
      stream_of(sums)));
  return {d, w};
}

Tensor step_gather(const Tensor& weights, const Tensor& step_ids, const Tensor& trajectory_ids) {
  check_step_weights(weights);
  const sod::StepSumArgs args =
      step_args(step_ids, trajectory_ids, weights.size(0), weights.size(1));
  const DeviceGuard guard(weights.get_device_index());
  Tensor out = torch::stable::new_empty(weights, {step_ids.size(0)});
  check_launch(sod::launch_step_gather(args, step_ids.size(0),
                                       static_cast<const float*>(weights.const_data_ptr()),
                                       static_cast<float*>(out.mutable_data_ptr()),
                                       stream_of(weights)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sod, CUDA, m) {
  m.impl("vp_stats", TORCH_BOX(&vp_stats));
  m.impl("vp_finish", TORCH_BOX(&vp_finish));
  m.impl("vp_second", TORCH_BOX(&vp_second));
  m.impl("vp_grad_out", TORCH_BOX(&vp_grad_out));
  m.impl("step_sums", TORCH_BOX(&step_sums));
  m.impl("step_weights", TORCH_BOX(&step_weights));
  m.impl("step_gather", TORCH_BOX(&step_gather));
}
