"""How a request's tokens are chosen, checked: what the pipeline asks of a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from cxr_triton.errors import InvalidRequest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen and when it ends.

    Parameters
    ----------
    max_new_tokens : int
        Most tokens to generate, the end-of-sequence token included; at least 1.
    temperature : float
        Below 1e-4 the most likely token is taken (greedy).
    top_p : float
        Smallest set of most likely tokens whose probability reaches it; in (0, 1], 1 keeps all.
    repetition_penalty : float
        Over prompt and generated ids (arXiv 1909.05858, section 4.1); 1 is off.
    seed : int, optional
        Of the request's own generator; None draws a fresh one.
    stop : tuple of str
        The text ends before the first of these.
    eos_token_ids : tuple of int
        Tokens that end the generation.
    guide : str, optional
        Grammar of `cxr_triton.guide` that the text follows; it ends only where the grammar does. Tokens are taken of
        those that it allows, before `top_p` keeps the likeliest.
    logprobs : bool
        Say how likely the model found each token; see `cxr_triton.engines.runtime.sampler.log_softmax`.

    Raises
    ------
    InvalidRequest
        A value is of another type, or out of its range.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    guide: str | None = None
    logprobs: bool = False

    def __post_init__(self):
        for name, (allowed, holds) in _ALLOWED.items():
            if not holds(getattr(self, name)):
                raise InvalidRequest(f"sampling: {name} is {getattr(self, name)!r:.80}, must be {allowed}")
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))


def _is_whole(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= least)


def _is_number(value: object) -> TypeGuard[float]:
    """Of a size that a float32 takes; NaN is none."""
    return (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and bool(-_LARGEST <= value <= _LARGEST)
    )


def _is_list(value: object, of: Callable[[object], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(of, value))


_LARGEST = float(np.finfo(np.float32).max)
_ALLOWED: dict[str, tuple[str, Callable[[object], bool]]] = {
    "max_new_tokens": ("a whole number, at least 1", lambda value: _is_whole(value, 1)),
    "temperature": ("a number, 0 or more", lambda value: _is_number(value) and value >= 0),
    "top_p": ("a number in (0, 1]", lambda value: _is_number(value) and 0 < value <= 1),
    "repetition_penalty": ("a number, more than 0", lambda value: _is_number(value) and value > 0),
    "seed": ("a whole number, 0 or more, or None", lambda value: value is None or _is_whole(value, 0)),
    "stop": (
        "strings that are not empty",
        lambda value: _is_list(value, lambda text: isinstance(text, str) and text != ""),
    ),
    "guide": ("a grammar, or None", lambda value: value is None or isinstance(value, str)),
    "logprobs": ("true or false", lambda value: isinstance(value, bool)),
    "eos_token_ids": ("token ids", lambda value: _is_list(value, lambda id_: _is_whole(id_, 0) and id_ < 1 << 31)),
}
