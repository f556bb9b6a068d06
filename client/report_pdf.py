"""A reading as an Encapsulated PDF (PS3.3 A.45.1), for viewers that show no structured report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fontpkg_noto_sans
from fpdf import FPDF, XPos, YPos
from pydicom.dataset import Dataset
from pydicom.uid import EncapsulatedPDFStorage

from cxr_triton import __version__
from cxr_triton.client.codes import UNTOUCHED, Concept
from cxr_triton.client.objects import UNVERIFIED, Study, code_item, reference
from cxr_triton.client.page import NOT_FOR_DIAGNOSIS
from cxr_triton.client.report_sr import flags, notice, statements, untouched

FONT = Path(fontpkg_noto_sans.__file__).parent / "files" / "NotoSans[wdth,wght].ttf"
TITLE = f"Machine reading of a chest radiograph ({UNVERIFIED})"
SUBSTITUTES = str.maketrans({"≥": ">=", "≤": "<=", "→": "->", "≈": "~", "\t": " ", "\u2028": "\n", "\u2029": "\n"})


class _Sheet(FPDF):
    def footer(self) -> None:
        self.set_y(-15)
        self.set_font("Noto", size=8)
        self.cell(0, 5, f"{NOT_FOR_DIAGNOSIS} {UNVERIFIED}. Page {self.page_no()}", align="C")


def pdf_report(study: Study) -> list[Dataset]:
    """One document of text without patient data; characters outside the font are counted, and the SR has them."""
    page = pdf(study)
    document = study.instance("pdf", EncapsulatedPDFStorage, "DOC", "PDF")
    document.ConversionType, document.BurnedInAnnotation = "SYN", "NO"
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
    missing = 0
    for size, text in _paragraphs(reading, study):
        sheet.set_font("Noto", size=size)
        drawn, count = _drawable(text, sheet.fonts["noto"].cmap)
        missing += count
        sheet.multi_cell(0, size * 0.5, drawn, align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT)
        sheet.ln(1.5)
    if missing:
        sheet.multi_cell(
            0, 5, f"{missing} characters are outside this document's font; the structured report has them."
        )
    return bytes(sheet.output())


def _paragraphs(reading: dict[str, Any], study: Study):
    yield 15, TITLE
    yield 11, notice(reading)
    findings, impression = statements(reading)
    reasoning = [reading["reasoning"]] if reading["reasoning"] else []
    sections = {
        "Findings": findings,
        "Impression": impression,
        "Reasoning": reasoning,
        UNTOUCHED.meaning: untouched(reading),
    }
    for heading, texts in sections.items():
        if texts:
            yield 13, heading
            for text in texts:
                yield 10, text
    yield 13, "Algorithm"
    yield 10, f"{study.algorithm} {study.algorithm_version}, engine bundle {study.bundle}"
    for flag in flags(reading):
        yield 10, flag
    yield 10, f"Written {study.made_at:%Y-%m-%d %H:%M %Z}"


def _drawable(text: str, glyphs) -> tuple[str, int]:
    """Text of characters that the font has, and how many were replaced."""
    text = re.sub(r"\r\n?", "\n", text).translate(SUBSTITUTES)
    drawn = [c if c == "\n" or ord(c) in glyphs else "?" for c in text]
    return "".join(drawn), sum(a != b for a, b in zip(text, drawn, strict=True))
