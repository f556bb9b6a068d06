"""What other decoders read in a file that may be damaged: pydicom with its plug-ins, DCMTK, Pillow, OpenCV.

They run in a process of their own, because damaged files may crash them: `References`.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton.identity import pixels_digest

TIME_S = 30.0
_DCMTK = {"4.57": "dcmdjpeg", "4.70": "dcmdjpeg", "4.80": "dcmdjpls", "4.81": "dcmdjpls", "5": "dcmdrle"}


def readings(data: bytes, facts: dict[str, Any]) -> Iterator[tuple[str, set[str] | None]]:
    """Each reference's name with the digests that its reading may have, None where it refuses the file; up to an equal.

    `facts` are those of our own reading: of a DICOM file its `bits_stored` and `signed` say which bits are looked at,
    because no reference tells an overlay above BitsStored from a BitsStored that is wrong.
    """
    of_kind = _of_dicom if facts["format"] == "dicom" else _of_png
    for name, read in of_kind(data, facts):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = read()
        except Exception:
            yield name, None
            continue
        digests = _dicom_digests(values, facts) if facts["format"] == "dicom" else {pixels_digest(_collapsed(values))}
        yield name, digests
        if facts["identity"]["pixels_sha256"] in digests:
            return


def _dicom_digests(values: np.ndarray, facts: dict[str, Any]) -> set[str]:
    """Of the lowest bits, in words of 8 and 16 bits where they fit."""
    values = values.astype(np.int64)
    bits = facts["bits_stored"]
    values &= (1 << bits) - 1
    if facts["signed"]:
        values -= (values >> bits - 1) << bits
    kinds = ("i1", "i2") if facts["signed"] else ("u1", "u2")
    return {pixels_digest(values.astype(kind)) for kind in kinds if bits <= 8 * int(kind[1])}


def _of_dicom(data: bytes, facts: dict[str, Any]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    import pydicom
    from pydicom import config
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import UID

    config.settings.reading_validation_mode = config.IGNORE
    syntax = UID(facts["transfer_syntax"])

    def opened(file: bytes | Path) -> pydicom.Dataset:
        dataset = pydicom.dcmread(io.BytesIO(file) if isinstance(file, bytes) else file, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:
            dataset.file_meta.TransferSyntaxUID = syntax
        if "bits_stored_corrected" in facts["flags"]:
            dataset.BitsStored, dataset.HighBit = facts["bits_stored"], facts["bits_stored"] - 1
        return dataset

    if not syntax.is_encapsulated:
        yield "pydicom", lambda: pixel_array(opened(data), raw=True)
        yield "pydicom's elements", lambda: _plain(opened(data))
    else:
        for plugin in get_decoder(syntax).available_plugins:
            yield plugin, lambda plugin=plugin: pixel_array(opened(data), raw=True, decoding_plugin=plugin)
    program = _DCMTK.get(syntax.removeprefix("1.2.840.10008.1.2."), "dcmconv" if not syntax.is_encapsulated else None)
    if program and shutil.which(program):
        yield program, lambda: _dcmtk(program, data, opened)


def _plain(dataset: Any) -> np.ndarray:
    """Native pixels as they lie there."""
    order = "<" if dataset.original_encoding[1] else ">"
    kind = f"{order}u{dataset.BitsAllocated // 8}"
    shape = (dataset.Rows, dataset.Columns)
    values = np.frombuffer(dataset.PixelData, kind, shape[0] * shape[1]).reshape(shape)
    return values.view(values.dtype.str.replace("u", "i")) if dataset.PixelRepresentation else values


def _dcmtk(program: str, data: bytes, opened: Callable[[Path], Any]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.dcm"), Path(folder, "b.dcm")
        source.write_bytes(data)
        to = ["+te"] if program == "dcmconv" else []
        subprocess.run([program, *to, str(source), str(target)], check=True, capture_output=True, timeout=TIME_S / 2)
        return _plain(opened(target))


def _of_png(data: bytes, _: dict[str, Any]) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    yield "Pillow", lambda: _pillow(data)
    yield "OpenCV", lambda: _opencv(data)


def _pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=["PNG"])
    if picture.mode == "P":
        picture = picture.convert("RGB")
    elif picture.mode == "1":
        picture = picture.convert("L")
    values = np.asarray(picture)
    return values.astype(np.uint16) if values.dtype == np.int32 else values


def _opencv(data: bytes) -> np.ndarray:
    import cv2

    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise ValueError("refused")
    return values if values.ndim == 2 else values[..., [2, 1, 0, *range(3, values.shape[2])]]


def _collapsed(values: np.ndarray) -> np.ndarray:
    """Without transparency, gray where the channels are equal, else 8 bits."""
    values = values.reshape(*values.shape[:2], -1)
    values = values[..., :-1] if values.shape[2] in (2, 4) else values
    if (values == values[..., :1]).all():
        return values[..., 0]
    return (values >> 8).astype(np.uint8) if values.dtype == np.uint16 else values


def _serve(connection: Connection) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(EOFError, OSError):
        while True:
            data, facts = connection.recv()
            for reading in readings(data, facts):
                connection.send(reading)
            connection.send(None)


class References:
    """A process that asks the references, and is replaced when one of them takes it down or hangs."""

    def __init__(self) -> None:
        self.died = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, data: bytes, facts: dict[str, Any]) -> dict[str, set[str] | None]:
        """Digests by reference, see `readings`; those after one that crashed are not asked."""
        found: dict[str, set[str] | None] = {}
        try:
            self._connection.send((data, facts))
            while self._connection.poll(TIME_S):
                answer = self._connection.recv()
                if answer is None:
                    return found
                found[answer[0]] = answer[1]
        except (EOFError, OSError):
            pass
        self.died += 1
        self.close()
        self._start()
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()
