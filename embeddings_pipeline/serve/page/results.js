// What was found: a column for each way of searching, and in each the hits, best first.

import { at, button, counted, make, tell } from "./dom.js";
import { valuesOf, where } from "./filters.js";
import { ask } from "./service.js";
import { state } from "./state.js";

let asked = 0; // which question the answers on their way are of
let act = { similar: () => {}, found: () => {}, pointed: () => {} };

export function onResults(acts) {
  act = acts;
}

// The chosen ways: each mode with each model. Words are the same whatever the model, and what is similar has no words.
function ways() {
  const { modes, models } = state.collection;
  const chosenModels = models.filter((model) => state.models.has(model.label));
  const several = chosenModels.length > 1;
  if (state.item) return chosenModels.map((model) => ({ label: `Similar${several ? ` · ${model.label}` : ""}`, fields: model.fields }));
  return modes.filter((mode) => state.modes.has(mode.label)).flatMap((mode) => {
    const of = mode.fields.mode === "text" ? chosenModels.slice(0, 1) : chosenModels;
    return of.map((model) => ({
      label: several && of.length > 1 ? `${mode.label} · ${model.label}` : mode.label,
      fields: { ...model.fields, ...mode.fields },
    }));
  });
}

export async function search(toResults) {
  const mine = ++asked;
  const results = at("results");
  const chosen = ways();
  document.body.classList.toggle("many", chosen.length > 3);
  document.body.classList.toggle("start", !state.item && !state.query.trim());
  if (!state.item && !state.query.trim()) {
    results.replaceChildren();
    act.found([]);
    return tell("Type what to look for, or choose an item on the map.");
  }
  if (!chosen.length) {
    results.replaceChildren();
    return tell("Choose at least one way of searching.");
  }
  tell("Searching …");
  results.setAttribute("aria-busy", "true");
  const path = state.item ? "similar" : "search";
  const what = state.item ? { item_key: state.item.key } : { query: state.query };
  const common = { collection: state.collection.name, k: state.k, where: where(), explain: true, ...what };
  const columns = chosen.map((way) => ({ way, section: make("section", undefined, { "aria-label": way.label }) }));
  columns.forEach(({ way, section }) => section.append(make("h2", way.label), make("p", "…", { class: "how" })));
  await Promise.all(columns.map(async (column) => {
    await ask(path, { ...common, ...column.way.fields }).then(
      (answer) => { column.answer = answer; },
      (error) => { column.error = error; },
    );
    if (mine !== asked) return; // another question was asked meanwhile
    fill(column);
    if (!column.section.isConnected) results.replaceChildren(...columns.map((each) => each.section));
  }));
  if (mine !== asked) return;
  results.removeAttribute("aria-busy");
  compare(columns);
  act.found(columns.flatMap((column) => column.answer?.hits || []));
  const failed = columns.find((each) => each.error);
  const counts = columns.filter((each) => each.answer).map(({ way, answer }) => `${way.label}: ${counted(answer.hits.length, "hit")}`);
  tell(failed ? failed.error.message : counts.join("; "), Boolean(failed));
  if (!toResults) return;
  results.focus({ preventScroll: true });
  scrollTo(0, 0);
}

function fill({ way, answer, error, section }) {
  section.replaceChildren(make("h2", way.label));
  if (error) {
    section.append(make("p", error.message, { class: "failed" }));
    return;
  }
  const { legs, fell_back: fellBack, rerank } = answer.explanation;
  const took = Object.values(answer.milliseconds).reduce((all, each) => all + each, 0) + (rerank?.milliseconds || 0);
  const hows = legs.map((leg) => leg.how);
  if (rerank) hows.push(rerank.model ? `${rerank.model}: ${rerank.scored} of ${rerank.candidates} scored` : rerank.how);
  section.append(make("p", `${took.toFixed(0)} ms · ${hows.join("; ")}`, { class: "how", title: answer.profile }));
  const why = [...legs.flatMap((leg) => leg.fell_back), ...(fellBack || []), ...(rerank?.fell_back || [])];
  if (why.length) section.append(make("p", why.join("; "), { class: "fell-back" }));
  const list = make("ol");
  const best = Math.max(...answer.hits.map((hit) => Math.abs(hit.score)), 1e-9);
  list.append(...answer.hits.map((hit, rank) => entry(hit, rank + 1, best, answer.explanation.mode !== "dense")));
  section.append(answer.hits.length ? list : make("p", "Nothing is found.", { class: "how" }));
}

