"""`cxr-triton tune`: the settings with which this machine serves a bundle fastest, found on the bundle's own graphs.

Each engine runs in a process of its own, and never more than two at a time: the settings in use, and those that are
tried. Both take turns (`race`), on a phantom and the prompt of the profile's default task. Threads, the length of a
prompt's pieces, slots and batches compute the same; one that gives other tokens or embeddings here is not taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton import __version__
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import MANIFEST, Bundle
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.interface import SLOTS, CpuEngine
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.engines.serving import BUNDLE
from cxr_triton.errors import InvalidBundle, InvalidRequest
from cxr_triton.files import why_not_writable
from cxr_triton.perf.decoder import together
from cxr_triton.perf.environment import Stolen, memory_available
from cxr_triton.perf.process import Process
from cxr_triton.perf.race import IN_USE, NO_TIME, SLOWER, Lap, Race, noise, race
from cxr_triton.perf.reuse import TokenReceiver, prompt_of
from cxr_triton.perf.tower import inputs, prepared
from cxr_triton.pixels.image import MERGE
from cxr_triton.sampling import Sampling
from cxr_triton.triton_repo.integrity import require_as_packaged, require_repository
from cxr_triton.triton_repo.package import VISION_BATCH
from cxr_triton.triton_repo.serve import HUGE_PAGES
from cxr_triton.triton_repo.tuned import SCHEMA, parameters_of, settings_of, write_settings

ANSWER_TOKENS = 256
"""Of a reading, for which the time of a few is taken."""
TOKENS = 16
"""That are generated in a lap."""
FIRST_TOKENS = 4
"""The same, where the first one is what counts."""
LAP_S = 0.2
"""Least time of a lap, in which what is short is done several times."""
TEXT_TOKENS = 32
"""Of the prompts of streams that run together."""
ENGINES_CHUNK = 128
"""What 0 means in the place of a prompt's piece."""
CHUNKS = (64, 128, 256, 512)
BATCHES = (1, 2, 4, 8, 16)
LONGEST_PAUSE_S = 10.0
"""That a prompt's piece may cost the running streams; clients give up after 30 s of silence."""
SHARES = {"vision_threads": 0.2, "vision_batch": 0.3, "threads": 0.65, "prefill_chunk": 0.9, "slots": 1.0}
"""Of the time, by whose end a setting is measured. What one does not need the next ones have."""
_NEEDS = 2.0  # times a graph's files: memory of a session
_NO_ROOM = "no memory for two"


