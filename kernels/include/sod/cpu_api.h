// What the CPU implementation offers its bindings: plain argument structs and one function table
// per instruction set. Torch-free. Row functions work on rows [begin, end) and touch nothing else.
#pragma once
#include <cstdint>

namespace sod {

enum class DType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

struct Logits {
  const void* student;
  const void* teacher;  // null: no teacher
  int64_t student_stride, teacher_stride;  // elements between rows
  const int64_t* targets;
  int64_t vocab_start, valid_cols;
  double inv_temperature, scale;  // scale = log2(e) / temperature
  DType dtype;
};

struct StatsArgs {
  Logits logits;
  void* partials;  // [T, kNumPartials], float (double for kFloat64)
};

struct SecondArgs {
  Logits logits;
  const void* rows;  // [T, kNumRowStats]
  void* sums;        // [T, kNumSecond]
  double beta;
};

struct GradArgs {
  Logits logits;
  const void* rows;
  const void* coefficients;  // [T, kNumCoefficients]
  void* out;                 // [T, width], the logits' dtype; may be the student logits themselves
  int64_t out_stride, width;
  double beta;
};

// Tokens [begin, end) -> their sums and counts by key, added to `sums` and `counts`.
struct StepSumArgs {
  const float* student;  // [T] logprobs, or any per-token value when teacher is null
  const float* teacher;  // [T] or null: then the value itself is summed, else |student - teacher|
  const void* step_ids;  // 0 = not counted
  const void* trajectory_ids;
  bool wide_ids;  // ids are int64, else int32
  int64_t num_trajectories, num_steps;
};

struct CpuKernels {
  const char* name;
  void (*stats)(const StatsArgs&, int64_t begin, int64_t end);
  void (*second)(const SecondArgs&, int64_t begin, int64_t end);
  void (*grad)(const GradArgs&, int64_t begin, int64_t end);
  // false: an id is out of range
  bool (*step_sums)(const StepSumArgs&, int64_t begin, int64_t end, double* sums, double* counts);
  void (*step_gather)(const StepSumArgs&, int64_t begin, int64_t end, const float* w, float* out);
};

const CpuKernels* avx512_kernels();  // null where this build or machine has none
const CpuKernels* avx2_kernels();
const CpuKernels* scalar_kernels();

// The widest set this machine has, or the one SOD_CPU_ISA names (avx512 | avx2 | scalar).
// Null, with *problem set, when the named one does not exist here.
const CpuKernels* chosen_kernels(const char** problem);

}  // namespace sod
