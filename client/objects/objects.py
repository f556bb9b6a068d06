"""A reading as standard objects: DICOM structured reports, presentation state and PDF, and a FHIR DiagnosticReport.

In go a reading and the headers of the images that were read; out come complete instances of the same study. They are
the same bytes for the same input: UIDs are made from what was asked of which images, times come from the caller. Every
object is preliminary, unverified, and carries the research-only notice.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydicom import config
from pydicom.datadict import keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import dcmread
from pydicom.tag import Tag
from pydicom.uid import RE_VALID_UID, UID, ExplicitVRLittleEndian
from pydicom.valuerep import validate_value

from cxr_triton import __version__
from cxr_triton.client.objects.codes import FHIR_SYSTEMS, PRIVATE_SCHEME, STATUSES, Concept
from cxr_triton.errors import InvalidImage, InvalidRequest
from cxr_triton.identity import UIDS, require_same_images
from cxr_triton.pixels.filetype import kind_of

if TYPE_CHECKING:
    from cxr_triton.client.page import Shown

KINDS = ("findings_sr", "text_sr", "gsps", "pdf")
MANUFACTURER = "cxr-triton"
UNVERIFIED = "AI, not verified"
NAMESPACE = uuid.UUID("b2f0e3a4-6c0b-5d0e-9a55-5d9f0b1c7e21")
IMPLEMENTATION_UID = UID(f"2.25.{uuid.uuid5(NAMESPACE, 'implementation').int}")

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
TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
          "ReferringPhysicianName", "StudyID", "AccessionNumber")  # fmt: skip
SOURCE = (
    *PATIENT_AND_STUDY, "SpecificCharacterSet", "TimezoneOffsetFromUTC", "SOPClassUID", "SOPInstanceUID",
    "SeriesInstanceUID", "Modality", "Rows", "Columns", "PhotometricInterpretation", "Manufacturer",
    "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "StationName", "InstitutionName",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "VOILUTSequence", "PixelRepresentation", "BitsStored", "PixelSpacing", "ImagerPixelSpacing",
    "NominalScannedPixelSpacing", "PixelAspectRatio",
)  # fmt: skip
SEXES = ("M", "F", "O")
CHECKED_VRS = {"AS", "CS", "DA", "DS", "DT", "IS", "TM", "UI"}
SOURCE_UIDS = ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
_UID = re.compile(r"[0-9][0-9.]{0,63}")
"""A UID by which something is filed, whether or not it has the form of PS3.5 section 9.1."""


@dataclass(frozen=True, kw_only=True)
class ObjectOptions:
    """What a reading does not say about itself.

    Attributes
    ----------
    made_at : datetime.datetime
        When the reading was made, or its images came in; every date and time of an object that is not the study's. It
        has to know its time zone.
    digests : tuple of str
        SHA-256 of each source's file, in order. They go into the UIDs, so that other bytes under the same SOP Instance
        UID give other objects; leave them out where sources are known by their UIDs alone.
    station : str
        Name of the device that made the reading, at most 16 characters.
    unchecked_reading : bool
        Take a reading that does not say which images it is of, see `cxr_triton.identity.require_same_images`.
    """

    made_at: datetime.datetime
    digests: tuple[str, ...] = ()
    station: str = "CXR_TRITON"
    unchecked_reading: bool = False

    def __post_init__(self) -> None:
        if self.made_at.tzinfo is None:
            raise ValueError(f"made_at is {self.made_at}, has to know its time zone; use datetime.astimezone()")
        if not 0 < len(self.station) <= 16 or "\\" in self.station:
            raise ValueError(f"station is {self.station!r}, allowed are 1 to 16 characters without a backslash")


def source_header(file: bytes | str | Path) -> Dataset:
    """What `result_objects` needs of a DICOM file, without its pixels.

    Parameters
    ----------
    file : bytes or path
        DICOM Part 10.

    Raises
    ------
    InvalidImage
        Not DICOM, or damaged, or with a Patient ID that cannot be decoded.
    """
    try:
        stream = io.BytesIO(file) if isinstance(file, bytes) else file
        with config.disable_value_validation():
            source = dcmread(stream, stop_before_pixels=True, specific_tags=list(SOURCE))
            source.undecoded = []
            for tag in list(source.keys()):
                try:
                    source[tag]
                except Exception:  # a value that pydicom cannot decode is no value
                    del source[tag]
                    source.undecoded.append(keyword_for_tag(tag))
    except InvalidDicomError:
        kind = kind_of(file if isinstance(file, bytes) else Path(file).read_bytes())
        raise InvalidImage(f"the file is not DICOM but {kind}; objects are made for DICOM images only") from None
    except OSError:
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
    left_out = dict.fromkeys(keyword for keyword in left_out if keyword)
    return faults + [f"{keyword} breaks its value representation; it is left out" for keyword in left_out]


def result_objects(
    reading: dict[str, Any],
    sources: Sequence[Dataset],
    *,
    kinds: Sequence[str] = ("findings_sr", "text_sr"),
    pictures: Sequence[Shown] = (),
    options: ObjectOptions,
) -> list[Dataset]:
    """The DICOM instances of a reading, ready to be stored.

    Parameters
    ----------
    reading : dict
        READING, as ``docs/reading.schema.json`` describes it.
    sources : sequence of pydicom.Dataset
        Headers of the images that were read, in the reading's order: prior first, current last. See `source_header`.
    kinds : sequence of str
        Of `KINDS`. ``gsps`` gives one presentation state for each image with a box, so possibly none.
    pictures : sequence of Shown
        Of the sources, as `cxr_triton.client.page.draw` gives them, for the ``pdf``; none leaves them out of it.
    options : ObjectOptions

    Returns
    -------
    list of pydicom.Dataset
        In the order of `kinds`, with file meta information, Explicit VR Little Endian, UTF-8. They belong to the study
        of the current image.

    Raises
    ------
    InvalidRequest
        An unknown kind; the sources are of several patients.
    ReadingMismatch
        The reading is of other images than `sources`, by their UIDs; or does not say of which.
    InvalidImage
        A source lacks a UID, or its Patient ID cannot be decoded.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise InvalidRequest(f"kinds: {kind!r} is none of {', '.join(KINDS)}")
    with config.disable_value_validation():  # pydicom's warnings would put a header's values into logs
        study = Study(reading, sources, options, pictures)
        return [instance for kind in kinds for instance in _instances(kind, study)]


