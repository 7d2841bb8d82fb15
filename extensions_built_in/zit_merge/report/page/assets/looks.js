// The looks of a live studio: buttons that ask for them, the strip that keeps them, and what is kept as a file.

const SMALL_EDGE = 192; // pixels, of the strip
const LARGE_EDGE = 2048; // of the viewer
const LARGE_KEPT = 60; // pictures
const AT_ONCE = 2; // pictures that are on their way

/** The pictures of a studio, each fetched once. `small` and `large` of {look, row, column} are promises of addresses. */
function makePictures(studio) {
  const [smalls, larges, waiting] = [new Map(), new Map(), []];
  let running = 0;

  function fetchPicture(place, edge) {
    return new Promise((done, failed) => {
      waiting.push({ place, edge, done, failed });
      goOn();
    });
  }

  function goOn() {
    if (running >= AT_ONCE || !waiting.length) return;
    const large = waiting.findIndex(({ edge }) => edge === LARGE_EDGE); // somebody looks at it
    const [{ place, edge, done, failed }] = waiting.splice(Math.max(large, 0), 1);
    running += 1;
    studio.call("picture", { ...place, edge }).then(({ image }) => done(image), failed).finally(() => { running -= 1; goOn(); });
  }

  function cached(store, edge, most) {
    return (place) => {
      const key = `${place.look}.${place.row}.${place.column}`;
      const found = store.get(key) ?? fetchPicture(place, edge);
      store.delete(key); // the last that was asked for is dropped last
      store.set(key, found);
      found.catch(() => store.delete(key));
      if (store.size > most) store.delete(store.keys().next().value);
      return found;
    };
  }
  return { small: cached(smalls, SMALL_EDGE, Infinity), large: cached(larges, LARGE_EDGE, LARGE_KEPT) };
}

/**
 * The studio's own section: what it does, looks, what is kept, and its end.
 *
 * composed(): {setting, adopt(setting)} of the step that is composed. keeping: the name to keep under.
 */
function studioSection(studio, composed, keeping) {
  const { about } = studio;
  const status = el("span", { role: "status" });
  const progress = el("progress", { "aria-label": "progress", hidden: true });
  const ends = el("span", { class: "hint" });
  const strip = lookStrip(studio, composed);
  const keep = keepPart(studio, composed, keeping);
  const ask = async (verb, body) => {
    try {
      return await studio.call(verb, body);
    } catch (e) {
      say(e.message);
      return null;
    }
  };
  async function look(draft) {
    if (!studio.isOpen()) return;
    if (about.no_pictures) { say(`There are no pictures: ${about.no_pictures}`); return; }
    const before = studio.state.looks.map(({ id }) => id);
    const { id } = await ask("look", { setting: composed.setting(), draft }) ?? {};
    if (before.includes(id)) say(`Look ${before.indexOf(id) + 1} shows these weights already.`);
    if (id !== undefined) strip.showLook(id);
  }
  const [lookButton, draftButton, cancelButton] = [
    button("Look", () => look(false), { class: "main", "aria-keyshortcuts": "L" }), button("Draft", () => look(true), { "aria-keyshortcuts": "D" }),
    button("Cancel", () => { if (isCancellable()) ask("cancel"); })];
  const isCancellable = () => studio.state !== null && studio.state.looks.some(isPending);
  const pictures = about.no_pictures ? el("p", {}, "There are no pictures: ", el("bdi", {}, about.no_pictures)) : [
    el("div", { class: "tools" }, lookButton, draftButton, cancelButton),
    el("p", { class: "hint" }, `A look renders what is composed below (${about.full}; key L), a draft is faster (${about.draft}; key D).`), strip];
  const [closeButton, sure] = closeParts(async () => { if (await ask("close")) studio.end("The studio is closed."); });
  const resume = el("p", { class: "tools", hidden: true }, button("Go on with what was composed last", () => { composed.adopt(last); resume.hidden = true; lookButton.focus(); }));
  const open = el("div", {}, sure, resume, pictures, keep);
  let last; // the setting that was measured last, before this page was opened; null for none

  function update() {
    const { state, status: now } = studio;
    const isOpen = studio.isOpen();
    const text = isOpen ? doing(state) : now === "asking" ? "Looking for the studio…" : `${studio.why} The page below works without it.`;
    if (status.textContent !== text) status.textContent = text;
    const task = isOpen && state.task?.total ? state.task : null;
    progress.hidden = !task;
    if (task) setAttributes(progress, { max: task.total, value: task.done });
    open.hidden = !isOpen;
    end.hidden = !isOpen;
    if (!isOpen) return;
    if (last === undefined) {
      last = state.last ?? null;
      resume.hidden = last === null || isSame(last, composed.setting());
    }
    ends.textContent = `Unless it is used, it closes by itself in ${studio.minutesLeft === 1 ? "a minute" : `${studio.minutesLeft} minutes`}.`;
    setAttributes(cancelButton, { "aria-disabled": String(!isCancellable()) });
    strip.update();
    keep.update();
  }

  document.addEventListener("keydown", (e) => {
    // not from the page at large: single letters are what people dictate, and what screen readers walk with
    const isElsewhere = e.target === document.body || e.target.matches?.("input[type=text], textarea, select") || document.querySelector("dialog[open]");
    if (isElsewhere || e.repeat || e.ctrlKey || e.metaKey || e.altKey || !["l", "d"].includes(e.key.toLowerCase())) return;
    look(e.key.toLowerCase() === "d");
    e.preventDefault();
  });
  studio.listen("section", update);
  const end = el("p", { class: "tools" }, closeButton, ends);
  const box = section("Studio", el("p", { class: "doing" }, status, progress), end, open);
  update();
  return box;
}

