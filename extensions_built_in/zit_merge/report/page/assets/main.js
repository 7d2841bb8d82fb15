// The page: a header, every step at a glance, then one step in detail.

const steps = facts.sections.flatMap((owner, k) => owner.steps.map((step, s) => ({ step, s, section: owner, desk: k })));
const desks = facts.sections.map(makeDesk);
const detail = el("div", {});

function themeButton() {
  const root = document.documentElement;
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  const button = el("button", { type: "button", onclick: () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); } });
  const name = () => { button.textContent = isDark() ? "Light colours" : "Dark colours"; };
  name();
  return button;
}

function showStep(k) {
  const { step, s, desk } = steps[k];
  detail.replaceChildren(...[previewsSection(step), layersSection(step), overlapSection(step), composerSection(step, s, desks[desk])].filter(Boolean));
}

document.addEventListener("keydown", (e) => {
  const inText = e.target.matches?.("input[type=number], textarea");
  if (inText || !(e.ctrlKey || e.metaKey) || e.key.toLowerCase() !== "z" || !steps.length) return;
  const desk = desks[steps[shownStep].desk];
  if (e.shiftKey) desk.redo(); else desk.undo();
  e.preventDefault();
});

let shownStep = 0;
const several = steps.length > 1 ? el("nav", { class: "steps", "aria-label": "steps" },
  select("Step in detail:", steps.map(({ step, section: owner }, k) => [k, facts.sections.length > 1 ? `${owner.place}: ${clip(step.name)}` : clip(step.name)]), 0,
    (value) => { shownStep = Number(value); showStep(shownStep); })) : null;

document.body.append(
  el("header", {}, el("h1", {}, foreign(facts.title)), themeButton()),
  el("main", {}, steps.some(({ step }) => step.inputs.length) ? glanceSection(steps) : el("p", {}, "No step was run."), several, detail),
  el("footer", {}, `zit_merge ${facts.version}`));
if (steps.length) showStep(0);
