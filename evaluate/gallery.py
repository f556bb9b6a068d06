"""The pictures of chosen studies, small, with the greys that the model saw."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cxr_triton.errors import CxrError
from cxr_triton.evaluate.rows import Row
from cxr_triton.pixels.sandbox import Sandbox

MAX_PIXELS = 480 * 480


@dataclass(frozen=True)
class Shown:
    """A picture: PNG, and the columns and rows of the file that it is of."""

    png: bytes
    width: int
    height: int


def pictures(rows: Iterable[Row], folder: Path) -> dict[int, list[Shown | None]]:
    """Pictures of each row by its number; None in the place of one that is missing or cannot be read.

    Parameters
    ----------
    rows : iterable of Row
    folder : Path
        Of the data set.
    """
    with Sandbox() as sandbox:
        return {row.number: [_shown(sandbox, folder / image) for image in row.images] for row in rows}


def _shown(sandbox: Sandbox, path: Path) -> Shown | None:
    from PIL import Image

    try:
        prepared = sandbox.prepare(path.read_bytes(), preset="mimic_jpg", min_pixels=1, max_pixels=MAX_PIXELS, factor=1)
    except (CxrError, OSError):
        return None
    png = io.BytesIO()
    Image.fromarray(prepared.pixels).save(png, "PNG", optimize=True)
    height, width = prepared.source_size
    return Shown(png.getvalue(), width, height)
