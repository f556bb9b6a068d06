"""The objects of a reading: identity, honesty about what was said, and what comes from the image's header."""

import datetime
import io
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pydicom
import pytest
from click.testing import CliRunner
from fake_server import FakeServer, response
from fhir.resources.R4B.diagnosticreport import DiagnosticReport
from hypothesis import given, settings
from hypothesis import strategies as st
from sr_case import OPTIONS, file, header, identity, reading, with_boxes

from cxr_triton import cli
from cxr_triton.client.objects import KINDS
from cxr_triton.client.objects.codes import ABSENT, LABELS, PRESENT, STATUSES, label_concept, presence
from cxr_triton.client.objects.results import diagnostic_report, result_objects
from cxr_triton.client.objects.source import header_faults, source_header
from cxr_triton.client.objects.study import ObjectOptions
from cxr_triton.errors import InvalidImage, InvalidRequest, ReadingMismatch
from cxr_triton.identity import sha256
from cxr_triton.reading import STATUSES as READING_STATUSES
from cxr_triton.reading import Reading

TESTS = Path(__file__).resolve().parents[1]


def data(instance) -> bytes:
    out = io.BytesIO()
    instance.save_as(out, enforce_file_format=True)
    return out.getvalue()


def objects(source=None, read=None, kinds=KINDS, options=OPTIONS) -> list:
    source = header() if source is None else source
    return result_objects(with_boxes(source) if read is None else read, [source], kinds=kinds, options=options)


def said(instance) -> str:
    """All text values of a report."""
    texts = [instance.TextValue] if "TextValue" in instance else []
    return "\n".join(texts + [said(item) for item in instance.get("ContentSequence", ())])


def other(options=OPTIONS, **changes) -> ObjectOptions:
    return ObjectOptions(**{**vars(options), **changes})


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_in_another_process():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.path.insert(0, sys.argv[2]);"
        "from test_objects import data, objects, sha256;"
        "print(*[sha256(data(instance)) for instance in objects()])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(TESTS), str(TESTS / "unit")],
        env={**os.environ, "PYTHONHASHSEED": "1", "TZ": "Asia/Tokyo"},
        capture_output=True,
        check=True,
        text=True,
    )
    digests = [sha256(data(instance)) for instance in objects()]
    assert ran.stdout.split() == digests and len(digests) == len(KINDS)


def test_uids_follow_what_was_asked_of_which_images_and_not_the_clock_or_the_text():
    source = header()
    base = reading(source)

    def uid(source=source, read=base, options=OPTIONS):
        (instance,) = objects(source, read, ["text_sr"], options)
        return instance.SOPInstanceUID

    later = other(made_at=OPTIONS.made_at + datetime.timedelta(hours=1))
    again = reading(source, text="<think>Other words.</think><answer>Edema</answer>")
    assert uid() == uid(options=later) == uid(read=again)
    different = {
        uid(),
        uid(header(SOPInstanceUID="1.2.3"), reading(header(SOPInstanceUID="1.2.3"))),
        uid(options=other(digests=("cd" * 32,))),
        uid(read={**base, "prompt": "Another question"}),
        uid(read={**base, "task": "examine"}),
        uid(read={**base, "model": {**base["model"], "bundle": "f" * 64}}),
    }
    assert len(different) == 6
    every = objects()
    assert (
        len({instance.SOPInstanceUID for instance in every}) == len({i.SeriesInstanceUID for i in every}) == len(KINDS)
    )
    assert all(pydicom.uid.UID(i.SOPInstanceUID).is_valid and i.SOPInstanceUID.startswith("2.25.") for i in every)


def test_every_object_says_that_it_is_unverified_and_complete_for_storing():
    source = header()
    for instance in objects(source):
        assert "AI, not verified" in instance.SeriesDescription
        assert instance.StudyInstanceUID == source.StudyInstanceUID
        assert instance.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
        assert instance.file_meta.MediaStorageSOPInstanceUID == instance.SOPInstanceUID
        again = pydicom.dcmread(io.BytesIO(data(instance)))
        assert again.SOPClassUID == instance.SOPClassUID == again.file_meta.MediaStorageSOPClassUID
        if instance.Modality == "SR":
            assert (instance.PreliminaryFlag, instance.VerificationFlag) == ("PRELIMINARY", "UNVERIFIED")
            assert "VerifyingObserverSequence" not in instance
            assert "Not for diagnosis" in said(instance) and "A test fixture wrote this." in said(instance)


