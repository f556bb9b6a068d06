"""What one server's stages take, each alone: the JSON that a simulation starts from."""

from __future__ import annotations

import bisect
import json
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.config import Checked, build, in_range, one_of
from cxr_triton.errors import InvalidConfig

SCHEMA_VERSION = 1
MAX_BYTES = 8 << 20
PLACES = ("cores", "card")
_MS = 1e8


@dataclass(frozen=True, kw_only=True)
class Cost(Checked):
    """What something takes when nothing else runs.

    Attributes
    ----------
    ms : float
        From its begin to its end.
    cpu_ms : float
        Processor time meanwhile, of all cores together.
    """

    ms: float = in_range(0, _MS)
    cpu_ms: float = in_range(0, _MS)

    def __post_init__(self):
        super().__post_init__()
        if self.cpu_ms and not self.ms:
            raise InvalidConfig(f"ms: is 0 with cpu_ms {self.cpu_ms:g}; work takes time")


@dataclass(frozen=True, kw_only=True)
class Point(Cost):
    """The cost of a piece of size `at`."""

    at: int = in_range(1, 10**6)


@dataclass(frozen=True, kw_only=True)
class Curve(Checked):
    """A stage whose cost depends on the size of what it takes at once.

    Attributes
    ----------
    on : str
        ``cores``, or ``card``: then it has the whole card while it runs alone.
    points : tuple of Point
        With ascending sizes.
    """

    on: str = one_of(PLACES)
    points: tuple[Point, ...]

    def __post_init__(self):
        super().__post_init__()
        sizes = [point.at for point in self.points]
        if not sizes or sizes != sorted(set(sizes)):
            raise InvalidConfig(f"points: sizes {sizes} have to ascend, and there has to be one")

    @property
    def largest(self) -> int:
        """The largest size that was measured."""
        return self.points[-1].at

    def cost(self, size: int) -> tuple[float, float]:
        """Seconds, and processor seconds: linear between points, below the first one as it.

        Raises
        ------
        InvalidConfig
            `size` is over the largest that was measured.
        """
        if size > self.largest:
            raise InvalidConfig(f"a size of {size} was not measured, {self.largest} is the largest; measure it too")
        above = bisect.bisect_left(self.points, size, key=lambda point: point.at)
        high = self.points[above]
        if above == 0 or high.at == size:
            return high.ms / 1e3, high.cpu_ms / 1e3
        low = self.points[above - 1]
        share = (size - low.at) / (high.at - low.at)
        return (
            (low.ms + share * (high.ms - low.ms)) / 1e3,
            (low.cpu_ms + share * (high.cpu_ms - low.cpu_ms)) / 1e3,
        )


@dataclass(frozen=True, kw_only=True)
class Machine(Checked):
    """One server and what it runs on.

    Attributes
    ----------
    cores, cards : int
        One server uses one card at most.
    preprocess_instances, slots, queue_size : int
        As `cxr-triton package` has them.
    vision_batch : int
        Pictures that the tower takes at once.
    prefill_chunk : int
        Tokens of a prompt between two steps.
    chunk_tokens, chunk_ms : int, float
        Text goes out when it has so many tokens, or would be older.
    scattered : float
        Share of the pieces that stay on the core where chance put them; 0 where nobody measured it.
    """

    cores: int = in_range(1, 4096)
    cards: int = in_range(0, 1, default=0)
    preprocess_instances: int = in_range(1, 1024, default=2)
    slots: int = in_range(1, 4096, default=4)
    queue_size: int = in_range(1, 10**6, default=64)
    vision_batch: int = in_range(1, 1024, default=8)
    prefill_chunk: int = in_range(1, 10**6, default=128)
    chunk_tokens: int = in_range(1, 4096, default=8)
    chunk_ms: float = in_range(0, 1e5, default=30.0)
    scattered: float = in_range(0, 1, default=0.0)


