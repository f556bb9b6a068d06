"""Mutated inputs through every door: what is taken, what is refused and by which code, and what should not be.

    python tests/integration/mutated.py --inputs 1000000 --json OUT
    python tests/integration/mutated.py --inputs 2000 --doors dicom,png --seed 7 --keep FOLDER

Doors: ``dicom``, ``png`` and ``jpeg`` are files that the decoding process of the server reads (`Sandbox.prepare`, the
server's limits), ``request`` is REQUEST as `ReadRequest` and `Preprocessor` take it, ``stow`` and ``dimse`` are the
doors of a gateway process on loopback. An input is the same for the same seed, door and number, whatever else runs.

Of a lossless file that was taken the pixels are compared: with those of the files it was made of, and where they
differ, with what other decoders read in the mutated file (`lossless_reference`). The status is 1 when there is a
finding: an error that has no type, a process that died outside the decoding one, a limit that was not kept, or a
picture that every reference that takes the file reads in another way and that has no flag.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mutator
import mutator_messages
from lossless_reference import References
from mutated_gateway import through_dimse, through_stow
from mutation_corpus import corpus
from reliability import provenance
from served import write_paper_bundle

from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.errors import CxrError
from cxr_triton.identity import pixels_digest
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.flags import DOUBTFUL
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.sandbox import Prepared, Sandbox
from cxr_triton.request import ReadRequest

SHARES = {"dicom": 0.35, "png": 0.17, "jpeg": 0.15, "request": 0.32, "stow": 0.0085, "dimse": 0.0015}
"""Of all inputs, by door."""
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
_BUDGET = {"min_pixels": 784, "max_pixels": 64 * 64}
_MOST_KEPT = 40
THREADS = 6
"""Decoding processes of a door at once."""


@dataclass
class Work:
    """What one door has to do."""

    door: str
    inputs: int
    seed: int
    ends: float  # of time.monotonic, which processes share
    keep: str | None

    def rng(self, number: int) -> random.Random:
        """Of an input."""
        return random.Random(f"{self.seed} {self.door} {number}")


@dataclass
class Tally:
    """What came of a door's inputs."""

    work: Work
    outcomes: Counter = field(default_factory=Counter)
    findings: Counter = field(default_factory=Counter)
    kept: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    done: int = 0
    started: float = field(default_factory=time.monotonic)

    def finding(self, kind: str, number: int, data: bytes, said: str = "") -> None:
        """Count it, and keep its bytes where somebody asked for them."""
        self.findings[kind] += 1
        self.examples.setdefault(kind, f"input {number}: {said}"[:300])
        self.keep(kind, number, data)

    def keep(self, kind: str, number: int, data: bytes) -> None:
        """The bytes of an input, where somebody asked for them; some of a kind."""
        self.kept[kind] += 1
        if self.work.keep and self.kept[kind] <= _MOST_KEPT:
            name = f"{self.work.door}-{kind.replace(' ', '_').replace('/', '_')[:40]}-{number}"
            Path(self.work.keep).mkdir(parents=True, exist_ok=True)
            Path(self.work.keep, name).write_bytes(data)

    def goes_on(self) -> bool:
        """Count an input, and say so now and then; false when the time is up."""
        self.done += 1
        spent = time.monotonic() - self.started
        if self.done % 5000 == 0:
            rate = self.done / spent
            click.echo(
                f"{self.work.door}: {self.done} of {self.work.inputs}, {rate:.0f}/s, {dict(self.findings)}", err=True
            )
        return time.monotonic() < self.work.ends

    def record(self, **more: Any) -> dict[str, Any]:
        """JSON of a door."""
        spent = time.monotonic() - self.started
        return {
            "inputs": self.done,
            "seconds": round(spent, 1),
            "outcomes": dict(self.outcomes.most_common()),
            "findings": dict(self.findings.most_common()),
            **({"examples": self.examples} if self.examples else {}),
            **more,
        }


# ---------------------------------------------------------------------------------------------------------------- files


def _digests(values: np.ndarray) -> set[str]:
    """Of values, in each of the types that hold them."""
    kinds = ("u1", "i1", "u2", "i2") if values.ndim == 2 else ("u1",)
    return {pixels_digest(values.astype(kind)) for kind in kinds if np.array_equal(values.astype(kind), values)}


