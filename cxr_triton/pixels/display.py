"""Stored pixel values to an 8-bit picture, by one of two named presets.

`mimic_jpg` is what MIMIC-CXR-JPG (and nearly CheXpert) did to make training pictures; `voi_display` is the DICOM
grayscale pipeline. Both are curves over the at most 65,536 stored codes, so a picture costs one table look-up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cxr_triton.errors import InvalidImage
from cxr_triton.pixels.radiograph import Metadata, Radiograph
from cxr_triton.pixels.transforms import LookupTable, Rescale, Window, declared_range

PRESETS = ("mimic_jpg", "voi_display")


@dataclass(frozen=True, eq=False)
class Picture:
    """An 8-bit picture and how it was made.

    Attributes
    ----------
    pixels : ndarray (rows, cols) or (rows, cols, 3) uint8
    preset : str
        mimic_jpg, voi_display, or as_is for a display-ready PNG or JPEG.
    percentiles : (int, int)
        Stored values at 0.5 % and 99.5 %.
    padding_share : float
        Part of the pixels that is padding.
    flags : tuple of str
        The radiograph's and the preset's members of `cxr_triton.pixels.flags.FLAGS`, sorted.
    """

    pixels: np.ndarray
    preset: str
    percentiles: tuple[int, int]
    padding_share: float = 0.0
    flags: tuple[str, ...] = ()


def render(radiograph: Radiograph, preset: str) -> Picture:
    """8-bit picture of a radiograph.

    Parameters
    ----------
    radiograph : Radiograph
    preset : str
        One of `PRESETS`. 8-bit PNG and JPEG are display-ready: they stay as they are.

    Raises
    ------
    InvalidImage
        The picture is constant: nothing to read, or the sign of a silent decoding failure.
    ValueError
        Unknown preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, allowed {', '.join(PRESETS)}")
    stored, metadata = radiograph.stored, radiograph.metadata
    flags = set(radiograph.flags)
    low, counts = _histogram(stored)
    percentiles = _percentiles(low, counts)
    if len(counts) == 1:
        raise _constant(stored, low)
    if metadata.format != "dicom" and stored.dtype == np.uint8:
        flags.add("display_ready")
        return Picture(stored, "as_is", percentiles, flags=_with_polarity(stored, flags))
    padding, padding_share = metadata.padding, 0.0
    if padding:
        padded = counts[_between(np.arange(low, low + len(counts)), padding)].sum()
        padding_share = float(padded / stored.size)
        if padding_share == 1:
            padding = None
        if padding_share:
            flags.add("padding" if padding else "padding_ignored")
    monochrome1 = metadata.photometric == "MONOCHROME1"
    if preset == "mimic_jpg":
        pixels = _apply(stored, low, _mimic_curve(counts, monochrome1))
    else:
        curve, scaling = _voi_curve(low, counts, metadata, padding)
        if curve.min() == curve.max():
            raise InvalidImage(
                f"VOI transform maps every stored value {low}..{low + len(counts) - 1} to grey {curve[0]}; correct the"
                " window or use the preset mimic_jpg"
            )
        pixels = _apply(stored, low, curve)
        if scaling:
            flags.add(scaling)
    return Picture(pixels, preset, percentiles, padding_share, _with_polarity(pixels, flags))


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
    if len(counts) == 1:
        raise _constant(stored, low)
    return _apply(stored, low, _mimic_curve(counts, monochrome1))


def _mimic_curve(counts: np.ndarray, monochrome1: bool) -> np.ndarray:
    span = len(counts) - 1
    curve = (np.arange(span + 1) / span * 255).astype(np.uint8)
    if monochrome1:
        curve = ~curve
    histogram = np.bincount(curve, weights=counts, minlength=256).astype(np.int64)
    return _equalizing_curve(histogram)[curve]


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
    rows, columns = stored.shape
    metadata = Metadata(
        format="dicom",
        rows=rows,
        columns=columns,
        bits_stored=bits_stored,
        signed=signed,
        photometric="MONOCHROME1" if monochrome1 else "MONOCHROME2",
        modality_transform=modality,
        voi=voi,
    )
    curve, _ = _voi_curve(low, counts, metadata, padding)
    return _apply(stored, low, curve)


