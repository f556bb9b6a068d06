"""A chart as the marks of an SVG, for the macro ``chart`` of parts.html; colours are classes of chart.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from cxr_triton.numbers import duration, shortest

WIDTH, HEIGHT = 440, 260  # in units that are pixels on a desktop
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 22, 46
_LETTER = 6.4  # width of one at 11 px, and a part of the space between two labels


@dataclass(frozen=True)
class Mark:
    """An SVG element: its tag, its attributes, the text in it, and what it says when it is pointed at."""

    tag: str
    attributes: Mapping[str, object]
    text: str = ""
    title: str = ""


class Plot:
    """Axes over the range of all values, and marks on them.

    Parameters
    ----------
    xs, ys : sequence of float
        Every value, of which the least and the greatest count.
    x_name, y_name : str
    x_ticks, y_ticks : sequence of (float, str), optional
        What stands where on an axis; by default round numbers, or whole powers of ten.
    is_log : bool
        Both axes are.
    height : int
        In units of which `WIDTH` are the width.
    """

    def __init__(
        self,
        xs: Sequence[float],
        ys: Sequence[float],
        x_name: str = "",
        y_name: str = "",
        *,
        x_ticks: Sequence[tuple[float, str]] | None = None,
        y_ticks: Sequence[tuple[float, str]] | None = None,
        is_log: bool = False,
        height: int = HEIGHT,
    ):
        self.width, self.height, self.marks = WIDTH, height, list[Mark]()
        self._is_log = is_log
        self._x, self._y = (self._range(min(values), max(values)) for values in (xs, ys))
        self._labels: list[tuple[float, float, float]] = []
        bottom, right = height - _BOTTOM, WIDTH - _RIGHT
        x_ticks = self._ticks(*self._x) if x_ticks is None else x_ticks
        lines = _lines([label for _, label in x_ticks])
        for i, (value, label) in enumerate(x_ticks):
            self._text(self._across(value), bottom + 15 + 12 * (i % lines), label, anchor="middle")
        for value, label in self._ticks(*self._y) if y_ticks is None else y_ticks:
            y = self._down(value)
            self._add("path", "grid", d=f"M{_LEFT} {y:.1f}H{right}")
            self._text(_LEFT - 6, y + 4, label, anchor="end")
        self._add("path", "axis", d=f"M{_LEFT} {_TOP}V{bottom}H{right}")
        self._text(right, height - 6, x_name, style="name", anchor="end")
        self._text(2, _TOP - 11, y_name, style="name")

    def line(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """Straight from each point to the next."""
        path = "L".join(f"{self._across(x):.1f} {self._down(y):.1f}" for x, y in points)
        self._add("path", f"line {style}", d=f"M{path}")

    def box(
        self, begin: float, end: float, low: float, high: float, style: str, *, title: str = "", top: str = ""
    ) -> None:
        """Filled from x `begin` to `end` and from y `low` to `high`; `top` stands over it."""
        left, upper = self._across(begin), self._down(high)
        width, height = self._across(end) - left, self._down(low) - upper
        size = {"x": f"{left:.2f}", "y": f"{upper:.2f}", "width": f"{max(width, 0.3):.2f}", "height": f"{height:.2f}"}
        self._add("rect", f"area {style}", title=title, **size)
        self._text(left + width / 2, upper - 3, top, anchor="middle")

    def dot(self, x: float, y: float, style: str, *, title: str, label: str = "") -> None:
        """A point, and a label beside it that runs into none before it."""
        across, down = self._across(x), self._down(y)
        self._add("circle", f"dot {style}", title=title, cx=f"{across:.1f}", cy=f"{down:.1f}", r=3.5)
        if label:
            aside, anchor = (-7, "end") if across > WIDTH * 0.65 else (7, "start")
            across, down, width = across + aside, down + 4, _LETTER * len(label)
            while any(abs(across - x) < width + wide and abs(down - y) < 12 for x, y, wide in self._labels):
                down += 1
            self._labels.append((across, down, width))
            self._text(across, down, label, anchor=anchor)

    def _add(self, tag: str, style: str, text: str = "", title: str = "", **attributes: object) -> None:
        self.marks.append(Mark(tag, {"class": style or None, **attributes}, text, title))

    def _text(self, x: float, y: float, text: str, *, style: str = "", anchor: str = "start") -> None:
        if text:
            self._add("text", style, text, x=f"{x:.1f}", y=f"{y:.1f}", **{"text-anchor": anchor})

    def _range(self, low: float, high: float) -> tuple[float, float]:
        if self._is_log:
            return math.log10(low), math.log10(high)
        return (low, high * 1.06) if high > low else (low - 0.5, high + 0.5)

    def _share(self, value: float, low: float, high: float) -> float:
        return ((math.log10(value) if self._is_log else value) - low) / ((high - low) or 1.0)

    def _across(self, x: float) -> float:
        return _LEFT + self._share(x, *self._x) * (WIDTH - _LEFT - _RIGHT)

    def _down(self, y: float) -> float:
        return self.height - _BOTTOM - self._share(y, *self._y) * (self.height - _TOP - _BOTTOM)

    def _ticks(self, low: float, high: float) -> list[tuple[float, str]]:
        """Four or so round numbers, or whole powers of ten."""
        if self._is_log:
            values = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
        else:
            step = 10 ** math.floor(math.log10((high - low) / 4))
            step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
            values = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
        return [(value, shortest(value)) for value in values]


def _lines(labels: Sequence[str]) -> int:
    """In how many lines labels have to stand in turn so that none runs into another; they are that many or fewer."""
    if not labels:
        return 1
    room = (WIDTH - _LEFT - _RIGHT) / len(labels)
    return min(math.ceil(_LETTER * max(map(len, labels)) / room), len(labels), 3)


def waterfall(
    stages: Mapping[str, float], total: float, told: Callable[[float], str] = duration
) -> list[tuple[str, float, float, str]]:
    """Milliseconds of stages, one after the other, for the macro ``bars`` of parts.html; `told` says them."""
    begins = accumulate(stages.values(), initial=0.0)
    return [
        (stage.replace("_", " "), begin / total, ms / total, told(ms))
        for (stage, ms), begin in zip(stages.items(), begins, strict=False)
    ]
