// Heat maps: components down, layers across. Exact numbers on hover and focus.

/**
 * A heat map as a grid that arrow keys walk through.
 *
 * label: for screen readers. value(n): what colours module n, null where there is nothing. shade(value): {at: 0 to 1, tone}.
 * tell(n): the sentence of a module. onpick(n, kind): a cell was painted; kind is `start` of a stroke, `drag`, or `clear`.
 * Returns the element with `update()` and `rename(label)`.
 */
function heatMap({ label, value, shade, tell, mark = () => false, onpick = null }) {
  const isThere = (n) => n !== undefined && value(n) !== null;
  const columns = COLUMNS.filter((c) => c.section === "layers" || ROWS.some((r) => isThere(moduleAt(c, r))));
  const readout = el("p", { class: "readout" });
  const cells = ROWS.map((component) => columns.map((column) => {
    const n = moduleAt(column, component);
    return el("td", { tabindex: -1, "data-module": n === undefined ? null : MODULES[n].name, class: startsSection(column) ? "gap" : null });
  }));
  const numberOf = (r, c) => moduleAt(columns[c], ROWS[r]);
  let [row, col] = [0, 0];

  let pointed = null; // where the readout speaks of

  function point(r, c) {
    pointed = [r, c];
    const n = numberOf(r, c);
    readout.textContent = n === undefined ? "Z-Image has no such module" : tell(n);
  }

  function go(r, c) {
    cells[row][col].tabIndex = -1;
    [row, col] = [Math.min(Math.max(r, 0), ROWS.length - 1), Math.min(Math.max(c, 0), columns.length - 1)];
    cells[row][col].tabIndex = 0;
    cells[row][col].focus();
  }

  function find(target) {
    const cell = target?.closest?.("td");
    const r = cells.findIndex((line) => line.includes(cell));
    return r < 0 ? null : [r, cells[r].indexOf(cell)];
  }

  // Painting: a stroke begins with the pointer down in this map, and paints what it passes, however fast it is.
  let stroke = null;

  function pick(spot, kind) {
    const n = spot && numberOf(...spot);
    if (onpick && n !== null && n !== undefined) onpick(n, kind);
  }

  function begin(e) {
    const spot = find(e.target);
    if (!onpick || !spot || e.button !== 0) return;
    stroke = { spot, pointer: e.pointerId };
    e.target.releasePointerCapture?.(e.pointerId); // a finger would else stay with its first cell
    window.addEventListener("pointerup", end);
    window.addEventListener("pointercancel", end);
    pick(spot, "start");
  }

  function move(e) {
    if (stroke === null || e.pointerId !== stroke.pointer) return;
    const spot = find(document.elementFromPoint(e.clientX, e.clientY));
    if (!spot) return;
    const [from, steps] = [stroke.spot, Math.max(Math.abs(spot[0] - stroke.spot[0]), Math.abs(spot[1] - stroke.spot[1]))];
    for (let k = 1; k <= steps; k += 1) pick([0, 1].map((d) => Math.round(from[d] + ((spot[d] - from[d]) * k) / steps)), "drag");
    stroke.spot = spot;
  }

  function end(e) {
    if (stroke === null || e.pointerId !== stroke.pointer) return;
    stroke = null;
    window.removeEventListener("pointerup", end);
    window.removeEventListener("pointercancel", end);
  }

  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -99], End: [0, 99], PageUp: [-99, 0], PageDown: [99, 0] };
  const table = el("table", {
    role: "grid", "aria-label": label, class: onpick ? "map paintable" : "map",
    onkeydown: (e) => {
      if (moves[e.key]) go(row + moves[e.key][0], col + moves[e.key][1]);
      else if (onpick && (e.key === "Enter" || e.key === " ")) pick(find(e.target), "start");
      else if (onpick && (e.key === "Delete" || e.key === "Backspace")) pick(find(e.target), "clear");
      else return;
      e.preventDefault();
    },
    onfocusin: (e) => { const spot = find(e.target); if (spot) { cells[row][col].tabIndex = -1; [row, col] = spot; cells[row][col].tabIndex = 0; point(...spot); } },
    onpointerover: (e) => { const spot = find(e.target); if (spot) point(...spot); },
    onpointerleave: () => { pointed = null; readout.textContent = ""; },
    onpointerdown: begin,
    onpointermove: move,
  },
  el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span", { class: "hidden" }, "component")), columns.map((c) => el("th", { scope: "col", class: startsSection(c) ? "gap" : null },
    c.section === "layers" ? String(c.index) : el("abbr", { title: `${c.section} ${c.index}` }, `${c.section[0].toUpperCase()}${c.index}`))))),
  el("tbody", {}, ROWS.map((component, r) => el("tr", {}, el("th", { scope: "row" }, component === "adaLN_modulation" ? "adaLN" : component), cells[r]))));

  function update() {
    cells.forEach((line, r) => line.forEach((cell, c) => {
      const n = numberOf(r, c);
      const v = n === undefined ? null : value(n);
      const { at = 0, tone = "none" } = v === null ? {} : shade(v);
      cell.style.setProperty("--at", at.toFixed(4));
      cell.dataset.tone = tone;
      cell.dataset.value = v === null ? "" : v;
      cell.toggleAttribute("data-marked", n !== undefined && mark(n));
      cell.setAttribute("aria-label", n === undefined ? "none" : tell(n));
    }));
    if (pointed) point(...pointed);
  }
  cells[0][0].tabIndex = 0;
  update();
  const rename = (name) => table.setAttribute("aria-label", name);
  return Object.assign(el("div", { class: "map-box" }, el("div", { class: "map-scroll" }, table), readout), { update, rename });
}

