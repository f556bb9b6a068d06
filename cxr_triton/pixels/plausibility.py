"""Whether an image is a chest radiograph: what its header says of the body, and what its picture looks like.

`anatomy` turns the header's codes and free texts into words of a closed list, so that no text leaves the reader of the
file; `judge` weighs them against the picture. Neither recognises a disease, a person or a part of the body.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cxr_triton.pixels.image import resize

VIEWS = ("frontal", "lateral", "oblique")
POLICIES = ("refuse", "flag")
DOUBTS: dict[str, str] = {
    "not_a_chest": "no chest radiograph, read because the profile allows it",
    "region_conflict": "the header names the chest and another part of the body",
    "region_described_elsewhere": "a description in the header names another part of the body, and none the chest",
    "extent_suspect": "the file's size in millimetres is none of a chest",
    "picture_unlike_chest": "the picture does not look like a chest radiograph",
    "view_untrained": "a view that the profile's model was not trained on",
}
"""Flags of an image that may be no chest; a part of `cxr_triton.pixels.dicom.FLAGS` and `DOUBTFUL`."""

EXTENT_MM = (50.0, 700.0)
"""Longer side of a chest on the detector: above a dental film, below a stitched leg or spine."""
MIN_CHEST = 0.40
"""Least `Likeness.chest` where the header names no part of the body."""
MIN_BASES = 0.20
"""Least correlation of the columns under the lungs' middle, which grow brighter downwards."""
MIN_LUNGS_NAMED = 0.20
"""Least `Likeness.lungs` where the header names the chest: white lungs and inverted pictures are still over it."""
MAX_FLAT, MAX_FLAT_SILENT = 0.90, 0.40
"""Largest share of one grey in a picture, and in one whose header names no part of the body."""
MIN_SMOOTHNESS = 0.5
"""Least correlation of neighbouring pixels: noise has 0, every radiograph seen over 0.85."""
MAX_COLOURED, MAX_COLOURED_SILENT = 0.20, 0.02
"""Largest share of coloured pixels, as a photo has them, and as a marker or a tint has them."""


# -------------------------------------------------------------------------------------------------------------- header

