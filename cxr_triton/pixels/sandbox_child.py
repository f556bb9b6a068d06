"""The process that `cxr_triton.pixels.sandbox` starts, sends untrusted images to, and may end at any moment.

It imports and tries everything that an image needs, gives up its rights (`cxr_triton.pixels.isolation`), and answers
one order after another. An order is a head, JSON and a file's bytes, or comes with an open file instead.
"""

from __future__ import annotations

import array  # noqa: F401  # `socket.recv_fds` imports it, when nothing can be imported any more
import io
import json
import mmap
import os
import resource
import select
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from cxr_triton import __version__
from cxr_triton.errors import CxrError, InternalError, InvalidImage, LimitExceeded, NotAChest
from cxr_triton.identity import identity_of
from cxr_triton.pixels.anatomy import Anatomy
from cxr_triton.pixels.codestream import Codestream, decode
from cxr_triton.pixels.dicom import read_identity, read_image
from cxr_triton.pixels.display import render
from cxr_triton.pixels.image import resize, square_size, target_size
from cxr_triton.pixels.isolation import lock
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.picture_file import read_jpeg, read_png
from cxr_triton.pixels.plausibility import judge
from cxr_triton.pixels.radiograph import Metadata, Radiograph

HEAD = struct.Struct("<II")
"""Bytes of JSON, bytes of payload; in both directions."""
OUT_OF_MEMORY = 12
"""Exit status where a file does not even fit."""


def serve(limits: Limits) -> None:
    """Answer one order after another until the parent is gone."""
    source = socket.socket(fileno=0)
    sink = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a library prints must not enter the protocol
    status = os.open("/proc/self/status", os.O_RDONLY)
    parent = os.getppid()
    _warm_up(limits)
    hello: dict[str, Any] = {"python": list(sys.version_info[:2]), "version": __version__}
    hello["isolation"] = lock()
    threading.Thread(target=_exit_with_parent, args=(source.fileno(), parent), daemon=True).start()
    _restrict(limits)  # last, because without memory for a thread its start would wait for ever
    _reply(sink, hello)
    while True:
        try:
            answer, pixels = _answer_next(source, limits)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        answer["recycle"] = answer.get("recycle", False) or _peak_mib(status) > limits.memory_mib / 2
        _reply(sink, answer, pixels)


