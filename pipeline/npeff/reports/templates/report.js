"use strict";

// With many components, the body of a card is HTML in a <noscript>, so that the page opens quickly. It is added to the page
// when the card is about to be visible, linked to or printed. A browser without scripts shows the <noscript>.
function fill(card) {
  const body = card.querySelector("noscript");
  if (!body) return;
  const made = document.createElement("template");
  made.innerHTML = body.textContent;
  body.replaceWith(made.content);
  card.classList.remove("waiting");
}
const waiting = [...document.querySelectorAll(".card:has(> noscript)")];
if (waiting.length) {
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((each) => each.isIntersecting)) {
        fill(entry.target);
        near.unobserve(entry.target);
      }
    },
    { rootMargin: "1000px" },
  );
  for (const card of waiting) {
    card.classList.add("waiting");
    near.observe(card);
  }
  const linked = () => {
    const card = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!card || !card.classList.contains("card")) return;
    fill(card);
    card.scrollIntoView({ behavior: "instant" });
  };
  addEventListener("hashchange", linked);
  addEventListener("beforeprint", () => waiting.forEach(fill));
  linked();
}

// Sort the table of components. The value of a cell is in data-value; cells without a value are last.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    const numeric = heading.classList.contains("num");
    button.addEventListener("click", () => {
      // Numbers are sorted in descending order first, names and component numbers in ascending order.
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

// Search: show the rows of the components whose row or card contains all the words.
const search = document.getElementById("search");
if (search) {
  const rows = [...document.querySelectorAll("table.sortable tbody tr")];
  const entities = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&#34;": '"', "&#39;": "'" };
  const plain = (html) => html.replace(/<[^>]*>/g, " ").replace(/&(?:amp|lt|gt|#34|#39);/g, (name) => entities[name]);
  const texts = new Map();
  const textOf = (row) => {
    if (!texts.has(row)) {
      const card = document.getElementById(`component-${row.cells[0].dataset.value}`);
      const said = [...card.children].map((part) => (part.matches("noscript") ? plain(part.textContent) : part.textContent));
      texts.set(row, [row.textContent, ...said].join(" ").toLowerCase());
    }
    return texts.get(row);
  };
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every((word) => textOf(row).includes(word));
    const shown = rows.filter((row) => !row.hidden).length;
    document.getElementById("found").textContent = words.length ? `${shown} of ${rows.length}` : "";
  });
  search.parentElement.hidden = false;
}