def _instances(kind: str, study: Study) -> list[Dataset]:
    match kind:
        case "findings_sr":
            from cxr_triton.client.objects.sr import findings_report as write
        case "text_sr":
            from cxr_triton.client.objects.sr import text_report as write
        case "gsps":
            from cxr_triton.client.objects.presentation import presentation_states as write
        case "pdf":
            from cxr_triton.client.objects.pdf import pdf_report as write
    return write(study)


def diagnostic_report(reading: dict[str, Any], sources: Sequence[Dataset], *, options: ObjectOptions) -> dict[str, Any]:
    """FHIR R4 DiagnosticReport of a reading, with the findings as contained Observations.

    Parameters and errors are those of `result_objects`.
    """
    from cxr_triton.client.objects.fhir import report

    with config.disable_value_validation():
        return report(Study(reading, sources, options))


class Study:
    """A reading, its sources, their pictures and the options, checked against each other; what its objects share.

    Attributes
    ----------
    current : pydicom.Dataset
        The last source, whose study the objects belong to.
    made_at : datetime.datetime
        `ObjectOptions.made_at` in the source's time zone where it names one.
    """

    def __init__(
        self,
        reading: dict[str, Any],
        sources: Sequence[Dataset],
        options: ObjectOptions,
        pictures: Sequence[Shown] = (),
    ):
        if not sources:
            raise InvalidRequest("no source image: objects are made for readings of DICOM images")
        if len(pictures) not in (0, len(sources)):
            raise InvalidRequest(f"{len(pictures)} pictures of {len(sources)} sources; give one of each, or none")
        _check_reading(reading)
        names = [f"source {i + 1} of {len(sources)}" for i in range(len(sources))]
        for source, facts, name in zip(sources, reading["images"], names, strict=False):
            _check_source(source, facts, name)
        given = [{key: str(source.get(name.replace(" ", ""))) for key, name in UIDS.items()} for source in sources]
        require_same_images(reading["images"], given, names=names, unchecked_reading=options.unchecked_reading)
        patients = {str(source.get("PatientID") or "").strip() for source in sources} - {""}
        if len(patients) > 1:
            raise InvalidRequest(f"the sources have {len(patients)} different Patient IDs; send one patient's images")
        if any("\ufffd" in patient for patient in patients):
            raise InvalidImage("Patient ID is not of the file's Specific Character Set; correct the file's header")
        self.reading, self.sources, self.options, self.pictures = reading, tuple(sources), options, tuple(pictures)
        self.current = sources[-1]
        self._offset = str(self.current.get("TimezoneOffsetFromUTC") or "").strip()
        self.made_at = options.made_at
        if re.fullmatch(r"[+-](0\d|1[0-4])[0-5]\d", self._offset):
            sign = -1 if self._offset[0] == "-" else 1
            minutes = sign * (60 * int(self._offset[1:3]) + int(self._offset[3:]))
            self.made_at = self.made_at.astimezone(datetime.timezone(datetime.timedelta(minutes=minutes)))
        else:
            self._offset = ""

    @property
    def algorithm(self) -> str:
        """Name of the model, for people."""
        model = self.reading["model"]
        return str(model.get("title") or model.get("profile") or "unnamed model")

    @property
    def algorithm_version(self) -> str:
        model = self.reading["model"]
        parts = [model.get("revision"), model.get("engine"), model.get("precision")]
        return " ".join(str(part) for part in parts if part) or "unknown"

    @property
    def bundle(self) -> str:
        """Digest of the engine bundle; it identifies weights, engine and configuration."""
        return str(self.reading["model"].get("bundle") or "unknown")

    def uid(self, *parts: str) -> str:
        """A UID that is the same whenever the same is asked of the same images (PS3.5 B.2)."""
        model = self.reading["model"]
        key = [
            [str(source.SOPInstanceUID) for source in self.sources],
            list(self.options.digests),
            model.get("bundle") or [self.algorithm, self.algorithm_version],
            self.reading["task"],
            self.reading["prompt"],
            list(parts),
        ]
        return f"2.25.{uuid.uuid5(NAMESPACE, json.dumps(key)).int}"

    def device_uid(self) -> str:
        return f"2.25.{uuid.uuid5(NAMESPACE, json.dumps(['device', self.algorithm, self.bundle])).int}"

    def instance(self, kind: str, sop_class: str, modality: str, description: str, *, part: str = "") -> Dataset:
        """A data set with every module that is not of one kind of object.

        Parameters
        ----------
        kind : str
            Of `KINDS`.
        description : str
            Completes the series description; `UNVERIFIED` comes first.
        part : str
            Tells several instances of one kind apart; they share a series.
        """
        instance = Dataset()
        instance.SpecificCharacterSet = "ISO_IR 192"
        copy_attributes(self.current, instance, PATIENT_AND_STUDY)
        for keyword in TYPE_2:
            if keyword not in instance:
                setattr(instance, keyword, None)
        if instance.PatientSex not in SEXES:
            instance.PatientSex = None
        if self._offset:
            instance.TimezoneOffsetFromUTC = self._offset
        instance.SOPClassUID, instance.SOPInstanceUID = sop_class, self.uid(kind, "instance", part)
        instance.SeriesInstanceUID, instance.Modality = self.uid(kind, "series"), modality
        instance.SeriesNumber, instance.InstanceNumber = 9001 + KINDS.index(kind), 1
        instance.SeriesDescription = f"{UNVERIFIED}: {description}"
        date, time = self.made_at.strftime("%Y%m%d"), self.made_at.strftime("%H%M%S")
        instance.SeriesDate = instance.ContentDate = instance.InstanceCreationDate = date
        instance.SeriesTime = instance.ContentTime = instance.InstanceCreationTime = time
        instance.InstanceCreatorUID = IMPLEMENTATION_UID
        instance.Manufacturer, instance.ManufacturerModelName = MANUFACTURER, long_string(self.algorithm)
        instance.DeviceSerialNumber = self.bundle[:64]
        instance.SoftwareVersions = [__version__, long_string(self.algorithm_version)]
        instance.StationName = self.options.station
        instance.ContributingEquipmentSequence = self._equipment()
        instance.CodingSchemeIdentificationSequence = [_coding_scheme()]
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = instance.SOPClassUID, instance.SOPInstanceUID
        meta.TransferSyntaxUID, meta.ImplementationClassUID = ExplicitVRLittleEndian, IMPLEMENTATION_UID
        meta.ImplementationVersionName = f"CXR_TRITON_{__version__}"[:16]
        instance.file_meta = meta
        return instance

    def references(self) -> tuple[list[Dataset], list[Dataset]]:
        """Items for the sources of the current study, and for those of other studies, by study and series."""
        groups: dict[str, dict[str, list[Dataset]]] = {}
        for source in self.sources:
            series = groups.setdefault(str(source.StudyInstanceUID), {})
            instances = series.setdefault(str(source.SeriesInstanceUID), [])
            if source.SOPInstanceUID not in [item.ReferencedSOPInstanceUID for item in instances]:
                instances.append(reference(source))
        current, others = [], []
        for study_uid, series in groups.items():
            item = Dataset()
            item.StudyInstanceUID, item.ReferencedSeriesSequence = study_uid, []
            for series_uid, instances in series.items():
                member = Dataset()
                member.SeriesInstanceUID, member.ReferencedSOPSequence = series_uid, instances
                item.ReferencedSeriesSequence.append(member)
            (current if study_uid == self.current.StudyInstanceUID else others).append(item)
        return current, others

    def _equipment(self) -> list[Dataset]:
        """Contributing Equipment: what acquired the current image, as far as it says, and the algorithm."""
        acquisition = Dataset()
        copy_attributes(
            self.current,
            acquisition,
            ("Manufacturer", "ManufacturerModelName", "SoftwareVersions", "DeviceSerialNumber", "StationName",
             "InstitutionName"),
        )  # fmt: skip
        algorithm = Dataset()
        algorithm.Manufacturer, algorithm.ManufacturerModelName = MANUFACTURER, long_string(self.algorithm)
        algorithm.SoftwareVersions = [__version__, long_string(self.algorithm_version)]
        algorithm.DeviceSerialNumber, algorithm.DeviceUID = self.bundle[:64], self.device_uid()
        algorithm.StationName = self.options.station
        algorithm.ContributionDateTime = self.made_at.strftime("%Y%m%d%H%M%S%z")
        algorithm.ContributionDescription = f"Machine reading ({UNVERIFIED})"
        algorithm.PurposeOfReferenceCodeSequence = [code_item(Concept("109102", "DCM", "Processing Equipment"))]
        if not acquisition.get("Manufacturer"):
            return [algorithm]
        acquisition.PurposeOfReferenceCodeSequence = [code_item(Concept("109101", "DCM", "Acquisition Equipment"))]
        return [acquisition, algorithm]


