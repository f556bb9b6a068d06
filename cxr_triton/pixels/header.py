"""What a DICOM header says of an image besides its pixels' layout: its transforms, shape, view, part of the body.

Each function takes the data set, and adds to `flags` what a reader has to know (`cxr_triton.pixels.flags`).
"""

from __future__ import annotations

import datetime
import math
import re

import numpy as np

from cxr_triton.errors import HeaderMismatch
from cxr_triton.pixels.anatomy import Anatomy, Code, view_of, weigh
from cxr_triton.pixels.elements import DataSet, Tag
from cxr_triton.pixels.transforms import VOI_FUNCTIONS, LookupTable, Offered, Rescale, VoiFunction, Window

MOST_WINDOWS, MOST_WORDS = 8, 32
_UID = re.compile(r"[0-9][0-9.]{0,63}")


def is_uid(text: str) -> bool:
    """Whether a text has a UID's characters and length."""
    return _UID.fullmatch(text) is not None


def uid(dataset: DataSet, tag: Tag) -> str:
    """Value of a UI element; empty where it is missing or malformed."""
    value = dataset.first(tag)
    return value if is_uid(value) else ""


def date(dataset: DataSet, tag: Tag) -> str:
    """YYYY-MM-DD of a DA element; empty where it is missing, malformed or no day of the calendar."""
    text = dataset.first(tag)
    try:
        return datetime.date.fromisoformat(text).isoformat() if re.fullmatch("[0-9]{8}", text) else ""
    except ValueError:
        return ""


# of View Position and View Code Sequence: SNOMED CT, and the older SNOMED RT codes of CID 4010
_VIEWS = {
    "PA": "PA 272479007 R-40888 R-10214",
    "AP": "AP 399348003 R-10206",
    "frontal": "LLD RLD 399033003",  # decubitus positions are frontal projections
    "lateral": "LL RL LAT LATERAL 399067008 R-102CD 399173006 R-10236 399198007 R-10232",
    "oblique": "LLO RLO LAO RAO LPO RPO 399182000 399059000 399312000",
}
_VIEW_WORDS = {word: view for view, words in _VIEWS.items() for word in words.split()}


_PIXEL_SHAPES = (
    Tag.PIXEL_SPACING,
    Tag.IMAGER_PIXEL_SPACING,
    Tag.NOMINAL_SCANNED_PIXEL_SPACING,
    Tag.PIXEL_ASPECT_RATIO,
)
_MAX_PIXEL_ASPECT_RATIO = 5
_SQUARE = 0.01  # spacings are rounded


def pixel_aspect_ratio(dataset: DataSet, flags: set[str]) -> float:
    """Height of a pixel over its width, by the first element that tells it; all of them are (vertical, horizontal)."""
    ratios = {}
    for tag in _PIXEL_SHAPES:
        pair = dataset.numbers(tag) or [0.0, 0.0]
        if len(pair) == 2 and all(math.isfinite(value) and value > 0 for value in pair):
            ratios[f"{tag} {tag.name.lower()}"] = pair[0] / pair[1]
        elif len(pair) != 2 or any(pair):  # zeros stand for unknown
            flags.add("pixel_shape_doubtful")
    if not ratios:
        return 1.0
    where, ratio = next(iter(ratios.items()))
    if any(not math.isclose(other, ratio, rel_tol=_SQUARE) for other in ratios.values()):
        flags.add("pixel_shape_doubtful")
    return stretch(ratio, where, flags)


def stretch(ratio: float, where: str, flags: set[str]) -> float:
    """A pixel's height over its width, flagged where that matters."""
    if not 1 / _MAX_PIXEL_ASPECT_RATIO <= ratio <= _MAX_PIXEL_ASPECT_RATIO:
        raise HeaderMismatch(
            f"{where} makes a pixel {ratio:.3g} times as high as wide, allowed are 1/{_MAX_PIXEL_ASPECT_RATIO} to"
            f" {_MAX_PIXEL_ASPECT_RATIO}; correct it"
        )
    if math.isclose(ratio, 1, rel_tol=_SQUARE):
        return 1.0
    flags.add("pixels_not_square")
    return ratio


def modality_transform(dataset: DataSet, signed: bool, flags: set[str]) -> Rescale | LookupTable | None:
    """The Modality LUT, else the rescale; None with a flag where it is unusable."""
    numbers = [dataset.numbers(tag) for tag in (Tag.SLOPE, Tag.INTERCEPT)]
    has_rescale = any(numbers)
    if Tag.MODALITY_LUT in dataset:
        table = _first_table(dataset, Tag.MODALITY_LUT, signed, flags)
        if table:
            flags.add("modality_lut")
            if has_rescale:
                flags.add("modality_lut_and_rescale")
            return table
        flags.add("modality_lut_unusable")
    if not has_rescale:
        return None
    slope, intercept = (values[0] if values else default for values, default in zip(numbers, (1.0, 0.0), strict=True))
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        flags.add("rescale_unusable")
        return None
    if slope < 0:
        flags.add("negative_slope")
    return Rescale(slope, intercept) if (slope, intercept) != (1, 0) else None


