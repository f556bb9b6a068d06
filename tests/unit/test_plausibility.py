"""A chest is read, another part of the body is refused, and what may be either never gives a plain reading."""

import collections
import csv
import io
import json

import numpy as np
import pytest
from dicom_files import dataset_of, file_bytes
from PIL import Image, ImageDraw
from pydicom import Dataset, dcmread

from cxr_triton import phantom, phantom_file
from cxr_triton.errors import CxrError, NotAChest
from cxr_triton.pixels.anatomy import Anatomy, Code, weigh
from cxr_triton.pixels.dicom import read_identity, read_image
from cxr_triton.pixels.display import PRESETS, render
from cxr_triton.pixels.flags import DOUBTS
from cxr_triton.pixels.plausibility import MIN_CHEST, judge, likeness
from cxr_triton.pixels.sandbox import Sandbox

SIDE = 256
BUDGET = {"preset": "mimic_jpg", "min_pixels": 28 * 28 * 4, "max_pixels": 476 * 476}


def tagged(seed: int = 3, **elements) -> bytes:
    """A phantom without any word on the body but `elements`."""
    dataset = dcmread(io.BytesIO(phantom_file.write_dicom(phantom.draw(np.random.default_rng(seed)))))
    del dataset.BodyPartExamined
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return file_bytes(dataset)


def code(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def verdict(data: bytes) -> str:
    """refused, flagged or passed, as served with a profile of frontal views."""
    try:
        radiograph = read_image(data)
        picture = render(radiograph, "mimic_jpg")
    except CxrError:
        return "refused"
    found = judge(radiograph.metadata.anatomy, radiograph.metadata.view, picture.pixels, ("frontal",))
    return "refused" if found.refusal else "flagged" if found.doubts else "passed"


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# -------------------------------------------------------------------------------------------------------------- header


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        ({}, "silent"),
        ({"BodyPartExamined": "PHANTOM"}, "silent"),
        ({"BodyPartExamined": "CHEST"}, "chest"),
        ({"BodyPartExamined": "CHEST_PORT AP"}, "chest"),
        ({"BodyPartExamined": "EXTREMITY"}, "elsewhere"),
        ({"BodyPartExamined": "KNEE", "StudyDescription": "KNEE 3 VIEWS"}, "elsewhere"),
        ({"BodyPartExamined": "TSPINE", "StudyDescription": "THORACIC SPINE"}, "elsewhere"),
        ({"BodyPartExamined": "CHESTABDOMEN"}, "conflict"),
        ({"BodyPartExamined": "CHEST", "StudyDescription": "Chest and hand"}, "chest"),
        ({"BodyPartExamined": "CHEST", "StudyDescription": "Hand left"}, "conflict"),
        ({"BodyPartExamined": "ABDOMEN", "StudyDescription": "PORTABLE ABDOMEN + CHEST"}, "conflict"),
        ({"StudyDescription": "portable abdomen + chest"}, "conflict"),
        ({"StudyDescription": "Chest tube placement, C-arm"}, "chest"),
        ({"StudyDescription": "Thoraxaufnahme p.a."}, "chest"),
        ({"StudyDescription": "thorax de face"}, "chest"),
        ({"StudyDescription": "TEETH"}, "described"),
        ({"SeriesDescription": "Kniegelenk rechts"}, "described"),
        ({"StudyDescription": "unchested kneeling handheld shipment"}, "silent"),
        ({"AnatomicRegionSequence": [code("51185008", "SCT", "")]}, "chest"),
        ({"AnatomicRegionSequence": [code("T-D3000", "SRT", "Chest")]}, "chest"),
        ({"AnatomicRegionSequence": [code("39607008", "SCT", "Lung")]}, "chest"),
        ({"AnatomicRegionSequence": [code("72696002", "SCT", "")]}, "elsewhere"),
        ({"AnatomicRegionSequence": [code("T-D9200", "SRT", "")]}, "elsewhere"),
        ({"AnatomicRegionSequence": [code("416550000", "SCT", "Chest and Abdomen")]}, "conflict"),
        ({"AnatomicRegionSequence": [code("706342009", "SCT", "Phantom")]}, "silent"),
        ({"AnatomicRegionSequence": [code("17", "99SITE", "Region 17")]}, "silent"),
        ({"AnatomicRegionSequence": [code("72696002", "SCT", "Knee")], "BodyPartExamined": "CHEST"}, "conflict"),
        ({"ProcedureCodeSequence": [code("36643-5", "LN", "XR Chest 2 Views")]}, "chest"),
        ({"RequestedProcedureDescription": "XR HAND"}, "described"),
    ],
)
def test_what_a_header_says_of_the_body(elements, says):
    assert read_image(tagged(**elements)).metadata.anatomy.says == says


