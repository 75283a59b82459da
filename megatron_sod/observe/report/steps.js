"use strict";
// Divergence and weight by step number, and the paper's three patterns.

function stepsView(app) {
  const run = app.run;
  if (!run.size) return h("p", { class: "empty" }, "No steps were recorded in this run.");
  const parts = run.d.some((d) => !Number.isNaN(d))
    ? [mapsCard(run), h("div", { class: "grid wide" }, profileCards(run))]
    : [card("Divergence and weight", "No teacher scored this run: there is no d_k and no w_k.")];
  return h("div", {}, parts,
    h("h2", {}, "Patterns"), patternsSection(app));
}

function mapsCard(run) {
  const d = byIterationAndStep(run, run.d), w = byIterationAndStep(run, run.w);
  const high = quantile(Array.from(run.d).filter((v) => !Number.isNaN(v)).sort((a, b) => a - b), 0.95);
  return card("Over time, by step", "mean per iteration; darker is more",
    h("div", { class: "pair" },
      h("div", {}, h("h4", {}, "divergence d_k, nats"),
        heatMap("Mean divergence by iteration and step", d.columns, d.cells,
          (value) => shade("--low", value / (high || 1)))),
      h("div", {}, h("h4", {}, "weight w_k: orange below 1, blue above"),
        heatMap("Mean weight by iteration and step", w.columns, w.cells, weightHue))));
}

function profileCards(run) {
  const numbers = stepNumbers(run), when = stepIterations(run);
  const [first, last] = extent(run.iteration);
  const middle = (first + last) / 2;
  const profile = (values, keep) => {
    const groups = groupBy(numbers, values, keep);
    const x = Object.keys(groups).map(Number);
    const sorted = x.map((k) => groups[k].sort((a, b) => a - b));
    return { x, y: sorted.map(mean), band: [0.1, 0.9].map((q) => sorted.map((v) => quantile(v, q))) };
  };
  const halves = (values) => [
    { name: "first half of the run", colour: "--c2", ...profile(values, (m) => when[m] <= middle) },
    { name: "second half", colour: "--c1", ...profile(values, (m) => when[m] > middle) },
  ].filter((series) => series.x.length);
  const options = { yMin: 0, xLabel: "step" };
  const weights = Array.from(run.w).filter((w) => !Number.isNaN(w));
  const top = Math.max(1.25, Math.min(2, extent(weights)[1]));
  return [
    card("Divergence by step", "mean; band: 10th to 90th percentile",
      lineChart("Divergence by step", halves(run.d), options)),
    card("Weight by step", "mean; band: 10th to 90th percentile",
      lineChart("Weight by step", halves(run.w), options)),
    card("Distribution of w_k", `${num(weights.length)} steps`,
      barChart("Distribution of w_k", Array.from({ length: 25 }, (_, i) => num((i * top) / 25, 2)),
        [{ name: "steps", colour: "--c1", counts: histogram(weights, 0, top, 25) }])),
    outcomesByStep(run, numbers),
  ];
}

function outcomesByStep(run, numbers) {
  const deepest = Math.min(16, extent(numbers, [1, 1])[1]);
  const counts = run.meta.outcomes.map(() => new Array(deepest).fill(0));
  const totals = new Array(deepest).fill(0);
  for (let m = 0; m < numbers.length; m++) {
    if (numbers[m] > deepest) continue;
    counts[run.outcome[m]][numbers[m] - 1]++;
    totals[numbers[m] - 1]++;
  }
  const x = totals.map((_, k) => k + 1);
  const series = run.meta.outcomes.map((name, o) => ({ name: name.replaceAll("_", " "),
    colour: OUTCOME_COLOURS[name] ?? "--c7", y: counts[o].map((c, k) => c / (totals[k] || 1)) }));
  return card("Tool outcome by step", "“none”: the step made no call, as a final answer does",
    areaChart("Tool outcome by step", x, series, { ...share, xLabel: "step" }));
}

