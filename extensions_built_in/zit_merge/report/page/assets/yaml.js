// The section as YAML 1.1, as AI-Toolkit and `check` read it.

const WORDS = /^(true|false|yes|no|on|off|null|y|n|~)$/i;
const PLAIN = /^[A-Za-z_][A-Za-z0-9_.@/+-]*$/;
// Control characters, line separators, marks that turn the direction, halves of pairs.
const ESCAPED = /[\x00-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function yamlText(text) {
  if (PLAIN.test(text) && !WORDS.test(text)) return text;
  const inner = text.replace(/["\\]/g, "\\$&").replace(ESCAPED, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  return `"${inner.replaceAll("${", "\\x24{")}"`; // AI-Toolkit puts environment variables into the text before it is YAML
}

function yamlKey(key) {
  return /^(0|[1-9]\d*)(-\d+)?(\.[A-Za-z_]\w*)?$/.test(key) ? key : yamlText(key);
}

function yamlScalar(value) {
  if (value === null) return "null";
  if (typeof value === "string") return yamlText(value);
  return String(value).replace(/^(-?\d+)e/, "$1.0e"); // 1e-7 without a dot is text in YAML 1.1
}

function isScalar(value) {
  return value === null || typeof value !== "object";
}

/** A value on one line: `{0-9: 0.5, 10-29: [1, 0.6]}`. */
function yamlFlow(value) {
  if (isScalar(value)) return yamlScalar(value);
  if (Array.isArray(value)) return `[${value.map(yamlFlow).join(", ")}]`;
  return `{${Object.entries(value).map(([key, v]) => `${yamlKey(key)}: ${yamlFlow(v)}`).join(", ")}}`;
}

function depthOf(value) {
  return isScalar(value) ? 0 : 1 + Math.max(0, ...Object.values(value).map(depthOf));
}

/** Lines of a value that stands below its key. */
function yamlBlock(value, indent) {
  const pad = " ".repeat(indent);
  if (Array.isArray(value)) {
    return value.flatMap((entry) => {
      if (isScalar(entry) || isShort(entry, indent)) return [`${pad}- ${yamlFlow(entry)}`];
      const lines = yamlBlock(entry, indent + 2);
      return [`${pad}- ${lines[0].slice(indent + 2)}`, ...lines.slice(1)];
    });
  }
  return Object.entries(value).flatMap(([key, v]) => {
    const head = `${pad}${yamlKey(key)}:`;
    return isScalar(v) || isShort(v, head.length) ? [`${head} ${yamlFlow(v)}`] : [head, ...yamlBlock(v, indent + 2)];
  });
}

/** Whether it reads well on one line: tables of numbers, short settings, empty things. */
function isShort(value, indent) {
  const most = 96 - indent;
  return Object.keys(value).length === 0 || (depthOf(value) <= 2 && yamlFlow(value).length <= most && !("lora" in value && "overrides" in value));
}

/** A section as an item of `process`, indented as in AI-Toolkit's own configs. */
function yamlSection(section) {
  const lines = yamlBlock(section, 6);
  return [`    - ${lines[0].slice(6)}`, ...lines.slice(1)].join("\n") + "\n";
}

/** The strength keys that spell weights, without what is 1 anyway. */
function keysOf(w) {
  const keys = { ratio: w.ratio };
  const blocks = Object.fromEntries(COMPONENTS.map((c, i) => [c, w.components[i]]).filter(([, f]) => f !== 1));
  const sections = Object.fromEntries(["noise_refiner", "context_refiner", "other"].map((s) => [s, w[s]]).filter(([, f]) => f !== 1));
  const layers = { ...layerKeys(w.layers), ...sections };
  const overrides = overrideKeys(w.overrides);
  if (Object.keys(blocks).length) keys.blocks = blocks;
  if (Object.keys(layers).length) keys.layers = layers;
  if (Object.keys(overrides).length) keys.overrides = overrides;
  return keys;
}

const MANY_RANGES = 10; // beyond that the 30 numbers themselves are easier to read

/** 30 factors as ranges: a number for equal neighbours, [first, last] where they lie on a line, else a list. */
function layerKeys(factors) {
  const keys = {};
  let start = 0;
  while (start < factors.length) {
    let end = runEnd(factors, start, (a) => a === factors[start]);
    const line = end === start ? lineEnd(factors, start) : start;
    if (line > start) {
      end = line;
      keys[rangeKey(start, end)] = [factors[start], factors[end]];
    } else if (factors[start] !== 1) {
      keys[rangeKey(start, end)] = factors[start];
    }
    start = end + 1;
  }
  return Object.keys(keys).length > MANY_RANGES ? { [rangeKey(0, N_LAYERS - 1)]: factors } : keys;
}

function runEnd(values, start, belongs) {
  let end = start;
  while (end + 1 < values.length && belongs(values[end + 1])) end += 1;
  return end;
}

function rangeKey(first, last) {
  return first === last ? String(first) : `${first}-${last}`;
}

/** Where the longest gradient from here ends; `start` itself if it is under three layers long. */
function lineEnd(factors, start) {
  for (let end = factors.length - 1; end >= start + 2; end -= 1) if (isLine(factors, start, end)) return end;
  return start;
}

/** Whether [first, last] over the range gives exactly these numbers, as model/strengths.py interpolates. */
function isLine(factors, start, end) {
  const [first, last, count] = [factors[start], factors[end], end - start + 1];
  return factors.slice(start, end).every((f, i) => f === first + ((last - first) * i) / (count - 1));
}

/** Overrides by module as LAYERS.COMPONENT, neighbouring layers of one number together. */
function overrideKeys(overrides) {
  const keys = {};
  for (const component of COMPONENTS) {
    const at = Array.from({ length: N_LAYERS }, (_, index) => overrides.get(AT.get(`layers.${index}.${component}`)));
    for (let start = 0; start < N_LAYERS; start += 1) {
      if (at[start] === undefined) continue;
      const end = runEnd(at, start, (f) => f === at[start]);
      keys[`${rangeKey(start, end)}.${component}`] = at[start];
      start = end;
    }
  }
  for (const [n, factor] of overrides) {
    const m = MODULES[n];
    if (m.section === "other") keys[`other.${m.component}`] = factor;
    else if (m.section !== "layers") keys[`${m.section}.${m.index}.${m.component}`] = factor;
  }
  return keys;
}

/** The weights that strength keys spell: what `keysOf` wrote, read again. */
function weightsFrom(keys) {
  const w = { ratio: keys.ratio, components: COMPONENTS.map((c) => keys.blocks?.[c] ?? 1), layers: Array(N_LAYERS).fill(1), overrides: new Map() };
  for (const name of ["noise_refiner", "context_refiner", "other"]) w[name] = keys.layers?.[name] ?? 1;
  for (const [key, factor] of Object.entries(keys.layers ?? {})) {
    const [first, last] = rangeOf(key);
    for (let i = first; i <= last; i += 1) w.layers[i] = factorIn(factor, i - first, last - first + 1);
  }
  for (const [key, factor] of Object.entries(keys.overrides ?? {})) {
    const [, place, component] = /^([^.]+)\.(.+)$/.exec(key);
    const [first, last] = rangeOf(place);
    for (let i = first; i <= last; i += 1) w.overrides.set(AT.get(`layers.${i}.${component}`), factor);
    if (first > last) w.overrides.set(MODULES.findIndex((m) => key === (m.section === "other" ? `other.${m.component}` : `${m.section}.${m.index}.${m.component}`)), factor);
  }
  return w;
}

/** First and last layer of a key such as `3` or `0-9`; of any other key an empty range. */
function rangeOf(key) {
  const [, first, last] = /^(\d+)(?:-(\d+))?$/.exec(key) ?? [null, 1, 0];
  return [Number(first), Number(last ?? first)];
}

/** The factor of the k-th of `count` layers: of a number, of a list with one for each, or of a gradient [first, last]. */
function factorIn(factor, k, count) {
  if (!Array.isArray(factor)) return factor;
  const [first, last] = factor;
  if (factor.length === count) return factor[k];
  return k === count - 1 ? last : first + ((last - first) * k) / (count - 1);
}