# Whole words without accents, in the languages of the headers that were seen. Missing on purpose: "face" (French for a
# frontal view), "main" (French for a hand), "arm" (C-arm), "thoracic" (the spine's word too).
_CHEST = frozenset(
    [
        "chest",
        "thorax",
        "torax",
        "torace",
        "cxr",
        "lung",
        "lungs",
        "rib",
        "ribs",
        "heart",
        "mediastinum",
        "sternum",
        "bronchus",
        "trachea",
        "pleura",
        "lunge",
        "lungen",
        "rippen",
        "brustkorb",
        "longen",
        "borstkas",
        "lungor",
        "brostkorg",
        "keuhkot",
        "rintakeha",
        "poumon",
        "poumons",
        "cotes",
        "pulmon",
        "pulmones",
        "costillas",
        "pulmao",
        "pulmoes",
        "costelas",
        "polmone",
        "polmoni",
        "coste",
        "klatka",
        "klatki",
        "pluca",
        "hrudnik",
        "hrudni",
        "mellkas",
        "akciger",
        "gogus",
    ]
)
_CHEST_STARTS = ("chest", "thorax", "torax")
_ELSEWHERE = frozenset(
    [
        "abdomen",
        "abdominal",
        "abdome",
        "addome",
        "kub",
        "bauch",
        "ventre",
        "colon",
        "stomach",
        "bladder",
        "uterus",
        "kidney",
        "kidneys",
        "breast",
        "mammography",
        "pelvis",
        "pelvic",
        "bassin",
        "bacino",
        "bacia",
        "becken",
        "hip",
        "hips",
        "hanche",
        "anca",
        "cadera",
        "quadril",
        "hufte",
        "knee",
        "knees",
        "genou",
        "ginocchio",
        "rodilla",
        "joelho",
        "knie",
        "patella",
        "leg",
        "legs",
        "tibia",
        "fibula",
        "tibfib",
        "femur",
        "thigh",
        "calf",
        "ankle",
        "ankles",
        "cheville",
        "caviglia",
        "tobillo",
        "tornozelo",
        "foot",
        "feet",
        "pied",
        "piede",
        "calcaneus",
        "heel",
        "toe",
        "toes",
        "hand",
        "hands",
        "hande",
        "mano",
        "mao",
        "wrist",
        "wrists",
        "poignet",
        "polso",
        "muneca",
        "punho",
        "finger",
        "fingers",
        "thumb",
        "forearm",
        "radius",
        "ulna",
        "elbow",
        "elbows",
        "coude",
        "gomito",
        "codo",
        "cotovelo",
        "ellenbogen",
        "humerus",
        "extremity",
        "extremities",
        "limb",
        "limbs",
        "shoulder",
        "shoulders",
        "epaule",
        "spalla",
        "hombro",
        "ombro",
        "clavicle",
        "clavicula",
        "scapula",
        "spine",
        "spinal",
        "cspine",
        "tspine",
        "lspine",
        "sspine",
        "lsspine",
        "ctspine",
        "tlspine",
        "rachis",
        "colonne",
        "columna",
        "coluna",
        "colonna",
        "cervical",
        "lumbar",
        "lumbosacral",
        "sacrum",
        "coccyx",
        "lws",
        "bws",
        "hws",
        "skull",
        "crane",
        "cranio",
        "craneo",
        "head",
        "neck",
        "sinus",
        "sinuses",
        "mandible",
        "maxilla",
        "jaw",
        "orbit",
        "orbits",
        "facial",
        "nasal",
        "zygoma",
        "mastoid",
        "tmj",
        "tooth",
        "teeth",
        "dental",
        "zahn",
        "zahne",
        "panoramic",
        "orthopan",
        "orthopantomogram",
    ]
)
_ELSEWHERE_STARTS = tuple(
    ["knie", "schulter", "becken", "wirbel", "schadel", "huftgelenk", "handgelenk", "sprunggelenk", "fuss"]
)
_ELSEWHERE_CODED = frozenset(["arm", "face", "eye", "nose", "ear"])  # in a description too often something else
_BOTH = frozenset(["chestabdomen", "chestabdpelvis", "neckchest", "neckchestabdomen", "neckchestabdpelv"])
# SNOMED CT, and the SNOMED RT codes that older files have, of PS3.16 CID 4031 and what lies in the chest
_CHEST_CODES = frozenset(
    [
        "816094009",
        "51185008",
        "T-D3000",
        "39607008",
        "T-28000",
        "86598002",
        "T-280A0",
        "3341006",
        "44029006",
        "80891009",
        "T-32000",
        "113197003",
        "T-11300",
        "56873002",
        "T-11210",
        "72410000",
        "T-D3300",
        "3120008",
        "T-29000",
        "955009",
        "T-26000",
        "44567001",
        "T-25000",
    ]
)
_BOTH_CODES = frozenset(
    [
        "416550000",
        "R-FAB55",
        "416775004",
        "R-FAB56",
        "417437006",
        "R-FAB52",
        "416152001",
        "R-FAB53",
        "416319003",
        "R-FAB54",
    ]
)
_SILENT_CODES = frozenset(
    ["706342009", "R-FE0C7", "38266002", "T-D0010", "22943007", "T-D2000"]
)  # phantom, whole body, trunk
_SNOMED = frozenset(["SCT", "SRT", "SNM3", "99SDM"])
_LATERAL = frozenset(["lateral", "lat", "ll", "rl", "laterale", "seitlich", "profil", "perfil", "profilo"])
_FRONTAL = frozenset(["pa", "ap", "frontal", "frontale", "dv", "vd", "decubitus", "decub"])


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
        return self.extent_mm is None or EXTENT_MM[0] <= self.extent_mm <= EXTENT_MM[1]


