"""Numbers, shares, durations and times as the pages write them."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable

_SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: object, digits: int = 3) -> str:
    """So many significant digits, all of a whole number; — for what is not known."""
    if value is None:
        return "—"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if float(value).is_integer():
        return _signed(f"{value:,.0f}")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if int(exponent) < -4:
        return _signed(f"{mantissa} × {_power(int(exponent))}")
    return _signed(f"{value:,.{max(0, digits - 1 - int(exponent))}f}")


def shortest(value: float, digits: int = 6) -> str:
    """A number that somebody chose, such as a limit or a tick of an axis: no digit more than it needs."""
    mantissa, _, exponent = f"{float(f'{value:.{digits}g}'):,.6g}".partition("e")
    if not exponent:
        return _signed(mantissa)
    return _signed(_power(int(exponent)) if mantissa == "1" else f"{mantissa} × {_power(int(exponent))}")


def measured(value: float | None, holds: Callable[[float], bool] = lambda value: True) -> str:
    """Three digits, or as many as leave the answer of `holds` as it is; what is all but 1 as what it lacks."""
    if value is None:
        return "not finite"
    is_near_one = 0 < 1 - value < 1e-4
    told, digits = (1 - value, 2) if is_near_one else (value, 4 if 0.99 < value < 1 else 3)
    while digits < 17:
        rounded = float(f"{told:.{digits - 1}e}")
        if holds(1 - rounded if is_near_one else rounded) == holds(value):
            break
        digits += 1
    return f"1 − {number(told, digits)}" if is_near_one else number(told, digits)


def in_unit(metric: str, value: float | None) -> str:
    """A value of a metric, with the unit that the metric's name says."""
    return duration(value) if re.search(r"_ms\b", metric) else number(value)


def percent(share: float | None) -> str:
    """One decimal; less than that is not called nothing."""
    if share is None:
        return number(None)
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return _signed(f"{100 * share:.1f} %".removeprefix("-") if share > -0.0005 else f"{100 * share:.1f} %")


def change(share: float) -> str:
    """A relative difference with its sign."""
    told = f"{100 * share:+.1f} %"
    return _signed("0.0 %" if told in ("+0.0 %", "-0.0 %") else told)


def duration(ms: float | None) -> str:
    """Milliseconds, from a second on seconds."""
    if ms is None:
        return number(None)
    if abs(ms) < 1000:
        return _signed(f"{ms:.1f} ms")
    return _signed(f"{ms / 1000:.2f} s" if abs(ms) < 100_000 else f"{ms / 1000:,.1f} s")


def moment(time: str | datetime.datetime) -> str:
    """A point in time to the minute, with its zone; a text that is none stays as it is."""
    try:
        at = datetime.datetime.fromisoformat(time) if isinstance(time, str) else time
    except ValueError:
        return str(time)
    return f"{at:%Y-%m-%d %H:%M %Z}".rstrip()


def glued(text: str) -> str:
    """A number and its unit, or a few of them, that a line of a page does not break."""
    return text.replace(" ", "\u00a0")


def _power(exponent: int) -> str:
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}" if exponent else "1"


def _signed(text: str) -> str:
    return text.replace("-", "−")
