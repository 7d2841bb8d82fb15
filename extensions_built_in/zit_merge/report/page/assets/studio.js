// The live studio behind the page: where it is, what is asked of it, and what it says. A static page has none.

const ANSWER_WITHIN = 10_000; // milliseconds
const ASK_AGAIN = { busy: 300, idle: 1000, hidden: 5000, slowest: 30_000 }; // milliseconds between two questions
const GIVE_UP_AFTER = 20; // questions in a row without an answer, some eight minutes
const NO_ANSWER = "The studio does not answer.";

/** Where the studio is: behind the UI's proxy in its frame, where the page came from, or on this machine for a file. */
function studioAddress(port) {
  const parent = isFramed() ? document.baseURI : null;
  if (parent && /^https?:/.test(parent)) return new URL(`/proxy-${port}/`, parent);
  if (!parent && /^https?:$/.test(location.protocol) && location.port === String(port)) return new URL("/", location.href);
  return new URL(`http://127.0.0.1:${port}/`);
}

/** From here on the page may talk to this one origin only: policies add up. */
function narrowPolicy({ origin }) {
  document.head.append(el("meta", { "http-equiv": "Content-Security-Policy", content: `connect-src ${origin}` }));
}

/**
 * The studio as the page sees it.
 *
 * status: `asking` until the first answer, then `open`; `silent` while it does not answer; `gone` for good. why: a sentence for the last
 * two. state: what it said last. minutesLeft: until it closes by itself, if nobody uses it.
 */
function makeStudio(about) {
  const address = studioAddress(about.port);
  narrowPolicy(address);
  const listeners = new Map();
  const studio = { about, status: "asking", why: "", state: null, minutesLeft: null, call, listen, tell, end: (why) => become("gone", why), isOpen: () => studio.status === "open" };
  let failed = 0; // in a row
  let next = null; // timer
  let epoch = 0; // of calls: what was asked before the last one is out of date

  /** Tells `listens` of every change; a name has one listener. */
  function listen(name, listens) {
    listeners.set(name, listens);
  }

  function tell() {
    for (const listens of [...listeners.values()]) listens();
  }

  function become(status, why = "") {
    if (status === "gone") clearTimeout(next);
    Object.assign(studio, { status, why });
    tell();
  }

  async function post(verb, body) {
    const stop = new AbortController();
    const late = setTimeout(() => stop.abort(), ANSWER_WITHIN);
    try {
      const answer = await fetch(new URL(`api/${verb}`, address), { method: "POST", mode: "cors", credentials: "omit", cache: "no-store", signal: stop.signal,
        headers: { "Content-Type": "application/json", "X-Zit-Merge": about.token }, body: JSON.stringify(body) });
      return { status: answer.status, told: await answer.json() };
    } catch { // nobody is there, or somebody who does not speak JSON: the proxy
      return { status: 0, told: {} };
    } finally {
      clearTimeout(late);
    }
  }

  /** Asks for something; throws an Error with a sentence where it was refused. */
  async function call(verb, body = {}) {
    const { status, told } = await post(verb, body);
    if (status !== 200) throw new Error(told.error ?? NO_ANSWER);
    if (verb !== "picture") { // what the studio says is another thing now
      epoch += 1;
      askIn(0);
    }
    return told;
  }

  function askIn(milliseconds) {
    if (studio.status === "gone") return;
    clearTimeout(next);
    next = setTimeout(ask, milliseconds);
  }

  async function ask() {
    const asked = epoch;
    const { status, told } = await post("state", { seen: studio.state?.version ?? -1 });
    if (studio.status === "gone") return;
    if (asked !== epoch) { askIn(0); return; }
    if (status === 401 || status === 403) { become("gone", "Another studio answers now: open its own page."); return; }
    if (status !== 200) { fail(); return; }
    failed = 0;
    take(told);
    if (studio.status !== "gone") askIn(pause());
  }

  function take(told) {
    const minutesLeft = Math.max(Math.ceil(told.seconds_left / 60), 1);
    const isNew = "looks" in told || minutesLeft !== studio.minutesLeft || studio.status !== "open";
    studio.minutesLeft = minutesLeft;
    if ("looks" in told) studio.state = told;
    if (told.closed) become("gone", `The studio is closed: ${told.closed}.`);
    else if (isNew) become("open");
  }

  function fail() {
    failed += 1;
    if (failed >= GIVE_UP_AFTER) become("gone", "The studio does not answer any more: start it again and open its page.");
    else if (failed > 1 || studio.status === "asking") become("silent", NO_ANSWER);
    askIn(Math.min(ASK_AGAIN.idle * 2 ** (failed - 1), ASK_AGAIN.slowest));
  }

  function pause() {
    if (document.hidden) return ASK_AGAIN.hidden;
    return isBusy(studio.state) ? ASK_AGAIN.busy : ASK_AGAIN.idle;
  }

  document.addEventListener("visibilitychange", () => { if (!document.hidden) askIn(0); });
  askIn(0);
  return studio;
}

