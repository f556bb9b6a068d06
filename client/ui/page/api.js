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
const OVER = { code: "SESSION_OVER", message: "the session is over", hint: "Give the pictures again." };
const LEAVE_MS = 5000;
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
  #current = null;
  #closing = null;

  /** `ended` is called when the server has let it go. */
  constructor(ended) {
    this.ended = ended;
  }

  #opened() {
    const session = { name: null };
    session.opening = ask("/api/sessions", { method: "POST", headers: JSON_TYPE, body: "{}" })
      .then((answer) => answer.json())
      .then((told) => (session.name = told.session));
    session.opening.catch(() => {
      if (this.#current === session) this.#current = null;
    });
    return session;
  }

  /** What `take` makes of the answer; dropped where the session that was asked is no longer the current one by then. */
  async #ask(rest, options, take = (answer) => answer) {
    if (this.#closing) throw new Failure(OVER, 404);
    const session = (this.#current ??= this.#opened());
    let taken;
    try {
      await session.opening;
      taken = await take(await ask(pathOf(session, rest), options));
    } catch (error) {
      if (error.isOver) this.#lost(session);
      throw error;
    }
    if (session !== this.#current) throw new Failure(OVER, 404);
    return taken;
  }

  #lost(session) {
    if (session !== this.#current) return;
    this.#current = null;
    this.ended();
  }

  /** What the server tells of a file; where it has let the session go, the file is the first one of a new session. */
  async give(file) {
    const headers = { "Content-Type": "application/octet-stream", "X-File-Name": encodeURIComponent(file.name) };
    const send = () => this.#ask("/pictures", { method: "POST", headers, body: file }, (answer) => answer.json());
    return send().catch((error) => {
      if (error.isOver) return send();
      throw error;
    });
  }

  remove(picture) {
    return this.#ask(`/pictures/${picture}`, { method: "DELETE" });
  }

  draw(picture, preset) {
    return this.#ask(`/pictures/${picture}.png?preset=${encodeURIComponent(preset)}`, {}, (answer) => answer.blob());
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
  save(reading, kind) {
    return this.#ask(`/readings/${reading}/export?as=${kind}`, {}, async (answer) => {
      const named = /filename="([^"]+)"/.exec(answer.headers.get("Content-Disposition") ?? "");
      return { blob: await answer.blob(), name: named?.[1] ?? `${reading}.${kind}` };
    });
  }

  /** Lets the server forget at once what a tab that closes has given it. */
  end() {
    if (this.#current?.name) navigator.sendBeacon(pathOf(this.#current, "/end"));
    this.#current = null;
  }

  /** Lets the server forget it for good while the visitor may still ask so: before the log-out. */
  close() {
    return (this.#closing ??= this.#close());
  }

  async #close() {
    const session = this.#current;
    this.#current = null;
    try {
      await session?.opening;
      if (session) await ask(pathOf(session, ""), { method: "DELETE", keepalive: true, signal: AbortSignal.timeout(LEAVE_MS) });
    } catch {
      // A server that does not answer lets it go when it is idle; the log-out must not wait for that.
    }
  }
}

const pathOf = ({ name }, rest) => `/api/sessions/${encodeURIComponent(name)}${rest}`;