@dataclass(frozen=True, kw_only=True)
class Kind(Checked):
    """One kind of reading; a file has as many as were measured, and they come in turn.

    Attributes
    ----------
    bytes : int
        Of one picture's file.
    preprocess_ms, preprocess_cpu_ms : float
        Decoding of one picture's file and preparing it.
    prompt_tokens, image_tokens, answer_tokens : int
        Of the prompt with one picture, of that picture in it, and of the answer.
    """

    bytes: int = in_range(0, 1 << 34)
    preprocess_ms: float = in_range(0, _MS)
    preprocess_cpu_ms: float = in_range(0, _MS)
    prompt_tokens: int = in_range(1, 10**6)
    image_tokens: int = in_range(0, 10**6, default=0)
    answer_tokens: int = in_range(1, 10**6)


@dataclass(frozen=True, kw_only=True)
class Kept(Checked):
    """Bytes that a reading leaves, and memory that a server takes.

    Attributes
    ----------
    answer_bytes : int
        Of all responses on the wire.
    row_bytes : int
        Of its row in an archive's Parquet files.
    gateway_bytes : int
        Of what the gateway keeps of a study beside its pictures.
    memory_mib, card_memory_mib : int or None
        Of a server's processes, and of the card; None where it was not measured.
    """

    answer_bytes: int = in_range(0, 1 << 34)
    row_bytes: int = in_range(0, 1 << 34)
    gateway_bytes: int = in_range(0, 1 << 34)
    memory_mib: int | None = None
    card_memory_mib: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("memory_mib", "card_memory_mib"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1 << 30:
                raise InvalidConfig(f"{name}: {value} is outside 0 to {1 << 30}")


@dataclass(frozen=True, kw_only=True)
class Stages(Checked):
    """A file of stage times.

    Attributes
    ----------
    title, date, command : str
        What was measured, when and how.
    sources : tuple of str
        Where the numbers stand, if they were put together from several records.
    assumed : tuple of str
        What was not measured on this hardware; every result repeats it.
    environment, versions : dict of str to str
    machine : Machine
    readings : tuple of Kind
    transport : Cost
        Between client and server and between the stages, for a reading.
    tower, prefill, step : Curve
        Over pictures, over tokens of a piece of a prompt, over streams.
    token : Cost
        In the decoder's own thread for each token beside the step: sampling, text.
    chunk : Cost
        For each response: `ms` of the one `report` process, `cpu_ms` of all processes.
    report : Cost
        From the last token to the reading, and from the first one to the first text.
    kept : Kept
    """

    schema_version: int = in_range(SCHEMA_VERSION, SCHEMA_VERSION)
    title: str
    date: str
    command: str
    sources: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    environment: dict[str, str]
    versions: dict[str, str]
    machine: Machine
    readings: tuple[Kind, ...]
    transport: Cost
    tower: Curve
    prefill: Curve
    step: Curve
    token: Cost
    chunk: Cost
    report: Cost
    kept: Kept

    def __post_init__(self):
        super().__post_init__()
        if not self.readings:
            raise InvalidConfig("readings: is empty; name at least one kind")
        machine = self.machine
        for name, size in (("tower", "vision_batch"), ("step", "slots")):
            curve: Curve = getattr(self, name)
            if getattr(machine, size) > curve.largest:
                raise InvalidConfig(
                    f"machine.{size}: is {getattr(machine, size)}, and {name} was measured up to {curve.largest}; "
                    f"measure {name} there, or lower it"
                )
        if not machine.cards and any(getattr(self, name).on == "card" for name in ("tower", "prefill", "step")):
            raise InvalidConfig("machine.cards: is 0, and a stage runs on a card; set it to 1")


def load_stages(path: Path) -> Stages:
    """Stage times of a JSON file.

    Raises
    ------
    InvalidConfig
        Not readable, no JSON, or a key that is unknown, missing, of the wrong type or out of range.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InvalidConfig(f"{path.name}: has {size} bytes, allowed {MAX_BYTES}; give a file of stage times")
        data = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        said = str(error) or type(error).__name__
        raise InvalidConfig(f"{path.name}: not readable as JSON: {said[:200]}; give a file of stage times") from None
    return build(Stages, data, path.name)


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key of {', '.join(list(found)[:8])} is given twice")
    return found
