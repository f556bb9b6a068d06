"""What a benchmark asks: images, requests and their arrival, from a named, versioned YAML file and a seed.

A workload becomes bytes here, once: `Item.message` for the open-loop client, `input_data` for perf_analyzer. Its digest
covers every byte that is sent, so two results with the same digest asked the same.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cxr_triton.config import Checked, build, in_range, one_of, read_yaml
from cxr_triton.errors import InvalidImage, InvalidRequest, unknown_key

WORKLOADS = Path(__file__).with_name("workloads")
ARRIVALS = ("poisson", "constant")
NOISE = 0.004
"""Detector noise of an enlarged phantom, in parts of full scale: lossless codecs then get about 2:1."""
Z95 = 1.6449  # standard normal, 95 %


class _Checked(Checked):
    error = InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Images(_Checked):
    """Where images come from: files of a folder, or phantoms that are drawn.

    Attributes
    ----------
    folder : str or None
        Every DICOM, PNG and JPEG file in it, by name; None draws phantoms.
    phantoms : int
        How many to draw.
    sizes : tuple of str
        ``ROWSxCOLUMNS`` in turn; as drawn (200 to 420 pixels a side) when empty.
    syntaxes, bits_stored : tuple
        In turn; see `cxr_triton.phantom_file.SYNTAXES`. Phantoms as drawn have depths of their own.
    """

    folder: str | None = None
    phantoms: int = in_range(1, 1000, default=8)
    sizes: tuple[str, ...] = ()
    syntaxes: tuple[str, ...] = ("explicit",)
    bits_stored: tuple[int, ...] = (12,)

    def __post_init__(self):
        from cxr_triton.phantom_file import SYNTAXES

        super().__post_init__()
        for size in self.sizes:
            if not re.fullmatch(r"[1-9]\d{1,4}x[1-9]\d{1,4}", size):
                raise InvalidRequest(f"sizes: {size!r} is not ROWSxCOLUMNS, for example 2500x2048")
        for syntax in self.syntaxes:
            if syntax not in SYNTAXES:
                raise InvalidRequest(unknown_key(syntax, SYNTAXES, "syntaxes"))
        if not self.syntaxes or not self.bits_stored:
            raise InvalidRequest("syntaxes and bits_stored: name at least one")
        for bits in self.bits_stored:
            if not 8 <= bits <= 16:
                raise InvalidRequest(f"bits_stored: {bits} is outside 8 to 16")


@dataclass(frozen=True, kw_only=True)
class Output(_Checked):
    """Length limits of answers, in tokens: log-normal with this median and 95th percentile, cut at `max`."""

    median: int = in_range(1, 32768)
    p95: int = in_range(1, 32768)
    max: int = in_range(1, 32768)

    def __post_init__(self):
        super().__post_init__()
        if not self.median <= self.p95 <= self.max:
            raise InvalidRequest(f"output: median {self.median}, p95 {self.p95} and max {self.max} have to ascend")

    def draw(self, rng: np.random.Generator) -> int:
        """A limit in tokens."""
        sigma = math.log(self.p95 / self.median) / Z95
        return min(self.max, max(1, round(self.median * math.exp(sigma * rng.standard_normal()))))


@dataclass(frozen=True, kw_only=True)
class Ask(_Checked):
    """One kind of request; what is left out is left to the server's profile.

    Attributes
    ----------
    weight : int
        Its share among the workload's requests.
    images : int
        Images of a request.
    output : Output or None
        Limits of the answers' lengths; None lets the model end by itself.
    """

    task: str | None = None
    prompt: str | None = None
    variables: dict[str, str] = field(default_factory=dict)
    mode: str | None = None
    images: int = in_range(0, 16, default=1)
    weight: int = in_range(1, 1000, default=1)
    output: Output | None = None


@dataclass(frozen=True, kw_only=True)
class Spec(_Checked):
    """A workload file."""

    name: str
    version: int = in_range(1, 10**6)
    description: str
    seed: int = in_range(0, 2**32 - 1, default=0)
    arrival: str = one_of(ARRIVALS, default="poisson")
    count: int = in_range(1, 10_000, default=16)
    images: Images
    requests: tuple[Ask, ...]


@dataclass(frozen=True)
class Image:
    """Bytes of one file and what is known of it."""

    name: str
    data: bytes
    facts: dict = field(default_factory=dict)

    def as_json(self) -> dict:
        """Name, bytes, digest and what is known of it."""
        digest = hashlib.sha256(self.data).hexdigest()
        return {"name": self.name, "bytes": len(self.data), "sha256": digest, **self.facts}


@dataclass(frozen=True)
class Item:
    """One request: its images and its REQUEST."""

    images: tuple[Image, ...]
    request: dict

    def message(self, model: str) -> bytes:
        """The serialized ``ModelInferRequest``."""
        from cxr_triton.client.wire import infer_request

        contents = [image.data for image in self.images]
        return infer_request(model, contents, self.request, max_message_mib=1024).SerializeToString()

    def as_json(self) -> dict:
        """``item`` of a result's workload."""
        return {"images": [image.as_json() for image in self.images], "request": self.request}


