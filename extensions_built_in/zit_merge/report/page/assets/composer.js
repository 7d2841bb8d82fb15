// The composer: weights by hand, what they would do, and the YAML that says so.

/** The weights that people compose, of every step of a section, with undo. Weights that nobody touched keep their own keys. */
function makeDesk(owner) {
  const first = owner.steps.map((step) => step.inputs.map((input) => ({ weights: weightsOf(input), touched: false })));
  const copy = (all) => all.map((loras) => loras.map(({ weights, touched }) => ({ weights: copyWeights(weights), touched })));
  let now = copy(first);
  const past = [];
  const future = [];
  const listeners = [];
  const tell = () => listeners.forEach((listener) => listener());
  return {
    listen: (listener) => listeners.push(listener),
    weights: (s, i) => now[s][i].weights,
    all: (s) => now[s].map((lora) => lora.weights),
    initial: (s) => first[s].map((lora) => lora.weights),
    touched: (s, i) => now[s][i].touched,
    /** Changes a LoRA's weights; `isFirst` begins a change that undo takes back whole. */
    edit(s, i, change, isFirst = true) {
      if (isFirst) { past.push(copy(now)); future.length = 0; }
      change(now[s][i].weights);
      now[s][i].touched = true;
      tell();
    },
    reset(s, numbers) {
      past.push(copy(now));
      future.length = 0;
      for (const i of numbers) now[s][i] = copy(first)[s][i];
      tell();
    },
    undo() { if (past.length) { future.push(copy(now)); now = past.pop(); tell(); } },
    redo() { if (future.length) { past.push(copy(now)); now = future.pop(); tell(); } },
    canUndo: () => past.length > 0,
    canRedo: () => future.length > 0,
    yaml() {
      const steps = owner.raw.steps.map((step) => {
        const s = owner.steps.findIndex((shown) => shown.name === step.name);
        if (!step.loras || s < 0 || !owner.steps[s].composable) return step;
        return { ...step, loras: step.loras.map((lora, i) => (now[s][i].touched ? { ...withoutStrengths(lora), ...keysOf(now[s][i].weights) } : lora)) };
      });
      return yamlSection({ ...owner.raw, steps });
    },
  };
}

function withoutStrengths(lora) {
  const { ratio, preset, blocks, layers, effects, overrides, ...rest } = lora;
  return rest;
}

/** A slider with a number beside it; both say the same. */
function dial({ label, least = -1, most = 2, read, write }) {
  const id = freshId("dial");
  let dragging = false;
  const range = el("input", { type: "range", min: least, max: most, step: 0.05, "aria-label": `${label}, slider`,
    oninput: () => { write(Number(range.value), !dragging); dragging = true; }, onchange: () => { dragging = false; } });
  const number = el("input", { type: "number", id, step: 0.05, onchange: () => { if (number.value !== "" && Number.isFinite(Number(number.value))) write(Number(number.value), true); update(); } });
  function update() {
    const value = read();
    range.value = value;
    if (document.activeElement !== number || Number(number.value) !== value) number.value = value;
  }
  update();
  return Object.assign(el("div", { class: "dial" }, el("label", { for: id }, label), range, number), { update });
}

const STEP = 0.05; // of what is drawn or moved with keys

function rounded(value) {
  return Math.round(value / STEP) * STEP === 0 ? 0 : Number((Math.round(value / STEP) * STEP).toFixed(2));
}

