// The form that a reading is asked for with: server, task, mode, question, and a second one beside it.

import { at, check, choice, make, titled } from "./dom.js";

const OWN = "own question";
const SCORED = ["labels", "option"];
/** How the tokens of an answer are chosen: keys of the request, what each is called, and the attributes of its input. */
const SAMPLING = {
  seed: ["Seed", { min: 0, step: 1 }],
  temperature: ["Temperature", { min: 0, max: 5, step: "any" }],
  max_tokens: ["Most tokens", { min: 1, step: 1 }],
};

/** One choice of server, task, mode and sampling; `id` tells the names of its inputs apart. */
class Choice {
  constructor(id, about, count, changed) {
    Object.assign(this, { id, about, count, changed, task: null, mode: null, values: new Map() });
    this.element = make("div", { className: "asked-of" });
    this.sampling = Object.entries(SAMPLING).map(([key, [, bounds]]) => [key, make("input", { type: "number", ...bounds })]);
    const labels = this.sampling.map(([key, input]) => make("label", {}, `${SAMPLING[key][0]} `, input));
    this.fold = make("details", {}, make("summary", {}, "Sampling"), make("div", { className: "numbers" }, ...labels));
    // a browser points at nothing that is folded away, and sends nothing either
    this.fold.addEventListener("invalid", () => (this.fold.open = true), true);
    this.server = about.servers.find((server) => server.up)?.name;
    this.render();
  }

  get served() {
    return this.about.servers.find((server) => server.name === this.server);
  }

  /** The task as the server tells it; null for an own question. */
  get chosen() {
    return this.served?.tasks.find((task) => task.name === this.task) ?? null;
  }

  get title() {
    return this.chosen ? titled(this.task) : "Own question";
  }

  get canScore() {
    return SCORED.includes(this.chosen?.answer);
  }

  /** The request's part that is chosen here. */
  get body() {
    const { chosen } = this;
    const sampling = this.sampling.map(([key, input]) => [key, input.value === "" ? null : Number(input.value)]);
    const named = { server: this.server, mode: this.mode, ...Object.fromEntries(sampling) };
    if (!chosen) return { ...named, question: this.values.get(OWN) ?? "" };
    const variables = Object.fromEntries(chosen.variables.map((name) => [name, this.#value(name)]));
    return { ...named, task: chosen.name, variables: chosen.variables.length ? variables : null };
  }

  /** It can be asked of the pictures there are. */
  get isReady() {
    return Boolean(this.served?.up) && (!this.chosen || this.#takes(this.chosen, this.count));
  }

  #takes(task, count) {
    return count >= (task.images?.[0] ?? 0) && count <= (task.images?.[1] ?? this.served.max_images);
  }

  #value(name) {
    const text = this.values.get(name) ?? "";
    return name === "options"
      ? text
          .split("\n")
          .map((line) => line.trim())
          .filter(Boolean)
      : text;
  }

  render() {
    const { served } = this;
    if (!served?.up) return this.element.replaceChildren(make("p", { className: "none" }, "No model's server is up."));
    const tasks = served.tasks.filter((task) => !task.follow_up);
    const takes = (task) => this.#takes(task, this.count) || (!this.count && this.#takes(task, 1));
    const fitting = tasks.filter(takes);
    if (this.task !== OWN && !fitting.some((task) => task.name === this.task)) {
      this.task = (fitting.find((task) => task.name === served.default_task) ?? fitting[0])?.name ?? OWN;
    }
    const modes = served.modes.filter((mode) => suits(mode, this.chosen?.answer ?? "text"));
    if (!modes.some((mode) => mode.name === this.mode)) {
      this.mode = (modes.find((mode) => mode.name === served.default_mode) ?? modes[0])?.name ?? null;
    }
    this.element.replaceChildren(...this.#parts(served, tasks, takes, modes).filter(Boolean));
  }

  #parts(served, tasks, takes, modes) {
    const pick = (key) => (event) => {
      this[key] = event.target.value;
      this.render();
      at(event.target.id)?.focus();
      this.changed();
    };
    const group = (key, legend, choices) => make("fieldset", { className: "choices" }, make("legend", {}, legend), ...choices);
    const one = (key, value, text, options = {}) =>
      choice(`${this.id}-${key}`, value, text, { checked: this[key] === value, change: pick(key), ...options });
    const up = this.about.servers.filter((server) => server.up);
    const unfit = tasks.filter((task) => !takes(task)).length;
    const chosen = [
      ...tasks.filter(takes).map((task) => one("task", task.name, titled(task.name), { title: task.title })),
      one("task", OWN, "Own question"),
    ];
    const told = this.chosen?.title ?? "";
    return [
      up.length > 1 &&
        group(
          "server",
          "Server",
          up.map((server) => one("server", server.name, `${server.model} (${server.name})`)),
        ),
      group("task", "Task", chosen),
      told && make("p", { className: "told" }, told),
      unfit > 0 && make("p", { className: "told" }, `${unfit} more for another number of pictures: ${this.count} now.`),
      ...this.#inputs(),
      modes.length > 1 &&
        group(
          "mode",
          "Mode",
          modes.map((mode) => one("mode", mode.name, titled(mode.name), { title: mode.title })),
        ),
      this.fold,
    ];
  }

  #inputs() {
    const { chosen } = this;
    const names = chosen ? chosen.variables : [OWN];
    return names.map((name) => {
      const label = name === "options" ? "Options, one a line" : titled(name);
      const isLong = name === OWN || name === "options";
      const properties = { value: this.values.get(name) ?? "", required: true, maxLength: this.about.limits.question_chars };
      const input = make(isLong ? "textarea" : "input", {
        ...properties,
        on: { input: () => this.values.set(name, input.value) },
      });
      return make("label", { className: "field" }, label, input);
    });
  }
}

/** Whether a mode is for a kind of answer. */
export const suits = (mode, answer) => !mode.answers?.length || mode.answers.includes(answer);

export class Ask {
  #choices = [];
  #count = 0;

