// The page: a header, every step at a glance, then one step in detail.

const studio = facts.studio ? makeStudio(facts.studio) : null; // first of all: it narrows what the page may talk to
const liveSection = facts.studio?.section ?? facts.sections.length - 1;
const steps = facts.sections.flatMap((owner, k) => owner.steps.map((step, s) => ({ step, s, k, owner })));
const desks = facts.sections.map((owner) => (owner.raw ? makeDesk(owner) : null));
const detail = el("div", {});
let shown = 0;
let composing = 0; // the step that the studio's buttons mean: the last that was shown of those that it can compose

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

const THEME_KEY = "zit_merge colours";
const firstOne = firstTheme();
if (["light", "dark"].includes(firstOne)) document.documentElement.dataset.theme = firstOne;

function showDetail(number) {
  const { step, s, k, owner } = steps[number];
  shown = number;
  const isLive = live !== null && isComposedLive(steps[number]);
  if (isLive) composing = number;
  const read = [previewsSection(step), layersSection(step), overlapSection(step)];
  const composer = composerSection(step, s, desks[k], owner, (turned) => follow(k, turned), isLive ? live : null);
  detail.replaceChildren(...(isLive ? [composer, ...read] : [...read, composer]).filter(Boolean));
}

/** Whether a step is one that the studio can compose. */
function isComposedLive({ k, step }) {
  return k === liveSection && facts.studio.steps.includes(step.name) && step.composable && Boolean(step.details) && desks[k] !== null;
}

/** What the parts of a live page share, and its section; null where there is no studio, or nothing that it could compose. */
function makeLive() {
  const first = studio ? steps.findIndex(isComposedLive) : -1;
  if (first < 0) return null;
  composing = first;
  const desk = desks[liveSection];
  const { measuring, keeping } = { measuring: makeMeasuring(studio), keeping: makeKeeping(studio, desk, () => steps[composing].step.name) };
  const composed = {
    setting: () => desk.setting(steps[composing].s),
    adopt(setting) {
      const { s, step } = steps.find((entry) => isComposedLive(entry) && entry.step.name === setting.step) ?? {};
      if (step?.inputs.length !== setting.loras.length) { say(`The step ${setting.step} is not on this page as it was then.`); return; }
      desk.adopt(s, setting);
      follow(liveSection, s, "The weights are those of");
      say("These weights are in the composer now; Undo takes them back.");
    },
  };
  return { studio, measuring, keeping, section: studioSection(studio, composed, keeping) };
}

/** After an edit that another step may have: shows the step that it belongs to. */
function follow(k, s, what = "Taken back in") {
  const number = steps.findIndex((entry) => entry.k === k && entry.s === s);
  if (s === null || number === shown) return;
  showDetail(number);
  several.querySelector("select").value = String(number);
  say(`${what} the step ${steps[number].step.name}, which is shown now.`);
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

const live = makeLive();
const glance = steps.length ? glanceSection(steps) : el("p", {}, "No step was run.");

document.body.append(
  el("header", {}, el("h1", {}, foreign(facts.title)), themeButton()),
  el("main", {}, live ? [several, live.section, detail, glance] : [glance, several, detail]),
  el("footer", {}, `zit_merge ${facts.version}`), notice);
if (steps.length) showDetail(composing);