function startsSection(column) {
  return column.section !== "layers" && column.index === 0;
}

// Colours: `strength` grows from nothing through 1 (half way) to the largest, negative ones in another hue; `energy` grows with
// the root, since a few modules hold most of it; `cosine` has two ends.
function shadeStrength(largest) {
  const most = Math.max(largest, 1e-9);
  return (v) => ({ at: Math.min(Math.abs(v) / most, 1), tone: v < 0 ? "minus" : "plus" });
}

function shadeEnergy(largest) {
  return (share) => ({ at: largest > 0 ? Math.sqrt(share / largest) : 0, tone: "energy" });
}

function shadeCosine(largest) {
  return (cosine) => ({ at: Math.min(Math.abs(cosine) / Math.max(largest, 1e-9), 1), tone: cosine < 0 ? "minus" : "plus" });
}

/** The colour bar of strengths from -top to top. */
function strengthLegend(top, largest, isNegative) {
  const beyond = largest > top;
  return legend("strength", [
    ...(isNegative ? [[1, "minus", show(-top) + (beyond ? " or less" : "")], ...(top > 1 ? [[1 / top, "minus", "−1"]] : [])] : []),
    [0, "plus", "0"], [0.5 / top, "plus", "0.5"], [1 / top, "plus", "1"], ...(top > 1 ? [[1, "plus", show(top) + (beyond ? " or more" : "")]] : [])]);
}

/** A colour bar. `stops`: [at, tone, text] from left to right. */
function legend(title, stops) {
  return el("div", { class: "legend" }, el("span", {}, title), stops.map(([at, tone, text]) =>
    el("span", { class: "stop" }, el("i", { "data-tone": tone, "--at": at }), text)), el("span", { class: "stop" }, el("i", { "data-tone": "none" }), "not in the LoRA"));
}

