"""Every transfer syntax, depth and sign gives the values that were encoded; everything else is a typed error."""

import gzip
import io
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import COLUMNS, ROWS, compressed_bytes, dataset_of, deflated, file_bytes, pattern
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    DigitalXRayImageStorageForProcessing,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from cxr_triton import errors
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.flags import FLAGS
from cxr_triton.pixels.limits import Limits
from cxr_triton.pixels.transforms import LookupTable, Rescale, Window


def dcmtk(tool: str, data: bytes, tmp_path: Path, *options: str) -> bytes:
    """Run a DCMTK converter; skipped where DCMTK is not installed."""
    if not shutil.which(tool):
        pytest.skip(f"no {tool}: install dcmtk")
    source, target = tmp_path / "in.dcm", tmp_path / "out.dcm"
    source.write_bytes(data)
    run = subprocess.run([tool, *options, source, target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target.read_bytes()


GRID = [(bits, signed) for bits in (8, 10, 12, 14, 15, 16) for signed in (False, True)]

# tool and options that write each syntax losslessly
WRITERS = {
    "1.2.840.10008.1.2": ("dcmconv", "+ti"),
    "1.2.840.10008.1.2.1": ("dcmconv", "+te"),
    "1.2.840.10008.1.2.2": ("dcmconv", "+tb"),
    "1.2.840.10008.1.2.1.99": ("dcmconv", "+td"),
    "1.2.840.10008.1.2.4.57": ("dcmcjpeg", "+el", "+sv", "6"),
    "1.2.840.10008.1.2.4.70": ("dcmcjpeg", "+e1"),
    "1.2.840.10008.1.2.4.80": ("dcmcjpls", "+el"),
    "1.2.840.10008.1.2.5": ("dcmcrle",),
}


@pytest.mark.parametrize("syntax", WRITERS)
@pytest.mark.parametrize(("bits", "signed"), GRID)
def test_values_written_by_dcmtk_come_back_exactly(tmp_path, syntax, bits, signed):
    values = pattern(bits, signed)
    tool, *options = WRITERS[syntax]
    data = dcmtk(tool, file_bytes(dataset_of(values, bits)), tmp_path, *options)
    radiograph = read_image(data)
    assert radiograph.metadata.transfer_syntax == syntax
    assert radiograph.stored.dtype == values.dtype
    np.testing.assert_array_equal(radiograph.stored, values)


@pytest.mark.parametrize("codec", ["jpeg2k", "htj2k"])
@pytest.mark.parametrize(("bits", "signed"), GRID)
def test_jpeg_2000_values_come_back_exactly(codec, bits, signed):
    import imagecodecs

    values = pattern(bits, signed)
    if codec == "jpeg2k":
        codestream = imagecodecs.jpeg2k_encode(values, codecformat="J2K", bitspersample=bits, reversible=True, level=0)
        syntax = "1.2.840.10008.1.2.4.90"
    else:
        codestream = imagecodecs.htj2k_encode(values, reversible=True)
        syntax = "1.2.840.10008.1.2.4.201"
    radiograph = read_image(compressed_bytes(values, bits, syntax, codestream))
    assert radiograph.stored.dtype == values.dtype
    np.testing.assert_array_equal(radiograph.stored, values)


@pytest.mark.parametrize("precision", [12, 16])
def test_sign_comes_from_the_data_set_when_jpeg_2000_stores_plain_words(precision):
    import imagecodecs

    values = pattern(12, signed=True)
    words = values.view(np.uint16) & (0xFFF if precision == 12 else 0xFFFF)
    codestream = imagecodecs.jpeg2k_encode(words, codecformat="J2K", bitspersample=precision, reversible=True, level=0)
    data = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.90", codestream)
    np.testing.assert_array_equal(read_image(data).stored, values)


def test_jp2_wrapped_codestream_is_unwrapped():
    import imagecodecs

    values = pattern(12)
    wrapped = imagecodecs.jpeg2k_encode(values, codecformat="JP2", bitspersample=12, reversible=True, level=0)
    assert wrapped[4:8] == b"jP  "
    data = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.90", wrapped)
    np.testing.assert_array_equal(read_image(data).stored, values)


@pytest.mark.parametrize(
    ("bits", "encoder", "decoder", "off_by"),
    [
        (8, ("dcmcjpeg", "+eb", "+q", "80"), "dcmdjpeg", 1),
        (12, ("dcmcjpeg", "+ee", "+q", "80"), "dcmdjpeg", 1),
        (12, ("dcmcjpls", "+en", "+md", "3"), "dcmdjpls", 0),
        (16, ("dcmcjpls", "+en", "+md", "3"), "dcmdjpls", 0),
    ],
)
def test_lossy_values_equal_dcmtk_s_decoding(tmp_path, bits, encoder, decoder, off_by):
    tool, *options = encoder
    data = dcmtk(tool, file_bytes(dataset_of(pattern(bits), bits)), tmp_path, *options)
    reference = pydicom.dcmread(io.BytesIO(dcmtk(decoder, data, tmp_path))).pixel_array
    radiograph = read_image(data)
    assert "lossy" in radiograph.flags
    assert np.abs(radiograph.stored.astype(int) - reference).max() <= off_by


@pytest.mark.parametrize("bits", [10, 12])
def test_lossy_values_beyond_bits_stored_are_clamped(bits):
    import imagecodecs

    # hard black-to-white edges ring beyond the range of 10 bits in a 12-bit codestream
    values = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((9, 9))).astype(np.uint16) * (2**bits - 1)
    codestream = imagecodecs.jpeg8_encode(values, level=60, bitspersample=12)
    decoded = imagecodecs.jpeg8_decode(codestream)
    radiograph = read_image(compressed_bytes(values, bits, "1.2.840.10008.1.2.4.51", codestream))
    assert radiograph.stored.max() <= 2**bits - 1
    np.testing.assert_array_equal(radiograph.stored, np.minimum(decoded, 2**bits - 1))
    assert ("clamped" in radiograph.flags) == (decoded.max() > 2**bits - 1)


def test_bits_above_bits_stored_are_masked():
    values = pattern(12)
    ds = dataset_of(values | 0xA000, 12)
    radiograph = read_image(file_bytes(ds))
    np.testing.assert_array_equal(radiograph.stored, values)
    assert "high_bits_masked" in radiograph.flags


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits_stored", [8, 10, 11])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.90"])
def test_values_that_go_on_above_bits_stored_are_read_whole(tmp_path, syntax, bits_stored, signed):
    import imagecodecs

    values, lie = pattern(12, signed), {"BitsStored": bits_stored, "HighBit": bits_stored - 1}
    values[1:-1, 1:-1] = np.sort(values[1:-1, 1:-1])  # smoother than 8 bits of noise
    data = file_bytes(dataset_of(values, 12, **lie))
    if syntax == "1.2.840.10008.1.2.5":
        data = dcmtk("dcmcrle", data, tmp_path)
    elif syntax == "1.2.840.10008.1.2.4.90":
        codestream = imagecodecs.jpeg2k_encode(values, codecformat="J2K", bitspersample=12, reversible=True, level=0)
        data = compressed_bytes(values, 12, syntax, codestream, **lie)
    radiograph = read_image(data)
    np.testing.assert_array_equal(radiograph.stored, values)
    assert radiograph.metadata.bits_stored == 12
    assert "bits_stored_corrected" in radiograph.flags and "high_bits_masked" not in radiograph.flags


