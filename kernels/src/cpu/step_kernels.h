// Segmented sums over packed tokens. Tokens of one step are mostly neighbours, so the walk goes by
// runs of equal ids: find the run's end, sum it in registers, add once. Fixed order, no atomics.
#pragma once
#include "sod/cpu_api.h"
#include "sod/portable.h"
#include "vec_scalar.h"

namespace sod {
inline namespace SOD_ISA {

template <typename Id>
SOD_HD int64_t run_end(const Id* steps, const Id* rows, int64_t begin, int64_t end) {
  const Id step = steps[begin], row = rows[begin];
  int64_t t = begin + 1;
  for (; t + 32 <= end; t += 32) {
    Id differs = 0;  // vectorises: no branch inside
    for (int64_t i = 0; i < 32; ++i) differs |= (steps[t + i] ^ step) | (rows[t + i] ^ row);
    if (differs) break;
  }
  while (t < end && steps[t] == step && rows[t] == row) ++t;
  return t;
}

// False when an id is out of range; nothing is written for it.
template <typename Id>
SOD_HD bool sum_runs(const StepSumArgs& args, int64_t begin, int64_t end, double* sums,
                     double* counts) {
  const Id* steps = static_cast<const Id*>(args.step_ids);
  const Id* rows = static_cast<const Id*>(args.trajectory_ids);
  for (int64_t t = begin; t < end;) {
    const int64_t stop = run_end(steps, rows, t, end);
    if (steps[t] < 0 || int64_t(steps[t]) > args.num_steps) return false;
    if (steps[t] > 0) {
      if (rows[t] < 0 || int64_t(rows[t]) >= args.num_trajectories) return false;
      const int64_t key = int64_t(rows[t]) * args.num_steps + int64_t(steps[t]) - 1;
      // 32 float chains of at most 32 adds each, then double: fast, and accurate to 1e-7
      double total = 0;
      for (int64_t base = t; base < stop; base += 1024) {
        const int64_t last = base + 1024 < stop ? base + 1024 : stop;
        float lane[32] = {};
        int64_t i = base;
        for (; i + 32 <= last; i += 32) {
          for (int j = 0; j < 32; ++j) {
            const float x = args.student[i + j];
            lane[j] += args.teacher ? std::fabs(x - args.teacher[i + j]) : x;
          }
        }
        for (; i < last; ++i) {
          const float x = args.student[i];
          lane[0] += args.teacher ? std::fabs(x - args.teacher[i]) : x;
        }
        for (int j = 0; j < 32; ++j) total += lane[j];
      }
      sums[key] += total;
      counts[key] += double(stop - t);
    }
    t = stop;
  }
  return true;
}

template <typename Id>
SOD_HD void gather_runs(const StepSumArgs& args, int64_t begin, int64_t end, const float* w,
                        float* out) {
  const Id* steps = static_cast<const Id*>(args.step_ids);
  const Id* rows = static_cast<const Id*>(args.trajectory_ids);
  for (int64_t t = begin; t < end;) {
    const int64_t stop = run_end(steps, rows, t, end);
    const int64_t key = int64_t(rows[t]) * args.num_steps + int64_t(steps[t]) - 1;
    const float value = steps[t] > 0 ? w[key] : 0.0f;
    for (; t < stop; ++t) out[t] = value;
  }
}

struct StepTable {
  static bool sums(const StepSumArgs& a, int64_t b, int64_t e, double* sums, double* counts) {
    return a.wide_ids ? sum_runs<int64_t>(a, b, e, sums, counts)
                      : sum_runs<int32_t>(a, b, e, sums, counts);
  }
  static void gather(const StepSumArgs& a, int64_t b, int64_t e, const float* w, float* out) {
    a.wide_ids ? gather_runs<int64_t>(a, b, e, w, out) : gather_runs<int32_t>(a, b, e, w, out);
  }
};

}  // namespace SOD_ISA
}  // namespace sod
