// Elements made of tags, properties and texts; a text is never taken for markup.

const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/** A text without what would steer the page around it. */
export const harmless = (text) => String(text).replace(STEERING, "\ufffd");

/** An element; `properties` with a dash are attributes, `on` holds its listeners; children are elements or texts. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "on") for (const [event, listen] of Object.entries(value)) element.addEventListener(event, listen);
    else if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : harmless(child))));
  return element;
}

export const at = (id) => document.getElementById(id);

export const button = (text, click, properties = {}) => make("button", { type: "button", on: { click }, ...properties }, text);

/** One of several, drawn as a button. */
export function choice(group, value, text, { checked = false, disabled = false, title = "", change = () => {} } = {}) {
  const id = `${group}-${value}`;
  const input = make("input", { type: "radio", className: "unseen", name: group, id, value, checked, disabled, on: { change } });
  return make("span", { className: "choice" }, input, make("label", { htmlFor: id, title }, text));
}

export function check(text, { checked = false, change = () => {} } = {}) {
  const input = make("input", { type: "checkbox", checked, on: { change } });
  return { input, label: make("label", { className: "check" }, input, ` ${text}`) };
}

/** A name of the profile as a title. */
export const titled = (name) => {
  const words = name.replaceAll("_", " ");
  return words.charAt(0).toUpperCase() + words.slice(1);
};

/** Refusal or failure in plain words, the code small beside it. */
export function refusal({ code, message, hint }) {
  const said = message ? message.charAt(0).toUpperCase() + message.slice(1) : "That did not work";
  return make(
    "p",
    { className: "refusal" },
    `${said}${/[.!?]$/.test(said) ? "" : "."} `,
    hint ? `${hint} ` : null,
    make("small", {}, code ?? ""),
  );
}

/** Reads a text aloud where somebody listens. */
export function say(text) {
  const told = make("p", {}, text);
  const place = at("say");
  place.append(told);
  while (place.childElementCount > 6) place.firstChild.remove();
}

/** Tells of a failure in sight of whatever is done; that the session is over is told once, where it is noticed. */
export function alarm(error) {
  if (error.isOver) return;
  const close = button("Close", () => at("alarm").replaceChildren(), { className: "small" });
  at("alarm").replaceChildren(make("div", {}, refusal(error), close));
}