@dataclass(frozen=True)
class Workload:
    """A workload with everything drawn and read."""

    spec: Spec
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """sha256 over all that is sent, in order."""
        whole = hashlib.sha256()
        for item in self.items:
            for part in (*(image.data for image in item.images), json.dumps(item.request, sort_keys=True).encode()):
                whole.update(hashlib.sha256(part).digest())
        return whole.hexdigest()

    def as_json(self) -> dict:
        """``workload`` of a result."""
        spec = self.spec
        return {
            "name": spec.name,
            "version": spec.version,
            "description": spec.description,
            "seed": spec.seed,
            "digest": self.digest,
            "arrival": spec.arrival,
            "items": [item.as_json() for item in self.items],
        }


def workload_names() -> list[str]:
    """The bundled workloads."""
    return sorted(path.stem for path in WORKLOADS.glob("*.yaml"))


def load_spec(name_or_path: str | Path) -> tuple[Spec, Path]:
    """A bundled workload by name, or a user's own by the path of its YAML file; with the folder that it lies in.

    Raises
    ------
    InvalidRequest
        No such workload, not YAML, or a key that is unknown, missing, of the wrong type or out of range.
    """
    text = str(name_or_path)
    path = WORKLOADS / f"{text}.yaml" if text in workload_names() else Path(text)
    if not path.is_file():
        if "/" in text or text.endswith((".yaml", ".yml")):
            raise InvalidRequest(f"no workload file {text}; give the path of a YAML file or one of {workload_names()}")
        raise InvalidRequest(unknown_key(text, workload_names(), "workload names"))
    spec = build(Spec, read_yaml(path, InvalidRequest), path.name)
    if not spec.requests:
        raise InvalidRequest(f"{path.name}.requests: is empty; name at least one kind of request")
    return spec, path.parent


def load_workload(name_or_path: str | Path, *, images: Path | None = None) -> Workload:
    """A workload as `load_spec` finds it, with its images read or drawn.

    Parameters
    ----------
    name_or_path : str or path
    images : path, optional
        Folder whose files replace the workload's images.

    Raises
    ------
    InvalidRequest
        As `load_spec`; or there is no image.
    InvalidImage
        A file of the folder is no radiograph.
    """
    spec, beside = load_spec(name_or_path)
    folder = images or (beside / spec.images.folder if spec.images.folder else None)
    pool = list(_files(folder) if folder else _phantoms(spec))
    return Workload(spec, tuple(_items(spec, pool)))


def _files(folder: Path) -> Iterator[Image]:
    if not folder.is_dir():
        raise InvalidRequest(f"no folder {folder}; give one with DICOM, PNG or JPEG files")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not files:
        raise InvalidRequest(f"{folder} has no files; give a folder with DICOM, PNG or JPEG files")
    return (_file(f"file-{i}", path) for i, path in enumerate(files))


