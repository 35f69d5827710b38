"use strict";
(() => {
  const make = (tag, properties, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  // Contents: open beside the text on a wide screen, closed above it on a narrow one.
  const contents = document.querySelector("nav details");
  const wide = matchMedia("(min-width: 64rem)");
  const place = () => { contents.open = wide.matches; };
  if (contents) { place(); wide.addEventListener("change", place); }

  // Links into a folded part open it.
  const unfold = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();

  // Tables: sort by a column, filter the rows, say where more columns are.
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = /^[+-]?[\d,]*\.?\d+(e[+-]?\d+)?/i.exec(text);
    return { text, number: number && Number(number[0].replaceAll(",", "")) };
  };
  const compare = (column, sign) => (one, other) => {  // what is no number comes last either way
    const [a, b] = [value(one, column), value(other, column)];
    if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
    if ((a.number === null) !== (b.number === null)) return a.number === null ? 1 : -1;
    return sign * a.text.localeCompare(b.text, "en", { numeric: true });
  };
  for (const table of document.querySelectorAll("main table")) {
    const body = table.tBodies[0];
    if (body.rows.length > 2) {
      [...table.tHead.rows[0].cells].forEach((head, column) => {
        if (!head.textContent.trim()) return;
        const button = make("button", { type: "button", className: "sort" }, ...head.childNodes);
        button.addEventListener("click", () => {
          const descending = head.getAttribute("aria-sort") === "ascending";
          for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
          head.setAttribute("aria-sort", descending ? "descending" : "ascending");
          body.append(...[...body.rows].sort(compare(column, descending ? -1 : 1)));
        });
        head.append(button);
      });
    }
    const scroll = table.closest(".scroll");
    if (body.rows.length >= 16) {
      const input = make("input", { type: "search", placeholder: "Filter rows" });
      const count = make("span", { className: "small" });
      count.setAttribute("aria-live", "polite");
      input.setAttribute("aria-label", "Filter the rows of this table");
      input.addEventListener("input", () => {
        const words = input.value.toLowerCase().split(/\s+/);
        let shown = 0;
        for (const row of body.rows) {
          const text = row.textContent.toLowerCase();
          row.hidden = !words.every((word) => text.includes(word));
          shown += row.hidden ? 0 : 1;
        }
        count.textContent = input.value ? `${shown} of ${body.rows.length} rows` : "";
      });
      scroll.before(make("p", { className: "filter" }, input, count));
    }
    const cue = make("p", { className: "cue small" }, "Scroll sideways for more columns \u2192");
    cue.setAttribute("aria-hidden", "true");
    scroll.before(cue);
    new ResizeObserver(() => {
      const more = scroll.scrollWidth > scroll.clientWidth + 1;
      cue.hidden = !more;
      if (more) scroll.tabIndex = 0; else scroll.removeAttribute("tabindex");
    }).observe(scroll);
  }

  // Pictures: a click or the Enter key enlarges; arrow keys go through those of the section.
  const dialog = document.querySelector("dialog");
  const pictures = [...document.querySelectorAll("main figure > img, main figure > svg")];
  let current = 0;
  const show = (index) => {
    current = index;
    const figure = pictures[index].closest("figure");
    const enlarged = pictures[index].cloneNode(true);
    for (const name of ["tabindex", "role", "aria-label"]) enlarged.removeAttribute(name);
    const small = enlarged.tagName === "IMG" && pictures[index].naturalWidth <= 160;
    enlarged.classList.toggle("small-image", small);
    const lines = [figure.querySelector("figcaption"), figure.closest(".case")?.querySelector("p")];
    const text = lines.filter(Boolean).map((line) => line.innerText.trim()).filter(Boolean).join(". ");
    dialog.querySelector("figure").replaceChildren(enlarged, make("figcaption", {}, text));
  };
  const step = (by) => {
    const section = pictures[current].closest("section");
    const next = current + by;
    if (pictures[next] && pictures[next].closest("section") === section) show(next);
  };
  pictures.forEach((picture, index) => {
    picture.tabIndex = 0;
    picture.setAttribute("role", "button");
    picture.setAttribute("aria-label", `Enlarge: ${picture.getAttribute("alt") || picture.getAttribute("aria-label") || "figure"}`);
    const open = () => { show(index); dialog.showModal(); };
    picture.addEventListener("click", open);
    picture.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); }
    });
  });
  dialog.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (event.target === dialog || button?.value === "close") dialog.close();
    else if (button) step(Number(button.value));
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight") step(1);
    if (event.key === "ArrowLeft") step(-1);
  });
})();
