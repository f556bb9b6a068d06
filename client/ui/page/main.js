// The reading room: pictures, asking, readings and their follow-ups, and what this session has seen.

import { Session, about as askAbout } from "./api.js";
import { Ask, suits } from "./ask.js";
import { alarm, at, button, make, say, titled } from "./dom.js";
import { Pictures } from "./pictures.js";
import { Reading } from "./reading.js";

const RENEW_MS = 5000;
const session = new Session(over);
const threads = [];
let about = { servers: [], exports: [], limits: {} };
let shown = null;
let known = "";
const ask = new Ask(begin);
const pictures = new Pictures(session, () => {
  ask.count = pictures.chosen.length;
  tellOthers();
});

/** What was asked together: a column for each reading, under it those that go on from it. */
class Thread {
  constructor(columns) {
    this.begun = new Date();
    this.roles = pictures.roles;
    this.pictures = pictures.chosen;
    this.columns = columns.map((readings) => ({ readings }));
    this.names = this.pictures.map(({ name, picture }) => name || picture);
  }

  get title() {
    const titles = new Set(this.columns.map(({ readings }) => readings[0].request.title));
    return `${[...titles].join(" | ")}${titles.size < this.columns.length ? ", compared" : ""}`;
  }

  get isBusy() {
    return this.columns.some(({ readings }) => readings.some((reading) => reading.isBusy));
  }

  /** Boxes of the newest reading of each column that has some, unless others were asked for. */
  get boxes() {
    return this.columns.flatMap(({ readings, chosen }, column) => {
      const reading = chosen ?? readings.findLast((each) => each.boxes.length);
      return (reading?.boxes ?? []).map((box) => ({ ...box, column }));
    });
  }
}

function started(request, column) {
  const threadOf = (reading) => threads.find((each) => each.columns.some(({ readings }) => readings.includes(reading)));
  const isShown = (reading) => threadOf(reading) === shown;
  const changed = (reading, isChosen = false) => {
    const thread = threadOf(reading);
    const home = thread.columns.find(({ readings }) => readings.includes(reading));
    home.chosen = isChosen ? reading : null;
    if (thread === shown) pictures.boxes = thread.boxes;
    follow();
    history();
  };
  return new Reading(request, session, { speaks: column === 0, isShown, exports: about.exports, changed });
}

function begin(requests) {
  for (const request of requests) request.pictures = pictures.chosen;
  const thread = new Thread(requests.map((request, column) => [started(request, column)]));
  threads.push(thread);
  at("asking").open = false;
  show(thread);
  for (const { readings } of thread.columns) readings[0].run();
  at("thread-title").focus({ preventScroll: matchMedia("(min-width: 821px)").matches });
}

function show(thread) {
  shown = thread;
  at("thread").hidden = false;
  at("room").classList.toggle("two", thread.columns.length > 1);
  at("thread-title").textContent = `Reading of ${thread.names.join(", ") || "no picture"}`;
  at("columns").replaceChildren(...thread.columns.map(column));
  at("columns").className = thread.columns.length > 1 ? "two" : "";
  pictures.boxes = thread.boxes;
  tellOthers();
  follow();
  history();
}

/** Tells of pictures in sight that the reading beside them is not of. */
function tellOthers() {
  const others = shown ? pictures.chosen.filter((picture) => !shown.pictures.includes(picture)) : [];
  at("elsewhere").hidden = !others.length;
  at("elsewhere").textContent = `In sight, but not read here: ${others.map(({ name, picture }) => name || picture).join(", ")}.`;
}

function column({ readings }, index) {
  const { server, body } = readings[0].request;
  const told = [server.model, about.servers.length > 1 ? server.name : "", body.mode ? titled(body.mode) : ""];
  if (body.seed != null) told.push(`seed ${body.seed}`);
  if (body.temperature != null) told.push(`temperature ${body.temperature}`);
  const name = make("p", { className: "of" }, told.filter(Boolean).join(" · "));
  const turns = readings.flatMap((reading, turn) =>
    turn ? [make("p", { className: "turn" }, reading.request.title), reading.element] : [reading.element],
  );
  return make("div", { className: "column", role: "group", "aria-label": `Reading ${index + 1}` }, name, ...turns);
}

/** The readings that can be gone on from, one a column; null where there is none. */
const lasts = (thread) =>
  thread.columns.map(({ readings }) => readings.findLast((reading) => reading.isWritten && !reading.isForgotten));

function follow() {
  const form = at("follow");
  form.hidden = !lasts(shown).some(Boolean);
  if (form.of !== shown) form.replaceChildren(...asking(form));
  form.of = shown;
  for (const each of form.querySelectorAll("button")) each.disabled = shown.isBusy;
}

