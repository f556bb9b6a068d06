"""One served reader as a machine: preprocessing, tower, decoder with its slots, and what they share.

Each stage has the time that it takes alone. What runs at once shares the cores in proportion to what each would take
alone, as threads do that the system treats alike, and so the card and the one process of `report`. A part of the pieces
(`Machine.scattered`) stays on the core where chance put them, and waits there while another is idle. The decoder works
in turns, as `cxr_triton.engines.runtime.scheduler` does: a piece of one prompt, then a step for all streams. Steps that
nothing comes between are one event.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cxr_triton.perf.capacity.stages import Curve, Kind, Machine, Stages

RESOURCES = ("cores", "card", "report")
_ENDED_S = 1e-9


@dataclass(eq=False, slots=True)
class Reading:
    """A reading under way; times in seconds.

    Attributes
    ----------
    kind : Kind
    pictures : int
    number : int
        In the order of arrival.
    arrived_s, first_s, end_s : float
        ``nan`` until then.
    waited_s : float
        For preprocessing, tower and slot together.
    refused_by : str
        The stage whose queue was full, or empty.
    passed_s : list of float
        The ends of preprocessing, tower, prompt and answer, as far as it came.
    """

    kind: Kind
    pictures: int
    number: int
    arrived_s: float
    first_s: float = math.nan
    end_s: float = math.nan
    waited_s: float = 0.0
    refused_by: str = ""
    since_s: float = 0.0
    passed_s: list[float] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt with all of its pictures."""
        return self.kind.prompt_tokens + (self.pictures - 1) * self.kind.image_tokens


@dataclass(eq=False, slots=True)
class Task:
    """Something that runs.

    Attributes
    ----------
    left_s : float
        Seconds that it would still take alone.
    uses : tuple of float
        Of each of `RESOURCES`, when alone.
    then : callable
        Called at its end.
    core : int or None
        The core that its first thread stays on; None where it goes to whichever is free.
    speed : float
        Of 1, with what it shares now.
    """

    left_s: float
    uses: tuple[float, float, float]
    then: Callable[[], None]
    core: int | None = None
    speed: float = 1.0


class Shared:
    """Tasks that run at once, each slowed by the resource that is the scarcest for it.

    Parameters
    ----------
    capacities : tuple of float
        Of each resource.
    scattered : float
        Share of the tasks that stay on a core, drawn at random, until they end.
    chance : int
        Seed of what is drawn.

    Attributes
    ----------
    now_s : float
    used_s : list of float
        Of each resource so far: core seconds, card seconds, seconds of the process.
    """

    def __init__(self, capacities: tuple[int, float, float], scattered: float = 0.0, chance: int = 0):
        self._capacities, self._scattered = capacities, scattered
        self._chance = random.Random(chance)  # noqa: S311 -- no secret
        self._tasks: list[Task] = []
        self._has_changed = False
        self.now_s = 0.0
        self.used_s = [0.0] * len(RESOURCES)

    def add(self, seconds: float, uses: tuple[float, float, float], then: Callable[[], None]) -> Task:
        """Begin a task."""
        task = Task(seconds, uses, then, self._core() if uses[0] else None)
        self._tasks.append(task)
        self._has_changed = True
        return task

    def _core(self) -> int | None:
        stays = self._scattered and self._chance.random() < self._scattered
        return self._chance.randrange(self._capacities[0]) if stays else None

    def _share(self) -> None:
        """Set the speed of each task: that of the resource that is the scarcest for it."""
        self._has_changed = False
        cores, card, report = (sum(widths) for widths in zip(*(task.uses for task in self._tasks), strict=True))
        free, taken = self._cores(cores)
        others = [most / max(most, total) for total, most in zip((card, report), self._capacities[1:], strict=True)]
        for task in self._tasks:
            speeds = (free if task.core is None else taken.get(task.core, free), *others)
            task.speed = min((slow for slow, width in zip(speeds, task.uses, strict=True) if width), default=1.0)

    def _cores(self, wanted: float) -> tuple[float, dict[int, float]]:
        """Speed on the cores, and on those where more stays than others would leave it."""
        staying: dict[int, float] = defaultdict(float)
        for task in self._tasks:
            if task.core is not None:
                staying[task.core] += min(1.0, task.uses[0])  # its other threads go where they like
        left, taken = self._capacities[0], {}
        for core, width in sorted(staying.items(), key=lambda each: -each[1]):
            if width * left <= max(left, wanted):
                break
            taken[core], left, wanted = 1 / width, left - 1, wanted - width
        return left / max(left, wanted, _ENDED_S), taken

    @property
    def next_s(self) -> float:
        """When the next task ends."""
        if not self._tasks:
            return math.inf
        if self._has_changed:
            self._share()
        return self.now_s + min(task.left_s / task.speed for task in self._tasks)

    def advance(self, to_s: float) -> None:
        """Let time pass, in which no task ends before `to_s`; those that end at it say so."""
        if self._has_changed and self._tasks:
            self._share()
        passed_s, self.now_s = to_s - self.now_s, to_s
        cores_s, card_s, report_s = self.used_s
        least_s, ended = _ENDED_S + 1e-15 * to_s, []  # what a float of the time leaves
        for task in self._tasks:
            done_s = passed_s * task.speed
            task.left_s -= done_s
            cores, card, report = task.uses
            cores_s += cores * done_s
            card_s += card * done_s
            report_s += report * done_s
            if task.left_s <= least_s:
                ended.append(task)
        self.used_s = [cores_s, card_s, report_s]
        if ended:
            self._tasks = [task for task in self._tasks if task not in ended]
            self._has_changed = True
        for task in ended:
            task.then()


