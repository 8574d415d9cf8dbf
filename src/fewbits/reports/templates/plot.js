// Bits against loss: points, their intervals, the frontier. Shapes tell methods apart as well as colours do.
const METRICS = {
  kl_mean: { name: "KL divergence", unit: "KL divergence from the dense model, nats a token", log: true, value: (row) => row.kl_mean, digits: 4 },
  perplexity: {
    name: "Perplexity", unit: "perplexity", log: false, value: (row) => row.perplexity, interval: (row) => row.perplexity_interval,
    dense: results.dense.perplexity, digits: 3,
  },
  delta_loss: {
    name: "Loss difference", unit: "loss above the dense model's, nats a token", log: false, value: (row) => row.delta_loss,
    interval: (row) => row.delta_loss_interval, dense: 0, digits: 4,
  },
};
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.85}H${-r * 1.15}z`,
  (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0z`,
  (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.85}H${-r * 1.15}z`,
  (r) => { const a = r * 0.42, b = r * 1.2; return `M${-a},${-b}h${2 * a}v${b - a}h${b - a}v${2 * a}h${a - b}v${b - a}h${-2 * a}v${a - b}h${a - b}v${-2 * a}h${b - a}z`; },
];
const shape = (row, r) => SHAPES[methods.indexOf(row.method) % SHAPES.length](r);

function scale(low, high, from, to, log) {
  const of = log ? Math.log10 : (value) => value;
  const span = of(high) - of(low) || 1;
  return (value) => from + ((of(value) - of(low)) / span) * (to - from);
}

function ticks(low, high, log, count) {
  if (log) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const digit of [1, 2, 5]) found.push(Number(`${digit}e${power}`));
    }
    return found.filter((value) => value >= low && value <= high);
  }
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= rough) || 10 * power;
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

// The configurations that no other beats at as few bits, for the chosen measure.
function frontier(metric) {
  const sorted = [...rows].sort((a, b) => a.bits_per_weight - b.bits_per_weight || metric.value(a) - metric.value(b));
  let best = Infinity;
  return sorted.filter((row) => { const better = metric.value(row) < best; best = Math.min(best, metric.value(row)); return better; });
}

function pointTip(row) {
  const timing = results.timing[row.name];
  const pairs = [["bits per weight", fixed(row.bits_per_weight, 3)]];
  for (const [role, bits] of Object.entries(row.bits)) pairs.push([`  ${role.replaceAll("_", " ")}`, fixed(bits, 3)]);
  pairs.push(["perplexity", fixed(row.perplexity, 3)], ["  95% interval", row.perplexity_interval.map((one) => fixed(one, 2)).join(" – ")]);
  pairs.push(["KL divergence", `${fixed(row.kl_mean, 4)} nats`], ["  99th percentile", fixed(row.kl_p99, 3)]);
  pairs.push(["same top token", `${(100 * row.top1_agreement).toFixed(1)}%`]);
  pairs.push(["time", (timing.resumed ? "more than " : "") + seconds(spent(row))], ["peak memory", megabytes(timing.peak_memory_bytes)]);
  if (timing.tokens_per_second) pairs.push(["writes", `${timing.tokens_per_second.toFixed(1)} tokens/s`]);
  return told(row.name, pairs);
}

function drawPlot() {
  const holder = byId("plot"), metric = METRICS[state.metric];
  const width = Math.max(280, holder.clientWidth), height = Math.round(Math.min(460, Math.max(280, width * 0.5)));
  const left = 58, right = width - 14, top = 14, bottom = height - 42;
  const bits = rows.map((row) => row.bits_per_weight), margin = Math.max(0.12, (Math.max(...bits) - Math.min(...bits)) * 0.08);
  const [minBits, maxBits] = [Math.min(...bits) - margin, Math.max(...bits) + margin];
  const values = rows.flatMap((row) => (metric.interval ? metric.interval(row) : [metric.value(row)]));
  if (metric.dense !== undefined) values.push(metric.dense);
  const positive = metric.log ? values.map((value) => Math.max(value, 1e-9)) : values;
  let [low, high] = [Math.min(...positive), Math.max(...positive)];
  if (metric.log) [low, high] = [low / 1.4, high * 1.4];
  else { const pad = (high - low || 1) * 0.06; [low, high] = [low - pad, high + pad]; }
  const x = scale(minBits, maxBits, left, right, false), y = scale(low, high, bottom, top, metric.log);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `Bits per weight against ${metric.unit}` });
  drawAxes(svg, { x, y, left, right, top, bottom, width, height, metric, low, high, minBits, maxBits });
  const line = frontier(metric).map((row) => `${x(row.bits_per_weight)},${y(Math.max(metric.value(row), 1e-9))}`).join(" ");
  svg.append(draw("polyline", { class: "frontier", points: line }));
  const ordered = [...rows].sort((a, b) => a.bits_per_weight - b.bits_per_weight);
  const places = ordered.map((row) => ({ row, px: x(row.bits_per_weight), py: y(Math.max(metric.value(row), 1e-9)) }));
  places.forEach((place, index) => svg.append(drawPoint(place, index, ordered, metric, y)));
  drawNames(svg, places, { left, right, top, bottom });
  holder.replaceChildren(svg);
}

function drawAxes(svg, box) {
  const { x, y, left, right, bottom, width, height, metric } = box;
  for (const value of ticks(box.low, box.high, metric.log, 6)) {
    svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(box.minBits, box.maxBits, false, width < 500 ? 4 : 8)) {
    svg.append(draw("line", { class: "grid", x1: x(value), x2: x(value), y1: box.top, y2: bottom }));
    svg.append(draw("text", { x: x(value), y: bottom + 18, "text-anchor": "middle" }, short(value)));
  }
  svg.append(draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }));
  svg.append(draw("text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, "bits per weight, everything stored counted"));
  svg.append(draw("text", { transform: `translate(13 ${(box.top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, width < 500 ? metric.name : metric.unit));
  if (metric.dense !== undefined) {
    svg.append(draw("line", { class: "dense", x1: left, x2: right, y1: y(metric.dense), y2: y(metric.dense) }));
    svg.append(draw("text", { x: right, y: y(metric.dense) - 6, "text-anchor": "end" }, "dense"));
  }
}

