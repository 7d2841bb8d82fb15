// The page: a header, every step at a glance, then one step in detail.

const steps = facts.sections.flatMap((owner, k) => owner.steps.map((step, s) => ({ step, s, k, owner })));
const desks = facts.sections.map((owner) => (owner.raw ? makeDesk(owner) : null));
const detail = el("div", {});
let shown = 0;

function themeButton() {
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const button = el("button", { type: "button", onclick: () => { root.dataset.theme = isDark() ? "light" : "dark"; remember(root.dataset.theme); name(); } });
  const name = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  name();
  return button;
}

/** The colours that were chosen here before; dark in a frame, which can't ask the dark UI around it; else as the system has it. */
function firstTheme() {
  try {
    return localStorage.getItem(THEME_KEY) ?? (isFramed() ? "dark" : null);
  } catch { // a sandboxed frame has no storage
    return isFramed() ? "dark" : null;
  }
}

function remember(theme) {
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch { /* until the page is loaded again */ }
}

const isFramed = () => window.parent !== window;
const THEME_KEY = "zit_merge colours";
const firstOne = firstTheme();
if (["light", "dark"].includes(firstOne)) document.documentElement.dataset.theme = firstOne;

function showDetail(number) {
  const { step, s, k, owner } = steps[number];
  shown = number;
  detail.replaceChildren(...[previewsSection(step), layersSection(step), overlapSection(step), composerSection(step, s, desks[k], owner, (turned) => follow(k, turned))].filter(Boolean));
}

/** After an edit was taken back: shows the step that it belongs to. */
function follow(k, s) {
  const number = steps.findIndex((entry) => entry.k === k && entry.s === s);
  if (s === null || number === shown) return;
  showDetail(number);
  several.querySelector("select").value = String(number);
  say(`Taken back in the step ${steps[number].step.name}, which is shown now.`);
}

document.addEventListener("keydown", (e) => {
  const key = e.key.toLowerCase();
  const isText = e.target.matches?.("input[type=text], textarea");
  if (isText || !(e.ctrlKey || e.metaKey) || !["z", "y"].includes(key) || !steps.length) return;
  const { k } = steps[shown];
  if (!desks[k]) return;
  follow(k, key === "y" || e.shiftKey ? desks[k].redo() : desks[k].undo());
  e.preventDefault();
});

const several = el("nav", { class: "steps", "aria-label": "steps", hidden: steps.length < 2 },
  select("Step in detail:", steps.map(({ step, owner }, number) => [number, facts.sections.length > 1 ? `${owner.place}: ${clip(step.name)}` : clip(step.name)]), 0,
    (value) => showDetail(Number(value))));

document.body.append(
  el("header", {}, el("h1", {}, foreign(facts.title)), themeButton()),
  el("main", {}, steps.length ? glanceSection(steps) : el("p", {}, "No step was run."), several, detail),
  el("footer", {}, `zit_merge ${facts.version}`), notice);
if (steps.length) showDetail(0);
