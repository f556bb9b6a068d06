"""What a header says of the part of the body and the view.

Its codes and free texts become words of a closed list, so that no text leaves the reader of the file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

EXTENT_MM = (50.0, 700.0)
"""Longer side of a chest on the detector: above a dental film, below a stitched leg or spine."""


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Whole words without accents, in the languages of the headers that were seen. Missing on purpose: "face" (French for a
# frontal view), "main" (French for a hand), "arm" (C-arm), "thoracic" (the spine's word too).
_CHEST = _listed(
    """
    chest thorax torax torace cxr lung lungs rib ribs heart mediastinum sternum bronchus trachea pleura lunge lungen
    rippen brustkorb longen borstkas lungor brostkorg keuhkot rintakeha poumon poumons cotes pulmon pulmones
    costillas pulmao pulmoes costelas polmone polmoni coste klatka klatki pluca hrudnik hrudni mellkas akciger gogus
    """
)
_CHEST_STARTS = ("chest", "thorax", "torax")
_ELSEWHERE = _listed(
    """
    abdomen abdominal abdome addome kub bauch ventre colon stomach bladder uterus kidney kidneys breast mammography
    pelvis pelvic bassin bacino bacia becken hip hips hanche anca cadera quadril hufte knee knees genou ginocchio
    rodilla joelho knie patella leg legs tibia fibula tibfib femur thigh calf ankle ankles cheville caviglia tobillo
    tornozelo foot feet pied piede calcaneus heel toe toes hand hands hande mano mao wrist wrists poignet polso
    muneca punho finger fingers thumb forearm radius ulna elbow elbows coude gomito codo cotovelo ellenbogen humerus
    extremity extremities limb limbs shoulder shoulders epaule spalla hombro ombro clavicle clavicula scapula spine
    spinal cspine tspine lspine sspine lsspine ctspine tlspine rachis colonne columna coluna colonna cervical lumbar
    lumbosacral sacrum coccyx lws bws hws skull crane cranio craneo head neck sinus sinuses mandible maxilla jaw
    orbit orbits facial nasal zygoma mastoid tmj tooth teeth dental zahn zahne panoramic orthopan orthopantomogram
    """
)
_ELSEWHERE_STARTS = (
    "knie",
    "schulter",
    "becken",
    "wirbel",
    "schadel",
    "huftgelenk",
    "handgelenk",
    "sprunggelenk",
    "fuss",
)
_ELSEWHERE_CODED = _listed("arm face eye nose ear")  # in a description too often something else
_BOTH = _listed("chestabdomen chestabdpelvis neckchest neckchestabdomen neckchestabdpelv")
# SNOMED CT, and the SNOMED RT codes that older files have, of PS3.16 CID 4031 and what lies in the chest
_CHEST_CODES = _listed(
    """
    816094009 51185008 T-D3000 39607008 T-28000 86598002 T-280A0 3341006 44029006 80891009 T-32000 113197003 T-11300
    56873002 T-11210 72410000 T-D3300 3120008 T-29000 955009 T-26000 44567001 T-25000
    """
)
_BOTH_CODES = _listed("416550000 R-FAB55 416775004 R-FAB56 417437006 R-FAB52 416152001 R-FAB53 416319003 R-FAB54")
_SILENT_CODES = _listed("706342009 R-FE0C7 38266002 T-D0010 22943007 T-D2000")  # phantom, whole body, trunk
_SNOMED = _listed("SCT SRT SNM3 99SDM")
_LATERAL = _listed("lateral lat ll rl laterale seitlich profil perfil profilo")
_FRONTAL = _listed("pa ap frontal frontale dv vd decubitus decub")


class Code(NamedTuple):
    """An item of a code sequence: Code Value, Coding Scheme Designator, Code Meaning."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Anatomy:
    """What a header says of the part of the body.

    Attributes
    ----------
    says : str
        ``chest``; ``elsewhere``: Body Part Examined or Anatomic Region is another part; ``described``: only
        descriptions name another part; ``conflict``: chest and another part are named; ``silent``.
    named : str
        The word or code of another part, empty without one.
    extent_mm : float or None
        Longer side on the detector.
    """

    says: str = "silent"
    named: str = ""
    extent_mm: float | None = None

    @property
    def has_extent_of_chest(self) -> bool:
        """Whether the extent is unknown or within `EXTENT_MM`."""
        return self.extent_mm is None or EXTENT_MM[0] <= self.extent_mm <= EXTENT_MM[1]


def weigh(
    *, body_part: str, regions: Sequence[Code], descriptions: Sequence[str], extent_mm: float | None = None
) -> Anatomy:
    """Weigh the statements of a header.

    Parameters
    ----------
    body_part : str
        Body Part Examined.
    regions : sequence of Code
        Anatomic Region Sequence.
    descriptions : sequence of str
        Study, series, protocol and procedure descriptions, and the meanings of procedure codes.
    extent_mm : float, optional
        Rows or Columns, whichever is longer, times the spacing of pixels on the detector.
    """
    chest, other = _parts(words(body_part), coded=True)
    for code in regions:
        in_chest, elsewhere = _region(code)
        chest, other = chest or in_chest, other or elsewhere
    described = [_parts(words(text)) for text in descriptions]
    chest_described = any(found for found, _ in described)
    other_described = next((found for _, found in described if found), "")
    if chest and other:
        says = "conflict"
    elif chest:
        says = "conflict" if other_described and not chest_described else "chest"
    elif other:
        says = "conflict" if chest_described else "elsewhere"
    elif chest_described:
        says = "conflict" if other_described else "chest"
    else:
        says = "described" if other_described else "silent"
    return Anatomy(says, other or other_described, extent_mm)


def view_of(descriptions: Iterable[str]) -> str:
    """``lateral`` where the first description that names a view names no other; else empty."""
    for text in descriptions:
        found = set(words(text))
        if found & _FRONTAL:
            return ""
        if found & _LATERAL:
            return "lateral"
    return ""


def words(text: str) -> list[str]:
    """Words in lower case without accents; digits and punctuation part them."""
    plain = unicodedata.normalize("NFKD", text.replace("ß", "ss").casefold())
    return re.findall(r"[a-z]+", "".join(c for c in plain if not unicodedata.combining(c)))


def _parts(found: Iterable[str], coded: bool = False) -> tuple[bool, str]:
    """Whether words name the chest, and the first that names another part."""
    chest, other = False, ""
    for word in found:
        elsewhere = word in _ELSEWHERE or word.startswith(_ELSEWHERE_STARTS) or (coded and word in _ELSEWHERE_CODED)
        if word in _BOTH:
            chest, other = True, other or word
        elif elsewhere:
            other = other or word
        elif word in _CHEST or word.startswith(_CHEST_STARTS):
            chest = True
    return chest, other


def _region(code: Code) -> tuple[bool, str]:
    chest, other = _parts(words(code.meaning), coded=True)
    if code.value in _BOTH_CODES:
        return True, other or code.value
    if chest or code.value in _CHEST_CODES:
        return True, other
    is_snomed = code.scheme in _SNOMED and re.fullmatch(r"\d{6,18}|[A-Z]-[0-9A-F]{5}", code.value)
    if not other and is_snomed and code.value not in _SILENT_CODES:
        other = code.value
    return False, other
