"""A reading as an Encapsulated PDF (PS3.3 A.45.1), for viewers that show no structured report."""

from __future__ import annotations

import datetime
import io
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import fontpkg_noto_sans
from fpdf import FPDF, XPos, YPos
from fpdf.fonts import TTFFont
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from cxr_triton import __version__
from cxr_triton.client.objects.codes import UNTOUCHED, Concept
from cxr_triton.client.objects.source import reference
from cxr_triton.client.objects.statements import flags, has_area, notice, statements, told_scores, untouched
from cxr_triton.client.objects.study import UNVERIFIED, Study, code_item
from cxr_triton.reading import LATERALITIES, NOT_FOR_DIAGNOSIS, image_name

FONT = Path(fontpkg_noto_sans.__file__).parent / "files" / "NotoSans[wdth,wght].ttf"
TITLE = f"Machine reading of a chest radiograph ({UNVERIFIED})"
PICTURE_MM, BOX = (90, 100), (255, 176, 0)
SUBSTITUTES = str.maketrans({"≥": ">=", "≤": "<=", "→": "->", "≈": "~", "\t": " ", "\u2028": "\n", "\u2029": "\n"})


class _Sheet(FPDF):
    """A4 pages, with the research-only notice at the foot of each.

    Attributes
    ----------
    missing : int
        Characters that the font lacks.
    """

    missing = 0

    def footer(self) -> None:
        self.set_y(-15)
        self.set_font("Noto", size=8)
        self.cell(0, 5, f"{NOT_FOR_DIAGNOSIS} {UNVERIFIED}. Page {self.page_no()}", align="C")

    def say(self, size: int, text: str) -> None:
        """A paragraph from the cursor to the right margin."""
        self.set_font("Noto", size=size)
        font = self.fonts["noto"]
        drawn, missing = _drawable(text, font.cmap if isinstance(font, TTFFont) else {})
        self.missing += missing
        self.multi_cell(0, size * 0.5, drawn, align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        self.ln(1.5)

    def show(self, png: bytes, boxes: Sequence[tuple[float, float, float, float]], caption: Sequence[str]) -> None:
        """A picture with numbered boxes, shares of its width and height, and a caption beside it."""
        picture = Image.open(io.BytesIO(png))
        scale = min(PICTURE_MM[0] / picture.width, PICTURE_MM[1] / picture.height)
        width, height = scale * picture.width, scale * picture.height
        self.ln(2)
        if self.will_page_break(height):
            self.add_page()
        left, top = self.l_margin, self.get_y()
        self.image(picture, left, top, width, height)
        self.set_draw_color(BOX)
        self.set_fill_color(BOX)
        self.set_line_width(0.5)
        self.set_font("Noto", size=8)
        for i, (x1, y1, x2, y2) in enumerate(boxes, 1):
            x, y = left + x1 * width, top + y1 * height
            self.rect(x, y, (x2 - x1) * width, (y2 - y1) * height)
            self.set_xy(x, y)
            self.cell(4, 4, str(i), align="C", fill=True)
        self.set_left_margin(left + width + 4)
        self.set_xy(self.l_margin, top)
        for text in caption:
            self.say(8, text)
        self.set_left_margin(left)
        self.set_xy(left, max(self.get_y(), top + height) + 4)


def pdf_report(study: Study) -> list[Dataset]:
    """One document that names no patient; characters outside the font are counted, and the SR has them.

    UIDs, the study's date and the pictures may tell whose it is all the same, so Burned In Annotation says YES unless
    the reading's identifiers are hashed and no picture may have text burned in.
    """
    page = pdf(study)
    document = study.instance("pdf", EncapsulatedPDFStorage, "DOC", "PDF")
    document.ConversionType, document.BurnedInAnnotation = "SYN", "YES" if _may_identify(study) else "NO"
    document.AcquisitionDateTime = None
    document.DocumentTitle, document.VerificationFlag = TITLE, "UNVERIFIED"
    document.ConceptNameCodeSequence = [code_item(Concept("18748-4", "LN", "Diagnostic Imaging Report"))]
    document.SourceInstanceSequence = [reference(source) for source in study.sources]
    document.MIMETypeOfEncapsulatedDocument = "application/pdf"
    document.EncapsulatedDocument = page + b"\0" * (len(page) % 2)
    document.EncapsulatedDocumentLength = len(page)
    return [document]


def pdf(study: Study) -> bytes:
    """The PDF file; the same bytes for the same study."""
    reading = study.reading
    sheet = _Sheet()
    sheet.set_creation_date(study.made_at)
    sheet.set_title(TITLE)
    sheet.set_producer(f"cxr-triton {__version__}")
    sheet.add_font("Noto", "", FONT)
    sheet.set_auto_page_break(True, 20)
    sheet.add_page()
    sheet.say(15, TITLE)
    sheet.say(11, notice(reading))
    for index in range(len(study.sources)):
        for text in _origin(study, index):
            sheet.say(9, text)
    findings, impression = statements(reading)
    _section(sheet, "Findings", findings)
    _section(sheet, "Impression", impression)
    for index, picture in enumerate(study.pictures):
        boxes = [box for box in reading["boxes"] if box["image"] == index and has_area(box)]
        caption = [image_name(index, len(study.sources)), *(f"{i}  {_label(box)}" for i, box in enumerate(boxes, 1))]
        sheet.show(picture.png, [_shares(box, study.sources[index]) for box in boxes], caption)
    _section(sheet, "Reasoning", [reading["reasoning"]] if reading["reasoning"] else [])
    _section(sheet, UNTOUCHED.meaning, untouched(reading))
    algorithm = f"{study.algorithm} {study.algorithm_version}, engine bundle {study.bundle}"
    _section(
        sheet,
        "Algorithm",
        [algorithm, *flags(reading), *told_scores(study.scores), f"Written {study.made_at:%Y-%m-%d %H:%M %Z}"],
    )
    if sheet.missing:
        sheet.say(10, f"{sheet.missing} characters are outside this document's font; the structured report has them.")
    return bytes(sheet.output())


def _section(sheet: _Sheet, heading: str, texts: Sequence[str]) -> None:
    if texts:
        sheet.say(13, heading)
        for text in texts:
            sheet.say(10, text)


def _origin(study: Study, index: int) -> list[str]:
    """Which image was read, as far as the reading's identifiers allow to say it."""
    source, facts = study.sources[index], study.reading["images"][index]
    identity = facts.get("identity") or {}
    is_plain = identity.get("identifiers") != "hashed"
    told = [image_name(index, len(study.sources))]
    if is_plain:
        told += [study.pictures[index].name if study.pictures else "", _study_date(source)]
    told += [str(facts[key]) for key in ("modality", "view") if facts.get(key) not in (None, "", "unknown")]
    if side := LATERALITIES.get(facts.get("laterality")):
        told.append(f"laterality {side}")
    told.append(f"{source.Columns} × {source.Rows} px")
    lines = [", ".join(part for part in told if part)]
    if is_plain:
        lines.append(f"SOP Instance UID {source.SOPInstanceUID}")
    if identity.get("file_sha256"):
        lines.append(f"SHA-256 of the file {identity['file_sha256']}")
    return lines


def _study_date(source: Dataset) -> str:
    try:
        return f"study of {datetime.date.fromisoformat(str(source.get('StudyDate') or ''))}"
    except ValueError:
        return ""


def _may_identify(study: Study) -> bool:
    images = study.reading["images"]
    is_hashed = all((facts.get("identity") or {}).get("identifiers") == "hashed" for facts in images)
    burned_in = any({"burned_in", "burned_in_unknown"} & set(facts.get("flags", ())) for facts in images)
    return not is_hashed or (bool(study.pictures) and burned_in)


def _shares(box: dict[str, Any], source: Dataset) -> tuple[float, float, float, float]:
    left, top, right, bottom = box["pixels"]
    return left / source.Columns, top / source.Rows, right / source.Columns, bottom / source.Rows


def _label(box: dict[str, Any]) -> str:
    return box["label"] or "unnamed"


def _drawable(text: str, glyphs: Container[int]) -> tuple[str, int]:
    """Text of characters that the font has, and how many were replaced."""
    text = re.sub(r"\r\n?", "\n", text).translate(SUBSTITUTES)
    drawn = [c if c == "\n" or ord(c) in glyphs else "?" for c in text]
    return "".join(drawn), sum(a != b for a, b in zip(text, drawn, strict=True))