/** The factors of the 30 layers as a curve that is drawn with the pointer, or moved point by point with the keys. */
function curve({ read, write }) {
  const [width, height, left, bottom, top] = [460, 170, 30, 148, 10];
  const step = (width - left - 10) / (N_LAYERS - 1);
  let [low, high] = [0, 2];
  let at = 0;
  let last = null;
  const xOf = (i) => left + i * step;
  const yOf = (v) => bottom - ((v - low) / (high - low)) * (bottom - top);
  const line = svg("polyline", { class: "curve-line" });
  const grid = svg("g", { class: "curve-grid" });
  const points = Array.from({ length: N_LAYERS }, (_, i) => svg("circle", {
    r: 5, class: "curve-point", role: "slider", tabindex: i ? -1 : 0, "aria-label": `layer ${i}`, "aria-orientation": "vertical",
    onkeydown: (e) => onkey(e, i), onfocus: () => { points[at].setAttribute("tabindex", -1); at = i; points[at].setAttribute("tabindex", 0); },
  }));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "factor of each layer: up and down change it, left and right choose the layer",
    class: "curve", onpointerdown: onpointer, onpointermove: (e) => { if (e.buttons === 1 && last) onpointer(e); }, onpointerup: () => { last = null; } }, grid, line, points);

  function onkey(e, i) {
    const by = { ArrowUp: STEP, ArrowDown: -STEP, PageUp: 5 * STEP, PageDown: -5 * STEP }[e.key];
    if (by) write((layers) => { layers[i] = rounded(layers[i] + by); }, true);
    else if (e.key === "ArrowRight") points[Math.min(i + 1, N_LAYERS - 1)].focus();
    else if (e.key === "ArrowLeft") points[Math.max(i - 1, 0)].focus();
    else if (e.key === "Home") points[0].focus();
    else if (e.key === "End") points[N_LAYERS - 1].focus();
    else return;
    e.preventDefault();
  }

  function onpointer(e) {
    if (e.button > 0) return;
    const box = picture.getBoundingClientRect();
    const x = ((e.clientX - box.left) / box.width) * width;
    const y = ((e.clientY - box.top) / box.height) * height;
    const i = Math.min(Math.max(Math.round((x - left) / step), 0), N_LAYERS - 1);
    const value = rounded(low + ((bottom - Math.min(Math.max(y, top), bottom)) / (bottom - top)) * (high - low));
    const [from, before] = last ?? [i, value];
    const isFirst = last === null;
    last = [i, value];
    if (isFirst) picture.setPointerCapture(e.pointerId);
    write((layers) => { // the layers that a fast pointer skipped lie between
      for (let k = Math.min(from, i); k <= Math.max(from, i); k += 1) layers[k] = from === i ? value : rounded(before + ((value - before) * (k - from)) / (i - from));
    }, isFirst);
    e.preventDefault();
  }

  function update() {
    const layers = read();
    if (last === null) [low, high] = [Math.min(0, Math.floor(Math.min(...layers))), Math.max(2, Math.ceil(Math.max(...layers)))];
    grid.replaceChildren(...Array.from({ length: 5 }, (_, k) => low + ((high - low) * k) / 4).flatMap((v) => [
      svg("line", { x1: left, x2: width, y1: yOf(v), y2: yOf(v) }), svg("text", { x: left - 6, y: yOf(v) + 3, "text-anchor": "end" }, show(v, 2))]),
    ...Array.from({ length: 6 }, (_, k) => svg("text", { x: xOf(k * 5), y: height - 4, "text-anchor": "middle" }, String(k * 5))),
    svg("text", { x: xOf(N_LAYERS - 1), y: height - 4, "text-anchor": "middle" }, String(N_LAYERS - 1)));
    line.setAttribute("points", layers.map((v, i) => `${xOf(i)},${yOf(v)}`).join(" "));
    points.forEach((point, i) => setAttributes(point, { cx: xOf(i), cy: yOf(layers[i]), "aria-valuenow": layers[i], "aria-valuemin": Math.min(low, layers[i]), "aria-valuemax": Math.max(high, layers[i]), "aria-valuetext": show(layers[i], 4) }));
  }
  update();
  return Object.assign(picture, { update });
}

/** Exact numbers for a range of layers: a number, or a gradient from one to another. */
function rangeForm(write) {
  const field = (label, value, attributes) => {
    const id = freshId("range");
    const input = el("input", { type: "number", id, value, ...attributes });
    return [el("span", { class: "field" }, el("label", { for: id }, label), input), input];
  };
  const layer = { min: 0, max: N_LAYERS - 1, step: 1 };
  const [first, from] = field("Layers", 0, layer);
  const [second, to] = field("to", N_LAYERS - 1, layer);
  const [third, start] = field("factor", 1, { step: 0.05 });
  const [fourth, end] = field("to", 1, { step: 0.05 });
  const said = el("span", { class: "said", role: "status" });
  function set() {
    const [a, b, x, y] = [from, to, start, end].map((input) => Number(input.value));
    if (![from, to, start, end].every((input) => input.value !== "" && input.validity.valid === true) && !(Number.isInteger(a) && Number.isInteger(b) && a >= 0 && b < N_LAYERS)) {
      said.textContent = `layers are 0 to ${N_LAYERS - 1}`;
      return;
    }
    const [low, high] = [Math.min(a, b), Math.max(a, b)];
    if (low < 0 || high >= N_LAYERS || ![a, b].every(Number.isInteger) || ![x, y].every(Number.isFinite)) {
      said.textContent = `layers are whole numbers from 0 to ${N_LAYERS - 1}`;
      return;
    }
    said.textContent = "";
    write((layers) => {
      for (let i = low; i <= high; i += 1) layers[i] = i === high ? y : x + ((y - x) * (i - low)) / (high - low);
      if (low === high) layers[low] = x;
    }, true);
  }
  return el("div", { class: "range-form" }, first, second, third, fourth, el("button", { type: "button", onclick: set }, "Set layers"), said);
}

