"""Prompt and image embeddings to a stream of text chunks, from a `Runtime` of `cxr_triton.engines`.

All that goes back to Triton leaves from one thread: Triton 2.51 corrupts its shared memory when several threads of a
model send (triton-inference-server/server#8882). A stream that has begun never ends in an error response, which would
leave the ensemble's request in flight for ever: errors travel in COMPLETION and `report` raises them. Whatever fails, a
request gets its final flag.
"""

import json
import logging
import queue
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import completion_json, sampling_of, scoring_of, wire_error
from cxr_triton.engines.runtime.stream import Chunk, Generation
from cxr_triton.engines.secret import Seal
from cxr_triton.errors import InvalidRequest
from cxr_triton.triton_repo.adapter import array, input_types, open_runtime, parameters, text, trace_of

log = logging.getLogger(__name__)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
INPUTS = ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS", "IMAGE_EMBEDDINGS", "CONTEXT")


class Stream:
    """One request and its way back to Triton."""

    def __init__(self, sender):
        self.sender = sender
        self.context = "{}"
        self.arrived_s = time.monotonic()
        self.id = self.trace_id = ""
        self.is_gone = False
        self.has_ended = False
        self.stopped_at_step = None


class TritonPythonModel:
    def initialize(self, args):
        values = parameters(args)
        self.context, self.completion = Seal("CONTEXT"), Seal("COMPLETION")
        self.runtime = open_runtime(Bundle.open(values["bundle"]), values)
        self.types = input_types(args)
        self.streams = {}
        gauge, counter = pb_utils.MetricFamily.GAUGE, pb_utils.MetricFamily.COUNTER
        families = [
            ("streams", "Streams that wait, are in prefill or decode", gauge),
            ("cancelled_total", "Streams that were cancelled", counter),
        ]
        self.counts_steps = self.runtime.steps is not None
        if self.counts_steps:
            families += [
                ("steps_total", "Decode steps, each for all active streams", counter),
                ("steps_after_cancel_total", "Decode steps between cancellation and free slot", counter),
            ]
        if self.runtime.prefix:
            families += [
                ("prefix_prompt_tokens_total", "Tokens of prompts", counter),
                ("prefix_tokens_total", "Tokens of prompts that were not computed again", counter),
                ("prefix_hits_total", "Prompts that had such tokens", counter),
                ("prefix_evicted_total", "Blocks of tokens that were forgotten for want of room", counter),
                ("prefix_bytes", "Keys and values that are kept", gauge),
            ]
        if self.runtime.drafts:
            families += [
                ("draft_drafted_tokens_total", "Tokens that were guessed and checked", counter),
                ("draft_accepted_tokens_total", "Tokens that were guessed rightly", counter),
            ]
        # A metric dies with its family.
        self.families = {
            name: pb_utils.MetricFamily(name=f"cxr_decoder_{name}", description=description, kind=kind)
            for name, description, kind in families
        }
        self.metrics = {name: family.Metric(labels={}) for name, family in self.families.items()}
        self.counted_steps, self.counted = 0, {}
        self.outbox: queue.SimpleQueue = queue.SimpleQueue()
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
        stream = Stream(request.get_response_sender())
        try:
            if pb_utils.get_input_tensor_by_name(request, "STOP") is not None:
                self.stop(text(request, "STOP"))
                stream.sender.send(flags=FINAL)
                return
            stream.trace_id = trace_of(request)
            self.start(stream, request)
        except Exception as error:
            self.send(stream, Chunk(error=error), self.runtime.steps)

    def start(self, stream, request):
        arrays = {name: array(request, name, self.types[name]) for name in INPUTS}
        if missing := [name for name in INPUTS if arrays[name] is None]:
            raise InvalidRequest(f"{', '.join(missing)}: missing; send every input, or STOP alone")
        prompt = [arrays[name] for name in ("INPUT_IDS", "IMAGE_INDEX", "POSITION_IDS")]
        stream.context = self.context.open_once(text(request, "CONTEXT"), *prompt)
        embeddings = arrays["IMAGE_EMBEDDINGS"]
        generation = Generation(
            input_ids=arrays["INPUT_IDS"],
            position_ids=arrays["POSITION_IDS"],
            image_index=arrays["IMAGE_INDEX"],
            image_embeddings=embeddings.reshape(-1, embeddings.shape[-1]),  # [n, T, hidden] -> [n * T, hidden]
            sampling=sampling_of(stream.context),
            scoring=scoring_of(stream.context),
        )
        stream.id = self.runtime.submit(
            generation,
            lambda chunk: self.outbox.put((self.send, stream, chunk, self.runtime.steps)),
            lambda: stream.is_gone,
        )
        self.streams[stream.id] = stream
        self.metrics["streams"].set(len(self.streams))

    def stop(self, name):
        if stream := self.streams.get(name):
            self.cancel(stream)

    def cancel(self, stream):
        if not stream.is_gone:
            stream.stopped_at_step = self.runtime.steps
            stream.is_gone = True

    def send(self, stream, chunk, step):
        """Pass a chunk on that the runtime gave at a step; one that cannot be sent ends its stream with an error."""
        if stream.has_ended:
            return
        try:
            outputs = self.outputs(stream, chunk)
            if not (chunk.completion or chunk.error):
                stream.sender.send(pb_utils.InferenceResponse(outputs))
                if stream.sender.is_cancelled():
                    self.cancel(stream)
                return
            if stream.is_gone:
                outputs = None
        except Exception as error:
            chunk = Chunk(error=error)
            outputs = self.outputs(stream, chunk)
            self.cancel(stream)
        self.end(stream, outputs)
        self.measure(stream, step, chunk.completion is not None and chunk.completion.finish_reason == "cancelled")

    def outputs(self, stream, chunk):
        completion = ""
        if chunk.error:
            completion = json.dumps({"error": wire_error(chunk.error, stream.trace_id)})
        elif chunk.completion:
            completion = completion_json(chunk.completion, stream.context, stream.arrived_s)
        if completion:
            completion = self.completion.close(completion)
        return [
            pb_utils.Tensor("TEXT", np.array([chunk.text.encode()], object)),
            pb_utils.Tensor("TOKEN_IDS", chunk.token_ids),
            pb_utils.Tensor("STREAM", np.array([stream.id.encode()], object)),
            pb_utils.Tensor("COMPLETION", np.array([completion.encode()], object)),
        ]

    def end(self, stream, outputs):
        """The final flag, by itself when the outputs are None or cannot be sent."""
        stream.has_ended = True
        self.streams.pop(stream.id, None)
        if outputs is not None:
            try:
                stream.sender.send(pb_utils.InferenceResponse(outputs), flags=FINAL)
                return
            except Exception:
                log.exception("the last response of stream %s was lost", stream.id)
        stream.sender.send(flags=FINAL)

    def measure(self, stream, step, was_cancelled):
        self.metrics["streams"].set(len(self.streams))
        if prefix := self.runtime.prefix:
            self.metrics["prefix_bytes"].set(prefix.nbytes)
            self.count({f"prefix_{name}_total": count for name, count in prefix.counts().items()})
        if drafts := self.runtime.drafts:
            self.count({f"draft_{name}_tokens_total": count for name, count in drafts.counts().items()})
        if was_cancelled:
            self.metrics["cancelled_total"].increment(1)
        if self.counts_steps:
            self.metrics["steps_total"].increment(step - self.counted_steps)
            self.counted_steps = step
            if was_cancelled:
                self.metrics["steps_after_cancel_total"].increment(step - stream.stopped_at_step)

    def count(self, counts):
        """Bring counters to what the runtime has counted."""
        for name, count in counts.items():
            self.metrics[name].increment(count - self.counted.get(name, 0))
            self.counted[name] = count