function patternsSection(app) {
  const run = app.run, { patterns, pattern_rules: rules } = run.meta;
  const counts = new Array(patterns.length).fill(0), solved = [...counts], erred = [...counts];
  for (let i = 0; i < run.size; i++) {
    const p = run.pattern[i], [from, to] = run.steps(i);
    counts[p]++;
    solved[p] += run.reward[i] > 0;
    erred[p] += run.outcome.subarray(from, to).some((o) => run.wrong[o]);
  }
  const rows = patterns.map((name, p) => [badge(name, PATTERN_COLOURS[name]), rules[name], counts[p],
    percent(counts[p] / run.size), percent(solved[p] / counts[p]), percent(erred[p] / counts[p]),
    h("button", { type: "button", class: "link", disabled: !counts[p],
      onclick: () => app.browse({ pattern: name }) }, "show")]);
  const epsilon = run.weight.epsilon ?? 1e-6;
  return h("div", {}, card("How trust moves within a trajectory",
    `Trust of step k is (d_1 + ε) / (d_k + ε) with the run's ε = ${epsilon}, before any cap.`,
    table(["pattern", "rule", "trajectories", "share", "with reward > 0", "with a failed call", ""], rows)),
  patternShares(run), examples(app));
}

function patternShares(run) {
  const iterations = [...new Set(run.iteration)].sort((a, b) => a - b);
  if (iterations.length < 2) return null;
  const at = new Map(iterations.map((iteration, i) => [iteration, i]));
  const counts = run.meta.patterns.map(() => new Array(iterations.length).fill(0));
  const totals = new Array(iterations.length).fill(0);
  for (let i = 0; i < run.size; i++) {
    counts[run.pattern[i]][at.get(run.iteration[i])]++;
    totals[at.get(run.iteration[i])]++;
  }
  const series = run.meta.patterns.map((name, p) => ({ name, colour: PATTERN_COLOURS[name],
    y: counts[p].map((count, i) => count / totals[i]) })).filter((s) => s.y.some((y) => y > 0));
  return card("Patterns over time", "share of an iteration's trajectories",
    areaChart("Patterns over time", iterations, series, share));
}

/** A few clear cases of each pattern, those with text first, then by how far trust moved. */
function examples(app, each = 6) {
  const run = app.run;
  return h("div", { class: "grid wide" }, ["stable", "erroneous", "recovery"].map((name) => {
    const p = run.meta.patterns.indexOf(name), found = [];
    for (let i = 0; i < run.size; i++) {
      if (run.pattern[i] === p) found.push([run.hasText(i), run.steps(i)[1] - run.steps(i)[0], i]);
    }
    found.sort((a, b) => b[0] - a[0] || b[1] - a[1] || b[2] - a[2]);
    return card(`${name[0].toUpperCase()}${name.slice(1)}: examples`, null, found.length
      ? h("ul", { class: "examples" }, found.slice(0, each).map(([, , i]) => h("li", {},
        h("button", { type: "button", class: "row-link", onclick: () => app.open(i) },
          weightStrip(run, i), h("span", { class: "id" }, run.meta.ids[i])))))
      : h("p", { class: "note" }, "none in this run"));
  }));
}

const TRUSTED = 0.8; // patterns.py: HIGH

/** One small bar per step: height and hue are w_k, a dot below marks a failed call. */
function weightStrip(run, i) {
  const [from, to] = run.steps(i), shown = Math.min(16, to - from);
  const art = [];
  for (let k = 0; k < shown; k++) {
    const w = run.w[from + k], tall = Number.isNaN(w) ? 1 : Math.max(1.5, 14 * Math.min(w / 1.2, 1));
    art.push(svg("rect", { x: k * 7, width: 5, y: 15 - tall, height: tall, class: "strip",
      style: `fill: ${Number.isNaN(w) ? "var(--mute)" : w < TRUSTED ? "var(--low)" : "var(--high)"}` }));
    if (run.wrong[run.outcome[from + k]]) {
      art.push(svg("circle", { cx: k * 7 + 2.5, cy: 18.5, r: 2, style: "fill: var(--c5)" }));
    }
  }
  const width = Math.max(1, shown) * 7;
  return svg("svg", { class: "strips", width, height: 21, viewBox: `0 0 ${width} 21`,
    "aria-hidden": "true" }, art);
}
