"""8-bit picture to model patches: the checkpoint's resize, then the 8x8-patch windows that `vision.onnx` takes.

Takes uint8 `[height, width]` (gray) or `[height, width, 3]`, gives `VisionInput`. Gray is resized once and
its three equal channels are made last; normalization happens in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cxr_triton.errors import InvalidImage

PATCH = 14  # pixels
MERGE = 2  # patches along each side of a merge unit, which becomes one token
WINDOW = 4  # merge units along each side of an attention window
MAX_ASPECT_RATIO = 200

_WINDOW_PIXELS = WINDOW * MERGE * PATCH
_WINDOW_PATCHES = (WINDOW * MERGE) ** 2
_PATCH_VALUES = 3 * PATCH * PATCH


@dataclass(frozen=True)
class VisionInput:
    """One image as `vision.onnx` takes it, padded to a window budget W and a token budget T.

    Attributes
    ----------
    pixel_windows : uint8 [W, 64, 588]
        Patches (channel, row, column) in windows of 8x8, merge unit by merge unit.
    patch_rows_cols : int32 [W, 64, 2]
        Row and column of each patch in the image's grid; 0 where not valid.
    valid : bool [W, 64]
        The patch exists.
    merge_order : int32 [T]
        For each token in raster order the index of its merge unit in the `W * 16` units; 0 beyond the image.
    rows, cols : int
        The image's grid, in patches.
    """

    pixel_windows: np.ndarray
    patch_rows_cols: np.ndarray
    valid: np.ndarray
    merge_order: np.ndarray
    rows: int
    cols: int

    @property
    def tokens(self) -> int:
        """Tokens that the image takes in the prompt."""
        return self.rows * self.cols // MERGE**2


def pixel_limits(preprocessor_config: Mapping) -> tuple[int, int]:
    """Least and most pixels of a resized image, from either spelling of `preprocessor_config.json`.

    Parameters
    ----------
    preprocessor_config : Mapping
        With `min_pixels`/`max_pixels`, or `size.shortest_edge`/`size.longest_edge` (both are areas in spite of
        their names). The first spelling wins, and absent values are the processor class's, as in transformers.

    Returns
    -------
    min_pixels, max_pixels : int
    """
    size = preprocessor_config.get("size") or {}
    least, most = preprocessor_config.get("min_pixels"), preprocessor_config.get("max_pixels")
    return (
        int(least if least is not None else size.get("shortest_edge", 56 * 56)),
        int(most if most is not None else size.get("longest_edge", 28 * 28 * 1280)),
    )


def square_size(height: int, width: int, pixel_aspect_ratio: float) -> tuple[int, int]:
    """Size at which a picture has square pixels and keeps the finer of its two resolutions.

    Parameters
    ----------
    pixel_aspect_ratio : float
        Height of a pixel over its width.
    """
    if pixel_aspect_ratio >= 1:
        return round(height * pixel_aspect_ratio), width
    return height, round(width / pixel_aspect_ratio)


def target_size(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = PATCH * MERGE
) -> tuple[int, int]:
    """Size to which the checkpoint's processor resizes a picture (`smart_resize` of transformers).

    Both sides are rounded to multiples of `factor`; an area over `max_pixels` is scaled down and floored, one
    under `min_pixels` is scaled up and ceiled.

    Raises
    ------
    InvalidImage
        A side is empty, or the aspect ratio is over 200.
    """
    if min(height, width) < 1:
        raise InvalidImage(f"picture is {height}x{width} pixels, at least 1x1 is needed; send a picture with pixels")
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise InvalidImage(
            f"picture of {height}x{width} pixels has aspect ratio {max(height, width) / min(height, width):.0f}, "
            f"at most {MAX_ASPECT_RATIO} is allowed; send the whole radiograph, not a strip of it"
        )
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / scale / factor) * factor)
        w = max(factor, math.floor(width / scale / factor) * factor)
    elif h * w < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * scale / factor) * factor
        w = math.ceil(width * scale / factor) * factor
    return h, w


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's antialiased bicubic, which is what the checkpoints' processor (PIL backend) runs.

    Parameters
    ----------
    pixels : uint8 [H, W] or [H, W, 3]
    size : (height, width)
    """
    from PIL import Image

    height, width = size
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def grid(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a resized picture."""
    return height // PATCH, width // PATCH


def windows(pixels: np.ndarray, *, window_budget: int, token_budget: int) -> VisionInput:
    """Cut a resized picture into the padded windows of `vision.onnx`.

    Window and patch order are those of `get_vision_window_index` in transformers, with padding left in place
    instead of dropped, so that every window has 64 patches.

    Parameters
    ----------
    pixels : uint8 [h, w] or [h, w, 3]
        Sides are multiples of 28.
    window_budget, token_budget : int
        W and T; the arrays are zero beyond the image.

    Raises
    ------
    InvalidImage
        The picture needs more windows or tokens than the budgets.
    """
    height, width = pixels.shape[:2]
    if height % (PATCH * MERGE) or width % (PATCH * MERGE) or not pixels.size:
        raise InvalidImage(f"picture is {height}x{width} pixels, not multiples of {PATCH * MERGE}; resize it first")
    rows, cols = grid(height, width)
    tokens = rows * cols // MERGE**2
    down, across = -(-height // _WINDOW_PIXELS), -(-width // _WINDOW_PIXELS)
    count = down * across
    if count > window_budget or tokens > token_budget:
        ratio = max(height, width) / min(height, width)
        raise InvalidImage(
            f"picture of {height}x{width} pixels after resizing (aspect ratio {ratio:.1f}) "
            f"needs {count} windows and {tokens} tokens, allowed are {window_budget} and {token_budget}; "
            "send a picture closer to square"
        )

    padded = np.zeros((down * _WINDOW_PIXELS, across * _WINDOW_PIXELS, *pixels.shape[2:]), np.uint8)
    padded[:height, :width] = pixels
    # [window row, unit row, patch row, y, window col, unit col, patch col, x, channel]
    split = padded.reshape(down, WINDOW, MERGE, PATCH, across, WINDOW, MERGE, PATCH, -1)
    pixel_windows = np.zeros((window_budget, _WINDOW_PATCHES, _PATCH_VALUES), np.uint8)
    pixel_windows[:count].reshape(down, across, WINDOW, WINDOW, MERGE, MERGE, 3, PATCH, PATCH)[...] = split.transpose(
        0, 4, 1, 5, 2, 6, 8, 3, 7
    )

    # [window row, window col, unit row, unit col, patch row, patch col]
    order = (down, across, WINDOW, WINDOW, MERGE, MERGE)
    row = np.arange(down * WINDOW * MERGE, dtype=np.int32).reshape(down, 1, WINDOW, 1, MERGE, 1)
    col = np.arange(across * WINDOW * MERGE, dtype=np.int32).reshape(1, across, 1, WINDOW, 1, MERGE)
    exists = np.zeros((window_budget, _WINDOW_PATCHES), bool)
    exists[:count] = np.broadcast_to((row < rows) & (col < cols), order).reshape(count, -1)
    rows_cols = np.zeros((window_budget, _WINDOW_PATCHES, 2), np.int32)
    rows_cols[:count, :, 0] = np.broadcast_to(row, order).reshape(count, -1)
    rows_cols[:count, :, 1] = np.broadcast_to(col, order).reshape(count, -1)
    rows_cols[~exists] = 0

    unit_row, unit_col = np.arange(rows // MERGE)[:, None], np.arange(cols // MERGE)
    window = unit_row // WINDOW * across + unit_col // WINDOW
    merge_order = np.zeros(token_budget, np.int32)
    merge_order[:tokens] = (window * WINDOW**2 + unit_row % WINDOW * WINDOW + unit_col % WINDOW).reshape(-1)
    return VisionInput(pixel_windows, rows_cols, exists, merge_order, rows, cols)


def stack(images: Sequence[VisionInput]) -> dict[str, np.ndarray]:
    """The inputs of `vision.onnx` for a batch of images with the same budgets, by input name."""
    names = ("pixel_windows", "patch_rows_cols", "valid", "merge_order")
    return {name: np.stack([getattr(image, name) for image in images]) for name in names}


def blank(window_budget: int, token_budget: int) -> VisionInput:
    """One black merge unit in one window, for a request without an image: a batch of none cannot be served."""
    black = np.zeros((PATCH * MERGE, PATCH * MERGE), np.uint8)
    return windows(black, window_budget=window_budget, token_budget=token_budget)
