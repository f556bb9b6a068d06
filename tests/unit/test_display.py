"""Both presets against their references: OpenCV and the published recipe, DCMTK and pydicom."""

import io
import shutil
import subprocess
import warnings

import numpy as np
import pydicom
import pytest
from dicom_files import dataset_of, file_bytes, pattern
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from cxr_triton.errors import InvalidImage
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.display import equalize_histogram, mimic_jpg, render, voi_display
from cxr_triton.pixels.radiograph import Metadata, Radiograph
from cxr_triton.pixels.transforms import LookupTable, Rescale, Window

STORED = hnp.arrays(
    st.sampled_from([np.uint8, np.uint16, np.int16]),
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
)


def equalized_per_pixel(picture: np.ndarray) -> np.ndarray:
    """OpenCV's documented algorithm, one pixel at a time."""
    values = picture.ravel().tolist()
    first = min(values)
    above = len(values) - values.count(first)
    if above == 0:
        return picture.copy()
    scale = np.float32(255) / np.float32(above)
    below = {v: sum(1 for x in values if x <= v) - values.count(first) for v in set(values)}
    return np.array([round(float(np.float32(below[v]) * scale)) for v in values], np.uint8).reshape(picture.shape)


def recipe(stored: np.ndarray, monochrome1: bool, equalize) -> np.ndarray:
    """The function that made MIMIC-CXR-JPG, in integers that cannot overflow."""
    raw = stored.astype(np.int64)
    raw = raw - raw.min()
    rescaled = (raw / raw.max() * 255).astype(np.uint8)
    return equalize(~rescaled if monochrome1 else rescaled)


@settings(max_examples=60, deadline=None)
@given(STORED, st.booleans())
def test_mimic_jpg_follows_the_published_recipe(stored, monochrome1):
    if stored.min() == stored.max():
        with pytest.raises(InvalidImage, match="constant"):
            mimic_jpg(stored, monochrome1)
        return
    np.testing.assert_array_equal(mimic_jpg(stored, monochrome1), recipe(stored, monochrome1, equalized_per_pixel))


def test_equalization_equals_opencv():
    cv2 = pytest.importorskip("cv2", reason="no opencv-python-headless")
    rng = np.random.default_rng(0)
    for _ in range(300):
        low, high = np.sort(rng.integers(0, 257, 2))
        picture = rng.integers(low, high + 1, rng.integers(1, 200, 2)).clip(0, 255).astype(np.uint8)
        picture[rng.random(picture.shape) < rng.random()] = picture.flat[0]  # uneven histograms
        np.testing.assert_array_equal(equalize_histogram(picture), cv2.equalizeHist(picture))
        for bits in (8, 12, 16):
            stored = rng.integers(0, 2**bits, (50, 40)).astype(np.uint16)
            np.testing.assert_array_equal(mimic_jpg(stored, True), recipe(stored, True, cv2.equalizeHist))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_inverted_twin_gives_the_same_picture(bits):
    """Exactly in voi_display. In mimic_jpg the recipe truncates to 8 bits before it complements, so a value may fall
    into the neighbouring of 256 bins: pictures differ by at most what that one bin adds to the cumulated histogram."""
    stored = pattern(bits, rows=200, columns=160)
    twin = (2**bits - 1 - stored).astype(stored.dtype)
    first = voi_display(stored, monochrome1=False, bits_stored=bits, voi=Window(2 ** (bits - 1), 2**bits))
    second = voi_display(twin, monochrome1=True, bits_stored=bits, voi=Window(2 ** (bits - 1), 2**bits))
    np.testing.assert_array_equal(first, second)
    one, other = mimic_jpg(stored, False).astype(int), mimic_jpg(twin, True).astype(int)
    bins = np.bincount(recipe(stored, False, lambda x: x).ravel(), minlength=256)
    bound = 2 + 255 * 2 * np.sort(bins)[-2:].sum() / bins.sum()
    assert np.abs(one - other).max() <= bound
    assert np.abs(one - other).mean() < 1


def test_inverted_twin_of_a_real_radiograph_gives_the_same_picture():
    """RG1 is MONOCHROME1; the twin's window is mirrored with it (PS3.3 C.11.2.1.2.1 counts from center - 0.5)."""
    ds = pydicom.dcmread(get_testdata_file("RG1_UNCR.dcm", download=False))
    first = render(read_image(file_bytes(ds)), "voi_display")
    ds.PixelData = (2**15 - 1 - ds.pixel_array).astype("<u2").tobytes()
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.WindowCenter = 2**15 - 15000
    np.testing.assert_array_equal(render(read_image(file_bytes(ds)), "voi_display").pixels, first.pixels)


