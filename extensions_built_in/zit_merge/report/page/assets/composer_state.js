// What people compose: the weights of every step of a section, with undo, and the YAML that spells them.

const REMEMBERED = 200; // edits that can be taken back

/** The desk of a section. Weights that nobody touched keep the keys that they were written with. */
function makeDesk(owner) {
  const copy = ({ weights, touched }) => ({ weights: copyWeights(weights), touched });
  const first = owner.steps.map((step) => step.inputs.map((input) => ({ weights: input.weights ? weightsOf(input) : null, touched: false })));
  const now = owner.steps.map((_, s) => first[s].map((lora) => (lora.weights ? copy(lora) : lora)));
  const past = [];
  const future = [];
  let listener = () => {};

  /** Remembers some LoRAs of a step as they are. */
  function remember(stack, s, numbers) {
    stack.push({ s, loras: numbers.map((i) => [i, copy(now[s][i])]) });
    if (stack.length > REMEMBERED) stack.shift();
  }

  /** Takes one edit back, onto the other stack. Returns its step. */
  function turn(from, onto) {
    const entry = from.pop();
    if (!entry) return null;
    remember(onto, entry.s, entry.loras.map(([i]) => i));
    for (const [i, lora] of entry.loras) now[entry.s][i] = lora;
    listener();
    return entry.s;
  }

  return {
    /** Who is told of every change: the composer that is shown. */
    listen: (listens) => { listener = listens; },
    weights: (s, i) => now[s][i].weights,
    all: (s) => now[s].map((lora) => lora.weights),
    initial: (s) => first[s].map((lora) => lora.weights),
    /** Changes a LoRA's weights; `isFirst` begins an edit that undo takes back whole. */
    edit(s, i, change, isFirst = true) {
      if (isFirst) remember(past, s, [i]);
      future.length = 0;
      change(now[s][i].weights);
      now[s][i].touched = true;
      listener();
    },
    reset(s, numbers) {
      remember(past, s, numbers);
      future.length = 0;
      for (const i of numbers) now[s][i] = copy(first[s][i]);
      listener();
    },
    undo: () => turn(past, future),
    redo: () => turn(future, past),
    canUndo: () => past.length > 0,
    canRedo: () => future.length > 0,
    yaml: () => yamlSection({ ...owner.raw, steps: composed() }),
    /** The section as a job of its own, as YAML, and what its files could not be named by. */
    job() {
      const { steps, unknown } = standingAlone(composed(), owner);
      const [host] = owner.alone.config.process;
      const { train_fixes, ...section } = owner.raw; // of the training
      if (!owner.place) delete section.output_dir; // of the command line: the UI shows what is in the job's own folder
      const config = { ...owner.alone.config, process: [{ ...host, ...section, steps }] };
      return { yaml: yamlBlock({ ...owner.alone, config }, 0).join("\n") + "\n", unknown };
    },
  };

  /** The steps with the weights as they are now. */
  function composed() {
    return owner.raw.steps.map((step) => {
      const s = owner.steps.findIndex((shown) => shown.name === step.name);
      if (!step.loras || s < 0 || !owner.steps[s].composable) return step;
      return { ...step, loras: step.loras.map((lora, i) => (now[s][i].touched ? { ...withoutStrengths(lora), ...keysOf(now[s][i].weights) } : lora)) };
    });
  }
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
