r"""The list that an answer gives, and the lists that differ from it in one choice: what scores compare.

A choice is a label of the vocabulary, or an option of a closed question. Of the written list ``A, B``:

- without ``A``: ``B``. With ``C``: ``C, A, B``, ``A, C, B`` and ``A, B, C``, as a model may have an order of its own.
- A list of one choice says what is the case, such as ``No Finding`` or an option's letter, so another may stand in its
  place too: without ``A``: ``B``, ``C``, … each alone; with ``C``: also ``C`` alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cxr_triton.reading import Parsed, answer_span, parse

SCORE_LIMIT = 15.0
"""Log-odds at which a score ends, three million to one."""

MOST_ITEMS = 32
"""Of a list that is scored: what is compared grows with its square, and what is kept of it with its cube."""
_SEPARATORS = (", ", ",", ",\n", "\n", "; ", " and ", " ")
_FORMS = ("({letter})", "({letter}) {text}", "{letter}. {text}", "{letter}) {text}", "{letter}: {text}", "{letter}")
_YES_NO = ("Yes", "No")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Which choices of an answer are scored.

    Attributes
    ----------
    grammar, answer : str
        As `cxr_triton.reading.parse` takes them.
    choices : tuple of str
        The vocabulary of labels, or the texts of a question's lettered options; none is yes or no.
    """

    grammar: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """Texts that could stand at the end of an answer.

    Attributes
    ----------
    start : int
        Where in the answer's text they begin, in characters.
    texts : tuple of str
        The written one first.
    has_end : bool
        The answer ends with them, by an end token alone.
    choices : dict of str to (tuple of int, tuple of int)
        Label, letter, ``Yes`` or ``No`` to the texts with it and those without it.
    """

    start: int
    texts: tuple[str, ...]
    has_end: bool
    choices: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class _List:
    """A written list: its choices by what is written of them, how others would be written, and what is between."""

    items: tuple[str, ...]
    names: tuple[str | None, ...]
    spelled: dict[str, str]
    separator: str

    def edits(self, name: str) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """Lists with a choice, and without it."""
        others: list[tuple[str, ...]] = [(text,) for other, text in self.spelled.items() if other != name]
        if name in self.names:
            pairs = zip(self.items, self.names, strict=True)
            rest = tuple(item for item, other in pairs if other != name)
            return [self.items], [rest] if rest else others
        text, places = self.spelled[name], range(len(self.items) + 1)
        more = [(*self.items[:place], text, *self.items[place:]) for place in places]
        return [*more, *([(text,)] if len(self.items) == 1 else [])], [self.items]


def alternatives(text: str, scoring: Scoring) -> Alternatives | None:
    """What could stand in place of the list that a finished answer gives; None where none can be taken apart."""
    span = answer_span(text, scoring.grammar)
    labels = scoring.choices if scoring.answer != "option" else ()
    parsed = parse(text, grammar=scoring.grammar, answer=scoring.answer, labels=labels)
    if span is None or parsed.answer is None:
        return None
    found = _options(parsed, scoring.choices) if scoring.answer == "option" else _labels(parsed, labels)
    first = text.find(parsed.answer, *span[:2])
    if found is None or first < 0 or len(found.items) > MOST_ITEMS:
        return None
    written = found.separator.join(found.items)
    after = text[first + len(parsed.answer) : span[2]]
    if parsed.answer.endswith(".") and not written.endswith("."):
        after = "." + after
    before = text[span[0] : first]
    edits = {name: found.edits(name) for name in found.spelled}
    lists = dict.fromkeys([found.items, *itertools.chain(*(_all(each) for each in edits.values()))])
    number = {items: i for i, items in enumerate(lists)}
    return Alternatives(
        start=span[0],
        texts=tuple(before + found.separator.join(items) + after for items in lists),
        has_end=scoring.grammar == "plain",
        choices={
            name: (tuple(number[items] for items in given), tuple(number[items] for items in lacking))
            for name, (given, lacking) in edits.items()
        },
    )


def _all(edits: tuple[list[tuple[str, ...]], list[tuple[str, ...]]]) -> Iterator[tuple[str, ...]]:
    return itertools.chain(*edits)


def _labels(parsed: Parsed, labels: Sequence[str]) -> _List | None:
    if not parsed.findings or parsed.answer is None:
        return None
    answer = parsed.answer.removesuffix(".")
    items = [part.strip() for part in answer.split(",") if part.strip()]
    names = {finding.written.removesuffix("."): finding.label for finding in parsed.findings}
    separator = next((s for s in _SEPARATORS if s.join(items) == answer), _SEPARATORS[0])
    spelled = {label: label for label in labels} | {label: written for written, label in names.items()}
    return _List(tuple(items), tuple(names.get(item.removesuffix(".")) for item in items), spelled, separator)


def _options(parsed: Parsed, texts: Sequence[str]) -> _List | None:
    r"""Options as the answer writes them: a letter, ``(A)``, or either with the option's text."""
    letters = parsed.options
    if not letters or parsed.answer is None:
        return None
    answer = parsed.answer.removesuffix(".")
    if set(letters) <= set(_YES_NO):
        case = next((case for case in (str, str.lower, str.upper) if case(letters[0]) == answer), None)
        return _List((answer,), letters, {n: case(n) for n in _YES_NO}, _SEPARATORS[0]) if case else None
    named = {chr(65 + i): text for i, text in enumerate(texts)}
    if not set(letters) <= set(named):
        return None
    for form in _FORMS:
        spelled = {letter: form.format(letter=letter, text=text) for letter, text in named.items()}
        items = tuple(spelled[letter] for letter in letters)
        for separator in _SEPARATORS:
            if separator.join(items) in (answer, parsed.answer):
                return _List(items, letters, spelled, separator)
    return None