def voi(dataset: DataSet, negative_input: bool, flags: set[str]) -> Window | LookupTable | None:
    """The first VOI LUT, else the first window; None with a flag where it is unusable."""
    centers, widths = dataset.numbers(Tag.CENTER), dataset.numbers(Tag.WIDTH)
    if Tag.VOI_LUT in dataset:
        table = _first_table(dataset, Tag.VOI_LUT, negative_input, flags)
        if table:
            if len(dataset.items(Tag.VOI_LUT)) > 1:
                flags.add("several_windows")
            if centers or widths:
                flags.add("voi_lut_and_window")
            return table
        flags.add("voi_lut_unusable")
    if not centers and not widths:
        return None
    if (dataset.text(Tag.VOI_FUNCTION) or "LINEAR") not in VOI_FUNCTIONS:
        flags.add("voi_function_unknown")
    window = Window(centers[0], widths[0], _function(dataset)) if centers and widths else None
    if window is None or not window.usable:
        flags.add("window_fallback")
        return None
    if max(len(centers), len(widths)) > 1:
        flags.add("several_windows")
    return window


def other_windows(dataset: DataSet, negative_input: bool, used: Window | LookupTable | None) -> tuple[Offered, ...]:
    """VOI LUTs and windows that the file offers besides the one that `voi` uses.

    Those that are unusable are left out, and so is what comes after `MOST_WINDOWS`.
    """
    found: list[Offered] = []
    for number, item in enumerate(dataset.items(Tag.VOI_LUT)[: MOST_WINDOWS + 1]):
        table = _table(item, negative_input, set())
        if table and (number or not isinstance(used, LookupTable)):
            found.append(Offered("lut", number + 1, (_explained(item, Tag.LUT_EXPLANATION, 1) or [""])[0], table))
    centers, widths = dataset.numbers(Tag.CENTER), dataset.numbers(Tag.WIDTH)
    count = len(centers) if len(centers) == len(widths) else 0
    function, explained = _function(dataset), _explained(dataset, Tag.WINDOW_EXPLANATION, count)
    for number, (center, width) in enumerate(zip(centers, widths, strict=False)):
        window = Window(center, width, function)
        if window.usable and (number or not isinstance(used, Window)):
            found.append(Offered("window", number + 1, explained[number] if explained else "", window))
    return tuple(found[:MOST_WINDOWS])


def _explained(dataset: DataSet, tag: Tag, count: int) -> list[str]:
    """As many values of a free text; none where it has another number of them, or not only printable ASCII.

    Printable ASCII means the same in every character set of DICOM that has no escape sequence. To tell others apart
    takes codecs that a decoding process cannot load.
    """
    texts = dataset.texts(tag)
    if len(texts) != count or not all(text.isascii() and text.isprintable() for text in texts):
        return []
    return [text if len(text) <= MOST_WORDS else f"{text[: MOST_WORDS - 3].rstrip()}..." for text in texts]


def _function(dataset: DataSet) -> VoiFunction:
    named = dataset.text(Tag.VOI_FUNCTION)
    return next((known for known in VOI_FUNCTIONS if known == named), VOI_FUNCTIONS[0])


def _first_table(dataset: DataSet, tag: Tag, negative_input: bool, flags: set[str]) -> LookupTable | None:
    item = next(iter(dataset.items(tag)), None)
    return _table(item, negative_input, flags) if item else None


def _table(item: DataSet, negative_input: bool, flags: set[str]) -> LookupTable | None:
    """LUT Descriptor and LUT Data of an item (PS3.3 C.11.1.1.1); None if malformed."""
    descriptor = item.shorts(Tag.LUT_DESCRIPTOR)
    if len(descriptor) != 3:
        return None
    count, first, bits = descriptor[0] or 65536, descriptor[1], descriptor[2]
    raw = item.raw(Tag.LUT_DATA)
    if len(raw) >= 2 * count:
        entries = np.frombuffer(raw, "<u2" if item.little else ">u2", count).astype(np.uint16)
    elif bits <= 8 and len(raw) >= count:  # two 8-bit entries a word
        entries = np.frombuffer(raw, np.uint8, count).astype(np.uint16)
    else:
        return None
    if negative_input and first >= 1 << 15:
        first -= 1 << 16
    used_bits = max(int(entries.max()).bit_length(), 1)
    # fewer than a quarter of the declared greys: a 12-bit table that calls itself 16-bit
    if not used_bits <= bits <= min(used_bits + 1, 16):
        bits = used_bits
        flags.add("lut_corrected")
    return LookupTable(first, entries, bits)