def _file(name: str, path: Path) -> Image:
    """A file under another name: its own may be a patient's, and results are passed on."""
    from cxr_triton.phantom_file import SYNTAXES
    from cxr_triton.pixels.dicom import read_image

    data = path.read_bytes()
    try:
        found = read_image(data).metadata
    except InvalidImage as error:
        raise type(error)(f"{path}: {error.message}") from None
    short = {str(uid): syntax for syntax, uid in SYNTAXES.items()}
    syntax = short.get(found.transfer_syntax, found.transfer_syntax_name) or found.format
    facts = {"syntax": syntax, "rows": found.rows, "columns": found.columns, "bits_stored": found.bits_stored}
    return Image(name, data, facts)


def _phantoms(spec: Spec) -> Iterator[Image]:
    from cxr_triton import phantom
    from cxr_triton.phantom_file import LOSSY_BITS, write_dicom

    images, rng = spec.images, np.random.default_rng(spec.seed)
    for i in range(images.phantoms):
        drawn = phantom.draw(rng)
        if images.sizes:
            rows, columns = map(int, images.sizes[i % len(images.sizes)].split("x"))
            drawn = enlarge(drawn, rows, columns, images.bits_stored[i % len(images.bits_stored)], rng)
        syntax = images.syntaxes[i % len(images.syntaxes)]
        data = write_dicom(drawn, syntax=syntax, seed=f"{spec.name} {spec.version} {spec.seed} {i}")
        bits = min(drawn.bits_stored, LOSSY_BITS.get(syntax, 16))
        rows, columns = drawn.stored.shape
        facts = {"syntax": syntax, "rows": rows, "columns": columns, "bits_stored": bits}
        yield Image(f"phantom-{i}", data, facts)


def enlarge(drawn, rows: int, columns: int, bits: int, rng: np.random.Generator):
    """A `Phantom` at the size and depth of a detector, with detector noise; without masks."""
    from PIL import Image as Picture

    from cxr_triton.phantom import Phantom

    scale = (2**bits - 1) / (2**drawn.bits_stored - 1)
    large = Picture.fromarray(drawn.stored.astype(np.float32)).resize((columns, rows), Picture.Resampling.BILINEAR)
    stored = np.asarray(large) * scale + rng.standard_normal((rows, columns), np.float32) * (NOISE * (2**bits - 1))
    window = tuple(value * scale for value in drawn.window) if drawn.window else None
    stored = np.clip(np.rint(stored), 0, 2**bits - 1).astype(np.uint16)
    return Phantom(stored, bits, window, drawn.findings, {})


def _items(spec: Spec, pool: Sequence[Image]) -> Iterator[Item]:
    rng = np.random.default_rng([spec.seed, 1])
    kinds = [ask for ask in spec.requests for _ in range(ask.weight)]
    following = itertools.cycle(pool)
    while len(kinds) < spec.count:
        kinds += kinds
    for i, ask in enumerate(rng.permutation(np.array(kinds, object))[: spec.count]):
        # Each request has a seed of its own, so that sampling repeats, and that the request can be told by it.
        request = {"seed": i}
        for key in ("task", "prompt", "mode"):
            if (value := getattr(ask, key)) is not None:
                request[key] = value
        if ask.variables:
            request["variables"] = ask.variables
        if ask.output:
            request["max_new_tokens"] = ask.output.draw(rng)
        yield Item(tuple(itertools.islice(following, ask.images)), request)


def arrivals(arrival: str, rate_per_s: float, seed: Sequence[int]) -> Iterator[float]:
    """Seconds at which requests are due, from the first at 0 on, without end: Poisson, or evenly spaced."""
    rng, at_s = np.random.default_rng(seed), 0.0
    for index in itertools.count():
        yield index / rate_per_s if arrival == "constant" else at_s
        at_s += float(rng.exponential(1 / rate_per_s))


def input_data(items: Sequence[Item]) -> dict:
    """The JSON of perf_analyzer's ``--input-data``.

    The bytes under ``b64`` are the tensor as it travels: every element of a BYTES tensor after its length as a
    little-endian uint32.
    """
    from cxr_triton.client.wire import pack

    def tensor(elements: Sequence[bytes]) -> dict:
        return {"content": {"b64": base64.b64encode(pack(elements)).decode()}, "shape": [len(elements)]}

    return {
        "data": [
            {
                "IMAGES": tensor([image.data for image in item.images]),
                "REQUEST": tensor([json.dumps(item.request).encode()]),
            }
            for item in items
        ]
    }
