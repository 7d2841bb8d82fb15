// The composer: tools for the weights of one step, what they would do, and the YAML.

/** A slider with a number beside it; both say the same. Only the number is a stop for the tab key, the arrows move it too. */
function dial({ label, least = -1, most = 2, read, write }) {
  const id = freshId("dial");
  let dragging = false;
  const range = el("input", { type: "range", min: least, max: most, step: STEP, tabindex: -1, "aria-label": `${label}, slider`,
    oninput: () => { write(Number(range.value), !dragging); dragging = true; }, onchange: () => { dragging = false; } });
  const number = numberInput({ id, write: (value) => { if (value !== read()) write(value, true); } });
  function update() {
    range.value = read();
    range.setAttribute("aria-valuetext", show(read(), 6));
    number.show(read());
  }
  update();
  return Object.assign(el("div", { class: "dial" }, el("label", { for: id }, label), range, number), { update });
}

function rounded(value) {
  return Number((Math.round(value / STEP) * STEP).toFixed(2)) || 0; // no minus before zero
}

/** The factors of the 30 layers as a curve that is drawn with the pointer, or moved point by point with the keys. */
function curve({ read, write }) {
  const [width, height, left, bottom, top] = [460, 170, 30, 148, 10];
  const step = (width - left - 10) / (N_LAYERS - 1);
  let [low, high] = [0, 2];
  let at = 0;
  let stroke = null; // {pointer, last: [layer, value]}
  const xOf = (i) => left + i * step;
  const yOf = (v) => bottom - ((v - low) / (high - low)) * (bottom - top);
  const line = svg("polyline", { class: "curve-line" });
  const grid = svg("g", { class: "curve-grid" });
  const points = Array.from({ length: N_LAYERS }, (_, i) => svg("circle", {
    r: 5, class: "curve-point", role: "slider", tabindex: i ? -1 : 0, "aria-label": `layer ${i}`, "aria-orientation": "vertical",
    onkeydown: (e) => onkey(e, i), onfocus: () => { points[at].setAttribute("tabindex", -1); at = i; points[at].setAttribute("tabindex", 0); },
  }));
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": "factor of each layer: up and down change it, left and right choose the layer",
    class: "curve", onpointerdown: begin, onpointermove: (e) => { if (e.pointerId === stroke?.pointer) draw(e); }, onpointerup: end, onpointercancel: end, onlostpointercapture: end },
  grid, line, points);

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

  function begin(e) {
    if (stroke !== null || e.button > 0) return; // a second finger draws nothing
    stroke = { pointer: e.pointerId, last: null };
    picture.setPointerCapture(e.pointerId);
    draw(e);
    e.preventDefault();
  }

  function end(e) {
    if (e.pointerId === stroke?.pointer) { stroke = null; update(); }
  }

  function draw(e) {
    const box = picture.getBoundingClientRect();
    const x = ((e.clientX - box.left) / box.width) * width;
    const y = ((e.clientY - box.top) / box.height) * height;
    const i = Math.min(Math.max(Math.round((x - left) / step), 0), N_LAYERS - 1);
    const value = rounded(low + ((bottom - Math.min(Math.max(y, top), bottom)) / (bottom - top)) * (high - low));
    const isFirst = stroke.last === null;
    const [from, before] = stroke.last ?? [i, value];
    stroke.last = [i, value];
    write((layers) => { // the layers that a fast pointer skipped lie between
      for (let k = Math.min(from, i); k <= Math.max(from, i); k += 1) layers[k] = from === i ? value : rounded(before + ((value - before) * (k - from)) / (i - from));
    }, isFirst);
  }

  function update() {
    const layers = read();
    if (stroke === null) [low, high] = [Math.min(0, Math.floor(Math.min(...layers))), Math.max(2, Math.ceil(Math.max(...layers)))];
    grid.replaceChildren(...Array.from({ length: 5 }, (_, k) => low + ((high - low) * k) / 4).flatMap((v) => [
      svg("line", { x1: left, x2: width, y1: yOf(v), y2: yOf(v) }), svg("text", { x: left - 6, y: yOf(v) + 3, "text-anchor": "end" }, show(v, 2))]),
    ...[0, 5, 10, 15, 20, 25, N_LAYERS - 1].map((i) => svg("text", { x: xOf(i), y: height - 4, "text-anchor": "middle" }, String(i))));
    line.setAttribute("points", layers.map((v, i) => `${xOf(i)},${yOf(v)}`).join(" "));
    points.forEach((point, i) => setAttributes(point, { cx: xOf(i), cy: yOf(layers[i]), "aria-valuenow": layers[i], "aria-valuemin": Math.min(low, layers[i]), "aria-valuemax": Math.max(high, layers[i]), "aria-valuetext": show(layers[i], 4) }));
  }
  update();
  return Object.assign(picture, { update });
}

