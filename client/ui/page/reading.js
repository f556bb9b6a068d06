// One reading as a card: its text as it comes, then what was found, its flags, and its files.

import { alarm, button, harmless, make, refusal, say, titled } from "./dom.js";
import { flagList } from "./pictures.js";
import { Sentences, prose, shaded } from "./prose.js";

const STATUSES = {
  ok: "Well formed",
  malformed: "Malformed: a part of the expected form is missing, so an empty list of findings does not mean none",
  truncated: "Not written to its end",
  out_of_vocabulary: "Lists labels that the model was not trained to give",
  doubtful_image: "Of a doubtful picture: it may be damaged, no chest, or of a view new to the model",
};
const FILES = { page: "Page", json: "JSON", sr: "DICOM SR" };
/** Log-odds nearer to 0 are less than 3 to 1. */
const UNSURE = Math.log(3);
const SCORE_LIMIT = 15;

export class Reading {
  done = null;
  boxes = [];
  name = null;

  /**
   * `request` has the title, server, pictures and body that were asked; `isShown` tells whether the reading is in sight,
   * `speaks` whether its text is then read aloud where somebody listens.
   * `changed` is called when it ends, and when its boxes are to be shown.
   */
  constructor(request, session, { speaks, isShown, exports, changed }) {
    Object.assign(this, { request, session, speaks, isShown, exports, changed });
    this.begun = new Date();
    this.state = make("span", { className: "state" }, "Waiting …");
    this.stopButton = button("Stop", () => this.#stop(), { className: "stop" });
    this.reasoning = make("div", { className: "prose" });
    this.answer = make("div", { className: "answer" });
    this.fold = make(
      "details",
      { className: "reasoning", open: true, hidden: true },
      make("summary", {}, "Reasoning"),
      this.reasoning,
    );
    this.rest = make("div", { className: "rest" });
    const head = make("header", {}, make("h3", {}, request.title), this.state, this.stopButton);
    this.element = make("article", { "aria-busy": "true", "aria-label": request.title }, head, this.fold, this.answer, this.rest);
  }

  get isWritten() {
    return this.done?.finish_reason === "stop" || this.done?.finish_reason === "length";
  }

  get isBusy() {
    return this.element.hasAttribute("aria-busy");
  }

  async run() {
    this.sentences = new Sentences((text) => this.speaks && this.isShown(this) && say(text));
    const { body, pictures } = this.request;
    try {
      for await (const line of this.session.read({ ...body, pictures: pictures.map(({ picture }) => picture) })) this.#hear(line);
      if (this.isBusy) this.#fail({ code: "BROKEN", message: "the reading broke off", hint: "Ask again." });
    } catch (error) {
      this.#fail(error);
    }
    this.changed(this);
  }

  #hear(line) {
    const hear = {
      started: () => this.#started(line.reading),
      waiting: () => this.#tell(`Waiting since ${Math.round((Date.now() - this.begun) / 1000)} s …`),
      text: () => this.#write(line),
      done: () => this.#complete(line),
      stopped: () => this.#complete(line, true),
      error: () => this.#fail(line),
    };
    hear[line.type]?.();
  }

