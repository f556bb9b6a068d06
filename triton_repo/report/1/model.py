"""Chunks of the decoder to DELTA and READING; tells the decoder to stop when the client has gone.

Triton marks only steps that start after the cancellation, so it is seen here, with the next chunk.
"""

import json
from collections import OrderedDict

import numpy as np
import triton_python_backend_utils as pb_utils

from cxr_triton.engines.pipeline import build_reading
from cxr_triton.engines.secret import Seal
from cxr_triton.errors import from_wire
from cxr_triton.triton_repo.adapter import error_response, parameters, text

REMEMBERED_STOPS = 1024


class TritonPythonModel:
    def initialize(self, args):
        parameters(args)
        self.stopped = OrderedDict()
        self.completion = Seal("COMPLETION")

    def execute(self, requests):
        return [self.report(request) for request in requests]

    def report(self, request):
        try:
            if request.is_cancelled():
                self.stop(text(request, "STREAM"))
            completion, reading = text(request, "COMPLETION"), ""
            if completion:
                completion = json.loads(self.completion.open(completion))
                if "error" in completion:
                    raise from_wire(completion["error"])
                reading = build_reading(completion).to_json()
            return pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor("DELTA", np.array([text(request, "TEXT").encode()], object)),
                    pb_utils.Tensor("READING", np.array([reading.encode()], object)),
                ]
            )
        except Exception as error:
            return error_response(error, request)

    def stop(self, stream):
        """Ask once; the chunks that are on their way all carry the mark."""
        if stream in self.stopped:
            return
        self.stopped[stream] = None
        if len(self.stopped) > REMEMBERED_STOPS:
            self.stopped.popitem(last=False)
        order = pb_utils.InferenceRequest(
            model_name="decoder",
            requested_output_names=["STREAM"],
            inputs=[pb_utils.Tensor("STOP", np.array([stream.encode()], object))],
        )
        for _ in order.exec(decoupled=True):
            pass
