"""Headers of the images that were read: what objects of a reading take of them, and what of it breaks the standard."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from pydicom import config
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.tag import Tag
from pydicom.uid import RE_VALID_UID
from pydicom.valuerep import validate_value

from cxr_triton.errors import InvalidImage
from cxr_triton.pixels.filetype import has_prefix, kind_of
from cxr_triton.pixels.part10 import excerpt

# PS3.3 C.7.1.1 Patient, C.7.1.3 Clinical Trial Subject, C.7.2.1 General Study, C.7.2.2 Patient Study, C.7.2.3 Clinical
# Trial Study: what an object shares with the images of its study.
PATIENT_AND_STUDY = (
    "PatientName", "PatientID", "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "TypeOfPatientID",
    "PatientBirthDate", "PatientBirthTime", "PatientSex", "OtherPatientIDsSequence", "OtherPatientNames", "EthnicGroup",
    "PatientComments", "QualityControlSubject", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
    "ClinicalTrialSponsorName", "ClinicalTrialProtocolID", "ClinicalTrialProtocolName", "ClinicalTrialSiteID",
    "ClinicalTrialSiteName", "ClinicalTrialSubjectID", "ClinicalTrialSubjectReadingID",
    "StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber",
    "IssuerOfAccessionNumberSequence", "StudyDescription", "PhysiciansOfRecord", "ProcedureCodeSequence",
    "PatientAge", "PatientSize", "PatientWeight", "AdmissionID", "IssuerOfAdmissionIDSequence",
    "ClinicalTrialTimePointID", "ClinicalTrialTimePointDescription",
)  # fmt: skip
SOURCE = (
    *PATIENT_AND_STUDY, "SpecificCharacterSet", "TimezoneOffsetFromUTC", "SOPClassUID", "SOPInstanceUID",
    "SeriesInstanceUID", "Modality", "Rows", "Columns", "PhotometricInterpretation", "Manufacturer",
    "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "StationName", "InstitutionName",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "PixelRepresentation", "BitsStored", "PixelSpacing", "ImagerPixelSpacing",
    "NominalScannedPixelSpacing", "PixelAspectRatio",
)  # fmt: skip
_SOURCE_TAGS = frozenset(tag for keyword in SOURCE if (tag := tag_for_keyword(keyword)))
SEXES = ("M", "F", "O")
CHECKED_VRS = {"AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI"}
SOURCE_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
FILED_UID = re.compile(r"[0-9][0-9.]{0,63}")
"""A UID by which something is filed, whether or not it has the form of PS3.5 section 9.1."""


def source_header(file: bytes | str | Path) -> Dataset:
    """What `result_objects` needs of a DICOM file, without its pixels.

    pydicom sees an excerpt of bounded size: it inflates without limit, and reads an item of a sequence in microseconds.

    Parameters
    ----------
    file : bytes or path
        DICOM Part 10.

    Raises
    ------
    InvalidImage
        Not DICOM, or damaged, or with a Patient ID that cannot be decoded.
    """
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
    if not has_prefix(data):
        raise InvalidImage(f"the file is not DICOM but {kind_of(data)}; objects are made for DICOM images only")
    try:
        header, left_out = excerpt(data, _SOURCE_TAGS)
        with config.disable_value_validation():
            source = dcmread(io.BytesIO(header))
            source.undecoded = [keyword_for_tag(tag) for tag in left_out]
            for tag in list(source.keys()):
                try:
                    source[tag]
                except Exception:  # a value that pydicom cannot decode is no value
                    del source[tag]
                    source.undecoded.append(keyword_for_tag(tag) or str(tag))
    except InvalidImage:
        raise
    except Exception as error:  # pydicom has no closed set of errors, and their texts quote the header
        raise InvalidImage(f"the file's header is damaged ({type(error).__name__}); send it again") from None
    if "PatientID" in source.undecoded:
        raise InvalidImage("the file's Patient ID cannot be decoded; correct the file's header")
    return source


def header_faults(source: Dataset) -> list[str]:
    """What objects of an image keep though the standard forbids it, and what they leave out; without the values.

    Parameters
    ----------
    source : pydicom.Dataset
        See `source_header`.

    Returns
    -------
    list of str
        A sentence for each; they name attributes and are free of patient data.
    """
    faults = [
        f"{keyword} is no valid UID (PS3.5 section 9.1); it is kept as it is"
        for keyword in SOURCE_UIDS
        if source.get(keyword) and not re.fullmatch(RE_VALID_UID, str(source.get(keyword)))
    ]
    with config.disable_value_validation():
        left_out = [*getattr(source, "undecoded", ()), *copy_attributes(source, Dataset(), PATIENT_AND_STUDY)]
    if source.get("PatientSex") and source.PatientSex not in SEXES:
        left_out.append("PatientSex")
    faults += [f"{keyword} breaks its value representation; it is left out" for keyword in dict.fromkeys(left_out)]
    return faults


def copy_attributes(source: Dataset, target: Dataset, keywords: Sequence[str]) -> list[str]:
    """Copy elements as decoded text, so that the target's character set encodes them.

    A date, number or code that breaks its VR stays out; names and other free text are copied as they are, and so are
    UIDs, because things are filed by them.

    Returns
    -------
    list of str
        Keywords of what stayed out, elements of nested items among them.
    """
    left_out: list[str] = []
    for keyword in keywords:
        _copy(source, target, Tag(keyword), left_out)
    return left_out


def item(**attributes: object) -> Dataset:
    """A data set with attributes by their keywords, as the items of sequences are."""
    dataset = Dataset()
    for keyword, value in attributes.items():
        setattr(dataset, keyword, value)
    return dataset


def reference(source: Dataset) -> Dataset:
    """Referenced SOP Class and Instance UID of an image."""
    return item(ReferencedSOPClassUID=source.SOPClassUID, ReferencedSOPInstanceUID=source.SOPInstanceUID)


def _copy(source: Dataset, target: Dataset, tag: int, left_out: list[str]) -> None:
    if tag not in source:
        return
    try:
        target[tag] = _copied(source[tag], left_out)
    except Exception:  # a value that breaks its VR, or that pydicom cannot decode
        left_out.append(keyword_for_tag(tag) or str(Tag(tag)))


def _copied(element: DataElement, left_out: list[str]) -> DataElement:
    """A copy that holds no bytes of the source's character set.

    Raises
    ------
    ValueError
        The value breaks its VR.
    """
    value = element.value
    if element.VR == "SQ":
        copies = [(source, Dataset()) for source in value]
        for source, copy in copies:
            for tag in sorted(source.keys() - {tag_for_keyword("SpecificCharacterSet")}):
                _copy(source, copy, tag, left_out)
        return DataElement(element.tag, "SQ", [copy for _, copy in copies])
    if element.VR == "PN":
        value = [str(name) for name in value] if element.VM > 1 else str(value)
    if element.VR in CHECKED_VRS:
        for part in value if element.VM > 1 else [value]:
            if not (element.VR == "UI" and FILED_UID.fullmatch(str(part))):
                validate_value(element.VR, str(part or ""), config.RAISE)
    return DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)