class TowerRun:
    """A bundle's tower on one picture."""

    def __init__(self, folder: str, feeds: dict[str, np.ndarray], threads: int):
        self._session = Bundle.open(folder, verify=False).open_vision(threads=threads or None)
        self._feeds = feeds
        self.lap(1)

    def lap(self, pictures: int) -> Lap:
        """Seconds a picture in a batch of so many."""
        batch = {name: np.repeat(array, pictures, axis=0) for name, array in self._feeds.items()}
        seconds = []
        for started_s in _for_a_while():
            embeddings = self._session.encode(**batch)
            seconds.append((time.perf_counter() - started_s) / pictures)
        digest = hashlib.blake2b(self._used(embeddings[0]).tobytes(), digest_size=16).hexdigest()
        return Lap(seconds=statistics.median(seconds), output=digest)

    def embeddings(self) -> np.ndarray:
        """(T, hidden) float32 of the picture."""
        return self._session.encode(**self._feeds)[0]

    def _used(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the picture's tokens; the others are meaningless."""
        return rows[: int(self._feeds["valid"][0].sum()) // MERGE**2]


class DecoderRun:
    """A bundle's decoder, with a prompt of its own profile, behind the runtime that serves it."""

    def __init__(self, folder: str, prompt: dict[str, Any], slots: int, batch_invariant: bool, threads: int):
        self._bundle = Bundle.open(folder, verify=False)
        self._session = self._bundle.open_decoder(slots=slots, threads=threads or None, batch_invariant=batch_invariant)
        self._prompt = Generation(**prompt, sampling=_greedy(TOKENS))
        text = prompt["input_ids"][prompt["image_index"] < 0][:TEXT_TOKENS]
        self._text = Generation(
            input_ids=text,
            image_index=np.full(len(text), -1, np.int64),
            position_ids=np.tile(np.arange(len(text)), (3, 1)),
            image_embeddings=prompt["image_embeddings"][:0],
            sampling=_greedy(TOKENS),
        )
        self.lap(0, 1, 2)

    def lap(self, chunk: int, streams: int, tokens: int) -> Lap:
        """A prompt by pieces of `chunk` tokens, `tokens` of its answer, and as many of each of several streams."""
        with DecoderRuntime(
            self._bundle, session=self._session, prefill_chunk=chunk or None, coalesce_tokens=1
        ) as runtime:
            firsts_s, rates = [], []
            for asked_s in _for_a_while():
                (alone,) = _answers(runtime, self._prompt, 1, tokens)
                firsts_s.append(alone.first[0] - asked_s)
                rates.append(self._crowd(runtime, streams, tokens) if streams > 1 else together([alone]))
        first_word_s, rate = statistics.median(firsts_s), statistics.median(rates)
        seconds = first_word_s + (ANSWER_TOKENS - 1) / rate
        facts = {"first_word_s": first_word_s, "tokens_per_s": rate, "reading_s": seconds}
        return Lap(seconds=seconds, output=alone.tokens, facts=facts)

    def _crowd(self, runtime: DecoderRuntime, streams: int, tokens: int) -> float:
        """Tokens per second of all streams together."""
        tokens += streams  # one after the other they begin, each a step later, and only then all of them decode
        while tokens < self._session.max_sequence:
            if rate := together(_answers(runtime, self._text, streams, tokens)):
                return rate
            tokens *= 2  # the first had ended when the last one began
        raise InvalidRequest(f"{streams} streams do not run together within this bundle's context; ask for fewer")


def _for_a_while() -> Iterator[float]:
    """Times at which something is begun: once, and again as long as a lap would be too short to tell anything."""
    until_s = time.perf_counter() + LAP_S
    while True:
        yield time.perf_counter()
        if time.perf_counter() >= until_s:
            return


def _greedy(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, eos_token_ids=())


def _answers(runtime: DecoderRuntime, asked: Generation, streams: int, tokens: int) -> list[TokenReceiver]:
    receivers = [TokenReceiver() for _ in range(streams)]
    for receiver in receivers:
        runtime.submit(dataclasses.replace(asked, sampling=_greedy(tokens)), receiver)
    for receiver in receivers:
        receiver.done.wait()
        if receiver.error:
            raise receiver.error
    return receivers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and for how long.

    Parameters
    ----------
    seconds : float
        Time for all of it; a lap that runs is not cut.
    streams : int
        Readings at once that the settings are for.
    """

    seconds: float = 180.0
    streams: int = 1

    def __post_init__(self):
        if self.streams < 1:
            raise InvalidRequest(f"streams is {self.streams}, must be at least 1")
        if self.seconds <= 0:
            raise InvalidRequest(f"seconds is {self.seconds:g}, must be more than 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tuned: a bundle alone, or the one in a repository.

    Attributes
    ----------
    bundle : Bundle
    repository : Path or None
    settings : dict
        In use, by their names in `tuned.PLACES`.
    batch_invariant : bool
        As it is served.
    """

    bundle: Bundle
    repository: Path | None
    settings: dict[str, int]
    batch_invariant: bool = False

    @classmethod
    def of(cls, folder: Path) -> Subject:
        """A folder that `package` or `build` wrote, where its links lead.

        Raises
        ------
        InvalidRequest
            It is neither, or a repository that cannot be exchanged.
        InvalidBundle
            It is not as it was written.
        """
        folder = folder.resolve()
        if (folder / MANIFEST).is_file():
            bundle = Bundle.open(folder, verify=False)
            batch = max(bundle.profile.max_images, VISION_BATCH)
            unset = {"threads": 0, "prefill_chunk": 0, "slots": SLOTS, "vision_threads": 0, "vision_batch": batch}
            return cls(bundle=bundle, repository=None, settings=unset)
        require_repository(folder)
        if (why := why_not_writable(folder)) or folder.is_mount():
            raise InvalidRequest(
                f"{folder} cannot be exchanged for one with other settings: {why or 'it is a mount point'}; tune the "
                "bundle, and package it with what `cxr-triton tune` says"
            )
        require_as_packaged(folder)
        decoder = parameters_of(folder, "decoder")
        if "threads" in decoder and "prefill_chunk" not in decoder:
            raise InvalidBundle(f"{folder} was packaged by an earlier release; package its bundle again")
        return cls(
            bundle=Bundle.open(folder / BUNDLE, verify=False),
            repository=folder,
            settings=settings_of(folder),
            batch_invariant=decoder.get("batch_invariant") == "1",
        )


class Tuning:
    """Settings of one bundle on this machine, measured one after the other.

    Parameters
    ----------
    subject : Subject
    plan : Plan
    beside : sequence of Path
        Other bundles, measured with the settings that were chosen: what would be faster is told, not done.
    say : callable
        Told what is measured next.
    clock : callable

    Attributes
    ----------
    chosen : dict
        `settings`, with what won so far.
    measured : list of dict
        Of each race the setting, the value in use, the one that was taken, and a row for each value.
    told : list of dict
        Of each bundle beside this one, how fast it is; pairs of numbers are ours and its.

    Raises
    ------
    InvalidRequest
        No engine of the bundle runs on a CPU, or a bundle beside it is of another profile or shape, or of an engine
        that is not measured on a CPU.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        *,
        beside: Sequence[Path] = (),
        say: Callable[[str], None] = lambda what: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        bundle = subject.bundle
        on_cpu = [isinstance(engine(name), CpuEngine) for name in (bundle.vision_engine, bundle.engine)]
        if not any(on_cpu):
            raise InvalidRequest(
                f"the bundle's engines, {bundle.vision_engine} and {bundle.engine}, are not tuned here: they need what "
                "they were built for, and their settings lie in the recipe; tune a bundle for a CPU"
            )
        self.has_tower, self.has_decoder = on_cpu
        self.bundle, self.plan, self.chosen = bundle, plan, dict(subject.settings)
        self._batch_invariant = subject.batch_invariant
        self._others = {folder: Bundle.open(folder, verify=False) for folder in beside}
        for folder, other in self._others.items():
            self._require_alike(folder, other)
        self.measured: list[dict] = []
        self.told: list[dict] = []
        self._feeds: dict[str, np.ndarray] = {}
        self._prompt: dict[str, Any] = {}
        self._say, self._clock, self._began_s = say, clock, clock()
        self._date, self._load, self._stolen = datetime.now(UTC), os.getloadavg()[0], Stolen()
        self._cpus = sorted(os.sched_getaffinity(0))
        self._facts: dict[str, object] = {}

    def run(self) -> None:
        """Measure everything that there is time for."""
        self._say("prepare a picture")
        step = prepared(self.bundle)
        self._feeds, tokens = inputs(step)
        self._facts = {"prompt_tokens": len(step.input_ids), "picture_tokens": tokens}
        embeddings = self._tower() if self.has_tower else self._no_embeddings()
        self._prompt = {**prompt_of(step), "image_embeddings": embeddings}
        if self.has_decoder:
            self._decoder()
        for folder, other in self._others.items():
            try:
                self.told.append(self._beside(folder, other))
            except Exception as error:  # what was measured of ours stands
                self.told.append({"bundle": folder.resolve().name, "error": str(error) or type(error).__name__})

    def _open(self, kind: type, *made: object) -> Process:
        """An engine in a process of its own, with the memory that `serve` gives it."""
        added = {name: value for name, value in HUGE_PAGES.items() if name not in os.environ}
        os.environ.update(added)
        try:
            return Process(kind, self._cpus, *made)
        finally:
            for name in added:
                del os.environ[name]

    def _require_alike(self, folder: Path, other: Bundle) -> None:
        for each in (self.bundle, other):
            for name in (each.vision_engine, each.engine):
                if not isinstance(engine(name), CpuEngine):
                    raise InvalidRequest(
                        f"{name} is not measured on a CPU, so nothing is beside it; leave --beside out"
                    )
        shapes = [dataclasses.replace(each.geometry, max_sequence=0) for each in (self.bundle, other)]
        wanted = self.bundle.profile.name
        if other.profile.name != wanted or shapes[0] != shapes[1]:
            raise InvalidRequest(
                f"{folder} is of profile {other.profile.name}, or of another shape; give one of {wanted}"
            )

    def _beside(self, folder: Path, other: Bundle) -> dict:
        """Our tower and decoder and another bundle's; a reading is both, and `of_ours` its time over ours."""
        streams = min(self.plan.streams, self.chosen["slots"])
        decoder = (self._prompt, streams, self._batch_invariant, self.chosen["threads"])
        vision = (self._feeds, self.chosen["vision_threads"])
        tower = self._pair(other, TowerRun, vision, (1,))
        reading = self._pair(other, DecoderRun, decoder, (self.chosen["prefill_chunk"], streams, TOKENS))
        ours, theirs = (
            [picture.seconds + text.seconds for picture, text in zip(a.laps, b.laps, strict=False)]
            for a, b in zip(tower.entries, reading.entries, strict=True)
        )
        ratios = [mine / yours for mine, yours in zip(theirs, ours, strict=True)]
        return {
            "bundle": folder.resolve().name,
            "recipe": (other.manifest.get("recipe") or {}).get("name"),
            "digest": other.digest,
            "engines": {"vision": other.vision_engine, "decoder": other.engine},
            "precisions": {"vision": other.vision_precision, "decoder": other.precision},
            "tower": tower.to_json(),
            "decoder": reading.to_json(),
            "reading_s": [statistics.median(ours), statistics.median(theirs)],
            "of_ours": statistics.median(ratios),
            "noise": noise(ratios),
        }

    def _pair(self, other: Bundle, kind: type, made: Sequence[object], lap: Sequence[object]) -> Race:
        """Ours, 0, and the other's, 1, in turn, whatever they give."""
        runs: list[Process] = []
        try:
            for each in (self.bundle, other):
                self._say(f"load {each.path.name}")
                runs.append(self._open(kind, str(each.path), *made))

            def run(which: int) -> Lap:
                self._say("beside another")
                return dataclasses.replace(runs[which].call("lap", *lap), output=None)

            return race(0, [1], run, until_s=math.inf, clock=self._clock, hopeless=math.inf)
        finally:
            for process in runs:
                process.kill()

    def record(self) -> dict:
        """What was measured until now, as ``tune.json`` has it."""
        names = dict.fromkeys(
            name for each in (self.bundle.vision_engine, self.bundle.engine) for name in engine(each).distributions
        )
        return {
            "schema": SCHEMA,
            "date": self._date.isoformat(timespec="seconds"),
            "cpu": Cpu.here().to_json(),
            "versions": {"cxr-triton": __version__} | installed(names),
            "bundle": self.bundle.digest,
            "engines": {"vision": self.bundle.vision_engine, "decoder": self.bundle.engine},
            "streams": self.plan.streams,
            "answer_tokens": ANSWER_TOKENS,
            **self._facts,
            "seconds": round(self._clock() - self._began_s, 1),
            "load_average_before": self._load,
            "stolen_share": self._stolen.share(),
            "chosen": self.chosen,
            "measured": self.measured,
            "beside": self.told,
        }

    # The tower.

    def _tower(self) -> np.ndarray:
        """Measure it; gives the picture's embeddings."""
        streams, folder = self.plan.streams, str(self.bundle.path)
        least = max(1, self.bundle.profile.max_images)
        with self._threads("vision_threads", TowerRun, (folder, self._feeds), (1,)) as run:
            used = self.chosen["vision_batch"]
            sizes = [size for size in BATCHES if least <= size < min(used, streams) or used < size <= streams]
            self._race("vision_batch", sizes, lambda size: run.call("lap", min(size, streams)))
            rows: np.ndarray = run.call("embeddings")
        return rows

    def _no_embeddings(self) -> np.ndarray:
        """In the place of a tower that is not on a CPU."""
        geometry = self.bundle.geometry
        return np.zeros((geometry.token_budget, geometry.hidden), np.float32)

    # The decoder.

    def _decoder(self) -> None:
        streams, used = self.plan.streams, self.chosen["slots"]
        rivals = [count for count in _doubles(used, streams) if self._fit(count)]
        made = (str(self.bundle.path), self._prompt, max([used, *rivals]), self._batch_invariant)
        chunk = self.chosen["prefill_chunk"]
        with self._threads("threads", DecoderRun, made, (chunk, min(streams, used), TOKENS)) as run:
            self._chunks(run, len(self._prompt["input_ids"]))
            chunk = self.chosen["prefill_chunk"]
            self._race("slots", rivals, lambda count: run.call("lap", chunk, min(count, streams), TOKENS))

    def _chunks(self, run: Process, prompt: int) -> None:
        """Race pieces of a prompt: for one stream of any length, for several of none that pauses them longer."""
        used = self.chosen["prefill_chunk"]
        effective = used or ENGINES_CHUNK
        if self._is_late("prefill_chunk"):
            self._note("prefill_chunk", effective * 2, NO_TIME)
            return
        longest_s = LONGEST_PAUSE_S if self.plan.streams == 1 else 0.0
        token_s = run.call("lap", used, 1, FIRST_TOKENS).facts["first_word_s"] / prompt
        rivals = [
            size
            for size in CHUNKS
            if size < effective
            or (size > effective and size // 2 < prompt and min(size, prompt) * token_s <= longest_s)
        ]
        self._race("prefill_chunk", rivals, lambda size: run.call("lap", size, 1, TOKENS).until_first_word())

    def _fit(self, slots: int) -> bool:
        """A cache of so many slots takes half of the free memory at most."""
        geometry = self.bundle.geometry
        row = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * 4
        return slots * geometry.max_sequence * row <= memory_available() / 2

    # Both.

    def _race(self, name: str, rivals: Sequence[int], run: Callable[[int], Lap]) -> Race:
        """Measure a setting; what wins is chosen."""
        used = self.chosen[name]

        def lap(value: int) -> Lap:
            self._say(f"{name} {value}" if value else f"{name} as it is")
            return run(value)

        ended = race(used, rivals, lap, until_s=self._until_s(name), clock=self._clock)
        self.chosen[name] = ended.winner
        if rivals:
            self.measured.append({"setting": name, "used": used, "taken": ended.winner, "values": ended.to_json()})
        return ended

    @contextlib.contextmanager
    def _threads(self, name: str, kind: type, made: Sequence[object], lap: Sequence[int]) -> Iterator[Process]:
        """Race numbers of threads, two processes at a time; gives the process of the one that won."""
        graph = {"vision_threads": "vision", "threads": "decoder"}[name]
        self._say(f"load the {graph}")
        used = self.chosen[name]
        runs = {used: self._open(kind, *made, used)}
        try:
            for count in threads_of(len(self._cpus)):
                if count == used:
                    continue
                if why := self._why_not(name, graph):
                    self._note(name, count, why)
                    break
                self._say(f"load the {graph} for {name} {count}")
                runs[count] = self._open(kind, *made, count)
                ended = self._race(name, [count], lambda value: runs[value].call("lap", *lap))
                used = ended.winner
                for loser in [value for value in runs if value != used]:
                    runs.pop(loser).kill()
                if ended.entries[1].verdict == SLOWER and count < used:  # fewer still will not be faster
                    break
            yield runs[used]
        finally:
            for process in runs.values():
                process.kill()

    def _why_not(self, name: str, graph: str) -> str | None:
        """Why a second session of a graph is not opened now."""
        if self._is_late(name):
            return NO_TIME
        each = engine(self.bundle.vision_engine if graph == "vision" else self.bundle.engine)
        size = sum((self.bundle.path / file).stat().st_size for file in each.files(graph))
        return _NO_ROOM if memory_available() < _NEEDS * size else None

    def _note(self, name: str, value: int, verdict: str) -> None:
        used = self.chosen[name]
        values = [{"value": each, "verdict": said, "rounds": 0} for each, said in ((used, IN_USE), (value, verdict))]
        self.measured.append({"setting": name, "used": used, "taken": used, "values": values})

    def _until_s(self, name: str) -> float:
        return self._began_s + SHARES[name] * self.plan.seconds

    def _is_late(self, name: str) -> bool:
        return self._clock() >= self._until_s(name)


def installed(names: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are here: of ONNX Runtime there are several."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def threads_of(cores: int) -> list[int]:
    """Numbers of threads that are tried: all cores, and by halves down to an eighth."""
    return list(dict.fromkeys(max(1, cores >> shift) for shift in range(4)))


def _doubles(used: int, streams: int) -> list[int]:
    """Slots that are tried where there are fewer than streams: by doubles up to one for each."""
    return sorted({min(used << shift, streams) for shift in range(1, 9)} - {used}) if used < streams else []


def save(subject: Subject, record: dict) -> None:
    """Give a repository what a record says was chosen, and the record; nothing to a bundle."""
    if subject.repository:
        changed = {name: value for name, value in record["chosen"].items() if value != subject.settings[name]}
        write_settings(subject.repository, changed, record)


def options(subject: Subject, chosen: Mapping[str, int]) -> list[str]:
    """Of `cxr-triton package`, for what is not chosen anyway."""
    changed = {name: value for name, value in chosen.items() if value != subject.settings[name]}
    return [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def lines(record: dict) -> list[str]:
    """What was found, for people."""
    found = [f"{Cpu.from_json(record['cpu']).said}, for {record['streams']} at once, {record['seconds']:.0f} s"]
    for row in record["measured"]:
        for value in row["values"][1:]:
            ratio = f", {value['of_used']:.2f} of the time" if "of_used" in value else ""
            found.append(f"{row['setting']} {value['value']} in place of {row['used']}: {value['verdict']}{ratio}")
    found.append("settings: " + ", ".join(f"{name} {value}" for name, value in record["chosen"].items()))
    for row in record["beside"]:
        if "error" in row:
            found.append(f"{row['bundle']} was not measured: {row['error']}")
            continue
        gain = 1 - row["of_ours"]
        means = "as fast, within the noise" if abs(gain) <= row["noise"] else "faster" if gain > 0 else "slower"
        found.append(
            f"{row['bundle']} ({row['recipe'] or row['engines']['decoder']}) is {means}: a reading takes "
            f"{row['of_ours']:.2f} of the time; nothing was changed, package it if you want it"
        )
    return found
