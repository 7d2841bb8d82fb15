// Strengths as config keys spell them, and the energy that follows. The same rules as model/strengths.py.
//
// Weights of a LoRA: {ratio, components: [8], layers: [30], noise_refiner, context_refiner, other, overrides: Map module -> factor}.

function weightsOf(input) {
  return { ...copyWeights({ ...input.weights, overrides: new Map(input.weights.overrides) }), ratio: input.ratio };
}

function copyWeights(w) {
  return { ...w, components: [...w.components], layers: [...w.layers], overrides: new Map(w.overrides) };
}

/** What the ratio is multiplied with at a module. */
function factorAt(w, n) {
  if (w.overrides.has(n)) return w.overrides.get(n);
  const m = MODULES[n];
  const component = m.section === "other" ? 1 : w.components[COMPONENTS.indexOf(m.component)];
  return component * (m.section === "layers" ? w.layers[m.index] : w[m.section]);
}

function strengthAt(w, n) {
  return w.ratio * factorAt(w, n);
}

/** The inner products of a step's inputs at strength 1: pairs(n) -> [[i, j, product], ...] of a module. */
function productsOf(details) {
  const energies = details.energies;
  return (n) => details.pairs.filter(([, , cosines]) => cosines[n]).map(([i, j, cosines]) =>
    [i, j, (cosines[n] / 1e4) * Math.sqrt(energies[i][n] * energies[j][n])]);
}

/** Energies of a plain sum of LoRAs: for each LoRA alone, and together, over modules; null where nothing changes. */
function predict(details, all) {
  const products = productsOf(details);
  const alone = all.map((w, i) => MODULES.map((_, n) => (details.energies[i][n] === null ? null : strengthAt(w, n) ** 2 * details.energies[i][n])));
  const together = MODULES.map((_, n) => {
    if (alone.every((energies) => energies[n] === null)) return null;
    const crossed = sum(products(n).map(([i, j, product]) => 2 * strengthAt(all[i], n) * strengthAt(all[j], n) * product));
    return Math.max(sum(alone.map((energies) => energies[n] ?? 0)) + crossed, 0);
  });
  return { alone, together, total: sum(together.map((e) => e ?? 0)) };
}
