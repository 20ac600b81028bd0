// The map: fetched, coloured, explained; what was found is marked on it.

import { Plot } from "./canvas.js";
import { at, counted, make } from "./dom.js";
import { ask } from "./service.js";
import { state } from "./state.js";

const PLAIN = "#3f7fd1"; // without a column to colour by
const OTHER = 254, NONE = 255; // in the place of a category
let plot, chart, marks = []; // keys of what was found
let opened = 0; // which map the answers on their way are of
let act = {};

export function onMap(acts) {
  act = acts;
  plot = new Plot(at("canvas"), {
    hovered: (point, x, y) => hover(point, x, y),
    picked: (point) => act.similar({ key: point.key, title: point.label }),
    reached: (point) => {
      at("map-said").textContent = described(point);
      act.pointed(point.key);
    },
  });
  at("zoom-in").addEventListener("click", () => plot.zoom(1.6));
  at("zoom-out").addEventListener("click", () => plot.zoom(1 / 1.6));
  at("zoom-all").addEventListener("click", () => plot.whole());
  at("colour").addEventListener("change", () => openMap(at("vector").value, at("colour").value));
  at("vector").addEventListener("change", () => openMap(at("vector").value, at("colour").value));
}

// The map of the chosen collection; without a colour, coloured by the first column that it has.
export async function openMap(vector, colour) {
  const mine = ++opened;
  const collection = state.collection.name;
  const fields = { collection, ...(vector ? { vector } : {}) };
  at("map-title").textContent = `Map of ${collection}`;
  let stays;
  try {
    let answer;
    if (colour === undefined) {
      answer = await ask("map", { ...fields, points: 0 });
      colour = Object.keys(answer.legends)[0] || "";
    }
    answer = await ask("map", { ...fields, ...(colour ? { colour } : {}), keys: marks });
    if (mine !== opened) return;
    stays = chart?.collection === answer.collection && chart.vector === answer.vector && chart.made_at === answer.made_at;
    chart = answer;
  } catch (error) {
    if (mine !== opened) return;
    chart = null;
    at("map").classList.add("without");
    at("map-note").textContent = error.message;
    at("legend").replaceChildren();
    return;
  }
  at("map").classList.remove("without");
  choices("vector", chart.vectors, chart.vector);
  at("vector-choice").hidden = chart.vectors.length < 2;
  choices("colour", [...Object.keys(chart.legends), ""], colour);
  at("colour-choice").hidden = !Object.keys(chart.legends).length;
  plot.show(points(chart.points), stays);
  plot.found = points(chart.found);
  showLegend();
  at("map-note").textContent = notes().join(" ");
  act.known(chart.legends);
}

function choices(id, values, chosen) {
  at(id).replaceChildren(...values.map((value) => make("option", value.replaceAll("_", " ") || "none", { value })));
  at(id).value = chosen;
}

function points({ keys, labels, x, y, colours }) {
  return keys.map((key, n) => ({ key, label: labels[n], x: x[n], y: y[n], value: colours[n], colour: colourOf(colours[n]) }));
}

function colourOf(value) {
  const legend = chart.legends[chart.colour];
  if (!legend) return PLAIN;
  if (!isNumber(legend)) return value === OTHER ? chart.other : value === NONE ? chart.none : legend.colours[value];
  if (value === null) return chart.none;
  const share = (value - legend.low) / Math.max(legend.high - legend.low, 1e-9);
  return legend.colours[Math.min(legend.colours.length - 1, Math.max(0, Math.floor(share * legend.colours.length)))];
}

const isNumber = (legend) => legend.type === "number" || legend.type === "timestamp";

function inWords(value) {
  const legend = chart.legends[chart.colour];
  if (!legend || value === null || value === NONE) return "";
  if (legend.type === "timestamp") return new Date(1000 * value).toISOString().slice(0, 10);
  if (legend.type === "number") return String(value);
  return value === OTHER ? "" : legend.categories[value];
}

const described = (point) => [point.label, inWords(point.value)].filter(Boolean).join(", ");

