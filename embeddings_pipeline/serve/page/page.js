// One page: a question, each way of searching beside the others, filters by clicking, what is similar to a hit.
"use strict";

const at = (id) => document.getElementById(id);
const NEXT = { number: { gte: "lte", lte: "eq", eq: "gte" }, timestamp: { gte: "lte", lte: "eq", eq: "gte" } };
const SIGNS = { gte: "≥", lte: "≤", eq: "=", any: "has" };
let collections = [];
let filters = []; // {column, type, operator, value}
let item = null; // {key, title}: what the others are compared with
let asked = 0; // which question the answers on their way are of

function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function button(text, name, act) {
  const element = make("button", text, { type: "button", "aria-label": name });
  element.addEventListener("click", act);
  return element;
}

function tell(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

// A number that JavaScript cannot hold stays the text that it came as.
const exactly = (_, value, context) =>
  typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context ? context.source : value;

async function ask(path, fields) {
  const headers = {};
  const key = sessionStorage.getItem("key");
  if (key) headers["X-API-Key"] = unescape(encodeURIComponent(key)); // UTF-8, a character a byte
  const options = { headers };
  if (fields) {
    headers["Content-Type"] = "application/json";
    options.method = "POST";
    options.body = JSON.stringify(fields);
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("the service does not answer: is it running?");
  }
  const answer = JSON.parse(await response.text(), exactly);
  if (response.status === 401) {
    at("keyed").hidden = false;
    at("key").focus();
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const chosen = () => collections.find((each) => each.name === at("collection").value);

function where() {
  const conditions = filters.map(({ column, operator, value }) => ({ [column]: { [operator]: operator === "any" ? [value] : value } }));
  return conditions.length ? { and: conditions } : undefined;
}

async function search(toResults = false) {
  const mine = ++asked;
  const query = at("query").value;
  showAsked();
  at("results").replaceChildren();
  if (!item && !query.trim()) return tell("Type what to look for.");
  const common = { collection: chosen().name, k: Number(at("k").value), where: where(), explain: true };
  const ways = chosen().ways.filter((_, number) => at(`way-${number}`).checked);
  if (!ways.length) return tell("Choose at least one way of searching.");
  tell("Searching …");
  const path = item ? "similar" : "search";
  const fields = item ? { ...common, item_key: item.key } : { ...common, query };
  const columns = await Promise.all(
    ways.map((way) => ask(path, { ...fields, ...way.fields }).then((answer) => ({ way, answer }), (error) => ({ way, error }))),
  );
  if (mine !== asked) return; // another question was asked meanwhile
  at("results").replaceChildren(...columns.map(column));
  const failed = columns.find((each) => each.error);
  const counts = columns.filter((each) => each.answer).map(({ way, answer }) => `${way.label}: ${answer.hits.length} hits`);
  tell(failed ? failed.error.message : counts.join("; "), Boolean(failed));
  if (toResults) at("results").focus();
}

function column({ way, answer, error }) {
  const section = make("section", undefined, { "aria-label": way.label });
  section.append(make("h2", way.label));
  if (error) {
    section.append(make("p", error.message, { class: "how" }));
    return section;
  }
  const took = Object.values(answer.milliseconds).reduce((all, each) => all + each, 0);
  const hows = answer.explanation.legs.map((leg) => [leg.how, ...leg.fell_back].join("; "));
  section.append(make("p", `${answer.profile}; ${hows.join("; ")}; ${took.toFixed(0)} ms`, { class: "how" }));
  const list = make("ol");
  list.append(...answer.hits.map(hit));
  section.append(answer.hits.length ? list : make("p", "Nothing is found."));
  return section;
}

function titleOf(found) {
  const column = chosen().columns.find((name) => found.item[name] !== null && found.item[name] !== undefined);
  return column ? String(found.item[column]) : found.item_key;
}

function hit(found) {
  const entry = make("li", undefined, { "data-key": found.item_key });
  const title = titleOf(found);
  entry.append(make("h3", title));
  const score = make("span", `${found.score.toFixed(3)} · key ${found.item_key} `, { class: "score" });
  entry.append(score, button("similar", `Similar to ${title}`, () => {
    item = { key: found.item_key, title };
    search(true);
  }));
  const values = make("div", undefined, { class: "values" });
  for (const name of chosen().columns) values.append(...valuesOf(name, found.item[name]));
  const details = make("details", undefined, { open: "" });
  details.append(make("summary", found.chunk ? `the text that is near: ${found.vector_name}, part ${found.chunk + 1}` : "the text that is near"));
  details.append(make("p", found.text));
  entry.append(values, details);
  return entry;
}

function valuesOf(name, value) {
  if (value === null || value === undefined) return [];
  const filter = chosen().filters[name];
  if (!filter) return [];
  const parts = filter.type !== "texts" ? [value] : Array.isArray(value) ? value : filter.separator ? String(value).split(filter.separator) : [value];
  return parts.map((part) => (filter.type === "texts" ? String(part).trim() : part)).filter((part) => part !== "").map((part) => {
    const operator = filter.type === "texts" ? "any" : NEXT[filter.type] ? "gte" : "eq";
    return button(`${name} ${part}`, `Filter: ${name} ${SIGNS[operator]} ${part}`, () => {
      const same = filters.some((each) => each.column === name && each.value === part);
      if (!same) filters.push({ column: name, type: filter.type, operator, value: part });
      search();
    });
  });
}

function showAsked() {
  const chips = filters.map((filter) => {
    const chip = make("span");
    const next = (NEXT[filter.type] || {})[filter.operator];
    const sign = SIGNS[filter.operator];
    const operator = next
      ? button(sign, `${filter.column} ${sign} ${filter.value}: make it ${SIGNS[next]}`, () => { filter.operator = next; search(); })
      : make("b", sign);
    chip.append(`${filter.column} `, operator, ` ${filter.value} `);
    chip.append(button("×", `Remove the filter ${filter.column} ${sign} ${filter.value}`, () => {
      filters = filters.filter((each) => each !== filter);
      search();
    }));
    return chip;
  });
  if (item) {
    const chip = make("span", `similar to ${item.title} `);
    chip.append(button("×", "Search by words again", () => { item = null; search(); }));
    chips.unshift(chip);
  }
  at("asked").replaceChildren(...chips);
}

function showWays() {
  const ways = chosen().ways.map((way, number) => {
    const label = make("label");
    const box = make("input", undefined, { type: "checkbox", id: `way-${number}` });
    box.checked = true;
    box.addEventListener("change", () => search());
    label.append(box, ` ${way.label}`);
    return label;
  });
  at("ways").replaceChildren(make("legend", "Side by side"), ...ways);
}

async function start() {
  try {
    collections = (await ask("collections")).collections;
  } catch (error) {
    return tell(error.message, true);
  }
  at("collection").replaceChildren(...collections.map((each) => make("option", each.name, { value: each.name })));
  if (!collections.length) return tell("No collection is defined yet.", true);
  showWays();
  tell("Type what to look for.");
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  await started; // who types fast does not wait for the list of collections
  item = null;
  if (collections.length) search();
});
at("collection").addEventListener("change", () => {
  filters = [];
  item = null;
  showWays();
  search();
});
at("keyed").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  at("keyed").hidden = true;
  at("key").value = "";
  started = start();
});
let started = start();