  #started(name) {
    this.name = name;
    if (this.stopButton.disabled && !this.isForgotten) this.#stop();
  }

  #tell(state) {
    this.state.textContent = state;
  }

  #write({ part, text }) {
    this.#tell("Writing …");
    const place = part === "reasoning" ? this.reasoning : this.answer;
    if (part === "reasoning") this.fold.hidden = false;
    else if (!place.lastChild) this.sentences.finish();
    if (!place.lastChild) place.append(make("p", { className: "coming" }));
    place.lastChild.append(harmless(text));
    this.sentences.push(text);
  }

  #end(state) {
    this.sentences.finish();
    this.element.removeAttribute("aria-busy");
    this.stopButton.remove();
    this.#tell(state);
  }

  #fail(error) {
    this.#end("Failed");
    this.state.classList.add("bad");
    this.rest.replaceChildren(refusal(error));
    this.#announce(error.message);
  }

  #complete({ reading, flags, boxes, presence }, isStopped = false) {
    const isGood = reading?.status === "ok";
    this.#end(isStopped ? "Stopped" : isGood ? "Complete" : titled(reading.status));
    this.state.classList.add(isGood ? "ok" : "bad");
    if (!reading) return this.rest.replaceChildren(make("p", { className: "none" }, "Stopped before the first word."));
    this.done = reading;
    const { pictures } = this.request;
    if (!this.isForgotten) this.boxes = boxes.map((box) => ({ ...box, picture: pictures.find(({ picture }) => picture === box.picture) }));
    if (reading.reasoning) {
      this.fold.hidden = false;
      this.reasoning.replaceChildren(...(shaded(reading) ?? prose(reading.reasoning)).childNodes);
    }
    this.answer.replaceChildren(...this.#answered(reading, presence ?? {}, isStopped));
    this.rest.replaceChildren(
      ...[
        !isGood && !isStopped ? make("p", { className: "why" }, `${STATUSES[reading.status] ?? reading.status}.`) : null,
        flags.length ? flagList(flags) : null,
        this.#boxList(boxes),
        bars(reading.scores),
        facts(reading),
        this.isForgotten ? null : this.#files(isStopped),
        make("p", { className: "research" }, reading.notice),
      ].filter(Boolean),
    );
    this.#announce(`${this.state.textContent}.`);
  }

  /** How it ended, for whoever listens; they must not take it for the end of another one that they are at. */
  #announce(said) {
    const { title, pictures } = this.request;
    const which = this.isShown(this) ? title : `Another reading, of ${pictures.map(({ name }) => name).join(", ") || "no picture"}, ${title}`;
    say(`${which}: ${said}`);
  }

  #answered(reading, presence, isStopped) {
    const chips = reading.findings.map(({ label, score }) => chip(label, "present", score));
    const found = new Set(reading.findings.map(({ label }) => label));
    const absent = Object.entries(presence).filter(([label, state]) => state === "absent" && !found.has(label));
    const others = absent.map(([label]) => chip(label, "absent", reading.scores?.[label]));
    chips.push(...reading.unknown_labels.map((label) => chip(label, "not in the vocabulary")));
    chips.push(...reading.options.map((option) => chip(option, "", reading.scores?.[option])));
    const unsure = others.filter((each) => each.classList.contains("uncertain"));
    const sure = others.filter((each) => !each.classList.contains("uncertain"));
    const list = (some, label) => make("ul", { className: "chips", "aria-label": label }, ...some);
    if (chips.length) {
      const isLetter = reading.options.length && reading.answer && reading.answer !== reading.options.join(", ");
      return [
        list([...chips, ...unsure], "Findings"),
        isLetter ? prose(reading.answer) : null,
        sure.length
          ? make(
              "details",
              {},
              make("summary", {}, `${sure.length} absent, as the model does not list them`),
              list(sure, "Absent"),
            )
          : null,
      ].filter(Boolean);
    }
    if (reading.boxes.length) return [];
    if (reading.answer) return [prose(reading.answer)];
    return [
      make("p", { className: "none" }, isStopped ? "Stopped before its answer." : "The model gave no answer that could be read."),
      ...(reading.reasoning ? [] : [prose(reading.text)]),
    ];
  }

  #boxList(boxes) {
    if (!boxes.length) return null;
    const corner = (box) => [box.x0, box.y0, box.x1, box.y1].map(Math.round).join(", ");
    const items = boxes.map((box) => make("li", {}, make("strong", {}, box.label), ` ${corner(box)} px `));
    this.boxButton = this.isForgotten ? null : button("Show these boxes", () => this.changed(this, true), { className: "small" });
    return make("div", { className: "boxes" }, make("ul", { "aria-label": "Boxes: left, top, right, bottom" }, ...items), this.boxButton);
  }

  #files(isStopped) {
    const kinds = this.exports.filter((kind) => !(isStopped && kind === "sr"));
    const save = (kind) =>
      button(FILES[kind] ?? kind, () => this.#save(kind), { "aria-label": `Save as ${FILES[kind] ?? kind}` });
    this.files = make(
      "div",
      { className: "files", role: "group", "aria-label": "Save" },
      make("span", {}, "Save "),
      ...kinds.map(save),
    );
    return this.files;
  }

  async #save(kind) {
    try {
      const { blob, name } = await this.session.save(this.name, kind);
      const link = make("a", { href: URL.createObjectURL(blob), download: name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      say(`${name} was saved.`);
    } catch (error) {
      alarm(error);
    }
  }

  async #stop() {
    this.stopButton.disabled = true;
    try {
      if (this.name) await this.session.stop(this.name);
    } catch (error) {
      alarm(error);
    }
  }

  /** The server has forgotten it: its text stays; its name, and those of its pictures, may soon be those of others. */
  forget() {
    this.isForgotten = true;
    this.boxes = [];
    for (const each of [this.files, this.boxButton, this.stopButton]) each?.remove();
  }
}

function chip(label, state, score) {
  const isUnsure = score !== undefined && Math.abs(score) < UNSURE;
  const told = [isUnsure ? `${state || "chosen"}, uncertain` : state, score === undefined ? "" : signed(score)].filter(Boolean);
  const className = isUnsure ? "uncertain" : state === "not in the vocabulary" ? "unknown" : state;
  return make("li", { className }, label, told.length ? make("small", {}, told.join(" · ")) : null);
}

const signed = (score) => `${score < 0 ? "−" : "+"}${Math.abs(score).toFixed(1)}`;

/** A bar for each label from the middle on, the likeliest first. */
function bars(scores) {
  if (!scores) return null;
  const rows = Object.entries(scores)
    .sort(([, a], [, b]) => b - a)
    .map(([name, score]) => {
      const bar = make("i");
      const length = (50 * Math.min(Math.abs(score), SCORE_LIMIT)) / SCORE_LIMIT;
      bar.style.width = `${Math.max(length, 0.3)}%`;
      bar.style.marginLeft = `${score < 0 ? 50 - length : 50}%`;
      return make("div", {}, make("dt", {}, name), make("dd", {}, bar), make("dd", {}, signed(score)));
    });
  const told =
    "Log-odds of the answer with each and without it, given the reasoning that was written, from −15 to 15. Uncertain is what is under 3 to 1. Not calibrated, and no probability of a disease.";
  return make(
    "details",
    { className: "scores" },
    make("summary", {}, "How sure the model is"),
    make("dl", { className: "bars" }, ...rows),
    make("p", { className: "told" }, told),
  );
}

function facts({ model, usage, timings_ms: times, finish_reason: finish }) {
  const total = times?.total ? `${(times.total / 1000).toFixed(1)} s` : "";
  const tokens = usage?.completion_tokens ? `${usage.completion_tokens} tokens` : "";
  const cut = finish === "length" ? "cut at the token limit" : "";
  return make(
    "p",
    { className: "facts" },
    [model.title ?? model.profile, model.precision, model.engine, tokens, total, cut].filter(Boolean).join(" · "),
  );
}
