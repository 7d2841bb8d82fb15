// Each step at a glance: what went in, how strong, what came out, is it right.

function glanceSection(steps) {
  const cards = steps.map(({ step }, k) => {
    const title = el("h3", {}, foreign(step.name), step.file === null && step.judgement !== undefined ? " (for later steps only)" : "");
    const body = step.inputs.length ? [verdictLine(step), outputLine(step), inputsTable(step), notes(step)]
      : el("p", {}, "Not merged in this run: only its pictures are here.");
    return k < OPEN_CARDS ? el("article", { class: "card" }, title, body)
      : el("details", { class: "card" }, el("summary", {}, foreign(step.name)), body);
  });
  return section(steps.length === 1 ? "At a glance" : `${steps.length} steps at a glance`, cards);
}

const OPEN_CARDS = 6;

/** Whether it is right, first of all. */
function verdictLine(step) {
  if (!step.status) return null;
  return verdictOf(step.status, step.judgement, step.kept === null ? "" : ` ${percent(step.kept)} of the energy is kept.`);
}

function verdictOf(status, judgement, more = "") {
  const why = judgement.startsWith(status) ? judgement.slice(status.length) : `: ${judgement}`;
  return el("p", {}, el("strong", { class: `verdict ${status === "right" ? "good" : "warn"}` }, `${status[0].toUpperCase()}${status.slice(1)}`),
    el("bdi", {}, why), ".", more);
}

function outputLine(step) {
  if (step.bytes === undefined) return null;
  const what = [`${step.modules} modules`, `rank ${step.rank}`, step.dtype, `method ${step.method}`, ...Object.entries(step.params).map(([k, v]) => `${k} ${v}`),
    step.format === "ai-toolkit" ? null : `format ${step.format}`, sizeText(step.bytes), step.made ? null : "made before by the same recipe"].filter(Boolean);
  return el("dl", {},
    step.file === null ? null : [el("dt", {}, "written"), el("dd", {}, foreign(step.file, 200))],
    step.copy === null ? null : [el("dt", {}, "copy"), el("dd", {}, foreign(step.copy, 200))],
    el("dt", {}, "holds"), el("dd", {}, what.join(", ")),
    step.triggers.length ? [el("dt", {}, "trigger words"), el("dd", {}, step.triggers.map((t, i) => [i ? ", " : "", foreign(t, 300)]))] : null);
}

function inputsTable(step) {
  const asked = step.inputs.some((i) => i.asked !== null && i.asked !== undefined);
  const got = asked && step.linear;
  const head = ["", "LoRA", "ratio", ...(asked ? [step.linear ? "asked" : "holds about"] : []), ...(got ? ["got"] : []), "what it is", "trigger words"];
  const lines = step.inputs.map((input, i) => el("tr", {},
    el("td", { class: "number" }, String(i + 1)),
    el("th", { scope: "row" }, foreign(input.label), input.preset ? [" ", el("small", {}, "preset ", input.preset)] : null),
    el("td", { class: "number" }, show(input.ratio, 4)),
    asked ? el("td", { class: "number" }, show(input.asked)) : null,
    got ? el("td", { class: "number" }, show(input.got)) : null,
    el("td", {}, `${input.modules} modules, ${input.what}`),
    el("td", {}, input.triggers.map((t, k) => [k ? ", " : "", foreign(t, 60)]))));
  const table = el("table", { class: "inputs" }, el("thead", {}, el("tr", {}, head.map((text) => text ? el("th", { scope: "col" }, text) : el("td")))), el("tbody", {}, lines));
  const many = step.inputs.length > MANY_INPUTS;
  const hidden = step.left_out.includes("inputs") ? el("p", {}, "More LoRAs than this page has room for; these are the first.") : null;
  return [el("div", { class: many ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": `what went into ${step.name}` }, table), hidden];
}

const MANY_INPUTS = 12;

function notes(step) {
  return step.notes.length ? el("ul", { class: "notes", "aria-label": "notes" }, step.notes.map((note) => el("li", {}, el("bdi", {}, note)))) : null;
}