const isPending = ({ status }) => status === "waiting" || status === "running";

function isBusy({ task, measure, looks, kept }) {
  return task !== null || [measure, ...looks, ...kept].some((work) => work && isPending(work));
}

/** What the studio does now, in words. */
function doing({ task, looks }) {
  if (!task) return looks.some(isPending) ? "Waiting for its turn." : "Ready.";
  const { kind, label, done, total } = task;
  const look = looks.findIndex(({ status }) => status === "running");
  if (kind === "load") return "Loading the model…";
  if (kind === "look") return `Rendering picture ${Math.min(done + 1, total)} of ${total}: ${look < 0 ? label : `${look + 1}. ${looks[look].label}`}`;
  return kind === "keep" ? `Writing ${label}…` : "Computing what would come out…";
}

/**
 * What the studio measured of the settings of this tab. `want(setting)` asks after a moment of quiet; `of(setting)` is
 * {found, error, isPending}, the same object until there is something new.
 */
function makeMeasuring(studio) {
  const known = new Map(); // setting as JSON -> {found, error}
  let wanted = null; // as JSON
  let asked = null; // {key, id, before} of the question that is under way; before: the state when it was taken
  let timer = null;

  function learn(key, answer) {
    known.delete(key);
    known.set(key, { ...answer, isPending: false });
    if (known.size > REMEMBERED) known.delete(known.keys().next().value);
  }

  async function ask() {
    const key = wanted;
    if (!studio.isOpen() || known.has(key)) return;
    asked = { key, id: null };
    const mine = asked;
    try {
      const { id } = await studio.call("measure", { setting: JSON.parse(key) });
      Object.assign(mine, { id, before: studio.state });
    } catch (e) {
      if (asked === mine) asked = null;
      if (e.message === NO_ANSWER) return;
      learn(key, { found: null, error: e.message });
    }
    studio.tell();
  }

  /** Looks at what the studio says; asks again where another tab's question took the place of ours. */
  function look() {
    if (!studio.isOpen()) { asked = null; return; }
    const { measure } = studio.state;
    if (asked && measure && measure.id === asked.id) {
      if (isPending(measure)) return;
      learn(asked.key, { found: measure.found, error: measure.error || null });
      asked = null;
    }
    if (asked && (asked.id === null || asked.before === studio.state)) return; // not answered yet
    if (wanted !== null && !known.has(wanted) && timer === null && !(measure && isPending(measure))) ask();
  }

  return {
    look,
    want(setting) {
      wanted = JSON.stringify(setting);
      if (known.get(wanted)?.error) known.delete(wanted); // it may go this time
      clearTimeout(timer);
      timer = setTimeout(() => { timer = null; ask(); }, QUIET);
    },
    of: (setting) => (studio.isOpen() ? known.get(JSON.stringify(setting)) ?? PENDING : NOTHING_MEASURED),
  };
}

const NOTHING_MEASURED = { found: null, error: null, isPending: false };
const PENDING = { ...NOTHING_MEASURED, isPending: true };
const QUIET = 250; // milliseconds without a change before something is measured