def on_cores(ms: float, cpu_ms: float) -> tuple[float, tuple[float, float, float]]:
    """Seconds alone and uses of a cost on the cores."""
    return ms / 1e3, (cpu_ms / ms if ms else 0.0, 0.0, 0.0)


class Replica:
    """A server.

    Parameters
    ----------
    stages : Stages
    on_end : callable
        Told about each reading that ended or was refused.

    Attributes
    ----------
    under_way : int
    slots_s : float
        Seconds of all slots in use so far.
    """

    def __init__(self, stages: Stages, on_end: Callable[[Reading], None], chance: int = 0):
        machine = stages.machine
        self.stages, self.machine, self._on_end = stages, machine, on_end
        self.shared = Shared((machine.cores, max(machine.cards, 1), 1.0), machine.scattered, chance)
        self.under_way = 0
        self._preprocessing = 0
        self._to_preprocess: deque[Reading] = deque()
        self._to_tower: deque[Reading] = deque()
        self._tower_is_busy = False
        self.decoder = Decoder(self)

    @property
    def slots_s(self) -> float:
        """Seconds of all slots in use so far."""
        return self.decoder.slots_s

    def arrive(self, reading: Reading) -> None:
        """Take a reading now."""
        self.under_way += 1
        cost = self.stages.transport
        self.shared.add(*on_cores(cost.ms, cost.cpu_ms), lambda: self._wait_for_preprocess(reading))

    def advance(self, to_s: float) -> None:
        """Let time pass, with all that ends until `to_s`."""
        while (next_s := self.shared.next_s) <= to_s:
            self._pass(next_s)
        self._pass(to_s)

    def _pass(self, to_s: float) -> None:
        self.decoder.count(to_s - self.shared.now_s)
        self.shared.advance(to_s)

    def wait(self, queue: deque[Reading], reading: Reading, stage: str) -> bool:
        """Put a reading into a queue; False where that is full, and the reading is refused."""
        if len(queue) >= self.machine.queue_size:
            reading.refused_by = stage
            self.end(reading)
            return False
        reading.since_s = self.shared.now_s
        queue.append(reading)
        return True

    def take(self, queue: deque[Reading]) -> Reading:
        """The first of a queue, and what it waited."""
        reading = queue.popleft()
        reading.waited_s += self.shared.now_s - reading.since_s
        return reading

    def tell(self, reading: Reading) -> None:
        """Send the first text out, by the same way as the whole reading later."""
        cost = self.stages.report

        def arrived() -> None:
            reading.first_s = self.shared.now_s

        self.shared.add(*on_cores(cost.ms, cost.cpu_ms), arrived)

    def end(self, reading: Reading) -> None:
        """A reading is done, or refused."""
        reading.end_s = self.shared.now_s
        self.under_way -= 1
        self._on_end(reading)

    def _wait_for_preprocess(self, reading: Reading) -> None:
        if self._preprocessing < self.machine.preprocess_instances:
            self._preprocess(reading)
        else:
            self.wait(self._to_preprocess, reading, "preprocess")

    def _preprocess(self, reading: Reading) -> None:
        self._preprocessing += 1
        seconds, uses = on_cores(reading.kind.preprocess_ms, reading.kind.preprocess_cpu_ms)
        self.shared.add(seconds * reading.pictures, uses, lambda: self._preprocessed(reading))

    def _preprocessed(self, reading: Reading) -> None:
        self._preprocessing -= 1
        reading.passed_s.append(self.shared.now_s)
        if self._to_preprocess:
            self._preprocess(self.take(self._to_preprocess))
        if self.wait(self._to_tower, reading, "tower"):
            self._start_tower()

    def _start_tower(self) -> None:
        """The tower takes what waits, as many pictures as fit into a batch, and at least one reading."""
        if self._tower_is_busy or not self._to_tower:
            return
        batch = [self.take(self._to_tower)]
        pictures = batch[0].pictures
        while self._to_tower and pictures + self._to_tower[0].pictures <= self.machine.vision_batch:
            batch.append(self.take(self._to_tower))
            pictures += batch[-1].pictures
        self._tower_is_busy = True
        self.shared.add(*task_of(self.stages.tower, pictures), lambda: self._encoded(batch))

    def _encoded(self, batch: list[Reading]) -> None:
        self._tower_is_busy = False
        self._start_tower()
        for reading in batch:
            reading.passed_s.append(self.shared.now_s)
            self.decoder.submit(reading)