/** Exact numbers for a range of layers: one factor, or a gradient from the first layer's to the last one's. */
function rangeForm(write) {
  const field = (label, value, by) => {
    const id = freshId("range");
    const input = numberInput({ id, value, by });
    return [el("span", { class: "field" }, el("label", { for: id }, label), input), input];
  };
  const [first, from] = field("Layers", 0, 1);
  const [second, to] = field("to layer", N_LAYERS - 1, 1);
  const [third, start] = field("factor", 1, STEP);
  const [fourth, end] = field("to factor", 1, STEP);
  function set() {
    const values = [from, to, start, end].map((input) => parseNumber(input.value));
    const [a, b, x, y] = values;
    if (values.includes(null)) { say("a range needs two layers and two factors, all of them numbers"); return; }
    if (![a, b].every((n) => Number.isInteger(n) && n >= 0 && n < N_LAYERS)) { say(`layers are whole numbers from 0 to ${N_LAYERS - 1}`); return; }
    if (a === b && x !== y) { say("one layer has one factor: write it twice"); return; }
    const [low, high, atLow, atHigh] = a <= b ? [a, b, x, y] : [b, a, y, x];
    say("");
    write((layers) => { // as model/strengths.py interpolates, so that the YAML can say [first, last]
      for (let i = low; i <= high; i += 1) layers[i] = i === high ? atHigh : atLow + ((atHigh - atLow) * (i - low)) / (high - low);
    }, true);
  }
  return el("div", { class: "range-form" }, first, second, third, fourth, el("button", { type: "button", onclick: set }, "Set layers"));
}

/**
 * The tools of one step: whose numbers, the dials, the curve, the map to paint; what would come out; the YAML.
 *
 * live: of a step that a studio can compose, {studio, measuring, keeping}; else null.
 */
