"""How much damage goes unnoticed, codec by codec: `python tests/damage.py [RADIOGRAPH.dcm ...]`.

Each picture is written in each lossless and lossy syntax and damaged in eight places of the middle of its stream. The
table has, of that many damaged files, how many were refused, flagged and read without a word, and what share of the
pixels of the last was wrong at most and in the median.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom

from cxr_triton.errors import InvalidImage
from cxr_triton.phantom import draw
from cxr_triton.phantom_file import LOSSY_BITS, SYNTAXES, store, write_dicom
from cxr_triton.pixels.dicom import read_image

PLACES = 8
DAMAGES = ("4 KiB zeroed", "4 KiB exchanged", "64 bytes zeroed", "1 bit flipped")
COMPRESSED = [name for name in SYNTAXES if name not in ("implicit", "explicit")]


def damaged(data: bytes, kind: str, rng: np.random.Generator, places: int = PLACES) -> Iterator[bytes]:
    """`data` with one damage each, between a tenth and nine tenths of it; a file it leaves as it was is not given."""
    for low, other in rng.uniform(0.1, 0.9, (places, 2)):
        at, source = (int(share * (len(data) - 4096)) for share in (low, other))
        broken = bytearray(data)
        if kind == "4 KiB zeroed":
            broken[at : at + 4096] = bytes(4096)
        elif kind == "4 KiB exchanged":
            broken[at : at + 4096] = data[source : source + 4096]
        elif kind == "64 bytes zeroed":
            broken[at : at + 64] = bytes(64)
        else:
            broken[at] ^= 1 << int(rng.integers(8))
        if broken != data:
            yield bytes(broken)


def outcome(data: bytes, whole: np.ndarray) -> tuple[str, float]:
    """refused, flagged or read, and the share of pixels that are wrong; identical pixels are no damage."""
    try:
        radiograph = read_image(data)
    except InvalidImage:
        return "refused", 0.0
    same = radiograph.stored.shape == whole.shape
    wrong = float((radiograph.stored != whole).mean()) if same else 1.0
    if not wrong:
        return "harmless", 0.0
    return ("flagged" if "damage_suspected" in radiograph.flags else "read"), wrong


def in_syntax(path: Path, syntax: str) -> bytes:
    """A radiograph in another syntax; a lossy one drops the bits that it cannot hold."""
    dataset = pydicom.dcmread(path)
    stored = dataset.pixel_array
    dropped = max(0, dataset.BitsStored - LOSSY_BITS.get(syntax, 16))
    if dropped or (syntax == "jpeg_extended" and dataset.BitsAllocated == 8):
        dataset.BitsStored = LOSSY_BITS[syntax]
        dataset.HighBit, dataset.BitsAllocated = dataset.BitsStored - 1, 8 if dataset.BitsStored == 8 else 16
    store(dataset, (stored >> dropped).astype(f"u{dataset.BitsAllocated // 8}"), syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def files(paths: list[Path], syntax: str) -> Iterator[bytes]:
    for seed in (1, 2):
        yield write_dicom(draw(np.random.default_rng(seed)), syntax=syntax, seed=f"damage {seed}")
    for path in paths:
        yield in_syntax(path, syntax)


def main(paths: list[Path]) -> None:
    print("| codec | damage | files | refused | flagged | read | most wrong | median wrong |")
    print("|---|---|---|---|---|---|---|---|")
    for syntax in COMPRESSED:
        results: dict[str, list[tuple[str, float]]] = {kind: [] for kind in DAMAGES}
        for number, data in enumerate(files(paths, syntax)):
            whole = read_image(data)
            if "damage_suspected" in whole.flags:
                print(f"| {syntax} | **none, and flagged** | | | | | | |")
            for kind in DAMAGES:
                rng = np.random.default_rng([number, DAMAGES.index(kind)])
                results[kind] += [outcome(broken, whole.stored) for broken in damaged(data, kind, rng)]
        for kind, found in results.items():
            found = [result for result in found if result[0] != "harmless"]
            names = [name for name, _ in found]
            wrong = [share for name, share in found if name == "read"] or [0.0]
            counts = " | ".join(str(names.count(name)) for name in ("refused", "flagged", "read"))
            print(
                f"| {syntax} | {kind} | {len(found)} | {counts} | {max(wrong):.2%} | {np.median(wrong):.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