def task_of(curve: Curve, size: int) -> tuple[float, tuple[float, float, float]]:
    """Seconds alone and uses of a piece."""
    seconds, cpu_s = curve.cost(size)
    return seconds, (cpu_s / seconds if seconds else 0.0, float(curve.on == "card"), 0.0)


def chunk_tokens(machine: Machine, step_s: float) -> int:
    """Tokens of a chunk: all that a step more would make too old, see `cxr_triton.engines.runtime.scheduler`."""
    if step_s * machine.chunk_tokens * 1e3 <= machine.chunk_ms:
        return machine.chunk_tokens
    return min(machine.chunk_tokens, math.floor(machine.chunk_ms / 1e3 / step_s) + 1)


@dataclass
class Decoder:
    """The decoder of a server: slots, turns of a piece of a prompt and a step, chunks of text."""

    replica: Replica
    slots_s: float = 0.0
    _waiting: deque[Reading] = field(default_factory=deque)
    _decoding: list[tuple[int, int, Reading]] = field(default_factory=list)  # heap: step of its end, number, reading
    _prefilling: Reading | None = None
    _prefilled: int = 0
    _steps: int = 0
    _running: Task | None = None  # steps, or a piece of a prompt
    _step_s: float = 0.0  # of the steps that run; 0 where a prompt does
    _planned: tuple[int, float] = (0, 0.0)  # those steps, and what they take alone

    def submit(self, reading: Reading) -> None:
        """Take a reading whose pictures are encoded."""
        if not self.replica.wait(self._waiting, reading, "decoder"):
            return
        if self._running is None:
            self._turn()
        elif self._step_s and self._has_slot:
            self._stop_soon(self._running)

    @property
    def _has_slot(self) -> bool:
        return len(self._decoding) < self.replica.machine.slots

    def count(self, seconds: float) -> None:
        """Count what the slots were in use."""
        self.slots_s += seconds * (len(self._decoding) + (self._prefilling is not None))

    def _stop_soon(self, running: Task) -> None:
        """End the steps that run after the one that is under way: a prompt waits."""
        planned, whole_s = self._planned
        done_s = whole_s - running.left_s
        steps = min(planned, max(1, math.ceil(done_s / self._step_s - 1e-9)))
        running.left_s -= (planned - steps) * self._step_s
        self._planned = steps, steps * self._step_s

    def _turn(self) -> None:
        """A piece of a prompt if there is one, else steps."""
        self._running, self._step_s = None, 0.0
        if self._prefilling is None and self._waiting and self._has_slot:
            self._prefilling, self._prefilled = self.replica.take(self._waiting), 0
        if self._prefilling is not None:
            size = min(self.replica.machine.prefill_chunk, self._prefilling.prompt_tokens - self._prefilled)
            self._running = self.replica.shared.add(*self._piece(size), lambda: self._after_piece(size))
        elif self._decoding:
            self._step(self._decoding[0][0] - self._steps)

    def _piece(self, size: int) -> tuple[float, tuple[float, float, float]]:
        """Seconds alone and uses of a piece of the prompt, with the first token after the last one."""
        prompt, stages = self._prefilling, self.replica.stages
        alone_s, (cores, card, report) = task_of(stages.prefill, size)
        if prompt is None or self._prefilled + size < prompt.prompt_tokens:
            return alone_s, (cores, card, report)
        token_s = stages.token.ms / 1e3
        seconds, cpu_s = alone_s + token_s, cores * alone_s + stages.token.cpu_ms / 1e3
        return seconds, (cpu_s / seconds, card * alone_s / seconds, report) if seconds else (0.0, card, report)

    def _after_piece(self, size: int) -> None:
        reading = self._prefilling
        if reading is None:
            raise RuntimeError("a piece of no prompt ended")
        self._prefilled += size
        if self._prefilled >= reading.prompt_tokens:
            reading.passed_s.append(self.replica.shared.now_s)
            self.replica.tell(reading)
            self._prefilling = None
            tokens = reading.kind.answer_tokens
            if tokens == 1:
                self._leave(reading)
            else:
                heapq.heappush(self._decoding, (self._steps + tokens - 1, reading.number, reading))
        self._running = None
        if self._decoding:
            self._step(1)
        else:
            self._turn()

    def _step(self, steps: int) -> None:
        """Run steps for all streams; text goes out meanwhile."""
        stages, machine, streams = self.replica.stages, self.replica.machine, len(self._decoding)
        alone_s, cpu_s = stages.step.cost(streams)
        seconds = alone_s + streams * stages.token.ms / 1e3
        cpu_s += streams * stages.token.cpu_ms / 1e3
        chunks = streams / chunk_tokens(machine, seconds)  # a step
        uses = (
            (cpu_s + chunks * stages.chunk.cpu_ms / 1e3) / seconds if seconds else 0.0,
            alone_s / seconds if seconds and stages.step.on == "card" else 0.0,
            chunks * stages.chunk.ms / 1e3 / seconds if seconds else 0.0,
        )
        self._step_s, self._planned = seconds, (steps, steps * seconds)
        self._running = self.replica.shared.add(steps * seconds, uses, self._after_steps)

    def _after_steps(self) -> None:
        self._steps += self._planned[0]
        while self._decoding and self._decoding[0][0] <= self._steps:
            self._leave(heapq.heappop(self._decoding)[2])
        self._turn()

    def _leave(self, reading: Reading) -> None:
        reading.passed_s.append(self.replica.shared.now_s)
        cost = self.replica.stages.report
        self.replica.shared.add(*on_cores(cost.ms, cost.cpu_ms), lambda: self.replica.end(reading))
