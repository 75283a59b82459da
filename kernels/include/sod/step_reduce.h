// Step divergence and step weight: closed form of the paper's product of ratios.
#pragma once
#include "sod/portable.h"

namespace sod {

// w_k = min((d_1 + epsilon) / (d_k + epsilon), 1 + delta); exactly 1 on the anchor step.
SOD_HD double step_weight(double anchor, double d, bool is_anchor, double delta, double epsilon) {
  if (is_anchor) return 1.0;
  const double ratio = (anchor + epsilon) / (d + epsilon);
  return ratio < 1.0 + delta ? ratio : 1.0 + delta;
}

// One trajectory: sums and counts of its steps in, divergence and weight out, 0 where not valid.
// A step without a counted token is not valid and keeps its number; a trajectory with a sum that is
// not finite is not valid as a whole.
SOD_HD void trajectory_weights(const double* sums, const double* counts, int64_t num_steps,
                               double delta, double epsilon, float* d, float* w) {
  bool finite = true;
  for (int64_t k = 0; k < num_steps; ++k) finite = finite && (sums[k] - sums[k] == 0.0);
  double anchor = -1.0;
  for (int64_t k = 0; k < num_steps; ++k) {
    const bool valid = finite && counts[k] > 0;
    const bool is_anchor = valid && anchor < 0;
    // through float, as the divergence is returned: the weight follows from the reported d
    d[k] = valid ? float(sums[k] / counts[k]) : 0.0f;
    if (is_anchor) anchor = d[k];
    w[k] = valid ? float(step_weight(anchor, d[k], is_anchor, delta, epsilon)) : 0.0f;
  }
}

}  // namespace sod