@pytest.mark.parametrize("status", READING_STATUSES)
def test_a_reading_that_is_not_well_formed_says_so_and_calls_nothing_absent(status):
    source = header()
    read = {
        "ok": reading(source),
        "malformed": reading(source, text="<answer>Edema</answer>"),
        "truncated": reading(source, finish_reason="length"),
        "out_of_vocabulary": reading(source, text="<think>a</think><answer>Edema, Hernia</answer>"),
        "doubtful_image": {**reading(source), "status": "doubtful_image"},
    }[status]
    assert read["status"] == status
    findings, text = objects(source, read, ["findings_sr", "text_sr"])
    assert findings.CompletionFlag == text.CompletionFlag == ("COMPLETE" if status == "ok" else "PARTIAL")
    assert set(READING_STATUSES) == set(STATUSES)
    assert (ABSENT in presence(read).values()) == (status == "ok")
    report = json.dumps(diagnostic_report(read, [source], options=OPTIONS))
    for words in (said(findings), said(text), report):
        assert ("This reading is" in words) == (status != "ok")
        assert ("Hernia" in words) == (status == "out_of_vocabulary")
    assert ("<answer>" in said(text)) == (status != "ok")


def test_nothing_is_invented_where_the_model_listed_nothing():
    source = header()
    read = reading(source, text="<think>a</think><answer>The lungs are clear.</answer>", answer="prose")
    assert presence(read) == {}
    findings, text = objects(source, read, ["findings_sr", "text_sr"])
    assert "The lungs are clear." in said(findings) and "The lungs are clear." in said(text)
    assert diagnostic_report(read, [source], options=OPTIONS).get("conclusionCode") is None


def test_presence_follows_the_vocabulary_and_its_hierarchy():
    source = header()

    def called(answer, **changes):
        return presence(reading(source, text=f"<think>a</think><answer>{answer}</answer>", **changes))

    assert called("Pneumonia")["Pneumonia"] is PRESENT
    assert not {"Consolidation", "Lung Opacity"} & called("Pneumonia").keys()
    assert called("Pneumonia")["Atelectasis"] is ABSENT and "No Finding" not in called("Pneumonia")
    assert called("No Finding")["Support Devices"] is ABSENT and called("No Finding")["No Finding"] is PRESENT
    assert set(called("No Finding, Support Devices").values()) == {PRESENT, ABSENT}
    assert set(called("No Finding, Edema").values()) == {PRESENT}
    assert set(called("Edema", model={"profile": "of a server that names no vocabulary"}).values()) == {PRESENT}
    assert called("Edema", model={"labels": ["Edema", "Fracture"]}) == {"Edema": PRESENT, "Fracture": ABSENT}


def test_a_label_of_another_vocabulary_gets_a_private_code():
    concept = label_concept("Hiatus\\hernia " + "x" * 100)
    assert concept.scheme == "99CXR" and len(concept.value) <= 16 and len(concept.meaning) <= 64
    assert "\\" not in concept.meaning and concept == label_concept("Hiatus\\hernia " + "x" * 100)
    assert label_concept(" pneumothorax ") == LABELS["Pneumothorax"]


def test_boxes_without_area_or_size_are_told_in_words():
    source = header()
    read = with_boxes(source, "<|ref|>line<|/ref|><|box|>(50,10),(50,90)<|/box|>")
    (findings,) = objects(source, read, ["findings_sr", "gsps"])
    assert "no area inside the image" in said(findings) and "GraphicData" not in findings.to_json()
    read["boxes"][0] |= {"pixels": None, "image": None}
    assert "line, 50 10 50 90 %" in said(objects(source, read, ["findings_sr"])[0])


