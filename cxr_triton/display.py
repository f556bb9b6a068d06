"""Stored pixel values to an 8-bit picture, by one of two named presets.

`mimic_jpg` is what MIMIC-CXR-JPG (and nearly CheXpert) did to make training pictures; `voi_display` is the DICOM
grayscale pipeline. Both are curves over the at most 65,536 stored codes, so a picture costs one table look-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cxr_triton.errors import InvalidImage

VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]


@dataclass(frozen=True)
class Rescale:
    """Linear modality transform ``slope * stored + intercept`` (PS3.3 C.11.1.1.2)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return values * self.slope + self.intercept


@dataclass(frozen=True, eq=False)
class LookupTable:
    """Modality or VOI LUT of PS3.3 C.11.1.1.1 and C.11.2.1.1.

    Attributes
    ----------
    first : int
        Input value that maps to entry 0; inputs outside the table take its first or last entry.
    entries : ndarray (n,) uint16
    bits : int
        Declared bits of an entry; the output range is 0 .. 2**bits - 1.
    """

    first: int
    entries: np.ndarray
    bits: int

    def __call__(self, values: np.ndarray) -> np.ndarray:
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.intp)
        return self.entries[index].astype(np.float64)

    @property
    def output_range(self) -> tuple[float, float]:
        return 0.0, float(2**self.bits - 1)


@dataclass(frozen=True)
class Window:
    """VOI window of PS3.3 C.11.2.1.2 and C.11.2.1.3; the output is 0 .. 1."""

    center: float
    width: float
    function: VoiFunction = "LINEAR"

    @property
    def usable(self) -> bool:
        """LINEAR needs a width of at least 1, the others more than 0."""
        if not (np.isfinite(self.center) and np.isfinite(self.width)):
            return False
        return self.width >= 1 if self.function == "LINEAR" else self.width > 0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        if self.function == "SIGMOID":
            # the clip keeps exp() finite and changes nothing in 8 bits
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.center) / self.width, -700, 700)))
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.center) / self.width + 0.5, 0, 1)
        if self.width == 1:
            return (values > self.center - 0.5).astype(np.float64)
        return np.clip((values - (self.center - 0.5)) / (self.width - 1) + 0.5, 0, 1)


def mimic_jpg(stored: np.ndarray, monochrome1: bool) -> np.ndarray:
    """8-bit picture of the MIMIC-CXR-JPG recipe (github.com/MIT-LCP/mimic-cxr issue 16), before its JPEG encoding.

    Subtract the minimum, divide by the maximum, times 255, truncate; complement MONOCHROME1; `equalize_histogram`.

    Parameters
    ----------
    stored : ndarray (rows, cols), integer
        Stored pixel values, at most 16 significant bits.
    monochrome1 : bool
        Whether the lowest value is white.

    Returns
    -------
    ndarray (rows, cols) uint8

    Raises
    ------
    InvalidImage
        All pixels are equal.
    """
    low, counts = _histogram(stored)
    span = len(counts) - 1
    if span == 0:
        raise InvalidImage(f"picture is constant: all {stored.size} pixels are {low}; send an image with content")
    curve = (np.arange(span + 1) / span * 255).astype(np.uint8)
    if monochrome1:
        curve = ~curve
    histogram = np.bincount(curve, weights=counts, minlength=256).astype(np.int64)
    return _apply(stored, low, _equalizing_curve(histogram)[curve])


def equalize_histogram(picture: np.ndarray) -> np.ndarray:
    """Histogram equalization of a uint8 (rows, cols) picture, bit-exact with OpenCV's ``equalizeHist``."""
    return _equalizing_curve(np.bincount(picture.ravel(), minlength=256))[picture]


def _equalizing_curve(histogram: np.ndarray) -> np.ndarray:
    """uint8 (256,) curve: the cumulated histogram above the first used bin, scaled to 255 in float32."""
    first = int(np.flatnonzero(histogram)[0])
    above = int(histogram.sum() - histogram[first])
    if above == 0:
        return np.full(256, first, np.uint8)
    scale = np.float32(255) / np.float32(above)
    cumulated = histogram.cumsum() - histogram[first]
    cumulated[:first] = 0
    return np.clip(np.rint(cumulated.astype(np.float32) * scale), 0, 255).astype(np.uint8)


