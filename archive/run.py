"""A run over a source: what has no row yet goes through Ray Data's actors in units, and their rows to the disk."""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa

from cxr_triton.archive.cluster import ray_started
from cxr_triton.archive.folder import Folder
from cxr_triton.archive.item import Item
from cxr_triton.archive.rows import key_of, unpacked
from cxr_triton.archive.worker import Task, Worker, error_of
from cxr_triton.errors import CxrError, InternalError

UNIT = 16
"""Images that an actor is given at once: what a killed one reads again."""
WINDOW = 2048
"""Units of one execution of Ray Data, which holds them all."""
_BLOCK_BYTES = 1 << 20
_SPOOL = "todo.jsonl"


@dataclass(kw_only=True)
class Ran:
    """What a run came to.

    Attributes
    ----------
    found : int
        Images of the source.
    there : int
        Of them, those that had a row before.
    rows : int
        Written by this run.
    seconds : float
        From the first unit to the last row.
    nodes : Counter
        Rows by Ray's name of the machine.
    """

    found: int = 0
    there: int = 0
    rows: int = 0
    seconds: float = 0.0
    nodes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class Actors:
    """How many actors, and what each takes.

    Attributes
    ----------
    count : int
    cpus, gpus : float
        Of each.
    """

    count: int = 1
    cpus: float = 0.25
    gpus: float = 0.0


@dataclass(frozen=True)
class Run:
    """Reading what has no row yet.

    Parameters
    ----------
    folder : Folder
    task : Task
    actors : Actors
    tell : callable
        Given the rows of each unit once they are on the disk.
    begins : callable
        Given `Ran` once the source is known.
    """

    folder: Folder
    task: Task
    actors: Actors
    tell: Callable[[pa.Table], None] = lambda rows: None
    begins: Callable[[Ran], None] = lambda ran: None

    def over(self, source: Iterable[Item]) -> Ran:
        """Read a source through.

        Raises
        ------
        Unavailable, QueueFull
            The servers are out of reach or full for as long as a reading may take. What was read is on the disk.
        ServerMismatch
            A server reads with another bundle than the rows that are there.
        InvalidRequest
            No image can be asked so.
        """
        ran, actors = Ran(), self.actors
        spool = self.folder.work / _SPOOL
        with open(spool, "w", encoding="utf-8") as file:
            for item in _without_row(source, self.folder.done(), ran):
                file.write(json.dumps(asdict(item)) + "\n")
        self.begins(ran)
        if ran.there < ran.found:
            with ray_started(math.ceil(actors.count * actors.cpus), math.ceil(actors.count * actors.gpus)):
                self._read(spool, ran)
        return ran

    def _read(self, spool: Path, ran: Ran) -> None:
        begins_s, ended_by = time.monotonic(), ""
        for units in _windows(spool):
            for stream, stopped, node in _units_read(units, self.task, self.actors):
                rows = unpacked(stream)
                if rows.num_rows:
                    self.folder.add(rows)
                    ran.rows += rows.num_rows
                    ran.nodes[node] += rows.num_rows
                    ran.seconds = time.monotonic() - begins_s
                    self.tell(rows)
                ended_by = ended_by or stopped  # units that are under way still bring what they read
            if ended_by:
                raise error_of(ended_by)


def _without_row(source: Iterable[Item], done: set[bytes], ran: Ran) -> Iterator[Item]:
    """Items that have no row, each once however often the source names it."""
    seen: set[bytes] = set()
    for item in source:
        key = key_of(item.name)
        if key in seen:
            continue
        seen.add(key)
        ran.found += 1
        if key in done:
            ran.there += 1
        else:
            yield item


def _windows(spool: Path) -> Iterator[list[str]]:
    """Units, each the JSON of a list of items, so many at a time."""
    with open(spool, encoding="utf-8") as lines:
        units = ("[" + ",".join(unit) + "]" for unit in _some(lines, UNIT))
        yield from _some(units, WINDOW)


def _some(each: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(each)
    while taken := list(itertools.islice(iterator, size)):
        yield taken


def _units_read(units: list[str], task: Task, actors: Actors) -> Iterator[tuple[bytes, str, str]]:
    """Rows, what stopped the unit, and the node, as units end. Ray begins again what a killed actor had."""
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = _BLOCK_BYTES  # what Ray sets aside for a unit whose size it does not know
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    calls = max(2, math.ceil(2 * task.slots / UNIT) + 1)
    strategy = ray.data.ActorPoolStrategy(
        size=actors.count, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=calls + 1
    )
    dataset = ray.data.from_items([{"items": unit} for unit in units], override_num_blocks=len(units)).map_batches(
        Worker,
        fn_constructor_args=(task,),
        batch_size=1,
        compute=strategy,
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0):
            yield from zip(batch["rows"], batch["stopped"], batch["node"], strict=True)
    except CxrError:
        raise
    except ray.exceptions.RayError as error:
        raise InternalError(f"Ray: {type(error).__name__}: {str(error).splitlines()[0]:.300}; run it again") from None
