"""Numbers, shares, durations and times as the pages write them."""

from __future__ import annotations

import datetime
import math

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


def shortest(value: float) -> str:
    """A number that somebody chose, such as a limit or a tick of an axis: no digit more than it needs."""
    mantissa, _, exponent = f"{value:,.6g}".partition("e")
    if not exponent:
        return _signed(mantissa)
    return _signed(_power(int(exponent)) if mantissa == "1" else f"{mantissa} × {_power(int(exponent))}")


def percent(share: float) -> str:
    """One decimal; less than that is not called nothing."""
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return _signed(f"{100 * share:.1f} %".removeprefix("-") if share > -0.0005 else f"{100 * share:.1f} %")


def change(share: float) -> str:
    """A relative difference with its sign."""
    told = f"{100 * share:+.1f} %"
    return _signed("0.0 %" if told in ("+0.0 %", "-0.0 %") else told)


def duration(ms: float) -> str:
    """Milliseconds, from a second on seconds."""
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