@pytest.mark.parametrize("study", ["1.2.3", None])
def test_boxes_of_two_images_go_to_their_own(study):
    """A prior of another study is evidence, and has no presentation state in this one."""
    current = header()
    prior = header(
        SOPInstanceUID="1.2.3.4", SeriesInstanceUID="1.2.3.9", StudyInstanceUID=study or current.StudyInstanceUID
    )
    read = reading(prior, current)
    first, second = with_boxes(current)["boxes"]
    read["boxes"] = [{**first, "image": 0}, {**second, "image": 1}]
    findings, text, *states = result_objects(read, [prior, current], kinds=KINDS[:3], options=OPTIONS)
    shown = [s.ReferencedSeriesSequence[0].ReferencedImageSequence[0].ReferencedSOPInstanceUID for s in states]
    assert shown == ([] if study else ["1.2.3.4"]) + [current.SOPInstanceUID]
    assert len({state.SOPInstanceUID for state in states}) == len(states)
    assert {i.StudyInstanceUID for i in (findings, text, *states)} == {current.StudyInstanceUID}
    own, elsewhere = (
        findings.CurrentRequestedProcedureEvidenceSequence,
        findings.get("PertinentOtherEvidenceSequence", ()),
    )
    assert [item.StudyInstanceUID for item in own] == [current.StudyInstanceUID]
    assert [item.StudyInstanceUID for item in elsewhere] == ([study] if study else [])
    assert json.dumps(findings.to_json_dict()).count('"1.2.3.4"') >= 3 and "image 1 of 2" in said(text)


def test_a_presentation_state_repeats_the_first_voi_and_the_rescale():
    source = header(WindowCenter=["40", "50"], WindowWidth=["400", "500"], RescaleSlope="2", RescaleIntercept="-7")
    source.PhotometricInterpretation = "MONOCHROME1"
    (state,) = objects(source, kinds=["gsps"])
    (voi,) = state.SoftcopyVOILUTSequence
    assert (voi.WindowCenter, voi.WindowWidth) == (40, 400)
    assert (state.RescaleSlope, state.RescaleIntercept, state.PresentationLUTShape) == (2, -7, "INVERSE")
    assert list(state.DisplayedAreaSelectionSequence[0].DisplayedAreaBottomRightHandCorner) == [
        source.Columns,
        source.Rows,
    ]


def test_a_presentation_state_keeps_the_shape_of_a_pixel():
    for attributes, keyword, expected in (
        ({"PixelSpacing": ["0.2", "0.1"]}, "PresentationPixelSpacing", [0.2, 0.1]),
        (
            {"PixelSpacing": ["0", "0"], "ImagerPixelSpacing": ["0.15", "0.15"]},
            "PresentationPixelSpacing",
            [0.15, 0.15],
        ),
        ({"PixelAspectRatio": ["2", "1"]}, "PresentationPixelAspectRatio", [2, 1]),
        ({"PixelAspectRatio": ["2", "0"]}, "PresentationPixelAspectRatio", [1, 1]),
        ({"NominalScannedPixelSpacing": ["0.2", "0.1"]}, "PresentationPixelSpacing", [0.2, 0.1]),
        ({}, "PresentationPixelAspectRatio", [1, 1]),
    ):
        (state,) = objects(header(**attributes), kinds=["gsps"])
        assert state.DisplayedAreaSelectionSequence[0].get(keyword) == expected


def test_dates_are_the_source_s_zone_and_never_the_clock():
    made = datetime.datetime(2026, 11, 22, 2, 15, tzinfo=datetime.UTC)
    (eastern,) = objects(header(TimezoneOffsetFromUTC="-0500"), kinds=["findings_sr"], options=other(made_at=made))
    assert (eastern.ContentDate, eastern.ContentTime, eastern.TimezoneOffsetFromUTC) == ("20261121", "211500", "-0500")
    zone = datetime.timezone(datetime.timedelta(hours=2))
    (own,) = objects(kinds=["findings_sr"], options=other(made_at=made.astimezone(zone)))
    assert (own.ContentDate, own.ContentTime) == ("20261122", "041500") and "TimezoneOffsetFromUTC" not in own
    assert own.ContributingEquipmentSequence[-1].ContributionDateTime == "20261122041500+0200"
    with pytest.raises(ValueError, match="time zone"):
        ObjectOptions(made_at=datetime.datetime(2026, 11, 22))
    with pytest.raises(ValueError, match="16 characters"):
        other(station="x" * 17)


