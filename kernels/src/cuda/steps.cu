// Launchers of K4.
#include "launch.h"
#include "sod/step_sums.cuh"

namespace sod {
namespace {

constexpr int kBlock = 256;

int blocks_for(int64_t items) {
  const int64_t wanted = (items + kBlock - 1) / kBlock, most = 16 * num_multiprocessors();
  return int(wanted < most ? wanted : most);
}

}  // namespace

const char* launch_step_sums(const StepSumArgs& args, int64_t tokens, int64_t* scratch,
                             double* sums, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t keys = args.num_trajectories * args.num_steps;
  if (keys == 0) return nullptr;
  if (tokens > 0) {
    if (args.wide_ids) {
      step_sums_kernel<int64_t><<<blocks_for(tokens), kBlock, 0, s>>>(args, tokens, scratch);
    } else {
      step_sums_kernel<int32_t><<<blocks_for(tokens), kBlock, 0, s>>>(args, tokens, scratch);
    }
  }
  step_finish_kernel<<<int((keys + kBlock - 1) / kBlock), kBlock, 0, s>>>(scratch, keys, sums);
  return launch_error();
}

const char* launch_step_weights(const double* sums, int64_t num_trajectories, int64_t num_steps,
                                double delta, double epsilon, float* d, float* w, void* stream) {
  if (num_trajectories == 0) return nullptr;
  const int threads = 64, blocks = int((num_trajectories + threads - 1) / threads);
  step_weights_kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(
      sums, num_trajectories, num_steps, delta, epsilon, d, w);
  return launch_error();
}

const char* launch_step_gather(const StepSumArgs& args, int64_t tokens, const float* w, float* out,
                               void* stream) {
  if (tokens == 0) return nullptr;
  const auto s = static_cast<cudaStream_t>(stream);
  if (args.wide_ids) {
    step_gather_kernel<int64_t><<<blocks_for(tokens), kBlock, 0, s>>>(args, tokens, w, out);
  } else {
    step_gather_kernel<int32_t><<<blocks_for(tokens), kBlock, 0, s>>>(args, tokens, w, out);
  }
  return launch_error();
}

}  // namespace sod
