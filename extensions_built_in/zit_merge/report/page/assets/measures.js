// What was measured: parts of a LoRA down, measures across, a bar in each cell; a measure's name sorts by it.

function measuresPart({ metrics, rows, preset }, title) {
  const largest = metrics.map((_, m) => Math.max(0, ...rows.map(([, shares]) => shares[m] ?? 0)));
  const body = el("tbody", {});
  const heads = ["part of the LoRA", ...metrics].map((name, k) => el("th", { scope: "col" }, el("button", { type: "button", class: "sort", onclick: () => sort(k - 1) }, foreign(name))));
  let [by, isFalling] = [-1, false]; // -1: in the order of the parts

  function sort(metric) {
    [by, isFalling] = [metric, metric >= 0 && !(metric === by && isFalling)];
    draw();
  }

  function compared([, a], [, b]) {
    const [x, y] = [a[by], b[by]];
    if (x === null || y === null) return (x === null) - (y === null); // what has no number comes last
    return isFalling ? y - x : x - y;
  }

  function draw() {
    const sorted = by < 0 ? rows : [...rows].sort(compared);
    heads.forEach((head, k) => setAttributes(head, { "aria-sort": k - 1 !== by || by < 0 ? "none" : isFalling ? "descending" : "ascending" }));
    body.replaceChildren(...sorted.map(([name, shares]) => el("tr", {}, el("th", { scope: "row" }, foreign(name)), shares.map((share, m) => el("td", {},
      el("span", { class: "bar" }, el("i", { "--at": largest[m] > 0 ? Math.min(Math.max(share ?? 0, 0) / largest[m], 1) : 0 })),
      el("span", { class: "number" }, shareText(share)))))));
  }

  draw();
  const many = rows.length > MANY_ROWS;
  return [
    el("p", { class: "hint" }, "100 % is all that the LoRA changes. Bars are as long as their number beside the largest of the column; a column's name sorts by it."),
    el("div", { class: many ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": `measures: ${title}` },
      el("table", { class: "measures" }, el("thead", {}, el("tr", {}, heads)), body)),
    preset ? writtenBox("The preset that these shares suggest", preset) : null];
}

const MANY_ROWS = 16;

/** A percentage with one decimal, so that a column of them can be compared. */
function shareText(share) {
  if (share === null) return "–";
  if (share !== 0 && Math.abs(share) < 5e-4) return "under 0.1 %";
  return `${(100 * share).toFixed(1).replace("-", "−")} %`;
}

function writtenBox(label, text) {
  const box = copyBox(label, { tag: "h4" });
  box.write(text);
  return box;
}