def test_broken_header_values_are_left_out_and_texts_kept(caplog, recwarn):
    """Values come out of a file as a modality wrote them; nothing of them goes into a log or a warning."""
    whole = pydicom.dcmread(io.BytesIO(file()))
    whole.PatientWeight = "11111"
    out = io.BytesIO()
    with pydicom.config.disable_value_validation():
        whole.PatientSex, whole.PatientBirthDate, whole.StudyTime, whole.PatientAge = "X", "about 1940", "late", "81"
        whole.PatientName, whole.PatientID = "DOE^JANE" + "x" * 70, "17/18 " + "y" * 70
        whole.save_as(out, enforce_file_format=True)
    caplog.set_level(logging.DEBUG)
    source = source_header(out.getvalue().replace(b"11111", b"heavy"))
    for instance in objects(source):
        data(instance)
        empty = [instance.get(k) or None for k in ("PatientSex", "PatientBirthDate", "StudyTime", "PatientAge")]
        assert empty == [None] * 4
        assert "PatientWeight" not in instance and {"PatientSex", "PatientBirthDate", "StudyTime"} <= set(
            instance.dir()
        )
        assert (instance.PatientName, instance.PatientID) == (whole.PatientName, whole.PatientID)
    assert (
        diagnostic_report(reading(source), [source], options=OPTIONS)["contained"][1].keys() & {"birthDate", "gender"}
        == set()
    )
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING] and not recwarn.list
    assert "DOE" not in caplog.text


def odd_header(**attributes) -> bytes:
    """A file whose header has values that the standard forbids."""
    whole = pydicom.dcmread(io.BytesIO(file()))
    out = io.BytesIO()
    with pydicom.config.disable_value_validation():
        for keyword, value in attributes.items():
            setattr(whole, keyword, value)
        whole.save_as(out, enforce_file_format=True)
    return out.getvalue()


uids = st.from_regex(r"[0-9][0-9.]{0,63}", fullmatch=True) | st.text("0123456789.ax-*", max_size=70)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(study=st.just("1.2.826.0.1.03.4") | uids)
def test_an_object_has_the_study_uid_of_its_image_byte_for_byte_or_is_not_made(study):
    source = source_header(odd_header(StudyInstanceUID=study))
    with pydicom.config.disable_value_validation():
        prior = header(StudyInstanceUID="1.2.00.7", SOPInstanceUID="1.2.3.08", SeriesInstanceUID="1.2.3.007")
    read = with_boxes(source)
    before = {**read["images"][0], "identity": identity(prior)}
    read |= {"images": [before, *read["images"]], "boxes": [{**box, "image": 1} for box in read["boxes"]]}
    try:
        instances = result_objects(read, [prior, source], kinds=KINDS, options=OPTIONS)
    except InvalidImage as error:
        assert "no valid StudyInstanceUID" in error.message and not re.fullmatch("[0-9][0-9.]{0,63}", study)
        return
    assert [instance.Modality for instance in instances] == ["SR", "SR", "PR", "DOC"]
    with pydicom.config.disable_value_validation():
        written = [pydicom.dcmread(io.BytesIO(data(instance))) for instance in instances]
        assert {str(instance.StudyInstanceUID) for instance in written} == {study}
        for instance in written[:2] if study != prior.StudyInstanceUID else ():
            (own,) = instance.CurrentRequestedProcedureEvidenceSequence
            (earlier,) = instance.PertinentOtherEvidenceSequence
            assert (own.StudyInstanceUID, earlier.StudyInstanceUID) == (study, "1.2.00.7")
            assert earlier.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.007"
            assert earlier.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "1.2.3.08"
    report = diagnostic_report(read, [prior, source], options=OPTIONS)
    named = [item["identifier"]["value"] for item in report["imagingStudy"]]
    assert named == list(dict.fromkeys(["urn:oid:1.2.00.7", f"urn:oid:{study}"]))


