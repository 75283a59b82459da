"use strict";
// The first screen, the comparison of two runs, and what a run was made with.

const lastOf = (run, name) => run.metric(name)?.findLast?.((v) => !Number.isNaN(v)) ?? NaN;

/** Label, how to write it, value: what a reader asks for first. */
function headline(run) {
  const student = run.meta.evals.filter((row) => row.model === "student");
  const teacher = run.meta.evals.filter((row) => row.model === "teacher").at(-1);
  const s = run.meta.summary, failed = 1 - lastOf(run, "tool/ok_rate");
  return [
    ["success before", percent, student[0]?.success, student[0]?.interval],
    ["success after", percent, student.length > 1 ? student.at(-1).success : NaN,
      student.length > 1 ? student.at(-1).interval : null],
    ["teacher", percent, teacher?.success, teacher?.interval],
    ["reward, last iteration", num, lastOf(run, "rollout/reward_mean")],
    ["trust w_k, mean", num, lastOf(run, "sod/w_mean")],
    ["divergence d_k, mean", num, lastOf(run, "sod/d_mean")],
    ["failed tool calls", percent, failed],
    ["iterations", num, s.iterations ?? run.metric_iteration.length],
    ["rollout tokens", num, s.tokens],
    ["wall time", seconds, s.wall_s],
  ].filter(([, , value]) => isNumber(value));
}

function tiles(run) {
  return h("div", { class: "tiles" }, headline(run).map(([label, write, value, interval]) =>
    h("div", { class: "tile" }, h("b", {}, write(value)), h("span", {}, label),
      interval ? h("small", {}, `${percent(interval[0])} to ${percent(interval[1])}`) : null)));
}

function comparison(runs) {
  const [a, b] = runs.map((run) => new Map(headline(run).map((row) => [row[0], row])));
  const rows = [...new Set([...a.keys(), ...b.keys()])].map((label) => {
    const write = (a.get(label) ?? b.get(label))[1];
    const [x, y] = [a, b].map((side) => side.get(label)?.[2]);
    const cell = (side) => {
      const [, , value, interval] = side.get(label) ?? [];
      return write(value) + (interval ? ` (${percent(interval[0])} to ${percent(interval[1])})` : "");
    };
    return [label, cell(a), cell(b), isNumber(x) && isNumber(y)
      ? signed(y - x, write === percent ? points : write) : "–"];
  });
  return card("Two runs", "In curves run B is dashed. Success: compare the intervals, not the points.",
    table(["", `A: ${runs[0].name}`, `B: ${runs[1].name}`, "B − A"], rows));
}

function overview(app) {
  const run = app.run, outcome = outcomePanel(run);
  const panel = (title) => metricPanel(app.runs, PANELS.find((p) => p.title === title), 0);
  const notes = app.runs.flatMap((r) => r.meta.notes.map((note) => h("li", {}, `${r.name}: ${note}`)));
  return h("div", {},
    app.runs.length > 1 ? comparison(app.runs) : tiles(run),
    notes.length ? card("Left out", null, h("ul", {}, notes)) : null,
    h("div", { class: "grid" }, [successPanel(app.runs), panel("Reward of rollouts"),
      panel("Step weight w_k"), outcome, phasePanel(run), panel("Memory")].filter(Boolean)),
    run.size ? patternTiles(app) : null);
}

function patternTiles(app) {
  const run = app.run, counts = run.meta.patterns.map(() => 0);
  for (const p of run.pattern) counts[p]++;
  return card("Patterns of trust", "press one to read its trajectories", h("div", { class: "tiles" },
    run.meta.patterns.map((name, p) => h("button", { type: "button", class: "tile pressable",
      disabled: !counts[p], onclick: () => app.browse({ pattern: name }) },
    h("b", {}, percent(counts[p] / run.size)), badge(name, PATTERN_COLOURS[name]),
    h("small", {}, `${num(counts[p], 8)} · ${run.meta.pattern_rules[name]}`)))));
}

/** {"a.b.c": value} of nested sections. */
function flatten(value, path = "", found = {}) {
  if (value !== null && typeof value === "object" && !Array.isArray(value)) {
    for (const [key, inner] of Object.entries(value)) flatten(inner, path ? `${path}.${key}` : key, found);
  } else found[path] = JSON.stringify(value);
  return found;
}

function runView(app) {
  const sides = app.runs.map((run) => ({ ...flatten(run.meta.config),
    ...flatten(run.meta.versions, "version") }));
  const keys = [...new Set(sides.flatMap((side) => Object.keys(side)))].sort();
  const differing = keys.filter((key) => sides.some((side) => side[key] !== sides[0][key]));
  const rows = (names) => names.map((key) => [h("code", {}, key),
    ...sides.map((side) => h("code", {}, side[key] ?? "–"))]);
  const head = ["key", ...app.runs.map((run) => run.name)];
  return h("div", {},
    app.runs.length > 1 ? card("What differs", null, differing.length ? table(head, rows(differing))
      : h("p", { class: "note" }, "nothing: both runs have one configuration")) : null,
    card("Configuration and versions", "as stored in the run's folder", keys.length
      ? table(head, rows(keys)) : h("p", { class: "note" }, "config.yaml is missing")));
}