function composerSection(step, s, desk, owner, showStep, live = null) {
  const { details, inputs } = step;
  if (!step.composable || !details || !owner.raw) return null;
  let who = 0;
  const edit = (change, isFirst) => desk.edit(s, who, change, isFirst);
  const weights = () => desk.weights(s, who);
  const bench = el("div", { class: "bench" });
  const outcome = outcomeBox(step, s, desk, live);
  const yaml = yamlBox(step, s, desk, owner, live);
  const method = live ? methodFields(live.studio.about, desk, s, inputs.length) : null;
  const ratios = inputs.map((input, i) => dial({ label: `${i + 1}. ${clip(input.label)}`,
    read: () => desk.weights(s, i).ratio, write: (v, isFirst) => desk.edit(s, i, (w) => { w.ratio = v; }, isFirst) }));
  const names = Object.keys(facts.presets);
  let preset = names[0];
  const idea = el("p", { class: "hint" }, facts.presets[preset].idea);
  const back = (label, turn, can) => {
    const button = el("button", { type: "button", onclick: () => { if (can()) showStep(turn()); } }, label);
    return Object.assign(button, { update: () => button.setAttribute("aria-disabled", can() ? "false" : "true") }); // it keeps the focus
  };
  const backs = [back("Undo", desk.undo, desk.canUndo), back("Redo", desk.redo, desk.canRedo)];
  let parts = [];

  function drawBench() {
    parts = benchParts(step, who, weights, edit);
    bench.replaceChildren(el("p", {}, el("strong", {}, `LoRA ${who + 1}: `), foreign(inputs[who].label)), ...parts.layout);
  }

  drawBench();
  desk.listen(() => {
    live?.measuring.want(desk.setting(s));
    for (const part of [...parts.live, ...ratios, ...backs, ...(method ? [method] : []), outcome, yaml]) part.update();
  });
  backs.forEach((button) => button.update());
  if (live) {
    let wasOpen = null;
    const follow = () => {
      const isOpen = live.studio.isOpen();
      live.measuring.look();
      outcome.follow();
      if (isOpen !== wasOpen) { method.hidden = !isOpen; yaml.update(); }
      wasOpen = isOpen;
    };
    live.studio.listen("composer", follow);
    live.keeping.listen = yaml.update;
    live.measuring.want(desk.setting(s));
    follow();
  }
  const many = inputs.length > MANY_INPUTS;
  return section("Compose the next merge",
    el("p", { class: "hint" }, "Start from this step's weights. Strength of a module = ratio × component × depth, or ratio × what is painted there. ",
      "Numbers are typed, or moved with the up and down keys.",
      owner.place ? " AI-Toolkit's own MERGE button, above the files in Checkpoints, applies each strength twice: use the section below." : null),
    el("h3", {}, "Ratios"),
    el("div", { class: many ? "ratios tall" : "ratios", ...(many ? { tabindex: 0, role: "region", "aria-label": "ratios" } : {}) }, ratios),
    method,
    el("div", { class: "tools" },
      inputs.length > 1 ? select("Weigh the blocks of", inputs.map((input, i) => [i, `${i + 1}. ${clip(input.label)}`]), who, (value) => { who = Number(value); drawBench(); }) : null,
      select("Preset", names.map((name) => [name, name]), preset, (value) => { preset = value; idea.textContent = facts.presets[preset].idea; }),
      el("button", { type: "button", onclick: () => edit((w) => applyPreset(w, facts.presets[preset]), true) }, "Apply"),
      backs,
      el("button", { type: "button", onclick: () => desk.reset(s, [who]) }, "Reset this LoRA"),
      el("button", { type: "button", onclick: () => desk.resetAll(s) }, "Reset this step")),
    idea, live ? [outcome, bench] : [bench, outcome], yaml);
}

/** The tools for the blocks of one LoRA: what is shown, and what has to follow every change. */
function benchParts(step, who, weights, edit) {
  const present = (n) => step.details.energies[who][n] !== null;
  let tool = "paint";
  let isRecorded = false; // whether undo knows of the current stroke
  const brushId = freshId("brush");
  const brush = numberInput({ id: brushId, value: 0 });
  const dials = COMPONENTS.map((c, i) => dial({ label: c === "adaLN_modulation" ? "adaLN" : c,
    read: () => weights().components[i], write: (v, isFirst) => edit((w) => { w.components[i] = v; }, isFirst) }));
  const sections = ["noise_refiner", "context_refiner", "other"].filter((name) => MODULES.some((m, n) => m.section === name && present(n)))
    .map((name) => dial({ label: name, read: () => weights()[name], write: (v, isFirst) => edit((w) => { w[name] = v; }, isFirst) }));
  const depth = curve({ read: () => weights().layers, write: (change, isFirst) => edit((w) => change(w.layers), isFirst) });

  const tell = (n) => (present(n) ? `${placeName(n)}: strength ${show(strengthAt(weights(), n), 4)}${weights().overrides.has(n) ? ", painted" : ""}` : `${placeName(n)}: not in this LoRA`);

  function paint(n, kind) {
    if (kind !== "drag") isRecorded = false;
    if (!present(n)) return;
    const isErased = kind === "clear" || tool === "erase";
    const factor = parseNumber(brush.value);
    if (!isErased && factor === null) { say("the factor to paint with is not a number"); return; }
    if (isErased ? !weights().overrides.has(n) : weights().overrides.get(n) === factor) return;
    edit((w) => { if (isErased) w.overrides.delete(n); else w.overrides.set(n, factor); }, !isRecorded);
    isRecorded = true;
    say(tell(n));
  }

  const map = heatMap({
    label: `strengths of LoRA ${who + 1}, paintable`, value: (n) => (present(n) ? strengthAt(weights(), n) : null),
    shade: shadeStrength(FULL_COLOUR), mark: (n) => weights().overrides.has(n), tell, onpick: paint,
  });
  return {
    live: [...dials, ...sections, depth, map],
    layout: [
      el("div", { class: "columns" },
        el("div", {}, el("h4", {}, "Components"), dials),
        el("div", {}, el("h4", {}, "Depth"), el("p", { class: "hint" }, "Draw with the pointer, or set a range."), depth,
          rangeForm((change, isFirst) => edit((w) => change(w.layers), isFirst)), sections)),
      el("h4", {}, "Single cells"),
      el("p", { class: "hint" }, "Click or drag to paint; with the keyboard Enter paints, Delete erases. A painted factor stands in the place of component and depth."),
      el("div", { class: "tools" }, choice("Tool", [["paint", "paint"], ["erase", "erase"]], tool, (value) => { tool = value; }),
        el("span", { class: "field" }, el("label", { for: brushId }, "with the factor"), brush)),
      strengthLegend(FULL_COLOUR, FULL_COLOUR + 1, true), map],
  };
}