function titleOf(found) {
  const column = state.collection.columns.find((name) => found.item[name] !== null && found.item[name] !== undefined);
  return column ? String(found.item[column]) : found.item_key;
}

function entry(found, rank, best, hasWords) {
  const item = make("li", undefined, { "data-key": found.item_key });
  const title = titleOf(found);
  const head = make("div", undefined, { class: "head" });
  head.append(make("span", rank, { class: "rank", "aria-hidden": "true" }), make("h3", title));
  head.append(make("span", found.score.toFixed(3), { class: "score", title: "score" }));
  const bar = make("div", undefined, { class: "share", "aria-hidden": "true" });
  bar.style.setProperty("--share", Math.max(0, found.score / best));
  const foot = make("div", undefined, { class: "foot" });
  foot.append(button("similar", `Similar to ${title}`, () => act.similar({ key: found.item_key, title })));
  foot.append(make("span", "", { class: "also" }));
  const values = make("div", undefined, { class: "values" });
  for (const name of state.collection.columns) {
    const value = found.item[name];
    const buttons = valuesOf(name, value);
    if (buttons.length) values.append(...buttons);
    else if (String(value) !== title && value !== null && value !== undefined && !state.collection.filters[name]) {
      values.append(make("span", `${name.replaceAll("_", " ")} ${shown(value)}`));
    }
  }
  const words = text(found, hasWords);
  foot.firstChild.after(more(words));
  item.append(head, bar, words, values, foot);
  for (const [event, key] of [["mouseenter", found.item_key], ["focusin", found.item_key], ["mouseleave", null], ["focusout", null]]) {
    item.addEventListener(event, () => point(key));
  }
  return item;
}

const shown = (value) => (typeof value === "number" ? value.toLocaleString("en") : typeof value === "object" ? JSON.stringify(value) : String(value));

// The text that was near; what was looked for by words is marked.
function text(found, hasWords) {
  const box = make("div", undefined, { class: "text" });
  const named = state.collection.vectors.length > 1 || found.chunk;
  if (named) box.append(make("span", `${found.vector_name}${found.chunk ? `, part ${found.chunk + 1}` : ""}`, { class: "part" }));
  const words = make("p");
  words.append(...(hasWords && !state.item ? marked(found.text || "") : [found.text || ""]));
  box.append(words);
  return box;
}

// A button for the rest of a text, if there is more than fits.
function more(box) {
  const rest = button("more", "Show the whole text", () => {
    const open = box.classList.toggle("open");
    rest.textContent = open ? "less" : "more";
    rest.setAttribute("aria-expanded", open);
  }, { "aria-expanded": "false", hidden: "" });
  new ResizeObserver(() => {
    const words = box.lastChild;
    rest.hidden = !box.classList.contains("open") && words.scrollHeight <= words.clientHeight + 1;
  }).observe(box);
  return rest;
}

function marked(whole) {
  const wanted = new Set(state.query.toLowerCase().match(/[\p{L}\p{N}]{4,}/gu) || []);
  return whole.split(/([\p{L}\p{N}]+)/u).map((part) => (wanted.has(part.toLowerCase()) ? make("mark", part) : part));
}

// The same item is marked wherever it is.
export function point(key) {
  for (const item of document.querySelectorAll("#results li.same")) item.classList.remove("same");
  if (key !== null) for (const item of document.querySelectorAll(`#results li[data-key="${CSS.escape(key)}"]`)) item.classList.add("same");
  act.pointed(key);
}

// Of each hit, its rank in the other columns; of each column, how much it has in common with the first.
function compare(columns) {
  const ranked = columns.filter((column) => column.answer).map(({ way, answer, section }) => ({
    way, section, ranks: new Map(answer.hits.map((hit, rank) => [hit.item_key, rank + 1])),
  }));
  for (const column of ranked) {
    const others = ranked.filter((each) => each !== column);
    for (const item of column.section.querySelectorAll("li")) {
      const also = others.filter((each) => each.ranks.has(item.dataset.key)).map((each) => `${each.way.label} ${each.ranks.get(item.dataset.key)}`);
      item.querySelector(".also").textContent = also.length ? `also: ${also.join(", ")}` : "";
    }
    const [first] = ranked;
    if (column === first || !column.ranks.size) continue;
    const common = [...column.ranks.keys()].filter((key) => first.ranks.has(key)).length;
    column.section.querySelector("h2").append(make("small", ` ${common} of ${column.ranks.size} also by ${first.way.label}`));
  }
}
