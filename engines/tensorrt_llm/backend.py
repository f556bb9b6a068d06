"""The served model `tensorrt_llm` over the server's own gRPC endpoint: tensors in, tokens as they come.

All requests share one stream of `ModelStreamInfer`. Triton's Python backend could call the model itself (BLS), but with
48 such calls at a time Triton 2.51 hung in stress runs, and a fault of the kind is open upstream
(triton-inference-server/server#8882).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import ml_dtypes
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from cxr_triton.engines.tensorrt_llm.request import stop_tensors
from cxr_triton.errors import CxrError, InternalError, Unavailable
from cxr_triton.kserve import STREAM_INFER, STREAM_INFER_TYPES, at_exit, channel_options

log = logging.getLogger(__name__)
MODEL = "tensorrt_llm"
OUTPUTS = ("output_ids", "sequence_length")  # the backend wants both to be asked for
DATATYPES = {
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.int32): "INT32",
    np.dtype(np.int64): "INT64",
    np.dtype(np.uint64): "UINT64",
    np.dtype(np.float16): "FP16",
    np.dtype(np.float32): "FP32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
MAX_MESSAGE_MIB = 2047

Listener = Callable[[str, np.ndarray, bool, CxrError | None], None]
"""Called with request id, new tokens, whether they are the last, and an error, which is the last too."""


@dataclass
class _Request:
    """One that the engine has to end."""

    listener: Listener
    is_heard: bool = False
    is_stopping: bool = False
    is_stop_due: bool = False


class TensorRTLLMBackend:
    """Client of the model `tensorrt_llm`.

    Parameters
    ----------
    address : str
        gRPC endpoint of the server, ``host:port``. It is called first when a request is, not before.
    """

    def __init__(self, address: str):
        self._channel: grpc.Channel | None = grpc.insecure_channel(address, channel_options(MAX_MESSAGE_MIB))
        self._lock = threading.Lock()
        self._requests: dict[str, _Request] = {}  # guarded by _lock, as the two streams are
        self._streams: dict[str, queue.SimpleQueue] = {}
        self._threads: set[threading.Thread] = set()
        at_exit(self, TensorRTLLMBackend.close)

    def start(self, request_id: str, tensors: dict[str, np.ndarray], listener: Listener) -> None:
        """Send a request; its tokens go to `listener`, which must not block, on a thread of this client."""
        message = infer_request(request_id, tensors)
        with self._lock:
            requests = self._queue("requests")
            self._requests[request_id] = _Request(listener)
            requests.put(message)

    def stop(self, request_id: str) -> None:
        """Cancel a request; the listener hears of its end. One that has ended is ignored."""
        with self._lock:
            if request := self._requests.get(request_id):
                request.is_stopping = request.is_stop_due = True
                self._send_stop(request_id)
                # It may overtake the request, and the engine ignores it then: once that is heard of, it goes again.
                request.is_stop_due = not request.is_heard

    def _send_stop(self, request_id: str) -> None:
        # On a stream of their own: what answers a stop has the id of the request that it stops.
        self._queue("stops").put(infer_request(request_id, stop_tensors()))

    def close(self) -> None:
        """Drop what runs and the connection."""
        with self._lock:
            for requests in self._streams.values():
                requests.put(None)
            self._streams.clear()
            threads = list(self._threads)
            channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        for thread in threads:  # no call of theirs outlives this client
            thread.join()

    def _opened(self) -> grpc.Channel:
        if self._channel is None:
            raise Unavailable("the decoder is shut down; send the request again later")
        return self._channel

    def _queue(self, name: str) -> queue.SimpleQueue:
        """Where a stream's requests go; opens the stream."""
        channel = self._opened()
        if name not in self._streams:
            requests = self._streams[name] = queue.SimpleQueue()
            call = channel.stream_stream(STREAM_INFER, **STREAM_INFER_TYPES)(iter(requests.get, None))
            ends = (name, requests, call)
            thread = threading.Thread(target=self._read, args=ends, name=f"engine-{name}", daemon=True)
            thread.start()
            self._threads.add(thread)
        return self._streams[name]

    def _read(self, name: str, requests: queue.SimpleQueue, call) -> None:
        try:
            for message in call:
                if name == "requests":
                    self._hear(message)
                elif message.error_message:
                    log.error("the engine did not stop a request: %s", message.error_message)
            reason = "it was closed"
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}"
            error.__traceback__ = None  # it is the call, which its traceback would keep alive
        except Exception as error:  # nobody else would tell those who wait
            reason = f"{type(error).__name__}: {error}"
            call.cancel()
        self._end(name, requests, reason)

    def _end(self, name: str, requests: queue.SimpleQueue, reason: str) -> None:
        """Fail what waits on a stream that has ended, and let the next request open another."""
        with self._lock:
            self._threads.discard(threading.current_thread())
            if self._channel is None:
                return
            if self._streams.get(name) is requests:
                del self._streams[name]
            requests.put(None)
            lost = [] if name == "stops" else list(self._requests.items())
            if lost:
                self._requests.clear()
            for request in self._requests.values():
                request.is_stop_due |= request.is_stopping
        log.error("the stream of %s to the engine ended (%s), %d requests with it", name, reason, len(lost))
        broken = Unavailable("the connection to the decoder's engine broke; send the request again")
        for request_id, request in lost:
            request.listener(request_id, np.empty(0, np.int32), True, broken)

    def _hear(self, message: pb.ModelStreamInferResponse) -> None:
        response, error, token_ids = message.infer_response, None, np.empty(0, np.int32)
        is_last = bool(message.error_message) or response.parameters["triton_final_response"].bool_param
        if message.error_message:
            log.error("the engine failed: %s", message.error_message)
            if not response.id:
                raise RuntimeError("an error of no request in particular")
            error = InternalError("the engine refused the request or failed in it; see the server's log")
        for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
            if output.name == "output_ids":  # [1, 1, new tokens]
                token_ids = np.frombuffer(content, np.int32)
        with self._lock:
            request = (self._requests.pop if is_last else self._requests.get)(response.id, None)
            if request is None:
                return
            request.is_heard = True
            if request.is_stop_due and not is_last:
                self._send_stop(response.id)
                request.is_stop_due = False
        if is_last or len(token_ids):
            request.listener(response.id, token_ids, is_last, error)


def infer_request(request_id: str, tensors: dict[str, np.ndarray]) -> pb.ModelInferRequest:
    """A KServe v2 request of the model."""
    message = pb.ModelInferRequest(model_name=MODEL, id=request_id)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, value in tensors.items():
        message.inputs.add(name=name, datatype=DATATYPES[value.dtype], shape=value.shape)
        message.raw_input_contents.append(value.tobytes())
    for name in OUTPUTS:
        message.outputs.add(name=name)
    return message
