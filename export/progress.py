"""The bar of long work on standard error."""

from __future__ import annotations

from typing import Any


def bar(total: int, what: str, progress: bool | None, **options: Any):
    """A tqdm bar; `progress` None shows it on a terminal only. `options` are tqdm's."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=None if progress is None else not progress, **options)
