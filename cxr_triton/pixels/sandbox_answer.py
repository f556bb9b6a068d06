"""The answers of a decoding process, checked before anything is made of them: a hostile image may have written them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from cxr_triton.errors import CODES
from cxr_triton.pixels.dicom import Identity
from cxr_triton.pixels.header import MOST_WINDOWS, MOST_WORDS, is_uid

MOST_TEXT = 1 << 16
"""Bytes of an answer's JSON."""
_MOST_CHARACTERS = 2048
_NUMBER = (int, float)
_ANSWER = {
    "shape": (list,),
    "source_size": (list,),
    "facts": (dict,),
    "study_date": (str,),
    "windows": (list,),
    "decode_ms": _NUMBER,
    "preprocess_ms": _NUMBER,
    "recycle": (bool,),
}
_FACTS = {
    "format": (str,),
    "transfer_syntax": (str,),
    "transfer_syntax_name": (str,),
    "sop_class": (str,),
    "modality": (str,),
    "photometric": (str,),
    "bits_stored": (int,),
    "signed": (bool,),
    "rows": (int,),
    "columns": (int,),
    "pixel_aspect_ratio": _NUMBER,
    "view": (str,),
    "patient_orientation": (list,),
    "laterality": (str,),
    "preset": (str,),
    "percentiles": (list,),
    "padding_share": _NUMBER,
    "flags": (list,),
    "identity": (dict,),
}
_REGION = {"region": (str,), "chest_likeness": (*_NUMBER, type(None))}
_UIDS = ("sop_class", "sop_instance", "study", "series", "transfer_syntax")


class Malformed(Exception):
    """No answer that this version's own code gives."""


def parsed(text: bytes) -> dict[str, Any]:
    """The object of a JSON text; raises `Malformed`."""
    try:
        answer = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise Malformed from None
    _require(isinstance(answer, dict))
    return answer


def require_outcome(answer: dict[str, Any]) -> None:
    """Whether it failed, and whether the process is spent, have to be told as they are; raises `Malformed`."""
    _require(type(answer.get("recycle")) is bool)
    if "error" in answer:
        _require_types(answer, {"error": (str,), "message": (str,), "recycle": (bool,)})
        _require(answer["error"] in CODES)


def require_prepared(answer: dict[str, Any], size: int, has_region: bool) -> None:
    """The answer to ``prepare`` with a picture of `size` bytes; raises `Malformed`."""
    _require_types(answer, _ANSWER)
    facts, shape = answer["facts"], answer["shape"]
    _require_types(facts, {**_FACTS, **(_REGION if has_region else {})})
    for numbers, least in ((shape, 0), (answer["source_size"], 0), (facts["percentiles"], -1 << 31)):
        _require(all(type(number) is int and least <= number < 1 << 31 for number in numbers))
    _require(len(shape) in (2, 3) and shape[2:] in ([], [3]) and min(shape) > 0 and math.prod(shape) == size)
    _require(len(answer["source_size"]) == 2 and len(facts["percentiles"]) == 2)
    for words in (facts["patient_orientation"], facts["flags"], facts["identity"].values()):
        _require(len(words) <= 64 and all(type(word) is str and len(word) <= 64 for word in words))
    _require(len(answer["windows"]) <= MOST_WINDOWS and all(map(_is_window, answer["windows"])))


def _is_window(told: Any) -> bool:
    """Whether it is the kind, number and words of an `Offered`."""
    if not (type(told) is list and [type(part) for part in told] == [str, int, str]):
        return False
    kind, number, words = told
    is_plain = len(words) <= MOST_WORDS and words.isascii() and words.isprintable()
    return kind in ("window", "lut") and 1 <= number <= 1 << 16 and is_plain


def identity(answer: dict[str, Any], size: int) -> Identity:
    """The answer to ``identify`` about a file of `size` bytes; raises `Malformed`."""
    _require_types(answer, {"identity": (dict,), "recycle": (bool,)})
    found = answer["identity"]
    types = {"int": int, "str": str, "bool": bool}
    _require_types(found, {field.name: (types[str(field.type)],) for field in fields(Identity)})
    _require(all(is_uid(found[name]) for name in _UIDS) and 0 <= found["offset"] <= size)
    return Identity(**found)


def _require_types(given: dict[str, Any], types: Mapping[str, Collection[type]]) -> None:
    _require(given.keys() == types.keys() and all(type(given[name]) in kinds for name, kinds in types.items()))
    for value in given.values():
        _require(not isinstance(value, str) or len(value) <= _MOST_CHARACTERS)


def _require(is_so: bool) -> None:
    if not is_so:
        raise Malformed


def _refuse(constant: str) -> None:
    raise ValueError(constant)