@pytest.mark.parametrize(
    "text", ["Tórax PA", "radiografía de tórax", "Röntgen Lunge", "RX THORAX", "Torace 2 proiezioni"]
)
@pytest.mark.parametrize("charset", ["ISO_IR 100", "ISO_IR 192"])
def test_accents_are_read_in_the_two_usual_character_sets(text, charset):
    data = tagged(SpecificCharacterSet=charset, StudyDescription=text)
    assert read_image(data).metadata.anatomy.says == "chest"


def test_the_order_s_own_item_counts_too():
    request = Dataset()
    request.RequestedProcedureDescription = "Chest portable"
    assert read_image(tagged(RequestAttributesSequence=[request])).metadata.anatomy.says == "chest"


@pytest.mark.parametrize(
    ("spacing", "extent", "outcome"),
    [
        ((0.2, 0.2), None, "passed"),
        ((0.05, 0.05), "small", "refused"),
        ((5.0, 5.0), "large", "refused"),
        ((0, 0), None, "passed"),
    ],
)
def test_a_chest_is_neither_three_centimetres_nor_two_metres(spacing, extent, outcome):
    data = tagged(ImagerPixelSpacing=list(spacing))
    assert read_image(data).metadata.anatomy.has_extent_of_chest == (extent is None)
    assert verdict(data) == outcome
    named = read_image(tagged(ImagerPixelSpacing=list(spacing), BodyPartExamined="CHEST"))
    found = judge(named.metadata.anatomy, "PA", render(named, "mimic_jpg").pixels)
    assert not found.refusal and found.doubts == (() if extent is None else ("extent_suspect",))


@pytest.mark.parametrize(
    ("elements", "view"),
    [
        ({"ViewPosition": "LL"}, "lateral"),
        ({"ViewPosition": "LATERAL"}, "lateral"),
        ({"ViewCodeSequence": [code("399067008", "SCT", "lateral")], "ViewPosition": ""}, "lateral"),
        ({"PatientOrientation": ["A", "F"], "ViewPosition": ""}, "lateral"),
        ({"SeriesDescription": "Chest lat", "ViewPosition": "", "PatientOrientation": ""}, "lateral"),
        ({"StudyDescription": "Chest PA/LAT", "ViewPosition": "", "PatientOrientation": ""}, "unknown"),
        ({"StudyDescription": "left lateral decubitus", "ViewPosition": "", "PatientOrientation": ""}, "unknown"),
        ({"SeriesDescription": "Chest lat"}, "PA"),
    ],
)
def test_a_lateral_is_a_doubt_where_a_model_knows_frontal_views_only(elements, view):
    metadata = read_image(tagged(**{"BodyPartExamined": "CHEST", **elements})).metadata
    assert metadata.view == view
    picture = phantom.draw(np.random.default_rng(3)).picture("mimic_jpg")
    assert ("view_untrained" in judge(Anatomy("chest"), view, picture, ("frontal",)).doubts) == (view == "lateral")
    assert judge(Anatomy("chest"), view, picture, ("frontal", "lateral")).doubts == ()