/** The tools of one step: whose numbers, the dials, the curve, the map to paint, what would come out. */
function composerSection(step, s, desk) {
  const { details, inputs } = step;
  if (!step.composable || !details) return null;
  let who = 0;
  let tool = "paint";
  let brush = 0;
  let stroke = false;
  const present = (n) => details.energies[who][n] !== null;
  const hasSection = (name) => MODULES.some((m, n) => m.section === name && details.energies.some((energies) => energies[n] !== null));
  const edit = (change, isFirst) => desk.edit(s, who, change, isFirst);
  const weights = () => desk.weights(s, who);
  let parts = [];
  const added = (part) => { parts.push(part); return part; };
  const bench = el("div", { class: "bench" });
  const outcome = el("div", { class: "outcome" });
  const before = predict(details, desk.initial(s));

  function paint(n, kind) {
    if (!present(n)) return;
    stroke = kind === "drag" && stroke;
    const erase = kind === "clear" || tool === "erase";
    if (erase ? !weights().overrides.has(n) : weights().overrides.get(n) === brush) { stroke = true; return; }
    edit((w) => { if (erase) w.overrides.delete(n); else w.overrides.set(n, brush); }, !stroke);
    stroke = true;
  }

  function drawBench() {
    parts = [];
    const brushId = freshId("brush");
    const paintMap = added(heatMap({
      label: `strengths of LoRA ${who + 1}, paintable`,
      value: (n) => (present(n) ? strengthAt(weights(), n) : null),
      shade: shadeStrength(FULL_COLOUR),
      mark: (n) => weights().overrides.has(n),
      tell: (n) => (present(n) ? `${placeName(n)}: strength ${show(strengthAt(weights(), n), 4)}${weights().overrides.has(n) ? ", painted" : ""}` : `${placeName(n)}: not in this LoRA`),
      onpick: paint,
    }));
    const refiners = ["noise_refiner", "context_refiner", "other"].filter(hasSection);
    bench.replaceChildren(
      el("p", {}, el("strong", {}, `LoRA ${who + 1}: `), foreign(inputs[who].label)),
      el("div", { class: "columns" },
        el("div", {}, el("h4", {}, "Components"), COMPONENTS.map((c, i) => added(dial({ label: c === "adaLN_modulation" ? "adaLN" : c,
          read: () => weights().components[i], write: (v, isFirst) => edit((w) => { w.components[i] = v; }, isFirst) })))),
        el("div", {}, el("h4", {}, "Depth"), el("p", { class: "hint" }, "Draw with the pointer, or set a range."),
          added(curve({ read: () => weights().layers, write: (change, isFirst) => edit((w) => change(w.layers), isFirst) })),
          rangeForm((change, isFirst) => edit((w) => change(w.layers), isFirst)),
          refiners.map((name) => added(dial({ label: name, read: () => weights()[name], write: (v, isFirst) => edit((w) => { w[name] = v; }, isFirst) }))))),
      el("h4", {}, "Single cells"),
      el("p", { class: "hint" }, "Click or drag to paint; with the keyboard Enter paints, Delete erases. A painted factor stands in the place of component and depth."),
      el("div", { class: "tools" }, choice("Tool", [["paint", "paint"], ["erase", "erase"]], tool, (value) => { tool = value; }),
        el("span", { class: "field" }, el("label", { for: brushId }, "with the factor"), el("input", { type: "number", id: brushId, step: 0.05, value: brush,
          oninput: (e) => { if (e.target.value !== "" && Number.isFinite(Number(e.target.value))) brush = Number(e.target.value); } }))),
      paintMap);
  }

  function drawOutcome() {
    const now = predict(details, desk.all(s));
    const apart = sum(now.alone.map((energies) => sum(energies.map((e) => e ?? 0))));
    const most = Math.max(...now.together.map((e) => e ?? 0), 0);
    const share = (n) => (now.together[n] === null ? null : now.total > 0 ? now.together[n] / now.total : 0);
    const tell = (n) => (now.together[n] === null ? `${placeName(n)}: nothing` : `${placeName(n)}: ${percent(share(n))} of the energy, ` +
      (before.together[n] > 0 ? `${show(now.together[n] / before.together[n])} times that of the start` : `norm ${show(Math.sqrt(now.together[n]))}`));
    const bars = inputs.map((input, i) => [foreign(input.label, 40), sum(now.alone[i].map((e) => e ?? 0))]);
    outcome.replaceChildren(
      el("h4", {}, "What would come out"),
      el("p", { role: "status", class: "energy" }, before.total > 0
        ? now.total === before.total ? "Energy as at the start." : `Energy: ${show(now.total / before.total)} times that of the start (norm ${show(Math.sqrt(now.total / before.total))} times).`
        : `Energy ${show(now.total)}.`, " ", apart > 0 ? overlapSentence(now.total / apart - 1) : "Nothing is left.",
      step.linear && step.method === "sum" ? "" : ` This is a plain sum; ${step.method} will differ.`),
      el("ul", { class: "bars" }, bars.map(([name, energy]) => el("li", {}, el("span", { class: "bar-name" }, name), el("span", { class: "bar" }, el("i", { "--at": apart > 0 ? energy / apart : 0 })), el("span", { class: "number" }, apart > 0 ? percent(energy / apart) : "–")))),
      heatMap({ label: "predicted energy of the result", value: share, shade: shadeEnergy(now.total > 0 ? most / now.total : 0), tell }));
  }

  const ratios = inputs.map((input, i) => dial({ label: `${i + 1}. ${clip(input.label)}`, least: -1, most: 2,
    read: () => desk.weights(s, i).ratio, write: (v, isFirst) => desk.edit(s, i, (w) => { w.ratio = v; }, isFirst) }));
  const presetIdea = el("p", { class: "hint" });
  let preset = Object.keys(facts.presets)[0];
  const tellPreset = () => { presetIdea.textContent = facts.presets[preset].idea; };
  tellPreset();
  const undo = el("button", { type: "button", onclick: desk.undo }, "Undo");
  const redo = el("button", { type: "button", onclick: desk.redo }, "Redo");

  function refresh() {
    for (const part of [...parts, ...ratios]) part.update();
    undo.disabled = !desk.canUndo();
    redo.disabled = !desk.canRedo();
    drawOutcome();
  }
  desk.listen(refresh);
  drawBench();
  refresh();

  return section("Compose the next merge",
    el("p", { class: "hint" }, "Start from this step's weights. Strength of a module = ratio × component × depth, or ratio × what is painted there."),
    el("h3", {}, "Ratios"),
    el("div", { class: inputs.length > MANY_INPUTS ? "ratios tall" : "ratios", ...(inputs.length > MANY_INPUTS ? { tabindex: 0, role: "region", "aria-label": "ratios" } : {}) }, ratios),
    el("div", { class: "tools" },
      inputs.length > 1 ? select("Weigh the blocks of", inputs.map((input, i) => [i, `${i + 1}. ${clip(input.label)}`]), who, (value) => { who = Number(value); drawBench(); }) : null,
      select("Preset", Object.keys(facts.presets).map((name) => [name, name]), preset, (value) => { preset = value; tellPreset(); }),
      el("button", { type: "button", onclick: () => edit((w) => applyPreset(w, facts.presets[preset]), true) }, "Apply"),
      undo, redo,
      el("button", { type: "button", onclick: () => desk.reset(s, [who]) }, "Reset this LoRA"),
      el("button", { type: "button", onclick: () => desk.reset(s, inputs.map((_, i) => i)) }, "Reset all")),
    presetIdea, bench, outcome, yamlBox(desk));
}

