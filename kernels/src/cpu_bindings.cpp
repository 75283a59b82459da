// The CPU implementation as PyTorch operators, through the stable ABI: one build serves torch 2.10
// and every later release. Schemas are defined in megatron_sod/ops/registration.py, which also
// validates; what is checked here is what would otherwise read or write out of bounds.
#include "binding_checks.h"

#include <atomic>
#include <vector>

#include "sod/partials.h"
#include "sod/step_reduce.h"

namespace {

using namespace sod_binding;

const sod::CpuKernels& kernels() {
  const char* problem = nullptr;
  const sod::CpuKernels* table = sod::chosen_kernels(&problem);
  STD_TORCH_CHECK(table != nullptr, problem == nullptr ? "no CPU kernels" : problem);
  return *table;
}

// Rows per task: about 64 thousand columns, so that small shapes stay on one thread.
int64_t grain(int64_t cols) { return 1 + 65536 / (cols + 1); }

Tensor vp_stats(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& targets,
                int64_t vocab_start, int64_t valid_cols, double inv_temperature) {
  const int64_t rows = student.size(0);
  Tensor out = torch::stable::new_empty(student, {rows, sod::kNumPartials}, sums_type(student));
  const sod::StatsArgs args = {
      logits_of(student, teacher, targets, vocab_start, valid_cols, inv_temperature),
      out.mutable_data_ptr()};
  const sod::CpuKernels& table = kernels();
  torch::stable::parallel_for(0, rows, grain(valid_cols),
                              [&](int64_t b, int64_t e) { table.stats(args, b, e); });
  return out;
}

template <typename T>
void finish_rows(const Tensor& partials, const Tensor& targets, Tensor& out) {
  const int64_t ranks = partials.size(0), rows = partials.size(1);
  const T* in = static_cast<const T*>(partials.const_data_ptr());
  const int64_t* ids = static_cast<const int64_t*>(targets.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  for (int64_t t = 0; t < rows; ++t) {
    sod::finish_row(in + t * sod::kNumPartials, ranks, rows * sod::kNumPartials, ids[t],
                    to + t * sod::kNumRowStats);
  }
}

Tensor vp_finish(const Tensor& partials, const Tensor& targets) {
  check_partials(partials, targets);
  Tensor out = torch::stable::new_empty(partials, {partials.size(1), sod::kNumRowStats});
  if (partials.scalar_type() == ScalarType::Double) {
    finish_rows<double>(partials, targets, out);
  } else {
    finish_rows<float>(partials, targets, out);
  }
  return out;
}

Tensor vp_second(const Tensor& student, const Tensor& teacher, const Tensor& targets,
                 const Tensor& rows, int64_t valid_cols, double inv_temperature, double beta) {
  const int64_t count = student.size(0);
  check_rows(rows, sums_type(student), count, sod::kNumRowStats, "rows");
  Tensor out = torch::stable::new_empty(student, {count, sod::kNumSecond}, sums_type(student));
  const sod::SecondArgs args = {
      logits_of(student, teacher, targets, 0, valid_cols, inv_temperature), rows.const_data_ptr(),
      out.mutable_data_ptr(), beta};
  const sod::CpuKernels& table = kernels();
  torch::stable::parallel_for(0, count, grain(valid_cols),
                              [&](int64_t b, int64_t e) { table.second(args, b, e); });
  return out;
}

void vp_grad_out(const Tensor& student, const std::optional<Tensor>& teacher, const Tensor& targets,
                 const Tensor& rows, const Tensor& coefficients, int64_t vocab_start,
                 int64_t valid_cols, double inv_temperature, double beta, Tensor out) {
  const int64_t count = student.size(0);
  check_gradient(student, rows, coefficients, out);
  const sod::GradArgs args = {
      logits_of(student, teacher, targets, vocab_start, valid_cols, inv_temperature),
      rows.const_data_ptr(),
      coefficients.const_data_ptr(),
      out.mutable_data_ptr(),
      out.stride(0),
      out.size(1),
      beta};
  const sod::CpuKernels& table = kernels();
  torch::stable::parallel_for(0, count, grain(valid_cols),
                              [&](int64_t b, int64_t e) { table.grad(args, b, e); });
}

// [2, N * K] float64: sums and counts. Chunks of fixed size, merged in order: the same bits on any
// number of threads.
Tensor step_sums(const Tensor& values, const std::optional<Tensor>& teacher, const Tensor& step_ids,
                 const Tensor& trajectory_ids, int64_t num_trajectories, int64_t num_steps) {
  sod::StepSumArgs args = step_args(step_ids, trajectory_ids, num_trajectories, num_steps);
  args.student = values_of(values, step_ids);
  args.teacher = teacher ? values_of(*teacher, step_ids) : nullptr;
  constexpr int64_t kChunk = 1 << 20;
  const int64_t tokens = step_ids.size(0), keys = num_trajectories * num_steps;
  const int64_t chunks = (tokens + kChunk - 1) / kChunk;
  std::vector<double> buffer(static_cast<size_t>(2 * keys * chunks), 0.0);
  std::atomic<bool> in_range{true};
  const sod::CpuKernels& table = kernels();
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t b, int64_t e) {
    for (int64_t c = b; c < e; ++c) {
      double* sums = buffer.data() + 2 * keys * c;
      const int64_t stop = (c + 1) * kChunk < tokens ? (c + 1) * kChunk : tokens;
      if (!table.step_sums(args, c * kChunk, stop, sums, sums + keys)) in_range = false;
    }
  });
  STD_TORCH_CHECK(in_range, "step ids must lie in 0..", num_steps,
                  ", trajectory ids of counted tokens in 0..", num_trajectories - 1);
  Tensor out = torch::stable::new_empty(values, {2, keys}, ScalarType::Double);
  double* to = static_cast<double*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < 2 * keys; ++i) {
    double total = 0;
    for (int64_t c = 0; c < chunks; ++c) total += buffer[2 * keys * c + i];
    to[i] = total;
  }
  return out;
}