def test_real_radiograph_with_too_few_bits_stored_is_never_scrambled(shared_data):
    """pydicom and DCMTK mask to BitsStored, as the standard has it, and show wrapped values."""
    paths = [shared_data / f"dicom/{name}_UNC_explicitLE.dcm" for name in ("RG1", "RG2")]
    refused = 0
    for path in [*paths, shared_data / "failing/body_part_knee.dcm"]:
        ds = pydicom.dcmread(path)
        right = ds.pixel_array
        for missing in range(1, 9):
            ds.BitsStored = int(right.max()).bit_length() - missing
            ds.HighBit = ds.BitsStored - 1
            assert not np.array_equal(pydicom.dcmread(io.BytesIO(file_bytes(ds))).pixel_array, right)
            try:
                radiograph = read_image(file_bytes(ds))
            except errors.HeaderMismatch as error:
                refused += 1
                assert "(0028,0101)" in error.message
            else:
                np.testing.assert_array_equal(radiograph.stored, right)
                assert "bits_stored_corrected" in radiograph.flags
    assert 0 < refused < 14


@pytest.mark.parametrize("bit", [12, 15])
@pytest.mark.parametrize("drawing", ["rectangle", "lines", "noise", "dead pixels"])
def test_old_overlays_are_masked_whatever_they_show(shared_data, drawing, bit):
    ds = pydicom.dcmread(shared_data / "dicom/RG2_UNC_explicitLE.dcm")
    right = ds.pixel_array
    plane = np.zeros_like(right)
    if drawing == "rectangle":
        plane[300:900, 200:1200] = 1
    elif drawing == "lines":
        plane[40:80:3, 10:400] = 1
    else:
        plane[np.random.default_rng(bit).random(plane.shape) < (0.5 if drawing == "noise" else 1e-5)] = 1
    ds.PixelData = (right | plane << bit).tobytes()
    radiograph = read_image(file_bytes(ds))
    np.testing.assert_array_equal(radiograph.stored, right)
    assert "high_bits_masked" in radiograph.flags and "bits_stored_corrected" not in radiograph.flags


def test_overlay_above_values_that_go_on_above_bits_stored(shared_data):
    ds = pydicom.dcmread(shared_data / "dicom/RG2_UNC_explicitLE.dcm")
    right = ds.pixel_array
    words = right.copy()
    words[300:900, 200:1200] |= 0x8000
    ds.PixelData, ds.BitsStored, ds.HighBit = words.tobytes(), 8, 7
    radiograph = read_image(file_bytes(ds))
    np.testing.assert_array_equal(radiograph.stored, right)
    assert {"bits_stored_corrected", "high_bits_masked"} <= set(radiograph.flags)


def test_lossy_values_far_beyond_bits_stored_are_read_whole():
    import imagecodecs

    values = pattern(12)
    codestream = imagecodecs.jpeg8_encode(values, level=95, bitspersample=12)
    lie = {"BitsStored": 10, "HighBit": 9}
    radiograph = read_image(compressed_bytes(values, 12, "1.2.840.10008.1.2.4.51", codestream, **lie))
    np.testing.assert_array_equal(radiograph.stored, imagecodecs.jpeg8_decode(codestream))
    assert radiograph.metadata.bits_stored == 12 and "bits_stored_corrected" in radiograph.flags