/** The button that ends the studio, and what it asks first. */
function closeParts(close) {
  const ask = button("Close the studio", () => turn(true));
  const [yes, no] = [button("Close it", close), button("Leave it open", () => turn(false))];
  const sure = el("div", { class: "sure", role: "group", "aria-label": "close the studio", hidden: true, onkeydown: (e) => { if (e.key === "Escape") turn(false); } },
    el("p", {}, "Close the studio? Files and pictures that are there stay; what waits is dropped."), el("p", { class: "tools" }, yes, no));
  function turn(isAsking) {
    sure.hidden = !isAsking;
    ask.hidden = isAsking;
    (isAsking ? no : ask).focus();
  }
  return [ask, sure];
}

/** The strip: a row for each prompt; base and inputs, then the looks in the order in which they were asked for. */
function lookStrip(studio, composed) {
  const store = makePictures(studio);
  const [cells, heads] = [new Map(), new Map()]; // by their keys, so that they stay what they are
  const table = el("table", { class: "strip" });
  const region = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "looks" }, table);
  const none = el("p", {});
  const favouritesButton = button("Favourites only", () => { isFiltered = !isFiltered; update(); }, { "aria-pressed": "false" });
  const filter = el("p", { class: "tools" }, favouritesButton);
  const walk = walkAmong(region, () => [...table.querySelectorAll("button")]);
  let isFiltered = false;
  let drawn = ""; // the keys of the columns that are shown
  let newest = null; // id of the look that was scrolled to
  let compared = null; // key of the column that was compared with last

  const lookById = (id) => studio.state.looks.find((look) => look.id === id);

  /**
   * The look that base and inputs are shown of: the newest that is done, else the newest that has any. Of those with the same base and
   * inputs the first, so that the pictures stay as they are.
   */
  function sourceOf(looks) {
    const newest = looks.findLast((look) => look.status === "done") ?? looks.findLast((look) => look.columns.length) ?? null;
    const shared = (look) => [look.status, look.draft, look.setting.step, look.rows, look.columns.filter(({ kind }) => kind !== "look")];
    return newest && looks.find((look) => isSame(shared(look), shared(newest)));
  }

  /** The headings of the rows; looks of an earlier studio may have other ones. */
  function rowsOf(looks) {
    const known = [...sourceOf(looks)?.rows ?? [], ...looks.flatMap((look) => look.rows)];
    return [...new Set(known.length ? known : studio.about.prompts)];
  }

  /** The columns: {key, look, at(), kind, name}. at: which column of the look it is, -1 before the look knows. */
  function columnsOf(looks) {
    const source = sourceOf(looks);
    const shared = (source?.columns ?? []).map(({ kind, label }, column) => ({ key: `${source.id}.${column}`, look: source.id, at: () => column, kind, name: label }));
    const own = looks.filter((look) => !isFiltered || look.favourite).map((look) => ({ key: `${look.id}.look`, look: look.id, kind: "look",
      at: () => lookById(look.id).columns.findIndex(({ kind }) => kind === "look"), name: `${looks.indexOf(look) + 1}. ${look.label}` }));
    return [...shared.filter(({ kind }) => kind !== "look"), ...own];
  }

  function headOf({ key, look: id, kind, name }) {
    if (kind !== "look") return { cell: el("th", { scope: "col" }, foreign(name)), update: () => {} };
    const told = el("span", { class: "told" });
    const hidden = () => el("span", { class: "hidden" }, ` ${name}`);
    const use = button(["Use these weights", hidden()], () => composed.adopt(lookById(id).setting));
    const favourite = button(["Favourite", hidden()], () => favour(id));
    function update() {
      const look = lookById(id);
      told.textContent = lookText(look);
      setAttributes(favourite, { "aria-pressed": String(look.favourite) });
    }
    return { cell: el("th", { scope: "col" }, foreign(name), told, el("span", { class: "tools" }, use, favourite)), update };
  }

  function cellOf({ look: id, at, name }, heading) {
    const cell = el("td", {});
    const place = () => ({ look: id, row: lookById(id).rows.indexOf(heading), column: at() });
    let state = ""; // what the cell shows
    function update() {
      const look = lookById(id);
      const { row, column } = place();
      const isReady = look.ready[row]?.[column];
      const text = isReady ? "" : { waiting: "waiting", running: "to be rendered", failed: "failed", cancelled: "cancelled" }[look.status] ?? "not there";
      if (isReady && state !== "ready") {
        state = "ready";
        store.small(place()).then(fill, () => { state = ""; });
      } else if (!isReady && state !== text) {
        state = text;
        cell.replaceChildren(el("span", { class: "empty" }, text));
      }
    }
    function fill(src) {
      const thumb = el("button", { type: "button", class: "thumb", onclick: () => open(cell) }, el("img", { src, alt: `${name}: ${heading}` }));
      Object.assign(cell, { src, thumb, place }).replaceChildren(thumb);
      settle();
    }
    return { cell, update };
  }

  function settle() {
    const buttons = [...table.querySelectorAll("button")];
    if (buttons.filter((b) => b.tabIndex === 0).length !== 1) walk.stop(buttons.find((b) => b === document.activeElement) ?? buttons[0]);
  }

  const made = (store, key, make) => store.get(key) ?? store.set(key, make()).get(key);

  /** Lays the table anew where its columns have changed; what has the focus keeps it. */
  function lay(columns, rows) {
    const [focused, left] = [document.activeElement, region.scrollLeft];
    table.replaceChildren(
      el("thead", {}, el("tr", {}, el("td"), columns.map((column) => made(heads, column.key, () => headOf(column)).cell))),
      el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, foreign(row, 80)),
        columns.map((column) => made(cells, `${column.key}.${row}`, () => cellOf(column, row)).cell)))));
    region.scrollLeft = left;
    if (focused?.isConnected && table.contains(focused)) focused.focus({ preventScroll: true });
  }

  function update() {
    const { looks } = studio.state;
    const shown = looks.length ? columnsOf(looks) : [];
    const rows = rowsOf(looks);
    none.textContent = !looks.length ? "No look yet." : isFiltered && !looks.some(({ favourite }) => favourite) ? "No look is a favourite yet." : "";
    none.hidden = !none.textContent;
    region.hidden = filter.hidden = !looks.length;
    setAttributes(favouritesButton, { "aria-pressed": String(isFiltered) });
    const keys = JSON.stringify([shown.map(({ key }) => key), rows]);
    if (keys !== drawn) lay(shown, rows);
    drawn = keys;
    for (const column of shown) {
      heads.get(column.key).update();
      for (const row of rows) cells.get(`${column.key}.${row}`).update();
    }
    settle();
    if (looks.length && looks.at(-1).id !== newest) { // the newest is what people wait for
      newest = looks.at(-1).id;
      region.scrollLeft = region.scrollWidth;
    }
  }

  /** Scrolls to a look, as far as it is shown. */
  function showLook(id) {
    const head = heads.get(`${id}.look`)?.cell;
    if (head?.isConnected) region.scrollLeft += head.getBoundingClientRect().right - region.getBoundingClientRect().right;
  }

  async function favour(id) {
    try {
      await studio.call("favourite", { look: id, on: !lookById(id).favourite });
      lookById(id).favourite = !lookById(id).favourite; // until the studio says so itself
      studio.tell();
    } catch (e) {
      say(e.message);
    }
  }

  /** Opens the viewer on a picture, with all that the strip shows now. */
  function open(chosen) {
    const { looks } = studio.state;
    const columns = columnsOf(looks);
    const rows = rowsOf(looks);
    const previews = rows.flatMap((_, r) => columns.map((_, c) => ({ row: r, column: c }))).filter((p) => cellAt(p).thumb);
    function cellAt(p) {
      return cells.get(`${columns[p.column].key}.${rows[p.row]}`).cell;
    }
    const gallery = {
      title: "Looks", previews, rows, columns: columns.map(({ name }) => name), texts: [],
      small: (n) => cellAt(previews[n]).src,
      load: (n) => store.large(cellAt(previews[n]).place()),
      favourite: (n) => { const own = columns[previews[n].column]; return own.kind === "look" ? lookById(own.look)?.favourite ?? null : null; },
      favour: (n) => favour(columns[previews[n].column].look),
      get compared() { return columns.findIndex(({ key }) => key === compared); },
      set compared(c) { compared = columns[c].key; },
    };
    viewPicture(gallery, previews.findIndex((p) => cellAt(p) === chosen), (n) => cellAt(previews[n]).thumb.focus());
  }

  return Object.assign(el("div", { class: "looks" }, none, filter, region), { update, showLook });
}

