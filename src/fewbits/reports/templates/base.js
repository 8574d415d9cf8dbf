"use strict";
// What is shown, what is chosen, and small tools for building elements.
const record = JSON.parse(document.getElementById("data").textContent);
const results = record.results;
const rows = results.configurations;
const SVG = "http://www.w3.org/2000/svg";
const state = { chosen: new Set(), metric: "kl_mean", baseline: results.baseline, prompt: 0, sort: ["bits_per_weight", 1] };
const views = [];  // functions that draw one part of the page anew

const methods = [...new Set(rows.map((row) => row.method))];
const roles = [...new Set(rows.flatMap((row) => Object.keys(row.bits)))];
const colour = (row) => `var(--m${methods.indexOf(row.method) % 10})`;
const roleColour = (role) => `var(--r${roles.indexOf(role) % 8})`;
const shown = (row) => !state.chosen.size || state.chosen.has(row.name);

function byId(id) { return document.getElementById(id); }

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  return dress(element, attributes, children);
}

function draw(tag, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, tag), attributes, children);
}

function dress(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function fixed(value, digits) { return value.toFixed(digits).replace("-", "−"); }

function signed(value, digits) { return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits); }

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 0.001 && size < 10000 ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace("e-", "e−").replace("e+", "e");
}

function seconds(value) {
  if (value < 100) return `${value.toFixed(1)} s`;
  return value < 5400 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
}

function spent(row) { return Object.values(results.timing[row.name].seconds).reduce((sum, one) => sum + one, 0); }

function megabytes(bytes) { return `${Math.round(bytes / 1e6).toLocaleString("en")} MB`; }

function choose(name) {
  if (state.chosen.has(name)) state.chosen.delete(name);
  else state.chosen.add(name);
  redraw();
}

function chooseMethod(method) {
  const names = rows.filter((row) => row.method === method).map((row) => row.name);
  const alone = names.length === state.chosen.size && names.every((name) => state.chosen.has(name));
  state.chosen = new Set(alone ? [] : names);
  redraw();
}

function clear() {
  state.chosen.clear();
  redraw();
}

// Drawing anew must not lose the place of who works with the keyboard.
function redraw() {
  const place = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.place : null;
  hideTip();
  views.forEach((view) => view());
  if (!place) return;
  const again = [...document.querySelectorAll("[data-place]")].find((element) => element.dataset.place === place);
  if (again) again.focus({ preventScroll: true });
}

// One of several buttons is on; arrow keys go from one to the next, as in any group of radio buttons.
function choice(holder, options, current, pick) {
  const buttons = options.map(([value, text], index) => make("button", {
    type: "button", role: "radio", "aria-checked": String(value === current), tabindex: value === current ? 0 : -1,
    "data-place": `${holder.id}:${value}`, onclick: () => pick(value),
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const next = options[(index + step + options.length) % options.length][0];
      const place = `${holder.id}:${next}`;
      pick(next);
      [...holder.children].find((element) => element.dataset.place === place).focus();
    },
  }, text));
  holder.replaceChildren(...buttons);
}

function showTip(content, box) {
  const tip = byId("tip");
  tip.replaceChildren(...content);
  tip.hidden = false;
  const width = tip.offsetWidth, height = tip.offsetHeight, page = document.documentElement.clientWidth;
  const left = Math.min(Math.max(8, box.left + box.width / 2 - width / 2), page - width - 8);
  const top = box.top - height - 10 > 0 ? box.top - height - 10 : box.bottom + 10;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${top + window.scrollY}px`;
}

function hideTip() { byId("tip").hidden = true; }

// The text of a tip: a title and pairs of what and how much.
function told(title, pairs) {
  return [make("b", {}, title), make("dl", {}, pairs.flatMap(([name, value]) => [make("dt", { class: name.startsWith(" ") && "part" }, name), make("dd", {}, value)]))];
}

const tipped = (content) => ({
  onpointerenter: (event) => showTip(content(), event.currentTarget.getBoundingClientRect()),
  onpointerleave: hideTip,
  onfocus: (event) => showTip(content(), event.currentTarget.getBoundingClientRect()),
  onblur: hideTip,
});