def test_the_gateway_is_told_what_is_no_chest():
    assert read_identity(tagged(BodyPartExamined="KNEE")).view == "elsewhere"
    assert read_identity(tagged(BodyPartExamined="CHEST")).view == "PA"


def test_a_code_s_meaning_can_widen_what_its_number_says():
    found = weigh(body_part="", regions=[Code("999999", "SCT", "Entire left lung")], descriptions=[])
    assert found.says == "chest"


# ------------------------------------------------------------------------------------------------------------- picture


def noise(rng) -> np.ndarray:
    return rng.integers(0, 256, (SIDE, SIDE)).astype(np.uint8)


def gradient(rng) -> np.ndarray:
    """A sky and a ground, as photos have them."""
    across, down = np.meshgrid(np.linspace(0, 1, SIDE), np.linspace(0, 1, SIDE))
    turn = rng.uniform(0, 2 * np.pi)
    values = np.cos(turn) * across + np.sin(turn) * down + 0.02 * rng.standard_normal((SIDE, SIDE))
    return scaled(values)


def page(rng) -> np.ndarray:
    sheet = Image.new("L", (SIDE, SIDE), 235)
    pen = ImageDraw.Draw(sheet)
    for y in range(10, SIDE - 10, 12):
        pen.text((12, y), "".join(rng.choice(list("abcdefgh nopqrst "), 36)), fill=20)
    return np.asarray(sheet)


def hand(rng) -> np.ndarray:
    """Fingers and a palm, bright on black."""
    sheet = Image.new("L", (SIDE, SIDE), 20)
    pen = ImageDraw.Draw(sheet)
    pen.ellipse((80, 130, 180, 240), fill=150)
    for angle in np.linspace(-0.6, 0.6, 5) + rng.uniform(-0.1, 0.1):
        tip = (130 + 130 * np.sin(angle), 170 - 130 * np.cos(angle))
        pen.line(((130, 170), tip), fill=150, width=20)
        pen.line(((130, 170), tip), fill=220, width=8)
    return scaled(np.asarray(sheet) + 6 * rng.standard_normal((SIDE, SIDE)))


def leg(rng) -> np.ndarray:
    """A shaft of bone in soft tissue."""
    across = np.abs(np.linspace(-1, 1, SIDE) - rng.uniform(-0.2, 0.2))[None, :].repeat(SIDE, 0)
    values = np.where(across < 0.5, 120.0, 15.0) + np.where(across < 0.18, 80.0, 0.0)
    return scaled(values + 4 * rng.standard_normal((SIDE, SIDE)))


def speck(rng) -> np.ndarray:
    sheet = np.full((SIDE, SIDE), int(rng.integers(1, 255)), np.uint8)
    sheet[:3, :3] = 0
    return sheet


def photo(rng) -> np.ndarray:
    """A picture in colours."""
    return np.stack([gradient(rng) for _ in range(3)], axis=2)