def padding(dataset: DataSet, signed: bool) -> tuple[int, int] | None:
    """Smallest and largest stored value that is padding."""
    ends = [dataset.shorts(tag, signed)[:1] for tag in (Tag.PADDING, Tag.PADDING_LIMIT)]
    if not ends[0]:
        return None
    both = ends[0] + (ends[1] or ends[0])
    return min(both), max(both)


def view(dataset: DataSet, flags: set[str]) -> tuple[str, tuple[str, ...]]:
    """View from View Position, View Code Sequence or Patient Orientation; flags for what a reader has to know."""
    orientation = tuple(text.upper() for text in dataset.texts(Tag.ORIENTATION))
    if len(orientation) != 2 or not all(re.fullmatch(r"[APRLHF]{1,3}", text) for text in orientation):
        orientation = ()
    codes = [item.text(Tag.CODE_VALUE) for item in dataset.items(Tag.VIEW_CODE)]
    named = next((_VIEW_WORDS[word] for word in (dataset.text(Tag.VIEW_POSITION), *codes) if word in _VIEW_WORDS), "")
    implied = ""
    if orientation:
        across, down = orientation[0][0], orientation[1][0]
        if down != "F":
            flags.add("not_upright")
        elif across in "LR":
            implied = "frontal"
            if across == "R":
                flags.add("mirrored")
        elif across in "AP":
            implied = "lateral"
    if named and implied and (implied == "lateral") != (named == "lateral") and named != "oblique":
        flags.add("view_conflict")
    view = named or implied or view_of(_descriptions(dataset)) or "unknown"
    if view == "unknown":
        flags.add("view_unknown")
    if view == "lateral":
        flags.add("lateral")
    return view, orientation


def anatomy(dataset: DataSet, shape: tuple[int, int] = (0, 0)) -> Anatomy:
    """What the header says of the part of the body; codes and texts stay here."""
    spacing = dataset.numbers(Tag.IMAGER_PIXEL_SPACING) or dataset.numbers(Tag.PIXEL_SPACING)
    extent = max((side * step for side, step in zip(shape, spacing, strict=False)), default=0.0)
    return weigh(
        body_part=_free_text(dataset, Tag.BODY_PART),
        regions=[
            Code(item.text(Tag.CODE_VALUE), item.text(Tag.CODE_SCHEME), _free_text(item, Tag.CODE_MEANING))
            for item in dataset.items(Tag.REGION)
        ],
        descriptions=_descriptions(dataset),
        extent_mm=extent if 0 < extent < math.inf else None,
    )


def _descriptions(dataset: DataSet) -> list[str]:
    """Free texts that may name the part of the body or the view, the one nearest to the image first."""
    own = [_free_text(dataset, tag) for tag in (Tag.SERIES_DESCRIPTION, Tag.PROTOCOL_NAME)]
    sources = [dataset, *dataset.items(Tag.REQUEST)]
    for tag in (Tag.PERFORMED_PROCEDURE, Tag.REQUESTED_PROCEDURE):
        own += [_free_text(source, tag) for source in sources]
    codes = [code for source in sources for code in source.items(Tag.REQUESTED_CODE)]
    codes += dataset.items(Tag.PROCEDURE_CODE)
    return [*own, *(_free_text(code, Tag.CODE_MEANING) for code in codes), _free_text(dataset, Tag.STUDY_DESCRIPTION)]


def _free_text(dataset: DataSet, tag: Tag) -> str:
    """Text whose words are looked for: UTF-8 where it is that, else Latin-1, whatever the file's character set."""
    raw = dataset.raw(tag, 1024)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def presentation_flags(dataset: DataSet, photometric: str, flags: set[str]) -> None:
    """Flag what the file would have a viewer do or draw that no preset does."""
    shape = dataset.text(Tag.LUT_SHAPE)
    if photometric == "MONOCHROME2" and shape == "INVERSE":
        flags.add("monochrome2_with_inverse")
    if photometric == "MONOCHROME1" and shape == "IDENTITY":
        flags.add("monochrome1_with_identity")
    if Tag.PRESENTATION_LUT in dataset:
        flags.add("presentation_lut_ignored")
    if Tag.SHUTTER_SHAPE in dataset:
        flags.add("shutter_present")
    if dataset.has_overlay:
        flags.add("overlay_present")
    burned_in = dataset.text(Tag.BURNED_IN)
    if burned_in != "NO":
        flags.add("burned_in" if burned_in == "YES" else "burned_in_unknown")
