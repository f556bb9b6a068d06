"""Boxes of a reading as Grayscale Softcopy Presentation States (PS3.3 A.33.1), for viewers that show no SR.

A presentation state replaces the image's own grey scale transformations, so it repeats them: modality LUT, first VOI,
polarity, shape of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import GrayscaleSoftcopyPresentationStateStorage

from cxr_triton.client.objects.source import copy_attributes, item, reference
from cxr_triton.client.objects.statements import corners, has_area
from cxr_triton.client.objects.study import UNVERIFIED, Study, long_string

LAYER = "AI"


def presentation_states(study: Study) -> list[Dataset]:
    """One presentation state for each image of the current study with a box that has an area.

    A presentation state may only be of images of its own study (PS3.3 C.11.11), so a prior of another one has none.
    """
    states: list[Dataset] = []
    for index, source in enumerate(study.sources):
        boxes = [box for box in study.reading["boxes"] if box["image"] == index and has_area(box)]
        if boxes and source.StudyInstanceUID == study.current.StudyInstanceUID:
            states.append(_state(study, source, boxes, len(states) + 1))
    return states


def _state(study: Study, source: Dataset, boxes: list[dict[str, Any]], number: int) -> Dataset:
    state = study.instance("gsps", GrayscaleSoftcopyPresentationStateStorage, "PR", "boxes", part=str(number))
    state.InstanceNumber = number
    state.PresentationCreationDate, state.PresentationCreationTime = state.ContentDate, state.ContentTime
    del state.ContentDate, state.ContentTime
    state.Laterality = None
    state.ContentLabel, state.ContentDescription = "AI_BOXES", long_string(f"{UNVERIFIED}. {study.algorithm}")
    state.ContentCreatorName = ""
    images = [reference(source)]
    state.ReferencedSeriesSequence = [item(SeriesInstanceUID=source.SeriesInstanceUID, ReferencedImageSequence=images)]
    _repeat_grey_scale(source, state)
    area = item(
        DisplayedAreaTopLeftHandCorner=[1, 1],
        DisplayedAreaBottomRightHandCorner=[int(source.Columns), int(source.Rows)],
        PresentationSizeMode="SCALE TO FIT",
        ReferencedImageSequence=images,
    )
    spacings = (source.get(f"{kind}PixelSpacing") for kind in ("", "Imager", "NominalScanned"))
    if spacing := next(filter(_is_shape, spacings), None):
        area.PresentationPixelSpacing = spacing
    else:
        ratio = source.get("PixelAspectRatio")
        area.PresentationPixelAspectRatio = ratio if _is_shape(ratio) else [1, 1]
    state.DisplayedAreaSelectionSequence = [area]
    state.GraphicLayerSequence = [
        item(GraphicLayer=LAYER, GraphicLayerOrder=1, GraphicLayerDescription=f"Boxes ({UNVERIFIED})")
    ]
    state.GraphicAnnotationSequence = [
        item(
            GraphicLayer=LAYER,
            ReferencedImageSequence=images,
            GraphicObjectSequence=[_outline(box) for box in boxes],
            TextObjectSequence=[_label(box) for box in boxes],
        )
    ]
    return state


def _is_shape(pair: object) -> bool:
    """Whether a header's value is the height and width of a pixel, by the same rule as `read_image`'s."""
    return isinstance(pair, Sequence) and len(pair) == 2 and all(0 < value < math.inf for value in pair)


def _repeat_grey_scale(source: Dataset, state: Dataset) -> None:
    if source.get("ModalityLUTSequence"):
        copy_attributes(source, state, ("ModalityLUTSequence",))
    elif "RescaleSlope" in source and "RescaleIntercept" in source:
        copy_attributes(source, state, ("RescaleIntercept", "RescaleSlope"))
        state.RescaleType = source.get("RescaleType") or "US"
    voi = Dataset()
    if source.get("VOILUTSequence"):
        copy_attributes(item(VOILUTSequence=source.VOILUTSequence[:1]), voi, ("VOILUTSequence",))
    elif source.get("WindowCenter") is not None and source.get("WindowWidth") is not None:
        first = item(WindowCenter=_first(source.WindowCenter), WindowWidth=_first(source.WindowWidth))
        copy_attributes(first, voi, ("WindowCenter", "WindowWidth"))
        copy_attributes(source, voi, ("VOILUTFunction",))
    if len(voi):
        voi.ReferencedImageSequence = [reference(source)]
        state.SoftcopyVOILUTSequence = [voi]
    state.PresentationLUTShape = "INVERSE" if source.get("PhotometricInterpretation") == "MONOCHROME1" else "IDENTITY"


def _first(value):
    return value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value


def _outline(box: dict[str, Any]) -> Dataset:
    points = corners(box)
    return item(
        GraphicAnnotationUnits="PIXEL",
        GraphicDimensions=2,
        NumberOfGraphicPoints=len(points),
        GraphicData=[value for point in points for value in point],
        GraphicType="POLYLINE",
        GraphicFilled="N",
    )


def _label(box: dict[str, Any]) -> Dataset:
    return item(
        UnformattedTextValue=f"{long_string(box['label'] or 'unnamed')} (AI)",
        AnchorPointAnnotationUnits="PIXEL",
        AnchorPoint=list(box["pixels"][:2]),
        AnchorPointVisibility="N",
    )