def _answer_next(source: socket.socket, limits: Limits) -> tuple[dict, bytes]:
    head, files, _, _ = socket.recv_fds(source, HEAD.size, 1)
    sizes = HEAD.unpack(head + _take(source, HEAD.size - len(head)))
    order, data = json.loads(_take(source, sizes[0])), _take(source, sizes[1])
    used = resource.getrusage(resource.RUSAGE_SELF)
    # JPEG 2000 decodes on two threads, each of which uses processor time
    seconds = int(used.ru_utime + used.ru_stime + 2 * limits.time_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    if not files:
        return _answer(order, data, limits)
    try:
        with mmap.mmap(files[0], order["size"], access=mmap.ACCESS_READ) as mapped:
            return _answer(order, mapped, limits)
    finally:
        os.close(files[0])


def _answer(order: dict, data: bytes | mmap.mmap, limits: Limits) -> tuple[dict, bytes]:
    try:
        if order["do"] == "identify":
            return {"identity": asdict(read_identity(data, limits))}, b""
        return _prepare(order, bytes(data), limits)
    except CxrError as error:
        # a header that asks for too much cost nothing yet
        return {"error": error.code, "message": error.message, "recycle": isinstance(error.__cause__, MemoryError)}, b""
    except MemoryError:
        message = f"image needs more than the {limits.memory_mib} MiB allowed; send a smaller file"
        return {"error": LimitExceeded.code, "message": message, "recycle": True}, b""
    except ImportError as error:
        message = f"decoding process did not import {error.name} before it was locked; report it"
        return {"error": InternalError.code, "message": message}, b""
    except Exception as error:
        message = f"image cannot be read ({type(error).__name__}); the file is damaged"
        return {"error": InvalidImage.code, "message": message}, b""


_FACTS = (
    "format",
    "transfer_syntax",
    "transfer_syntax_name",
    "sop_class",
    "modality",
    "photometric",
    "bits_stored",
    "signed",
    "rows",
    "columns",
    "pixel_aspect_ratio",
    "view",
    "patient_orientation",
    "laterality",
)
"""Of `Metadata`, those that a reading reports."""


def _prepare(order: dict, data: bytes, limits: Limits) -> tuple[dict, bytes]:
    started = time.perf_counter()
    radiograph = read_image(data, limits)
    decoded = time.perf_counter()
    metadata = radiograph.metadata
    if (window := order["window"]) is not None:
        metadata = replace(metadata, voi=metadata.other_windows[window].transform)
    picture = render(replace(radiograph, metadata=metadata), order["preset"])
    region, doubts = _judge(metadata, picture.pixels, order) if order["not_a_chest"] else ({}, ())
    height, width = picture.pixels.shape[:2]
    budget = {name: order[name] for name in ("min_pixels", "max_pixels", "factor")}
    size = target_size(*square_size(height, width, metadata.pixel_aspect_ratio), **budget)
    pixels = np.ascontiguousarray(resize(picture.pixels, size))
    finished = time.perf_counter()
    facts = {name: getattr(metadata, name) for name in _FACTS}
    facts |= {
        "pixel_aspect_ratio": round(metadata.pixel_aspect_ratio, 4),
        "preset": picture.preset,
        "percentiles": picture.percentiles,
        "padding_share": round(picture.padding_share, 4),
        "flags": sorted({*picture.flags, *doubts}),
        "identity": identity_of(data, radiograph),
        **region,
    }
    answer = {
        "shape": list(pixels.shape),
        "source_size": [height, width],
        "facts": facts,
        "study_date": metadata.study_date,
        "windows": [[each.kind, each.number, each.words] for each in metadata.other_windows],
        "decode_ms": round((decoded - started) * 1000, 3),
        "preprocess_ms": round((finished - decoded) * 1000, 3),
    }
    return answer, pixels.tobytes()


def _judge(metadata: Metadata, pixels: np.ndarray, order: dict) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Facts about the part of the body, and flags.

    Raises
    ------
    NotAChest
        Unless the order says to flag it.
    """
    found = judge(metadata.anatomy, metadata.view, pixels, order["views"])
    if found.refusal and order["not_a_chest"] == "refuse":
        raise NotAChest(
            f"image is no chest radiograph: {found.refusal}; send a chest, or see not_a_chest of the profile"
        )
    likeness = None if found.likeness is None else round(found.likeness.chest, 3)
    doubts = (*found.doubts, "not_a_chest") if found.refusal else found.doubts
    return {"region": metadata.anatomy.says, "chest_likeness": likeness}, doubts


def _warm_up(limits: Limits) -> None:
    """Import and run everything that an image needs: the first one is not slow, and later nothing can be imported."""
    import imagecodecs
    from PIL import Image

    words = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    octets = (words >> 4).astype(np.uint8)
    streams = {
        "lossless": imagecodecs.jpeg8_encode(words, lossless=True, predictor=1, bitspersample=12),
        "baseline": imagecodecs.jpeg8_encode(octets),
        "jpeg_ls": imagecodecs.jpegls_encode(words),
        "jpeg2000": imagecodecs.jpeg2k_encode(words, codecformat="J2K", reversible=True, level=0),
        "htj2k": imagecodecs.htj2k_encode(words, reversible=True),
    }
    for kind, stream in streams.items():
        decode(Codestream(kind, 64, 64, 1, 8 if kind == "baseline" else 12), bytes(stream), (64, 64), words.dtype)
    runs = b"".join(b"\x7f" + part.tobytes() for part in octets.reshape(-1, 128))
    stream = struct.pack("<16I", 1, 64, *[0] * 14) + runs
    decode(Codestream("rle", 0, 0, 1, 8), stream, (64, 64), octets.dtype)
    read_png(bytes(imagecodecs.png_encode(octets)), limits)
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = io.BytesIO()
    Image.fromarray(octets).save(jpeg, "JPEG", exif=turned)
    read_jpeg(jpeg.getvalue(), limits)
    radiograph = Radiograph(words, Metadata("dicom", 64, 64, 12))
    render(radiograph, "voi_display")
    shown = render(radiograph, "mimic_jpg").pixels
    resize(shown, (28, 28))
    judge(Anatomy(), "unknown", shown)
    identity_of(b"", replace(radiograph, stored=words))


def _restrict(limits: Limits) -> None:
    """No more address space than allowed, no core dump, no file growth, no gain of privileges."""
    space = limits.memory_mib * 1024**2
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _peak_mib(status: int) -> float:
    """Most resident memory of this program; `ru_maxrss` would also count what the parent held when it forked."""
    return int(os.pread(status, 1 << 16, 0).partition(b"VmHWM:")[2].split()[0]) / 1024


def _exit_with_parent(source: int, parent: int) -> None:
    """End even in the middle of a decoder when the parent closes the pipe or dies."""
    poll = select.poll()
    poll.register(source, 0)  # POLLHUP is always reported
    while not poll.poll(1000) and os.getppid() == parent:
        pass
    os._exit(0)


def _take(source: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(source.fileno(), [view])
        if not count:
            os._exit(0)
        view = view[count:]
    return bytes(data)


def _reply(fd: int, answer: dict, pixels: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    view = memoryview(HEAD.pack(len(text), len(pixels)) + text + pixels)
    while view:
        view = view[os.write(fd, view) :]


if __name__ == "__main__":
    serve(Limits(**json.loads(sys.argv[1])))