@pytest.mark.parametrize(
    ("elements", "ratio", "flags"),
    [
        ({"PixelAspectRatio": ["2", "1"]}, 2, {"pixels_not_square"}),
        ({"ImagerPixelSpacing": ["0.1", "0.2"]}, 0.5, {"pixels_not_square"}),
        ({"NominalScannedPixelSpacing": ["0.3", "0.2"]}, 1.5, {"pixels_not_square"}),
        ({"PixelSpacing": ["0.2", "0.1"], "ImagerPixelSpacing": ["0.2", "0.1"]}, 2, {"pixels_not_square"}),
        ({"PixelSpacing": ["0.2", "0.1"], "PixelAspectRatio": ["1", "1"]}, 2,
         {"pixels_not_square", "pixel_shape_doubtful"}),
        ({"PixelSpacing": ["0.1", "0.1"], "PixelAspectRatio": ["900", "1"]}, 1, {"pixel_shape_doubtful"}),
        ({"PixelSpacing": ["0.143", "0.1431"]}, 1, set()),
        ({"PixelSpacing": ["0", "0"], "PixelAspectRatio": ["2", "1"]}, 2, {"pixels_not_square"}),
        ({"PixelSpacing": ["0.2", "0"]}, 1, {"pixel_shape_doubtful"}),
        ({"PixelSpacing": ["0.2"]}, 1, {"pixel_shape_doubtful"}),
        ({"PixelSpacing": ["-0.2", "0.1"]}, 1, {"pixel_shape_doubtful"}),
    ],
)  # fmt: skip
def test_shape_of_a_pixel(tmp_path, elements, ratio, flags):
    """Which element counts is what DCMTK goes by when it scales; it has no rule for what is malformed."""
    data = file_bytes(dataset_of(pattern(12), 12, **elements))
    radiograph = read_image(data)
    assert radiograph.metadata.pixel_aspect_ratio == pytest.approx(ratio)
    assert {flag for flag in radiograph.flags if flag.startswith("pixel")} == flags
    if flags <= {"pixels_not_square"} and elements.get("PixelSpacing") != ["0", "0"]:
        dcmtk("dcm2pnm", data, tmp_path, "+Wm", "+op", "+Sxv", "600")
        width, height = Image.open(tmp_path / "out.dcm").size
        assert height / width == pytest.approx(ROWS * ratio / COLUMNS, rel=0.01)


@pytest.mark.parametrize("elements", [{"PixelAspectRatio": ["100", "1"]}, {"PixelSpacing": ["0.1", "1"]}])
def test_pixels_that_cannot_be_of_that_shape_are_refused_by_the_tag(elements):
    with pytest.raises(errors.HeaderMismatch, match=r"\(0028,003[04]\)"):
        read_image(file_bytes(dataset_of(pattern(12), 12, **elements)))


@pytest.mark.parametrize("pieces", [2, 7])
@pytest.mark.parametrize("odd", [False, True])
def test_fragments_are_joined(tmp_path, pieces, odd):
    values = pattern(12)
    data = dcmtk("dcmcjpls", file_bytes(dataset_of(values, 12)), tmp_path, "+el")
    codestream = get_frame(pydicom.dcmread(io.BytesIO(data)).PixelData, 0, number_of_frames=1)
    step = len(codestream) // pieces // 2 * 2 + odd
    items = b"".join(
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(part)) + part
        for part in (codestream[i : i + step] for i in range(0, len(codestream), step))
    )
    whole = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.80", codestream)
    head = whole[: whole.index(b"\xfe\xff\x00\xe0") + 8]
    np.testing.assert_array_equal(read_image(head + items + b"\xfe\xff\xdd\xe0\0\0\0\0").stored, values)


