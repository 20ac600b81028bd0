// What the service is asked. Its key stays in the tab.

import { at } from "./dom.js";

// A number that JavaScript cannot hold stays the text that it came as.
const exactly = (_, value, context) =>
  typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && context ? context.source : value;

export async function ask(path, fields) {
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
  let answer;
  try {
    answer = JSON.parse(await response.text(), exactly);
  } catch {
    throw new Error(`the service answers ${response.status}, and nothing that could be read`);
  }
  if (response.status === 401) {
    at("keyed").hidden = false;
    at("key").focus();
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}
