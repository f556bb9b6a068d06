"""One reading as KServe v2 messages: the request out, the responses in, every failure as an exception of `errors`.

`ModelStreamInfer` is called with a single message that closes the client's side at once. On the wire this is the
bidirectional call that Triton serves, but it needs no thread that feeds requests, and the end of the stream is the end
of the reading.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as pb

from cxr_triton.client.limits import Timeouts
from cxr_triton.errors import (
    AccessDenied,
    Cancelled,
    CxrError,
    DeadlineExceeded,
    InternalError,
    InvalidProfile,
    LimitExceeded,
    QueueFull,
    ServerMismatch,
    Unavailable,
    from_wire,
)
from cxr_triton.identity import require_same_images
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Reading

INPUTS, OUTPUTS = {"IMAGES", "REQUEST"}, {"DELTA", "READING"}
END_S = 1.0  # for the server to begin a stream that is to be cancelled, and to end one that has said its last

Image = bytes | bytearray | memoryview | str | os.PathLike


@dataclass(frozen=True)
class ServerInfo:
    """What answers at a URL: server name and version, and the versions of the reader model that it serves."""

    name: str
    version: str
    model: str
    model_versions: tuple[str, ...]


def backoff_s() -> Iterator[float]:
    """Waits between two attempts to connect: doubling from 0.1 s to 1 s, each spread by half."""
    step = 0.1
    while True:
        yield step * random.uniform(0.5, 1.5)  # noqa: S311  # spreads callers, keeps no secret
        step = min(2 * step, 1.0)


def image_bytes(images: Image | Sequence[Image]) -> list[bytes]:
    """Contents of each image; a path is read here, so that only contents travel."""
    if isinstance(images, Image):
        images = [images]
    return [Path(image).read_bytes() if isinstance(image, str | os.PathLike) else bytes(image) for image in images]


def require_size(images: Sequence[bytes], max_message_mib: int) -> None:
    """Refuse images that are larger than one message may be; raises `LimitExceeded`."""
    size = sum(map(len, images))
    if size > (max_message_mib << 20) - (1 << 20):
        raise LimitExceeded(
            f"{len(images)} images of {size / 2**20:.1f} MiB together, allowed {max_message_mib - 1} MiB a request; "
            "send fewer or smaller images, or raise max_message_mib here and on the server"
        )


def infer_request(model: str, images: Sequence[bytes], request: dict, max_message_mib: int) -> pb.ModelInferRequest:
    """The ensemble's request; keys of `request` that are None are left to the server; raises as `require_size` does."""
    require_size(images, max_message_mib)
    text = json.dumps({key: value for key, value in request.items() if value is not None}).encode()
    message = pb.ModelInferRequest(model_name=model)
    for name, elements in (("IMAGES", images), ("REQUEST", [text])):
        message.inputs.add(name=name, datatype="BYTES", shape=[len(elements)])
        message.raw_input_contents.append(pack(elements))
    return message


def pack(elements: Sequence[bytes]) -> bytes:
    """BYTES tensor: each element after its length as a little-endian uint32 (KServe v2, binary tensor data)."""
    return b"".join(part for element in elements for part in (struct.pack("<I", len(element)), element))


def unpack(tensor: bytes) -> list[bytes]:
    """Inverse of `pack`."""
    elements, at = [], 0
    while at < len(tensor):
        if at + 4 > len(tensor) or (end := at + 4 + struct.unpack_from("<I", tensor, at)[0]) > len(tensor):
            raise ServerMismatch(f"BYTES tensor of {len(tensor)} bytes is cut off at {at}; the server broke KServe v2")
        elements.append(tensor[at + 4 : end])
        at = end
    return elements


def parse_response(message: pb.ModelStreamInferResponse) -> tuple[str, str]:
    """New text and the reading's JSON; both empty in a heartbeat and in an empty final response.

    Raises
    ------
    CxrError
        The error that the server reports instead.
    """
    if message.error_message:
        raise server_error(message.error_message)
    response = message.infer_response
    texts = {"DELTA": "", "READING": ""}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name in texts:
            texts[output.name] = b"".join(unpack(raw)).decode("utf-8", "replace")
    return texts["DELTA"], texts["READING"]


def own_reading(text: str, sent: Sequence[str], url: str, trace_id: str) -> Reading:
    """The reading of a final response, of the images that this request sent, in the trace that it was sent with.

    Parameters
    ----------
    sent : sequence of str
        SHA-256 of each image. A server before identities says nothing of them, which is left to who uses the reading.

    Raises
    ------
    ServerMismatch
        The text is no reading.
    ReadingMismatch
        It is one of other images.
    """
    reading = Reading.from_json(text)
    if any("identity" in facts for facts in reading.images):
        names = [f"image {number} of the request" for number in range(1, len(sent) + 1)]
        given = [{"file_sha256": digest} for digest in sent]
        require_same_images(reading.images, given, names=names, reading=f"the reading from {url}")
    return dataclasses.replace(reading, trace_id=trace_id)


