"""The two structured reports of a reading: TID 1500 for machines, TID 2000's layout for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from highdicom import sr
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import Comprehensive3DSRStorage, ComputedRadiographyImageStorage, EnhancedSRStorage

from cxr_triton.client.objects.codes import (
    ALGORITHM,
    LABELS,
    NAMED_REGION,
    NOTICE,
    PLAIN_RADIOGRAPHY,
    REASONING,
    SCORE,
    STATUS,
    STATUSES,
    UNTOUCHED,
    Concept,
    label_concept,
    presence,
)
from cxr_triton.client.objects.statements import (
    box_text,
    corners,
    flags,
    has_area,
    notice,
    statements,
    told_scores,
    untouched,
)
from cxr_triton.client.objects.study import MANUFACTURER, Study, code_item, free_text, long_string
from cxr_triton.reading import STATUSES as STATUS_TEXTS

COMMENT = codes.DCM.Comment
RELATION = sr.RelationshipTypeValues


def findings_report(study: Study) -> list[Dataset]:
    """Comprehensive 3D SR of TID 1500: presence of each label, boxes as regions, status, algorithm.

    One measurement group (TID 1501) is about the whole reading; each box with an area is a planar region (TID 1410).
    """
    boxes = enumerate(study.reading["boxes"], 1)
    report = sr.MeasurementReport(
        observation_context=_observation_context(study),
        procedure_reported=_procedures(study),
        imaging_measurements=[
            _whole_reading(study),
            *(_region(study, number, box) for number, box in boxes if has_area(box)),
        ],
        title=codes.DCM.ImagingMeasurementReport,
        language_of_content_item_and_descendants=_english(),
    )
    report[0].ContentSequence.insert(len(report[0].ContentSequence) - 1, _image_library(study))
    return [_document(study, "findings_sr", Comprehensive3DSRStorage, "findings", report[0])]


def _whole_reading(study: Study) -> sr.MeasurementsAndQualitativeEvaluations:
    reading = study.reading
    whole = sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(study.uid("tracking", "reading"), "Machine reading"),
        algorithm_id=_algorithm(study, [free_text(parameter) for parameter in _parameters(study)]),
        source_images=[
            sr.SourceImageForMeasurementGroup(source.SOPClassUID, source.SOPInstanceUID) for source in study.sources
        ],
        measurements=[_score(label_concept(label), score) for label, score in study.label_scores.items()] or None,
        qualitative_evaluations=[
            sr.QualitativeEvaluation(_concept(STATUS), _concept(STATUSES[reading["status"]])),
            *(_evaluation(label_concept(label), value) for label, value in presence(reading).items()),
        ],
    )
    whole[0].ContentSequence.extend(_text(COMMENT, text) for text in _comments(study))
    return whole


def _region(study: Study, number: int, box: dict[str, Any]) -> sr.PlanarROIMeasurementsAndQualitativeEvaluations:
    source = study.sources[box["image"]]
    label, concept = free_text(box["label"] or "unnamed region"), _box_concept(box)
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(study.uid("tracking", f"box {number}"), label),
        referenced_region=sr.ImageRegion(
            sr.GraphicTypeValues.POLYLINE,
            np.array(corners(box)),
            sr.SourceImageForRegion(source.SOPClassUID, source.SOPInstanceUID),
        ),
        finding_type=_concept(concept),
        finding_sites=[sr.FindingSite(_concept(concept.site))] if concept.site else None,
        algorithm_id=_algorithm(study),
    )


def _algorithm(study: Study, parameters: Sequence[str] | None = None) -> sr.AlgorithmIdentification:
    return sr.AlgorithmIdentification(
        name=free_text(study.algorithm),
        version=free_text(study.algorithm_version),
        manufacturer=MANUFACTURER,
        parameters=parameters,
    )


def text_report(study: Study) -> list[Dataset]:
    """Enhanced SR laid out as TID 2000: notice, findings, impression, reasoning, algorithm."""
    reading = study.reading
    root = sr.ContainerContentItem(codes.LN.DiagnosticImagingReport, is_content_continuous=False, template_id="2000")
    root.ContentSequence = sr.ContentSequence([*_english(), *_observation_context(study)])
    for procedure in _procedures(study):
        root.ContentSequence.append(
            sr.CodeContentItem(codes.DCM.ProcedureReported, procedure, relationship_type=RELATION.HAS_CONCEPT_MOD)
        )
    findings, impression = statements(reading)
    about = [f"{study.algorithm} {study.algorithm_version}", *_parameters(study), *flags(reading)]
    about += told_scores(study.scores)
    sections = (
        (_concept(NOTICE), _concept(NOTICE), [notice(reading)]),
        (codes.LN.Findings, codes.DCM.Finding, findings),
        (codes.LN.Impressions, codes.DCM.Impression, impression),
        (_concept(REASONING), _concept(REASONING), [reading["reasoning"]] if reading["reasoning"] else []),
        (_concept(UNTOUCHED), _concept(UNTOUCHED), untouched(reading)),
        (_concept(ALGORITHM), COMMENT, about),
    )
    for heading, element, texts in sections:
        if not texts:
            continue
        section = sr.ContainerContentItem(heading, is_content_continuous=False, relationship_type=RELATION.CONTAINS)
        section.ContentSequence = sr.ContentSequence([_text(element, text) for text in texts])
        root.ContentSequence.append(section)
    return [_document(study, "text_sr", EnhancedSRStorage, "report", root)]


def _box_concept(box: dict[str, Any]) -> Concept:
    concept = label_concept(box["label"] or "")
    return concept if concept in LABELS.values() else NAMED_REGION


def _evaluation(concept: Concept, value: Concept) -> sr.QualitativeEvaluation:
    """Whether a finding is present; its site is a modifier of the finding, since a group's sites are of all of it."""
    evaluation = sr.QualitativeEvaluation(_concept(concept), _concept(value))
    if concept.site:
        site = sr.CodeContentItem(codes.SCT.FindingSite, _concept(concept.site), RELATION.HAS_CONCEPT_MOD)
        evaluation[0].ContentSequence = sr.ContentSequence([site])
    return evaluation


