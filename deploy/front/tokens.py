#!/usr/bin/env python3
"""Judges the front door's bearer tokens, for nginx's `auth_request`; needs Python's own library only.

    tokens.py add FILE NAME [--days N]     makes a token, prints it, and adds its line to FILE
    tokens.py serve FILE --socket PATH     answers nginx: 204 with X-Who, 401, or 503 where FILE cannot be used

FILE has a line for each token: a name, the SHA-256 of the token, and optionally the day (UTC) that it ends with. Tokens
themselves are nowhere. FILE is looked at with every call, so a token comes and goes without a restart. All lines are
compared, each in constant time, and what is compared are digests: time says nothing of a token.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import hashlib
import hmac
import os
import re
import secrets
import signal
import sys
from pathlib import Path

LINE = re.compile(r"(?P<name>[\w.@-]{1,64})\s+(?P<digest>[0-9a-f]{64})(?:\s+(?P<last>\d{4}-\d{2}-\d{2}))?")
MAX_HEAD = 16 << 10


class Tokens:
    """The tokens of a file.

    Attributes
    ----------
    trouble : str
        Why the file cannot be used; empty where it can.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self._seen: tuple[int, ...] = ()
        self._lines: list[tuple[str, bytes, datetime.date]] = []
        self.trouble = ""

    def who(self, authorization: bytes) -> str | None:
        """Name of the token in a header's value, ``Bearer TOKEN``; None where it is of no line or has ended."""
        self._look()
        scheme, _, token = authorization.partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        today, found = datetime.datetime.now(datetime.UTC).date(), None
        for name, digest, last in self._lines:
            if hmac.compare_digest(given, digest) and today <= last:
                found = name
        return found if scheme.lower() == b"bearer" and token else None

    def _look(self) -> None:
        """Read the file anew where it has changed. One that cannot be read, or has a wrong line, lets nobody in."""
        try:
            stat = self._path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
            if seen != self._seen:
                self._lines = list(map(_line, _rows(self._path.read_text("ascii"))))
                self._seen, trouble = seen, ""
            else:
                return
        except (OSError, ValueError) as error:
            self._seen, self._lines = (), []
            trouble = f"{self._path}: {error}"
        if trouble != self.trouble:
            print(trouble or f"{self._path}: {len(self._lines)} tokens", file=sys.stderr, flush=True)
        self.trouble = trouble


def _rows(text: str) -> list[tuple[int, str]]:
    rows = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, row) for number, row in rows if row]


def _line(row: tuple[int, str]) -> tuple[str, bytes, datetime.date]:
    number, text = row
    found = LINE.fullmatch(text)
    if not found:
        raise ValueError(f"line {number} is not NAME SHA256 [YYYY-MM-DD]")
    last = datetime.date.fromisoformat(found["last"]) if found["last"] else datetime.date.max
    return found["name"], bytes.fromhex(found["digest"]), last


class Answers(asyncio.Protocol):
    """One connection of nginx, kept alive."""

    def __init__(self, tokens: Tokens):
        self._tokens, self._buffer = tokens, b""

    def connection_made(self, transport):
        """Keep what is written to."""
        self._transport = transport

    def data_received(self, data: bytes):
        """Answer each head that has come whole; there is no body."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
            self._transport.write(self._answer(head))
        if len(self._buffer) > MAX_HEAD:
            self._transport.close()

    def _answer(self, head: bytes) -> bytes:
        given = [line for line in head.split(b"\r\n")[1:] if line[:14].lower() == b"authorization:"]
        who = self._tokens.who(given[0][14:].strip()) if len(given) == 1 else None
        if who:
            return b"HTTP/1.1 204 No Content\r\nX-Who: " + who.encode() + b"\r\n\r\n"
        status = b"503 Service Unavailable" if self._tokens.trouble else b"401 Unauthorized"
        return b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"


async def _serve(tokens: Tokens, socket: str) -> None:
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    Path(socket).unlink(missing_ok=True)
    os.umask(0o117)
    server = await loop.create_unix_server(lambda: Answers(tokens), socket)
    tokens.who(b"")
    await ended.wait()
    server.close()


def _add(path: Path, name: str, days: int | None) -> str:
    """A new token, whose line `path` then holds."""
    token = secrets.token_urlsafe(32)
    last = f" {datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days)}" if days is not None else ""
    line = f"{name} {hashlib.sha256(token.encode()).hexdigest()}{last}"
    _line((1, line))
    before = path.read_text("ascii") if path.exists() else ""
    for row in _rows(before):
        _line(row)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(before + "\n" * (before[-1:] not in ("", "\n")) + line + "\n")
        if before:  # who may read it stays as it was
            was = path.stat()
            os.fchown(file.fileno(), was.st_uid, was.st_gid)
            os.fchmod(file.fileno(), was.st_mode & 0o777)
    new.replace(path)
    return token


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add")
    serve = verbs.add_parser("serve")
    for verb in (add, serve):
        verb.add_argument("file", type=Path)
    add.add_argument("name")
    add.add_argument("--days", type=int, help="how long it holds, today included as day 0; for ever if left out")
    serve.add_argument("--socket", required=True)
    given = parser.parse_args()
    try:
        if given.verb == "add":
            print(_add(given.file, given.name, given.days))
        else:
            asyncio.run(_serve(Tokens(given.file), given.socket))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
