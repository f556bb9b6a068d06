"""What the objects of a reading share: patient, study, algorithm, times and UIDs; and values as DICOM holds them."""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from cxr_triton import __version__
from cxr_triton.client.objects import KINDS
from cxr_triton.client.objects.codes import FHIR_SYSTEMS, LABELS, PRIVATE_SCHEME, STATUSES, Concept
from cxr_triton.client.objects.source import (
    FILED_UID,
    PATIENT_AND_STUDY,
    SEXES,
    SOURCE_UIDS,
    copy_attributes,
    item,
    reference,
)
from cxr_triton.errors import InvalidImage, InvalidRequest
from cxr_triton.identity import UIDS, require_same_images

if TYPE_CHECKING:
    from cxr_triton.client.page import Shown

MANUFACTURER = "cxr-triton"
UNVERIFIED = "AI, not verified"
NAMESPACE = uuid.UUID("b2f0e3a4-6c0b-5d0e-9a55-5d9f0b1c7e21")
IMPLEMENTATION_UID = UID(f"2.25.{uuid.uuid5(NAMESPACE, 'implementation').int}")

TYPE_2 = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
          "ReferringPhysicianName", "StudyID", "AccessionNumber")  # fmt: skip


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
    scores : bool
        Write the reading's scores too, where it has any.
    """

    made_at: datetime.datetime
    digests: tuple[str, ...] = ()
    station: str = "CXR_TRITON"
    unchecked_reading: bool = False
    scores: bool = False

    def __post_init__(self) -> None:
        if self.made_at.tzinfo is None:
            raise ValueError(f"made_at is {self.made_at}, has to know its time zone; use datetime.astimezone()")
        if not 0 < len(self.station) <= 16 or "\\" in self.station:
            raise ValueError(f"station is {self.station!r}, allowed are 1 to 16 characters without a backslash")


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
        """Revision of the weights, engine and precision."""
        model = self.reading["model"]
        parts = [model.get("revision"), model.get("engine"), model.get("precision"), model.get("adapter")]
        return " ".join(str(part) for part in parts if part) or "unknown"

    @property
    def bundle(self) -> str:
        """Digest of the engine bundle; it identifies weights, engine and configuration."""
        return str(self.reading["model"].get("bundle") or "unknown")

    @property
    def scores(self) -> dict[str, float]:
        """Those of the reading that are to be written, by label or option."""
        return self.reading.get("scores", {}) if self.options.scores else {}

    @property
    def label_scores(self) -> dict[str, float]:
        """Those of labels, which have codes."""
        labels = (*LABELS, *self.reading["model"].get("labels", ()))
        return {label: score for label, score in self.scores.items() if label in labels}

    def uid(self, *parts: str) -> str:
        """A UID that is the same whenever the same is asked of the same images (PS3.5 B.2)."""
        model = self.reading["model"]
        key = [
            [str(source.SOPInstanceUID) for source in self.sources],
            list(self.options.digests),
            model.get("bundle") or [self.algorithm, self.algorithm_version],
            self.reading["task"],
            self.reading["prompt"],
            [*parts, *(["scores"] if self.scores else [])],
        ]
        return f"2.25.{uuid.uuid5(NAMESPACE, json.dumps(key)).int}"

    def device_uid(self) -> str:
        """The same for every reading of one engine bundle."""
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
            if source.SOPInstanceUID not in [found.ReferencedSOPInstanceUID for found in instances]:
                instances.append(reference(source))
        current: list[Dataset] = []
        others: list[Dataset] = []
        for study_uid, series in groups.items():
            members = [item(SeriesInstanceUID=uid, ReferencedSOPSequence=found) for uid, found in series.items()]
            study = item(StudyInstanceUID=study_uid, ReferencedSeriesSequence=members)
            (current if study_uid == self.current.StudyInstanceUID else others).append(study)
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


def code_item(concept: Concept) -> Dataset:
    """A code sequence's item (PS3.3 section 8.8), with the RadLex equivalent where the concept has one."""
    code = item(CodeValue=concept.value, CodingSchemeDesignator=concept.scheme, CodeMeaning=concept.meaning)
    if concept.radlex:
        code.EquivalentCodeSequence = [code_item(Concept(concept.radlex[0], "RADLEX", concept.radlex[1]))]
    return code


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
        if not FILED_UID.fullmatch(str(source.get(keyword) or "")):
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


def _coding_scheme() -> Dataset:
    return item(
        CodingSchemeDesignator=PRIVATE_SCHEME,
        CodingSchemeName="cxr-triton concepts",
        CodingSchemeUID=FHIR_SYSTEMS[PRIVATE_SCHEME].removeprefix("urn:oid:"),
        CodingSchemeResponsibleOrganization=MANUFACTURER,
    )