/** How far a look is, in words. */
function lookText({ status, error, ready }) {
  const all = ready.flat();
  if (status === "running") return `${all.filter(Boolean).length} of ${all.length} pictures`;
  if (status === "failed") return `failed: ${error || "no reason was given"}`;
  return status === "done" ? "" : status;
}

const KEEP_NAME = /^[\p{L}\p{N}_.-]+$/u;

/** The name of what is kept next: `name()`, free of those that are taken until somebody types one. */
function makeKeeping(studio, desk, stepName) {
  let typed = null;
  const taken = () => [...desk.names(), ...facts.studio.taken, ...(studio.state?.kept ?? []).filter(({ status }) => status !== "failed").map(({ name }) => name)];
  function free() {
    for (let n = 2; ; n += 1) if (!taken().includes(`${stepName()}_${n}`)) return `${stepName()}_${n}`;
  }
  return {
    listen: () => {}, // the YAML
    name: () => typed ?? free(),
    type(name) { typed = name; this.listen(); },
    /** What is wrong with the name; empty if nothing is. */
    trouble: (name) => (name === "" ? "Give it a name." : !KEEP_NAME.test(name) ? "A name has letters, digits, _ . and - only." :
      taken().some((one) => one.toLowerCase() === name.toLowerCase()) ? `There is a step ${name} already: give another name.` : ""),
  };
}

