// What the page asks of its server, and the session that it is asked in.

/** A request that failed: `code`, `message` and `hint` as the server tells them. */
export class Failure extends Error {
  constructor({ code = "FAILED", message = "that did not work", hint = "" } = {}, status = 0) {
    super(message);
    Object.assign(this, { code, hint, status });
  }

  get isOver() {
    return this.status === 404 && this.message.startsWith("the session is over");
  }
}

const UNREACHED = {
  code: "UNREACHED",
  message: "this page's server cannot be reached",
  hint: "See whether it runs, then try again.",
};
const JSON_TYPE = { "Content-Type": "application/json" };

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, { redirect: "error", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(UNREACHED);
  }
  if (answer.ok) return answer;
  if (answer.status === 401) location.assign("/login");
  let told;
  try {
    told = (await answer.json()).error;
  } catch {
    told = { code: `HTTP ${answer.status}`, message: "the server gave no reason" };
  }
  throw new Failure(told, answer.status);
}

export const about = async () => (await ask("/api/about")).json();

/** A session of the server, opened when first needed. */
export class Session {
  #opening = null;
  #name = null;

  /** `ended` is called when the server has let it go. */
  constructor(ended) {
    this.ended = ended;
  }

  async #path(rest) {
    this.#opening ??= ask("/api/sessions", { method: "POST", headers: JSON_TYPE, body: "{}" }).then((answer) => answer.json());
    try {
      this.#name = (await this.#opening).session;
    } catch (error) {
      this.#opening = null;
      throw error;
    }
    return `/api/sessions/${encodeURIComponent(this.#name)}${rest}`;
  }

  async #ask(rest, options) {
    try {
      return await ask(await this.#path(rest), options);
    } catch (error) {
      if (error.isOver && this.#name) {
        this.#opening = this.#name = null;
        this.ended();
      }
      throw error;
    }
  }

  /** What the server tells of a file; where it has let the session go, the file is the first one of a new session. */
  async give(file) {
    const headers = { "Content-Type": "application/octet-stream", "X-File-Name": encodeURIComponent(file.name) };
    const send = () => this.#ask("/pictures", { method: "POST", headers, body: file });
    const answer = await send().catch((error) => {
      if (error.isOver) return send();
      throw error;
    });
    return answer.json();
  }

  remove(picture) {
    return this.#ask(`/pictures/${picture}`, { method: "DELETE" });
  }

  async draw(picture, preset) {
    return (await this.#ask(`/pictures/${picture}.png?preset=${encodeURIComponent(preset)}`)).blob();
  }

  /** The lines of a reading as they come. */
  async *read(body) {
    const answer = await this.#ask("/readings", { method: "POST", headers: JSON_TYPE, body: JSON.stringify(body) });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch {
        throw new Failure({
          code: "BROKEN",
          message: "the connection broke off before the reading was complete",
          hint: "Ask again.",
        });
      }
      if (piece.done) return;
      const lines = (rest + piece.value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line) yield JSON.parse(line);
    }
  }

  stop(reading) {
    return this.#ask(`/readings/${reading}/stop`, { method: "POST" });
  }

  /** The file of a reading, and what it is called. */
  async save(reading, kind) {
    const answer = await this.#ask(`/readings/${reading}/export?as=${kind}`);
    const named = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "");
    return { blob: await answer.blob(), name: named?.[1] ?? `${reading}.${kind}` };
  }

  /** Lets the server forget at once what a tab that closes has given it. */
  end() {
    if (this.#name) navigator.sendBeacon(`/api/sessions/${encodeURIComponent(this.#name)}/end`);
    this.#opening = this.#name = null;
  }
}