def pydicom_display(ds: Dataset) -> np.ndarray:
    """pydicom's modality and VOI transforms in float, scaled by the output range that the header declares."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = apply_modality_lut(ds.pixel_array, ds)
        shown = apply_voi_lut(values, ds).astype(float)
    if "VOILUTSequence" in ds:
        low, high = 0, 2 ** ds.VOILUTSequence[0].LUTDescriptor[2] - 1
    else:  # pydicom's windows end at the range of the modality transform's output
        stored = (
            np.array([-(2 ** (ds.BitsStored - 1)), 2 ** (ds.BitsStored - 1) - 1])
            if ds.PixelRepresentation
            else np.array([0, 2**ds.BitsStored - 1])
        )
        low, high = sorted(stored * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0)))
        if "ModalityLUTSequence" in ds:
            low, high = 0, 2 ** ds.ModalityLUTSequence[0].LUTDescriptor[2] - 1
    gray = (shown - low) / (high - low)
    return np.rint(255 * (1 - gray if ds.PhotometricInterpretation == "MONOCHROME1" else gray))


def lut_item(first: int, entries: np.ndarray, bits: int) -> Dataset:
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 65536, first, bits]
    item.LUTData = entries.astype("<u2").tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return item


CURVE = np.rint(4095 * np.linspace(0, 1, 4096) ** 0.5).astype(np.uint16)
DISPLAYS = [
    {"WindowCenter": 2048, "WindowWidth": 4096},
    {"WindowCenter": 1000, "WindowWidth": 700},
    {"WindowCenter": 1000.5, "WindowWidth": 1},
    {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
    {"WindowCenter": 1000, "WindowWidth": 2000, "RescaleSlope": "0.5", "RescaleIntercept": "-100"},
    {"WindowCenter": [1000, 2000], "WindowWidth": [700, 900]},
    {"VOILUTSequence": [lut_item(0, CURVE, 12)]},
    {"VOILUTSequence": [lut_item(1000, CURVE[:2000] // 2, 11)], "WindowCenter": 5, "WindowWidth": 5},
    {"ModalityLUTSequence": [lut_item(0, CURVE * 16, 16)], "WindowCenter": 32000, "WindowWidth": 24000},
    {"ModalityLUTSequence": [lut_item(0, CURVE * 16, 16)], "VOILUTSequence": [lut_item(9000, CURVE[::-1].copy(), 12)]},
    {},
    {"RescaleSlope": "2", "RescaleIntercept": "10"},
]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("elements", DISPLAYS, ids=lambda elements: "+".join(elements) or "none")
def test_voi_display_equals_pydicom_within_one_grey(elements, photometric):
    ds = dataset_of(pattern(12), 12, PhotometricInterpretation=photometric, **elements)
    data = file_bytes(ds)
    picture = render(read_image(data), "voi_display")
    reference = pydicom_display(pydicom.dcmread(io.BytesIO(data)))
    assert np.abs(picture.pixels - reference).max() <= 1


DCMTK_DISPLAYS = [
    (False, ["+Wi", "1"], {"WindowCenter": 1700, "WindowWidth": 1500}),
    (True, ["+Wi", "1"], {"WindowCenter": -300, "WindowWidth": 1500}),
    (False, ["+Wi", "1", "+Wfs"], {"WindowCenter": 1700, "WindowWidth": 1500, "VOILUTFunction": "SIGMOID"}),
    (False, ["+Wl", "1"], {"VOILUTSequence": [lut_item(0, CURVE, 12)]}),
    # pydicom inverts the range of a negative slope a second time; the standard and DCMTK do not
    (
        False,
        ["+Wi", "1"],
        {"WindowCenter": -17500, "WindowWidth": 30000, "RescaleSlope": "-10", "RescaleIntercept": "3000"},
    ),
    (False, [], {}),
    (True, [], {}),
]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("signed", "options", "elements"), DCMTK_DISPLAYS)
def test_voi_display_equals_dcmtk_within_one_grey(tmp_path, photometric, signed, options, elements):
    if not shutil.which("dcmj2pnm"):
        pytest.skip("no dcmj2pnm: install dcmtk")
    data = file_bytes(dataset_of(pattern(12, signed), 12, PhotometricInterpretation=photometric, **elements))
    (tmp_path / "in.dcm").write_bytes(data)
    subprocess.run(["dcmj2pnm", "+on", *options, tmp_path / "in.dcm", tmp_path / "out.png"], check=True)
    reference = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    assert reference.max() - reference.min() > 150
    assert np.abs(render(read_image(data), "voi_display").pixels - reference).max() <= 1  # DCMTK truncates, we round


@pytest.mark.slow
def test_real_radiographs_equal_dcmtk_within_one_grey(shared_data, tmp_path):
    if not shutil.which("dcmj2pnm"):
        pytest.skip("no dcmj2pnm: install dcmtk")
    for name, options in (("RG1_JPEG_lossless_SV1", ["+Wi", "1"]), ("NIH_DX_JPEG_baseline", [])):
        path = shared_data / f"dicom_derived/{name}.dcm"
        subprocess.run(["dcmj2pnm", "+on", *options, path, tmp_path / "out.png"], check=True, capture_output=True)
        reference = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
        picture = render(read_image(path.read_bytes()), "voi_display")
        assert np.abs(picture.pixels - reference).max() <= 1, name


def test_without_voi_a_mostly_unused_range_is_scaled_by_min_and_max():
    values = pattern(12)
    wide = Radiograph(values, Metadata("dicom", *values.shape, bits_stored=16))
    fitting = Radiograph(values, Metadata("dicom", *values.shape, bits_stored=12))
    first, second = render(wide, "voi_display"), render(fitting, "voi_display")
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert "range_fallback" in first.flags and "full_range" in second.flags


def test_unusable_window_falls_back_to_the_full_range():
    ds = dataset_of(pattern(12), 12, WindowCenter=40, WindowWidth=0)
    picture = render(read_image(file_bytes(ds)), "voi_display")
    np.testing.assert_array_equal(
        picture.pixels, render(read_image(file_bytes(dataset_of(pattern(12), 12))), "voi_display").pixels
    )
    assert {"window_fallback", "full_range"} <= set(picture.flags)


def test_table_that_calls_itself_deeper_than_it_is_stays_visible():
    ds = dataset_of(pattern(12), 12, VOILUTSequence=[lut_item(0, CURVE // 4, 16)])
    picture = render(read_image(file_bytes(ds)), "voi_display")
    assert "lut_corrected" in picture.flags
    assert picture.pixels.max() == 255


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_in_display_and_part_of_the_recipe_in_mimic(photometric):
    values = pattern(12) // 8 + 1000
    values[:, :10] = 4000
    plain = dataset_of(values, 12, PhotometricInterpretation=photometric)
    padded = dataset_of(
        values, 12, PhotometricInterpretation=photometric, PixelPaddingValue=3900, PixelPaddingRangeLimit=4095
    )
    picture = render(read_image(file_bytes(padded)), "voi_display")
    assert (picture.pixels[:, :10] == 0).all()
    assert picture.pixels[:, 10:].min() == 0 and picture.pixels[:, 10:].max() == 255  # padding does not set the scale
    assert picture.padding_share == pytest.approx(10 / 67)
    assert "padding" in picture.flags
    mimic = render(read_image(file_bytes(padded)), "mimic_jpg")
    np.testing.assert_array_equal(mimic.pixels, render(read_image(file_bytes(plain)), "mimic_jpg").pixels)
    assert mimic.padding_share == picture.padding_share


def test_percentiles_are_stored_values():
    values = pattern(12, signed=True)
    picture = render(read_image(file_bytes(dataset_of(values, 12, RescaleSlope=3))), "mimic_jpg")
    expected = np.percentile(values, [0.5, 99.5], method="inverted_cdf")
    assert picture.percentiles == tuple(expected.astype(int))


@pytest.mark.parametrize("preset", ["mimic_jpg", "voi_display"])
def test_constant_pictures_are_refused(preset):
    values = np.full((20, 20), 7, np.uint16)
    with pytest.raises(InvalidImage, match="constant"):
        render(read_image(file_bytes(dataset_of(values, 12))), preset)


def test_window_beside_every_value_is_refused():
    ds = dataset_of(pattern(12), 12, WindowCenter=30000, WindowWidth=10)
    with pytest.raises(InvalidImage, match="window"):
        render(read_image(file_bytes(ds)), "voi_display")
    assert render(read_image(file_bytes(ds)), "mimic_jpg").pixels.max() == 255


def test_display_ready_pictures_stay_as_they_are():
    gray = pattern(8)
    out = io.BytesIO()
    Image.fromarray(gray).save(out, "PNG")
    picture = render(read_image(out.getvalue()), "mimic_jpg")
    np.testing.assert_array_equal(picture.pixels, gray)
    assert picture.preset == "as_is" and "display_ready" in picture.flags


@pytest.mark.parametrize("preset", ["mimic_jpg", "voi_display"])
def test_16_bit_png_runs_the_preset_like_a_dicom(preset):
    values = pattern(16)
    out = io.BytesIO()
    Image.fromarray(values).save(out, "PNG")
    picture = render(read_image(out.getvalue()), preset)
    twin = render(read_image(file_bytes(dataset_of(values, 16))), preset)
    assert picture.preset == preset
    np.testing.assert_array_equal(picture.pixels, twin.pixels)


def test_inverted_chest_is_suspected_and_a_correct_one_is_not(shared_data):
    """Chest pictures with dark background; the flag never changes a pixel."""
    suspected = {False: 0, True: 0}
    paths = sorted(shared_data.glob("images/*.png"))
    for path in paths:
        gray = np.asarray(Image.open(path).convert("L"))
        for inverted in (False, True):
            stored = np.ascontiguousarray(255 - gray if inverted else gray)
            picture = render(Radiograph(stored, Metadata("dicom", *stored.shape, bits_stored=8)), "voi_display")
            np.testing.assert_array_equal(picture.pixels, stored)
            suspected[inverted] += "polarity_suspect" in picture.flags
    assert suspected[False] == 0
    assert suspected[True] >= len(paths) // 3


def test_rescale_and_tables_take_floats():
    assert Rescale(2, -1)(np.array([0.5])).tolist() == [0]
    table = LookupTable(10, np.array([5, 6, 7], np.uint16), 3)
    assert table(np.array([-4.0, 10.4, 11.5, 99])).tolist() == [5, 5, 7, 7]
