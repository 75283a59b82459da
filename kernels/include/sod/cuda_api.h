// Launchers of the CUDA kernels. Torch-free; the bindings have validated shapes, dtypes and strides.
// Every launch goes to `stream` and returns the launch's error as text, or null.
#pragma once
#include "sod/cpu_api.h"

namespace sod {

// Argument structs are the CPU implementation's: same meaning, device pointers.
const char* launch_stats(const StatsArgs& args, int64_t rows, void* stream);
const char* launch_second(const SecondArgs& args, int64_t rows, void* stream);
const char* launch_grad(const GradArgs& args, int64_t rows, void* stream);

// partials [ranks, rows, 10] -> rows [rows, 10]
const char* launch_finish(const void* partials, int64_t ranks, int64_t rows, const int64_t* targets,
                          void* out, bool is_double, void* stream);

// scratch: 4 * keys int64, zeroed; sums: [2, keys] double
const char* launch_step_sums(const StepSumArgs& args, int64_t tokens, int64_t* scratch,
                             double* sums, void* stream);
const char* launch_step_weights(const double* sums, int64_t num_trajectories, int64_t num_steps,
                                double delta, double epsilon, float* d, float* w, void* stream);
const char* launch_step_gather(const StepSumArgs& args, int64_t tokens, const float* w, float* out,
                               void* stream);

}  // namespace sod
