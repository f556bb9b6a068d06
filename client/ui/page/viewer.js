// One picture on a canvas, with the boxes of readings on a second one above it: zoom, pan, greys.

import { button, make, refusal } from "./dom.js";

const BOX_COLORS = ["#ffd23f", "#4fd3ff"];
const LARGEST = 32;
const STEP = 1.25;
const SIDES = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
const NO_GREYS = { brightness: 1, contrast: 1 };

/** Where the picture's pixel (0, 0) is in the canvas, and how many CSS pixels one of its pixels takes. */
export function fitted(width, height, room) {
  const scale = Math.min(room.width / width, room.height / height);
  return { scale, x: (room.width - width * scale) / 2, y: (room.height - height * scale) / 2 };
}

export class Viewer {
  #image = null;
  #view = { scale: 1, x: 0, y: 0 };
  #isFitted = true;
  #pointers = new Map();
  #greys = { ...NO_GREYS };
  #boxes = [];
  #frame = 0;

  /** `picture` as the server tells it; `draw(preset)` gives its PNG. */
  constructor(picture, draw) {
    this.picture = picture;
    this.draw = draw;
    const keys = "Arrow keys move, + and - zoom, 0 fits, i inverts, b shows boxes.";
    this.canvas = make("canvas", {});
    this.marks = make("canvas", { tabIndex: 0, role: "img", "aria-label": `${picture.name || "Picture"}. ${keys}`, title: "" });
    this.said = make("div", { className: "said", role: "status" }, "Drawing …");
    this.stage = make("div", { className: "stage" }, this.canvas, this.marks, this.said);
    this.role = make("strong", {});
    this.caption = make("span", {});
    const caption = make("figcaption", {}, make("span", {}, this.role, " ", picture.name), this.caption);
    this.element = make("figure", { className: "pane" }, this.stage, caption, this.#tools());
    this.#listen();
    this.watch = new ResizeObserver(() => this.#resized());
    this.watch.observe(this.stage);
    this.show(picture.presets[0]?.name ?? "model");
  }

  close() {
    this.wanted = null;
    this.watch.disconnect();
    cancelAnimationFrame(this.#frame);
    this.#image?.close();
  }

  /** Boxes as the server tells them, with the `column` of their reading. */
  set boxes(boxes) {
    this.#boxes = boxes;
    this.boxButton.hidden = !boxes.length;
    this.#paint();
  }

  async show(preset) {
    this.wanted = preset;
    try {
      const image = await createImageBitmap(await this.draw(preset));
      if (this.wanted !== preset) return image.close();
      this.#image?.close();
      this.#image = image;
      for (const [name, chosen] of this.presetButtons) chosen.setAttribute("aria-pressed", name === preset);
      this.said.replaceChildren();
      this.#resized();
    } catch (error) {
      if (this.wanted === preset) this.said.replaceChildren(refusal(error));
    }
  }

  fit() {
    this.#isFitted = true;
    this.#resized();
  }

  /** Zoom by a factor around a point of the canvas, its middle if left out. */
  zoom(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    if (!this.#image) return;
    const least = fitted(this.#image.width, this.#image.height, this.#room()).scale / 2;
    const scale = Math.min(Math.max(this.#view.scale * factor, least), LARGEST);
    const by = scale / this.#view.scale;
    this.#set({ scale, x: x - (x - this.#view.x) * by, y: y - (y - this.#view.y) * by });
  }

  move(dx, dy) {
    this.#set({ ...this.#view, x: this.#view.x + dx, y: this.#view.y + dy });
  }

  #set(view) {
    this.#view = view;
    this.#isFitted = false;
    this.#touch();
    this.#paint();
  }

  #room() {
    return { width: this.stage.clientWidth, height: this.stage.clientHeight };
  }

  #resized() {
    const ratio = devicePixelRatio || 1;
    const { width, height } = this.#room();
    for (const canvas of [this.canvas, this.marks]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    if (this.#image && this.#isFitted) this.#view = fitted(this.#image.width, this.#image.height, { width, height });
    this.#touch();
    this.#paint();
  }

  /** A finger scrolls the page until the picture is zoomed. */
  #touch() {
    this.marks.style.touchAction = this.#isFitted && !this.greyButton.pressed ? "pan-y" : "none";
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => {
      this.#paintPicture();
      this.#paintBoxes();
    });
  }

  #paintPicture() {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.#image) return;
    const ratio = devicePixelRatio || 1;
    const { scale, x, y } = this.#view;
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.#image, 0, 0);
    const { brightness, contrast } = this.#greys;
    const inverted = this.invertButton.pressed ? " invert(1)" : "";
    this.canvas.style.filter = `contrast(${contrast}) brightness(${brightness})${inverted}`;
    this.caption.textContent = `${this.picture.width} × ${this.picture.height} px · ${Math.round(100 * scale)} %`;
  }

  #paintBoxes() {
    const context = this.marks.getContext("2d");
    const ratio = devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.marks.width, this.marks.height);
    if (!this.#image || !this.boxButton.pressed) return;
    const { scale, x, y } = this.#view;
    context.lineWidth = 2;
    context.font = "600 12px system-ui, sans-serif";
    for (const box of this.#boxes) {
      const color = BOX_COLORS[box.column];
      const [left, top] = [x + box.x0 * scale, y + box.y0 * scale];
      const [width, height] = [(box.x1 - box.x0) * scale, (box.y1 - box.y0) * scale];
      context.strokeStyle = color;
      context.setLineDash(box.column ? [6, 4] : []);
      context.strokeRect(left, top, width, height);
      const wide = context.measureText(box.label).width + 10;
      const above = top >= 18 ? top - 18 : top + height;
      context.fillStyle = color;
      const from = Math.max(Math.min(left - 1, this.stage.clientWidth - wide), 0);
      context.fillRect(from, above, wide, 18);
      context.fillStyle = "#1a1500";
      context.fillText(box.label, from + 5, above + 13);
    }
  }

  #tools() {
    const toggle = (text, pressed, changed) => {
      const made = button(text, () => {
        made.pressed = !made.pressed;
        made.setAttribute("aria-pressed", made.pressed);
        changed();
      });
      made.pressed = pressed;
      made.setAttribute("aria-pressed", pressed);
      return made;
    };
    const slider = (name, key) => {
      const input = make("input", { type: "range", min: 0.2, max: 3, step: 0.01, value: 1 });
      input.addEventListener("input", () => this.#setGreys({ [key]: Number(input.value) }));
      this.sliders[key] = input;
      return make("label", {}, `${name} `, input);
    };
    this.sliders = {};
    const shown = ({ name, title }) => [name, button(title, () => this.show(name), { "aria-pressed": false })];
    this.presetButtons = this.picture.presets.map(shown);
    this.invertButton = toggle("Invert", false, () => this.#paint());
    this.boxButton = toggle("Boxes", true, () => this.#paint());
    this.boxButton.hidden = true;
    this.greyButton = toggle("Drag for greys", false, () => this.#touch());
    const named = (text, name, click) => button(text, click, { "aria-label": name, title: name });
    const windows = make(
      "div",
      { role: "group", "aria-label": "Window" },
      ...this.presetButtons.map(([, chosen]) => chosen),
      this.invertButton,
      this.boxButton,
    );
    const zooms = make(
      "div",
      { role: "group", "aria-label": "Zoom" },
      named("−", "Zoom out", () => this.zoom(1 / STEP)),
      named("+", "Zoom in", () => this.zoom(STEP)),
      button("Fit", () => this.fit()),
    );
    const reset = button("Reset", () => this.#setGreys(NO_GREYS), { "aria-label": "Reset brightness and contrast" });
    const greys = make(
      "div",
      { role: "group", "aria-label": "Greys" },
      slider("Brightness", "brightness"),
      slider("Contrast", "contrast"),
      this.greyButton,
      reset,
    );
    return make("div", { className: "tools" }, windows, zooms, greys);
  }

  #setGreys(greys) {
    for (const [key, value] of Object.entries(greys)) {
      this.#greys[key] = Math.min(Math.max(value, 0.2), 3);
      this.sliders[key].value = this.#greys[key];
    }
    this.#paint();
  }

  #listen() {
    const { marks } = this;
    const where = (event) => {
      const box = marks.getBoundingClientRect();
      return { x: event.clientX - box.left, y: event.clientY - box.top };
    };
    marks.addEventListener(
      "wheel",
      (event) => {
        event.preventDefault();
        const { x, y } = where(event);
        this.zoom(Math.exp(-Math.max(-300, Math.min(300, event.deltaY)) / 400), x, y);
      },
      { passive: false },
    );
    marks.addEventListener("contextmenu", (event) => event.preventDefault());
    marks.addEventListener("dblclick", () => this.fit());
    marks.addEventListener("pointerdown", (event) => {
      marks.setPointerCapture(event.pointerId);
      this.#pointers.set(event.pointerId, where(event));
    });
    for (const end of ["pointerup", "pointercancel"])
      marks.addEventListener(end, (event) => this.#pointers.delete(event.pointerId));
    marks.addEventListener("pointermove", (event) => this.#dragged(event, where(event)));
    marks.addEventListener("keydown", (event) => this.#key(event));
  }

  #dragged(event, now) {
    const before = this.#pointers.get(event.pointerId);
    if (!before) return;
    const other = [...this.#pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.#pointers.set(event.pointerId, now);
    const [dx, dy] = [now.x - before.x, now.y - before.y];
    if (other) {
      const apart = (point) => Math.hypot(point.x - other.x, point.y - other.y) || 1;
      this.zoom(apart(now) / apart(before), (now.x + other.x) / 2, (now.y + other.y) / 2);
      this.move(dx / 2, dy / 2);
    } else if (this.greyButton.pressed || event.buttons === 2) {
      this.#setGreys({ contrast: this.#greys.contrast + dx / 200, brightness: this.#greys.brightness - dy / 200 });
    } else if (event.pointerType !== "touch" || !this.#isFitted) {
      this.move(dx, dy);
    }
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      "+": () => this.zoom(STEP),
      "=": () => this.zoom(STEP),
      "-": () => this.zoom(1 / STEP),
      0: () => this.fit(),
      i: () => this.invertButton.click(),
      b: () => this.boxButton.click(),
    };
    const act = SIDES[event.key] ? () => this.move(...SIDES[event.key]) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }
}
