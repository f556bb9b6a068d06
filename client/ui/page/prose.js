// A model's text: paragraphs, what stood in **, and how uncertain its words were.

import { make } from "./dom.js";

/** A word is shaded once more for each of these that its probability is below. */
const SHADES = [0.9, 0.5, 0.2];
const WORD = /\*\*|\s+|(?:(?!\*\*)\S)+/g;

/** Paragraphs of a text, with its bold runs. */
export function prose(text) {
  const paragraphs = text
    .split(/\n\s*\n/)
    .map((block) => block.trim())
    .filter(Boolean);
  return make("div", { className: "prose" }, ...paragraphs.map((block) => make("p", {}, ...runs(block))));
}

const runs = (block) => block.split(/\*\*(.+?)\*\*/s).map((run, i) => (i % 2 ? make("strong", {}, run) : run));

/** The reasoning of a reading with its uncertain words shaded; null where the reading does not say how likely they were. */
export function shaded(reading) {
  const { text, reasoning, token_logprobs: logprobs, token_ends: ends } = reading;
  const begin = reasoning && logprobs ? text.indexOf(reasoning) : -1;
  if (begin < 0) return null;
  const place = make("p");
  let at = codePoints(text.slice(0, begin));
  let isBold = false;
  for (const [word] of reasoning.matchAll(WORD)) {
    const start = at;
    at += codePoints(word);
    if (word === "**") isBold = !isBold;
    else place.append(piece(word, /\s/.test(word) ? 1 : likelihood(logprobs, ends, start, at), isBold));
  }
  place.normalize();
  const marks = SHADES.map((limit, i) => make("mark", { className: `shade${i + 1}` }, `${100 * limit} %`));
  const key = make(
    "p",
    { className: "shades" },
    "Shaded are words that the model itself found less than ",
    marks[0],
    ", ",
    marks[1],
    " and ",
    marks[2],
    " likely where it wrote them. That is not how likely they are to be true.",
  );
  return make("div", {}, make("div", { className: "prose" }, place), key);
}

function piece(word, likely, isBold) {
  const shade = SHADES.filter((limit) => likely < limit).length;
  const told = `${Math.round(100 * likely)} % likely to the model`;
  const marked = shade ? make("mark", { className: `shade${shade}`, title: told }, word) : document.createTextNode(word);
  return isBold ? make("strong", {}, marked) : marked;
}

/** A word is as likely as all its tokens together. */
function likelihood(logprobs, ends, start, stop) {
  let sum = 0;
  for (let i = 0; i < ends.length; i++) {
    const from = i ? ends[i - 1] : 0;
    if (ends[i] > start && from < stop) sum += logprobs[i];
  }
  return Math.exp(sum);
}

const codePoints = (text) => [...text].length;

/** Gives whole sentences of a text that comes in pieces, for whoever listens to it. */
export class Sentences {
  #rest = "";

  constructor(tell) {
    this.tell = tell;
  }

  push(text) {
    const parts = (this.#rest + text).split(/(?<=[.!?:]["”)]?)\s+|\n+/);
    this.#rest = parts.pop();
    for (const part of parts) this.#tell(part);
  }

  finish() {
    this.#tell(this.#rest);
    this.#rest = "";
  }

  #tell(sentence) {
    const said = sentence.replaceAll("**", "").trim();
    if (said) this.tell(said);
  }
}