def blobs(rng) -> np.ndarray:
    """Smooth random densities."""
    coarse = Image.fromarray((rng.random((14, 14)) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def scaled(values: np.ndarray) -> np.ndarray:
    return ((values - values.min()) / np.ptp(values) * 255).astype(np.uint8)


NOT_CHESTS = (noise, gradient, page, hand, leg, speck, photo, blobs)
IMPOSSIBLE = {noise: "noise", speck: "one grey", photo: "coloured"}
DRAWN = 20


@pytest.mark.slow
@pytest.mark.parametrize("kind", NOT_CHESTS, ids=lambda kind: kind.__name__)
def test_pictures_of_something_else_are_refused_or_flagged(kind):
    verdicts = collections.Counter(verdict(png(kind(np.random.default_rng(seed)))) for seed in range(DRAWN))
    assert not verdicts["passed"] and (kind not in IMPOSSIBLE or verdicts["refused"] == DRAWN)


@pytest.mark.parametrize("kind", IMPOSSIBLE, ids=lambda kind: kind.__name__)
def test_an_impossible_picture_is_refused_whatever_the_header_says(kind):
    found = judge(Anatomy("chest"), "PA", kind(np.random.default_rng(1)))
    assert IMPOSSIBLE[kind] in found.refusal


@pytest.mark.parametrize("photometric", phantom.PHOTOMETRICS)
def test_phantoms_are_chests_with_and_without_a_word_in_the_header(photometric):
    for seed in range(25):
        drawn = phantom.draw(np.random.default_rng(seed))
        assert verdict(phantom_file.write_dicom(drawn, photometric=photometric)) == "passed"
        for preset in PRESETS:
            assert likeness(drawn.picture(preset, photometric)).chest >= MIN_CHEST, seed


def test_a_picture_that_lies_on_its_side_is_no_likeness():
    for seed in range(10):
        picture = phantom.draw(np.random.default_rng(seed)).picture("mimic_jpg")
        assert likeness(np.rot90(picture)).chest < MIN_CHEST


def collection(folder) -> collections.Counter:
    """(kind, verdict) of every file of the collection; kinds: chest, lateral, labelled, silent.

    ``labelled`` is no chest by its own header; a picture of one without header is ``silent``.
    """
    counts = collections.Counter()
    for row in csv.DictReader((folder / "MANIFEST.csv").open()):
        data = (folder / row["file"]).read_bytes()
        kind = "chest" if row["is_chest_xray"] == "yes" else "labelled"
        counts["lateral" if "LATERAL" in row["notes"] else kind, verdict(data)] += 1
        if kind == "labelled" and row["modality"] == "CR":
            counts["silent", verdict(png(render(read_image(data), "mimic_jpg").pixels))] += 1
    return counts


@pytest.mark.slow
def test_every_file_of_the_collection(shared_data):
    """No chest is refused, no other part of the body passes; docs/architecture.md has the table."""
    counts = collection(shared_data)
    chests = sum(count for (kind, _), count in counts.items() if kind == "chest")
    assert chests >= 20
    assert counts["chest", "refused"] == counts["lateral", "refused"] == 0
    assert counts["chest", "flagged"] <= 0.1 * chests
    assert counts["lateral", "passed"] == 0
    assert counts["labelled", "passed"] == counts["labelled", "flagged"] == 0 and counts["labelled", "refused"] >= 10
    assert counts["silent", "passed"] == 0 and counts["silent", "flagged"] >= 5


# -------------------------------------------------------------------------------------------------------------- served


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.mark.parametrize("part", ["EXTREMITY", "KNEE"])
def test_a_leg_is_refused_or_flagged_as_the_profile_says(sandbox, part):
    data = tagged(BodyPartExamined=part)
    with pytest.raises(NotAChest, match=f"names {part} as the part of the body; send a chest"):
        sandbox.prepare(data, **BUDGET, not_a_chest="refuse")
    flagged = sandbox.prepare(data, **BUDGET, not_a_chest="flag").facts
    assert "not_a_chest" in flagged["flags"] and flagged["region"] == "elsewhere"
    assert not DOUBTS.keys() & sandbox.prepare(data, **BUDGET).facts["flags"]  # nobody looked


def test_no_text_of_the_header_leaves_the_process(sandbox):
    data = tagged(StudyDescription="Secret^Name born 1970 hand", SeriesDescription="ID-4711")
    facts = json.dumps(sandbox.prepare(data, **BUDGET, not_a_chest="flag").facts)
    assert "region_described_elsewhere" in facts and not any(w in facts for w in ("Secret", "ID-4711", "born 1970"))
    noisy = np.random.default_rng(0).integers(0, 4096, (99, 99)).astype(np.uint16)
    with pytest.raises(NotAChest) as caught:
        sandbox.prepare(
            file_bytes(dataset_of(noisy, 12, StudyDescription="Secret knee 1970")), **BUDGET, not_a_chest="refuse"
        )
    assert "Secret" not in caught.value.message and "knee 1970" not in caught.value.message
