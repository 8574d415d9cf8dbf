// What does not change, the theme, and the first drawing.
function drawTop() {
  byId("title").textContent = record.model;
  const text = record.settings.text, best = results.dense;
  const facts = [
    ["configurations", rows.length], ["measured on", text.data], ["tokens", best.tokens.toLocaleString("en")], ["dense perplexity", fixed(best.perplexity, 3)],
    ["this run took", seconds(record.seconds)],
  ];
  byId("facts").replaceChildren(...facts.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, String(value)))));
}

function drawSelection() {
  const holder = byId("selection");
  if (!state.chosen.size) {
    holder.replaceChildren(`All ${rows.length} configurations are shown.`);
    return;
  }
  const chips = rows.filter((row) => state.chosen.has(row.name)).map((row) => make("button", {
    type: "button", class: "chip", "data-place": `chip:${row.name}`, "aria-label": `Leave out ${row.name}`, onclick: () => choose(row.name),
  }, `${row.name} ×`));
  holder.replaceChildren("Shown:", ...chips, make("button", { type: "button", class: "quiet", id: "all", onclick: clear }, "Show all"));
}

function commandLine(text) {
  const button = make("button", { type: "button", class: "copy", "aria-label": `Copy: ${text}`, onclick: () => {
    navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); });
  } }, "Copy");
  return make("div", { class: "command" }, make("pre", {}, text), button);
}

function drawCommands() {
  const single = rows.filter(shown).map((row) => make("details", { open: state.chosen.size === 1 }, make("summary", {}, row.name), record.commands.single[row.name].map(commandLine)));
  byId("commands").replaceChildren(commandLine(record.commands.all), ...single);
}

function drawMachine() {
  const settings = record.settings, calibration = settings.calibration;
  const pairs = Object.entries(record.versions).map(([name, version]) => [name, version]);
  pairs.push(...Object.entries(results.machine).map(([name, value]) => [name, String(value)]));
  pairs.push(["calibration text", `${calibration.data}, ${calibration.count} windows of ${calibration.length} tokens, seeds from ${calibration.seed}`]);
  pairs.push(["measured on", `${settings.text.data}, ${settings.text.count} windows of ${settings.text.length} tokens`]);
  pairs.push(["statistics see", settings.inputs ? `${settings.inputs} inputs` : "what each method asks for"]);
  byId("machine").replaceChildren(...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

const THEMES = ["auto", "light", "dark"];
const system = window.matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";

function applyTheme() {
  document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
  const button = byId("theme");
  button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  button.setAttribute("aria-label", `Colours: ${{ auto: "as the system has them", light: "light", dark: "dark" }[theme]}`);
}

views.push(drawSelection, drawCommands);
byId("theme").addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]; applyTheme(); });
system.addEventListener("change", applyTheme);
byId("baseline").addEventListener("change", (event) => { state.baseline = event.target.value; redraw(); });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") { hideTip(); if (state.chosen.size) clear(); } });
let width = 0;
new ResizeObserver(() => { if (byId("plot").clientWidth !== width) { width = byId("plot").clientWidth; drawPlot(); } }).observe(byId("plot"));
applyTheme();
drawTop();
drawMachine();
redraw();
