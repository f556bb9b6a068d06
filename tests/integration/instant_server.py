"""A gRPC server that does next to nothing: it reads a request, whatever it asks, and answers by its arguments.

    python tests/integration/instant_server.py [--responses 300] [--first-ms 100 --gap-ms 10]

For measuring a client, whatever gRPC's own servers cost. Without delays all responses were made before and leave in one
write. With delays each leaves when it is due, and its text is two times of CLOCK_MONOTONIC in seconds: at which it was
handed to the socket, and at which it was due. Prints its port. It speaks HTTP/2 as far as a gRPC client needs it.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import selectors
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fake_server import response

from cxr_triton.perf.load import prompt_threads

DATA, HEADERS, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 4, 6, 8
END_STREAM = ACK = 1
END_HEADERS = 4
WINDOW, FRAME = 1 << 30, (1 << 24) - 1
STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report", "first_token", "total")


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """RFC 9113, section 4.1."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """A literal header field without indexing: RFC 7541, section 6.2.2."""
    return bytes((0, len(name))) + name + bytes((len(value),)) + value


def data(stream: int, message) -> bytes:
    body = message.SerializeToString()
    return frame(DATA, 0, stream, b"\0" + struct.pack(">I", len(body)) + body)


HELLO = frame(SETTINGS, 0, 0, struct.pack(">HIHI", 4, WINDOW, 5, FRAME)) + frame(
    WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW)
)


def head(stream: int) -> bytes:
    return frame(HEADERS, END_HEADERS, stream, b"\x88" + field(b"content-type", b"application/grpc"))


def tail(stream: int, responses: int) -> bytes:
    """The reading, and the end of the stream."""
    usage = {"prompt_tokens": 1, "completion_tokens": responses}
    reading = json.dumps({"status": "ok", "usage": usage, "timings_ms": dict.fromkeys(STAGES, 0.0)})
    return data(stream, response("", reading)) + frame(
        HEADERS, END_HEADERS | END_STREAM, stream, field(b"grpc-status", b"0")
    )


class Connection:
    """What came in on a socket and was not understood yet, and how much may go out."""

    def __init__(self, to: socket.socket):
        to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self.buffer = to, bytearray()
        self.window, self.waiting = 65535, bytearray()
        self.greeted = False

    def requests(self) -> list[int]:
        """Read what is there; the streams whose requests are complete.

        Raises
        ------
        ConnectionError
            The client has gone.
        """
        read = self.socket.recv(1 << 20)
        if not read:
            raise ConnectionResetError
        self.buffer += read
        if not self.greeted and len(self.buffer) >= 24:
            del self.buffer[:24]  # PRI * HTTP/2.0
            self.socket.sendall(HELLO)
            self.greeted = True
        complete = []
        while self.greeted and len(self.buffer) >= 9:
            size = int.from_bytes(self.buffer[:3], "big")
            if len(self.buffer) < 9 + size:
                break
            kind, flags = self.buffer[3], self.buffer[4]
            stream = int.from_bytes(self.buffer[5:9], "big")
            payload = bytes(self.buffer[9 : 9 + size]) if kind != DATA else b""
            del self.buffer[: 9 + size]
            if kind == DATA:
                self.socket.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", size)) if size else b"")
                if flags & END_STREAM:
                    complete.append(stream)
            elif kind in (SETTINGS, PING) and not flags & ACK:
                self.socket.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind == WINDOW_UPDATE and stream == 0:
                self.window += int.from_bytes(payload, "big")
                self.send(b"")
        return complete

    def send(self, frames: bytes) -> None:
        """Send, or wait for the client to allow it; every frame is counted as if it was DATA."""
        self.waiting += frames
        if self.waiting and len(self.waiting) <= self.window:
            self.window -= len(self.waiting)
            self.socket.sendall(self.waiting)
            self.waiting.clear()


def serve(responses: int, first_s: float, gap_s: float) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    poll = selectors.SelectSelector()  # epoll's time limit is in whole milliseconds
    poll.register(listening, selectors.EVENT_READ)
    due: list[tuple] = []
    order = itertools.count()
    at_once = not first_s and not gap_s
    ready = head(1) + data(1, response("0.123456789 0.123456789")) * responses + tail(1, responses)
    assert len(ready) < 65535, "more than a stream's first window"
    marks = [0]  # where the frames of `ready` begin
    while marks[-1] < len(ready):
        marks.append(marks[-1] + 9 + int.from_bytes(ready[marks[-1] : marks[-1] + 3], "big"))
    while True:
        for key, _ in poll.select(max(0.0, due[0][0] - time.monotonic()) if due else None):
            if key.fileobj is listening:
                accepted, _ = listening.accept()
                poll.register(accepted, selectors.EVENT_READ, Connection(accepted))
                continue
            connection = key.data
            try:
                for stream in connection.requests():
                    if at_once:
                        answer = bytearray(ready)
                        for mark in marks[:-1]:
                            struct.pack_into(">I", answer, mark + 5, stream)
                        connection.send(answer)
                    else:
                        heapq.heappush(due, (time.monotonic() + first_s, next(order), connection, stream, 1))
            except ConnectionError:
                poll.unregister(key.fileobj)
                key.fileobj.close()
                due = [entry for entry in due if entry[2] is not connection]
                heapq.heapify(due)
        while due and due[0][0] <= time.monotonic():
            due_s, _, connection, stream, number = heapq.heappop(due)
            if number == 1:
                connection.send(head(stream))
            connection.send(data(stream, response(f"{time.monotonic()!r} {due_s!r}")))
            if number < responses:
                heapq.heappush(due, (due_s + gap_s, next(order), connection, stream, number + 1))
            else:
                connection.send(tail(stream, responses))


class InstantServer:
    """The server in a process of its own, until the `with` block ends; `url` is its host and port."""

    def __init__(self, *, responses: int, first_ms: float = 0.0, gap_ms: float = 0.0):
        options = {"--responses": responses, "--first-ms": first_ms, "--gap-ms": gap_ms}
        arguments = [part for option, value in options.items() for part in (option, str(value))]
        self._process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)
        self.url = f"127.0.0.1:{int(self._process.stdout.readline())}"

    def __enter__(self) -> InstantServer:
        return self

    def __exit__(self, *exc) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--responses", type=int, default=300)
    parser.add_argument("--first-ms", type=float, default=0.0)
    parser.add_argument("--gap-ms", type=float, default=0.0)
    given = parser.parse_args()
    with prompt_threads():
        serve(given.responses, given.first_ms / 1e3, given.gap_ms / 1e3)
