"use strict";
// Sorts and filters the tables of class "sortable", and opens all details for printing. Without it the page can still be read whole.
const collator = new Intl.Collator("en", { numeric: true });

function keyOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.key ?? cell.textContent;
  const number = text.trim() === "" ? NaN : Number(text.replace("\u2212", "-")); // a minus sign is printed
  return { text, number };
}

function compare(left, right) {
  const numbers = Number.isNaN(left.number) ? 0 : 1;
  const others = Number.isNaN(right.number) ? 0 : 1;
  if (numbers && others) return left.number - right.number;
  if (numbers !== others) return others - numbers; // numbers first
  return collator.compare(left.text, right.text);
}

function sortBy(table, header) {
  const column = header.cellIndex;
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const rows = Array.from(body.rows, (row) => ({ row, key: keyOf(row, column) }));
  rows.sort((left, right) => (descending ? -1 : 1) * compare(left.key, right.key));
  body.append(...rows.map((each) => each.row));
}

function filterBy(table, words, output) {
  let left = 0;
  for (const row of table.tBodies[0].rows) {
    const text = Array.from(row.cells, (cell) => cell.textContent).join(" ").toLowerCase();
    const matches = words.every((word) => text.includes(word));
    row.classList.toggle("unmatched", !matches);
    left += matches ? 1 : 0;
  }
  output.textContent = words.length ? `${left} of ${table.tBodies[0].rows.length}` : "";
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sortBy(table, header));
  }
  const form = table.closest(".scroll").previousElementSibling;
  const [input, output] = [form.querySelector("input"), form.querySelector("output")];
  input.addEventListener("input", () => filterBy(table, input.value.toLowerCase().split(/\s+/).filter(Boolean), output));
}

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = Array.from(document.querySelectorAll("details:not([open])"));
  for (const each of opened) each.open = true;
});
window.addEventListener("afterprint", () => {
  for (const each of opened) each.open = false;
});
