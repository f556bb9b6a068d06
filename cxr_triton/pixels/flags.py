"""The closed vocabulary of flags: what a reader has to know of how an image was read."""

DOUBTS: dict[str, str] = {
    "not_a_chest": "no chest radiograph, read because the profile allows it",
    "region_conflict": "the header names the chest and another part of the body",
    "region_described_elsewhere": "a description in the header names another part of the body, and none the chest",
    "extent_suspect": "the file's size in millimetres is none of a chest",
    "picture_unlike_chest": "the picture does not look like a chest radiograph",
    "view_untrained": "a view that the profile's model was not trained on",
}
"""Flags of an image that may be no chest; a part of `FLAGS` and `DOUBTFUL`."""

FLAGS: dict[str, str] = {
    "alpha_dropped": "the file's transparency was ignored",
    "bits_stored_corrected": "the values go on above BitsStored, which is wrong: read with the bits that they have",
    "burned_in": "the file says that text is burned into the pixels",
    "burned_in_unknown": "the file does not say whether text is burned into the pixels",
    "clamped": "lossy values beyond BitsStored were clamped",
    "damage_suspected": "the compressed pixels may be damaged: compare the picture with the original",
    "display_ready": "8-bit PNG or JPEG: shown as it is, no preset ran",
    "exif_transposed": "the JPEG's EXIF orientation was applied",
    "full_range": "no usable VOI LUT or window: scaled by the declared range",
    "high_bits_masked": "bits above BitsStored (old overlays) were masked",
    "lateral": "a lateral view",
    "lossy": "lossy compression",
    "lut_corrected": "a LUT's declared depth did not fit its entries and was replaced",
    "mirrored": "PatientOrientation says that the patient's right is at the right; not flipped",
    "modality_lut": "a Modality LUT Sequence was found and is used by voi_display",
    "modality_lut_and_rescale": "Modality LUT Sequence and rescale both present; the sequence wins",
    "modality_lut_unusable": "the Modality LUT Sequence is malformed and was ignored",
    "modality_missing": "no Modality; accepted for its SOP class",
    "monochrome1_with_identity": "MONOCHROME1 with Presentation LUT Shape IDENTITY; Photometric Interpretation wins",
    "monochrome2_with_inverse": "MONOCHROME2 with Presentation LUT Shape INVERSE; Photometric Interpretation wins",
    "negative_slope": "negative Rescale Slope: the two presets disagree on polarity",
    "no_meta_header": "no File Meta Information; the transfer syntax was recognised from the first element",
    "not_upright": "PatientOrientation says that the image is rotated or upside down; not rotated",
    "overlay_present": "an overlay plane exists; not burned in",
    "padding": "a part of the pixels is padding; black in voi_display",
    "padding_ignored": "Pixel Padding Value would remove every pixel and was ignored",
    "palette": "the file's palette was applied",
    "pixel_shape_doubtful": "what the file says of its pixels' shape is malformed or contradicts itself",
    "pixels_not_square": "the pixels are not square: resampled to square ones; boxes are in pixels as stored",
    "polarity_suspect": "the picture's border is brighter than its inside; it may be inverted; not changed",
    "presentation_lut_ignored": "a Presentation LUT Sequence was ignored",
    "range_fallback": "no usable VOI LUT or window, and the declared range is mostly unused: scaled by min and max",
    "rescale_unusable": "Rescale Slope or Intercept is zero or malformed and was ignored",
    "secondary_capture": "a Secondary Capture: provenance and display state are unknown",
    "several_windows": "several windows or VOI LUTs; the first was used",
    "shutter_present": "a display shutter exists; not applied",
    "view_conflict": "View Position and Patient Orientation disagree",
    "view_unknown": "neither View Position nor Patient Orientation names the view",
    "voi_function_unknown": "unknown VOI LUT Function; taken as LINEAR",
    "voi_lut_and_window": "VOI LUT Sequence and window both present; the sequence was used",
    "voi_lut_unusable": "the VOI LUT Sequence is malformed and was ignored",
    "vr_mismatch": "explicit or implicit VR encoding differs from the transfer syntax; the data decided",
    "window_fallback": "the window is malformed or narrower than allowed and was ignored",
    **DOUBTS,
}
"""The closed vocabulary of `Radiograph.flags` and `Picture.flags`."""

DOUBTFUL = frozenset({*DOUBTS, "damage_suspected", "pixel_shape_doubtful"})
"""Flags with which no reading has the status ``ok``."""
