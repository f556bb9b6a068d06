"""Labels of the data sets and what they are in ours: the tables of the mapping, and who decides what is true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from cxr_triton.evaluate.config import Data
from cxr_triton.evaluate.study import UNCERTAIN, Found, Study

CHEXPERT = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
"""The 14 of CheXpert, in the order of its tables."""
Mapped = dict[str, str | None]

OF_CHEXPERT: Mapped = {label: label for label in CHEXPERT}
OF_MIMIC: Mapped = {**OF_CHEXPERT, "Airspace Opacity": "Lung Opacity"}
OF_NIH: Mapped = {
    "No Finding": "No Finding",
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pleural_Thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    **dict.fromkeys(("Emphysema", "Fibrosis", "Hernia")),
}
OF_VINDR: Mapped = {
    "No finding": "No Finding",
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Clavicle fracture": "Fracture",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Infiltration": "Lung Opacity",
    "Lung Opacity": "Lung Opacity",
    "Lung tumor": "Lung Lesion",
    "Nodule/Mass": "Lung Lesion",
    "Pleural effusion": "Pleural Effusion",
    "Pleural thickening": "Pleural Other",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Rib fracture": "Fracture",
    **dict.fromkeys(
        (
            "Aortic enlargement",
            "COPD",
            "Calcification",
            "Emphysema",
            "Enlarged PA",
            "ILD",
            "Lung cavity",
            "Lung cyst",
            "Mediastinal shift",
            "Other disease",
            "Other diseases",
            "Other lesion",
            "Pulmonary fibrosis",
            "Tuberculosis",
        )
    ),
}
OF_PADCHEST: Mapped = {
    "normal": "No Finding",
    "cardiomegaly": "Cardiomegaly",
    "consolidation": "Consolidation",
    "pulmonary edema": "Edema",
    "pleural effusion": "Pleural Effusion",
    **dict.fromkeys(("mediastinic enlargement", "superior mediastinal enlargement"), "Enlarged Cardiomediastinum"),
    **dict.fromkeys(
        ("alveolar pattern", "ground glass pattern", "infiltrates", "interstitial pattern"), "Lung Opacity"
    ),
    **dict.fromkeys(("multiple nodules", "nodule", "pulmonary mass"), "Lung Lesion"),
    **dict.fromkeys(("atypical pneumonia", "pneumonia"), "Pneumonia"),
    **dict.fromkeys(
        (
            "atelectasis",
            "atelectasis basal",
            "laminar atelectasis",
            "lobar atelectasis",
            "round atelectasis",
            "segmental atelectasis",
            "total atelectasis",
        ),
        "Atelectasis",
    ),
    **dict.fromkeys(("hydropneumothorax", "pneumothorax"), "Pneumothorax"),
    **dict.fromkeys(
        ("apical pleural thickening", "calcified pleural thickening", "pleural plaques", "pleural thickening"),
        "Pleural Other",
    ),
    **dict.fromkeys(
        ("clavicle fracture", "fracture", "humeral fracture", "rib fracture", "vertebral fracture"), "Fracture"
    ),
    **dict.fromkeys(
        (
            "NSG tube",
            "catheter",
            "central venous catheter",
            "central venous catheter via jugular vein",
            "central venous catheter via subclavian vein",
            "central venous catheter via umbilical vein",
            "chest drain tube",
            "dual chamber device",
            "electrical device",
            "endotracheal tube",
            "pacemaker",
            "reservoir central venous catheter",
            "single chamber device",
            "tracheostomy tube",
        ),
        "Support Devices",
    ),
}
"""PadChest has 174 labels of findings; those that are not here map to nothing, and are counted."""

Truth = dict[str, int | None]


class Vocabulary:
    """A data set's labels in ours.

    Parameters
    ----------
    mapped : dict
        The format's table.
    data : Data
        With what is laid over it, and the policies.
    complete : bool
        A label that a study does not list is absent from it, as where data sets write lists of names.
    counted : Counter
        Gets every label that maps to nothing, as often as it was present.

    Attributes
    ----------
    mapping : dict of str to (str or None)
        As used; grows by labels that no table names.
    labels : tuple of str
        What is judged, in CheXpert's order.
    """

    def __init__(self, mapped: Mapping[str, str | None], data: Data, *, complete: bool, counted: Counter[str]):
        self.mapping: Mapped = {**mapped, **{label: ours or None for label, ours in data.mapping.items()}}
        self.labels: tuple[str, ...] = data.labels or in_order(ours for ours in self.mapping.values() if ours)
        self._data, self._complete, self._counted = data, complete, counted

    def truth(self, study: Study) -> tuple[Truth, dict[str, dict[str, int]]]:
        """Each of `labels`, by the policies, and of each reader those that are present or absent."""
        if not study.readers:
            return self._translated(study.found), {}
        each = {reader: self._translated(found) for reader, found in study.readers.items()}
        said = {reader: {k: v for k, v in labels.items() if v is not None} for reader, labels in each.items()}
        return {label: self._decided([labels[label] for labels in each.values()]) for label in self.labels}, said

    def _translated(self, found: Found) -> Truth:
        by_ours: dict[str, list[int | None]] = {}
        for label, value in found.items():
            ours = self.mapping.setdefault(label, None)
            if ours is None or ours not in self.labels:
                if value == 1:
                    what = "label without a place" if ours is None else "label that is not judged"
                    self._counted[f"{what}: {label}"] += 1
                continue
            by_ours.setdefault(ours, []).append(value)
        return {label: self._joined(by_ours.get(label, [0] if self._complete else [None])) for label in self.labels}

    def _joined(self, values: Sequence[int | None]) -> int | None:
        """One label of ours, to which several of theirs may lead: present wins, then uncertain, absent, empty."""
        if 1 in values:
            return 1
        if UNCERTAIN in values:
            return _counts_as(self._data.uncertain)
        if 0 in values or self._complete:
            return 0
        return _counts_as(self._data.blank)

    def _decided(self, said: Sequence[int | None]) -> int | None:
        votes = [value for value in said if value is not None]
        if not votes:
            return None
        ones = sum(votes)
        needed = {"any": 1, "majority": len(votes) // 2 + 1, "all": len(votes)}[self._data.readers]
        return int(ones >= needed)


def in_order(labels) -> tuple[str, ...]:
    """Each label once: CheXpert's in its order, then the others by name."""
    every = set(labels)
    return (*(label for label in CHEXPERT if label in every), *sorted(every - set(CHEXPERT)))


def _counts_as(policy: str) -> int | None:
    return {"zeros": 0, "ones": 1, "ignore": None}[policy]
