"use strict";
// Elements, numbers and the tooltip. Text from a run is only ever set as text, never as markup.

function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** Three or four significant digits, no noise; a dash where there is no value. */
function num(value, digits = 3) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
  return String(+value.toPrecision(digits));
}

const percent = (value, digits = 1) =>
  isNumber(value) ? `${(100 * value).toFixed(digits)}\u202f%` : "–";

/** A difference of two shares, in points: 0.4 to 0.5 is +10.0 points. */
const points = (value) => (isNumber(value) ? `${(100 * value).toFixed(1)} points` : "–");

const signed = (value, write = num) => (isNumber(value) && value > 0 ? "+" : "") + write(value);

function seconds(value) {
  if (!isNumber(value)) return "–";
  if (value < 120) return `${num(value)} s`;
  return value < 7200 ? `${num(value / 60)} min` : `${num(value / 3600)} h`;
}

const tip = {
  element: null,
  show(x, y, lines) {
    this.element ??= document.body.appendChild(h("div", { class: "tip", role: "status" }));
    this.element.replaceChildren(...lines);
    this.element.hidden = false;
    const box = this.element.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    this.element.style.left = `${Math.max(4, left)}px`;
    this.element.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 4))}px`;
  },
  hide() {
    if (this.element) this.element.hidden = true;
  },
};

function table(head, rows, attributes = {}) {
  const cell = (tag, value) => h(tag, isNumber(value) ? { class: "n" } : {},
    value instanceof Node ? value : isNumber(value) ? num(value) : String(value ?? "–"));
  return h("div", { class: "scroll" }, h("table", attributes,
    h("thead", {}, h("tr", {}, head.map((name) => h("th", {}, name)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value) => cell("td", value)))))));
}

function select(label, options, value, onchange) {
  return h("label", { class: "field" }, h("span", {}, label),
    h("select", { onchange: (event) => onchange(event.target.value) },
      options.map(([key, text]) => h("option", { value: key, selected: key === value }, text))));
}

function card(title, note, ...children) {
  return h("section", { class: "card" }, h("h3", {}, title),
    note ? h("p", { class: "note" }, note) : null, children);
}

const OUTCOME_COLOURS = {
  ok: "--c3", none: "--quiet", user_error: "--c2", timeout: "--c4", malformed: "--c5",
  infra_error: "--mute", memory: "--c6", output_limit: "--c1", rejected: "--c7",
};
const PATTERN_COLOURS = {
  stable: "--c3", erroneous: "--c2", recovery: "--c1", mixed: "--c4", short: "--mute",
};

const badge = (text, colour) =>
  h("span", { class: "badge", style: `--hue: var(${colour ?? "--mute"})` }, text);
