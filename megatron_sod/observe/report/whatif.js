"use strict";
// The run's steps weighed by another policy, from the recorded d_k and tool outcomes alone.

const POLICY_WORDS = {
  sod: "sod: d_1/d_k, capped at 1 + δ", uniform: "uniform: 1 everywhere",
  no_cap: "no_cap: d_1/d_k without a cap", running_clip: "running_clip: the cap is carried on",
  heuristic: "heuristic: 0.9 per step after the first failed call",
  mask_after_wrong: "mask_after_wrong: 0 after the first failed call",
};

/** The options a run was trained with, in the page's own names. */
function runOptions(run) {
  const { policy = "sod", delta = 0.2, epsilon = 1e-6, d_floor = null, w_min = null } = run.weight;
  return { policy, delta: +delta, epsilon: +epsilon, dFloor: d_floor, wMin: w_min };
}

function whatIfView(app) {
  const run = app.run;
  if (!run.d.some((d) => !Number.isNaN(d))) {
    return h("p", { class: "empty" }, "No step of this run has a divergence: there is nothing to weigh.");
  }
  app.options ??= { ...runOptions(run), policy: run.weight.policy === "uniform" ? "sod" : "uniform" };
  const results = h("div", {});
  const draw = () => {
    app.reweighed = null;
    results.replaceChildren(...whatIfResults(app));
  };
  draw();
  return h("div", {}, card("Weigh the recorded steps again",
    `The run used ${describeOptions(runOptions(run))}. Nothing is sampled again: this shows what the ` +
    "first update would have seen, not what training would have become.",
    h("div", { class: "bar-of-fields" },
      select("policy", POLICIES.map((name) => [name, POLICY_WORDS[name]]), app.options.policy,
        (value) => {
          app.options.policy = value;
          draw();
        }),
      numberField(app, "delta δ", "delta", 0, null, draw),
      numberField(app, "epsilon ε", "epsilon", 1e-12, null, draw),
      numberField(app, "d_floor (quantile)", "dFloor", 0, 1, draw),
      numberField(app, "w_min", "wMin", 0, null, draw))), results);
}

function numberField(app, label, key, low, high, draw) {
  return h("label", { class: "field" }, h("span", {}, label), h("input", { type: "number", step: "any",
    min: low, max: high, value: app.options[key] ?? "", placeholder: "off", name: key,
    oninput: (event) => {
      const text = event.target.value, value = text === "" ? null : +text;
      const required = key === "delta" || key === "epsilon";
      const bad = value === null ? required : !(value >= low) || (high !== null && value > high);
      event.target.setCustomValidity(bad ? `from ${low}${high === null ? "" : ` to ${high}`}` : "");
      event.target.reportValidity();
      if (bad) return;
      app.options[key] = value;
      draw();
    } }));
}

function describeOptions({ policy, delta, epsilon, dFloor, wMin }) {
  const extra = [dFloor === null ? "" : `, d_floor ${dFloor}`, wMin === null ? "" : `, w_min ${wMin}`];
  return `${policy} with δ = ${delta}, ε = ${epsilon}${extra.join("")}`;
}

function whatIfResults(app) {
  const run = app.run, w = app.whatIf().w, numbers = stepNumbers(run);
  const before = groupBy(numbers, run.w), after = groupBy(numbers, w), d = groupBy(numbers, run.d);
  const x = Object.keys(before).map(Number);
  const pairs = [["the run", "--c1", run.w, before], [describeOptions(app.options), "--c4", w, after]];
  const top = Math.max(1.25, Math.min(2, extent([...run.w, ...w])[1]));
  const bins = 25, labels = Array.from({ length: bins }, (_, i) => num((i * top) / bins, 2));
  return [signalTable(run, w), h("div", { class: "grid wide" },
    card("Weight by step", "mean; band: 10th to 90th percentile", lineChart("Weight by step",
      pairs.map(([name, colour, , groups]) => {
        const sorted = x.map((k) => groups[k].sort((a, b) => a - b));
        return { name, colour, x, y: sorted.map(mean),
          band: [0.1, 0.9].map((q) => sorted.map((v) => quantile(v, q))) };
      }), { yMin: 0, xLabel: "step" })),
    card("Distribution of weights", null, barChart("Distribution of weights", labels,
      pairs.map(([name, colour, values]) =>
        ({ name, colour, counts: histogram(values, 0, top, bins) }))))),
  card("By step", null, table(["step", "steps", "mean d_k", "mean w_k, run", "mean w_k, here"],
    x.map((k) => [k, before[k].length, mean(d[k]), mean(before[k]), mean(after[k])]))),
  mostChanged(app, w)];
}

/** Where the distillation signal sits: w_k n_k d_k sums a step's weighted divergence over tokens. */
function signalTable(run, w) {
  const numbers = stepNumbers(run);
  const sums = (weights) => {
    let all = 0, later = 0, wrong = 0, low = 0, count = 0;
    for (let m = 0; m < weights.length; m++) {
      if (Number.isNaN(run.d[m])) continue;
      const signal = weights[m] * run.step_tokens[m] * run.d[m];
      all += signal;
      if (numbers[m] > 1) later += signal;
      if (run.wrong[run.outcome[m]]) wrong += signal;
      low += weights[m] < 0.2;
      count++;
    }
    return [all, later / all, wrong / all, low / count];
  };
  const a = sums(run.w), b = sums(w);
  const cells = (write, i, difference = points) =>
    [write(a[i]), write(b[i]), isNumber(b[i]) ? signed(b[i] - a[i], difference) : "–"];
  return card("Where the signal sits",
    `signal of a step: w_k × tokens × d_k, the sum of ${run.weight.source === "reverse_kl"
      ? "w_k · KL(student ‖ teacher)" : "|w_k · log-ratio|"} over its tokens`,
    table(["", "the run", "here", "change"], [
      ["signal, all steps, nats", ...cells(num, 0, num)],
      ["share in steps after the first", ...cells(percent, 1)],
      ["share in steps with a failed call", ...cells(percent, 2)],
      ["steps with w_k < 0.2", ...cells(percent, 3)],
    ]));
}

function mostChanged(app, w) {
  const run = app.run, changes = [];
  for (let i = 0; i < run.size; i++) {
    let most = 0;
    for (let m = run.steps(i)[0]; m < run.steps(i)[1]; m++) {
      const change = Math.abs(w[m] - run.w[m]);
      if (change > most) most = change;
    }
    if (most > 1e-6) changes.push([most, run.hasText(i), i]);
  }
  changes.sort((a, b) => b[1] - a[1] || b[0] - a[0]);
  const rows = changes.slice(0, 10).map(([change, , i]) => h("li", {},
    h("button", { type: "button", class: "row-link", onclick: () => app.open(i) },
      weightStrip(run, i), h("span", { class: "id" }, run.meta.ids[i]),
      h("span", { class: "about" }, `largest change ${num(change)}`))));
  return card("Changed trajectories", `${num(changes.length, 8)} of ${num(run.size, 8)}`,
    rows.length ? h("ul", { class: "examples" }, rows) : h("p", { class: "note" }, "none"));
}