/** The layer maps of a step: the result, and its inputs. */
function layersSection(step) {
  const { details, inputs } = step;
  if (!inputs.length) return null;
  if (!details) return missing("Layer by layer", step);
  const all = inputs.map(weightsOf);
  const { alone } = predict(details, all);
  const raw = MODULES.map((_, n) => sum(details.energies.map((e) => e[n] ?? 0)));
  const size = MODULES.map((_, n) => (details.result?.[n] !== null && details.result?.[n] !== undefined && raw[n] > 0 ? Math.sqrt(details.result[n] / raw[n]) : null));
  const largest = Math.max(0, ...all.map((w, i) => Math.max(...MODULES.map((_, n) => (alone[i][n] === null ? 0 : Math.abs(strengthAt(w, n)))))), ...size.map((s) => s ?? 0));
  const top = Math.min(Math.max(largest, 1), FULL_COLOUR);
  const body = el("div", {});
  let mode = "strength";
  let extra = ALWAYS_SHOWN;

  function inputMap(i) {
    const total = sum(alone[i].map((e) => e ?? 0));
    const strengths = MODULES.map((_, n) => (alone[i][n] === null ? null : strengthAt(all[i], n)));
    const shares = alone[i].map((e) => (e === null ? null : total > 0 ? e / total : 0));
    const tell = (n) => alone[i][n] === null ? `${placeName(n)}: not in this LoRA`
      : `${placeName(n)}: strength ${show(strengths[n], 4)}, ${percent(shares[n])} of its energy, norm ${show(Math.sqrt(alone[i][n]), 4)}`;
    return figure([`${i + 1}. `, foreign(inputs[i].label)], `strength and energy of LoRA ${i + 1}`, strengths, shares, tell);
  }

  function resultMap() {
    const total = sum(details.result.map((e) => e ?? 0));
    const shares = details.result.map((e) => (e === null ? null : total > 0 ? e / total : 0));
    const kept = (n) => (details.errors?.[n] === null || details.errors?.[n] === undefined ? "" : `, ${percent(1 - details.errors[n] ** 2)} of it kept`);
    const tell = (n) => details.result[n] === null ? `${placeName(n)}: nothing` : `${placeName(n)}: ${show(size[n], 4)} times its inputs at strength 1, ` +
      `${percent(shares[n])} of the energy, norm ${show(Math.sqrt(details.result[n]), 4)}${kept(n)}`;
    return figure(["The result"], "size and energy of the result", size, shares, tell);
  }

  function figure(title, label, strengths, shares, tell) {
    const values = mode === "strength" ? strengths : shares;
    const known = values.filter((v) => v !== null).map(Math.abs);
    const most = Math.max(...known, 0);
    const map = heatMap({ label, value: (n) => values[n], shade: mode === "strength" ? shadeStrength(top) : shadeEnergy(most), tell });
    return el("figure", {}, el("figcaption", {}, title), map, others(values, tell));
  }

  function draw() {
    const isNegative = all.some((w, i) => MODULES.some((_, n) => alone[i][n] !== null && strengthAt(w, n) < 0));
    const numbers = inputs.map((_, i) => i).slice(0, ALWAYS_SHOWN);
    body.replaceChildren(
      mode === "strength"
        ? strengthLegend(top, largest, isNegative)
        : legend("share of the energy", [[0, "energy", "none"], [0.5, "energy", "a quarter of the largest"], [1, "energy", "the largest"]]),
      ...(details.result ? [resultMap()] : []),
      ...numbers.map(inputMap),
      ...(inputs.length > ALWAYS_SHOWN ? [
        select("Another LoRA:", inputs.map((input, i) => [i, `${i + 1}. ${clip(input.label)}`]).slice(ALWAYS_SHOWN), extra, (value) => { extra = Number(value); draw(); }),
        inputMap(extra)] : []));
  }
  draw();
  return section("Layer by layer",
    el("p", { class: "hint" }, "Components down, layers across; N and C are the noise and context refiners. Point at a cell, or walk with the arrow keys, for its numbers. ",
      "Energy is the squared size (Frobenius norm) of a change. ",
      details.result ? "The strength of the result is its size beside that of all its inputs at strength 1." : ""),
    choice("Show", [["strength", "strength"], ["energy", "energy"]], mode, (value) => { mode = value; draw(); }), body);
}

const FULL_COLOUR = 2; // strengths beyond it look alike, so that a single large one does not pale the rest
const ALWAYS_SHOWN = 4; // input maps; the others are chosen one at a time

/** The modules outside of the blocks, which have no place on the map. */
function others(values, tell) {
  const there = OTHER.filter((n) => values[n] !== null);
  return there.length ? el("ul", { class: "others" }, there.map((n) => el("li", {}, tell(n)))) : null;
}

function clip(text) {
  return text.length > 60 ? `${text.slice(0, 40)}…${text.slice(-15)}` : text;
}

function section(title, ...children) {
  const id = freshId("title");
  return el("section", { "aria-labelledby": id }, el("h2", { id }, title), children);
}

function missing(title, step) {
  const why = step.left_out.includes("details") ? "left out to keep this page under 5 MB" : "its inputs could not be read again";
  return section(title, el("p", {}, `The maps of this step are not here: ${why}. `, "inspect --html shows any files."));
}
