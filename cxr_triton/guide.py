r"""The grammar that an answer follows while it is written, as llguidance reads it: Lark with ``%json``.

What a machine reads of an answer is held to it, and where that stands; the reasoning before it is any text. What
`cxr_triton.reading.parse` reads without a fault is in the grammar, so that a guide changes no such answer: labels in
any case, ``Pleural_Effusion``, ``\boxed{{A}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cxr_triton.errors import InvalidRequest

MODE_GUIDES = ("none", "answer")
GUIDES = (*MODE_GUIDES, "json_schema")
MAX_SCHEMA_BYTES = 32 * 1024
MAX_SCHEMA_DEPTH = 32
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "max_grammar_size": 100_000,
    "max_lexer_states": 10_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
"""Of llguidance, in its own units: some 20 ms for compiling, 8 ms for a token, and 20 MB, whatever the grammar."""

_BLANK = r"[ \t\r\n]{0,4}"
_THINK, _THOUGHT = rf"/{_BLANK}<think(ing)?>/", rf"/<\/think(ing)?>{_BLANK}/"
_FRAMES = {
    "think_answer": (rf"{_THINK} FREE {_THOUGHT} /<answer>/", rf"/<\/answer>{_BLANK}/"),
    "answer_only": (r"/<answer>/", rf"/<\/answer>{_BLANK}/"),
    "boxed": (r"FREE /\\boxed\{/", r"/\}([ \t\r\n]|\$|\\\]|\\\)|\.){0,8}/"),
    "plain": ("", ""),
}
"""By grammar: what stands before the content of an answer, and after it."""
_NO_TAG = r"/(?s:.*)/ & ~/(?s:.*<\/?(?i:think|thinking|answer)\s*>.*)/"
_NO_BOX = r"/(?s:.*)/ & ~/(?s:.*\\boxed\s*\{.*)/"
_UNIT = r"([^{}\\]|\\+[^\\])"  # a brace after backslashes opens and closes nothing
_TERMINALS = rf"""
PROSE: FREE & /(?s:.*\S.*)/
BALANCED: PROSE & /({_UNIT}|\{{{_UNIT}*\}})*/
"""
_JSON = {"x-guidance": {"whitespace_pattern": r"\x20|\n\x20{0,8}"}}  # a model may write blanks for ever
_PERCENT = r"\s?(100(\.0{1,6})?|[0-9]{1,2}(\.[0-9]{1,6})?)\s?"
_CORNER = rf"\({_PERCENT},{_PERCENT}\)"
_BOX = rf"<\|box\|>{_CORNER}\s?,?\s?{_CORNER}<\|\/box\|>"
_PLACED = rf"(<\|ref\|>[^<>{{}}]{{1,80}}<\|\/ref\|>\s?)?({_BOX}\s?){{1,16}}"
_NOT_DETECTED = r"(?i:no) [^<>{}\n]{1,120}(?i: detected)\.?"
_YES_NO = r"(?i:yes|no)\.?"
_NAMED = re.compile(r"(?!.*\band\b)[\w /-]{1,100}")
_LETTER = re.compile(r"\(([A-Z])\)")


def answer_grammar(
    *,
    grammar: str,
    answer: str,
    labels: Sequence[str] = (),
    options: Sequence[str] | None = None,
    prompt: str = "",
) -> str | None:
    """The grammar of an answer that `cxr_triton.reading.parse` reads; None where it would hold nothing.

    Parameters
    ----------
    grammar, answer : str
        As `parse` takes them.
    labels : sequence of str
        The vocabulary.
    options : sequence of str, optional
        Texts of the lettered options; None where the request gives none as a list. Then ``(A)`` in the prompt is a
        letter that may be answered, as yes and no are.
    prompt : str
        The user's turn.
    """
    head, tail = _FRAMES[grammar]
    if answer in ("prose", "text"):
        if grammar == "plain":
            return None
        content = "BALANCED" if grammar == "boxed" else "PROSE"
        text = f"{head} {content} {tail}"
        if grammar == "think_answer":
            text = rf"({_THINK} FREE {_THOUGHT})? (PROSE | /<answer>/ PROSE {tail})"
        elif answer == "text" and grammar == "boxed":
            text = f"{text} | PROSE"
        return _lark(grammar, f"start: TEXT\nTEXT: {text}\n")
    content = {
        "labels": lambda: _labels(labels),
        "option": lambda: _options(options, prompt),
        "boxes": lambda: rf"({_PLACED}[,;\s]{{0,2}}){{1,32}}|{_NOT_DETECTED}",
    }[answer]()
    if grammar == "boxed":
        content = rf"({content})|\{{({content})\}}|\\text\{{({content})\}}"
    return _lark(grammar, f"start: TEXT\nTEXT: {head} /\\s{{0,2}}({content})\\s{{0,2}}/ {tail}\n")


def schema_grammar(schema: Mapping[str, Any], *, grammar: str) -> str:
    """The grammar of an answer that is JSON by a schema, where `grammar` has its answer.

    Raises
    ------
    InvalidRequest
        The schema is too large or nested too deeply, refers to another document, or is not one that llguidance takes.
    """
    _check_schema(schema)
    head, tail = _FRAMES[grammar]
    rule = f"json: %json {json.dumps({**schema, **_JSON})}\n"
    _require_some_json(f"start: json\n{rule}")
    if grammar == "plain":
        return f"start: json\n{rule}"
    return _lark(grammar, f"start: HEAD json TAIL\n{rule}HEAD: {head}\nTAIL: {tail}\n")


def _require_some_json(grammar: str) -> None:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    matcher = LLMatcher(LLTokenizer("byte"), grammar, limits=LLParserLimits(**LIMITS), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        said = matcher.get_error().partition("\n")[0].removeprefix("at ").partition("failed to compile JSON schema: ")
        raise InvalidRequest(
            f"REQUEST.guide.json_schema: {said[2] or said[0]:.200}; give a schema that can be followed"
        )


def _lark(grammar: str, rules: str) -> str:
    """Rules with the terminals that they stand on: `FREE` is text without anything of the frame."""
    return f"{rules}FREE: {_NO_BOX if grammar == 'boxed' else _NO_TAG}{_TERMINALS}"


def _labels(labels: Sequence[str]) -> str:
    one = "|".join(_spelled(label) for label in labels)
    return rf"((?i:{one})\.?)(\s{{0,2}},\s{{0,4}}((?i:{one})\.?)){{0,{len(labels) - 1}}}"


def _options(options: Sequence[str] | None, prompt: str) -> str:
    named = {chr(65 + i): text.strip() for i, text in enumerate(options or ())}
    letters = named or dict.fromkeys(_LETTER.findall(prompt), "")
    if not letters:
        return _YES_NO
    any_letter = f"[{''.join(letters)}]"
    items = [rf"\({any_letter}\)( [^(){{}}<>\n]{{1,200}})?", rf"{any_letter}[.:)]?"]
    items += [rf"{key}[.:)] {_spelled(text)}\.?" for key, text in named.items() if _NAMED.fullmatch(text)]
    one = "|".join(items)
    several = rf"({one})((,\s{{0,2}}|\n{{1,2}}| and |, and )({one})){{0,25}}"
    return several if named else f"{several}|{_YES_NO}"


def _spelled(text: str) -> str:
    """Regular expression of a text; a blank may be an underscore."""
    parts = re.split(r"[\s_]+", text.strip())
    return "[ _]".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in part) for part in parts)


def _check_schema(schema: Mapping[str, Any]) -> None:
    where = "REQUEST.guide.json_schema"
    size = len(json.dumps(schema, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise InvalidRequest(f"{where}: {size} bytes, allowed {MAX_SCHEMA_BYTES}; shorten it")
    for depth, value in _walk(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(f"{where}: nested over {MAX_SCHEMA_DEPTH} deep; flatten it")
        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if isinstance(target := value.get(key), str) and not target.startswith("#"):
                raise InvalidRequest(
                    f"{where}: {key} {target!r:.60} is outside of it, and nothing is fetched; inline it"
                )
        if "x-guidance" in value:
            raise InvalidRequest(f"{where}: x-guidance is not taken; leave it out")


def _walk(value: object, depth: int = 0) -> Iterator[tuple[int, dict]]:
    """Every object of a JSON value, and how deep it lies, without recursion."""
    left = [(depth, value)]
    while left:
        depth, value = left.pop()
        if isinstance(value, dict):
            yield depth, value
            left += [(depth + 1, each) for each in value.values()]
        elif isinstance(value, list):
            left += [(depth + 1, each) for each in value]