/** Keeps what is composed as a file, and lists what was kept. */
function keepPart(studio, composed, keeping) {
  const [id, troubleId] = [freshId("keep"), freshId("trouble")];
  const trouble = el("p", { id: troubleId, class: "trouble", role: "alert" });
  const field = el("input", { type: "text", id, autocomplete: "off", spellcheck: "false", "aria-describedby": troubleId, maxlength: 100,
    oninput: () => { keeping.type(field.value.trim()); judge(); }, onkeydown: (e) => { if (e.key === "Enter") keep(); } });
  const list = el("ul", { class: "kept", "aria-label": "kept" });
  const title = el("h4", {}, "Kept");

  function judge() {
    const text = keeping.trouble(keeping.name());
    trouble.textContent = text;
    if (text) field.setAttribute("aria-invalid", "true");
    else field.removeAttribute("aria-invalid");
    return text === "";
  }

  async function keep() {
    if (!judge()) { field.focus(); return; }
    try {
      await studio.call("keep", { setting: composed.setting(), name: keeping.name() });
      keeping.type(null);
    } catch (e) {
      trouble.textContent = e.message;
    }
  }

  function update() {
    if (document.activeElement !== field && field.value !== keeping.name()) field.value = keeping.name();
    const { kept } = studio.state;
    const text = JSON.stringify(kept);
    title.hidden = !kept.length;
    if (list.dataset.shown === text) return;
    list.dataset.shown = text;
    list.replaceChildren(...kept.map((entry) => el("li", {}, el("strong", {}, foreign(entry.name)), " ", keptText(entry))));
    keeping.listen();
  }
  return Object.assign(el("div", { class: "keep" }, el("h3", {}, "Keep"),
    el("div", { class: "tools" }, el("span", { class: "field" }, el("label", { for: id }, "Name"), field), button("Keep as a LoRA", keep, { class: "main" })), trouble, title, list), { update });
}

function keptText({ status, file, error, judgement, verdict }) {
  if (status === "waiting") return "is waiting";
  if (status === "running") return "is being written…";
  if (status === "failed") return ["failed: ", el("bdi", {}, error)];
  return [foreign(file, 200), verdict ? verdictOf(verdict, judgement) : null].filter(Boolean);
}