def _score(concept: Concept, score: float) -> sr.Measurement:
    """How sure the algorithm is of a finding, which is a modifier of the number, and the finding's site another one."""
    measurement = sr.Measurement(_concept(SCORE), score, codes.UCUM.NoUnits)
    about = [(codes.DCM.Finding, concept), *([(codes.SCT.FindingSite, concept.site)] if concept.site else [])]
    measurement[0].ContentSequence = sr.ContentSequence(
        [sr.CodeContentItem(name, _concept(value), RELATION.HAS_CONCEPT_MOD) for name, value in about]
    )
    return measurement


def _parameters(study: Study) -> list[str]:
    reading = study.reading
    presets = dict.fromkeys(str(facts["preset"]) for facts in reading["images"] if facts.get("preset"))
    return [
        f"Engine bundle: {study.bundle}",
        f"Engine checked against the unquantized model: {reading['model'].get('verification') or 'unknown'}",
        f"Task: {reading['task'] or 'free prompt'}",
        f"Prompt: {reading['prompt']}",
        *([f"Pixel preset: {', '.join(presets)}"] if presets else []),
    ]


def _comments(study: Study) -> list[str]:
    """What the coded findings leave out."""
    reading = study.reading
    texts = [notice(reading)]
    if reading["status"] != "ok":
        texts.append(f"This reading is {STATUS_TEXTS[reading['status']]}.")
    texts += [f"Not in the vocabulary: {label}" for label in reading["unknown_labels"]]
    if reading["options"]:
        texts.append(f"Answer: {', '.join(reading['options'])}")
    if reading["report"]:
        texts.append(reading["report"])
    texts += [f"Box: {box_text(box, len(reading['images']))}" for box in reading["boxes"] if not has_area(box)]
    return texts + told_scores(study.scores) + flags(reading)


