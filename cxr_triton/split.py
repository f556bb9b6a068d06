r"""Reasoning and content of an answer, told apart while its text comes.

`cxr_triton.reading.parse` judges the whole text afterwards; this is for those who show it before. Nothing but tags,
``\boxed{}`` and blanks around a part is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

REASONING, CONTENT = "reasoning_content", "content"
Part = tuple[str, str]
"""`REASONING` or `CONTENT`, and text of it that is not empty."""

_TAG = re.compile(r"<(/?)(think|thinking|answer)\s{0,16}>", re.IGNORECASE)
_NAMES = ("think", "thinking", "answer")
_BRACE = re.compile(r"\\boxed\s{0,16}\{|\\[{}]|[{}]")
_BOXED = "\\boxed"
_AFTER_BOX = re.compile(r"(?:\s|\$|\\\]|\\\)|\.|\\\Z)*")
_LONGEST_MARK = 32


class Splitter:
    """Takes the text of one answer as it comes.

    Parameters
    ----------
    grammar : str
        One of `cxr_triton.profile.GRAMMARS`. In ``boxed`` the content is what the boxes hold, in ``plain`` everything,
        elsewhere all that stands in no reasoning block.
    """

    def __init__(self, grammar: str):
        self._take = {"boxed": self._boxed, "plain": self._plain}.get(grammar, self._tagged)
        self._kept = ""  # may be the beginning of a mark
        self._block: str | None = None  # of tags: think or answer
        self._depth = 0  # of braces in a box
        self._is_after_box = False
        # what sets a box off from the text before it
        self._trims = {REASONING: _Trim(" \t\r\n$" if grammar == "boxed" else None), CONTENT: _Trim(None)}

    @property
    def has_content(self) -> bool:
        """Content has been given."""
        return self._trims[CONTENT].has_begun

    def push(self, text: str) -> Iterator[Part]:
        """What is known of the text so far, in its order."""
        self._kept += text
        yield from self._take(is_end=False)

    def finish(self) -> Iterator[Part]:
        """What was kept because more might have followed."""
        yield from self._take(is_end=True)

    def _give(self, part: str, text: str) -> Iterator[Part]:
        if given := self._trims[part].add(text):
            yield part, given

    def _plain(self, *, is_end: bool) -> Iterator[Part]:
        text, self._kept = self._kept, ""
        yield from self._give(CONTENT, text)

    def _tagged(self, *, is_end: bool) -> Iterator[Part]:
        while tag := _TAG.search(self._kept):
            name = "answer" if tag[2].lower() == "answer" else "think"
            closes = bool(tag[1]) and name == self._block
            opens = not tag[1] and (self._block is None or (self._block, name) == ("think", "answer"))
            stop = tag.start() if closes or opens else tag.end()
            yield from self._give(self._part(), self._kept[:stop])
            self._kept = self._kept[tag.end() :]
            if closes or opens:
                self._block = name if opens else None
                self._trims[self._part()].begin_again()
        yield from self._rest(self._part(), "<", _may_become_tag, is_end)

    def _part(self) -> str:
        return REASONING if self._block == "think" else CONTENT

    def _boxed(self, *, is_end: bool) -> Iterator[Part]:
        while self._skip_after_box() and (brace := _BRACE.search(self._kept)):
            part = CONTENT if self._depth else REASONING
            opens_box = not self._depth and brace[0].startswith(_BOXED)
            closes_box = self._depth == 1 and brace[0] == "}"
            if self._depth or opens_box:
                self._depth += {"}": -1, r"\{": 0, r"\}": 0}.get(brace[0], 1)
            yield from self._give(part, self._kept[: brace.start() if opens_box or closes_box else brace.end()])
            self._kept = self._kept[brace.end() :]
            self._is_after_box = closes_box
            if opens_box:
                self._trims[CONTENT].begin_again()
        if not self._is_after_box:
            yield from self._rest(CONTENT if self._depth else REASONING, "\\", _may_become_box, is_end)

    def _skip_after_box(self) -> bool:
        """Whether what follows a box is more than what sets it off from the text, which is left out."""
        if self._is_after_box:
            if _AFTER_BOX.fullmatch(self._kept):
                return False
            self._is_after_box = False
            self._trims[REASONING].begin_again()
        return True

    def _rest(self, part: str, start: str, may_become_mark, is_end: bool) -> Iterator[Part]:
        at = self._kept.rfind(start)
        keeps = not is_end and at >= 0 and len(self._kept) - at <= _LONGEST_MARK and may_become_mark(self._kept[at:])
        at = at if keeps else len(self._kept)
        text, self._kept = self._kept[:at], self._kept[at:]
        yield from self._give(part, text)


class _Trim:
    """Text of a part without the blanks at the beginning and end of its blocks."""

    def __init__(self, trailing: str | None):
        self._trailing = trailing
        self._held = ""
        self._at_start = True
        self.has_begun = False

    def begin_again(self) -> None:
        """What comes next is another block, on a line of its own."""
        self._at_start = True

    def add(self, text: str) -> str:
        """What can be given now."""
        if self._at_start:
            text = text.lstrip()
            if not text:
                return ""
            self._at_start, self._held = False, "\n" if self.has_begun else ""
        text = self._held + text
        body = text.rstrip(self._trailing)
        self._held = text[len(body) :]
        self.has_begun = self.has_begun or body != ""
        return body


def _may_become_tag(text: str) -> bool:
    name = text[1:].removeprefix("/").lower()
    return any(known.startswith(name) for known in _NAMES) or name.rstrip() in _NAMES


def _may_become_box(text: str) -> bool:
    return _BOXED.startswith(text) or text.rstrip() == _BOXED
