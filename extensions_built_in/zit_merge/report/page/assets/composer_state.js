// What people compose: the setting of every step of a section (weights, method, rank), with undo, and the YAML that spells it.

const REMEMBERED = 200; // edits that can be taken back
// What a step that is composed in a studio does not take over from the one that it starts from.
const OF_ONE_STEP = ["name", "preview", "sweep", "ablate", "bake", "copy_to", "keep", "file"];

/**
 * The desk of a section. Weights that nobody touched keep the keys that they were written with.
 *
 * A setting is {loras: [{weights, touched}], method, params, rank}. It is never changed in place: an edit makes a new one, which shares
 * what did not change, so that the history holds whole settings.
 */
function makeDesk(owner) {
  const raws = owner.steps.map((step) => owner.raw.steps?.find((raw) => raw.name === step.name)
    ?? { name: step.name, loras: step.inputs.map(({ path, ratio }) => ({ lora: path, ratio })) });
  const first = owner.steps.map((step, s) => ({
    loras: step.inputs.map((input) => ({ weights: input.weights ? weightsOf(input) : null, touched: false })), ...methodOf(owner.raw, raws[s]),
  }));
  const now = [...first];
  const past = [];
  const future = [];
  let listener = () => {};

  function remember(stack, s) {
    stack.push({ s, setting: now[s] });
    if (stack.length > REMEMBERED) stack.shift();
  }

  /** Takes one edit back, onto the other stack. Returns its step. */
  function turn(from, onto) {
    const entry = from.pop();
    if (!entry) return null;
    remember(onto, entry.s);
    now[entry.s] = entry.setting;
    listener();
    return entry.s;
  }

  /** A step gets another setting; `isFirst` begins an edit that undo takes back whole. */
  function put(s, setting, isFirst = true) {
    if (isFirst) remember(past, s);
    future.length = 0;
    now[s] = setting;
    listener();
  }

  const replaced = (s, numbers, lora) => now[s].loras.map((old, i) => (numbers.includes(i) ? lora(i) : old));

  return {
    /** Who is told of every change: the composer that is shown. */
    listen: (listens) => { listener = listens; },
    weights: (s, i) => now[s].loras[i].weights,
    all: (s) => now[s].loras.map((lora) => lora.weights),
    initial: (s) => first[s].loras.map((lora) => lora.weights),
    /** Changes a LoRA's weights. */
    edit(s, i, change, isFirst = true) {
      const weights = copyWeights(now[s].loras[i].weights);
      change(weights);
      put(s, { ...now[s], loras: replaced(s, [i], () => ({ weights, touched: true })) }, isFirst);
    },
    /** {method, params, rank} of a step. */
    how: (s) => now[s],
    /** Changes some of them. */
    change: (s, changes) => put(s, { ...now[s], ...changes }),
    /** The setting as the studio takes it: null for a LoRA that is as in the section. */
    setting(s) {
      const { loras, method, params, rank } = now[s];
      return { step: owner.steps[s].name, loras: loras.map((lora) => (lora.touched ? keysOf(lora.weights) : null)), method, params, rank };
    },
    /** The setting of a look becomes that of its step; an edit as any other. */
    adopt(s, { loras, method, params, rank }) {
      put(s, { method, params, rank, loras: loras.map((keys, i) => (keys ? { weights: weightsFrom(keys), touched: true } : first[s].loras[i])) });
    },
    names: () => (owner.raw.steps ?? []).map((raw) => raw.name),
    reset: (s, numbers) => put(s, { ...now[s], loras: replaced(s, numbers, (i) => first[s].loras[i]) }),
    resetAll: (s) => put(s, first[s]),
    undo: () => turn(past, future),
    redo: () => turn(future, past),
    canUndo: () => past.length > 0,
    canRedo: () => future.length > 0,
    /** The section as YAML; with `added`, {s, name}, as it was, and the setting of a step as a further step of that name. */
    yaml: (added = null) => yamlSection({ ...owner.raw, steps: stepsWith(added) }),
    /** The section as a job of its own, as YAML, and what its files could not be named by. */
    job(added = null) {
      const { steps, unknown } = standingAlone(stepsWith(added), owner);
      const [host] = owner.alone.config.process;
      const { train_fixes, ...section } = owner.raw; // of the training
      if (!owner.place) delete section.output_dir; // of the command line: the UI shows what is in the job's own folder
      const config = { ...owner.alone.config, process: [{ ...host, ...section, steps }] };
      return { yaml: yamlBlock({ ...owner.alone, config }, 0).join("\n") + "\n", unknown };
    },
  };

  function stepsWith(added) {
    if (!added) return owner.raw.steps.map((raw) => composed(raw, owner.steps.findIndex((shown) => shown.name === raw.name)));
    const kept = Object.entries(composed(raws[added.s], added.s)).filter(([key]) => !OF_ONE_STEP.includes(key));
    return [...(facts.studio.is_made === false ? [] : owner.raw.steps), { name: added.name, ...Object.fromEntries(kept) }];
  }

  /** A step of the config with its setting as it is now. */
  function composed(raw, s) {
    if (!raw.loras || s < 0 || !owner.steps[s].composable) return raw;
    const { loras, ...how } = now[s];
    return { ...raw, ...methodKeys(owner.raw, raw, how, first[s]),
      loras: raw.loras.map((lora, i) => (loras[i].touched ? { ...withoutStrengths(lora), ...keysOf(loras[i].weights) } : lora)) };
  }
}

