"use strict";
// Tabs, the choice of run, and the address (#tab or #trajectory=ID).

const VIEWS = {
  overview: ["Overview", overview],
  curves: ["Curves", curvesView],
  steps: ["Steps", stepsView],
  trajectories: ["Trajectories", trajectoriesView],
  whatif: ["What if", whatIfView],
  run: ["Run", runView],
};

class App {
  constructor(runs) {
    this.runs = runs;
    this.run = runs[0];
    this.filter = emptyFilter();
    this.selected = null; // trajectory shown in the browser
    this.options = null; // of the what-if; null until its tab was opened
    this.reweighed = null;
    this.tab = "overview";
  }

  /** Weights under the what-if's options, computed once per change; null when there are none. */
  whatIf() {
    if (this.options === null) return null;
    this.reweighed ??= { options: { ...this.options }, w: reweigh(this.run, this.options) };
    return this.reweighed;
  }

  browse(filter) {
    this.filter = { ...emptyFilter(), ...filter };
    this.selected = null;
    this.go("trajectories");
  }

  open(i) {
    this.filter = emptyFilter();
    this.selected = i;
    this.go("trajectories");
  }

  switchTo(run, selected = null) {
    this.run = run;
    this.selected = selected;
    this.reweighed = this.options = null;
    this.go(this.tab);
  }

  go(tab) {
    this.tab = tab;
    this.address();
    tip.hide();
    for (const button of document.querySelectorAll("[role=tab]")) {
      button.setAttribute("aria-selected", String(button.dataset.tab === tab));
    }
    const main = document.querySelector("main");
    main.className = tab;
    main.setAttribute("aria-label", VIEWS[tab][0]);
    main.replaceChildren(VIEWS[tab][1](this));
    document.querySelectorAll("[data-run]").forEach((button) =>
      button.setAttribute("aria-pressed", String(this.runs[button.dataset.run] === this.run)));
    scrollTo(0, 0);
  }

  /** Put what is shown into the address, so that it can be shared and reloaded. */
  address() {
    const id = this.tab === "trajectories" ? this.run.meta.ids[this.selected] : undefined;
    const hash = id === undefined ? this.tab : `trajectory=${encodeURIComponent(id)}`;
    history.replaceState(null, "", `#${hash}`);
  }

  /** What the address names, else the overview. */
  start() {
    const hash = decodeURIComponent(location.hash.slice(1));
    const i = hash.startsWith("trajectory=") ? this.run.index.get(hash.slice(11)) : undefined;
    if (i !== undefined) this.open(i);
    else this.go(Object.hasOwn(VIEWS, hash) ? hash : "overview");
  }
}

function header(app) {
  const run = app.run, s = run.meta.summary, config = run.meta.config;
  const facts = [s.method ?? config.method, isNumber(s.seed ?? config.seed) ? `seed ${s.seed ?? config.seed}` : "",
    config.student ? `${config.student.path}${config.teacher ? ` ← ${config.teacher.path}` : ""}` : ""];
  return [h("div", { class: "title" }, h("h1", {}, app.runs.map((r) => r.name).join(" and ")),
    h("p", { class: "note" }, facts.filter(Boolean).join(" · "))),
  h("nav", {}, h("div", { role: "tablist" }, Object.entries(VIEWS).map(([tab, [label]]) =>
    h("button", { type: "button", role: "tab", "data-tab": tab, onclick: () => app.go(tab) }, label))),
  app.runs.length < 2 ? null : h("div", { class: "runs" }, app.runs.map((r, i) =>
    h("button", { type: "button", "data-run": i, title: r.name, onclick: () => app.switchTo(r) },
      `run ${"AB"[i]}`))))];
}

async function main() {
  const status = document.querySelector("#status");
  try {
    if (!globalThis.DecompressionStream) {
      throw new Error("this browser is too old: Chrome 80, Firefox 113 or Safari 16.4 is needed");
    }
    const texts = [...document.querySelectorAll("script[data-run-payload]")];
    const app = new App(await Promise.all(texts.map((element) => unpack(element.textContent))));
    document.querySelector("header").replaceChildren(...header(app));
    status.remove();
    app.start();
    addEventListener("hashchange", () => app.start());
    globalThis.app = app;
  } catch (error) {
    status.textContent = `The report could not be shown: ${error.message}`;
    throw error;
  }
}

main();
