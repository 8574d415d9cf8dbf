// The parts that follow the choice: table, heat map, bars, samples.
const COLUMNS = [
  ["name", "configuration", (row) => row.name, null],
  ["bits_per_weight", "bits per weight", (row) => row.bits_per_weight, (row) => fixed(row.bits_per_weight, 3)],
  ["perplexity", "perplexity", (row) => row.perplexity, (row) => fixed(row.perplexity, 3)],
  ["kl_mean", "KL", (row) => row.kl_mean, (row) => fixed(row.kl_mean, 4)],
  ["top1", "same top token", (row) => row.top1_agreement, (row) => `${(100 * row.top1_agreement).toFixed(1)}%`],
  ["difference", "loss difference", (row) => against(row)?.difference ?? 0, null],
  ["verdict", "verdict", (row) => against(row)?.said ?? "", null],
  ["seconds", "time", (row) => spent(row), (row) => seconds(spent(row))],
  ["memory", "peak memory", (row) => results.timing[row.name].peak_memory_bytes, (row) => megabytes(results.timing[row.name].peak_memory_bytes)],
];

function against(row) { return row.name === state.baseline ? null : results.pairs[row.name][state.baseline]; }

function mark(row) {
  return draw("svg", { viewBox: "-8 -8 16 16", width: 13, height: 13, "aria-hidden": "true" }, draw("path", { d: shape(row, 6), fill: colour(row) }));
}

function picker(row, where) {
  return make("button", {
    type: "button", class: "pick", "aria-pressed": String(state.chosen.has(row.name)), "data-place": `${where}:${row.name}`, onclick: () => choose(row.name),
  }, mark(row), row.name);
}

function cell(row, [key, , , text]) {
  if (key === "name") return make("td", {}, picker(row, "row"));
  const found = against(row);
  if (key === "difference") {
    return found ? make("td", {}, signed(found.difference, 4), make("span", { class: "soft" }, ` [${found.interval.map((one) => signed(one, 4)).join(", ")}]`)) : make("td", {}, "");
  }
  if (key === "verdict") {
    const said = found ? found.said : "baseline";
    return make("td", {}, make("span", { class: `pill ${said.replaceAll(" ", "-")}` }, said));
  }
  return make("td", {}, text(row));
}

function drawTable() {
  const [key, direction] = state.sort, column = COLUMNS.find(([name]) => name === key);
  const sorted = [...rows].sort((a, b) => { const [one, two] = [column[2](a), column[2](b)]; return direction * (one < two ? -1 : one > two ? 1 : 0); });
  const head = COLUMNS.map(([name, text]) => make("th", {
    scope: "col", "aria-sort": name === key ? (direction > 0 ? "ascending" : "descending") : "none",
  }, make("button", {
    type: "button", "data-place": `sort:${name}`, onclick: () => { state.sort = [name, name === key ? -direction : 1]; redraw(); },
  }, text)));
  const body = sorted.map((row) => make("tr", { class: state.chosen.has(row.name) ? "on" : shown(row) ? "" : "off", "data-name": row.name }, COLUMNS.map((one) => cell(row, one))));
  byId("rows").replaceChildren(make("caption", { class: "sr" }, "All configurations"), make("thead", {}, make("tr", {}, head)), make("tbody", {}, body));
  byId("baseline").replaceChildren(...rows.map((row) => make("option", { value: row.name, selected: row.name === state.baseline }, row.name)));
  const noise = results.noise ? ` A difference within ±${short(results.noise.floor)} nats is what bfloat16 arithmetic alone does to the dense model.` : "";
  const repeats = record.settings.repeats > 1 ? ` ${record.settings.repeats} calibration seeds and the windows of text are drawn together.` : " Windows of text are drawn in pairs.";
  byId("table-note").textContent = `Loss differences in nats a token with 95% bootstrap intervals.${repeats} Better or worse is said only where the whole interval is on one side of the noise.${noise}`;
}

// A layer's name is its block's number and what follows it.
function parts(name) {
  const words = name.split("."), place = words.findIndex((word) => /^\d+$/.test(word));
  return place < 0 ? ["0", name] : [words[place], words.slice(place + 1).join(".")];
}

