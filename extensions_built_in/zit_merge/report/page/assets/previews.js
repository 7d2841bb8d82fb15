// Pictures side by side: a row for each prompt and seed, a column for each thing compared. A click, or Enter, shows one large.

function previewsSection(step) {
  if (!step.previews.length) {
    return step.left_out.includes("previews") ? section("Previews", el("p", {}, "The pictures are left out to keep this page under 5 MB; they lie in the job's samples.")) : null;
  }
  const rows = [...new Set(step.previews.map((p) => p.row))];
  const columns = [...new Set(step.previews.map((p) => p.column))];
  const picture = new Map(step.previews.map((p) => [`${p.row}\n${p.column}`, p]));
  const large = el("dialog", { class: "large", "aria-label": "preview" });

  function open(at) {
    const shown = step.previews[at];
    const turn = (by) => open((at + by + step.previews.length) % step.previews.length);
    large.onkeydown = (e) => { if (e.key === "ArrowRight") turn(1); else if (e.key === "ArrowLeft") turn(-1); };
    const image = el("img", { src: shown.uri, alt: `${shown.column}: ${shown.row}`, onclick: () => image.classList.toggle("full") });
    large.replaceChildren(
      el("p", {}, el("strong", {}, foreign(shown.column)), " ", foreign(shown.row, 300)),
      el("p", { class: "buttons" },
        el("button", { type: "button", onclick: () => turn(-1) }, "previous"), el("button", { type: "button", onclick: () => turn(1) }, "next"),
        el("button", { type: "button", onclick: () => image.classList.toggle("full") }, "fit or full size"),
        el("button", { type: "button", onclick: () => large.close() }, "close")),
      el("div", { class: "stage" }, image));
    if (!large.open) large.showModal();
  }

  return section("Previews", el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "previews" }, el("table", { class: "previews" },
    el("thead", {}, el("tr", {}, el("td"), columns.map((c) => el("th", { scope: "col" }, foreign(c))))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, foreign(row, 120)), columns.map((column) => {
      const shown = picture.get(`${row}\n${column}`);
      return el("td", {}, shown ? el("button", { type: "button", class: "thumb", onclick: () => open(step.previews.indexOf(shown)) },
        el("img", { src: shown.uri, alt: `${column}: ${row}`, loading: "lazy" })) : null);
    })))))), large);
}
