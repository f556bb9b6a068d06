"""What one untrusted image may cost, and the refusal of one that would cost more."""

from __future__ import annotations

from dataclasses import dataclass

from cxr_triton.errors import InvalidImage, LimitExceeded


@dataclass(frozen=True)
class Limits:
    """What one image may cost.

    Attributes
    ----------
    max_pixels : int
        Rows times columns.
    max_file_bytes : int
        Size of the file, and of a deflated data set once inflated.
    memory_mib : int
        Address space of the process that decodes.
    time_s : float
        Wall-clock and processor time of decoding and preparing one image.
    """

    max_pixels: int = 64_000_000
    max_file_bytes: int = 64 * 1024**2
    memory_mib: int = 2048
    time_s: float = 20.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"Limits.{name} is {value}, has to be positive")

    def require_file(self, data: bytes) -> None:
        """Raise `LimitExceeded` for a file that is too large."""
        if len(data) > self.max_file_bytes:
            raise LimitExceeded(f"file has {len(data)} bytes, allowed {self.max_file_bytes}; send a smaller file")

    def require_size(self, height: int, width: int) -> None:
        """Raise `InvalidImage` for a picture without pixels and `LimitExceeded` for one of too many."""
        if not height or not width:
            raise InvalidImage(f"image has {height} rows and {width} columns; the file is damaged")
        if height * width > self.max_pixels:
            raise LimitExceeded(
                f"image has {height}x{width} = {height * width} pixels, allowed {self.max_pixels}; send a smaller one"
            )