def test_what_breaks_the_standard_is_told_by_its_name(recwarn):
    other_id = pydicom.Dataset()
    with pydicom.config.disable_value_validation():
        other_id.PatientID, other_id.TypeOfPatientID = "OTHER-1", "a type"
    source = source_header(
        odd_header(
            StudyInstanceUID="1.2.03",
            PatientBirthDate="about 1940",
            PatientSex="female",
            OtherPatientIDsSequence=[other_id],
        )
    )
    faults = header_faults(source)
    assert [fault.split()[0] for fault in faults] == [
        "StudyInstanceUID", "PatientBirthDate", "PatientSex", "TypeOfPatientID"]  # fmt: skip
    assert "kept" in faults[0] and all("left out" in fault for fault in faults[1:])
    assert not [word for word in ("1.2.03", "1940", "female", "a type") if word in " ".join(faults)]
    for instance in objects(source):
        (item,) = instance.OtherPatientIDsSequence  # one broken value does not take its neighbours along
        assert item.PatientID == "OTHER-1" and "TypeOfPatientID" not in item
    assert header_faults(header()) == [] and not recwarn.list


def test_a_patient_id_that_cannot_be_decoded_is_refused():
    whole = odd_header(PatientID="ABCDE", PatientWeight="11111")
    at = whole.index(b"\x10\0\x20\0LO")
    assert header_faults(source_header(whole.replace(b"11111", b"heavy")))[0].startswith("PatientWeight")
    with pytest.raises(InvalidImage, match="Patient ID"):
        source_header(whole[: at + 4] + b"FD" + whole[at + 6 :])


def test_texts_of_nested_items_are_decoded_by_the_file_s_character_set():
    whole = pydicom.dcmread(io.BytesIO(file()))
    whole.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
    code = pydicom.Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "X1", "99LOCAL", "胸部正面"
    whole.ProcedureCodeSequence = [code]
    whole.PatientName, whole.StudyDescription = "Yamada^Tarou=山田^太郎", "胸部"
    out = io.BytesIO()
    whole.save_as(out, enforce_file_format=True)
    assert "胸部正面".encode("iso2022_jp") in out.getvalue()
    source = source_header(out.getvalue())
    for instance in objects(source):
        again = pydicom.dcmread(io.BytesIO(data(instance)))
        assert (again.SpecificCharacterSet, str(again.PatientName)) == ("ISO_IR 192", "Yamada^Tarou=山田^太郎")
        assert again.StudyDescription == "胸部" and again.ProcedureCodeSequence[0].CodeMeaning == "胸部正面"
    (findings,) = objects(source, kinds=["findings_sr"])
    procedure = [item for item in findings.ContentSequence if item.ConceptNameCodeSequence[0].CodeValue == "121058"]
    assert [item.ConceptCodeSequence[0].CodeValue for item in procedure] == ["X1"]


