"""Prompt and image embeddings to a stream of text chunks, from `cxr_triton.engines.runtime.DecoderRuntime`.

All that goes back to Triton leaves from one thread: Triton 2.51 corrupts its shared memory when several threads of a
model send (triton-inference-server/server#8882). A stream that has begun never ends in an error response, which would
leave the ensemble's request in flight for ever: errors travel in COMPLETION and `report` raises them.
"""

import json
import logging
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.runtime import Chunk, DecoderRuntime, Generation
from cxr_triton.engines.session import open_decoder
from cxr_triton.errors import InvalidRequest
from cxr_triton.pipeline import completion_json, sampling_of, wire_error
from cxr_triton.triton_repo.adapter import array, parameters, text

log = logging.getLogger(__name__)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
INPUTS = ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS", "IMAGE_EMBEDDINGS", "CONTEXT")


class CountingSession:
    """A decoder session that counts its steps, so that a metric can tell how many a cancelled stream still took."""

    def __init__(self, session):
        self._session, self.steps = session, 0

    def __getattr__(self, name):
        return getattr(self._session, name)

    def step(self, *args):
        logits = self._session.step(*args)
        self.steps += 1
        return logits


class Stream:
    """One request and its way back to Triton."""

    def __init__(self, sender, context):
        self.sender = sender
        self.context = context
        self.arrived_s = time.monotonic()
        self.id = ""
        self.is_gone = False
        self.stopped_at_step = None


class TritonPythonModel:
    def initialize(self, args):
        values = parameters(args)
        bundle = Bundle.open(values["bundle"])
        session = open_decoder(
            bundle,
            slots=int(values["slots"]),
            threads=int(values["threads"]) or None,
            batch_invariant=values["batch_invariant"] == "1",
        )
        self.session = CountingSession(session)
        self.runtime = DecoderRuntime(bundle, session=self.session, queue_size=int(values["queue_size"]))
        self.streams = {}
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        # A metric dies with its family.
        self.families = {
            name: pb_utils.MetricFamily(name=f"cxr_decoder_{name}", description=description, kind=kind)
            for name, description, kind in (
                ("streams", "Streams that wait, are in prefill or decode", gauge),
                ("steps_total", "Decode steps, each for all active streams", counter),
                ("cancelled_total", "Streams that were cancelled", counter),
                ("steps_after_cancel_total", "Decode steps between cancellation and free slot", counter),
            )
        }
        self.metrics = {name: family.Metric(labels={}) for name, family in self.families.items()}
        self.counted_steps = 0
        self.outbox = queue.SimpleQueue()
        self.responder = threading.Thread(target=self.respond, name="responder", daemon=True)
        self.responder.start()

    def execute(self, requests):
        for request in requests:
            self.outbox.put((self.accept, request))

    def finalize(self):
        self.runtime.close()
        self.outbox.put(None)
        self.responder.join()

    # Everything below runs in the responder thread.

    def respond(self):
        while job := self.outbox.get():
            call, *args = job
            try:
                call(*args)
            except Exception:  # the thread serves all streams
                log.exception("a response was lost")
            del job, args

    def accept(self, request):
        """Start a stream, or end the one that a STOP names."""
        sender = request.get_response_sender()
        if pb_utils.get_input_tensor_by_name(request, "STOP") is not None:
            if stream := self.streams.get(text(request, "STOP")):
                self.cancel(stream)
            sender.send(flags=FINAL)
            return
        stream = Stream(sender, "{}")
        try:
            arrays = {name: array(request, name) for name in INPUTS}
            if missing := [name for name in INPUTS if arrays[name] is None]:
                raise InvalidRequest(f"{', '.join(missing)}: missing; send every input, or STOP alone")
            stream.context = arrays["CONTEXT"].reshape(-1)[0].decode()
            embeddings = arrays["IMAGE_EMBEDDINGS"]
            generation = Generation(
                input_ids=arrays["INPUT_IDS"],
                position_ids=arrays["POSITION_IDS"],
                image_index=arrays["IMAGE_INDEX"],
                image_embeddings=embeddings.reshape(-1, embeddings.shape[-1]),  # [n, T, hidden] -> [n * T, hidden]
                sampling=sampling_of(stream.context),
            )
            stream.id = self.runtime.submit(
                generation,
                lambda chunk: self.outbox.put((self.send, stream, chunk, self.session.steps)),
                lambda: stream.is_gone,
            )
        except Exception as error:
            self.send(stream, Chunk(error=error), self.session.steps)
            return
        self.streams[stream.id] = stream
        self.metrics["streams"].set(len(self.streams))

    def cancel(self, stream):
        if stream.stopped_at_step is None:
            stream.stopped_at_step = self.session.steps
            stream.is_gone = True

    def send(self, stream, chunk, step):
        """Pass a chunk on that the runtime gave at a step."""
        completion = ""
        if chunk.error:
            completion = json.dumps({"error": wire_error(chunk.error)})
        elif chunk.completion:
            completion = completion_json(chunk.completion, stream.context, stream.arrived_s)
        outputs = [
            pb_utils.Tensor("TEXT", np.array([chunk.text.encode()], object)),
            pb_utils.Tensor("TOKEN_IDS", chunk.token_ids),
            pb_utils.Tensor("STREAM", np.array([stream.id.encode()], object)),
            pb_utils.Tensor("COMPLETION", np.array([completion.encode()], object)),
        ]
        if not completion:
            stream.sender.send(pb_utils.InferenceResponse(outputs))
            if stream.sender.is_cancelled():
                self.cancel(stream)
            return
        if stream.stopped_at_step is None:
            stream.sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
        else:
            stream.sender.send(flags=FINAL)
        self.streams.pop(stream.id, None)
        was_cancelled = chunk.completion is not None and chunk.completion.finish_reason == "cancelled"
        self.measure(step, step - stream.stopped_at_step if was_cancelled else None)

    def measure(self, step, steps_after_cancel):
        self.metrics["streams"].set(len(self.streams))
        self.metrics["steps_total"].increment(step - self.counted_steps)
        self.counted_steps = step
        if steps_after_cancel is not None:
            self.metrics["cancelled_total"].increment(1)
            self.metrics["steps_after_cancel_total"].increment(steps_after_cancel)