function drawHeat() {
  const found = rows.filter(shown), errors = rows.flatMap((row) => Object.values(row.layers).map((one) => one.relative_error)).filter((one) => one > 0);
  const low = Math.min(...errors), high = Math.max(...errors), share = scale(low, high, 0, 100, true);
  const blocks = [...new Set(rows.flatMap((row) => Object.keys(row.layers).map((name) => parts(name)[0])))].sort((a, b) => a - b);
  const lines = found.length === 1 ? byLayer(found[0]) : found.map((row) => [picker(row, "heat"), byBlock(row)]);
  const head = make("tr", {}, make("th", { scope: "col" }, make("span", { class: "sr" }, found.length === 1 ? "layer" : "configuration")),
    blocks.map((block, index) => make("th", { scope: "col" }, blocks.length < 20 || index % 4 === 0 ? block : make("span", { class: "sr" }, block))));
  const body = lines.map(([name, values]) => make("tr", {}, make("th", { scope: "row" }, name), blocks.map((block) => heatCell(values[block], block, share))));
  byId("heat").replaceChildren(make("thead", {}, head), make("tbody", {}, body));
  byId("heat-note").textContent = found.length === 1
    ? `${found[0].name}: squared output error over squared output, each linear of each block.`
    : "Squared output error over squared output, the mean over the linears of a block. Choose one configuration to see its layers.";
  byId("ramp").replaceChildren(short(low), make("i"), short(high));
}

function byLayer(row) {
  const lines = new Map();
  for (const [name, one] of Object.entries(row.layers)) {
    const [block, kind] = parts(name);
    if (!lines.has(kind)) lines.set(kind, {});
    lines.get(kind)[block] = one.relative_error;
  }
  return [...lines];
}

function byBlock(row) {
  const sums = {};
  for (const [name, one] of Object.entries(row.layers)) {
    const [block] = parts(name);
    (sums[block] ||= []).push(one.relative_error);
  }
  return Object.fromEntries(Object.entries(sums).map(([block, all]) => [block, all.reduce((sum, one) => sum + one, 0) / all.length]));
}

function heatCell(value, block, share) {
  if (value === undefined) return make("td", { class: "none" }, make("span", { class: "sr" }, "not compressed"));
  const part = value > 0 ? Math.max(0, Math.min(100, share(value))) : 0;
  return make("td", {
    style: `background: color-mix(in oklab, var(--hot) ${part.toFixed(1)}%, var(--cold))`, ...tipped(() => told(`block ${block}`, [["relative error", short(value)]])),
  }, make("span", { class: "sr" }, short(value)));
}

function drawBars() {
  const most = Math.max(...rows.map((row) => row.bits_per_weight));
  byId("roles").replaceChildren(...roles.map((role) => make("li", { class: "key" }, make("span", { class: "swatch", style: `background: ${roleColour(role)}` }), role.replaceAll("_", " "))));
  byId("bars").replaceChildren(...rows.filter(shown).map((row) => make("div", { class: "bar" },
    make("span", { class: "name" }, picker(row, "bar")),
    make("div", { class: "track", role: "img", "aria-label": Object.entries(row.bits).map(([role, bits]) => `${role} ${fixed(bits, 3)}`).join(", ") },
      Object.entries(row.bits).map(([role, bits]) => make("span", {
        style: `width: ${(100 * bits / most).toFixed(3)}%; background: ${roleColour(role)}`, ...tipped(() => told(row.name, [[role.replaceAll("_", " "), `${fixed(bits, 4)} bits a weight`]])),
      }))),
    make("span", { class: "sum" }, fixed(row.bits_per_weight, 2)))));
}

function sameStart(one, other) {
  let count = 0;
  while (count < one.length && count < other.length && one[count] === other[count]) count += 1;
  return count;
}

function drawSamples() {
  const prompts = record.settings.prompts, dense = results.dense.samples;
  byId("samples-card").hidden = !dense.length;
  if (!dense.length) return;
  choice(byId("prompts"), prompts.map((_, index) => [index, `prompt ${index + 1}`]), state.prompt, (index) => { state.prompt = index; redraw(); });
  byId("prompt").textContent = prompts[state.prompt];
  const said = dense[state.prompt];
  const sample = (name, text, note, body) => make("article", { class: "sample" }, make("h3", {}, name, make("span", {}, note)), make("pre", {}, ...body));
  const cards = rows.filter(shown).map((row) => {
    const text = row.samples[state.prompt], same = sameStart(text, said);
    const note = same === text.length && same === said.length ? "as the dense model" : `parts after ${same} characters`;
    return sample(row.name, text, note, [make("span", { class: "same" }, text.slice(0, same)), make("mark", {}, text.slice(same))]);
  });
  byId("samples").replaceChildren(sample("dense", said, "", [said]), ...cards);
}

views.push(drawTable, drawHeat, drawBars, drawSamples);
