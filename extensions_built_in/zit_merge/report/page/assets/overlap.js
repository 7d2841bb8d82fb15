// How the inputs overlap, and where they pull apart.

function overlapSection(step) {
  const { details, inputs } = step;
  if (!details || inputs.length < 2) return null;
  if (!details.cosines) return section("Overlap", el("p", {}, "Too many LoRAs to compare each with each."));
  const { alone } = predict(details, inputs.map(weightsOf));
  const weight = alone.map((energies) => sum(energies.map((e) => e ?? 0)));
  const paired = [...new Set(details.pairs.flatMap(([i, j]) => [i, j]))];
  const shown = paired.sort((a, b) => weight[b] - weight[a]).slice(0, MOST_SHOWN).sort((a, b) => a - b);
  const shownPairs = details.pairs.filter(([i, j]) => shown.includes(i) && shown.includes(j));
  const cosineOf = (i, j) => (i === j ? 1 : details.cosines[Math.max(i, j)][Math.min(i, j)]);
  const place = el("div", {});
  let chosen = shownPairs.length ? mostTelling(shownPairs, cosineOf) : null;

  function matrix() {
    return el("table", { class: "matrix", onkeydown: walk },
      el("thead", {}, el("tr", {}, el("td"), shown.slice(0, -1).map((j) => el("th", { scope: "col" }, String(j + 1))))),
      el("tbody", {}, shown.slice(1).map((i) => el("tr", {}, el("th", { scope: "row" }, `${i + 1}. `, foreign(inputs[i].label, 40)),
        shown.filter((j) => j < i).map((j) => {
          const cosine = cosineOf(i, j);
          const { at, tone } = shadeCosine(1)(cosine ?? 0);
          const pressed = chosen !== null && chosen[0] === j && chosen[1] === i;
          return el("td", { "data-tone": tone, "--at": at.toFixed(3) }, el("button", {
            type: "button", tabindex: pressed ? 0 : -1, "aria-pressed": pressed ? "true" : "false", "aria-label": `LoRA ${i + 1} and ${j + 1}: cosine ${showCosine(cosine)}`,
            onclick: () => { chosen = [j, i]; draw(); },
          }, showCosine(cosine)));
        })))));
  }

  /** Arrow keys walk from button to button. */
  function walk(e) {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
    const cell = by && e.target.closest("td");
    if (!cell) return;
    const next = cell.closest("tbody").rows[cell.parentNode.sectionRowIndex + by[0]]?.cells[cell.cellIndex + by[1]]?.querySelector("button");
    next?.focus();
    e.preventDefault();
  }

  function pairMap() {
    const [i, j] = chosen;
    const [, , cosines] = shownPairs.find(([a, b]) => a === i && b === j);
    const values = cosines.map((c) => (c === null ? null : c / 1e4));
    const most = Math.max(0.1, ...values.map((v) => Math.abs(v ?? 0)));
    const tell = (n) => (values[n] === null ? `${placeName(n)}: not in both` : `${placeName(n)}: cosine ${showCosine(values[n], 4)}`);
    const name = `LoRA ${i + 1} and LoRA ${j + 1}`;
    return el("figure", {}, el("figcaption", {}, `${name}: cosine of each module`),
      legend("cosine", [[1, "minus", show(-most)], [0.5, "minus", show(-most / 2)], [0, "plus", "0"], [0.5, "plus", show(most / 2)], [1, "plus", show(most)]]),
      heatMap({ label: `cosines of ${name}`, value: (n) => values[n], shade: shadeCosine(most), tell }), others(values, tell));
  }

  function draw() {
    const focused = place.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    place.replaceChildren(el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "cosines" }, matrix()), pairMap());
    if (focused) [...place.querySelectorAll("button")].find((b) => b.getAttribute("aria-label") === focused)?.focus();
  }
  if (chosen) draw();
  const left = inputs.length - shown.length;
  return section("Overlap",
    el("ul", { class: "notes" }, details.advice.map((sentence) => el("li", {}, sentence)), conflicts(step).map((sentence) => el("li", {}, sentence))),
    left > 0 ? el("p", { class: "hint" }, `The ${shown.length} strongest LoRAs are shown; ${left} weaker ones are not.`) : null,
    el("p", { class: "hint" }, "Cosines of the whole LoRAs as they went in: 1 is the same change, 0 unrelated, below 0 they undo each other. Choose a pair to see it module by module."),
    place);
}

/** A cosine, without a minus before zero. */
function showCosine(value, decimals = 2) {
  if (value === null) return "–";
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

const MOST_SHOWN = 12; // LoRAs in the table of pairs

function mostTelling(pairs, cosineOf) {
  const [i, j] = pairs.reduce((best, pair) => (Math.abs(cosineOf(pair[0], pair[1]) ?? 0) > Math.abs(cosineOf(best[0], best[1]) ?? 0) ? pair : best));
  return [i, j];
}

/** What a plain sum gains or loses where the inputs meet, and in which modules they undo each other most. */
function conflicts(step) {
  const all = step.inputs.map(weightsOf);
  const { alone, together, total } = predict(step.details, all);
  const apart = sum(alone.map((energies) => sum(energies.map((e) => e ?? 0))));
  if (!(apart > 0)) return [];
  const loss = together.map((e, n) => (e === null ? 0 : e - sum(alone.map((energies) => energies[n] ?? 0))));
  const worst = loss.map((l, n) => [l, n]).filter(([l, n]) => l < -0.02 * sum(alone.map((energies) => energies[n] ?? 0))).sort((a, b) => a[0] - b[0]).slice(0, 5);
  const change = total / apart - 1;
  if (step.details.unpaired) return [];
  const first = Math.abs(change) < 0.005 ? "As weighted here, a sum of them keeps the energy of each." :
    `As weighted here, a sum of them has ${percent(Math.abs(change))} ${change > 0 ? "more" : "less"} energy than unrelated LoRAs of these sizes.`;
  const where = worst.map(([l, n]) => `${placeName(n)} (${show((100 * l) / sum(alone.map((energies) => energies[n] ?? 0)), 2)} % of the energy there)`);
  return [first, ...(where.length ? [`They undo each other most in ${where.join("; ")}.`] : [])];
}
