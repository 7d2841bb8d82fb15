// Galleries of a step: a row for each prompt and seed, a column for each thing compared; many columns wrap.

const MANY_COLUMNS = 8; // in a table; more of them wrap below each other
const OPEN_PICTURES = 60; // of a gallery that wraps: with more of them only the first row is open

function previewsSection(step) {
  if (step.left_out.includes("galleries")) return section("Pictures", el("p", {}, PICTURES_LEFT_OUT));
  if (!step.galleries.length) return null;
  return section("Pictures", el("p", { class: "hint" }, "These are small copies; the pictures themselves lie in the job's folder of previews. Choose one to see it large."),
    step.galleries.map(galleryPart));
}

const PICTURES_LEFT_OUT = "The pictures are left out to keep this page under 5 MB; they lie in the job's folder of previews.";

function galleryPart(gallery) {
  const size = gallery.previews.length ? ` (copies of up to ${gallery.edge} pixels a side)` : "";
  return el("div", { class: "gallery" }, el("h3", {}, foreign(gallery.title)), el("p", { class: "hint" }, el("bdi", {}, gallery.note), size),
    gallery.measures ? measuresPart(gallery.measures, gallery.title) : null,
    gallery.left_out ? el("p", {}, PICTURES_LEFT_OUT) : null,
    gallery.previews.length ? pictures(gallery) : null);
}

function pictures(gallery) {
  const { title, previews, rows, columns } = gallery;
  const thumbs = previews.map((_, n) => el("button", { type: "button", class: "thumb", onclick: () => viewPicture(gallery, n, goBack) },
    el("img", { ...pictureAttributes(gallery, n), loading: "lazy" })));
  const at = (row, column) => previews.findIndex((p) => p.row === row && p.column === column);

  function goBack(n) {
    thumbs[n].closest("details")?.setAttribute("open", "");
    thumbs[n].focus();
  }

  function asTable() {
    const lines = rows.map((row, r) => el("tr", {}, el("th", { scope: "row" }, foreign(row, 120)), columns.map((_, c) => el("td", {}, thumbs[at(r, c)]))));
    const table = el("table", { class: "previews", "--columns": columns.length },
      el("thead", {}, el("tr", {}, el("td"), columns.map((column) => el("th", { scope: "col" }, foreign(column))))), el("tbody", {}, lines));
    return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, walkable(table, thumbs));
  }

  function wrapped(row, r) {
    const own = previews.map((p, n) => n).filter((n) => previews[n].row === r);
    const list = el("ul", { class: "wrapped" }, own.map((n) => el("li", {}, thumbs[n], el("span", {}, foreign(columns[previews[n].column], 60)))));
    return el("details", { open: r === 0 || previews.length <= OPEN_PICTURES },
      el("summary", {}, foreign(row, 160)), walkable(list, own.map((n) => thumbs[n])));
  }
  return columns.length > MANY_COLUMNS ? rows.map(wrapped) : asTable();
}

/** Makes the buttons of an element one stop for the tab key; arrow keys walk from one to the other as they lie. Returns the element. */
function walkable(element, buttons) {
  walkAmong(element, () => buttons).stop(buttons[0]);
  return element;
}

/** As `walkable` with buttons that come and go. Returns {stop(button)}, which makes one of them the stop. */
function walkAmong(element, list) {
  const stop = (chosen) => list().forEach((b) => { b.tabIndex = b === chosen ? 0 : -1; });
  element.addEventListener("focusin", (e) => { if (list().includes(e.target)) stop(e.target); });
  element.addEventListener("keydown", (e) => {
    const next = list().includes(e.target) ? neighbour(list(), e.target, e.key) : null;
    if (!next) return;
    next.focus();
    e.preventDefault();
  });
  return { stop };
}

function neighbour(buttons, from, key) {
  const along = { ArrowLeft: -1, ArrowRight: 1, Home: -buttons.length, End: buttons.length }[key];
  if (along) return buttons[Math.min(Math.max(buttons.indexOf(from) + along, 0), buttons.length - 1)];
  const sign = { ArrowUp: -1, ArrowDown: 1 }[key];
  if (!sign) return null;
  const here = from.getBoundingClientRect();
  const away = (b) => [Math.round(sign * (b.getBoundingClientRect().top - here.top)), Math.abs(b.getBoundingClientRect().left - here.left)];
  const [nearest] = buttons.map((b) => [b, ...away(b)]).filter(([, down]) => down > 0).sort((a, b) => a[1] - b[1] || a[2] - b[2]);
  return nearest?.[0];
}