  /** `asked` gets the bodies of one or two readings, and a title of each. */
  constructor(asked) {
    this.asked = asked;
    this.compare = check("Compare two, side by side", { change: () => this.#render() });
    this.scores = check("How sure it is of each finding", {});
    this.logprobs = check("Shade uncertain words", {});
    this.submit = make("button", { className: "primary" }, "Read");
    this.need = make("span", { className: "none" });
    at("question").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
  }

  set about(about) {
    const kept = this.#choices;
    this.#choices = [0, 1].map((i) => new Choice(`ask${i}`, about, this.#count, () => this.#changed()));
    for (const [i, before] of kept.entries()) {
      Object.assign(this.#choices[i], { task: before.task, mode: before.mode, values: before.values });
      for (const [key, [, input]] of before.sampling.entries()) this.#choices[i].sampling[key][1].value = input.value;
      if (about.servers.some((server) => server.name === before.server && server.up)) this.#choices[i].server = before.server;
      this.#choices[i].render();
    }
    if (!kept.length) this.#differ(about);
    this.#render();
  }

  /** How many pictures are to be read. */
  set count(count) {
    this.#count = count;
    for (const each of this.#choices) {
      each.count = count;
      each.render();
    }
    this.#changed();
  }

  /** The second one is another server, else another mode. */
  #differ(about) {
    const second = this.#choices[1];
    const up = about.servers.filter((server) => server.up);
    if (up.length > 1) second.server = up[1].name;
    else if (up.length) second.mode = up[0].modes.find((mode) => mode.name !== up[0].default_mode)?.name ?? null;
    second.render();
  }

  #changed() {
    const chosen = this.compare.input.checked ? this.#choices : this.#choices.slice(0, 1);
    this.scores.input.disabled = !chosen.some((each) => each.canScore);
    this.submit.disabled = !chosen.every((each) => each.isReady);
    this.need.textContent = this.submit.disabled && !this.#count ? "Give a picture first." : "";
  }

  #render() {
    const isTwo = this.compare.input.checked;
    const more = make(
      "details",
      {},
      make("summary", {}, "More"),
      this.scores.label,
      this.logprobs.label,
    );
    more.open = this.isOpen ?? false;
    more.addEventListener("toggle", () => (this.isOpen = more.open));
    const beside = make("fieldset", { className: "beside" }, make("legend", {}, "Beside it"), this.#choices[1].element);
    const rows = make("div", { className: "row" }, this.submit, this.need, this.compare.label);
    at("question").replaceChildren(this.#choices[0].element, ...(isTwo ? [beside] : []), more, rows);
    this.#changed();
  }

  #send() {
    const chosen = this.compare.input.checked ? this.#choices : this.#choices.slice(0, 1);
    this.asked(
      chosen.map((each) => ({
        title: each.chosen ? each.title : each.body.question,
        server: each.served,
        body: {
          ...each.body,
          scores: this.scores.input.checked && each.canScore ? true : null,
          logprobs: this.logprobs.input.checked ? true : null,
        },
      })),
    );
  }
}
