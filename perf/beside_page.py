"""What `beside` measured, for people: a table in Markdown, and a page of bars."""

from __future__ import annotations

from collections.abc import Mapping

from cxr_triton.numbers import number
from cxr_triton.page import render

NAMES = {"load_s": "Loading", "prompt_tokens_per_s": "Prompt", "first_word_s": "First word about a picture"}
NAMES |= {"peak_resident_bytes": "Peak of resident memory", "report_s": "A whole report"}
NAMES |= {"guessed_report_s": "A recorded report, guessing tokens"}
_HEADS = {"load_s": "load", "prompt_tokens_per_s": "prompt", "first_word_s": "first word, picture"}
_HEADS |= {"peak_resident_bytes": "peak memory", "report_s": "report", "guessed_report_s": "report, guessing"}
_DECODE = "decode_tokens_per_s_"


def table(result: Mapping) -> str:
    """The rows as a table in Markdown, an entrant a line; what is missing has its reason below."""
    rows = result["peers"][0]["rows"]
    heads = [_HEADS.get(key) or f"decode, {key.removeprefix(_DECODE)} at once" for key in rows]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for peer in result["peers"]:
        cells = [_cell(key, row) for key, row in peer["rows"].items()]
        lines.append(f"| {peer['title']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _limits(result["ceilings"]), *(f"- {reason}" for reason in _reasons(result))])


def page(result: Mapping) -> str:
    """The rows as bars, a section each, of which the longest is the greatest value."""
    sections = []
    for key in result["peers"][0]["rows"]:
        rows = [(peer["title"], peer["rows"][key]) for peer in result["peers"]]
        most = max((row["value"] for _, row in rows if row["value"]), default=1.0)
        bars = [(title, 0.0, (row["value"] or 0.0) / most, _cell(key, row)) for title, row in rows]
        name = NAMES.get(key) or f"Decoding, {key.removeprefix(_DECODE)} at once"
        sections.append((name, "more is better" if "per_s" in key else "less is better", bars))
    machine = result["environment"]
    facts = [
        ("command", " ".join(result["command"])),
        ("date", result["date"]),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores"),
        ("rounds", str(result["rounds"])),
        ("how", result["turns"]),
        ("this machine", _limits(result["ceilings"])),
    ]
    facts += [(peer["title"], _versions(peer["versions"] or machine["versions"])) for peer in result["peers"]]
    return render(
        "beside.html",
        title="Beside what one would use instead",
        subtitle=f"A prompt of {result['prompt_tokens']} tokens, {result['new_tokens']} tokens of answer",
        notice="Weights of the models are for research alone.",
        sections=sections,
        reasons=_reasons(result),
        facts=facts,
    )


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _limits(ceilings: Mapping) -> str:
    told = f"read {_giga(ceilings['read_bytes_per_s'])} GB/s, int8 {_giga(ceilings['int8_ops_per_s'])} GOP/s"
    return told + (f" by {ceilings['int8_instruction']}" if ceilings.get("int8_instruction") else "")


def _reasons(result: Mapping) -> list[str]:
    """Why a cell is empty, each once."""
    empty = [
        (peer["title"], row["why"]) for peer in result["peers"] for row in peer["rows"].values() if row["value"] is None
    ]
    return list(dict.fromkeys(f"{title}: {why}" for title, why in empty))


def _giga(value: float | None) -> str:
    return "unknown" if value is None else number(value / 1e9)


def _cell(key: str, row: Mapping) -> str:
    value = row["value"]
    if value is None:
        return "–"
    if key == "peak_resident_bytes":
        return f"{value / 2**30:.1f} GiB"
    if "per_s" not in key:
        return f"{number(value)} s"
    told_speed = f"{number(value)} tok/s"
    for unit, share in (("top_per_s", "share_of_int8_peak"), ("gb_per_s", "share_of_read_bandwidth")):
        if unit in row:
            told_speed += f", {number(row[unit])} {'TOP/s' if unit[0] == 't' else 'GB/s'}"
            told_speed += f" ({row[share]:.0%})" if row[share] is not None else ""
    return told_speed