def copy_attributes(source: Dataset, target: Dataset, keywords: Sequence[str]) -> list[str]:
    """Copy elements as decoded text, so that the target's character set encodes them.

    A date, number or code that breaks its VR stays out; names and other free text are copied as they are, and so are
    UIDs, because things are filed by them.

    Returns
    -------
    list of str
        Keywords of what stayed out, elements of nested items among them.
    """
    left_out = []
    for keyword in keywords:
        _copy(source, target, tag_for_keyword(keyword), left_out)
    return left_out


def code_item(concept: Concept) -> Dataset:
    """A code sequence's item (PS3.3 section 8.8), with the RadLex equivalent where the concept has one."""
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = concept[:3]
    if concept.radlex:
        item.EquivalentCodeSequence = [code_item(Concept(concept.radlex[0], "RADLEX", concept.radlex[1]))]
    return item


def reference(source: Dataset) -> Dataset:
    """Referenced SOP Class and Instance UID of an image."""
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    return item


def free_text(text: object) -> str:
    """Text that a UT or ST value can hold: CR LF line ends, no control characters or lone surrogates, never empty.

    Spaces at the end are padding there (PS3.5 section 6.2), so they go.
    """
    text = re.sub(r"\r\n?", "\n", str(text)).encode("utf-8", "replace").decode("utf-8")
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text).replace("\n", "\r\n")
    return text.rstrip(" ") or "(empty)"


