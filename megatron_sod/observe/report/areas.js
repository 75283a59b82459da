"use strict";
// Shares over time, histograms, and values by iteration and step.

/** series: [{name, colour, y}] stacked from below; y adds up to anything. */
function areaChart(title, x, series, options = {}) {
  const legend = h("div", { class: "legend" }, [...series].reverse().map((s) =>
    h("span", {}, h("i", { style: `--hue: var(${s.colour})` }), s.name)));
  return h("div", {}, legend, responsive(describe(title, series), (width) => {
    const height = options.height ?? 190, write = options.write ?? num;
    const total = Array.from(x, (_, i) => series.reduce((sum, s) => sum + (s.y[i] || 0), 0));
    const high = options.yMax ?? (extent(total)[1] * 1.05 || 1);
    const { px, py, axes, right, bottom } = frame(width, height, extent(x), [0, high], options);
    let below = Array.from(x, () => 0);
    const layers = series.map((s) => {
      const top = below.map((value, i) => value + (s.y[i] || 0));
      const edge = Array.from(x, (v, i) => [v, top[i]]);
      const back = Array.from(x, (v, i) => [v, below[i]]).reverse();
      below = top;
      return svg("path", { class: "area", style: `--hue: var(${s.colour})`,
        d: linePath([...edge, ...back], px, py) + "Z" });
    });
    const read = series.map((s) => ({ ...s, x: Array.from(x) })).reverse();
    return [[...layers, ...axes, reader(read, { px, right, bottom }, { write, ...options })], height];
  }));
}

/** series: [{name, colour, counts}] side by side over the same bins; labels name the bins. */
function barChart(title, labels, series, options = {}) {
  const legend = series.length < 2 ? null : h("div", { class: "legend" }, series.map((s) =>
    h("span", {}, h("i", { style: `--hue: var(${s.colour})` }), s.name)));
  return h("div", {}, legend, responsive(title, (width) => {
    const height = options.height ?? 170, write = options.write ?? num;
    const high = options.yMax ?? (Math.max(...series.flatMap((s) => s.counts)) * 1.08 || 1);
    const { py, axes, right, bottom } = frame(width, height, [NaN, NaN], [0, high], { write });
    const slot = (right - MARGIN.left) / labels.length;
    const thick = (slot * 0.82) / series.length;
    const every = Math.ceil(34 / slot);
    const bars = labels.flatMap((label, i) => [
      ...series.map((s, j) => svg("rect", {
        class: "bar", style: `--hue: var(${s.colour})`,
        x: MARGIN.left + i * slot + slot * 0.09 + j * thick, width: Math.max(1, thick - 1),
        y: py(s.counts[i] || 0), height: Math.max(0, bottom - py(s.counts[i] || 0)),
      })),
      i % every === 0 ? svg("text", { class: "tick", y: bottom + 16, "text-anchor": "middle",
        x: MARGIN.left + (i + 0.5) * slot }, label) : null,
      svg("rect", { class: "catch", x: MARGIN.left + i * slot, y: 0, width: slot, height: bottom,
        onpointermove: (event) => tip.show(event.clientX, event.clientY, [h("b", {}, label),
          ...series.map((s) => h("div", {}, h("i", { style: `--hue: var(${s.colour})` }),
            `${s.name} `, h("b", {}, write(s.counts[i]))))]),
        onpointerleave: () => tip.hide() }),
    ]);
    return [[...axes, ...bars].filter(Boolean), height];
  }));
}

/** cells[row][column] or undefined; hue(value) names a CSS colour; rows are step numbers. */
function heatMap(title, columns, cells, hue, options = {}) {
  const write = options.write ?? num;
  return responsive(title, (width) => {
    const size = 20, left = 46, top = 4;
    const rows = cells.length - 1, slot = (width - left - 8) / columns.length;
    const every = Math.ceil(44 / slot), art = [];
    for (let k = 1; k <= rows; k++) {
      const y = top + (rows - k) * size;
      art.push(svg("text",
        { class: "tick", x: left - 8, y: y + size / 2 + 4, "text-anchor": "end" }, `k = ${k}`));
      columns.forEach((column, c) => {
        const value = cells[k]?.[c];
        if (!isNumber(value)) return;
        art.push(svg("rect", { x: left + c * slot, y, width: Math.max(0.5, slot - (slot > 6 ? 1 : 0)),
          height: size - 1, fill: hue(value),
          onpointermove: (event) => tip.show(event.clientX, event.clientY,
            [h("b", {}, `iteration ${column}, step ${k}`), h("div", {}, write(value))]),
          onpointerleave: () => tip.hide() }));
      });
    }
    columns.forEach((column, c) => {
      if (c % every === 0) art.push(svg("text", { class: "tick", "text-anchor": "middle",
        x: left + (c + 0.5) * slot, y: top + rows * size + 15 }, String(column)));
    });
    return [art, top + rows * size + 22];
  });
}

/** Mean of `values` per step number and iteration; neighbouring iterations share a column. */
function byIterationAndStep(run, values, maxColumns = 80, maxSteps = 16) {
  const iterations = [...new Set(run.iteration)].sort((a, b) => a - b);
  const size = Math.ceil(iterations.length / maxColumns) || 1;
  const column = new Map(iterations.map((iteration, i) => [iteration, Math.floor(i / size)]));
  const names = iterations.filter((_, i) => i % size === 0);
  const sums = [], counts = [], numbers = stepNumbers(run), when = stepIterations(run);
  for (let m = 0; m < values.length; m++) {
    const k = numbers[m], c = column.get(when[m]);
    if (k > maxSteps || Number.isNaN(values[m])) continue;
    (sums[k] ??= [])[c] = (sums[k][c] ?? 0) + values[m];
    (counts[k] ??= [])[c] = (counts[k][c] ?? 0) + 1;
  }
  const cells = sums.map((row, k) => row.map((sum, c) => sum / counts[k][c]));
  return { columns: names, cells: cells.length ? cells : [[]] };
}

function histogram(values, low, high, bins) {
  const counts = new Array(bins).fill(0);
  for (const value of values) {
    if (Number.isNaN(value)) continue;
    const at = Math.floor(((value - low) / (high - low)) * bins);
    counts[Math.min(bins - 1, Math.max(0, at))]++;
  }
  return counts;
}

/** Shades from the surface's own colour to a hue; t in 0..1. */
const shade = (variable, t) => {
  const share = Math.round(100 * Math.min(1, Math.max(0.04, t)));
  return `color-mix(in oklab, var(${variable}) ${share}%, var(--surface))`;
};

/** Weights: below 1 towards orange, above 1 towards blue. */
const weightHue = (w) => (w <= 1 ? shade("--low", 1 - w) : shade("--high", (w - 1) / 0.4));
