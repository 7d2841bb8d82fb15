// What a live studio adds to the composer: method, parameters and rank, and the measured numbers of what would come out.

const RANKS = {
  exact: { text: "exact: nothing is cut", start: "exact" },
  same: { text: "same: the largest of the LoRAs", start: "same" },
  number: { text: "a number", start: 32 },
  energy: { text: "by the energy that is kept", start: { energy: 0.99 } },
  size: { text: "by the size of the file", start: { size_mb: 100 } },
};

function rankKind(rank) {
  if (typeof rank === "string") return rank;
  return typeof rank === "number" ? "number" : "size_mb" in rank ? "size" : "energy";
}

/** Method with its parameters, and rank, of a step of `count` LoRAs. */
function methodFields(about, desk, s, count) {
  const methods = new Map(about.methods.map((method) => [method.name, method]));
  const how = () => desk.how(s);
  const summary = el("p", { class: "hint" });
  const method = select("Method", [...methods.keys()].map((name) => [name, name]), how().method, (name) => desk.change(s, { method: name, params: {} }));
  for (const option of method.querySelectorAll("option")) option.disabled = (methods.get(option.value).takes ?? count) !== count;
  const kind = select("Rank", Object.entries(RANKS).map(([name, { text }]) => [name, text]), rankKind(how().rank), (name) => desk.change(s, { rank: RANKS[name].start }));
  const [params, ranks] = [fieldSet(), fieldSet()];

  function setParam({ name, default: usual }, value) {
    const { [name]: _, ...others } = how().params;
    desk.change(s, { params: value === usual ? others : { ...others, [name]: value } });
  }

  const rankFields = {
    number: () => [numberField("rank", 1, (rank) => desk.change(s, { rank }), () => how().rank, wholeFrom(1))],
    energy: () => [
      numberField("share of the energy", 0.01, (energy) => desk.change(s, { rank: { ...how().rank, energy } }), () => how().rank.energy, within(0, 1)),
      numberField("at most rank", 1, (max) => desk.change(s, { rank: withOptional(how().rank, "max", max) }), () => how().rank.max ?? null, wholeFrom(1), true)],
    size: () => [numberField("MB", 10, (size_mb) => desk.change(s, { rank: { ...how().rank, size_mb } }), () => how().rank.size_mb, within(0, null))],
  };

  function update() {
    const chosen = methods.get(how().method);
    method.value = how().method;
    kind.value = rankKind(how().rank);
    summary.textContent = [chosen?.summary, ...(chosen?.params ?? []).map(({ name, text }) => (text ? `${name}: ${text}` : ""))].filter(Boolean).join(" ");
    params.show(how().method, () => (chosen?.params ?? []).map((param) => paramField(param, () => how().params[param.name] ?? param.default, (value) => setParam(param, value))));
    ranks.show(kind.value, rankFields[kind.value] ?? (() => []));
  }

  [method, kind].forEach((field) => Object.defineProperty(field, "value", {
    get: () => field.querySelector("select").value, set: (value) => { field.querySelector("select").value = value; } }));
  update();
  return Object.assign(el("div", { class: "method" }, el("h3", {}, "Method and rank"),
    el("div", { class: "tools" }, method, params.element, kind, ranks.element), summary), { update });
}

/** Fields that are made anew when `name` changes, and else only updated. */
function fieldSet() {
  const element = el("span", { class: "fields" });
  let [shownName, fields] = [null, []];
  return { element, show(name, make) {
    if (name !== shownName) {
      [shownName, fields] = [name, make()];
      element.replaceChildren(...fields);
    }
    fields.forEach((field) => field.update());
  } };
}

/** A field of a parameter as its kind asks for. */
function paramField(param, read, write) {
  const { name, kind, choices } = param;
  if (kind === "choice") {
    const field = select(name, choices.map((word) => [word, word]), read(), write);
    return Object.assign(field, { update: () => { field.querySelector("select").value = read(); } });
  }
  if (kind === "flag") {
    const box = el("input", { type: "checkbox", onchange: () => write(box.checked) });
    return Object.assign(el("label", { class: "field" }, box, name), { update: () => { box.checked = read(); } });
  }
  const range = within(param.least, param.most);
  const isWhole = kind === "integer";
  return numberField(name, isWhole ? 1 : STEP, write, read, (value) => (isWhole && !Number.isInteger(value) ? "is no whole number" : range(value)));
}

function numberField(label, by, write, read, check, isOptional = false) {
  const id = freshId("setting");
  const input = numberInput({ id, by, check, isOptional, value: read() ?? "", write: (value) => { if (value !== read()) write(value); } });
  return Object.assign(el("span", { class: "field" }, el("label", { for: id }, label), input), { update: () => input.show(read()) });
}

/** A check of numbers from `least` to `most`, null for no limit: why a number can't be. */
function within(least, most) {
  return (value) => (least !== null && value < least ? `is below ${show(least)}` : most !== null && value > most ? `is above ${show(most, 12)}` : "");
}

function wholeFrom(least) {
  return (value) => (Number.isInteger(value) && value >= least ? "" : `is no whole number from ${least}`);
}

function withOptional(object, key, value) {
  const { [key]: _, ...others } = object;
  return value === null ? others : { ...others, [key]: value };
}

/** The numbers of something measured. */
function measuredList(found, inputs) {
  const head = ["", "LoRA", "asked", "got"].map((text) => (text ? el("th", { scope: "col" }, text) : el("td")));
  const lines = inputs.map((input, i) => el("tr", {}, el("td", { class: "number" }, String(i + 1)), el("th", { scope: "row" }, foreign(input.label)),
    el("td", { class: "number" }, show(found.asked[i])), el("td", { class: "number" }, show(found.got[i]))));
  const many = inputs.length > MANY_INPUTS;
  const facts = [
    ["energy kept", found.kept === null ? "all: nothing is cut" : percent(found.kept)], ["norm", show(found.norm, 4)], ["rank", found.rank],
    ["file", sizeText(found.bytes)], ...(found.cosines ? [["overlap", overlapText(found.cosines)]] : []),
  ].filter(([, text]) => text);
  return [
    verdictOf(found.status, found.judgement),
    el("dl", {}, facts.map(([name, text]) => [el("dt", {}, name), el("dd", {}, text)])),
    el("div", { class: many ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": "strength asked and got" },
      el("table", { class: "inputs" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, lines))),
    found.warnings.length ? el("ul", { class: "notes", "aria-label": "warnings" }, found.warnings.map((text) => el("li", {}, el("bdi", {}, text)))) : null,
  ];
}

const PAIRS_TOLD = 3; // of the LoRAs, those that overlap most

/** The largest cosines of the LoRAs as they go in. */
function overlapText(cosines) {
  const pairs = cosines.flatMap((row, i) => row.map((cosine, j) => [cosine, j + 1, i + 1])).filter(([cosine]) => cosine !== null);
  const most = pairs.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, PAIRS_TOLD);
  return most.map(([cosine, i, j]) => `LoRA ${i} and ${j}: cosine ${showCosine(cosine)}`).join("; ");
}

/** What the measured result is, module by module, as the map shows it. */
function measuredMap({ result }) {
  const total = sum(result.map((e) => e ?? 0));
  const share = (n) => (result[n] === null ? null : total > 0 ? result[n] / total : 0);
  return { share, most: Math.max(0, ...MODULES.map((_, n) => share(n) ?? 0)), label: "measured energy of the result",
    tell: (n) => (result[n] === null ? `${placeName(n)}: nothing` : `${placeName(n)}: ${percent(share(n))} of the energy, norm ${show(Math.sqrt(result[n]), 4)}`) };
}