/** What the weights would make: energy beside that of the start, each LoRA's share, and where it lies. */
function outcomeBox(step, s, desk, live) {
  const { details, inputs } = step;
  const before = predict(details, desk.initial(s));
  let now = before;
  let most = 0;
  let later = null;
  const line = el("p", { class: "energy" });
  const bars = el("ul", { class: "bars" });
  const share = (n) => (now.together[n] === null ? null : now.total > 0 ? now.together[n] / now.total : 0);
  const tell = (n) => (now.together[n] === null ? `${placeName(n)}: nothing` : `${placeName(n)}: ${percent(share(n))} of the energy, ` +
    (before.together[n] > 0 ? `${show(now.together[n] / before.together[n])} times that of the start` : `norm ${show(Math.sqrt(now.together[n]))}`));
  const predicted = { share, tell, label: "predicted energy of the result" };
  let drawn = predicted; // what the map shows: this, or what was measured
  const map = heatMap({ label: drawn.label, value: (n) => drawn.share(n), shade: (v) => shadeEnergy(drawn.most ?? most)(v), tell: (n) => drawn.tell(n) });
  const [source, measured] = [el("p", { class: "source", role: "status" }), el("div", { class: "measured" })];
  let found = null; // what was measured last
  let answer = null; // of the studio, that is shown
  const isLive = () => live !== null && live.studio.isOpen();
  const caveats = () => [isLive() || step.method === "sum" ? "" : `This is a plain sum; ${step.method} will differ.`, step.cut ? "What the rank of this step cuts away is still in it." : "",
    details.unpaired ? `How the ${details.unpaired} weaker LoRAs overlap is not counted.` : ""].filter(Boolean).join(" ");

  function sentence() {
    const apart = sum(now.alone.map((energies) => sum(energies.map((e) => e ?? 0))));
    if (!Number.isFinite(apart)) return "These strengths are too large for a number.";
    if (!(apart > 0)) return "Nothing is left.";
    if (now.total < NEARLY_NOTHING * apart) return "The LoRAs cancel nearly everywhere: what is left is too little to be predicted here.";
    const change = now.total / before.total - 1;
    const size = !(before.total > 0) ? `Energy ${show(now.total)}.` : now.total === before.total ? "Energy as at the start." :
      Math.abs(change) < 0.1 ? `Energy: ${percent(Math.abs(change))} ${change > 0 ? "more" : "less"} than at the start.` :
        `Energy: ${show(now.total / before.total)} times that of the start (norm ${show(Math.sqrt(now.total / before.total))} times).`;
    const gain = now.total / apart - 1;
    const overlap = Math.abs(gain) < 0.005 || details.unpaired ? "" : ` Where the LoRAs overlap it ${gain > 0 ? "gains" : "loses"} ${percent(Math.abs(gain))}.`;
    return `${size}${overlap}`;
  }

  function update() {
    now = predict(details, desk.all(s));
    const energies = now.alone.map((own) => sum(own.map((e) => e ?? 0)));
    const apart = sum(energies);
    most = now.total > 0 ? Math.max(...now.together.map((e) => e ?? 0)) / now.total : 0;
    clearTimeout(later);
    if (line.isConnected && !isLive()) later = setTimeout(() => say(sentence()), 800); // screen readers hear the last of a row of changes
    bars.replaceChildren(...inputs.map((input, i) => el("li", {}, el("span", { class: "bar-name" }, foreign(input.label, 40)),
      el("span", { class: "bar" }, el("i", { "--at": apart > 0 ? energies[i] / apart : 0 })), el("span", { class: "number" }, apart > 0 ? percent(energies[i] / apart) : "–"))));
    draw(answerNow());
  }

  const answerNow = () => live?.measuring.of(desk.setting(s)) ?? NOTHING_MEASURED;

  /** What is measured in the place of what is predicted, as far as a studio has come with it. */
  function draw(told) {
    const { isPending, error } = told;
    answer = told;
    if (!isPending && told.found !== found) {
      found = told.found;
      measured.replaceChildren(...(found ? measuredList(found, inputs).filter(Boolean) : []));
    }
    drawn = found ? measuredMap(found) : predicted;
    source.hidden = !isLive();
    const words = error ? `This can't be merged: ${error}` : isPending ? (found ? "Computing… These are the numbers before the last change." :
      "Computing… Until then this is the prediction of a plain sum.") : found ? `Measured: ${desk.how(s).method}, as the file would be.` : "";
    if (words !== source.textContent) source.textContent = words; // screen readers hear what is new
    source.classList.toggle("warn", error !== null);
    line.hidden = found !== null;
    line.textContent = `${isLive() ? "A plain sum, predicted: " : ""}${sentence()} ${caveats()}`;
    box.classList.toggle("stale", isPending && found !== null);
    map.rename(drawn.label);
    map.update();
  }

  const box = el("div", { class: "outcome" }, el("h4", {}, "What would come out"), source, measured, line,
    live ? el("p", { class: "hint" }, "The energy of each LoRA as it goes in, and where that of the result is:") : null, bars, map);
  update();
  return Object.assign(box, { update, follow: () => { if (answerNow() !== answer) draw(answerNow()); } });
}

