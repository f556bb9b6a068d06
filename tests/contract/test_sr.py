"""A reading's DICOM objects against what others make of them: dciodvfy, DCMTK, highdicom, Ghostscript."""

import dataclasses
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image, ImageDraw
from pydicom.data import get_charset_files
from sr_case import BOXES, OPTIONS, TEXT, file, header, reading, with_boxes

from cxr_triton.client.objects import KINDS
from cxr_triton.client.objects.codes import (
    ABSENT,
    CHEST,
    LABELS,
    LUNG,
    MEDIASTINUM,
    PLAIN_RADIOGRAPHY,
    PLEURA,
    PRESENT,
    STATUSES,
    label_concept,
)
from cxr_triton.client.objects.results import diagnostic_report, result_objects
from cxr_triton.client.objects.source import source_header
from cxr_triton.client.page import DOCUMENT_PIXELS, Shown, draw
from cxr_triton.errors import CxrError
from cxr_triton.identity import hashed, identity_of
from cxr_triton.pixels.dicom import read_identity, read_image
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.reading import Reading

COPIED = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyInstanceUID", "StudyDate", "StudyTime",
          "AccessionNumber", "StudyID", "ReferringPhysicianName", "StudyDescription")  # fmt: skip


def tool(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; apt-get install {package}")
    return path


def write(instance, folder: Path) -> Path:
    path = folder / f"{instance.SOPInstanceUID}.dcm"
    instance.save_as(path, enforce_file_format=True)
    return path


def errors(path: Path) -> list[str]:
    """Error lines of dciodvfy."""
    ran = subprocess.run([tool("dciodvfy", "dicom3tools"), path], capture_output=True, text=True, errors="replace")
    return [line for line in ran.stderr.splitlines() if line.startswith("Error")]


def dump(path: Path) -> str:
    ran = subprocess.run([tool("dsrdump", "dcmtk"), path], capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def values(path: Path) -> dict[str, str]:
    """Values of `COPIED`, as DCMTK decodes them to UTF-8."""
    search = [part for keyword in COPIED for part in ("+P", keyword)]
    command = [tool("dcmdump", "dcmtk"), "+U8", "-q", "+L", *search, path]
    ran = subprocess.run(command, capture_output=True, text=True, errors="replace")
    found = re.findall(r"^\([0-9a-f,]+\) \w\w (.*?) +#.*? (\w+)$", ran.stdout, re.MULTILINE)
    return {keyword: value.strip("[]").rstrip(" \0") for value, keyword in found if value != "(no value available)"}


def texts(item) -> list[str]:
    """Text values of a content tree, in order."""
    own = [item.TextValue] if "TextValue" in item else []
    return own + [text for child in item.get("ContentSequence", ()) for text in texts(child)]


def tree(item) -> list:
    """Relations, types, names, codes and coordinates of a content tree."""
    name, code = item.get("ConceptNameCodeSequence"), item.get("ConceptCodeSequence")
    own = [item.get("RelationshipType"), item.ValueType, name and name[0].CodeValue, code and code[0].CodeValue,
           [float(np.float32(value)) for value in item.get("GraphicData", ())], item.get("UID")]  # fmt: skip
    return [own, [tree(child) for child in item.get("ContentSequence", ())]]


def find(item, code: str):
    """The child whose concept name has a code."""
    return next(child for child in item.ContentSequence if child.ConceptNameCodeSequence[0].CodeValue == code)


def document(folder: Path, instance):
    """The instance as highdicom reads its file."""
    return highdicom.sr.srread(write(instance, folder))


SCORES = {"Cardiomegaly": 9.125, "Edema": 0.75, "Lung Lesion": -15.0, "No Finding": -11.5}
SCORED = dataclasses.replace(OPTIONS, scores=True)
READINGS = {
    "findings": lambda source: reading(source),
    "nothing found": lambda source: reading(source, text="<think>Clear.</think><answer>No Finding</answer>"),
    "boxes": with_boxes,
    "prose": lambda source: reading(
        source, text="<think>a</think><answer>The lungs are clear.</answer>", answer="prose"
    ),
    "options": lambda source: reading(source, text="<think>a</think><answer>(B)</answer>", answer="option", task="vqa"),
    "malformed": lambda source: reading(source, text="nothing like it"),
    "truncated": lambda source: reading(source, text="<think>The heart", finish_reason="length"),
    "out_of_vocabulary": lambda source: reading(source, text="<think>a</think><answer>Edema, Hernia</answer>"),
    "doubtful_image": lambda source: {**reading(source), "status": "doubtful_image"},
    "free prompt, bare model": lambda source: reading(source, task=None, model={}, text=TEXT),
    "scores": lambda source: reading(source, scores=SCORES),
    "scores of options": lambda source: reading(
        source, text="<think>a</think><answer>(B)</answer>", answer="option", task="vqa", scores={"A": -3.0, "B": 3.25}
    ),
    "long": lambda source: reading(source, text=f"<think>{'word ' * 4_000}</think><answer>Edema</answer>"),
    "control characters": lambda source: reading(
        source, text="<think>\x00\x1b[2J\ud800 a\\b\r\x85</think><answer>Edema</answer>"
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_every_object_conforms(name, tmp_path):
    source = header()
    instances = result_objects(READINGS[name](source), [source], kinds=KINDS, options=SCORED)
    assert {"SR", "DOC"} <= {instance.Modality for instance in instances}
    for instance in instances:
        path = write(instance, tmp_path)
        assert errors(path) == []
        if instance.Modality == "SR":
            assert "UNVERIFIED" in dump(path) and "PRELIMINARY" in dump(path)
            read = document(tmp_path, instance)
            assert [str(text) for text in texts(read)] == texts(instance)
            assert tree(read.content[0]) == tree(instance)


def test_findings_are_coded(tmp_path):
    source = header()
    (instance,) = result_objects(reading(source), [source], kinds=["findings_sr"], options=OPTIONS)
    report = document(tmp_path, instance).content
    assert report[0].template_id == "1500"
    (group,) = report.get_image_measurement_groups()
    found = {(e.name.value, e.name.scheme_designator): e.value.value for e in group.get_qualitative_evaluations()}
    assert found.pop(("reading-status", "99CXR")) == "ok"
    present = {label_concept(label)[:2] for label in ("Cardiomegaly", "Edema")}
    assert {code for code, value in found.items() if value == "52101004"} == present
    # Cardiomegaly implies the enlarged mediastinum and edema the opacity, so neither is called absent.
    not_said = {label_concept(label)[:2] for label in ("Enlarged Cardiomediastinum", "Lung Opacity", "No Finding")}
    every = {concept[:2] for concept in LABELS.values()}
    assert {code for code, value in found.items() if value == "272519000"} == every - present - not_said
    measured = find(find(report[0], "126010"), "125007")
    for label in set(LABELS) - {"Lung Opacity", "Enlarged Cardiomediastinum", "No Finding"}:
        concept = label_concept(label)
        said = [tree(item)[0][2:4] for item in find(measured, concept.value).get("ContentSequence", ())]
        assert said == ([["363698007", concept.site.value]] if concept.site else []), label
    library = find(instance, "111028").ContentSequence[0]
    assert [entry.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for entry in library.ContentSequence] == [
        source.SOPInstanceUID
    ]
    described = {item.ConceptNameCodeSequence[0].CodeValue: item for item in library.ContentSequence[0].ContentSequence}
    assert described["121139"].ConceptCodeSequence[0].CodeValue == "DX"
    sizes = [described[code].MeasuredValueSequence[0].NumericValue for code in ("110910", "110911")]
    assert sizes == [source.Rows, source.Columns]
    (image,) = group.source_images
    assert image.referenced_sop_instance_uid == source.SOPInstanceUID
    assert [uids[2] for uids in document(tmp_path, instance).get_evidence()] == [source.SOPInstanceUID]


def test_scores_are_measurements_about_a_coded_finding_and_only_on_request(tmp_path):
    source = header()
    made = reading(source, scores=SCORES)
    (instance,) = result_objects(made, [source], kinds=["findings_sr"], options=SCORED)
    measured = find(find(document(tmp_path, instance).content[0], "126010"), "125007")
    found = {}
    for number in measured.ContentSequence:
        if number.ConceptNameCodeSequence[0].CodeValue != "score":
            continue
        assert number.ConceptNameCodeSequence[0].CodingSchemeDesignator == "99CXR" and number.ValueType == "NUM"
        value = number.MeasuredValueSequence[0]
        assert value.MeasurementUnitsCodeSequence[0].CodeValue == "1"
        about = find(number, "121071").ConceptCodeSequence[0]
        found[about.CodeValue, about.CodingSchemeDesignator] = float(value.NumericValue)
        sites = [tree(item)[0][2:4] for item in number.ContentSequence[1:]]
        concept = next(each for each in LABELS.values() if each.value == about.CodeValue)
        assert sites == ([["363698007", concept.site.value]] if concept.site else [])
    assert found == {label_concept(label)[:2]: score for label, score in SCORES.items()}
    for kind in ("findings_sr", "text_sr"):
        (with_them,) = result_objects(made, [source], kinds=[kind], options=SCORED)
        (without,) = result_objects(made, [source], kinds=[kind], options=OPTIONS)
        (plain,) = result_objects(reading(source), [source], kinds=[kind], options=SCORED)
        (said,) = [text for text in texts(with_them) if text.startswith("Scores: Cardiomegaly +9.1, Edema +0.8, ")]
        assert "not calibrated, and no probability of a disease" in said
        assert not [text for text in texts(without) if "Scores:" in text] and tree(without) == tree(plain)
        assert with_them.SOPInstanceUID != without.SOPInstanceUID == plain.SOPInstanceUID


def test_codes_are_those_of_the_standard():
    """SNOMED codes that DICOM itself uses, and RadLex, SNOMED meaning by their own names."""
    from pydicom.sr.codedict import codes

    for label, code in (
        ("Edema", codes.SCT.PulmonaryEdema),
        ("Pleural Effusion", codes.SCT.PleuralEffusion),
        ("Pneumothorax", codes.SCT.Pneumothorax),
        ("Lung Opacity", codes.cid6104.Opacity),
        ("Lung Lesion", codes.SCT.Lesion),
        ("Enlarged Cardiomediastinum", codes.cid6107.Enlarged),
    ):
        assert LABELS[label][:3] == (code.value, code.scheme_designator, code.meaning)
    sites = {concept.site[:3] for concept in LABELS.values() if concept.site}
    theirs = (codes.cid6100.Lung, codes.cid6100.Mediastinum, codes.cid6100.PleuralStructure, codes.SCT.Chest)
    assert sites == {(code.value, code.scheme_designator, code.meaning) for code in theirs}
    assert {concept.scheme for concept in LABELS.values()} == {"SCT", "DCM"}
    ours = [concept[:2] for concept in (PRESENT, ABSENT, PLAIN_RADIOGRAPHY)]
    theirs = (codes.cid241.Present, codes.cid241.Absent, codes.SCT.PlainRadiography)
    assert ours == [(code.value, code.scheme_designator) for code in theirs]
    for concept in (*LABELS.values(), *STATUSES.values(), CHEST, LUNG, MEDIASTINUM, PLEURA):
        assert len(concept.value) <= 16 and len(concept.meaning) <= 64
        if concept.scheme == "SCT":
            assert verhoeff(concept.value)
    assert len({concept[:2] for concept in LABELS.values()}) == 14


def verhoeff(number: str) -> bool:
    """Whether a SNOMED identifier's check digit is right."""
    multiply = [[(a + b) % 5 if a < 5 and b < 5 else None for b in range(10)] for a in range(10)]
    for a in range(10):  # dihedral group D5: rotations 0 to 4, reflections 5 to 9
        for b in range(10):
            if a < 5 and b >= 5:
                multiply[a][b] = 5 + (a + b - 5) % 5
            elif a >= 5 and b < 5:
                multiply[a][b] = 5 + (a - 5 - b) % 5
            elif a >= 5 and b >= 5:
                multiply[a][b] = (a - b) % 5
    step = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    check = 0
    for i, digit in enumerate(reversed(number)):
        value = int(digit)
        for _ in range(i % 8):
            value = step[value]
        check = multiply[check][value]
    return check == 0


def rectangle(rows: int, columns: int, photometric: str, box: tuple[int, int, int, int], spacing=None) -> bytes:
    """A radiograph with one bright rectangle: left, top, right, bottom in pixel edges."""
    stored = np.full((rows, columns), 600, np.uint16)
    left, top, right, bottom = box
    stored[top:bottom, left:right] = 3800
    source = pydicom.dcmread(io.BytesIO(file()))
    source.Rows, source.Columns, source.PhotometricInterpretation = rows, columns, photometric
    source.BitsAllocated, source.BitsStored, source.HighBit = 16, 12, 11
    source.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    source.WindowCenter, source.WindowWidth = 2048, 4096
    if spacing:
        source.ImagerPixelSpacing = spacing
    source.PatientOrientation = ["R", "F"] if photometric == "MONOCHROME1" else ["L", "F"]
    source.PixelData = (4095 - stored if photometric == "MONOCHROME1" else stored).astype("<u2").tobytes()
    out = io.BytesIO()
    source.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize(
    ("rows", "columns", "box", "spacing"),
    [
        (900, 700, (80, 90, 330, 410), None),
        (300, 1100, (700, 40, 1080, 260), None),
        (1030, 310, (0, 700, 155, 1030), None),
        (450, 700, (80, 45, 330, 205), ["0.2", "0.1"]),
        (900, 300, (20, 90, 110, 410), ["0.1", "0.25"]),
    ],
)
def test_boxes_land_on_the_source_pixels(rows, columns, box, spacing, photometric, tmp_path):
    """What stands out in the picture that the model sees is where DCMTK finds the region, in pixels of the file."""
    data = rectangle(rows, columns, photometric, box, spacing)
    with Sandbox() as sandbox:
        seen = sandbox.prepare(data, preset="voi_display", min_pixels=112 * 112, max_pixels=476 * 476, factor=28).pixels
    assert seen.shape[0] / rows != pytest.approx(seen.shape[1] / columns, rel=1e-3)
    height, width = float(spacing[0]) if spacing else 1, float(spacing[1]) if spacing else 1
    assert seen.shape[0] / seen.shape[1] == pytest.approx(rows * height / (columns * width), rel=0.1)
    y, x = np.nonzero(seen > 128)
    percent = [100 * x.min() / seen.shape[1], 100 * y.min() / seen.shape[0]]
    percent += [100 * (x.max() + 1) / seen.shape[1], 100 * (y.max() + 1) / seen.shape[0]]
    source = source_header(data)
    answer = "<|ref|>Edema<|/ref|><|box|>({:.4f},{:.4f}),({:.4f},{:.4f})<|/box|>".format(*percent)
    findings, state = result_objects(
        with_boxes(source, answer), [source], kinds=["findings_sr", "gsps"], options=OPTIONS
    )
    path = write(findings, tmp_path)
    xml = subprocess.run([tool("dsr2xml", "dcmtk"), path], capture_output=True, check=True).stdout
    (outline,) = ET.fromstring(xml).findall(".//{*}scoord/{*}data")
    numbers = [float(number) for number in re.split(r"[,/]", outline.text)]
    drawn = Image.new("1", (columns, rows))
    ImageDraw.Draw(drawn).polygon(pixel_centres(numbers), fill=1)
    stored = pydicom.dcmread(io.BytesIO(data)).pixel_array
    bright = stored < 2048 if photometric == "MONOCHROME1" else stored > 2048
    inside = np.asarray(drawn)
    assert (inside & bright).sum() / (inside | bright).sum() > 0.97
    graphic = state.GraphicAnnotationSequence[0].GraphicObjectSequence[0]
    assert np.allclose(graphic.GraphicData, numbers, atol=0.01) and graphic.GraphicAnnotationUnits == "PIXEL"
    # DCMTK shows the image through the presentation state with the polarity that it has without one.
    (tmp_path / "image.dcm").write_bytes(data)
    shown = {}
    for name, options in (("with", ["-p", write(state, tmp_path)]), ("without", [])):
        out = tmp_path / f"{name}.pgm"
        subprocess.run(
            [tool("dcmp2pgm", "dcmtk"), *options, tmp_path / "image.dcm", out], check=True, capture_output=True
        )
        shown[name] = np.asarray(Image.open(out)).astype(int)
    assert np.abs(shown["with"] - shown["without"]).max() <= 1
    assert shown["with"][bright].mean() > shown["with"][~bright].mean() + 100


def pixel_centres(numbers: list[float]) -> list[tuple[float, float]]:
    """Corners for PIL, which puts whole numbers at pixel centres and fills the outline too."""
    left, top, right, bottom = min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])
    left, top, right, bottom = round(left), round(top), round(right) - 1, round(bottom) - 1
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


# PS3.5 H.3 and K.2; DCMTK's iconv cannot read ISO 2022 IR 87 and IR 159.
JAPANESE = {
    "chrH31": "Yamada^Tarou=山田^太郎=やまだ^たろう",
    "chrH32": "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    "chrJapMulti": "やまだ^たろう",
    "chrJapMultiExplicitIR6": "やまだ^たろう",
}
CHARSETS = [path for path in sorted(get_charset_files("chr*.dcm")) if "SQ" not in path]


@pytest.mark.parametrize("path", CHARSETS, ids=lambda path: Path(path).stem)
def test_names_of_any_character_set_come_out_in_unicode(path, tmp_path):
    """DCMTK reads the same name from a file in a character set of the standard and from the SR of its header."""
    source = source_header(path)
    for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Rows", "Columns"):
        setattr(source, keyword, header()[keyword].value)
    source.PatientSex = "O"
    expected = JAPANESE.get(Path(path).stem) or values(Path(path))["PatientName"]
    for instance in result_objects(reading(source), [source], options=OPTIONS):
        out = write(instance, tmp_path)
        assert values(out)["PatientName"].rstrip("=") == expected.rstrip("=")
        assert [line for line in errors(out) if "Patient" in line] == []
    said = TEXT.split("<think>")[1].split("</think>")[0].replace("\n", "\r\n")
    assert said in texts(document(tmp_path, instance))


def test_every_radiograph_of_the_collection(shared_data, tmp_path):
    made = 0
    for path in sorted(shared_data.glob("*/*.dcm")):
        data = path.read_bytes()
        try:
            if not read_identity(data).is_radiograph:
                continue
        except CxrError:
            continue
        source = source_header(data)
        read = {**reading(source), "boxes": with_boxes(source, BOXES)["boxes"]}
        for instance in result_objects(read, [source], kinds=KINDS, options=OPTIONS):
            out = write(instance, tmp_path)
            wrong = [line for line in errors(out) if not of_the_source(line, source)]
            assert wrong == [], path.name
            assert values(out).items() >= {k: v for k, v in values(path).items() if v}.items(), path.name
            if instance.Modality == "SR" and source.SOPInstanceUID.is_valid and source.StudyInstanceUID.is_valid:
                dump(out)
                document(tmp_path, instance)
        assert diagnostic_report(read, [source], options=OPTIONS)["imagingStudy"]
        made += 1
    assert made >= 20


def of_the_source(line: str, source) -> bool:
    """Whether dciodvfy finds fault with a UID or a LUT that the image itself has."""
    own = [str(uid) for uid in (source.SOPInstanceUID, source.StudyInstanceUID) if not uid.is_valid]
    summary = line == "Error - Dicom dataset contains invalid data values for Value Representations"
    return any(uid in line for uid in own) or (summary and bool(own)) or "Modality LUT" in line


def ghostscript(instance, tmp_path, *options) -> bytes:
    """What Ghostscript makes of an instance's document."""
    (tmp_path / "report.pdf").write_bytes(instance.EncapsulatedDocument[: instance.EncapsulatedDocumentLength])
    command = [tool("gs", "ghostscript"), "-q", "-dSAFER", *options, "-o", "-", tmp_path / "report.pdf"]
    return subprocess.run(command, capture_output=True, check=True).stdout


def text_of(instance, tmp_path) -> str:
    return " ".join(ghostscript(instance, tmp_path, "-sDEVICE=txtwrite").decode().split())


def test_the_pdf_says_what_the_reading_says(tmp_path):
    source = header()
    (instance,) = result_objects(reading(source), [source], kinds=["pdf"], options=OPTIONS)
    said = text_of(instance, tmp_path)
    for part in ("Research only. Not for diagnosis. AI, not verified", "A test fixture wrote this.",
                 "Present: Cardiomegaly", "ratio >= 0.5 – see “silhouette”", "Плевра",
                 "characters are outside this document's font", "Phantom reader", "Page 1"):  # fmt: skip
        assert part in said
    assert str(source.PatientName) not in said and source.PatientID not in said


def test_the_pdf_says_which_images_were_read_as_far_as_the_identifiers_allow(tmp_path):
    prior, current = header(StudyDate="20031231"), header(StudyDate="20040119", SOPInstanceUID="1.2.3.5")
    read = reading(prior, current)
    for facts, side in zip(read["images"], ("", "R"), strict=True):
        facts |= {"modality": "DX", "view": "PA", "laterality": side}
    pictures = [Shown(png=blank_png(), name=name) for name in ("old.dcm", "new.dcm")]
    (instance,) = result_objects(read, [prior, current], kinds=["pdf"], pictures=pictures, options=OPTIONS)
    said, digest = text_of(instance, tmp_path), read["images"][0]["identity"]["file_sha256"]
    size = f"{prior.Columns} × {prior.Rows} px"
    assert (
        f"Image 1, prior, old.dcm, study of 2003-12-31, DX, PA, {size} SOP Instance UID {prior.SOPInstanceUID}" in said
    )
    assert f"Image 2, current, new.dcm, study of 2004-01-19, DX, PA, laterality right, {size}" in said
    assert "SOP Instance UID 1.2.3.5" in said and f"SHA-256 of the file {digest}" in said
    assert "Research only. Not for diagnosis." in said and instance.BurnedInAnnotation == "YES"

    for facts in read["images"]:
        facts["identity"], facts["flags"] = hashed(facts["identity"]), []
    (instance,) = result_objects(read, [prior, current], kinds=["pdf"], options=OPTIONS)
    said = text_of(instance, tmp_path)
    for part in (prior.SOPInstanceUID, "1.2.3.5", "2003", "2004", "20040119"):
        assert part not in said, part
    assert f"Image 1, prior, DX, PA, {size}" in said and digest in said and instance.BurnedInAnnotation == "NO"
    read["images"][0]["flags"] = ["burned_in_unknown"]
    (instance,) = result_objects(read, [prior, current], kinds=["pdf"], pictures=pictures, options=OPTIONS)
    assert instance.BurnedInAnnotation == "YES"


def blank_png() -> bytes:
    out = io.BytesIO()
    Image.new("L", (64, 48)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("spacing", [["0.2", "0.2"], ["0.3", "0.15"]], ids=["square", "high"])
def test_the_pdf_shows_the_picture_that_was_read_with_its_boxes(tmp_path, spacing):
    """Found on the page as Ghostscript draws it: frames of both boxes, and the model's greys in the outer one."""
    data = pydicom.dcmread(io.BytesIO(file()))
    data.ImagerPixelSpacing = spacing
    stored = io.BytesIO()
    data.save_as(stored)
    source = source_header(stored.getvalue())
    read = with_boxes(source)
    read["images"][0]["identity"] = identity_of(stored.getvalue(), read_image(stored.getvalue()))
    pictures = draw([stored.getvalue()], Reading.from_json(json.dumps(read)), max_pixels=DOCUMENT_PIXELS)
    picture = Image.open(io.BytesIO(pictures[0].png))
    assert picture.width * picture.height <= DOCUMENT_PIXELS
    (instance,) = result_objects(read, [source], kinds=["pdf"], pictures=pictures, options=OPTIONS)
    assert "1 edema 2 the left base" in text_of(instance, tmp_path)
    drawn = Image.open(io.BytesIO(ghostscript(instance, tmp_path, "-sDEVICE=png16m", "-r200", "-dLastPage=1")))
    pixels = np.asarray(drawn).astype(int)
    frame = (np.abs(pixels - np.array([255, 176, 0])) < 30).all(axis=-1)
    rows, columns = np.flatnonzero(frame.sum(axis=1) > 100), np.flatnonzero(frame.sum(axis=0) > 100)
    top, bottom, left, right = rows[0] + 2, rows[-1] - 1, columns[0] + 2, columns[-1] - 1  # middle of a 0.5 mm stroke
    width, height = right - left, bottom - top
    assert width / height == pytest.approx(picture.width / picture.height, rel=0.02)
    for lines, begin, length, shares in ((columns, left, width, (0.1, 0.6)), (rows, top, height, (0.2, 0.455))):
        for share in shares:
            assert np.abs(lines - (begin + share * length)).min() <= 3
    shown = np.asarray(drawn.convert("L").crop((left, top, right, bottom)).resize((60, 60), Image.Resampling.BOX))
    expected = np.asarray(picture.convert("L").resize((60, 60), Image.Resampling.BOX))
    like, upside_down = (np.corrcoef(shown.ravel(), other.ravel())[0, 1] for other in (expected, expected[::-1]))
    assert like > 0.9 > upside_down


def test_fhir_is_valid_r4():
    from fhir.resources.R4B.diagnosticreport import DiagnosticReport

    source = header(PatientBirthDate="19400305", PatientSex="F", StudyDate="20260101", AccessionNumber="A1")
    for name, make in READINGS.items():
        report = diagnostic_report(make(source), [source], options=OPTIONS)
        assert DiagnosticReport.model_validate(report).status == "partial", name
        assert "Not for diagnosis" in report["conclusion"] and "AI, not verified" in report["conclusion"]
        json.dumps(report, allow_nan=False).encode("utf-8")
    report = DiagnosticReport.model_validate(
        diagnostic_report(reading(source, scores=SCORES), [source], options=SCORED)
    )
    observed = {item.code.text: item for item in report.contained if item.get_resource_type() == "Observation"}
    for label, score in SCORES.items():
        (component,) = observed[label].component
        assert component.code.coding[0].code == "score" and float(component.valueQuantity.value) == score
    assert observed["No Finding"].valueCodeableConcept is None, "neither present nor absent"
    assert observed["Pneumonia"].component is None
    read = reading(source, text="<think>a</think><answer>Lung Lesion, Support Devices</answer>")
    report = diagnostic_report(read, [source], options=OPTIONS)
    observed = {item["code"]["text"]: item for item in report["contained"] if item["resourceType"] == "Observation"}
    assert observed["Lung Lesion"]["bodySite"]["coding"][0]["code"] == "39607008"
    assert "bodySite" not in observed["Pneumothorax"]
    assert [concept["text"] for concept in report["conclusionCode"]] == ["Lung Lesion", "Support Devices"]