def anatomy(
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


# ------------------------------------------------------------------------------------------------------------- picture


class Likeness(NamedTuple):
    """How much a picture looks like a frontal chest, -1 to 1.

    Attributes
    ----------
    lungs : float
        Correlation with two dark upright ellipses beside a bright middle: the mean of the whole pair's and of the worse
        half's, at the best place and size.
    chest : float
        The same with the place's correlation with its mirror image as a third part, in places of at least three
        quarters of the picture a side that are brighter under the lungs. It tells more from a chest, limbs above all,
        and takes more chests with a white lung for something else.
    """

    lungs: float
    chest: float


def likeness(picture: np.ndarray) -> Likeness:
    """Compare a picture, reduced to 32 x 32 ranks of grey, with the proportions of a chest; nothing is learnt.

    What lies beyond the body's wall has no weight.

    Parameters
    ----------
    picture : uint8 [rows, cols] or [rows, cols, 3]
        Upright and bright where dense.
    """
    small = resize(_sample(_gray(picture)), (_SIDE, _SIDE)).ravel()
    # equal greys share a rank, so that a flat area has no pattern
    ranks = np.searchsorted(np.sort(small), small, "left") + np.searchsorted(np.sort(small), small, "right")
    ranks = ranks.reshape(_SIDE, _SIDE).astype(np.float64)
    lungs = chest = -1.0
    for parts, (height, width) in _templates():
        places = np.lib.stride_tricks.sliding_window_view(ranks, (height, width))[::2, ::2]
        places = places.reshape(-1, height * width)
        left, right, both, bases = (_correlations(places, *part) for part in parts)
        pair = (np.minimum(left, right) + both) / 2
        lungs = max(lungs, float(pair.max()))
        if min(height, width) >= 0.75 * _SIDE:
            found = np.where(bases > MIN_BASES, (2 * pair + _symmetry(places, width)) / 3, -1.0)
            chest = max(chest, float(found.max()))
    return Likeness(lungs, chest)


def flatness(picture: np.ndarray) -> float:
    """Largest share of one grey."""
    sample = _sample(_gray(picture))
    return float(np.bincount(sample.ravel()).max() / sample.size)


def smoothness(picture: np.ndarray) -> float:
    """Correlation of neighbouring pixels, in rows or columns, whichever is less; 1 for a constant."""
    gray = _gray(picture)
    rows = gray[:: max(1, gray.shape[0] // _LINES)]
    columns = gray[:, :: max(1, gray.shape[1] // _LINES)].T
    return min(_neighbours(rows), _neighbours(columns))


def coloured(picture: np.ndarray) -> float:
    """Share of pixels whose channels differ by over 48 of 255."""
    if picture.ndim == 2:
        return 0.0
    sample = _sample(picture)
    return float((np.ptp(sample, axis=2) > 48).mean())


_LINES = 32
_SIDE = 32
_SIZES = (20, 24, 28, 32)


@functools.cache
def _templates() -> tuple:
    """Left half, right half, whole and lung bases of the template in each size: indices, and unit-norm weights."""
    made = []
    for height in _SIZES:
        for width in _SIZES:
            y = (np.arange(height)[:, None] + 0.5) / height
            x = (np.arange(width)[None, :] + 0.5) / width
            lungs = [((x - center) / 0.15) ** 2 + ((y - 0.47) / 0.36) ** 2 for center in (0.27, 0.73)]
            radius = np.minimum(*lungs)
            dense = 1 / (1 + np.exp(-4 * (radius - 1)))
            inside = (radius < 2.2) | (np.abs(x - 0.5) < 0.23)
            bases = (np.abs(np.abs(x - 0.5) - 0.23) < 0.1) & (y > 0.3)
            parts = (inside & (x < 0.5), inside & (x > 0.5), inside, bases)
            made.append((tuple(_unit(dense, part) for part in parts), (height, width)))
    return tuple(made)


def _unit(values: np.ndarray, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = values[part] - values[part].mean()
    return np.flatnonzero(part), chosen / np.linalg.norm(chosen)


def _correlations(places: np.ndarray, index: np.ndarray, weights: np.ndarray) -> np.ndarray:
    chosen = places[:, index]
    norms = np.sqrt(chosen.var(axis=1) * chosen.shape[1])
    # no matrix product: BLAS takes address space, which the process that decodes has little of
    return np.einsum("pk,k->p", chosen, weights) / np.maximum(norms, 1e-9)


def _symmetry(places: np.ndarray, width: int) -> np.ndarray:
    """Correlation of each place with its mirror image."""
    centered = places - places.mean(axis=1, keepdims=True)
    mirrored = centered.reshape(len(places), -1, width)[:, :, ::-1].reshape(centered.shape)
    return (centered * mirrored).sum(axis=1) / np.maximum((centered**2).sum(axis=1), 1e-9)


def _neighbours(lines: np.ndarray) -> float:
    if lines.shape[1] < 3:
        return 1.0
    values = lines.astype(np.float64)
    before, after = values[:, :-1].ravel(), values[:, 1:].ravel()
    deviation = before.std() * after.std()
    return float(((before - before.mean()) * (after - after.mean())).mean() / deviation) if deviation else 1.0


def _gray(picture: np.ndarray) -> np.ndarray:
    return picture if picture.ndim == 2 else picture.mean(axis=2).astype(np.uint8)


def _sample(picture: np.ndarray) -> np.ndarray:
    step = max(1, min(picture.shape[:2]) // 512)
    return picture[::step, ::step]


# ------------------------------------------------------------------------------------------------------------ judgement


@dataclass(frozen=True)
class Judgement:
    """What header and picture together say.

    Attributes
    ----------
    refusal : str
        Why it is no chest, as a clause; empty when it may be one.
    doubts : tuple of str
        Keys of `DOUBTS`, sorted; none where it is taken for a chest.
    likeness : Likeness or None
        None for lateral and oblique views.
    """

    refusal: str
    doubts: tuple[str, ...]
    likeness: Likeness | None


def judge(found: Anatomy, view: str, picture: np.ndarray, views: Sequence[str] = VIEWS) -> Judgement:
    """Whether an image is a chest radiograph of a view that a model knows.

    Parameters
    ----------
    found : Anatomy
    view : str
        As in `cxr_triton.pixels.dicom.Metadata`.
    picture : uint8 [rows, cols] or [rows, cols, 3]
        As displayed, see `cxr_triton.pixels.display.render`.
    views : sequence of str
        Members of `VIEWS` that the model was trained on.
    """
    kind = view if view in ("lateral", "oblique", "unknown") else "frontal"
    gray = _gray(picture)
    flat, colour = flatness(gray), coloured(picture)
    measured = None if kind in ("lateral", "oblique") else likeness(gray)
    is_named, doubts = found.says == "chest", set()
    refusal = _impossible(flat, colour, smoothness(gray))
    if is_named:
        unlike = measured is not None and measured.lungs < MIN_LUNGS_NAMED
    else:
        # a side view has no measure, so without the header's word it stays a doubt
        unlike = measured is None or measured.chest < MIN_CHEST
        unlike = unlike or flat > MAX_FLAT_SILENT or colour > MAX_COLOURED_SILENT
    if found.says == "elsewhere":
        refusal = f"the header names {found.named.upper()} as the part of the body"
    elif not found.has_extent_of_chest and not is_named:
        refusal = refusal or (
            f"its longer side is {found.extent_mm:.0f} mm, that of a chest {EXTENT_MM[0]:.0f} to {EXTENT_MM[1]:.0f} mm"
        )
    elif found.says == "described" and unlike:
        refusal = refusal or f"a description names {found.named.upper()} and the picture does not look like a chest"
    if not found.has_extent_of_chest:
        doubts.add("extent_suspect")
    if found.says == "conflict":
        doubts.add("region_conflict")
    if found.says == "described":
        doubts.add("region_described_elsewhere")
    if unlike:
        doubts.add("picture_unlike_chest")
    if kind != "unknown" and kind not in views:
        doubts.add("view_untrained")
    return Judgement(refusal, tuple(sorted(doubts)), measured)


def _impossible(flat: float, colour: float, smooth: float) -> str:
    """Why a picture can be no radiograph whatever its header says; empty when it can."""
    if colour > MAX_COLOURED:
        return f"{colour:.0%} of the picture is coloured, allowed {MAX_COLOURED:.0%}"
    if flat > MAX_FLAT:
        return f"{flat:.0%} of the picture is one grey, allowed {MAX_FLAT:.0%}"
    if smooth < MIN_SMOOTHNESS:
        return f"the picture is noise: neighbouring pixels correlate by {smooth:.2f}, at least {MIN_SMOOTHNESS:g}"
    return ""
