"""Test double of `cxr_reader`: answers what the prompt scripts, at the times that it scripts, and does no work.

The prompt is JSON: ``responses`` with text, ``first_ms`` and ``gap_ms`` before the first and between two. Each text is
the time (CLOCK_MONOTONIC, in seconds) at which it was handed to Triton. One thread sends everything, as in `decoder`.
"""

import heapq
import itertools
import json
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.reading import Reading, parse

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report", "first_token", "total")


def outputs(delta: str, reading: str) -> list:
    return [
        pb_utils.Tensor("DELTA", np.array([delta.encode()], object)),
        pb_utils.Tensor("READING", np.array([reading.encode()], object)),
    ]


class TritonPythonModel:
    def initialize(self, args):
        text = "<think> None. </think>\n<answer> No Finding </answer>"
        parsed = parse(text, grammar="think_answer", answer="labels", labels=("No Finding",), finish_reason="stop")
        self.facts = {
            "task": None,
            "prompt": "",
            "model": {"profile": "scripted", "engine": "none", "precision": "none", "bundle": "none"},
            "images": (),
            "notice": "A test double answered. Research only; never for diagnosis.",
        }
        self.parsed = parsed
        self.arrived = queue.SimpleQueue()
        self.sender = threading.Thread(target=self.send, daemon=True)
        self.sender.start()

    def execute(self, requests):
        for request in requests:
            asked = json.loads(pb_utils.get_input_tensor_by_name(request, "REQUEST").as_numpy().reshape(-1)[0])
            script = json.loads(asked["prompt"]) if asked.get("prompt", "").startswith("{") else {}
            self.arrived.put((request.get_response_sender(), script, time.monotonic()))

    def finalize(self):
        self.arrived.put(None)
        self.sender.join()

    def send(self):
        due, order = [], itertools.count()
        while True:
            wait_s = max(0.0, due[0][0] - time.monotonic()) if due else None
            try:
                arrived = self.arrived.get(timeout=wait_s)
            except queue.Empty:
                arrived = ()
            if arrived is None:
                return
            if arrived:
                sender, script, at_s = arrived
                first_s = at_s + script.get("first_ms", 0) / 1e3
                heapq.heappush(due, (first_s, next(order), sender, script, 1, at_s))
            while due and due[0][0] <= time.monotonic():
                at_s, _, sender, script, number, began_s = heapq.heappop(due)
                now_s = time.monotonic()
                sender.send(pb_utils.InferenceResponse(outputs(repr(now_s), "")))
                if number < script.get("responses", 1):
                    following_s = at_s + script.get("gap_ms", 0) / 1e3
                    heapq.heappush(due, (following_s, next(order), sender, script, number + 1, began_s))
                else:
                    timings = dict.fromkeys(STAGES, 0.0) | {"total": 1e3 * (now_s - began_s)}
                    usage = {"prompt_tokens": 1, "completion_tokens": number, "image_tokens": 0}
                    reading = Reading.of(self.parsed, **self.facts, usage=usage, timings_ms=timings)
                    sender.send(pb_utils.InferenceResponse(outputs("", reading.to_json())), flags=FINAL)