function overlapSentence(gain) {
  return Math.abs(gain) < 0.005 ? "" : `Where the LoRAs overlap it ${gain > 0 ? "gains" : "loses"} ${percent(Math.abs(gain))}.`;
}

/** A preset's factors in the place of the LoRA's own; the ratio stays. */
function applyPreset(w, preset) {
  Object.assign(w, copyWeights({ ...preset, overrides: new Map(preset.overrides), ratio: w.ratio }));
  delete w.idea;
}

/** The section as text to select, with a button that copies it where the browser lets it. */
function yamlBox(desk) {
  const id = freshId("yaml");
  const area = el("textarea", { id, readonly: true, spellcheck: "false", rows: 12 });
  const said = el("span", { class: "said", role: "status" });
  function update() {
    area.value = desk.yaml();
    area.rows = Math.min(Math.max(area.value.split("\n").length, 6), 40);
  }
  async function copy() {
    area.focus();
    area.select();
    let done = false;
    try {
      await navigator.clipboard.writeText(area.value);
      done = true;
    } catch { // a sandboxed frame may not; the older way asks nobody
      done = document.execCommand("copy");
    }
    said.textContent = done ? "Copied." : "Selected: press Ctrl+C.";
  }
  desk.listen(update);
  update();
  return el("div", { class: "yaml" }, el("h3", {}, el("label", { for: id }, "The section: paste it under process: of the job, or save it as a file for run")), area,
    el("p", { class: "tools" }, el("button", { type: "button", class: "main", onclick: copy }, "Copy"), said));
}
