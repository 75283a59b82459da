"use strict";
// One trajectory, step by step: what the student wrote, the call, the result, d_k, w_k.

const FULL_NATS = 3; // a log-ratio of this size has the full colour

function trajectoryDetail(app, i, back) {
  const run = app.run, pieces = run.text(i), segments = [];
  for (const piece of pieces) {
    if (segments.at(-1)?.step !== piece.step) segments.push({ step: piece.step, pieces: [] });
    segments.at(-1).pieces.push(piece);
  }
  const other = app.runs.find((r) => r !== run && r.index.has(run.meta.ids[i]));
  const pattern = run.meta.patterns[run.pattern[i]];
  return h("article", {},
    h("button", { type: "button", class: "back link", onclick: back }, "‹ back to the list"),
    h("h3", { class: "id" }, run.meta.ids[i]),
    h("p", { class: "badges" }, badge(`iteration ${run.iteration[i]}`),
      badge(`reward ${num(run.reward[i])}`, run.reward[i] > 0 ? "--c3" : "--c5"),
      badge(`advantage ${num(run.advantage[i])}`), badge(pattern, PATTERN_COLOURS[pattern]),
      badge(`ends with ${run.meta.finish_reasons[run.finish[i]].replaceAll("_", " ")}`)),
    other ? h("button", { type: "button", class: "link",
      onclick: () => app.switchTo(other, other.index.get(run.meta.ids[i])) },
    `the same task and sample in run ${"AB"[app.runs.indexOf(other)]}`) : null,
    stepBars(run, i, app.whatIf()),
    pieces.length ? legend() : h("p", { class: "note" }, "The text of this trajectory was not kept; ",
      "observe.num_trajectories_kept says how many per iteration are."),
    pieces.length ? segments.map((segment, at) => segmentView(app, i, segment, segments[at + 1], segments[0].pieces))
      : bareSteps(app, i));
}

function legend() {
  const sample = (r) => h("i", { style: tokenStyle(r) }, signed(r));
  return h("p", { class: "legend-line" }, "log teacher − log student, nats: ",
    [-3, -1, -0.3, 0, 0.3, 1, 3].map(sample),
    " orange: the teacher finds the token less likely, blue: more likely");
}

function tokenStyle(ratio) {
  if (!isNumber(ratio) || Math.abs(ratio) < 0.05) return "";
  const t = Math.min(Math.abs(ratio) / FULL_NATS, 1);
  const edge = Math.abs(ratio) > 10 ? "text-decoration: underline wavy;" : "";
  return `background: ${shade(ratio < 0 ? "--low" : "--high", 0.12 + 0.6 * t)};${edge}`;
}

/** w_k and d_k of each step, side by side: they live on different scales. */
function stepBars(run, i, other) {
  const [from, to] = run.steps(i), x = Array.from({ length: to - from }, (_, k) => String(k + 1));
  if (!x.length || !run.d.subarray(from, to).some((d) => !Number.isNaN(d))) return null;
  const series = (name, colour, values) => ({ name, colour,
    counts: Array.from(values.subarray(from, to), (v) => (Number.isNaN(v) ? 0 : v)) });
  const weights = [series("w_k", "--c1", run.w)];
  if (other) weights.push(series(`w_k under ${other.options.policy}`, "--c4", other.w));
  return h("div", { class: "pair" },
    h("div", {}, h("h4", {}, "weight w_k by step"),
      barChart("Weight by step", x, weights, { height: 110 })),
    h("div", {}, h("h4", {}, "divergence d_k by step, nats"),
      barChart("Divergence by step", x, [series("d_k", "--c2", run.d)], { height: 110 })));
}

function segmentView(app, i, segment, next, first) {
  if (segment.step === 0) {
    const isPrompt = segment.pieces === first;
    return h("details", { class: "context", open: isPrompt },
      h("summary", {}, `${segment.pieces.length} tokens the student read${isPrompt ? ": the task" : ""}`),
      h("pre", {}, segment.pieces.map((piece) => piece.text).join("")));
  }
  const text = segment.pieces.map((piece) => piece.text).join("");
  const answer = next?.step === 0 ? next.pieces.map((piece) => piece.text).join("") : "";
  return h("section", { class: "step" }, stepHead(app, i, segment),
    h("pre", { class: "tokens" }, segment.pieces.map(token)),
    callsIn(text).map((code) => h("div", { class: "call" }, h("h5", {}, "call"), h("pre", {}, code))),
    answer ? h("div", { class: "result" }, h("h5", {}, "result"), h("pre", {}, resultIn(answer))) : null);
}

function stepHead(app, i, segment) {
  const run = app.run, m = run.steps(i)[0] + segment.step - 1;
  const outcome = run.meta.outcomes[run.outcome[m]];
  const ratios = segment.pieces.map((piece) => piece.ratio).filter(isNumber);
  const other = app.whatIf();
  return h("p", { class: "badges" }, h("b", {}, `Step ${segment.step}`),
    badge(outcome === "none" ? "no call" : outcome.replaceAll("_", " "), OUTCOME_COLOURS[outcome]),
    badge(`d ${num(run.d[m])}`, "--c2"), badge(`w ${num(run.w[m])}`, "--c1"),
    other ? badge(`w ${num(other.w[m])} under ${other.options.policy}`, "--c4") : null,
    badge(`${segment.pieces.length} tokens`),
    ratios.length ? badge(`mean log-ratio ${signed(mean(ratios))}`) : null);
}

function token(piece) {
  const read = (event) => tip.show(event.clientX, event.clientY, [
    h("b", {}, JSON.stringify(piece.text)),
    h("div", {}, `log teacher − student ${signed(piece.ratio)}`),
    isNumber(piece.logprob) ? h("div", {}, `student p ${num(Math.exp(piece.logprob))}, teacher p ` +
      num(Math.exp(piece.logprob + piece.ratio))) : "",
  ]);
  return h("span", { style: tokenStyle(piece.ratio), onpointerenter: read, onpointerdown: read,
    onpointerleave: () => tip.hide() }, piece.text);
}

/** The code of Hermes calls, with its line breaks; other families keep the text above alone. */
function callsIn(text) {
  return [...text.matchAll(/<tool_call>\s*([\s\S]*?)\s*(<\/tool_call>|$)/g)].flatMap(([, body]) => {
    try {
      const call = JSON.parse(body), values = Object.values(call.arguments ?? {});
      return [values.length === 1 && typeof values[0] === "string" ? values[0]
        : JSON.stringify(call.arguments, null, 2)];
    } catch {
      return [];
    }
  });
}

function resultIn(text) {
  const found = [...text.matchAll(/<tool_response>\n?([\s\S]*?)\n?<\/tool_response>/g)];
  return found.length ? found.map(([, body]) => body).join("\n") : text;
}

/** A trajectory without text: its steps as a table. */
function bareSteps(app, i) {
  const run = app.run, other = app.whatIf(), [from, to] = run.steps(i);
  const head = ["step", "tool", "tokens", "d_k", "w_k"];
  const rows = [];
  for (let m = from; m < to; m++) {
    const name = run.meta.outcomes[run.outcome[m]];
    rows.push([m - from + 1, badge(name.replaceAll("_", " "), OUTCOME_COLOURS[name]),
      run.step_tokens[m], run.d[m], run.w[m], ...(other ? [other.w[m]] : [])]);
  }
  return table(other ? [...head, `w_k under ${other.options.policy}`] : head, rows);
}
