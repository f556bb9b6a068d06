"""Which tokens may come next of an answer that follows a grammar: llguidance over the vocabulary of a bundle."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.errors import InvalidRequest
from cxr_triton.guide import LIMITS

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 16  # grammars that are compiled already


class Guide:
    """Where one answer is in its grammar; for the thread that samples it.

    Parameters
    ----------
    matcher : LLMatcher
    """

    def __init__(self, matcher: LLMatcher):
        self._matcher = matcher

    def allows(self, token: int) -> bool:
        """Whether a token may come next; microseconds, as no other token is looked at."""
        return self._matcher.validate_tokens([token]) == 1

    def allowed(self) -> np.ndarray:
        """Ids that may come next, ascending; those that end an answer are among them where the grammar may end.

        Raises
        ------
        InvalidRequest
            There are none, or to find them goes beyond `cxr_triton.guide.LIMITS`.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        if not len(ids):
            raise InvalidRequest("REQUEST.guide: no token follows; give a grammar that can be followed")
        return ids

    def accept(self, token: int) -> None:
        """Take the token that was chosen, one of `allowed`."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            said = self._matcher.get_error().partition("\n")[0]
            raise InvalidRequest(f"REQUEST.guide: the answer could not be held to it ({said:.200}); give a simpler one")


class Guides:
    """Grammars over the tokens of a bundle.

    Parameters
    ----------
    bundle : Bundle
    """

    def __init__(self, bundle):
        from llguidance import LLTokenizer

        geometry, tokenizer = bundle.geometry, (bundle.path / "tokenizer.json").read_text("utf-8")
        self._tokens = LLTokenizer(tokenizer, n_vocab=geometry.vocab, eos_token=list(geometry.eos_token_ids))
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def guide(self, grammar: str) -> Guide:
        """A guide at the start of a grammar; called from one thread.

        Raises
        ------
        InvalidRequest
            It is not one that llguidance takes, or larger than `cxr_triton.guide.LIMITS`.
        """
        if (matcher := self._compiled.pop(grammar, None)) is None:
            matcher = self._compile(grammar)
        self._compiled[grammar] = matcher
        if len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return Guide(matcher.deep_copy())

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        matcher = LLMatcher(self._tokens, grammar, limits=LLParserLimits(**LIMITS), log_level=0)
        if matcher.is_error():
            said = matcher.get_error().partition("\n")[0]
            raise InvalidRequest(f"REQUEST.guide: {said:.200}; give another")
        return matcher
