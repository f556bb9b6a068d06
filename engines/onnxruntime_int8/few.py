"""Which of the two graphs a run goes to."""

from __future__ import annotations

FEW = 3
"""New tokens in one run that the graph in int4 computes; of a 3B on a Xeon it was the faster one up to three."""


def is_few(sequences: int, tokens: int) -> bool:
    """Whether the graph in int4 runs so many sequences of so many new tokens each."""
    return sequences * tokens <= FEW
