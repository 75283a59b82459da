"use strict";
// Lines, stacked areas, bars and heat maps as SVG, drawn again when their box changes width.

const COLOURS = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6", "--c7"];
const MARGIN = { left: 46, right: 10, top: 8, bottom: 24 };

function ticks(low, high, count) {
  const span = high - low || 1;
  const rough = span / count;
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((f) => f * base).find((size) => size >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) {
    found.push(Math.abs(at) < step * 1e-6 ? 0 : at);
  }
  return found;
}

function extent(values, fallback = [0, 1]) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low > high ? fallback : [low, high];
}

/** At most two points per pixel column, lowest and highest, so that no spike is lost. */
function thin(x, y, limit = 500) {
  if (x.length <= 2 * limit) return Array.from(x, (value, i) => [value, y[i]]);
  const size = Math.ceil(x.length / limit), points = [];
  for (let from = 0; from < x.length; from += size) {
    let low = from, high = from;
    for (let i = from; i < Math.min(from + size, x.length); i++) {
      if (y[i] < y[low] || Number.isNaN(y[low])) low = i;
      if (y[i] > y[high] || Number.isNaN(y[high])) high = i;
    }
    for (const i of low === high ? [low] : [Math.min(low, high), Math.max(low, high)]) {
      points.push([x[i], y[i]]);
    }
  }
  return points;
}

/** Moving average that starts at the first value; s = 0 leaves the values alone. */
function smooth(y, s) {
  if (!s) return y;
  let held = NaN;
  return Array.from(y, (value) => {
    if (Number.isNaN(value)) return NaN;
    held = Number.isNaN(held) ? value : s * held + (1 - s) * value;
    return held;
  });
}

function linePath(points, px, py) {
  let path = "", pen = "M";
  for (const [x, y] of points) {
    if (!Number.isFinite(y)) pen = "M";
    else {
      path += `${pen}${px(x).toFixed(1)},${py(y).toFixed(1)}`;
      pen = "L";
    }
  }
  return path;
}

/** A box that calls draw(width) at first and whenever its width changes. */
function responsive(label, draw) {
  const box = h("div", { class: "chart" });
  let width = 0;
  new ResizeObserver(([entry]) => {
    const now = Math.round(entry.contentRect.width);
    if (now < 40 || now === width) return;
    width = now;
    const [art, height] = draw(width);
    box.replaceChildren(svg("svg", {
      viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label,
    }, art));
  }).observe(box);
  return box;
}

/** Scales and axes shared by the charts with an x and a y axis. */
function frame(width, height, [x0, x1], [y0, y1], { xLabel = "", write = num } = {}) {
  const right = width - MARGIN.right, bottom = height - MARGIN.bottom;
  const px = (x) => MARGIN.left + ((x - x0) / (x1 - x0 || 1)) * (right - MARGIN.left);
  const py = (y) => bottom - ((y - y0) / (y1 - y0 || 1)) * (bottom - MARGIN.top);
  const axes = ticks(y0, y1, 4).map((y) => svg("g", {},
    svg("line", { class: "grid", x1: MARGIN.left, x2: right, y1: py(y), y2: py(y) }),
    svg("text", { class: "tick", x: MARGIN.left - 6, y: py(y) + 4, "text-anchor": "end" }, write(y))));
  const numbers = ticks(x0, x1, Math.max(2, Math.floor(width / 90))).filter(Number.isInteger);
  axes.push(...numbers.map((x) => svg("text",
    { class: "tick", x: px(x), y: bottom + 16, "text-anchor": "middle" }, String(x))));
  if (xLabel) {
    axes.push(svg("text", { class: "tick name", x: 2, y: bottom + 16 }, xLabel));
  }
  return { px, py, axes, right, bottom };
}

/**
 * series: [{name, x, y, colour, dashed, band: [low, high]}]; options: {yMin, yMax, write, xLabel}.
 * The legend hides and shows series; the pointer reads values.
 */