def _voi_curve(
    low: int, counts: np.ndarray, metadata: Metadata, padding: tuple[int, int] | None
) -> tuple[np.ndarray, str]:
    """Grey of each code, and the flag that says how greys were scaled where no VOI transform did it."""
    modality, voi = metadata.modality_transform, metadata.voi
    codes = np.arange(low, low + len(counts))
    padded = _between(codes, padding) if padding else np.zeros(len(codes), bool)
    values = modality(codes.astype(np.float64)) if modality else codes.astype(np.float64)
    scaling = ""
    if isinstance(voi, Window) and voi.usable:
        grey = voi(values)
    else:
        if isinstance(voi, LookupTable):
            values = voi(values)
            black, white = voi.output_range
        else:
            scaling = "full_range"
            black, white = declared_range(metadata.bits_stored, metadata.signed, modality)
            used = values[(counts > 0) & ~padded]
            if used.size and np.ptp(used) > 0 and not fills_declared_range(used, black, white):
                scaling = "range_fallback"
                black, white = float(used.min()), float(used.max())
        grey = np.clip((values - black) / (white - black), 0, 1)
    if metadata.photometric == "MONOCHROME1":
        grey = 1 - grey
    # the addend sends a tie up in spite of rounding errors, so that an inverted twin gets the same grey
    curve = np.floor(grey * 255 + (0.5 + 1e-9)).astype(np.uint8)
    curve[padded] = 0
    return curve, scaling


def fills_declared_range(values: np.ndarray, low: float, high: float) -> bool:
    """Whether `values` span at least a quarter of `low` .. `high`; below that fewer than 64 greys would remain."""
    return float(values.max() - values.min()) >= (high - low) / 4


def _between(values: np.ndarray, limits: tuple[int, int]) -> np.ndarray:
    return (values >= limits[0]) & (values <= limits[1])


def _constant(stored: np.ndarray, value: int) -> InvalidImage:
    return InvalidImage(f"picture is constant: all {stored.size} values are {value}; send an image with content")


def _percentiles(low: int, counts: np.ndarray) -> tuple[int, int]:
    """Stored values at 0.5 % and 99.5 %, as numpy.percentile(method="inverted_cdf") has them."""
    cumulated = counts.cumsum()
    ranks = np.ceil(np.array([0.005, 0.995]) * cumulated[-1])
    first, last = low + np.searchsorted(cumulated, np.maximum(ranks, 1))
    return int(first), int(last)


def _with_polarity(pixels: np.ndarray, flags: set[str]) -> tuple[str, ...]:
    """Add `polarity_suspect` where the picture's outer frame is bright and its inside is darker."""
    gray = pixels[::8, ::8] if pixels.ndim == 2 else pixels[::8, ::8, 1]
    rows, cols = (max(side // 25, 1) for side in gray.shape)
    inside = gray[rows:-rows, cols:-cols]
    if inside.size:
        frame = np.concatenate([gray[:rows].ravel(), gray[rows:, :cols].ravel(), gray[rows:, -cols:].ravel()])
        if np.median(frame) > 192 and np.median(frame) > np.median(inside) + 32:
            flags = flags | {"polarity_suspect"}
    return tuple(sorted(flags))


_CHUNK = 1 << 16  # pixels; numpy widens indices to 8 bytes each, a chunk at a time stays in the cache


def _histogram(stored: np.ndarray) -> tuple[int, np.ndarray]:
    """Smallest value, and the count of every value from it to the largest."""
    low, high = int(stored.min()), int(stored.max())
    if high - low > 65535:
        raise InvalidImage(f"stored values span {high - low + 1} codes, allowed 65536; send at most 16 bits a pixel")
    offset = min(low, 0)
    counts = np.zeros(high - offset + 1, np.int64)
    flat = stored.reshape(-1)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        counts += np.bincount(part if offset == 0 else part.astype(np.intp) - offset, minlength=len(counts))
    return low, counts[low - offset :]


def _apply(stored: np.ndarray, low: int, curve: np.ndarray) -> np.ndarray:
    """`curve[stored - low]`."""
    offset = min(low, 0)
    table = np.zeros(low - offset + len(curve), np.uint8)
    table[low - offset :] = curve
    flat = stored.reshape(-1)
    picture = np.empty(flat.size, np.uint8)
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.intp)
        np.take(table, part - offset if offset else part, out=picture[start : start + _CHUNK], mode="clip")
    return picture.reshape(stored.shape)
