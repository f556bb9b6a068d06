"""A test double of Triton's gRPC endpoint: serves a `cxr_reader` whose answers the test writes, and knows no model.

It exists to make the network misbehave on purpose; what a real server answers is tested in `tests/integration`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc as pb_grpc


def bytes_tensor(*elements: bytes) -> bytes:
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def response(delta: str = "", reading: str = "", *, final: bool = False, swap: bool = False):
    """A response of the ensemble; `swap` reverses the order of its outputs."""
    message = pb.ModelStreamInferResponse()
    message.infer_response.model_name = "cxr_reader"
    outputs = [("DELTA", delta), ("READING", reading)]
    for name, text in reversed(outputs) if swap else outputs:
        message.infer_response.outputs.add(name=name, datatype="BYTES", shape=[1])
        message.infer_response.raw_output_contents.append(bytes_tensor(text.encode()))
    message.infer_response.parameters["triton_final_response"].bool_param = final
    return message


def empty_final():
    """The final response that Triton sends on its own, without outputs."""
    message = pb.ModelStreamInferResponse()
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def failure(text: str):
    """An error as Triton words it for an ensemble."""
    return pb.ModelStreamInferResponse(error_message=f"in ensemble 'cxr_reader', {text}")


Answer = Callable[[pb.ModelInferRequest, grpc.ServicerContext], Iterator[pb.ModelStreamInferResponse]]


def asked_of(request: pb.ModelInferRequest) -> dict:
    """The REQUEST that a reading was asked for with."""
    names = [tensor.name for tensor in request.inputs]
    return json.loads(request.raw_input_contents[names.index("REQUEST")][4:])


class FakeServer(pb_grpc.GRPCInferenceServiceServicer):
    """Runs on a free port until the `with` block ends.

    Attributes
    ----------
    answer : callable
        Gives the responses to one request.
    requests : list of ModelInferRequest
        What came in.
    cancelled : threading.Event
        Set once a client has gone before its stream ended.
    refuse : list of grpc.StatusCode
        Statuses that the next checks of the model fail with, first one first.
    refusal : str
        What is said with them.
    outputs : tuple of str
        Output tensors in the served model's metadata.
    active : int
        Streams under way; whoever read one to its end finds it gone.
    profile : str
        JSON of the profile in the served model's configuration; "" has none.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        tls: grpc.ServerCredentials | None = None,
        max_receive_bytes: int = -1,
        host: str = "127.0.0.1",
    ):
        self.answer = answer
        self.requests: list[pb.ModelInferRequest] = []
        self.cancelled = threading.Event()
        self.refuse: list[grpc.StatusCode] = []
        self.refusal = "the test said so"
        self.outputs = ("DELTA", "READING")
        self.active = 0
        self.profile = ""
        options = [("grpc.max_receive_message_length", max_receive_bytes)]
        self._ending = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(8), options=options)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        add_port = self._server.add_secure_port if tls else self._server.add_insecure_port
        self.url = f"{host}:{add_port(f'{host}:0', *([tls] if tls else []))}"

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.stop(0).wait()

    @property
    def asked(self) -> dict:
        """The REQUEST of the last reading."""
        return asked_of(self.requests[-1])

    def ServerReady(self, request, context):
        return pb.ServerReadyResponse(ready=True)

    def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="fake", version="0.0")

    def ModelMetadata(self, request, context):
        if self.refuse:
            context.abort(self.refuse.pop(0), self.refusal)
        if request.name != "cxr_reader":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        model = pb.ModelMetadataResponse(name=request.name, versions=["1"], platform="ensemble")
        for name in ("IMAGES", "REQUEST"):
            model.inputs.add(name=name, datatype="BYTES", shape=[-1])
        for name in self.outputs:
            model.outputs.add(name=name, datatype="BYTES", shape=[1])
        return model

    def ModelConfig(self, request, context):
        answer = pb.ModelConfigResponse()
        answer.config.name = request.name
        if self.profile:
            answer.config.parameters["profile"].string_value = self.profile
        return answer

    def ModelStreamInfer(self, request_iterator, context):
        is_complete = False

        def left():
            with self._ending:
                if not is_complete:
                    self.cancelled.set()
                    self.active -= 1

        with self._ending:
            self.active += 1
        if not context.add_callback(left):  # gone before its turn came
            left()
        for request in request_iterator:
            self.requests.append(request)
            for message in self.answer(request, context):
                if not context.is_active():
                    return
                yield message
        with self._ending:
            is_complete = True
            self.active -= 1


def pause(context: grpc.ServicerContext, seconds: float) -> None:
    """Sleep, but no longer than the client listens."""
    ends = time.monotonic() + seconds
    while context.is_active() and time.monotonic() < ends:
        time.sleep(0.005)
