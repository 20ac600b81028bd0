// One page: a question, each way of searching beside the others, filters by clicking, what is similar, and the map.

import { at, checkbox, make, tell } from "./dom.js";
import { onFilters, showAsked, showFacets } from "./filters.js";
import { onMap, openMap, showFound, showPointed } from "./map.js";
import { onResults, point, search } from "./results.js";
import { ask } from "./service.js";
import { choose, recall, remember, state } from "./state.js";

function askAnew(toResults = false) {
  remember();
  show(toResults);
}

function show(toResults = false) {
  at("query").value = state.query;
  at("k").value = state.k;
  showAsked();
  return search(toResults);
}

function showChoices() {
  const { modes, models } = state.collection;
  const boxes = (all, chosen) => all.map((each) =>
    checkbox(each.label, chosen.has(each.label), (on) => {
      if (on) chosen.add(each.label);
      else chosen.delete(each.label);
      show();
    }, each.why_not ? { "aria-describedby": "why" } : {}));
  at("modes").replaceChildren(make("legend", "Look by"), ...boxes(modes, state.modes));
  at("models").replaceChildren(make("legend", "Vectors of"), ...boxes(models, state.models));
  const not = modes.filter((mode) => mode.why_not);
  at("why").hidden = !not.length;
  at("why").textContent = not.length ? `${not.map((mode) => mode.label).join(", ")}: ${not[0].why_not}` : "";
}

function showCollection() {
  at("collection").value = state.collection.name;
  showChoices();
  showFacets();
  openMap();
}

async function start() {
  try {
    state.collections = (await ask("collections")).collections;
  } catch (error) {
    return tell(error.message, true);
  }
  at("collection").replaceChildren(...state.collections.map((each) => make("option", each.name, { value: each.name })));
  if (!state.collections.length) return tell("No collection is defined yet.", true);
  const typed = at("query").value; // who types fast does not wait for the list of collections
  recall();
  state.query = state.query || typed;
  showCollection();
  await show();
}

const similar = (item) => {
  state.item = item;
  askAnew(true);
};
onFilters(askAnew);
onResults({ similar, found: showFound, pointed: showPointed });
onMap({ similar, pointed: point, known: showFacets });

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const typed = at("query").value;
  await started;
  if (!state.collection) return;
  state.query = typed;
  state.item = null;
  askAnew();
});
at("k").addEventListener("change", () => {
  state.k = Number(at("k").value);
  askAnew();
});
at("collection").addEventListener("change", () => {
  choose(at("collection").value);
  Object.assign(state, { filters: [], item: null });
  showCollection();
  askAnew();
});
at("keyed").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", at("key").value);
  at("keyed").hidden = true;
  at("key").value = "";
  started = start();
});
window.addEventListener("popstate", () => {
  const before = state.collection;
  recall();
  if (state.collection !== before) showCollection();
  show();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input, select, textarea")) return;
  event.preventDefault();
  at("query").focus();
});
let started = start();
