"""Which of several settings is the fastest: measured in turn, and a rival wins by more than the noise only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

ROUNDS, MOST_ROUNDS = 3, 9
"""Of a race: with fewer nobody wins; more are run where they are short."""
SHORT_S = 2.0
"""A race is short until then."""
LEAST_GAIN = 0.03
"""Of the time: less is no reason to change anything."""
HOPELESS = 1.25
"""Times the holder's time: who is so much slower in each of two rounds is not measured again."""
IN_USE, TAKEN, NO_FASTER, SLOWER, OTHER, NO_TIME = (
    "in use",
    "taken",
    "no faster than the noise",
    "slower",
    "other output",
    "not enough time",
)


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One measurement of one setting.

    Attributes
    ----------
    seconds : float
        What is to be small.
    output : object
        What was computed: a setting that gives another one than the holder's is not taken.
    facts : dict of str to float
        What else is known of it.
    """

    seconds: float
    output: object = None
    facts: dict[str, float] = field(default_factory=dict)

    def until_first_word(self) -> Lap:
        """The same, where the first word is what counts."""
        first_word_s = self.facts["first_word_s"]
        return Lap(seconds=first_word_s, output=self.output, facts={"first_word_s": first_word_s})


@dataclass
class Entry:
    """A setting in a race: its laps, and what became of it."""

    value: int
    laps: list[Lap] = field(default_factory=list)
    verdict: str = NO_TIME

    @property
    def seconds(self) -> float:
        """Median of its laps."""
        return statistics.median(lap.seconds for lap in self.laps)

    def ratios(self, holder: Entry) -> list[float]:
        """Its time over the holder's, round by round."""
        return [mine.seconds / theirs.seconds for mine, theirs in zip(self.laps, holder.laps, strict=False)]

    def to_json(self, holder: Entry) -> dict:
        """With medians of what is known."""
        row: dict = {"value": self.value, "verdict": self.verdict, "rounds": len(self.laps)}
        if self.laps:
            row["seconds"] = [lap.seconds for lap in self.laps]
            row["of_used"] = statistics.median(self.ratios(holder))
            row |= {key: statistics.median(lap.facts[key] for lap in self.laps) for key in self.laps[0].facts}
        return row


@dataclass(frozen=True)
class Race:
    """How a race ended.

    Attributes
    ----------
    entries : list of Entry
        The holder first.
    winner : int
        The holder's value, unless a rival's verdict is `TAKEN`.
    """

    entries: list[Entry]
    winner: int

    def to_json(self) -> list[dict]:
        """A row for each entry."""
        return [entry.to_json(self.entries[0]) for entry in self.entries]


def race(
    holder: int,
    rivals: Sequence[int],
    run: Callable[[int], Lap],
    *,
    until_s: float,
    clock: Callable[[], float] = time.monotonic,
    hopeless: float = HOPELESS,
) -> Race:
    """Measure the value in use and its rivals in alternating rounds; the best one has to win twice.

    The best of several is the luckiest too, so it runs against the value in use once more, in rounds of their own.

    Parameters
    ----------
    holder, rivals : int
        Values of a setting.
    run : callable
        One lap of a value.
    until_s : float
        On `clock`: no round begins that would not end by then.
    hopeless : float
        In place of `HOPELESS`.
    """
    entries = [Entry(value, verdict=NO_TIME) for value in (holder, *rivals)]
    entries[0].verdict = IN_USE
    whole = _rounds(entries, run, until_s, clock, hopeless)
    for entry in whole:
        entry.verdict = NO_FASTER
    best = min(whole, key=lambda entry: statistics.median(entry.ratios(entries[0])), default=None)
    if best is None or not _wins(best, entries[0]):
        return Race(entries, holder)
    again = [Entry(holder), Entry(best.value)]
    best.verdict = NO_TIME
    if clock() + ROUNDS * (entries[0].seconds + best.seconds) > until_s:
        return Race(entries, holder)
    for entry in _rounds(again, run, until_s, clock, hopeless):
        best.verdict = TAKEN if _wins(entry, again[0]) else NO_FASTER
    entries[0].laps += again[0].laps
    best.laps += again[1].laps
    return Race(entries, best.value if best.verdict == TAKEN else holder)


def _rounds(
    entries: list[Entry], run: Callable[[int], Lap], until_s: float, clock: Callable[[], float], hopeless: float
) -> list[Entry]:
    """Run laps, the holder's first; gives the rivals that ran in enough rounds and gave the same output."""
    running, longest_s, started_s = list(entries), 0.0, clock()
    for turn in range(MOST_ROUNDS):
        began_s = clock()
        if len(running) < 2 or began_s + longest_s > until_s:
            break
        if turn >= ROUNDS and began_s - started_s > SHORT_S:
            break
        for entry in running if turn % 2 == 0 else reversed(running):
            entry.laps.append(run(entry.value))
        longest_s = max(longest_s, clock() - began_s)
        for entry in running[1:]:
            if entry.laps[-1].output != entries[0].laps[0].output:
                entry.verdict = OTHER
            elif turn and min(entry.ratios(entries[0])) >= hopeless:
                entry.verdict = SLOWER
        running = [entry for entry in running if entry.verdict not in (OTHER, SLOWER)]
    return [entry for entry in running[1:] if len(entry.laps) >= ROUNDS]


def _wins(entry: Entry, holder: Entry) -> bool:
    ratios = entry.ratios(holder)
    return 1 - statistics.median(ratios) > noise(ratios)


def noise(ratios: Sequence[float]) -> float:
    """What a gain has to exceed: half of what the rounds differ among themselves, and `LEAST_GAIN` at least."""
    return max(LEAST_GAIN, (max(ratios) - min(ratios)) / 2)
