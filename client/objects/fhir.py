"""A reading as a FHIR R4 DiagnosticReport, with its findings, its device and its images inside."""

from __future__ import annotations

import base64
import re
from html import escape
from typing import Any

from cxr_triton import __version__
from cxr_triton.client.objects.codes import (
    FHIR_SYSTEMS,
    PRESENT,
    SCORE,
    STATUS,
    STATUSES,
    Concept,
    label_concept,
    presence,
)
from cxr_triton.client.objects.statements import box_text, flags, has_area, notice, statements, told_scores
from cxr_triton.client.objects.study import MANUFACTURER, UNVERIFIED, Study

DICOM_UID = "urn:dicom:uid"
NO_UNITS = {"system": "http://unitsofmeasure.org", "code": "1"}


def report(study: Study) -> dict[str, Any]:
    """The resource. Its status is ``partial``: in FHIR that is what may be unverified, ``preliminary`` is verified."""
    reading = study.reading
    observations = _observations(study)
    findings, impression = statements(reading)
    conclusion = "\n".join([notice(reading), *findings, *impression])
    resource = {
        "resourceType": "DiagnosticReport",
        "id": study.uid("fhir"),
        "meta": {"security": [_coding("http://terminology.hl7.org/CodeSystem/v3-ActReason", "HRESCH")]},
        "text": {
            "status": "generated",
            "div": f'<div xmlns="http://www.w3.org/1999/xhtml"><p>{_xhtml(conclusion)}</p></div>',
        },
        "contained": [_device(study), _patient(study), *observations],
        "identifier": [{"system": DICOM_UID, "value": f"urn:oid:{study.uid('fhir')}"}],
        "status": "partial",
        "category": [{"coding": [_coding("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")]}],
        "code": {"coding": [_coding(FHIR_SYSTEMS["LN"], "18748-4", "Diagnostic imaging study")]},
        "subject": {"reference": "#patient"},
        "issued": study.made_at.isoformat(timespec="seconds"),
        "result": [{"reference": f"#{observation['id']}"} for observation in observations],
        "imagingStudy": [_study_reference(uid) for uid in dict.fromkeys(s.StudyInstanceUID for s in study.sources)],
        "conclusion": conclusion,
        "conclusionCode": [
            {**_concept(label_concept(label)), "text": _text(label)}
            for label, value in presence(reading).items()
            if value is PRESENT
        ],
        "presentedForm": [
            {
                "contentType": "text/plain; charset=utf-8",
                "title": f"Text of the algorithm ({UNVERIFIED})",
                "data": base64.b64encode(_text(reading["text"]).encode()).decode(),
            }
        ],
    }
    if date := _date(study.current.get("StudyDate")):
        resource["effectiveDateTime"] = date
    if accession := str(study.current.get("AccessionNumber") or "").strip():
        order = {
            "type": {"coding": [_coding("http://terminology.hl7.org/CodeSystem/v2-0203", "ACSN")]},
            "value": accession,
        }
        resource["basedOn"] = [{"type": "ServiceRequest", "identifier": order}]
    return {key: value for key, value in resource.items() if value}


