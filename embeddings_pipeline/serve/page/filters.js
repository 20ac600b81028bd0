// Filters by clicking: a menu for each that is declared, chips for those in force.

import { at, button, checkbox, make } from "./dom.js";
import { state } from "./state.js";

const ORDERED = ["number", "timestamp"];
const NEXT = { gte: "lte", lte: "eq", eq: "gte" };
const SIGNS = { gte: "≥", lte: "≤", eq: "=", any: "is" };
let legends = {}; // of the map: the most frequent values of each column
let changed = () => {};

export function onFilters(act) {
  changed = act;
  document.addEventListener("click", (event) => close((menu) => !menu.contains(event.target)));
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    const open = document.querySelector("#facets details[open]");
    if (!open) return;
    close(() => true);
    open.querySelector("summary").focus();
  });
}

function close(which) {
  for (const menu of document.querySelectorAll("#facets details[open]")) if (which(menu)) menu.open = false;
}

// As `where` of a request has it: of one column any value, of several columns all.
export function where() {
  const any = new Map();
  const conditions = [];
  for (const { column, type, operator, value } of state.filters) {
    if (operator !== "any") conditions.push({ [column]: { [operator]: exact(type, value) } });
    else if (any.has(column)) any.get(column).push(value);
    else any.set(column, [value]);
  }
  for (const [column, values] of any) conditions.push({ [column]: { any: values } });
  return conditions.length ? { and: conditions } : undefined;
}

// A number that JavaScript cannot hold is text here, and has to be a number there.
function exact(type, value) {
  if (type !== "number" || typeof value !== "string") return value;
  return JSON.rawJSON ? JSON.rawJSON(value) : Number(value);
}

export function toggle(column, value, operator) {
  const { type } = state.collection.filters[column];
  const chosen = operator || (ORDERED.includes(type) ? "gte" : type === "boolean" ? "eq" : "any");
  const same = (each) => each.column === column && each.operator === chosen && each.value === value;
  const is = state.filters.some(same);
  const kept = state.filters.filter((each) => !same(each) && !(chosen !== "any" && each.column === column && each.operator === chosen));
  state.filters = is ? kept : [...kept, { column, type, operator: chosen, value }];
  changed();
}

// Buttons for the values of a hit that can be filtered by.
export function valuesOf(name, value) {
  const filter = state.collection.filters[name];
  if (!filter || value === null || value === undefined) return [];
  const parts = filter.type !== "texts" ? [value] : Array.isArray(value) ? value : filter.separator ? String(value).split(filter.separator) : [value];
  return parts
    .map((part) => (filter.type === "texts" ? String(part).trim() : part))
    .filter((part) => part !== "")
    .map((part) => {
      const sign = ORDERED.includes(filter.type) ? SIGNS.gte : filter.type === "boolean" ? SIGNS.eq : SIGNS.any;
      const words = filter.type === "boolean" || filter.type === "number" ? `${name.replaceAll("_", " ")} ${part}` : String(part);
      return button(words, `Filter: ${name} ${sign} ${part}`, () => toggle(name, part));
    });
}

export function showFacets(known = {}) {
  legends = known;
  const menus = Object.entries(state.collection.filters).map(([column, filter]) => {
    const menu = make("details");
    menu.append(make("summary", column.replaceAll("_", " ")));
    const inside = make("div", undefined, { class: "menu", role: "group", "aria-label": column });
    menu.append(inside);
    menu.addEventListener("toggle", () => {
      if (!menu.open) return;
      close((other) => other !== menu);
      inside.replaceChildren(...(ORDERED.includes(filter.type) ? bounds(column, filter.type) : values(column, filter.type)));
    });
    return menu;
  });
  at("facets").replaceChildren(...menus);
}

function values(column, type) {
  const inForce = state.filters.filter((each) => each.column === column).map((each) => each.value);
  const frequent = type === "boolean" ? [true, false] : legends[column]?.categories || [];
  const boxes = [...new Set([...frequent, ...inForce])].map((value) =>
    checkbox(String(value), inForce.includes(value), () => toggle(column, value)));
  if (type === "boolean") return boxes;
  const another = make("input", undefined, { type: "text", placeholder: "another", "aria-label": `Another value of ${column}` });
  another.addEventListener("keydown", (event) => {
    const value = another.value.trim();
    if (event.key === "Enter" && value && !inForce.includes(value)) toggle(column, value);
  });
  return [...boxes, another];
}

function bounds(column, type) {
  return [["gte", "from"], ["lte", "to"]].map(([operator, words]) => {
    const label = make("label", `${words} `);
    const inForce = () => state.filters.find((each) => each.column === column && each.operator === operator);
    const kind = type === "number" ? { type: "number", step: "any" } : { type: "date" };
    const box = make("input", undefined, { ...kind, "aria-label": `${column} ${words}` });
    box.value = inForce() ? String(inForce().value).slice(0, type === "number" ? undefined : 10) : "";
    box.addEventListener("change", () => {
      if (!box.value && inForce()) toggle(column, inForce().value, operator);
      else if (box.value) toggle(column, type === "number" ? Number(box.value) : box.value, operator);
    });
    label.append(box);
    return label;
  });
}

export function showAsked() {
  const chips = state.filters.map((filter) => {
    const { column, operator, value } = filter;
    const chip = make("span");
    const sign = SIGNS[operator] || operator;
    const next = ORDERED.includes(filter.type) ? NEXT[operator] : undefined;
    const how = next
      ? button(sign, `${column} ${sign} ${value}: make it ${SIGNS[next]}`, () => { filter.operator = next; changed(); })
      : make("i", sign);
    const gone = button("×", `Remove the filter ${column} ${sign} ${value}`, () => {
      state.filters = state.filters.filter((each) => each !== filter);
      changed();
    });
    chip.append(`${column.replaceAll("_", " ")} `, how, ` ${value} `, gone);
    return chip;
  });
  if (state.item) {
    const chip = make("span", "similar to ", { class: "item" });
    chip.append(make("b", state.item.title), " ", button("×", "Search by words again", () => { state.item = null; changed(); }));
    chips.unshift(chip);
  }
  at("asked").replaceChildren(...chips);
  for (const [menu, column] of Object.keys(state.collection.filters).map((name, n) => [at("facets").children[n], name])) {
    menu?.classList.toggle("used", state.filters.some((each) => each.column === column));
  }
}
