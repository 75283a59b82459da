"use strict";
// The step-weight policies of megatron_sod/algorithm/step_weights.py, the same arithmetic in
// float64; a test compares the two. d: divergences in nats, NaN where a step is not scored.

const POLICIES = ["sod", "uniform", "no_cap", "running_clip", "heuristic", "mask_after_wrong"];

/** Weights of one trajectory. wrong[k]: the step's tool outcome was the student's fault. */
function stepWeights(d, wrong, { policy, delta, epsilon, wMin = null }, floor = null) {
  const first = d.findIndex((value) => !Number.isNaN(value));
  const anchor = floor === null ? d[first] : Math.max(d[first], floor);
  const firstWrong = wrong.indexOf(true);
  const late = (k) => (firstWrong < 0 ? 0 : Math.max(0, k - firstWrong));
  let carried = 1, last = anchor;
  return d.map((value, k) => {
    if (Number.isNaN(value)) return NaN;
    const ratio = k === first ? 1 : (anchor + epsilon) / (value + epsilon);
    let w = 1;
    if (policy === "sod") w = Math.min(ratio, 1 + delta);
    else if (policy === "no_cap") w = ratio;
    else if (policy === "heuristic") w = Math.pow(0.9, late(k));
    else if (policy === "mask_after_wrong") w = late(k) === 0 ? 1 : 0;
    else if (policy === "running_clip" && k !== first) {
      carried = Math.min((carried * (last + epsilon)) / (value + epsilon), 1 + delta);
      last = value;
      w = carried;
    } else if (policy === "running_clip") w = carried;
    return Math.fround(wMin === null ? w : Math.max(w, wMin));
  });
}

/** Weights of every step of a run under `options`; dFloor is a quantile of an iteration's d. */
function reweigh(run, options) {
  const floors = options.dFloor == null ? null : iterationFloors(run, options.dFloor);
  const w = new Float32Array(run.d.length).fill(NaN);
  for (let i = 0; i < run.size; i++) {
    const [from, to] = run.steps(i);
    const wrong = Array.from(run.outcome.subarray(from, to), (o) => run.wrong[o]);
    const floor = floors === null ? null : floors.get(run.iteration[i]);
    w.set(stepWeights(Array.from(run.d.subarray(from, to)), wrong, options, floor), from);
  }
  return w;
}

function iterationFloors(run, q) {
  const groups = groupBy(stepIterations(run), run.d);
  const floors = new Map();
  groups.forEach((values, iteration) => {
    floors.set(iteration, quantile(values.sort((a, b) => a - b), q));
  });
  return floors;
}
