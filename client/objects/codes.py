"""Coded concepts of the objects that a reading becomes: the 14 labels, and what no public scheme has a code for.

A code stands here only where its concept, at its finding site, is the label's own. Pulmonary edema, Pleural effusion,
Pneumothorax, Opacity, Lesion, Enlarged and the sites are as in DICOM PS3.16 (context groups 4, 6100, 6102, 6104, 6107,
6335); the others by their SNOMED CT names. RadLex equivalents have the same name there. What is no finding has a code
of the private scheme 99CXR.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

PRIVATE_SCHEME = "99CXR"
FHIR_SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "RADLEX": "http://www.radlex.org",
    "LN": "http://loinc.org",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    PRIVATE_SCHEME: "urn:oid:2.25.210758209875413792710812946070376340321",
}


class Concept(NamedTuple):
    """A code.

    Attributes
    ----------
    value, scheme, meaning : str
        At most 16, 16 and 64 characters, as in PS3.3 table 8.8-1.
    radlex : tuple of str
        Identifier and name of the same concept in RadLex, or empty.
    site : Concept or None
        Finding site without which the concept is wider than what is meant.
    """

    value: str
    scheme: str
    meaning: str
    radlex: tuple[str, ...] = ()
    site: Concept | None = None


CHEST = Concept("816094009", "SCT", "Chest")
LUNG = Concept("39607008", "SCT", "Lung")
MEDIASTINUM = Concept("72410000", "SCT", "Mediastinum")
PLEURA = Concept("3120008", "SCT", "Pleural structure")
LABELS = {
    "Atelectasis": Concept("46621007", "SCT", "Atelectasis", ("RID28493", "atelectasis")),
    "Cardiomegaly": Concept("8186001", "SCT", "Cardiomegaly"),
    "Consolidation": Concept("95436008", "SCT", "Lung consolidation", ("RID43255", "consolidation")),
    "Edema": Concept("19242006", "SCT", "Pulmonary edema", ("RID4866", "pulmonary edema")),
    "Enlarged Cardiomediastinum": Concept("260376009", "SCT", "Enlarged", ("RID5791", "enlarged"), MEDIASTINUM),
    "Fracture": Concept("125605004", "SCT", "Fracture of bone", ("RID4650", "fracture")),
    "Lung Lesion": Concept("52988006", "SCT", "Lesion", ("RID38780", "lesion"), LUNG),
    "Lung Opacity": Concept("112001", "DCM", "Opacity", ("RID28530", "opacity"), LUNG),
    "No Finding": Concept("281900007", "SCT", "No abnormality detected", (), CHEST),
    "Pleural Effusion": Concept("60046008", "SCT", "Pleural effusion", ("RID34539", "pleural effusion")),
    "Pleural Other": Concept("74964007", "SCT", "Other", (), PLEURA),
    "Pneumonia": Concept("233604007", "SCT", "Pneumonia", ("RID5350", "pneumonia")),
    "Pneumothorax": Concept("36118008", "SCT", "Pneumothorax", ("RID5352", "pneumothorax")),
    "Support Devices": Concept("49062001", "SCT", "Device", ("RID29033", "medical device"), CHEST),
}
NO_FINDING = "No Finding"
IMPLIED = {
    "Lung Opacity": ("Atelectasis", "Consolidation", "Edema", "Lung Lesion", "Pneumonia"),
    "Consolidation": ("Pneumonia",),
    "Enlarged Cardiomediastinum": ("Cardiomegaly",),
}
"""A label that is not called absent beside one of these, by the hierarchy of CheXpert's labels (arXiv 1901.07031)."""

PRESENT = Concept("52101004", "SCT", "Present")
ABSENT = Concept("272519000", "SCT", "Absent")
PLAIN_RADIOGRAPHY = Concept("168537006", "SCT", "Plain radiography")
STATUS = Concept("reading-status", PRIVATE_SCHEME, "Status of the reading")
STATUSES = {
    "ok": Concept("ok", PRIVATE_SCHEME, "Well formed"),
    "malformed": Concept("malformed", PRIVATE_SCHEME, "Malformed: a part of the expected form is missing"),
    "truncated": Concept("truncated", PRIVATE_SCHEME, "Truncated: the token limit came before the end"),
    "out_of_vocabulary": Concept("out-of-vocab", PRIVATE_SCHEME, "Out of vocabulary: lists unknown labels"),
    "doubtful_image": Concept("doubtful-image", PRIVATE_SCHEME, "Doubtful image: may be no readable chest, or damaged"),
}
SCORE = Concept("score", PRIVATE_SCHEME, "Log-odds that the answer lists it, not calibrated")
NAMED_REGION = Concept("named-region", PRIVATE_SCHEME, "Region that the algorithm named in words")
REASONING = Concept("reasoning", PRIVATE_SCHEME, "Reasoning of the algorithm")
UNTOUCHED = Concept("text", PRIVATE_SCHEME, "Text of the algorithm, untouched")
NOTICE = Concept("notice", PRIVATE_SCHEME, "Notice")
ALGORITHM = Concept("algorithm", PRIVATE_SCHEME, "Algorithm")


def label_concept(label: str) -> Concept:
    """The code of a label; a label that is none of the 14 gets a private code made from its text."""
    by_key = {known.casefold(): concept for known, concept in LABELS.items()}
    concept = by_key.get(label.strip().casefold())
    if concept is None:
        digest = hashlib.sha256(label.encode("utf-8", "replace")).hexdigest()
        meaning = " ".join(label.replace("\\", "/").split())[:64] or "unnamed"
        concept = Concept(f"label-{digest[:10]}", PRIVATE_SCHEME, meaning)
    return concept


def presence(reading: dict) -> dict[str, Concept]:
    """Which labels a reading calls present and absent.

    A label is absent when the reading is well formed, answers in the vocabulary of its model (``model.labels``) and
    does not list it, unless a listed one implies it. A reading that lists No Finding beside a finding contradicts
    itself: it gets nothing absent, as does one that is not well formed.
    """
    listed = [finding["label"] for finding in reading["findings"]]
    found = dict.fromkeys(listed, PRESENT)
    pathologies = [label for label in listed if label not in (NO_FINDING, "Support Devices")]
    if reading["status"] != "ok" or not listed or (NO_FINDING in listed and pathologies):
        return found
    for label in reading["model"].get("labels", ()):
        if label not in found and label != NO_FINDING and not set(IMPLIED.get(label, ())) & set(listed):
            found[label] = ABSENT
    return found