def _observations(study: Study) -> list[dict[str, Any]]:
    """Status of the reading, presence of each label, and each box with its outline in words."""
    reading = study.reading
    common: dict[str, Any] = {
        "resourceType": "Observation",
        "status": "preliminary",
        "category": [
            {"coding": [_coding("http://terminology.hl7.org/CodeSystem/observation-category", "imaging", "Imaging")]}
        ],
        "subject": {"reference": "#patient"},
        "issued": study.made_at.isoformat(timespec="seconds"),
        "device": {"reference": "#device"},
        "derivedFrom": [_study_reference(study.current.StudyInstanceUID)],
    }
    status = {**common, "code": _concept(STATUS), "valueCodeableConcept": _concept(STATUSES[reading["status"]])}
    notes = [notice(reading), *flags(reading), *told_scores(study.scores)]
    status["note"] = [{"text": _text(text)} for text in notes]
    observations = [status]
    called, scores = presence(reading), study.label_scores
    for label in dict.fromkeys([*called, *scores]):
        finding = label_concept(label)
        observation = {**common, "code": {**_concept(finding), "text": _text(label)}}
        if finding.site:
            observation["bodySite"] = _concept(finding.site)
        if label in called:
            observation["valueCodeableConcept"] = _concept(called[label])
        if label in scores:
            observation["component"] = [
                {"code": _concept(SCORE), "valueQuantity": {"value": scores[label], **NO_UNITS}}
            ]
        observations.append(observation)
    for box in reading["boxes"]:
        label = _text(box["label"] or "unnamed region")
        text = box_text(box, len(reading["images"]))
        if has_area(box):
            text += f"; SOP Instance UID {study.sources[box['image']].SOPInstanceUID}"
        observations.append({**common, "code": {"text": f"Box: {label}"}, "valueString": _text(text)})
    return [{"id": f"observation-{i}", **observation} for i, observation in enumerate(observations, 1)]


def _device(study: Study) -> dict[str, Any]:
    return {
        "resourceType": "Device",
        "id": "device",
        "identifier": [{"system": DICOM_UID, "value": f"urn:oid:{study.device_uid()}"}],
        "manufacturer": MANUFACTURER,
        "deviceName": [{"name": _text(study.algorithm), "type": "model-name"}],
        "serialNumber": study.bundle,
        "version": [{"value": __version__}, {"value": _text(study.algorithm_version)}],
        "note": [{"text": _text(notice(study.reading))}],
    }


def _patient(study: Study) -> dict[str, Any]:
    source = study.current
    patient: dict[str, Any] = {"resourceType": "Patient", "id": "patient"}
    if identifier := str(source.get("PatientID") or "").strip():
        patient["identifier"] = [{"value": _text(identifier)}]
        if issuer := str(source.get("IssuerOfPatientID") or "").strip():
            patient["identifier"][0]["assigner"] = {"display": _text(issuer)}
    if name := str(source.get("PatientName") or "").strip("^= "):
        names: list[dict[str, Any]] = []
        for group in filter(None, _text(name).split("=")):
            family, *given = group.split("^")[:3]
            entry = {
                "text": " ".join(group.split("^")).strip(),
                "family": family.strip(),
                "given": [part.strip() for part in given if part.strip()],
            }
            names.append({key: part for key, part in entry.items() if part})
        patient["name"] = [name for name in names if name]
    if date := _date(source.get("PatientBirthDate")):
        patient["birthDate"] = date
    if gender := {"M": "male", "F": "female", "O": "other"}.get(str(source.get("PatientSex") or "")):
        patient["gender"] = gender
    return {key: value for key, value in patient.items() if value}


def _study_reference(uid: object) -> dict[str, Any]:
    return {"type": "ImagingStudy", "identifier": {"system": DICOM_UID, "value": f"urn:oid:{uid}"}}


def _concept(concept: Concept) -> dict[str, Any]:
    codings = [_coding(FHIR_SYSTEMS[concept.scheme], concept.value, concept.meaning)]
    if concept.radlex:
        codings.append(_coding(FHIR_SYSTEMS["RADLEX"], *concept.radlex))
    return {"coding": codings, "text": concept.meaning}


def _coding(system: str, code: str, display: str = "") -> dict[str, str]:
    return {"system": system, "code": code, **({"display": display} if display else {})}


def _date(value: object) -> str | None:
    """A DICOM date as FHIR writes it; None for anything else."""
    match = re.fullmatch(r"(\d{4})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])", str(value or "").strip())
    return "-".join(match.groups()) if match else None


def _text(text: object) -> str:
    """Text that a FHIR string can hold."""
    text = str(text).encode("utf-8", "replace").decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text).strip() or "\ufffd"


def _xhtml(text: str) -> str:
    return escape(_text(text)).replace("\n", "<br/>")
