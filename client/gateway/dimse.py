"""SOP classes, transfer syntaxes and status codes of PS3.4 and PS3.7 that the gateway speaks."""

from __future__ import annotations

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian

VERIFICATION = UID("1.2.840.10008.1.1")
PUSH_MODEL = UID("1.2.840.10008.1.20.1")
PUSH_MODEL_INSTANCE = UID("1.2.840.10008.1.20.1.1")
STUDY_ROOT_FIND = UID("1.2.840.10008.5.1.4.1.2.2.1")
STUDY_ROOT_GET = UID("1.2.840.10008.5.1.4.1.2.2.3")
UNCOMPRESSED = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]

SUCCESS, OUT_OF_RESOURCES, WRONG_CLASS, CANNOT_UNDERSTAND, PROCESSING_FAILURE = 0x0000, 0xA700, 0xA900, 0xC000, 0x0110
PENDING = (0xFF00, 0xFF01)
STORED = (SUCCESS, 0xB000, 0xB006, 0xB007, 0x0111)
"""Success, the three warnings of PS3.4 B.2.3, and a duplicate SOP instance: it is there."""


def is_permanent(status: int) -> bool:
    """A C-STORE status, or a STOW-RS failure reason, that the same bytes will always get (PS3.4 B.2.3, PS3.7 C)."""
    return (
        status in (0x0106, 0x0112, 0x0115, 0x0117, 0x0118, 0x0119, 0x0122) or status >> 12 == 0xC or status >> 8 == 0xA9
    )