def test_what_cannot_become_an_object_is_refused():
    source = header()
    read = reading(source)

    def refused(error, match, *sources, read=read, **changes):
        with pytest.raises(error, match=match):
            result_objects(read, list(sources), **{"options": OPTIONS, **changes})

    refused(InvalidRequest, "no source")
    refused(InvalidRequest, "'sr' is none of", source, kinds=["sr"])
    refused(ReadingMismatch, "1 images, 2 were given", source, source)
    refused(InvalidRequest, "rows and", header(Rows=7))
    refused(InvalidImage, "no Rows", header(Rows=None), read={**read, "images": [{}]})
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"):
        refused(InvalidImage, f"no valid {keyword}", header(**{keyword: ""}))
    refused(InvalidRequest, "status is 'good'", source, read={**read, "status": "good"})
    elsewhere = with_boxes(source)
    elsewhere["boxes"][0]["image"] = 1
    refused(InvalidRequest, "box 1 is on image 1", source, read=elsewhere)
    two = header(PatientID="1"), header(PatientID="2")
    refused(InvalidRequest, "2 different Patient IDs", *two, read=reading(*two))
    refused(InvalidImage, "Patient ID is not of", header(PatientID="1\ufffd2"))
    for content, match in ((b"no DICOM", "not DICOM"), (b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0\1", "complete file")):
        with pytest.raises(InvalidImage, match=match):
            source_header(content)


def test_a_deeply_nested_header_is_a_typed_error():
    whole = pydicom.dcmread(io.BytesIO(file()), stop_before_pixels=True)
    out = io.BytesIO()
    whole.save_as(out, enforce_file_format=True)
    # Sequence and item of undefined length, 5,000 deep; pydicom walks them by recursion.
    nested = b"\x40\x00\x75\xa3SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * 5000
    with pytest.raises(InvalidImage, match="nested deeper"):
        source_header(out.getvalue() + nested)


words = st.text(st.characters(), max_size=80)
boxes = st.builds(
    lambda label, corners, whole: {
        "label": label,
        "percent": corners,
        "pixels": [0.0, 0.0, 9.0, 9.0] if whole else [min(corners), min(corners), max(corners), max(corners)],
        "image": 0,
    },
    st.none() | words,
    st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4),
    st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    said_words=words,
    prose=words,
    label=words,
    name=words,
    patient=words,
    box=boxes,
    status=st.sampled_from(tuple(READING_STATUSES)),
)
def test_any_text_is_written_and_read_back(said_words, prose, label, name, patient, box, status):
    """Whatever a model, a profile or a header says becomes valid objects, and the texts come back from the bytes."""
    source = header()
    with pydicom.config.disable_value_validation():
        source.PatientName, source.StudyDescription = name, patient
    read = reading(source, prompt=prose, notice=prose or "n")
    read |= {
        "reasoning": said_words,
        "report": prose or None,
        "status": status,
        "boxes": [box],
        "unknown_labels": [label or "x"],
    }
    read["findings"] = [{"label": label or "x", "written": "x"}]
    for instance in objects(source, read):
        again = pydicom.dcmread(io.BytesIO(data(instance)))
        if instance.Modality == "SR":
            assert said(again) == said(instance)
            assert "This reading is" in said(again) or status == "ok"
    report = diagnostic_report(read, [source], options=OPTIONS)
    DiagnosticReport.model_validate_json(json.dumps(report))
    ET.fromstring(report["text"]["div"])


def run(*args):
    return CliRunner().invoke(cli.main, ["sr", *map(str, args)])


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "chest.dcm"
    path.write_bytes(file())
    return path


def test_sr_writes_every_kind_of_a_stored_reading(image, tmp_path):
    source = source_header(image)
    stored = tmp_path / "case.json"
    stored.write_text(json.dumps(with_boxes(source)))
    os.utime(stored, (1_800_000_000, 1_800_000_000))
    contents = []
    for folder in ("one", "two"):
        ran = run(
            image, "--reading", stored, "-o", tmp_path / folder, "--kinds", ",".join((*KINDS, "fhir")), "--json", "-"
        )
        assert ran.exit_code == 0, ran.output
        result = json.loads(ran.stdout)
        assert [item["kind"] for item in result["objects"]] == [*KINDS, "fhir"] and result["status"] == "ok"
        assert b"/Subtype /Image" in Path(result["objects"][KINDS.index("pdf")]["path"]).read_bytes()
        contents.append([Path(item["path"]).read_bytes() for item in result["objects"]])
        for item in result["objects"][:-1]:
            assert pydicom.dcmread(item["path"]).SOPInstanceUID == item["sop_instance_uid"]
        assert {Path(item["path"]).name for item in result["objects"]} == {
            *(f"case-{kind}.dcm" for kind in KINDS), "case-fhir.json"}  # fmt: skip
    assert contents[0] == contents[1]


def test_objects_that_were_written_stay_when_the_disk_is_full(image, tmp_path):
    stored, out = tmp_path / "case.json", tmp_path / "out"
    stored.write_text(json.dumps(with_boxes(source_header(image))))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the text report fits, the PDF does not
    try:
        ran = run(image, "--reading", stored, "-o", out, "--kinds", "text_sr,pdf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ran.exit_code == 1 and str(out / "case-pdf.dcm") in ran.stderr
    assert [path.name for path in out.iterdir()] == ["case-text_sr.dcm"]
    assert pydicom.dcmread(out / "case-text_sr.dcm").Modality == "SR"


def test_sr_warns_of_a_study_uid_that_it_keeps(tmp_path, recwarn):
    image, stored = tmp_path / "chest.dcm", tmp_path / "case.json"
    image.write_bytes(odd_header(StudyInstanceUID="1.2.826.0.1.03.4"))
    stored.write_text(json.dumps(with_boxes(source_header(image))))
    kinds = ",".join((*KINDS, "fhir"))
    ran = run(image, "--reading", stored, "-o", tmp_path / "out", "--kinds", kinds, "--json", tmp_path / "made.json")
    assert ran.exit_code == 0, ran.output
    assert "warning: chest.dcm: StudyInstanceUID is no valid UID" in ran.stderr
    made = json.loads((tmp_path / "made.json").read_text())
    assert len(made["warnings"]) == 1 and not recwarn.list
    assert "urn:oid:1.2.826.0.1.03.4" in Path(made["objects"][-1]["path"]).read_text()
    if not shutil.which("dcmdump"):
        pytest.skip("no dcmdump: install dcmtk")
    for item in made["objects"][:-1]:
        dump = subprocess.run(["dcmdump", "+P", "0020,000d", item["path"]], capture_output=True, text=True, check=True)
        assert {line.split("[")[1].split("]")[0] for line in dump.stdout.splitlines()} == {"1.2.826.0.1.03.4"}


def test_sr_reads_through_a_server_and_tells_a_reading_that_is_not_well_formed(image, tmp_path):
    source = source_header(image)
    answer = json.dumps(reading(source, finish_reason="length"))

    def server(request, context):
        yield response("", answer, final=True)

    with FakeServer(server) as fake:
        ran = run(image, "--url", fake.url, "-o", tmp_path / "out")
    assert ran.exit_code == 3 and "Not for diagnosis" in ran.output
    assert pydicom.dcmread(tmp_path / "out" / "chest-findings_sr.dcm").CompletionFlag == "PARTIAL"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "chest-findings_sr.dcm", "chest-text_sr.dcm", "chest-fhir.json"}  # fmt: skip


def test_sr_asks_for_scores_and_says_where_there_are_none(image, tmp_path):
    source, asked = source_header(image), []
    answers = [reading(source, scores={"Edema": 2.5}), reading(source)]

    def server(request, context):
        asked.append(json.loads(request.raw_input_contents[1][4:]))
        yield response("", json.dumps(answers[len(asked) - 1]), final=True)

    with FakeServer(server) as fake:
        ran = [run(image, "--url", fake.url, "-o", tmp_path / name, "--scores", "--json", "-") for name in ("a", "b")]
    assert [each["scores"] for each in asked] == [True, True]
    assert json.loads(ran[0].stdout)["warnings"] == []
    assert "the reading has no scores" in json.loads(ran[1].stdout)["warnings"][0] and "no scores" in ran[1].stderr
    written = [(tmp_path / name / "chest-fhir.json").read_text() for name in ("a", "b")]
    assert ["Edema +2.5" in text for text in written] == [True, False]


def test_sr_refuses_what_does_not_fit(image, tmp_path):
    stored = tmp_path / "case.json"
    stored.write_text(json.dumps(reading(source_header(image))))
    png = tmp_path / "picture.png"
    png.write_bytes(b"\x89PNG\r\n\x1a\n")
    out = ("-o", tmp_path / "out")
    for args, code, words in (
        ((png, "--reading", stored, *out), 1, "[INVALID_IMAGE] the file is not DICOM"),
        ((image, image, "--reading", stored, *out), 1, "case.json is of 1 images, 2 were given"),
        ((image, "--reading", image, *out), 1, "chest.dcm: is not a reading"),
        ((image, "--reading", stored, "--kinds", "sr", *out), 2, "'sr' is none of"),
        ((image, "--reading", stored, "--task", "findings", *out), 2, "give one of them"),
        ((image, "--reading", stored), 2, "--out"),
        (("--reading", stored, *out), 2, "FILE"),
    ):
        ran = run(*args)
        assert ran.exit_code == code and words in ran.output, ran.output
    assert not list(tmp_path.glob("out/*"))


def test_a_served_reading_names_its_vocabulary(tmp_path):
    """`presence` depends on it: without the key nothing is called absent."""
    from served import write_paper_bundle

    from cxr_triton.engines.pipeline import Preprocessor

    stage = Preprocessor(write_paper_bundle(tmp_path / "bundle"))
    try:
        context = json.loads(stage.prepare([], json.dumps({"task": "quiz"})).context)
    finally:
        stage.close()
    assert context["model"]["labels"] == sorted(LABELS)


def test_readings_of_older_servers_still_become_objects():
    source = header()
    read = reading(source, model={})
    assert Reading.from_json(json.dumps(read)).model == {}
    for instance in objects(source, read):
        assert instance.ManufacturerModelName == "unnamed model" and instance.DeviceSerialNumber == "unknown"