def long_string(text: object) -> str:
    """Text that an LO value can hold: one line, no backslash, at most 64 characters."""
    return " ".join(free_text(text).replace("\\", "/").split())[:64]


def _check_reading(reading: dict[str, Any]) -> None:
    if reading["status"] not in STATUSES:
        raise InvalidRequest(f"the reading's status is {reading['status']!r}, expected one of {', '.join(STATUSES)}")
    for number, box in enumerate(reading["boxes"], 1):
        if box["image"] is not None and not 0 <= box["image"] < len(reading["images"]):
            raise InvalidRequest(
                f"box {number} is on image {box['image']}, the reading has images 0 to {len(reading['images']) - 1}; "
                "give a reading as the server wrote it"
            )


def _check_source(source: Dataset, facts: dict[str, Any], name: str) -> None:
    for keyword in SOURCE_UIDS:
        if not _UID.fullmatch(str(source.get(keyword) or "")):
            raise InvalidImage(f"{name} has no valid {keyword}; objects can only be made for a complete DICOM image")
    stored = source.get("Rows"), source.get("Columns")
    if not all(isinstance(size, int) and size > 0 for size in stored):
        raise InvalidImage(f"{name} has no Rows and Columns; objects can only be made for an image")
    read = facts.get("rows"), facts.get("columns")
    if None not in read and read != stored:
        raise InvalidRequest(
            f"{name} has {stored[0]} rows and {stored[1]} columns, the image that was read {read[0]} and {read[1]}; "
            "give the files that were read, in their order"
        )


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
        items = []
        for source in value:
            item = Dataset()
            for tag in sorted(source.keys() - {tag_for_keyword("SpecificCharacterSet")}):
                _copy(source, item, tag, left_out)
            items.append(item)
        return DataElement(element.tag, "SQ", items)
    if element.VR == "PN":
        value = [str(name) for name in value] if element.VM > 1 else str(value)
    if element.VR in CHECKED_VRS:
        for part in value if element.VM > 1 else [value]:
            if not (element.VR == "UI" and _UID.fullmatch(str(part))):
                validate_value(element.VR, str(part or ""), config.RAISE)
    return DataElement(element.tag, element.VR, value, validation_mode=config.IGNORE)


def _coding_scheme() -> Dataset:
    item = Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeName = PRIVATE_SCHEME, "cxr-triton concepts"
    item.CodingSchemeUID = FHIR_SYSTEMS[PRIVATE_SCHEME].removeprefix("urn:oid:")
    item.CodingSchemeResponsibleOrganization = MANUFACTURER
    return item


def file_digest(data: bytes) -> str:
    """SHA-256 of a source's file, for `ObjectOptions.digests`."""
    return hashlib.sha256(data).hexdigest()