class _Files:
    """The references, and what came of the files of one kind; decoding processes are its threads'."""

    def __init__(self, work: Work):
        self.work, self.tally, self.lock = work, Tally(work), threading.Lock()
        seeds: dict[str, bytes] = getattr(corpus(SHARED if SHARED.is_dir() else None), work.door)
        self.names, self.seeds = list(seeds), list(seeds.values())
        self.known = {digest for data in self.seeds for digest in _digests(read_image(data).stored)}
        self.limits, self.references = Limits(), References()
        self.compared: Counter = Counter()
        self.slowest, self.pids, self.numbers = 0.0, set(), iter(range(work.inputs))

    def take_turns(self) -> None:
        """Inputs one after another, through a decoding process of the thread's own."""
        goes_on = True
        with Sandbox(self.limits, recycle_after=1 << 30) as sandbox:
            while goes_on:
                with self.lock:
                    number = next(self.numbers, None)
                if number is None:
                    return
                goes_on = self._try_one(number, sandbox)

    def _try_one(self, number: int, sandbox: Sandbox) -> bool:
        """Mutate, read, and judge what came of it."""
        rng = self.work.rng(number)
        data = mutator.of_file(self.work.door, rng.choice(self.seeds), rng, self.seeds)
        # judging a picture takes most of the time
        order = {"preset": "mimic_jpg", "not_a_chest": "flag" if number % 50 == 0 else None, **_BUDGET}
        prepared: Prepared | Exception
        started = time.monotonic()
        try:
            prepared = sandbox.prepare(data, **order)
        except Exception as error:
            prepared = error
        spent = time.monotonic() - started
        with self.lock:
            self.slowest = max(self.slowest, spent)
            self.pids.add(sandbox.pid)
            if isinstance(prepared, Exception):
                self._refused(prepared, number, data)
            else:
                self.tally.outcomes["taken"] += 1
                self._compare(prepared.facts, number, data)
            return self.tally.goes_on()

    def _refused(self, error: Exception, number: int, data: bytes) -> None:
        if not isinstance(error, CxrError):
            self.tally.outcomes["something else"] += 1
            return self.tally.finding(f"untyped {type(error).__name__}", number, data, str(error))
        if error.message.startswith("decoder crashed"):
            self.tally.outcomes["contained: the decoding process crashed"] += 1
            self.tally.examples.setdefault("crash in the child", f"input {number}: {error.message}")
            return None
        if (
            error.message.startswith(("image cannot be read (", "decoder's answer makes no"))
            or error.code == "INTERNAL"
        ):
            self.tally.finding("unforeseen " + error.message[:60], number, data, error.message)
        self.tally.outcomes[f"refused {error.code}"] += 1
        return None

    def _compare(self, facts: dict[str, Any], number: int, data: bytes) -> None:
        """Put a picture in one of the classes of a lossless file that was taken."""
        if "lossy" in facts["flags"]:
            self.compared["lossy, not compared"] += 1
            return
        digest = facts["identity"]["pixels_sha256"]
        if digest in self.known:
            self.compared["equal to an original"] += 1
            return
        found = self.references.ask(data, facts)
        taken = {name: digests for name, digests in found.items() if digests}
        if any(digest in digests for digests in taken.values()):
            self.compared["equal to a reference's reading of the mutated file"] += 1
        elif DOUBTFUL & set(facts["flags"]):
            self.compared["flagged as doubtful"] += 1
        elif not taken:
            self.compared["no reference takes the file"] += 1
            self.tally.keep("unreferenced", number, data)
        else:
            self.compared["differs"] += 1
            syntax = facts["transfer_syntax_name"] or facts["format"]
            self.tally.finding(f"differs {syntax}", number, data, f"from {', '.join(taken)}")

    def record(self) -> dict[str, Any]:
        """JSON of the door, with the limits and how near the inputs came to them."""
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # the references still run
        self.references.close()
        if self.slowest > self.limits.time_s + 2:
            self.tally.finding("time limit not kept", -1, b"", f"{self.slowest:.1f} s")
        if peak_mib > self.limits.memory_mib:
            self.tally.finding("memory limit not kept", -1, b"", f"{peak_mib:.0f} MiB")
        return self.tally.record(
            compared=dict(self.compared.most_common()),
            limits={"time_s": self.limits.time_s, "memory_mib": self.limits.memory_mib},
            slowest_s=round(self.slowest, 3),
            peak_mib=round(peak_mib),
            decoding_processes=len(self.pids),
            reference_processes_that_died=self.references.died,
            started_from=self.names,
        )


def through_files(work: Work) -> dict[str, Any]:
    """The door of DICOM, PNG or JPEG files."""
    files = _Files(work)
    with ThreadPoolExecutor(THREADS) as pool:
        for turns in [pool.submit(files.take_turns) for _ in range(THREADS)]:
            turns.result()
    return files.record()


# -------------------------------------------------------------------------------------------------------------- REQUEST