def voi_display(
    stored: np.ndarray,
    *,
    monochrome1: bool,
    bits_stored: int,
    signed: bool = False,
    modality: Rescale | LookupTable | None = None,
    voi: Window | LookupTable | None = None,
    padding: tuple[int, int] | None = None,
) -> np.ndarray:
    """8-bit picture of the DICOM grayscale pipeline (PS3.4 N.2): modality, VOI, inversion last.

    Greys are scaled by the declared range of the last transform, never by the result's extremes, so a bright marker
    does not change the lungs. The one exception: without a VOI transform, values that fill less than a quarter of the
    declared range are scaled by their own minimum and maximum (`fills_declared_range`).

    Parameters
    ----------
    stored : ndarray (rows, cols), integer
        Stored pixel values, at most 16 significant bits.
    monochrome1 : bool
        Whether the lowest value is white.
    bits_stored : int
        Significant bits of a stored value.
    signed : bool
        Whether stored values are two's complement.
    modality : Rescale or LookupTable, optional
    voi : Window or LookupTable, optional
        An unusable window counts as absent.
    padding : (int, int), optional
        Stored values from the first to the second are outside the image: black, and without influence on the scale.

    Returns
    -------
    ndarray (rows, cols) uint8
    """
    low, counts = _histogram(stored)
    codes = np.arange(low, low + len(counts))
    padded = _between(codes, padding) if padding else np.zeros(len(codes), bool)
    values = modality(codes.astype(np.float64)) if modality else codes.astype(np.float64)
    if isinstance(voi, Window) and not voi.usable:
        voi = None
    if isinstance(voi, Window):
        grey = voi(values)
    else:
        if isinstance(voi, LookupTable):
            values = voi(values)
            black, white = voi.output_range
        else:
            black, white = declared_range(bits_stored, signed, modality)
            used = values[(counts > 0) & ~padded]
            if used.size and not fills_declared_range(used, black, white):
                black, white = float(used.min()), float(used.max())
        grey = np.clip((values - black) / max(white - black, np.finfo(float).tiny), 0, 1)
    if monochrome1:
        grey = 1 - grey
    curve = np.floor(grey * 255 + 0.5).astype(np.uint8)
    curve[padded] = 0
    return _apply(stored, low, curve)


def declared_range(
    bits_stored: int, signed: bool, modality: Rescale | LookupTable | None = None
) -> tuple[float, float]:
    """Smallest and largest value that the header allows after the modality transform."""
    if isinstance(modality, LookupTable):
        return modality.output_range
    low, high = (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1) if signed else (0, 2**bits_stored - 1)
    ends = (modality or Rescale())(np.array([low, high], np.float64))
    return float(ends.min()), float(ends.max())


def fills_declared_range(values: np.ndarray, low: float, high: float) -> bool:
    """Whether `values` span at least a quarter of `low` .. `high`; below that fewer than 64 greys would remain."""
    return float(values.max() - values.min()) >= (high - low) / 4


def _between(values: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    return (values >= limits[0]) & (values <= limits[1])


def _histogram(stored: np.ndarray) -> tuple[int, np.ndarray]:
    """Smallest value, and the count of every value from it to the largest."""
    low, high = int(stored.min()), int(stored.max())
    if high - low > 65535:
        raise InvalidImage(f"stored values span {high - low + 1} codes, allowed 65536; send at most 16 bits a pixel")
    if low >= 0:
        return low, np.bincount(stored.ravel())[low:]
    return low, np.bincount((stored.ravel().astype(np.int32) - low))


def _apply(stored: np.ndarray, low: int, curve: np.ndarray) -> np.ndarray:
    """`curve[stored - low]` without a wide copy of `stored` when its values are not negative."""
    if low >= 0:
        table = np.zeros(low + len(curve), np.uint8)
        table[low:] = curve
        return table[stored]
    return curve[stored.astype(np.int32) - low]
