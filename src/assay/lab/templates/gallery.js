"use strict";

const form = document.getElementById("filters");
const table = document.getElementById("results");
const body = table.tBodies[0];
const rows = [...body.rows]; // in the page's own order, which settles ties
const headers = [...table.querySelectorAll("thead th")];
const defaults = { q: "", topic: "", verdict: "", preset: "", sort: "topic", order: "ascending" };
const numeric = new Set(headers.filter((h) => h.classList.contains("numeric")).map((h) => h.dataset.key));
let state = { ...defaults };

const value = (row, key) => row.querySelector(`[data-key="${key}"]`).dataset.value;

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  state = { ...defaults };
  for (const key of Object.keys(defaults)) if (given.has(key)) state[key] = given.get(key);
  if (!headers.some((header) => header.dataset.key === state.sort)) state.sort = defaults.sort;
  if (state.order !== "descending") state.order = "ascending";
  for (const name of ["q", "topic", "verdict", "preset"]) {
    form.elements[name].value = state[name];
    state[name] = form.elements[name].value; // a select knows only its own options
    if (form.elements[name].selectedIndex === -1) form.elements[name].selectedIndex = 0;
  }
}

function writeAddress() {
  const differing = Object.entries(state).filter(([key, text]) => text !== defaults[key]);
  history.replaceState(null, "", "#" + new URLSearchParams(differing));
}

function matches(row) {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  return (
    words.every((word) => row.dataset.search.includes(word)) &&
    (!state.topic || value(row, "topic") === state.topic) &&
    (!state.preset || value(row, "preset") === state.preset) &&
    (!state.verdict || Number(value(row, state.verdict)) > 0)
  );
}

function compare(first, second) {
  const [a, b] = [value(first, state.sort), value(second, state.sort)];
  const order = numeric.has(state.sort) ? a - b : a.localeCompare(b);
  return state.order === "ascending" ? order : -order;
}

function show() {
  let shown = 0;
  for (const row of rows) {
    row.hidden = !matches(row);
    if (!row.hidden) shown += 1;
  }
  body.append(...[...rows].sort(compare));
  for (const header of headers) {
    if (header.dataset.key === state.sort) header.setAttribute("aria-sort", state.order);
    else header.removeAttribute("aria-sort");
  }
  document.getElementById("count").textContent = `${shown} of ${rows.length} shown`;
  document.getElementById("nothing").hidden = shown > 0;
}

function sortBy(key) {
  const first = numeric.has(key) ? "descending" : "ascending"; // of figures the largest first
  const second = numeric.has(key) ? "ascending" : "descending";
  state.order = state.sort === key && state.order === first ? second : first;
  state.sort = key;
  writeAddress();
  show();
}

for (const header of headers) {
  const button = header.querySelector("button");
  button.disabled = false;
  button.addEventListener("click", () => sortBy(header.dataset.key));
}
form.addEventListener("input", () => {
  for (const name of ["q", "topic", "verdict", "preset"]) state[name] = form.elements[name].value;
  writeAddress();
  show();
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => {
  state = { ...defaults };
  writeAddress();
  show();
});
addEventListener("hashchange", () => {
  readAddress();
  show();
});
form.hidden = false;
readAddress();
show();