def through_request(work: Work) -> dict[str, Any]:
    """The door of REQUEST: parsed, made messages, and one in ten tokenized as well."""
    tally, seeds = Tally(work), corpus().request
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        preprocessor = Preprocessor(write_paper_bundle(Path(folder) / "bundle"))
        profile = preprocessor.profile
        for number in range(work.inputs):
            rng = work.rng(number)
            text = mutator_messages.of_request(rng.choice(seeds), rng)
            started = time.monotonic()
            try:
                asked = ReadRequest.from_json(text, profile)
                for count in {asked.min_images, min(1, asked.max_images), asked.max_images}:
                    asked.messages(count)
                if number % 10 == 0 and asked.min_images == 0:
                    sampling_of(preprocessor.prepare([], text).context)
                    tally.outcomes["tokenized"] += 1
                tally.outcomes["taken"] += 1
            except CxrError as error:
                tally.outcomes[f"refused {error.code}"] += 1
                if error.code == "INTERNAL":
                    tally.finding("INTERNAL", number, text, error.message)
            except Exception as error:
                tally.outcomes["something else"] += 1
                tally.finding(f"untyped {type(error).__name__}", number, text, str(error))
            slowest = max(slowest, time.monotonic() - started)
            if not tally.goes_on():
                break
        preprocessor.close()
    return tally.record(slowest_s=round(slowest, 3))


def _through_stow(work: Work) -> dict[str, Any]:
    return through_stow(work, Tally(work))


def _through_dimse(work: Work) -> dict[str, Any]:
    return through_dimse(work, Tally(work))


DOORS: dict[str, Callable[[Work], dict[str, Any]]] = {
    **dict.fromkeys(("dicom", "png", "jpeg"), through_files),
    "request": through_request,
    "stow": _through_stow,
    "dimse": _through_dimse,
}


def run(
    doors: list[str], inputs: int, seed: int, *, minutes: float, keep: str | None, processes: int
) -> dict[str, Any]:
    """A record of all doors; each runs in a process of its own, `processes` at once."""
    total, ends = sum(SHARES[door] for door in doors), time.monotonic() + 60 * minutes
    works = [Work(door, max(1, round(inputs * SHARES[door] / total)), seed, ends, keep) for door in doors]
    found: dict[str, Any] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool:
        pending = {pool.submit(DOORS[work.door], work): work.door for work in works}
        for future in as_completed(pending):
            found[pending[future]] = future.result()
            click.echo(f"{pending[future]}: {json.dumps(found[pending[future]])}", err=True)
    return {
        "inputs": sum(door["inputs"] for door in found.values()),
        "findings": sum(sum(door["findings"].values()) for door in found.values()),
        "seed": seed,
        "mutator_sha256": hashlib.sha256(
            b"".join(Path(m.__file__).read_bytes() for m in (mutator, mutator_messages))
        ).hexdigest(),
        "doors": {door: found[door] for door in doors},
    }


@click.command(help=__doc__)
@click.option("--inputs", default=1_000_000, show_default=True, help="Mutated inputs, all doors together.")
@click.option("--doors", default=",".join(DOORS), show_default=True)
@click.option("--minutes", default=60.0, show_default=True, help="After which all doors end.")
@click.option("--seed", default=1, show_default=True)
@click.option("--processes", default=1, show_default=True, help="Doors at once.")
@click.option("--keep", type=click.Path(file_okay=False), help="Folder for the bytes of findings.")
@click.option("--json", "to", type=click.Path(dir_okay=False), help="Where the record goes.")
def main(inputs: int, doors: str, minutes: float, seed: int, processes: int, keep: str | None, to: str | None) -> None:
    """Mutate, put through the doors, and record."""
    names = doors.split(",")
    if unknown := set(names) - set(DOORS):
        raise click.BadParameter(f"{', '.join(unknown)}: no such door; there are {', '.join(DOORS)}")
    packages = (
        "cxr-triton",
        "imagecodecs",
        "pillow",
        "pydicom",
        "pylibjpeg",
        "pylibjpeg-openjpeg",
        "pynetdicom",
        "aiohttp",
    )
    command = f"python tests/integration/mutated.py --inputs {inputs} --doors {doors} --seed {seed}"
    record = provenance(command, packages, ["dcmtk"])
    record |= run(names, inputs, seed, minutes=minutes, keep=keep, processes=processes)
    text = json.dumps(record, indent=2)
    if to:
        Path(to).write_text(text + "\n")
    click.echo(text)
    sys.exit(1 if record["findings"] else 0)


if __name__ == "__main__":
    main()