const NEARLY_NOTHING = 1e-3; // of the energy: the energies on this page have five digits, the cosines seven

/** A preset's factors in the place of the LoRA's own; the ratio stays. */
function applyPreset(w, preset) {
  const { idea, ...factors } = preset;
  Object.assign(w, copyWeights({ ...factors, overrides: new Map(factors.overrides), ratio: w.ratio }));
}

/** The section, or a job of it alone, as text to copy, and what `check` would say of it. */
function yamlBox(step, s, desk, owner, live) {
  const labels = {
    section: owner.place ? `The section, ${owner.place} of the job: paste it there, or save it as a file for run` : "The section: paste it under process: of a job, or save it as a file for run",
    job: "A job that only merges: save it as a .yaml file; in AI-Toolkit's UI New Job, Show Advanced, Import Config",
  };
  const warnings = el("ul", { class: "notes warn", "aria-label": "what check would say" });
  let form = "section";
  const forms = choice("As", [["section", "the section"], ["job", "a whole job"]], form, (chosen) => { form = chosen; update(); });
  const box = copyBox(labels[form], {}, forms, warnings);
  function update() {
    const added = live?.studio.isOpen() ? { s, name: live.keeping.name() } : null;
    const { yaml, unknown } = form === "job" ? desk.job(added) : { yaml: desk.yaml(added), unknown: [] };
    box.caption.textContent = labels[form];
    box.write(yaml);
    const judged = desk.how(s).method === step.method ? step : { ...step, rule: null }; // what another method asks for the studio says
    const told = [...troubles(judged, desk.all(s), desk.yaml(added)), ...unknown.map((file) => `this page does not know where ${file} is: write its whole path`)];
    warnings.replaceChildren(...told.map((text) => el("li", {}, el("bdi", {}, text))));
  }
  update();
  return Object.assign(el("div", { class: "yaml" }, box), { update });
}
