// K4: sums and counts per step of each trajectory, from ids (steps may be cut anywhere).
// Integer atomics only: a value is split into its whole part and a 40-bit fraction, and integer
// addition gives the same bits in any order. A value that is not finite raises a flag instead.
#pragma once
#include "sod/cpu_api.h"
#include "sod/step_reduce.h"

namespace sod {

constexpr double kFraction = 1099511627776.0;  // 2^40
using Counter = unsigned long long;

__device__ __forceinline__ void add_atomic(int64_t* to, int64_t x) {
  if (x != 0) atomicAdd(reinterpret_cast<Counter*>(to), static_cast<Counter>(x));
}

__device__ __forceinline__ int64_t warp_sum(int64_t x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// scratch: [4, keys] whole parts, fractions, counts, flags.
template <typename Id>
__global__ void __launch_bounds__(256)
    step_sums_kernel(const StepSumArgs args, int64_t tokens, int64_t* scratch) {
  const Id* steps = static_cast<const Id*>(args.step_ids);
  const Id* rows = static_cast<const Id*>(args.trajectory_ids);
  const int64_t keys = args.num_trajectories * args.num_steps;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  const int64_t rounds = (tokens + stride - 1) / stride;
  for (int64_t i = 0; i < rounds; ++i) {  // whole warps stay together for the shuffles
    const int64_t t = i * stride + int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    int64_t key = -1, whole = 0, fraction = 0, flag = 0;
    if (t < tokens && steps[t] != 0) {
      const int64_t step = steps[t], row = rows[t];
      // an id out of range stops the kernel rather than write into another trajectory
      if (step < 0 || step > args.num_steps || row < 0 || row >= args.num_trajectories) __trap();
      key = row * args.num_steps + step - 1;
      const double x = args.teacher ? fabs(double(args.student[t]) - double(args.teacher[t]))
                                    : double(args.student[t]);
      flag = !(fabs(x) < 1e15);
      const double floor_x = flag ? 0.0 : floor(x);
      whole = int64_t(floor_x);
      fraction = flag ? 0 : int64_t((x - floor_x) * kFraction);
    }
    const unsigned same = __match_any_sync(0xffffffffu, static_cast<Counter>(key));
    if (same == 0xffffffffu) {  // the usual case: one step's tokens are neighbours
      const int64_t total[4] = {warp_sum(whole), warp_sum(fraction), 32, warp_sum(flag)};
      if (threadIdx.x % 32 == 0 && key >= 0) {
        for (int j = 0; j < 4; ++j) add_atomic(scratch + j * keys + key, total[j]);
      }
    } else if (key >= 0) {
      const int64_t one[4] = {whole, fraction, 1, flag};
      for (int j = 0; j < 4; ++j) add_atomic(scratch + j * keys + key, one[j]);
    }
  }
}

__global__ void step_finish_kernel(const int64_t* scratch, int64_t keys, double* sums) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= keys) return;
  const double total = double(scratch[i]) + double(scratch[keys + i]) / kFraction;
  sums[i] = scratch[3 * keys + i] ? NAN : total;
  sums[keys + i] = double(scratch[2 * keys + i]);
}

__global__ void step_weights_kernel(const double* sums, int64_t num_trajectories, int64_t num_steps,
                                    double delta, double epsilon, float* d, float* w) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= num_trajectories) return;
  const int64_t at = n * num_steps;
  trajectory_weights(sums + at, sums + num_trajectories * num_steps + at, num_steps, delta, epsilon,
                     d + at, w + at);
}

template <typename Id>
__global__ void __launch_bounds__(256)
    step_gather_kernel(const StepSumArgs args, int64_t tokens, const float* w, float* out) {
  const Id* steps = static_cast<const Id*>(args.step_ids);
  const Id* rows = static_cast<const Id*>(args.trajectory_ids);
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; t < tokens; t += stride) {
    const int64_t step = steps[t];
    out[t] = step > 0 ? w[int64_t(rows[t]) * args.num_steps + step - 1] : 0.0f;
  }
}

}  // namespace sod
