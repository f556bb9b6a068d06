"""Which images a reading is of: what the server records of each, and the check of whoever puts both together.

READING has it in ``images[i]["identity"]``: ``file_sha256`` of the file's bytes and ``pixels_sha256`` (see
`pixels_digest`); of a DICOM file also ``study_instance_uid``, ``series_instance_uid`` and ``sop_instance_uid``, with
``identifiers``: ``plain``, or ``hashed`` where the SHA-256 of each UID's ASCII text stands in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cxr_triton.errors import ReadingMismatch

if TYPE_CHECKING:
    from cxr_triton.pixels.radiograph import Radiograph

IDENTIFIERS = ("plain", "hashed")
UIDS = {
    "study_instance_uid": "Study Instance UID",
    "series_instance_uid": "Series Instance UID",
    "sop_instance_uid": "SOP Instance UID",
}


def pixels_digest(stored: np.ndarray) -> str:
    """SHA-256 of decoded stored values, the same for every transfer syntax that keeps them.

    Parameters
    ----------
    stored : (rows, columns) uint8, int8, uint16 or int16 array; or (rows, columns, 3) uint8
        As `cxr_triton.pixels.dicom.read_image` gives them: before any modality or VOI transform.

    Returns
    -------
    str
        Of one ASCII line and the values after it. The line is the type as NumPy writes it (``|u1``, ``|i1``, ``<u2`` or
        ``<i2``), the shape, and a line feed, with single spaces: ``<u2 2048 2500``. The values stand row by row, 16-bit
        ones in little-endian order.
    """
    values = np.ascontiguousarray(stored, stored.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{values.dtype.str} {' '.join(map(str, values.shape))}\n".encode())
    digest.update(values.data)
    return digest.hexdigest()


def identity_of(data: bytes, radiograph: Radiograph) -> dict[str, str]:
    """The identity of a file and of what `cxr_triton.pixels.dicom.read_image` read in it; its UIDs are plain."""
    uids = {key: uid for key in UIDS if (uid := getattr(radiograph.metadata, key))}
    digests = {"file_sha256": sha256(data), "pixels_sha256": pixels_digest(radiograph.stored)}
    return {**digests, **uids, **({"identifiers": "plain"} if uids else {})}


def hashed(identity: Mapping[str, str]) -> dict[str, str]:
    """A plain identity with the SHA-256 of each UID in its place."""
    named = {key: sha256(value.encode()) for key, value in identity.items() if key in UIDS}
    return {**identity, **named, **({"identifiers": "hashed"} if named else {})}


def sha256(data: bytes) -> str:
    """Digest of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def require_same_images(
    images: Sequence[Mapping[str, Any]],
    given: Sequence[Mapping[str, str]],
    *,
    names: Sequence[str],
    reading: str = "the reading",
    unchecked_reading: bool = False,
) -> list[str]:
    """Refuse a reading of other images than those given, or of the same ones in another order.

    UIDs have to agree where both sides have them. Beyond that, stored pixels decide where they are given, so that a
    file in another lossless transfer syntax or with a corrected header is the same image; else the file's bytes decide.
    Of a lossy file the same bytes are enough: its decoders differ between machines in the last bit.

    Parameters
    ----------
    images : sequence of dict
        `Reading.images`.
    given : sequence of dict
        Plain identities; of each, the keys that the caller knows.
    names : sequence of str
        What messages call each of `given`.
    reading : str
        What messages call the reading.
    unchecked_reading : bool
        Take a reading without identities, which servers before them wrote. One of other images is refused all the same.

    Returns
    -------
    list of str
        Names of files that are the same images in other bytes.

    Raises
    ------
    ReadingMismatch
        Names the file, and the UID or digest that differs.
    """
    if len(images) != len(given):
        raise ReadingMismatch(
            f"{reading} is of {len(images)} images, {len(given)} were given; "
            "give the files that were read, in their order"
        )
    recorded = [facts.get("identity") for facts in images]
    for number, identity in enumerate(recorded, 1):
        if not isinstance(identity, dict) and not (identity is None and unchecked_reading):
            raise ReadingMismatch(
                f"{reading} does not say which image it is of (images[{number - 1}].identity): nothing tells it from "
                "another patient's; read the files again with a server of this release, or set unchecked_reading "
                "(--unchecked-reading) if you know that it is of these files"
            )
    differing = []
    for i, (mine, name) in enumerate(zip(given, names, strict=True)):
        identity = recorded[i]
        if identity is None:
            continue
        if fault := _difference(mine, images[i]):
            for j, facts in enumerate(images):
                if recorded[j] is not None and not _difference(mine, facts):
                    fault = f"it is image {j + 1} of that reading and was given as image {i + 1}"
                    break
            raise ReadingMismatch(
                f"{name} is not image {i + 1} of {len(images)} of {reading}: {fault}; "
                "give the files that were read, in their order"
            )
        if "file_sha256" in mine and mine["file_sha256"] != identity.get("file_sha256"):
            differing.append(name)
    return differing


def _difference(given: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """What tells an image from the one that was read; empty if nothing does."""
    recorded = facts["identity"]
    known = [key for key in UIDS if key in given and key in recorded]
    is_hashed = recorded.get("identifiers") == "hashed"
    for key in known:
        uid = sha256(given[key].encode()) if is_hashed else given[key]
        if uid != recorded[key]:
            return _unlike(f"SHA-256 of its {UIDS[key]}" if is_hashed else f"its {UIDS[key]}", uid, recorded[key])
    file, pixels = given.get("file_sha256"), given.get("pixels_sha256")
    is_same_file = file == recorded.get("file_sha256")
    if pixels:
        if pixels != recorded.get("pixels_sha256") and not (is_same_file and "lossy" in facts.get("flags", ())):
            return _unlike("SHA-256 of its stored pixels", pixels, recorded.get("pixels_sha256"))
    elif file and not is_same_file:
        return _unlike("SHA-256 of the file", file, recorded.get("file_sha256"))
    elif not file and not known:
        return "the image that was read has no UIDs"
    return ""


def _unlike(what: str, given: str, recorded: object) -> str:
    return f"{what} is {given}, that of the image that was read {str(recorded)[:64]!r}"
