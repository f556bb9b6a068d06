"""One image of an archive, as a source names it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes
    ----------
    name : str
        What the source calls it: its path as the source has it, or its SOP Instance UID. The same item always has the
        same name.
    place : str
        Absolute path, or the path below the DICOMweb root.
    uids : dict of str to str
        Of `cxr_triton.identity.UIDS`, those that the source says.
    """

    name: str
    place: str
    uids: dict[str, str] = field(default_factory=dict)
