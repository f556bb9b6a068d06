// The session's pictures: taken in, marked as current or prior, shown in panes.

import { alarm, at, button, choice, make, refusal, say } from "./dom.js";
import { Viewer } from "./viewer.js";

const ROLES = { current: "Current", prior: "Prior", out: "Leave out" };

export class Pictures {
  #all = [];
  #viewers = new Map();
  #boxes = [];

  /** `changed` is called when other pictures are to be read. */
  constructor(session, changed) {
    Object.assign(this, { session, changed, most: 1, mostBytes: Infinity });
    const drop = document.body;
    at("files").addEventListener("change", (event) => {
      this.take([...event.target.files]);
      event.target.value = "";
    });
    drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      at("drop").classList.add("over");
    });
    drop.addEventListener("dragleave", () => at("drop").classList.remove("over"));
    drop.addEventListener("drop", (event) => {
      event.preventDefault();
      at("drop").classList.remove("over");
      this.take([...event.dataTransfer.files]);
    });
    document.addEventListener("paste", (event) => {
      if (event.clipboardData.files.length) this.take([...event.clipboardData.files]);
    });
  }

  /** Those to be read, prior ones first. */
  get chosen() {
    const of = (role) => this.#all.filter((picture) => picture.role === role);
    return [...of("prior"), ...of("current")];
  }

  /** As what each is read. */
  get roles() {
    return new Map(this.#all.map((picture) => [picture, picture.role]));
  }

  set roles(roles) {
    for (const picture of this.#all) picture.role = roles.get(picture) ?? "out";
    this.#show();
  }

  /** Boxes to be drawn, each on its `picture`. */
  set boxes(boxes) {
    this.#boxes = boxes;
    for (const [picture, viewer] of this.#viewers) viewer.boxes = boxes.filter((box) => box.picture === picture);
  }

  async take(files) {
    for (const file of files) {
      const line = make("p", {}, `Taking in ${file.name} …`);
      at("coming").append(line);
      try {
        this.#add(await this.#given(file));
        line.remove();
      } catch (error) {
        const shown = make("div", { className: "refused" }, make("strong", {}, file.name), refusal(error));
        shown.append(button("Close", () => shown.remove(), { className: "small" }));
        line.replaceWith(shown);
      }
    }
  }

  /** None any more: the server has forgotten them. */
  clear() {
    this.#all = [];
    this.#boxes = [];
    this.#show();
  }

  async #given(file) {
    if (file.size > this.mostBytes) {
      const message = `it has ${file.size} bytes, allowed ${this.mostBytes}`;
      throw { code: "LIMIT_EXCEEDED", message, hint: "Give a smaller file." };
    }
    return this.session.give(file);
  }

  #add(picture) {
    const used = this.chosen;
    picture.role = used.some((each) => each.role === "current") ? "prior" : "current";
    if (used.length >= this.most) {
      picture.role = "current";
      for (const each of used) each.role = "out";
    }
    this.#all.push(picture);
    this.#show();
    say(`${picture.name}: ${picture.width} by ${picture.height} pixels, ${ROLES[picture.role]}.`);
  }

  async #remove(picture) {
    try {
      await this.session.remove(picture.picture);
    } catch (error) {
      if (error.status !== 404) return alarm(error);
    }
    this.#all = this.#all.filter((each) => each !== picture);
    this.#show();
    at("files").focus();
  }

  #show() {
    const used = this.chosen;
    for (const [picture, viewer] of this.#viewers) {
      if (used.includes(picture)) continue;
      viewer.close();
      viewer.element.remove();
      this.#viewers.delete(picture);
    }
    for (const picture of used) {
      if (!this.#viewers.has(picture)) {
        this.#viewers.set(picture, new Viewer(picture, (preset) => this.session.draw(picture.picture, preset)));
      }
      const viewer = this.#viewers.get(picture);
      viewer.role.textContent = used.length > 1 ? ROLES[picture.role] : "";
      at("panes").append(viewer.element);
    }
    at("panes").className = used.length > 1 ? "several" : "";
    at("strip").replaceChildren(...this.#all.map((picture) => this.#item(picture)));
    this.boxes = this.#boxes;
    this.changed();
  }

  #item(picture) {
    const roles = Object.entries(ROLES).map(([role, text]) =>
      choice(`role-${picture.picture}`, role, text, { checked: picture.role === role, change: () => this.#mark(picture, role) }),
    );
    const facts = [picture.kind.toUpperCase(), `${picture.width} × ${picture.height} px`, picture.view]
      .filter(Boolean)
      .join(" · ");
    const group = make(
      "fieldset",
      { className: "choices" },
      make("legend", { className: "unseen" }, `${picture.name} is`),
      ...roles,
    );
    const remove = button("Remove", () => this.#remove(picture), { className: "small", "aria-label": `Remove ${picture.name}` });
    const name = make(
      "div",
      { className: "name" },
      make("strong", {}, picture.name || picture.picture),
      make("small", {}, facts),
    );
    return make("li", {}, name, group, remove, flagList(picture.flags));
  }

  #mark(picture, role) {
    picture.role = role;
    this.#show();
    at(`role-${picture.picture}-${role}`)?.focus();
  }
}

/** Flags in plain words, doubtful ones first and in sight, the others folded. */
export function flagList(flags) {
  const item = (flag) =>
    make("li", {}, flag.text.charAt(0).toUpperCase() + flag.text.slice(1), " ", make("small", {}, flag.code));
  const list = (some, className) => make("ul", { className }, ...some.map(item));
  const doubtful = flags.filter((flag) => flag.doubtful);
  const others = flags.filter((flag) => !flag.doubtful);
  const place = make("div", { className: "flagged" });
  if (doubtful.length) place.append(list(doubtful, "flags why"));
  if (others.length) {
    const count = others.length === 1 ? "1 remark" : `${others.length} remarks`;
    place.append(make("details", {}, make("summary", {}, count), list(others, "flags")));
  }
  return place;
}