function asking(form) {
  const { server } = shown.columns[0].readings[0].request;
  const takes = ({ images: [least, most] }) => shown.pictures.length >= least && shown.pictures.length <= most;
  const tasks = server.tasks.filter((task) => task.follow_up && takes(task));
  const chosen = tasks.map((task) => button(titled(task.name), () => goOn({ task }), { title: task.title }));
  const input = make("textarea", { rows: 2, maxLength: about.limits.question_chars, required: true });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.onsubmit = (event) => {
    event.preventDefault();
    const question = input.value.trim();
    if (!question || shown.isBusy) return;
    input.value = "";
    goOn({ question });
  };
  return [
    make("div", { className: "row", role: "group", "aria-label": "Follow-up tasks" }, ...chosen),
    make("label", { className: "field" }, "Follow-up question", input),
    make("button", { className: "primary" }, "Ask"),
  ];
}

function goOn({ task, question }) {
  const begun = [];
  for (const [index, before] of lasts(shown).entries()) {
    if (!before) continue;
    const { server, body } = before.request;
    const mode = server.modes.find((each) => each.name === body.mode && suits(each, task?.answer ?? "text"))?.name;
    const asked = { server: server.name, follow: before.name, mode, task: task?.name, question };
    const request = {
      title: task ? titled(task.name) : question,
      server,
      pictures: before.request.pictures,
      body: { ...asked, logprobs: body.logprobs, seed: body.seed, temperature: body.temperature },
    };
    const reading = started(request, index);
    shown.columns[index].readings.push(reading);
    begun.push(reading);
  }
  show(shown);
  for (const reading of begun) reading.run();
  begun[0]?.element.scrollIntoView({ block: "nearest" });
}

function history() {
  at("history").hidden = !threads.length;
  const time = (date) => date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  at("earlier").replaceChildren(
    ...threads.toReversed().map((thread) => {
      const turns = Math.max(...thread.columns.map(({ readings }) => readings.length)) - 1;
      const told = [
        time(thread.begun),
        thread.names.join(", "),
        turns ? `${turns} follow-up${turns > 1 ? "s" : ""}` : "",
        thread.isBusy ? "being written" : "",
        thread.isForgotten ? "of a session that ended" : "",
      ];
      const open = button(thread.title, () => again(thread));
      if (thread === shown) open.setAttribute("aria-current", "true");
      open.append(make("small", {}, told.filter(Boolean).join(" · ")));
      return make("li", {}, open);
    }),
  );
}

function again(thread) {
  if (!thread.isForgotten) pictures.roles = thread.roles;
  show(thread);
  at("thread-title").focus();
}

/** The server has let the session go. */
function over() {
  for (const thread of threads) {
    thread.isForgotten = true;
    for (const { readings } of thread.columns) for (const reading of readings) reading.forget();
  }
  pictures.clear();
  if (shown) follow();
  history();
  const hint = "Give the pictures again; what was read stays in sight, and can no longer be saved.";
  alarm({ code: "SESSION_OVER", message: "this session was ended by the server", hint });
}

async function renew() {
  try {
    about = await askAbout();
  } catch (error) {
    at("model").textContent = error.message;
    return setTimeout(renew, RENEW_MS);
  }
  const up = about.servers.filter((server) => server.up);
  const down = about.servers.filter((server) => !server.up).map((server) => server.name);
  at("notice").textContent = about.notice;
  at("logout").hidden = !about.login;
  at("version").textContent = about.version;
  at("terms").textContent = [...new Set(up.map((server) => server.terms))].filter(Boolean).join(" ");
  at("model").textContent = [up.map((server) => server.model).join(", "), down.length ? `not up: ${down.join(", ")}` : ""]
    .filter(Boolean)
    .join(" · ");
  pictures.most = Math.max(1, ...up.map((server) => server.max_images));
  pictures.mostBytes = about.limits.file_bytes;
  const told = JSON.stringify(about.servers);
  if (told !== known) ask.about = about;
  known = told;
  if (down.length) setTimeout(renew, RENEW_MS);
}

at("logout").addEventListener("submit", async (event) => {
  event.preventDefault();
  await session.close();
  event.target.submit();
});
addEventListener("pagehide", () => session.end());
addEventListener("pageshow", (event) => event.persisted && location.reload());
addEventListener("unhandledrejection", (event) =>
  alarm({ code: "PAGE", message: `the page failed: ${event.reason?.message ?? event.reason}`, hint: "Load it again." }),
);
history();
await renew();
say(at("model").textContent);