function lineChart(title, series, options = {}) {
  const hidden = new Set();
  const holder = h("div", {});
  const draw = () => {
    const shown = series.filter((s) => !hidden.has(s.name));
    holder.replaceChildren(responsive(describe(title, shown), (width) =>
      drawLines(width, options.height ?? 190, shown, options)));
  };
  const legend = series.length < 2 && !series[0]?.dashed ? null : h("div", { class: "legend" },
    series.map((s) => h("button", {
      type: "button", "aria-pressed": "true",
      onclick: (event) => {
        if (!hidden.delete(s.name)) hidden.add(s.name);
        event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(s.name)));
        draw();
      },
    }, h("i", { class: s.dashed ? "dashed" : "", style: `--hue: var(${s.colour})` }), s.name)));
  draw();
  return h("div", {}, legend, holder);
}

function describe(title, series) {
  const last = series.map((s) => `${s.name} ${num(s.y[s.y.length - 1])}`);
  return `${title}; last values: ${last.join(", ")}`;
}

function drawLines(width, height, series, options) {
  const all = (pick) => series.flatMap((s) => Array.from(pick(s)));
  const bands = series.flatMap((s) => (s.band ? [...s.band[0], ...s.band[1]] : []));
  let [low, high] = extent([...all((s) => s.y), ...bands]);
  const pad = (high - low || Math.abs(high) || 1) * 0.06;
  low = options.yMin ?? (low >= 0 && low < high * 0.5 ? 0 : low - pad);
  high = options.yMax ?? high + pad;
  const xs = extent(all((s) => s.x));
  const { px, py, axes, right, bottom } = frame(width, height, xs, [low, high], options);
  const art = [...axes];
  for (const s of series) {
    const points = thin(s.x, s.y), style = `--hue: var(${s.colour})`;
    if (s.band) {
      const edge = [...s.x].map((x, i) => [x, s.band[1][i]]);
      const back = [...s.x].map((x, i) => [x, s.band[0][i]]).reverse();
      art.push(svg("path", { class: "band", style, d: linePath([...edge, ...back], px, py) + "Z" }));
    }
    art.push(svg("path", {
      class: s.dashed ? "line dashed" : "line", style, d: linePath(points, px, py),
    }));
    if (points.length <= 25) {
      art.push(...points.filter(([, y]) => Number.isFinite(y)).map(([x, y]) =>
        svg("circle", { class: "dot", style, cx: px(x), cy: py(y), r: 2.6 })));
    }
  }
  art.push(reader(series, { px, right, bottom }, options));
  return [art, height];
}

/** The strip that follows the pointer and reads the nearest values of every series. */
function reader(series, { px, right, bottom }, { write = num, xLabel = "iteration" }) {
  const mark = svg("line", { class: "mark", y1: MARGIN.top, y2: bottom, visibility: "hidden" });
  const xs = [...new Set(series.flatMap((s) => Array.from(s.x)))].sort((a, b) => a - b);
  const move = (event) => {
    if (!xs.length) return;
    const at = event.clientX - event.currentTarget.ownerSVGElement.getBoundingClientRect().left;
    const x = xs.reduce((best, v) => (Math.abs(px(v) - at) < Math.abs(px(best) - at) ? v : best));
    fill(mark, { x1: px(x), x2: px(x), visibility: "visible" }, []);
    tip.show(event.clientX, event.clientY, [h("b", {}, `${xLabel} ${x}`),
      ...series.flatMap((s) => {
        const i = s.x.indexOf(x);
        return i < 0 || !Number.isFinite(s.y[i]) ? [] : [h("div", {},
          h("i", { style: `--hue: var(${s.colour})` }), `${s.name} `, h("b", {}, write(s.y[i])))];
      })]);
  };
  const leave = () => {
    tip.hide();
    mark.setAttribute("visibility", "hidden");
  };
  return svg("g", {}, mark, svg("rect", {
    class: "catch", x: MARGIN.left, y: 0, width: Math.max(0, right - MARGIN.left), height: bottom,
    onpointermove: move, onpointerdown: move, onpointerleave: leave,
  }));
}
