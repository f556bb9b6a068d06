"""A radiograph as its file has it: stored pixel values, and what describes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cxr_triton.pixels.anatomy import Anatomy
from cxr_triton.pixels.transforms import LookupTable, Offered, Rescale, Window


@dataclass(frozen=True, eq=False)
class Metadata:
    """What describes the pixels, UIDs and date of the image; nothing in here names a person or a device.

    Attributes
    ----------
    format : str
        dicom, png or jpeg.
    rows, columns : int
    bits_stored : int
        Significant bits of a stored value: BitsStored, unless the flag `bits_stored_corrected` is set.
    signed : bool
        Pixel Representation 1.
    photometric : str
        MONOCHROME1 or MONOCHROME2; RGB for true-colour PNG and JPEG.
    transfer_syntax, transfer_syntax_name, sop_class, modality : str
        Empty for PNG and JPEG.
    modality_transform : Rescale, LookupTable or None
    voi : Window, LookupTable or None
        The first one; an unusable one is None.
    other_windows : tuple of Offered
        Further ones.
    padding : (int, int) or None
        Smallest and largest stored value that is padding.
    view : str
        PA, AP, frontal, lateral, oblique or unknown.
    patient_orientation : tuple of str
        Directions of rows and columns, empty if absent.
    laterality : str
        L, R, U, B or empty.
    sop_instance_uid, series_instance_uid, study_instance_uid : str
        Empty for PNG and JPEG, and where missing or malformed.
    study_date : str
        YYYY-MM-DD; empty for PNG and JPEG, and where missing or malformed.
    pixel_aspect_ratio : float
        Height of a pixel over its width; 1 where they differ by less than a hundredth.
    anatomy : Anatomy
        What the header says of the part of the body, in words of a closed list.
    """

    format: str
    rows: int
    columns: int
    bits_stored: int
    signed: bool = False
    photometric: str = "MONOCHROME2"
    transfer_syntax: str = ""
    transfer_syntax_name: str = ""
    sop_class: str = ""
    modality: str = ""
    modality_transform: Rescale | LookupTable | None = None
    voi: Window | LookupTable | None = None
    other_windows: tuple[Offered, ...] = ()
    padding: tuple[int, int] | None = None
    view: str = "unknown"
    patient_orientation: tuple[str, ...] = ()
    laterality: str = ""
    sop_instance_uid: str = ""
    series_instance_uid: str = ""
    study_instance_uid: str = ""
    study_date: str = ""
    pixel_aspect_ratio: float = 1.0
    anatomy: Anatomy = field(default_factory=Anatomy)


@dataclass(frozen=True, eq=False)
class Radiograph:
    """Stored pixel values and what describes them.

    Attributes
    ----------
    stored : ndarray (rows, columns) uint8, int8, uint16 or int16; or (rows, columns, 3) uint8
        Masked and sign-extended to BitsStored, before any modality or VOI transform.
    metadata : Metadata
    flags : tuple of str
        Sorted members of `cxr_triton.pixels.flags.FLAGS`.
    """

    stored: np.ndarray
    metadata: Metadata
    flags: tuple[str, ...] = ()