def check_contract(metadata: pb.ModelMetadataResponse, url: str) -> None:
    """Refuse a model whose tensors are not those of the contract.

    Raises
    ------
    ServerMismatch
        Names the tensors that differ.
    """
    for kind, wanted, served in (("inputs", INPUTS, metadata.inputs), ("outputs", OUTPUTS, metadata.outputs)):
        found = {tensor.name: tensor.datatype for tensor in served}
        if found != dict.fromkeys(wanted, "BYTES"):
            raise ServerMismatch(
                f"model {metadata.name!r} at {url} has {kind} {_tensors(found)}, this client speaks "
                f"{_tensors(dict.fromkeys(wanted, 'BYTES'))}; use the client of the server's release"
            )


def served_profile(answer: pb.ModelConfigResponse, url: str) -> ModelProfile:
    """The profile in an ensemble's configuration; raises `ServerMismatch` where it has none of this release."""
    text = answer.config.parameters["profile"].string_value if "profile" in answer.config.parameters else ""
    if not text:
        raise ServerMismatch(
            f"model {answer.config.name!r} at {url} does not say which profile it serves; package its bundle again "
            "with this release"
        )
    try:
        return ModelProfile.from_json(text)
    except InvalidProfile as error:
        raise ServerMismatch(f"{url}: {error.message}; use the client of the server's release") from None


def _tensors(types: dict[str, str]) -> str:
    return ", ".join(f"{name} {types[name]}" for name in sorted(types)) or "none"


FAILED = "the server failed; see its log"
"""What people are told of a failure that nobody foresaw."""


class Uncoded(InternalError):
    """What a server said in no words of ours: it may tell of the machine, its files and the request."""


def server_error(text: str) -> CxrError:
    """The exception for an error text of the server, whether the pipeline wrote it or Triton itself."""
    error = from_wire(text)
    if type(error) is InternalError and text == error.message:
        if "Exceeds maximum queue size" in text:
            return QueueFull(f"{text}; send the request again later")
        if _ENDS in text:
            return Unavailable(f"{text}: the server is starting or ending; send the request again later")
        if "unknown model" in text or "unexpected inference input" in text or "unexpected datatype" in text:
            return ServerMismatch(f"{text}; use the client of the server's release")
        return Uncoded(text)
    return error


_ENDS = "has no available versions"  # what Triton says of a model that it has, but not now
_NO_GRPC = ("Socket closed", "Failed parsing HTTP/2", "http1.x server")  # what gRPC says of a server of HTTP/1


def connect_error(error: grpc.RpcError, url: str, model: str, timeouts: Timeouts) -> CxrError:
    """The exception for a failed check of the server; `Unavailable` is the one worth another attempt."""
    error.__traceback__ = None  # would keep the call
    code, details = error.code(), error.details() or ""
    if _ENDS in details:
        return Unavailable(f"the server at {url} is starting or ending ({details}); send the request again later")
    if code is grpc.StatusCode.NOT_FOUND or (code is grpc.StatusCode.UNAVAILABLE and "unknown model" in details):
        return ServerMismatch(f"no model {model!r} at {url}; serve a repository written by `cxr-triton package`")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerMismatch(f"{url} is not a Triton gRPC endpoint ({details}); give the gRPC port, 8001 by default")
    if code is grpc.StatusCode.UNAVAILABLE and any(said in details for said in _NO_GRPC):
        return Unavailable(
            f"what answers at {url} does not speak gRPC ({details}); give Triton's gRPC port, 8001 by default (8000 is "
            "its HTTP, 8002 its metrics), and trust its certificate where it encrypts"
        )
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        return Unavailable(
            f"no ready server at {url} within connect_s = {timeouts.connect_s} s ({details}); "
            "start one with `cxr-triton serve REPOSITORY` or give its URL"
        )
    return stream_error(error, url, timeouts)


def stream_error(error: grpc.RpcError, url: str, timeouts: Timeouts) -> CxrError:  # noqa: PLR0911  # one for a status
    """The exception for a gRPC status other than OK once the request is on its way."""
    error.__traceback__ = None  # the error of a stream is its call, which its traceback would keep
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(
            f"connection to {url} was lost ({details}); the request may have run and was not repeated, send it again"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return late("total_s", timeouts, url)
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return AccessDenied(
            f"{url} lets nobody in with these credentials ({details}); give a token or certificate that holds"
        )
    if code is grpc.StatusCode.CANCELLED:
        return Cancelled(f"reading at {url} was cancelled before its end")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if "larger than max" in details:
            return LimitExceeded(f"{details} at {url}; raise max_message_mib on the side that refused")
        return QueueFull(f"{url} takes no more requests ({details}); send the request again later")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ServerMismatch(f"{url} does not stream readings ({details}); use the client of the server's release")
    failure = server_error(details)
    return Uncoded(f"gRPC status {code.name}: {details}") if isinstance(failure, Uncoded) else failure


def late(limit: str, timeouts: Timeouts, url: str) -> DeadlineExceeded:
    """The exception for one of `Timeouts` that ran out, by its name."""
    what = {
        "first_delta_s": "no text came within first_delta_s",
        "idle_s": "nothing was heard for idle_s",
        "total_s": "the reading did not end within total_s",
    }[limit]
    return DeadlineExceeded(
        f"{what} = {getattr(timeouts, limit)} s from {url}, and the request was cancelled; "
        f"raise Timeouts.{limit} or look at the server's load"
    )


def no_reading(url: str) -> InternalError:
    """The exception for a stream that ended well and said nothing."""
    return InternalError(f"{url} ended the stream without a reading; see the server's log")