// Sums -> d [N, K], w [N, K], both float32, by the paper's rule.
std::tuple<Tensor, Tensor> step_weights(const Tensor& sums, int64_t num_trajectories,
                                        int64_t num_steps, double delta, double epsilon) {
  check_step_sums(sums, num_trajectories, num_steps);
  Tensor d = torch::stable::new_empty(sums, {num_trajectories, num_steps}, ScalarType::Float);
  Tensor w = torch::stable::new_empty(sums, {num_trajectories, num_steps}, ScalarType::Float);
  const double* in = static_cast<const double*>(sums.const_data_ptr());
  float* to_d = static_cast<float*>(d.mutable_data_ptr());
  float* to_w = static_cast<float*>(w.mutable_data_ptr());
  for (int64_t n = 0; n < num_trajectories; ++n) {
    const int64_t at = n * num_steps;
    sod::trajectory_weights(in + at, in + num_trajectories * num_steps + at, num_steps, delta,
                            epsilon, to_d + at, to_w + at);
  }
  return {d, w};
}

// [T] each token's weight, 0 where not counted. Ids were checked by step_sums.
Tensor step_gather(const Tensor& weights, const Tensor& step_ids, const Tensor& trajectory_ids) {
  check_step_weights(weights);
  const sod::StepSumArgs args =
      step_args(step_ids, trajectory_ids, weights.size(0), weights.size(1));
  Tensor out = torch::stable::new_empty(weights, {step_ids.size(0)});
  const float* w = static_cast<const float*>(weights.const_data_ptr());
  float* to = static_cast<float*>(out.mutable_data_ptr());
  const sod::CpuKernels& table = kernels();
  torch::stable::parallel_for(0, step_ids.size(0), 1 << 18, [&](int64_t b, int64_t e) {
    table.step_gather(args, b, e, w, to);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sod, CPU, m) {
  m.impl("vp_stats", TORCH_BOX(&vp_stats));
  m.impl("vp_finish", TORCH_BOX(&vp_finish));
  m.impl("vp_second", TORCH_BOX(&vp_second));
  m.impl("vp_grad_out", TORCH_BOX(&vp_grad_out));
  m.impl("step_sums", TORCH_BOX(&step_sums));
  m.impl("step_weights", TORCH_BOX(&step_weights));
  m.impl("step_gather", TORCH_BOX(&step_gather));
}