function notes() {
  const said = [];
  const shown = chart.points.keys.length;
  const all = chart.items > shown ? `A sample of ${shown.toLocaleString("en")} of ${counted(chart.items, "item")}` : counted(chart.items, "item");
  const how = chart.method === "pca"
    ? `by the two directions in which they differ most (${Math.round(100 * chart.variance)} % of all differences)`
    : `by ${chart.method.toUpperCase()}: neighbours are alike, distances say little`;
  said.push(`${all}, ${how}.`);
  if (chart.left_out) said.push(`${counted(chart.left_out, "item")} without a vector ${chart.left_out === 1 ? "is" : "are"} left out.`);
  const made = new Date(chart.made_at).toLocaleString();
  if (chart.standing !== "current") said.push(`Made on ${made}; ${STANDINGS[chart.standing] || chart.standing}.`);
  return said;
}

const STANDINGS = {
  behind: "the table has changed since, and the map will be made anew",
  "of another model": "it is of the previous model, and will be made anew",
};

// Categories are buttons that show one alone.
function showLegend() {
  const legend = chart.legends[chart.colour];
  if (!legend) return at("legend").replaceChildren();
  if (isNumber(legend)) {
    const ends = [legend.low, legend.high].map((value) => make("span", inWords(value) || "no values"));
    const ramp = make("span", undefined, { class: "ramp", "aria-label": "from low to high", role: "img" });
    ramp.style.setProperty("--ramp", legend.colours.join(", "));
    return at("legend").replaceChildren(ends[0], ramp, ends[1]);
  }
  const entry = (words, colour, count) => {
    const one = make("button", undefined, { type: "button", "aria-pressed": "false" });
    const dot = make("i", undefined, { "aria-hidden": "true" });
    dot.style.setProperty("--colour", colour);
    one.append(dot, make("span", words), ...(count === undefined ? [] : [make("small", count.toLocaleString("en"))]));
    one.addEventListener("click", () => {
      const on = one.getAttribute("aria-pressed") !== "true";
      for (const other of at("legend").children) other.setAttribute("aria-pressed", String(on && other === one));
      plot.only = on ? colour : null;
      plot.draw();
    });
    return one;
  };
  const entries = legend.categories.map((words, n) => entry(words, legend.colours[n], legend.counts[n]));
  if (chart.points.colours.some((value) => value === OTHER || value === NONE)) entries.push(entry("other or none", chart.other));
  at("legend").replaceChildren(...entries);
}

function hover(point, x, y) {
  const tip = at("tip");
  tip.hidden = !point;
  at("canvas").classList.toggle("over", Boolean(point));
  if (!point) return;
  tip.replaceChildren(make("b", point.label), ...(inWords(point.value) ? [make("span", inWords(point.value))] : []));
  const { clientWidth: width } = at("canvas");
  tip.style.left = `${Math.min(x + 14, Math.max(0, width - tip.offsetWidth - 6))}px`;
  tip.style.top = `${y + 14}px`;
}

// Hits are marked, and the item that they are similar to.
export async function showFound(hits) {
  const mine = opened;
  marks = [...new Set([...(state.item ? [state.item.key] : []), ...hits.map((hit) => hit.item_key)])].slice(0, 1000);
  if (!chart) return;
  if (!marks.length) {
    plot.found = [];
    plot.current = null;
    return plot.draw();
  }
  const fields = { collection: chart.collection, vector: chart.vector, points: 0, keys: marks };
  const asked = marks;
  const answer = await ask("map", { ...fields, ...(chart.colour ? { colour: chart.colour } : {}) }).catch(() => null);
  if (!answer || mine !== opened || asked !== marks) return;
  plot.found = points(answer.found);
  plot.current = state.item ? plot.found.find((point) => point.key === state.item.key) || null : null;
  plot.draw();
}

// The item that the pointer is on in the results.
export function showPointed(key) {
  if (!chart) return;
  const of = key ?? state.item?.key;
  plot.current = plot.found.find((point) => point.key === of) || (document.activeElement === at("canvas") ? plot.current : null);
  plot.draw();
}