# ----------------------------------------------------------------------------------------------- odd but legal files


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("prefix", [0, 132])
def test_file_without_meta_information(syntax, prefix):
    values = pattern(12)
    out = io.BytesIO()
    ds = dataset_of(values, 12)
    del ds.file_meta
    if syntax == ExplicitVRBigEndian:
        ds.PixelData = values.astype(">u2").tobytes()
    pydicom.dcmwrite(out, ds, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    data = (b"\0" * 128 + b"DICM" if prefix else b"") + out.getvalue()
    radiograph = read_image(data)
    np.testing.assert_array_equal(radiograph.stored, values)
    assert radiograph.metadata.transfer_syntax == syntax
    assert "no_meta_header" in radiograph.flags


def test_vr_encoding_that_differs_from_the_transfer_syntax():
    values = pattern(12)
    data = file_bytes(dataset_of(values, 12))
    lied = data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\0\0\0", 1)
    radiograph = read_image(lied)
    np.testing.assert_array_equal(radiograph.stored, values)
    assert "vr_mismatch" in radiograph.flags


def test_group_lengths_private_sequences_and_trailing_zeros_are_passed_over():
    values = pattern(12)
    ds = dataset_of(values, 12)
    ds.add_new(0x00080000, "UL", 4)
    ds.add_new(0x00280000, "UL", 4)
    inner = Dataset()
    inner.Rows, inner.PatientName = 9, "Inner^Name"
    ds.add_new(0x00091001, "SQ", Sequence([inner, Dataset()]))
    ds.ReferencedImageSequence = Sequence([inner])
    for element in (ds[0x00091001], ds["ReferencedImageSequence"]):
        element.is_undefined_length = True
        for item in element.value:
            item.is_undefined_length_sequence_item = True
    ds.is_undefined_length_sequence_item = True
    np.testing.assert_array_equal(read_image(file_bytes(ds) + b"\0" * 300).stored, values)


def test_unknown_vr_of_undefined_length_holds_implicit_vr():
    values = pattern(12)
    data = file_bytes(dataset_of(values, 12))
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + b"\x28\0\x10\0\x02\0\0\0\x07\0" + b"\xfe\xff\x0d\xe0\0\0\0\0"
    unknown = b"\x09\0\x01\x10UN\0\0\xff\xff\xff\xff" + item + b"\xfe\xff\xdd\xe0\0\0\0\0"
    at = data.index(b"\x10\0\x10\0PN")
    np.testing.assert_array_equal(read_image(data[:at] + unknown + data[at:]).stored, values)


def test_description_that_a_pacs_turned_into_unknown_vr_is_still_read():
    values = pattern(12)
    data = file_bytes(dataset_of(values, 12, NumberOfFrames=1, WindowCenter=2048, WindowWidth=4096))
    for vr, tags in (
        (b"US", (b"\x28\0\x10\0", b"\x28\0\x00\x01")),
        (b"IS", (b"\x28\0\x08\0",)),
        (b"DS", (b"\x28\0\x50\x10",)),
    ):
        for tag in tags:
            at = data.index(tag + vr)
            length = data[at + 6 : at + 8]
            data = data[:at] + tag + b"UN\0\0" + length + b"\0\0" + data[at + 8 :]
    radiograph = read_image(data)
    np.testing.assert_array_equal(radiograph.stored, values)
    assert radiograph.metadata.voi == Window(2048, 4096)


def test_nothing_of_the_patient_but_uids_is_in_the_metadata():
    radiograph = read_image(file_bytes(dataset_of(pattern(12), 12, StudyInstanceUID="1.2.5")))
    metadata = radiograph.metadata
    uids = metadata.sop_instance_uid, metadata.series_instance_uid, metadata.study_instance_uid
    assert uids == ("1.2.3.4", "", "1.2.5")
    text = repr(radiograph.metadata) + repr(radiograph.flags)
    for secret in ("Secret", "ID-4711", "19700101"):
        assert secret not in text


@pytest.mark.parametrize(
    ("elements", "view", "expected"),
    [
        ({"ViewPosition": "PA", "PatientOrientation": ["L", "F"]}, "PA", set()),
        ({"ViewPosition": "AP", "PatientOrientation": ["R", "F"]}, "AP", {"mirrored"}),
        ({"ViewPosition": "LL"}, "lateral", {"lateral"}),
        ({"PatientOrientation": ["P", "F"]}, "lateral", {"lateral"}),
        ({"PatientOrientation": ["LAF", "FL"]}, "frontal", set()),
        ({"PatientOrientation": ["L", "H"]}, "unknown", {"not_upright", "view_unknown"}),
        ({"ViewPosition": "PA", "PatientOrientation": ["A", "F"]}, "PA", {"view_conflict"}),
        ({"ViewPosition": "", "PatientOrientation": ""}, "unknown", {"view_unknown"}),
        ({}, "unknown", {"view_unknown"}),
    ],
)
def test_view_and_orientation(elements, view, expected):
    radiograph = read_image(file_bytes(dataset_of(pattern(12), 12, BurnedInAnnotation="NO", **elements)))
    assert radiograph.metadata.view == view
    assert set(radiograph.flags) == expected


def test_view_from_the_view_code_sequence():
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "399173006", "SCT", "left lateral"
    assert read_image(file_bytes(dataset_of(pattern(12), 12, ViewCodeSequence=[code]))).metadata.view == "lateral"


@pytest.mark.parametrize(
    ("elements", "flag"),
    [
        ({"BurnedInAnnotation": "YES"}, "burned_in"),
        ({}, "burned_in_unknown"),
        ({"RescaleSlope": -10, "RescaleIntercept": 3000}, "negative_slope"),
        ({"RescaleSlope": 0, "RescaleIntercept": 0}, "rescale_unusable"),
        ({"PresentationLUTShape": "INVERSE"}, "monochrome2_with_inverse"),
        ({"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "IDENTITY"}, "monochrome1_with_identity"),
        ({"LossyImageCompression": "01"}, "lossy"),
        ({"ShutterShape": "RECTANGULAR"}, "shutter_present"),
        ({"WindowCenter": 40, "WindowWidth": 0}, "window_fallback"),
        ({"WindowCenter": 40, "WindowWidth": 0.5}, "window_fallback"),
        ({"WindowCenter": [40, 50], "WindowWidth": [400, 500]}, "several_windows"),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "CURVE"}, "voi_function_unknown"),
        ({"SOPClassUID": SecondaryCaptureImageStorage}, "secondary_capture"),
        ({"Modality": None}, "modality_missing"),
    ],
)
def test_what_would_be_guessed_is_flagged(elements, flag):
    radiograph = read_image(file_bytes(dataset_of(pattern(12), 12, **elements)))
    assert flag in radiograph.flags
    assert set(radiograph.flags) <= set(FLAGS)


def test_overlays_are_flagged():
    ds = dataset_of(pattern(12), 12)
    ds.add_new(0x60000010, "US", 5)
    assert "overlay_present" in read_image(file_bytes(ds)).flags


def test_window_with_width_below_one_is_allowed_where_the_function_allows_it():
    ds = dataset_of(pattern(12), 12, WindowCenter=0.5, WindowWidth=0.25, VOILUTFunction="SIGMOID", RescaleSlope="0.001")
    metadata = read_image(file_bytes(ds)).metadata
    assert metadata.voi == Window(0.5, 0.25, "SIGMOID")
    assert metadata.modality_transform == Rescale(0.001, 0.0)


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("undefined_length", [False, True])
def test_lut_sequences(syntax, undefined_length):
    modality, voi = Dataset(), Dataset()
    modality.LUTDescriptor, modality.LUTData = [4096, 0, 12], np.arange(4096, dtype="<u2")[::-1].tobytes()
    voi.LUTDescriptor, voi.LUTData = [256, 100, 10], (np.arange(256, dtype="<u2") * 4).tobytes()
    for item in (modality, voi):
        item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    ds = dataset_of(pattern(12), 12, ModalityLUTSequence=[modality], VOILUTSequence=[voi, voi], RescaleSlope=2)
    ds.file_meta.TransferSyntaxUID = syntax
    for name in ("ModalityLUTSequence", "VOILUTSequence"):
        ds[name].is_undefined_length = undefined_length
        for item in ds[name].value:
            item.is_undefined_length_sequence_item = undefined_length
    radiograph = read_image(file_bytes(ds))
    table, second = radiograph.metadata.modality_transform, radiograph.metadata.voi
    assert isinstance(table, LookupTable) and isinstance(second, LookupTable)
    assert (table.first, table.bits, len(table.entries)) == (0, 12, 4096)
    assert (second.first, second.bits, second.entries[-1]) == (100, 10, 1020)
    assert {"modality_lut", "modality_lut_and_rescale", "several_windows"} <= set(radiograph.flags)


def test_lut_with_negative_first_value_and_65536_entries():
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [0, 0x8000, 16], np.arange(65536, dtype="<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    table = read_image(file_bytes(dataset_of(pattern(16, signed=True), 16, VOILUTSequence=[item]))).metadata.voi
    assert (table.first, len(table.entries), table.bits) == (-32768, 65536, 16)


def test_lut_that_is_too_short_is_ignored_with_a_flag():
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, 12], b"\1\0" * 100
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    ds = dataset_of(pattern(12), 12, VOILUTSequence=[item], WindowCenter=2048, WindowWidth=4096)
    radiograph = read_image(file_bytes(ds))
    assert "voi_lut_unusable" in radiograph.flags
    assert radiograph.metadata.voi == Window(2048, 4096)


# --------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    ({"SOPClassUID": CTImageStorage, "Modality": "CT", "StudyDescription": "XR CHEST AP"}, errors.NotARadiograph),
    ({"SOPClassUID": UltrasoundImageStorage, "Modality": "US"}, errors.NotARadiograph),
    ({"SOPClassUID": XRayRadiofluoroscopicImageStorage, "Modality": "RF"}, errors.NotARadiograph),
    ({"SOPClassUID": SecondaryCaptureImageStorage, "Modality": "OT"}, errors.NotARadiograph),
    ({"SOPClassUID": SecondaryCaptureImageStorage, "Modality": None}, errors.NotARadiograph),
    ({"SOPClassUID": None}, errors.NotARadiograph),
    ({"Modality": "MG"}, errors.NotARadiograph),
    ({"Modality": "CT", "BodyPartExamined": "CHEST"}, errors.NotARadiograph),
    ({"SOPClassUID": DigitalXRayImageStorageForProcessing}, errors.ForProcessing),
    ({"PresentationIntentType": "FOR PROCESSING"}, errors.ForProcessing),
    ({"NumberOfFrames": 2}, errors.MultiFrame),
    ({"NumberOfFrames": 100000}, errors.MultiFrame),
    ({"PixelData": None}, errors.NoPixels),
    ({"HighBit": 15}, errors.InvalidImage),
    ({"BitsAllocated": 32}, errors.InvalidImage),
    ({"BitsStored": 17, "HighBit": 16}, errors.InvalidImage),
    ({"PixelRepresentation": 2}, errors.InvalidImage),
    ({"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3}, errors.InvalidImage),
    ({"PhotometricInterpretation": None}, errors.InvalidImage),
    ({"Rows": None}, errors.InvalidImage),
    ({"Rows": 0}, errors.InvalidImage),
    ({"Rows": ROWS + 1}, errors.InvalidImage),
    ({"Rows": ROWS - 1}, errors.HeaderMismatch),
    ({"Columns": COLUMNS - 1}, errors.HeaderMismatch),
    ({"Rows": 8, "Columns": 8}, errors.HeaderMismatch),
    ({"Rows": 65535, "Columns": 65535}, errors.LimitExceeded),
]


@pytest.mark.parametrize(("elements", "error"), REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_refused_with_the_right_error(elements, error):
    with pytest.raises(error) as caught:
        read_image(file_bytes(dataset_of(pattern(12), 12, **elements)))
    assert type(caught.value) is error


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2.4.94", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.102", "1.2.3"]
)
def test_unknown_transfer_syntax_is_refused_by_name(syntax):
    data = file_bytes(dataset_of(pattern(12), 12))
    known = b"UI\x14\x001.2.840.10008.1.2.1\0"
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    with pytest.raises(errors.UnsupportedSyntax, match=syntax):
        read_image(data.replace(known, b"UI" + struct.pack("<H", len(value)) + value, 1))


@pytest.mark.parametrize("data", [b"", b"\0" * 200, b"GIF89a", b"BM" + b"\0" * 50, b"II*\0" + b"\0" * 200])
def test_other_files_are_refused(data):
    with pytest.raises(errors.InvalidImage, match="no DICOM, PNG or JPEG"):
        read_image(data)


@pytest.mark.parametrize("magic", [b"MZ\x90\0", b"\x7fELF", b"\xcf\xfa\xed\xfe", b"#!/bin/sh\n", b"\x89PNG\r\n\x1a\n"])
def test_polyglots_are_refused(magic):
    data = file_bytes(dataset_of(pattern(12), 12))
    with pytest.raises(errors.InvalidImage, match="preamble"):
        read_image(magic + data[len(magic) :])


def test_tiff_preamble_is_legal():
    data = file_bytes(dataset_of(pattern(12), 12))
    assert read_image(b"II*\0" + data[4:]).stored.shape == (ROWS, COLUMNS)


def test_limits_are_checked_before_anything_is_allocated():
    data = file_bytes(dataset_of(pattern(12), 12))
    with pytest.raises(errors.LimitExceeded, match="bytes"):
        read_image(data, Limits(max_file_bytes=1000))
    with pytest.raises(errors.LimitExceeded, match="pixels"):
        read_image(data, Limits(max_pixels=ROWS * COLUMNS - 1))
    assert read_image(data, Limits(max_pixels=ROWS * COLUMNS)).stored.size == ROWS * COLUMNS


def test_inflation_is_bounded():
    bomb = deflated(b"\x09\0\x01\x10OB\0\0" + struct.pack("<I", 100_000_000) + b"\0" * 100_000_000)
    assert len(bomb) < 200_000
    with pytest.raises(errors.LimitExceeded, match="inflates"):
        read_image(bomb)


def test_deep_nesting_is_refused_without_recursion():
    level = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    data = file_bytes(dataset_of(pattern(12), 12))
    at = data.index(b"\x10\0\x10\0PN")
    with pytest.raises(errors.LimitExceeded, match="nested"):
        read_image(data[:at] + level * 100_000 + data[at:])


def test_lengths_beyond_the_file_are_refused():
    data = file_bytes(dataset_of(pattern(12), 12))
    at = data.index(b"\x10\0\x10\0PN")
    for length in (0xFFFFFFF0, len(data)):
        lie = b"\x09\0\x01\x10OB\0\0" + struct.pack("<I", length)
        with pytest.raises(errors.InvalidImage, match="remain"):
            read_image(data[:at] + lie + data[at:])


def test_repeated_element_is_refused():
    data = file_bytes(dataset_of(pattern(12), 12))
    rows = data[data.index(b"\x28\0\x10\0US") :][:10]
    with pytest.raises(errors.InvalidImage, match="twice"):
        read_image(data.replace(rows, rows + rows, 1))


@pytest.mark.parametrize("times", [2, 3])
def test_what_a_window_or_a_lut_is_called_may_be_repeated_and_is_then_not_taken(times):
    table = Dataset()
    table.LUTDescriptor, table.LUTExplanation, table.LUTData = [4, 0, 12], "STEEP ", [0, 1000, 2000, 4095]
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    named = {"WindowCenter": [1, 2], "WindowWidth": [9, 8], "WindowCenterWidthExplanation": ["SOFT", "HARD"]}
    dataset = dataset_of(pattern(12), 12, **named, VOILUTSequence=Sequence([table, table]))
    dataset["VOILUTSequence"].is_undefined_length = True
    for item in dataset.VOILUTSequence:
        item.is_undefined_length_sequence_item = True
    data = file_bytes(dataset)
    assert {"STEEP", "HARD"} <= {words for _, _, words, _ in read_image(data).metadata.other_windows}
    for tag in (b"\x28\0\x55\x10", b"\x28\0\x03\x30"):
        header = tag + b"LO" + struct.pack("<H", 10 if tag[2] == 0x55 else 6)
        element = data[data.index(header) :][: 8 + header[6]]
        data = data.replace(element, times * element)
    assert [words for _, _, words, _ in read_image(data).metadata.other_windows] == 3 * [""]


@pytest.mark.parametrize(
    "syntax", ["native", "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5"]
)
def test_truncated_pixels_are_refused_at_every_cut(tmp_path, syntax):
    data = file_bytes(dataset_of(pattern(12), 12))
    if syntax != "native":
        tool, *options = WRITERS[syntax]
        data = dcmtk(tool, data, tmp_path, *options)
    for cut in np.linspace(300, len(data) - 10, 40).astype(int):
        with pytest.raises(errors.InvalidImage):
            read_image(data[:cut])


@pytest.mark.parametrize("syntax", ["native", "compressed"])
def test_what_stands_behind_the_pixel_data_is_in_place_of_nothing(syntax):
    """pydicom and others take the last of two elements."""
    import imagecodecs

    values = pattern(12)
    good = file_bytes(dataset_of(values, 12))
    pixels = good[good.index(b"\xe0\x7f\x10\0OW") :]
    if syntax == "compressed":
        good = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode(values))
    rows = b"\x28\0\x10\0US\2\0" + struct.pack("<H", 20)
    for behind in (pixels, rows, b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0" + rows):
        with pytest.raises(errors.InvalidImage, match="behind the pixel data"):
            read_image(good + behind)
    for behind in (bytes(512), b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0", b"left by a transfer " * 20):
        assert np.array_equal(read_image(good + behind).stored, values)


def test_png_of_two_headers_is_refused():
    data = encoded(Image.fromarray(GRAY), "PNG")
    header = data[8:33]
    with pytest.raises(errors.InvalidImage, match="two header"):
        read_image(data[:33] + header + data[33:])


@pytest.mark.parametrize("kind", ["jpeg8", "jpegls", "jpeg2k", "htj2k"])
def test_truncated_codestream_in_a_whole_file_is_refused(kind):
    import imagecodecs

    values = pattern(12)
    syntax, arguments = LOSSLESS[kind]
    codestream = getattr(imagecodecs, f"{kind}_encode")(values, **arguments)
    assert np.array_equal(read_image(compressed_bytes(values, 12, syntax, codestream)).stored, values)
    for cut in (len(codestream) - 4, len(codestream) // 2, 120, 20, 1):
        with pytest.raises(errors.InvalidImage):
            read_image(compressed_bytes(values, 12, syntax, codestream[:cut]))


LIES = [{"Rows": 16, "Columns": 16}, {"Rows": ROWS + 1}, {"Columns": COLUMNS - 1}, {"Rows": COLUMNS, "Columns": ROWS}]
LOSSLESS = {
    "jpeg8": ("1.2.840.10008.1.2.4.70", {"lossless": True, "bitspersample": 12}),
    "jpegls": ("1.2.840.10008.1.2.4.80", {}),
    "jpeg2k": ("1.2.840.10008.1.2.4.90", {"codecformat": "J2K", "reversible": True, "level": 0, "bitspersample": 12}),
    "htj2k": ("1.2.840.10008.1.2.4.201", {"reversible": True}),
}


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("jpegls", {"level": 3}), ("jpeg2k", {"codecformat": "J2K", "level": 40, "reversible": False}),
     ("htj2k", {"reversible": False})],
)  # fmt: skip
def test_lossy_codestream_in_a_lossless_syntax_is_said_to_be_lossy(kind, arguments):
    import imagecodecs

    values = pattern(16)
    codestream = getattr(imagecodecs, f"{kind}_encode")(values, **arguments)
    assert "lossy" in read_image(compressed_bytes(values, 16, LOSSLESS[kind][0], codestream)).flags


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("lie", LIES, ids=str)
def test_header_lies_are_a_mismatch(kind, lie):
    import imagecodecs

    values = pattern(12)
    syntax, arguments = LOSSLESS[kind]
    codestream = getattr(imagecodecs, f"{kind}_encode")(values, **arguments)
    assert np.array_equal(read_image(compressed_bytes(values, 12, syntax, codestream)).stored, values)
    with pytest.raises(errors.HeaderMismatch, match="codestream is 45x67x1"):
        read_image(compressed_bytes(values, 12, syntax, codestream, **lie))


@pytest.mark.parametrize("lie", LIES[:-1], ids=str)  # RLE does not say its width: the swapped lie cannot be seen
def test_rle_header_lies_never_give_a_picture(tmp_path, lie):
    ds = pydicom.dcmread(io.BytesIO(dcmtk("dcmcrle", file_bytes(dataset_of(pattern(12), 12)), tmp_path)))
    for name, value in lie.items():
        setattr(ds, name, value)
    with pytest.raises(errors.InvalidImage):
        read_image(file_bytes(ds))


def test_precision_below_bits_stored_is_a_mismatch():
    import imagecodecs

    codestream = imagecodecs.jpegls_encode(pattern(8))
    with pytest.raises(errors.HeaderMismatch, match="bits a sample"):
        read_image(compressed_bytes(pattern(12), 12, "1.2.840.10008.1.2.4.80", codestream))


def test_pixels_that_contradict_the_transfer_syntax_are_a_mismatch():
    import imagecodecs

    values = pattern(12)
    codestream = imagecodecs.jpegls_encode(values)
    with pytest.raises(errors.HeaderMismatch, match="jpeg_ls"):
        read_image(compressed_bytes(values, 12, "1.2.840.10008.1.2.4.70", codestream))
    with pytest.raises(errors.HeaderMismatch, match="has native"):
        data = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.80", codestream)
        read_image(data.replace(b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.1\0\0\0", 1))


def test_offset_table_with_several_frames_is_refused():
    import imagecodecs

    values = pattern(12)
    codestream = imagecodecs.jpegls_encode(values)
    ds = dataset_of(values, 12)
    ds.PixelData = encapsulate([codestream, codestream])
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.80"
    with pytest.raises(errors.MultiFrame):
        read_image(file_bytes(ds))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_a_typed_error_or_a_picture_of_the_header_s_shape(data):
    import imagecodecs

    values = pattern(12, rows=12, columns=14)
    native = file_bytes(dataset_of(values, 12, WindowCenter=2048, WindowWidth=4096, ViewCodeSequence=[Dataset()]))
    jpeg_ls = compressed_bytes(values, 12, "1.2.840.10008.1.2.4.80", imagecodecs.jpegls_encode(values))
    damaged = bytearray(data.draw(st.sampled_from([native, jpeg_ls])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(128, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(len(damaged) - 40, len(damaged)))]
    try:
        radiograph = read_image(bytes(damaged), Limits(max_pixels=100_000))
    except errors.InvalidImage:
        return
    assert radiograph.stored.shape == (radiograph.metadata.rows, radiograph.metadata.columns)
    assert set(radiograph.flags) <= set(FLAGS)


# --------------------------------------------------------------------------------------------------------- PNG, JPEG


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


GRAY = pattern(8)
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], axis=-1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_gray_png_of_every_colour_type_is_the_same_gray(mode):
    image = Image.fromarray(GRAY)
    image = image.convert(mode) if mode != "P" else image.quantize(256)
    radiograph = read_image(encoded(image))
    np.testing.assert_array_equal(radiograph.stored, np.asarray(image.convert("L")))
    assert ("palette" in radiograph.flags) == (mode == "P")


def test_true_colour_stays_colour():
    radiograph = read_image(encoded(Image.fromarray(COLOUR)))
    np.testing.assert_array_equal(radiograph.stored, COLOUR)
    assert radiograph.metadata.photometric == "RGB"


def test_transparency_is_dropped_with_a_flag():
    image = Image.fromarray(COLOUR)
    image.putalpha(Image.fromarray(GRAY))
    radiograph = read_image(encoded(image))
    np.testing.assert_array_equal(radiograph.stored, COLOUR)
    assert "alpha_dropped" in radiograph.flags


def test_16_bit_png_gives_raw_values():
    values = pattern(16)
    radiograph = read_image(encoded(Image.fromarray(values)))
    np.testing.assert_array_equal(radiograph.stored, values)
    assert (radiograph.metadata.bits_stored, radiograph.metadata.signed) == (16, False)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}])
