"use strict";
// Sorting of the component table. Cells carry their value in data-value; those without one stay at the end.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    const numeric = heading.classList.contains("num");
    button.addEventListener("click", () => {
      // Numbers start with the largest, names and the component numbers with the smallest.
      const first = numeric && column > 0 ? "descending" : "ascending";
      const second = first === "descending" ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? second : first;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const direction = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value;
      const number = (text) => (text === "inf" ? Infinity : Number(text));
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        if (!numeric) return direction * x.localeCompare(y, undefined, { numeric: true });
        const [p, q] = [number(x), number(y)];
        return p === q ? 0 : p < q ? -direction : direction;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