function drawPoint({ row, px, py }, index, ordered, metric, y) {
  const group = draw("g", {
    class: `point${shown(row) ? "" : " dim"}`, transform: `translate(${px} ${py})`, tabindex: 0, role: "button", "data-place": `point:${row.name}`,
    "data-name": row.name, "aria-pressed": String(state.chosen.has(row.name)),
    "aria-label": `${row.name}: ${fixed(row.bits_per_weight, 3)} bits per weight, perplexity ${fixed(row.perplexity, 3)}, KL ${fixed(row.kl_mean, 4)}`,
    onclick: () => choose(row.name),
    onkeydown: (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(row.name); }
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) {
        event.preventDefault();
        const next = ordered[(index + step + ordered.length) % ordered.length].name;
        document.querySelector(`[data-place="point:${CSS.escape(next)}"]`).focus();
      }
    },
    ...tipped(() => pointTip(row)),
  });
  group.append(draw("circle", { class: "hit", r: 16 }));
  if (metric.interval) {
    const [low, high] = metric.interval(row).map((value) => y(value) - py);
    group.append(draw("line", { class: "whisker", x1: 0, x2: 0, y1: low, y2: high, stroke: colour(row) }));
  }
  group.append(draw("circle", { class: "ring", r: 11 }), draw("path", { class: "mark", d: shape(row, 6.5), fill: colour(row) }));
  return group;
}

// A name stands beside its point where nothing else does; who finds no place is told by the tip.
function drawNames(svg, places, box) {
  const taken = places.map(({ px, py }) => [px - 9, py - 9, px + 9, py + 9]);
  const meets = (a, b) => a[0] < b[2] && a[2] > b[0] && a[1] < b[3] && a[3] > b[1];
  for (const { row, px, py } of places) {
    const size = row.name.length * 6.6;
    const tries = [[px + 12, py + 4, "start"], [px - 12, py + 4, "end"], [px, py - 14, "middle"], [px, py + 24, "middle"]];
    for (const [tx, ty, anchor] of tries) {
      const start = anchor === "start" ? tx : anchor === "end" ? tx - size : tx - size / 2;
      const area = [start, ty - 12, start + size, ty + 3];
      if (area[0] < box.left || area[2] > box.right || area[1] < box.top - 6 || area[3] > box.bottom || taken.some((other) => meets(area, other))) continue;
      taken.push(area);
      svg.append(draw("text", { class: `name${shown(row) ? "" : " dim"}`, x: tx, y: ty, "text-anchor": anchor, "aria-hidden": "true" }, row.name));
      break;
    }
  }
}

function drawLegend() {
  const chosen = (method) => { const mine = rows.filter((row) => row.method === method); return mine.length > 0 && mine.every((row) => state.chosen.has(row.name)); };
  byId("methods").replaceChildren(...methods.map((method) => {
    const row = rows.find((one) => one.method === method);
    const mark = draw("svg", { viewBox: "-8 -8 16 16", width: 14, height: 14, "aria-hidden": "true" }, draw("path", { d: shape(row, 6), fill: colour(row) }));
    return make("li", {}, make("button", {
      type: "button", "aria-pressed": String(chosen(method)), "data-place": `method:${method}`, title: row.paper, onclick: () => chooseMethod(method),
    }, mark, method));
  }));
  choice(byId("metric"), Object.entries(METRICS).map(([key, one]) => [key, one.name]), state.metric, (key) => { state.metric = key; redraw(); });
  byId("plot-note").textContent = "The dashed line joins what nothing beats at as few bits. Choose a point to see it alone below; choose more to compare them; Escape shows all again.";
}

views.push(drawPlot, drawLegend);