def _image_library(study: Study) -> sr.ContainerContentItem:
    """TID 1600: the images that were read, in their order."""
    pixels = sr.CodedConcept("{pixels}", "UCUM", "Pixels")
    group = sr.ContainerContentItem(codes.DCM.ImageLibraryGroup, relationship_type=RELATION.CONTAINS)
    group.ContentSequence = sr.ContentSequence()
    for source in study.sources:
        entry = sr.ImageContentItem(
            sr.CodedConcept("260753009", "SCT", "Source"),
            source.SOPClassUID,
            source.SOPInstanceUID,
            relationship_type=RELATION.CONTAINS,
        )
        is_cr = source.get("Modality", "CR" if source.SOPClassUID == ComputedRadiographyImageStorage else "DX") == "CR"
        modality = codes.DCM.ComputedRadiography if is_cr else codes.DCM.DigitalRadiography
        context = RELATION.HAS_ACQ_CONTEXT
        entry.ContentSequence = sr.ContentSequence(
            [
                sr.CodeContentItem(codes.DCM.Modality, modality, context),
                sr.NumContentItem(codes.DCM.PixelDataRows, source.Rows, pixels, relationship_type=context),
                sr.NumContentItem(codes.DCM.PixelDataColumns, source.Columns, pixels, relationship_type=context),
            ]
        )
        group.ContentSequence.append(entry)
    library = sr.ContainerContentItem(codes.DCM.ImageLibrary, template_id="1600", relationship_type=RELATION.CONTAINS)
    library.ContentSequence = sr.ContentSequence([group])
    return library


def _document(study: Study, kind: str, sop_class: str, description: str, root: Dataset) -> Dataset:
    """SR Document Series and General modules around a content tree."""
    document = study.instance(kind, sop_class, "SR", description)
    status = study.reading["status"]
    document.ReferencedPerformedProcedureStepSequence = []
    document.CompletionFlag = "COMPLETE" if status == "ok" else "PARTIAL"
    document.CompletionFlagDescription = long_string(STATUSES[status].meaning)
    document.VerificationFlag, document.PreliminaryFlag = "UNVERIFIED", "PRELIMINARY"
    document.PerformedProcedureCodeSequence = []
    current, others = study.references()
    document.CurrentRequestedProcedureEvidenceSequence = current
    if others:
        document.PertinentOtherEvidenceSequence = others
    for element in root:
        document[element.tag] = element
    return document


def _observation_context(study: Study) -> sr.ObservationContext:
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=study.device_uid(),
        name=study.options.station,
        manufacturer_name=MANUFACTURER,
        model_name=free_text(study.algorithm),
        serial_number=study.bundle,
    )
    return sr.ObservationContext(
        observer_device_context=sr.ObserverContext(
            observer_type=codes.DCM.Device, observer_identifying_attributes=device
        )
    )


def _procedures(study: Study) -> Sequence[sr.CodedConcept]:
    """The procedure codes of the current image's study; plain radiography where it names none."""
    procedures = []
    for item in study.current.get("ProcedureCodeSequence") or ():
        value, scheme = str(item.get("CodeValue") or ""), str(item.get("CodingSchemeDesignator") or "")
        meaning = long_string(item.get("CodeMeaning") or "")
        if 0 < len(value) <= 16 and 0 < len(scheme) <= 16 and meaning:
            procedures.append(sr.CodedConcept(value, scheme, meaning, item.get("CodingSchemeVersion") or None))
    return procedures or [_concept(PLAIN_RADIOGRAPHY)]


def _english() -> sr.LanguageOfContentItemAndDescendants:
    return sr.LanguageOfContentItemAndDescendants(sr.CodedConcept("en", "RFC5646", "English"))


def _concept(concept: Concept) -> sr.CodedConcept:
    return sr.CodedConcept.from_dataset(code_item(concept))


def _text(name: sr.CodedConcept, text: str) -> sr.TextContentItem:
    return sr.TextContentItem(name, free_text(text), relationship_type=RELATION.CONTAINS)
