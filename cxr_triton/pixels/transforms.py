"""Modality and VOI transforms of a DICOM image (PS3.3 C.11.1, C.11.2); each is called with an array of input values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

VoiFunction = Literal["LINEAR", "LINEAR_EXACT", "SIGMOID"]
VOI_FUNCTIONS: tuple[VoiFunction, ...] = get_args(VoiFunction)


class Offered(NamedTuple):
    """A VOI transform that a file offers.

    Attributes
    ----------
    kind : str
        window or lut.
    number : int
        Its place among those of its kind in the file, from 1 on.
    words : str
        What the file calls it, printable ASCII; empty where it says nothing that is surely of this one.
    transform : Window or LookupTable
    """

    kind: str
    number: int
    words: str
    transform: Window | LookupTable


@dataclass(frozen=True)
class Rescale:
    """Linear modality transform ``slope * stored + intercept`` (PS3.3 C.11.1.1.2)."""

    slope: float = 1.0
    intercept: float = 0.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Modality values of stored ones, float64."""
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
        """Entries of input values of any number type, float64."""
        index = np.clip(np.rint(values) - self.first, 0, len(self.entries) - 1).astype(np.intp)
        return self.entries[index].astype(np.float64)

    @property
    def output_range(self) -> tuple[float, float]:
        """Smallest and largest value that the declared bits allow."""
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
        """Greys of modality values, float64 from 0 to 1."""
        if self.function == "SIGMOID":
            # the clip keeps exp() finite and changes nothing in 8 bits
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.center) / self.width, -700, 700)))
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.center) / self.width + 0.5, 0, 1)
        if self.width == 1:
            return (values > self.center - 0.5).astype(np.float64)
        return np.clip((values - (self.center - 0.5)) / (self.width - 1) + 0.5, 0, 1)


def declared_range(
    bits_stored: int, signed: bool, modality: Rescale | LookupTable | None = None
) -> tuple[float, float]:
    """Smallest and largest value that the header allows after the modality transform."""
    if isinstance(modality, LookupTable):
        return modality.output_range
    low, high = (-(2 ** (bits_stored - 1)), 2 ** (bits_stored - 1) - 1) if signed else (0, 2**bits_stored - 1)
    ends = (modality or Rescale())(np.array([low, high], np.float64))
    return float(ends.min()), float(ends.max())
