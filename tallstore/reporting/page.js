"use strict";

// Headings of tables become buttons that sort; rows without a number stay last.
(() => {
  const status = document.getElementById("status");
  const compare = new Intl.Collator("en", { numeric: true }).compare;

  const key = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent;
    return text === "" || text === "–" ? null : text;
  };

  const order = (first, second, sign) => {
    if (first === null || second === null) return (first === null) - (second === null);
    const both = typeof first === "number" && typeof second === "number";
    return sign * (both ? first - second : compare(String(first), String(second)));
  };

  const sort = (table, heading, column) => {
    const ascending = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = Array.from(body.rows, (row) => [key(row, column), row]);
    rows.sort(([first], [second]) => order(first, second, ascending ? 1 : -1));
    body.append(...rows.map(([, row]) => row));
    status.textContent = `${table.caption.textContent}: sorted by ${heading.textContent}, ${ascending ? "ascending" : "descending"}`;
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    if (table.tBodies[0].rows.length < 2) continue;
    Array.from(table.tHead.rows[0].cells).forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading, column));
      heading.append(button);
    });
  }

  // Paper cannot be unfolded; tables of many pages stay as they are.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = Array.from(document.querySelectorAll("details:not([open]):not(:has(.tall))"));
    for (const each of folded) each.open = true;
  });
  addEventListener("afterprint", () => {
    for (const each of folded) each.open = false;
  });
})();