def test_jpeg_equals_pillow(options):
    for pixels in (GRAY, COLOUR):
        data = encoded(Image.fromarray(pixels), "JPEG", **options)
        radiograph = read_image(data)
        np.testing.assert_array_equal(radiograph.stored, np.asarray(Image.open(io.BytesIO(data))))
        assert "lossy" in radiograph.flags


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    radiograph = read_image(encoded(Image.fromarray(GRAY), "JPEG", exif=exif, quality=100))
    assert radiograph.stored.shape == GRAY.T.shape
    assert np.abs(radiograph.stored.astype(int) - np.rot90(GRAY, -1)).max() < 6
    assert "exif_transposed" in radiograph.flags


@pytest.mark.parametrize(
    ("kind", "value"),
    [(1, b"\6"), (2, b"6"), (7, b"\6"), (3, b"\0"), (3, b"\x09")],
    ids=["byte", "text", "bytes", "0", "9"],
)
def test_exif_orientation_that_is_none_turns_nothing(kind, value):
    entry = struct.pack("<HHI", 0x0112, kind, 1) + value.ljust(4, b"\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    radiograph = read_image(encoded(Image.fromarray(GRAY), "JPEG", exif=exif, quality=100))
    assert np.abs(radiograph.stored.astype(int) - GRAY).max() < 6
    assert "exif_transposed" not in radiograph.flags


@pytest.mark.parametrize("turn", [1, 6])
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_resolution_of_a_picture_gives_the_shape_of_its_pixels(form, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    out = io.BytesIO()
    options = {"exif": exif} if form == "jpeg" else {}
    Image.fromarray(pattern(8)).save(out, form, dpi=(300, 150), **options)
    radiograph = read_image(out.getvalue())
    # 300 dots an inch across and 150 down are pixels twice as high as wide, until they lie on their side
    expected = 0.5 if options and turn == 6 else 2
    assert radiograph.metadata.pixel_aspect_ratio == pytest.approx(expected, rel=1e-3)
    assert "pixels_not_square" in radiograph.flags


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_truncated_pictures_are_refused(form):
    data = encoded(Image.fromarray(pattern(8, rows=200, columns=200)), form)
    for cut in (len(data) - 12, len(data) // 2, len(data) // 3, 40, 9):
        with pytest.raises(errors.InvalidImage):
            read_image(data[:cut])


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_picture_size_is_limited_from_its_header(form):
    with pytest.raises(errors.LimitExceeded):
        read_image(encoded(Image.fromarray(GRAY), form), Limits(max_pixels=1000))


def test_animated_png_is_multi_frame():
    frames = [Image.fromarray(GRAY), Image.fromarray(GRAY[::-1].copy())]
    with pytest.raises(errors.MultiFrame):
        read_image(encoded(frames[0], save_all=True, append_images=frames[1:]))


# --------------------------------------------------------------------------------------------------------- real files


@pytest.mark.slow
def test_real_radiographs_equal_pydicom_s_reference(shared_data):
    """RG1 and RG2 in each lossless syntax equal the original; lossy ones equal pydicom's decoding within one value."""
    original = {
        name: pydicom.dcmread(shared_data / f"dicom/{name}_UNC_explicitLE.dcm").pixel_array for name in ("RG1", "RG2")
    }
    native = pydicom.dcmread(shared_data / "dicom/NIH_DX_SC_8bit_implicitLE.dcm").pixel_array
    checked = 0
    for path in sorted(shared_data.glob("dicom*/*.dcm")):
        if path.name.startswith(("OFFIS", "weasis")):
            with pytest.raises(errors.NotARadiograph):
                read_image(path.read_bytes())
            continue
        radiograph = read_image(path.read_bytes())
        reference = original.get(path.name[:3], native)
        if path.name.startswith("Dental") or "lossy" in radiograph.flags:
            if path.name == "RG2_JPEG_extended12.dcm":
                continue  # compared with DCMTK below; pydicom's decoders refuse it
            reference = pydicom.dcmread(path).pixel_array
            assert np.abs(radiograph.stored.astype(int) - reference).max() <= 1, path.name
        else:
            np.testing.assert_array_equal(radiograph.stored, reference, err_msg=path.name)
        checked += 1
    assert checked >= 15


def test_12_bit_jpeg_with_a_wrong_scan_header_equals_dcmtk(shared_data, tmp_path):
    data = (shared_data / "dicom/RG2_JPEG_extended12.dcm").read_bytes()
    reference = pydicom.dcmread(io.BytesIO(dcmtk("dcmdjpeg", data, tmp_path))).pixel_array
    assert np.abs(read_image(data).stored.astype(int) - np.minimum(reference, 1023)).max() <= 1


def test_odd_real_files_are_refused(shared_data):
    paths = sorted(shared_data.glob("hostile_or_odd/*.dcm"))
    assert len(paths) >= 3
    for path in paths:
        with pytest.raises(errors.NotARadiograph):
            read_image(path.read_bytes())


def test_real_pictures_equal_pillow(shared_data):
    paths = sorted(shared_data.glob("images/*.png"))
    assert len(paths) >= 15
    for path in paths:
        np.testing.assert_array_equal(read_image(path.read_bytes()).stored, np.asarray(Image.open(path).convert("L")))


def test_radiograph_from_pydicom_data():
    """The file that the demonstration reads."""
    from pydicom.data import get_testdata_file

    path = get_testdata_file("RG1_UNCR.dcm", download=False)
    radiograph = read_image(Path(path).read_bytes())
    np.testing.assert_array_equal(radiograph.stored, pydicom.dcmread(path).pixel_array)
    assert radiograph.metadata.view == "PA" and radiograph.metadata.photometric == "MONOCHROME1"
    assert radiograph.metadata.voi == Window(15000, 30000)


def _pillow(kind):
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, kind)
    return file.getvalue()


def _zip():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (lambda: b"", "empty"),
        (lambda: _pillow("PDF"), "a PDF"),
        (_zip, "a ZIP archive or an Office document"),
        (lambda: gzip.compress(b"x"), "compressed by gzip"),
        (lambda: _pillow("TIFF"), "a TIFF"),
        (lambda: _pillow("GIF"), "a GIF"),
        (lambda: _pillow("BMP"), "a BMP"),
        (lambda: _pillow("WEBP"), "a WebP picture"),
        (lambda: _pillow("JPEG2000"), "a JPEG 2000 file"),
        (lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC picture"),
        (lambda: b"\n<!DOCTYPE html><html>", "an HTML page"),
        (lambda: b'<?xml version="1.0"?>', "XML"),
        (lambda: "Befund: unauffällig".encode(), "text"),
        (lambda: b"BMI 23", "text"),
        (lambda: b"\x7fELF\2\1\1\0", "a program"),
        (lambda: bytes(64), "of an unknown kind"),
    ],
)
def test_a_file_that_is_no_image_is_named_by_its_kind(data, kind):
    with pytest.raises(errors.InvalidImage, match=rf"^file is {kind}, no DICOM, PNG or JPEG"):
        read_image(data())
