// What is asked: kept in the address, so that a reload, the way back and a bookmark ask the same.

export const state = {
  collections: [],
  collection: undefined, // the chosen one
  query: "",
  item: null, // {key, title}: what the others are compared with
  filters: [], // {column, type, operator, value}
  modes: new Set(), // labels of what is chosen
  models: new Set(),
  k: 10,
};

const REQUIRED = ["column", "type", "operator", "value"];

export function choose(name) {
  const { collections } = state;
  state.collection = collections.find((each) => each.name === name) || collections.find((each) => each.name === "items") || collections[0];
  if (!state.collection) return;
  const { modes, models } = state.collection;
  state.modes = new Set(modes.filter((mode) => !mode.why_not).map((mode) => mode.label));
  state.models = new Set(models.slice(0, 1).map((model) => model.label));
}

export function remember(replace = false) {
  const words = new URLSearchParams({ in: state.collection.name });
  if (state.query) words.set("q", state.query);
  if (state.item) words.set("like", JSON.stringify(state.item));
  if (state.filters.length) words.set("where", JSON.stringify(state.filters));
  if (state.k !== 10) words.set("k", state.k);
  const address = `#${words}`;
  if (address === location.hash) return;
  history[replace ? "replaceState" : "pushState"](null, "", address);
}

// Takes what the address says; what it says wrongly counts as nothing.
export function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  const name = words.get("in");
  if (!state.collection || (name && name !== state.collection.name)) choose(name);
  state.query = words.get("q") || "";
  state.k = Number(words.get("k")) || 10;
  const item = read(words.get("like"));
  state.item = item && typeof item.key === "string" ? { key: item.key, title: String(item.title ?? item.key) } : null;
  const filters = read(words.get("where"));
  const known = state.collection?.filters || {};
  state.filters = Array.isArray(filters) ? filters.filter((each) => each && REQUIRED.every((name) => name in each) && each.column in known) : [];
}

function read(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
