"use strict";
// Unpacks a run's columns (payload.py) and gives them names.

const NOT_SCORED = -32768; // text_table.py
const LOGPROB_SCALE = 1000;

async function unpack(text) {
  const packed = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const end = 4 + new DataView(buffer).getUint32(0, true);
  const meta = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, end - 4)));
  const columns = {};
  for (const [name, c] of Object.entries(meta.columns)) {
    columns[name] = new globalThis[c.type](buffer, end + c.at, c.length);
  }
  return new Run(meta, columns);
}

class Run {
  constructor(meta, columns) {
    Object.assign(this, columns); // names as in run_data.py
    this.meta = meta;
    this.name = meta.name;
    this.size = meta.ids.length;
    this.index = new Map(meta.ids.map((id, i) => [id, i]));
    this.wrong = meta.is_wrong;
    this.weight = meta.config.distill?.step_weight ?? {};
  }

  /** Values of a metric per logged iteration, or null when the run has none of that name. */
  metric(name) {
    const place = this.meta.metric_names.indexOf(name);
    const rows = this.metric_iteration.length;
    return place < 0 ? null : this.metrics.subarray(place * rows, (place + 1) * rows);
  }

  /** [first, past the last) row of trajectory i in the step columns. */
  steps(i) {
    return [this.step_start[i], this.step_start[i + 1]];
  }

  tokens(i) {
    const [from, to] = this.steps(i);
    let total = 0;
    for (let m = from; m < to; m++) total += this.step_tokens[m];
    return total;
  }

  hasText(i) {
    return this.text_of[i] >= 0;
  }

  /** The pieces of trajectory i in order: {text, step, ratio, logprob}; NaN where not scored. */
  text(i) {
    const row = this.text_of[i];
    if (row < 0) return [];
    const nats = (value) => (value === NOT_SCORED ? NaN : value / LOGPROB_SCALE);
    const found = [];
    for (let t = this.text_start[row]; t < this.text_start[row + 1]; t++) {
      found.push({
        text: this.meta.pieces[this.piece[t]],
        step: this.step[t],
        ratio: nats(this.log_ratio[t]),
        logprob: nats(this.student_logprob[t]),
      });
    }
    return found;
  }
}

/** Mean, count and quantiles of `values` per key; keys are small whole numbers from 1. */
function groupBy(keys, values, keep = () => true) {
  const groups = [];
  for (let m = 0; m < values.length; m++) {
    if (Number.isNaN(values[m]) || !keep(m)) continue;
    (groups[keys[m]] ??= []).push(values[m]);
  }
  return groups;
}

const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;

function quantile(sorted, q) {
  const at = q * (sorted.length - 1);
  const low = Math.floor(at), high = Math.ceil(at);
  return sorted[low] + (sorted[high] - sorted[low]) * (at - low);
}

/** [M] the step number of every step row. */
function stepNumbers(run) {
  const numbers = new Uint16Array(run.d.length);
  for (let i = 0; i < run.size; i++) {
    const [from, to] = run.steps(i);
    for (let m = from; m < to; m++) numbers[m] = m - from + 1;
  }
  return numbers;
}

/** [M] the iteration of every step row. */
function stepIterations(run) {
  const found = new Int32Array(run.d.length);
  for (let i = 0; i < run.size; i++) {
    const [from, to] = run.steps(i);
    found.fill(run.iteration[i], from, to);
  }
  return found;
}
