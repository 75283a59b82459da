"use strict";
// Metrics over iterations: known panels first, then any metric by name. Run B is dashed.

const share = { yMin: 0, yMax: 1, write: (v) => percent(v, 0) };
const PANELS = [
  { title: "Reward of rollouts", names: ["rollout/reward_mean"] },
  { title: "Step weight w_k", note: "mean, and the 5th, 50th and 95th percentile of all steps",
    names: ["sod/w_mean", "sod/w_p5", "sod/w_p50", "sod/w_p95"], yMin: 0 },
  { title: "Step divergence d_k by step", note: "mean |log student − log teacher|, nats per token",
    pattern: /^sod\/d_step_\d+$/, yMin: 0 },
  { title: "Step weight w_k by step", pattern: /^sod\/w_step_\d+$/, yMin: 0 },
  { title: "Tool calls and turns", note: "per trajectory",
    names: ["rollout/tool_calls_avg", "rollout/num_turns"], yMin: 0 },
  { title: "Failed tool calls", note: "share of steps with a call",
    pattern: /^tool\/(?!ok).*_rate$/, ...share, yMax: undefined },
  { title: "Lengths", note: "tokens per trajectory",
    names: ["rollout/response_length", "rollout/student_tokens"], yMin: 0 },
  { title: "Lost or cut rollouts", ...share, yMax: undefined, names: ["rollout/infra_error_rate",
    "rollout/truncated_rate", "rollout/zero_var_group_frac"] },
  { title: "Divergence of the policies", note: "nats per token",
    names: ["actor/reverse_kl", "actor/kl_k1", "actor/kl_k3"] },
  { title: "Entropy", note: "nats per token", names: ["actor/student_entropy", "actor/teacher_entropy"] },
  { title: "Gradient norm", names: ["actor/grad_norm"], yMin: 0 },
  { title: "Clipping", ...share, yMax: undefined,
    names: ["actor/pg_clipfrac", "actor/log_ratio_clipped", "sod/frac_w_above_1", "sod/frac_w_below_0.2"] },
  { title: "Learning rate", names: ["actor/lr"], yMin: 0 },
  { title: "Memory", note: "GB, highest of any rank", pattern: /^memory\/.*_gb$/, yMin: 0 },
  { title: "GPU utilisation", pattern: /^gpu\/.*\/utilisation$/, ...share },
  { title: "GPU power", note: "W", pattern: /^gpu\/.*\/power_w$/, yMin: 0 },
  { title: "GPU temperature", note: "°C", pattern: /^gpu\/.*\/temperature_c$/ },
];
const PHASES = ["rollout", "score", "train", "transfer", "record", "save", "eval"];

const shortName = (name) => name.split("/").slice(1).join(" ").replaceAll("_", " ");

function metricSeries(runs, names, smoothing) {
  const several = names.length > 1;
  return names.flatMap((name, i) => runs.flatMap((run, r) => {
    const y = run.metric(name);
    if (y === null || !y.some(Number.isFinite)) return [];
    const label = [several ? shortName(name) : "", runs.length > 1 ? "AB"[r] : ""];
    return [{ name: label.filter(Boolean).join(" · ") || shortName(name),
      x: run.metric_iteration, y: smooth(y, smoothing), dashed: r === 1,
      colour: COLOURS[(several ? i : 0) % COLOURS.length] }];
  }));
}

function metricPanel(runs, panel, smoothing) {
  const known = new Set(runs.flatMap((run) => run.meta.metric_names));
  const names = panel.names?.filter((name) => known.has(name)) ??
    [...known].filter((name) => panel.pattern.test(name)).sort(
      (a, b) => a.localeCompare(b, "en", { numeric: true }));
  const series = metricSeries(runs, names, smoothing);
  if (!series.length) return null;
  return card(panel.title, panel.note, lineChart(panel.title, series, panel));
}

