// Elements. What comes from the database is always text, never markup.

export const at = (id) => document.getElementById(id);

export function make(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

export function button(text, name, act, attributes = {}) {
  const element = make("button", text, { type: "button", "aria-label": name, ...attributes });
  element.addEventListener("click", act);
  return element;
}

export function tell(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

// A box with its words; `act` is told whether it is checked.
export function checkbox(words, checked, act, attributes = {}) {
  const label = make("label");
  const box = make("input", undefined, { type: "checkbox", ...attributes });
  box.checked = checked;
  box.addEventListener("change", () => act(box.checked));
  label.append(box, make("span", words));
  return label;
}

export const counted = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
