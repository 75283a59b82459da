"use strict";
// The list of all trajectories: filtered, sorted, and only the rows in sight exist as elements.

const ROW = 46; // px, as in page.css
const SORTS = {
  newest: ["newest first", (run) => (i) => -run.iteration[i]],
  oldest: ["oldest first", (run) => (i) => run.iteration[i]],
  low: ["lowest weight first", (run) => (i) => lowest(run, i)],
  steps: ["most steps first", (run) => (i) => run.steps(i)[0] - run.steps(i)[1]],
  tokens: ["most tokens first", (run) => (i) => -run.tokens(i)],
};

function lowest(run, i) {
  const [from, to] = run.steps(i);
  let low = Infinity;
  for (let m = from; m < to; m++) if (run.w[m] < low) low = run.w[m];
  return low;
}

const emptyFilter = () =>
  ({ words: "", pattern: "", outcome: "", finish: "", reward: "", text: "", sort: "newest" });

/** Indices of the trajectories that pass, in order. */
function filtered(run, f) {
  const place = (list, name) => list.indexOf(name);
  const pattern = place(run.meta.patterns, f.pattern), finish = place(run.meta.finish_reasons, f.finish);
  const outcome = place(run.meta.outcomes, f.outcome);
  const words = f.words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = [];
  for (let i = 0; i < run.size; i++) {
    if (f.pattern && run.pattern[i] !== pattern) continue;
    if (f.finish && run.finish[i] !== finish) continue;
    if (f.reward && (run.reward[i] > 0) !== (f.reward === "right")) continue;
    if (f.text && !run.hasText(i)) continue;
    if (f.outcome && !run.outcome.subarray(...run.steps(i)).includes(outcome)) continue;
    if (words.length && !matches(run, i, words)) continue;
    found.push(i);
  }
  const key = SORTS[f.sort][1](run), keys = new Map(found.map((i) => [i, key(i)]));
  return found.sort((a, b) => keys.get(a) - keys.get(b) || a - b);
}

/** Every word stands in the id, or `it:12` names the iteration, or the text holds it. */
function matches(run, i, words) {
  const id = run.meta.ids[i].toLowerCase();
  let text = null;
  return words.every((word) => {
    if (/^it:\d+$/.test(word)) return run.iteration[i] === +word.slice(3);
    if (id.includes(word)) return true;
    text ??= run.text(i).map((piece) => piece.text).join("").toLowerCase();
    return text.includes(word);
  });
}

function trajectoriesView(app) {
  const run = app.run, filter = app.filter, detail = h("div", { class: "detail" });
  if (!run.size) return h("p", { class: "empty" }, "No trajectories were recorded in this run.");
  const count = h("span", { class: "note", role: "status" });
  const inner = h("div", { class: "rows" });
  const list = h("div", { class: "list", tabindex: "0", "aria-label": "trajectories",
    onscroll: () => drawRows(), onkeydown: (event) => moveSelection(event) }, inner);
  const root = h("div", { class: "browser" });
  let found = [];
  const drawRows = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
    const last = Math.min(found.length, first + Math.ceil((list.clientHeight || 600) / ROW) + 9);
    inner.style.height = `${found.length * ROW}px`;
    inner.replaceChildren(...found.slice(first, last).map((i, at) =>
      row(app, i, (first + at) * ROW, () => show(i))));
  };
  const show = (i) => {
    app.selected = i;
    app.address();
    detail.replaceChildren(trajectoryDetail(app, i, () => root.classList.remove("open")));
    root.classList.add("open");
    detail.scrollTop = 0;
    drawRows();
  };
  const moveSelection = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const at = found.indexOf(app.selected) + step;
    if (!step || !found[at]?.toFixed) return;
    event.preventDefault();
    list.scrollTop = Math.min(at * ROW, Math.max(list.scrollTop, (at + 1) * ROW - list.clientHeight));
    show(found[at]);
  };
  const refresh = () => {
    found = filtered(run, filter);
    count.textContent = `${num(found.length, 8)} of ${num(run.size, 8)} trajectories`;
    list.scrollTop = 0;
    drawRows();
  };
  refresh();
  root.append(h("div", { class: "side" }, fields(run, filter, refresh), count, list), detail);
  if (app.selected !== null && app.selected < run.size) show(app.selected);
  else detail.append(h("p", { class: "empty" }, "Choose a trajectory to read it step by step."));
  new ResizeObserver(() => drawRows()).observe(list);
  return root;
}

function fields(run, filter, refresh) {
  const choice = (label, key, names) => select(label,
    [["", "any"], ...names.map((name) => [name, name.replaceAll("_", " ")])], filter[key], (value) => {
      filter[key] = value;
      refresh();
    });
  return h("div", { class: "bar-of-fields" },
    h("label", { class: "field grow" }, h("span", {}, "search"), h("input", { type: "search",
      placeholder: "id, text, or it:12", value: filter.words, oninput: (event) => {
        filter.words = event.target.value;
        refresh();
      } })),
    choice("pattern", "pattern", run.meta.patterns),
    choice("tool outcome", "outcome", run.meta.outcomes),
    choice("end", "finish", run.meta.finish_reasons),
    choice("reward", "reward", ["right", "wrong"]),
    choice("text", "text", ["kept"]),
    select("order", Object.entries(SORTS).map(([key, [name]]) => [key, name]), filter.sort, (value) => {
      filter.sort = value;
      refresh();
    }));
}

function row(app, i, top, onclick) {
  const run = app.run, name = run.meta.patterns[run.pattern[i]];
  const right = run.reward[i] > 0;
  return h("button", { type: "button", class: i === app.selected ? "row chosen" : "row",
    style: `top: ${top}px`, onclick, "data-index": i },
  h("span", { class: `mark ${right ? "right" : "wrong"}`, title: `reward ${num(run.reward[i])}` },
    right ? "✓" : "✗"),
  h("span", { class: "what" }, h("span", { class: "id" }, run.meta.ids[i]),
    h("span", { class: "about" }, `iteration ${run.iteration[i]} · ${name}`,
      run.hasText(i) ? "" : " · no text")),
  weightStrip(run, i));
}