/** Success on held-out tasks with 95 % intervals, and the teacher as a level line. */
function successPanel(runs) {
  const series = runs.flatMap((run, r) => {
    const rows = (model) => run.meta.evals.filter((row) => row.model === model && isNumber(row.success));
    const student = rows("student"), teacher = rows("teacher").at(-1);
    const tag = runs.length > 1 ? ` ${"AB"[r]}` : "";
    const x = student.map((row) => row.iteration);
    const found = student.length ? [{ name: `student${tag}`, x, y: student.map((row) => row.success),
      colour: "--c1", dashed: r === 1,
      band: [0, 1].map((side) => student.map((row) => row.interval?.[side] ?? row.success)) }] : [];
    if (teacher && x.length) {
      found.push({ name: `teacher${tag}`, x: [x[0], x.at(-1)], colour: "--c2", dashed: r === 1,
        y: [teacher.success, teacher.success] });
    }
    return found;
  });
  return series.length === 0 ? null : card("Success on held-out tasks",
    "band: 95 % interval", lineChart("Success on held-out tasks", series, { ...share, height: 220 }));
}

/** Accuracy of each benchmark, where the held-out tasks are of several. */
function benchmarkPanel(runs) {
  const series = runs.flatMap((run, r) => {
    const rows = run.meta.evals.filter((row) => row.model === "student" && row.sources);
    const names = [...new Set(rows.flatMap((row) => Object.keys(row.sources)))].sort();
    return names.length < 2 ? [] : names.map((name, i) => ({
      name: runs.length > 1 ? `${name} · ${"AB"[r]}` : name, dashed: r === 1,
      x: rows.map((row) => row.iteration), colour: COLOURS[i % COLOURS.length],
      y: rows.map((row) => row.sources[name]?.[`avg@${row.sources[name].num_samples}`] ?? NaN) }));
  });
  return series.length === 0 ? null : card("Success by benchmark", "mean over samples",
    lineChart("Success by benchmark", series, { ...share, height: 220 }));
}

function outcomePanel(run) {
  const names = run.meta.metric_names.filter((name) => /^tool\/(?!infra).*_rate$/.test(name));
  const used = names.filter((name) => run.metric(name).some((value) => value > 0));
  if (!used.length) return null;
  const short = (name) => name.slice(5, -5);
  used.sort((a, b) => (short(b) === "ok") - (short(a) === "ok"));
  const series = used.map((name) => ({ name: short(name).replaceAll("_", " "),
    y: run.metric(name), colour: OUTCOME_COLOURS[short(name)] ?? "--c7" }));
  return card("Tool outcomes", "share of steps with a call",
    areaChart("Tool outcomes", run.metric_iteration, series, share));
}

function phasePanel(run) {
  const used = PHASES.filter((phase) => run.metric(`time/${phase}_s`)?.some((s) => s > 0));
  if (!used.length) return null;
  const series = used.map((phase, i) => ({ name: phase, y: run.metric(`time/${phase}_s`),
    colour: COLOURS[i % COLOURS.length] }));
  return card("Seconds per iteration", "by phase",
    areaChart("Seconds per iteration", run.metric_iteration, series, { write: seconds }));
}

function curvesView(app) {
  const grid = h("div", { class: "grid" });
  let smoothing = 0, chosen = app.runs[0].meta.metric_names[0];
  const own = h("div", {});
  const drawOwn = () => own.replaceChildren(chosen ? lineChart(chosen,
    metricSeries(app.runs, [chosen], smoothing)) : "no metrics were logged");
  const draw = () => {
    const panels = [successPanel(app.runs), benchmarkPanel(app.runs),
      ...PANELS.map((p) => metricPanel(app.runs, p, smoothing)),
      ...app.runs.flatMap((run, r) => [outcomePanel(run), phasePanel(run)].filter(Boolean).map(
        (panel) => {
          if (app.runs.length > 1) panel.firstChild.append(` · run ${"AB"[r]}`);
          return panel;
        }))];
    grid.replaceChildren(...panels.filter(Boolean));
    drawOwn();
  };
  const names = [...new Set(app.runs.flatMap((run) => run.meta.metric_names))].sort();
  draw();
  return h("div", {}, h("div", { class: "bar-of-fields" },
    h("label", { class: "field" }, h("span", {}, "smoothing"), h("input", { type: "range", min: 0,
      max: 0.95, step: 0.05, value: 0, oninput: (event) => {
        smoothing = +event.target.value;
        draw();
      } }))), grid,
    card("Any metric", "all of metrics.jsonl under our names", h("div", { class: "bar-of-fields" },
      select("metric", names.map((name) => [name, name]), chosen, (name) => {
        chosen = name;
        drawOwn();
      })), own));
}