/** Method, parameters and rank of a step as config/parse.py lets it inherit them from its section. */
function methodOf(section, raw) {
  const method = raw.method ?? section.method ?? "sum";
  const params = raw.params ?? (method === (section.method ?? "sum") ? section.params : null) ?? {};
  return { method, params, rank: raw.rank ?? section.rank ?? "exact" };
}

const isSame = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** The keys that give a step the method, parameters and rank of `how`, where they are not those that it has. */
function methodKeys(section, raw, how, had) {
  const keys = {};
  if (how.method !== had.method) keys.method = how.method;
  if ((keys.method || !isSame(how.params, had.params)) && (Object.keys(how.params).length || raw.params || section.params)) keys.params = how.params;
  if (!isSame(how.rank, had.rank)) keys.rank = how.rank;
  return keys;
}

/**
 * Steps for a job without the training: files by their paths in the place of `trained` and of relative ones. A step that averages
 * checkpoints stays where it is; its file, if it was kept, goes into the steps that use it.
 */
function standingAlone(steps, owner) {
  const shown = new Map(owner.steps.map((step) => [step.name, step]));
  const paths = new Map();
  for (const step of steps) {
    (step.loras ?? []).forEach((lora, i) => { const path = shown.get(step.name)?.inputs[i]?.path; if (path) paths.set(lora.lora, path); });
    if (step.checkpoints) paths.set(step.name, shown.get(step.name)?.path);
  }
  const kept = steps.filter((step) => step.loras);
  const names = new Set(kept.map((step) => step.name));
  const unknown = new Set();
  const isWhole = (path) => /^([/~\\]|[A-Za-z]:)/.test(path);
  function path(source) {
    if (names.has(source) || source.startsWith("hf:")) return source;
    const known = paths.get(source) ?? source;
    if (!isWhole(known)) unknown.add(known);
    return known;
  }
  const named = [...kept.flatMap((step) => step.loras.map((lora) => lora.preset)), ...[owner.raw, ...kept].map((part) => part.preview?.prompts)];
  for (const file of named) if (typeof file === "string" && file.includes(".") && !isWhole(file)) unknown.add(file);
  return { steps: kept.map((step) => ({ ...step, loras: step.loras.map((lora) => ({ ...lora, lora: path(lora.lora) })) })), unknown: [...unknown] };
}

function withoutStrengths(lora) {
  const { ratio, preset, blocks, layers, effects, overrides, ...rest } = lora;
  return rest;
}

/** Sentences on what `check` would refuse, or the merge would not take as it is shown. */
function troubles(step, all, yaml) {
  const ratios = all.map((w) => w.ratio);
  const found = step.inputs.flatMap((input, i) => (input.questions ?? []).map((question) => `LoRA ${i + 1}: ${question}`));
  if (step.rule === "spherical" && ratios.some((r) => r < 0)) found.push(`${step.method} goes between directions: no ratio may be below 0`);
  if (step.rule && Math.abs(sum(ratios)) <= 1e-12 * sum(ratios.map(Math.abs))) found.push(`${step.method} divides by the sum of the ratios, which is 0`);
  if (all.some((w) => MODULES.some((_, n) => !Number.isFinite(strengthAt(w, n))))) found.push("a strength is too large for a number");
  if (yaml.includes("[name]")) found.push("AI-Toolkit puts the job's name in the place of [name]: rename the file");
  return found;
}
