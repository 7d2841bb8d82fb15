// Facts, elements, numbers.

const facts = JSON.parse(document.getElementById("facts").textContent);

const MODULES = facts.modules.map(([name, section, index, component]) => ({ name, section, index, component }));
const COMPONENTS = facts.components;
const N_LAYERS = facts.blocks.layers;
const ROWS = COMPONENTS;
// The columns of a heat map: the layers, then the refiners.
const COLUMNS = Object.entries({ layers: N_LAYERS, noise_refiner: facts.blocks.noise_refiner, context_refiner: facts.blocks.context_refiner })
  .flatMap(([section, count]) => Array.from({ length: count }, (_, index) => ({ section, index })));
const AT = new Map(MODULES.map((m, n) => [`${m.section}.${m.index}.${m.component}`, n]));
const OTHER = MODULES.map((m, n) => n).filter((n) => MODULES[n].section === "other");

/** Number of the module at a place of the map; undefined where Z-Image has none. */
function moduleAt(column, component) {
  return AT.get(`${column.section}.${column.index}.${component}`);
}

/** `layer 12, to_q`, as people call a module. */
function placeName(n) {
  const m = MODULES[n];
  if (m.section === "layers") return `layer ${m.index}, ${m.component}`;
  return m.section === "other" ? m.component : `${m.section} ${m.index}, ${m.component}`;
}

/** An element; texts become text nodes, never HTML. `on...` are listeners, `--...` style properties, null and false attributes are left out. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  setAttributes(node, attributes);
  node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAttributes(node, attributes);
  node.append(...children.flat(Infinity));
  return node;
}

function setAttributes(node, attributes) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("--")) node.style.setProperty(key, value); // a style attribute would be refused by the page's own policy
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
}

/** A text of a file or a config, kept apart from the direction of what stands around it; file names run from left to right. */
function foreign(text, most = 80) {
  const shown = text.length > most ? `${text.slice(0, most - 25)}…${text.slice(-22)}` : text;
  return el("bdi", { title: shown === text ? null : text, dir: /[\\/]|\.safetensors$/.test(text) ? "ltr" : null }, shown);
}

/** A number in at most `digits` digits, with a real minus. */
function show(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(digits - 1) : String(Number(value.toPrecision(digits)));
  return text.replace("-", "−");
}

/** A share as a percentage: never 0 or 100 % unless it is. */
function percent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && share < 1e-4) return "under 0.01 %";
  if (share < 1 && share >= 0.9995) return "99.9 %";
  return `${show(100 * share)} %`;
}

/** Bytes as the texts of the command line have them (wording.size_text). */
function sizeText(bytes) {
  return bytes >= 999.95e6 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

const isFramed = () => window.parent !== window;

function sum(values) {
  return values.reduce((a, b) => a + b, 0);
}

/** One place where the page says what happened, for eyes and for screen readers. */
const notice = el("p", { class: "notice", role: "status" });

function say(text) {
  notice.textContent = text;
}

/**
 * A text to select, with a button that copies it where the browser lets it; `write(text)` puts it there.
 *
 * tag: of its label, `caption`. tell(sentence): says what came of copying. between: what stands between the label and the text.
 */
function copyBox(label, { tag = "h3", tell = say }, ...between) {
  const id = freshId("text");
  const area = el("textarea", { id, readonly: true, spellcheck: "false" });
  const printed = el("pre", { class: "printed", "aria-hidden": "true" });
  async function copy() {
    area.focus();
    area.select();
    let isDone = false;
    try {
      await navigator.clipboard.writeText(area.value);
      isDone = true;
    } catch { // a sandboxed frame may not; the older way asks nobody
      isDone = document.execCommand("copy");
    }
    tell(isDone ? "Copied." : "Selected: press Ctrl+C.");
  }
  function write(text) {
    if (text === area.value) return; // what is selected stays so
    area.value = text;
    printed.textContent = text;
    area.rows = Math.min(Math.max(text.split("\n").length, 6), 40);
  }
  const caption = el("label", { for: id }, label);
  return Object.assign(el("div", { class: "copy-box" }, el(tag, {}, caption), between, area, printed,
    el("p", { class: "tools" }, el("button", { type: "button", class: "main", onclick: copy }, "Copy"))), { write, caption });
}

/** The number that somebody typed: 0.35, 0,35, -1, 1e-3; null where it is none. */
function parseNumber(text) {
  const plain = text.trim().replace("−", "-");
  const dotted = plain.includes(".") ? plain : plain.replace(",", ".");
  const value = Number(dotted);
  return /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(dotted) && Number.isFinite(value) ? value : null;
}

/**
 * A field for a number, moved with the up and down keys too. `write` gets what was typed, once it is a number.
 *
 * check(number): why it can't be, as the end of a sentence; empty if it can. isOptional: an empty field is null.
 */
function numberInput({ id, value = "", write = () => {}, by = STEP, check = () => "", isOptional = false }) {
  const field = el("input", { type: "text", inputmode: "decimal", autocomplete: "off", id, class: "number-field", value,
    onchange: settle, onkeydown: (e) => {
      const sign = { ArrowUp: 1, ArrowDown: -1 }[e.key];
      const now = parseNumber(field.value);
      if (e.key === "Enter") settle();
      if (!sign || now === null) return;
      field.value = Number((now + sign * by).toFixed(10));
      settle();
      e.preventDefault();
    } });
  function settle() {
    const isEmpty = field.value.trim() === "";
    const typed = parseNumber(field.value);
    const wrong = isEmpty && isOptional ? "" : typed === null ? "is not a number: write 0.35, -1 or 1e-3" : check(typed);
    if (wrong) {
      field.setAttribute("aria-invalid", "true");
      say(`${isEmpty ? "an empty field" : `"${field.value}"`} ${wrong}`);
      return;
    }
    field.removeAttribute("aria-invalid");
    say("");
    write(typed);
  }
  /** Shows a value that came from elsewhere. */
  field.show = (shown) => {
    if (parseNumber(field.value) !== shown || field.getAttribute("aria-invalid")) field.value = shown ?? "";
    field.removeAttribute("aria-invalid");
  };
  return field;
}

const STEP = 0.05; // of what is drawn or moved with keys

let ids = 0;
function freshId(prefix) {
  ids += 1;
  return `${prefix}-${ids}`;
}

/** Radio buttons as one row of choices. `choices`: [value, text]. */
function choice(legend, choices, chosen, onchoose) {
  const name = freshId("choice");
  return el("fieldset", { class: "choice" }, el("legend", {}, legend), choices.map(([value, text]) => el("label", {},
    el("input", { type: "radio", name, value, checked: value === chosen, onchange: () => onchoose(value) }), text)));
}

function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

/** A select with a label. `choices`: [value, text]. */
function select(label, choices, chosen, onchoose) {
  const id = freshId("select");
  return el("span", { class: "field" }, el("label", { for: id }, label), el("select", { id, onchange: (e) => onchoose(e.target.value) },
    choices.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text))));
}
