"""A damaged file is refused or flagged, and a whole one neither."""

import contextlib
import io
import logging
import threading
import zlib
from dataclasses import replace

import imagecodecs
import numpy as np
import pytest
from damage import COMPRESSED, DAMAGES, damaged, outcome
from dicom_files import pattern
from PIL import Image

from cxr_triton import errors
from cxr_triton.phantom import draw
from cxr_triton.phantom_file import encode, write_dicom
from cxr_triton.pixels.codestream import decode, inspect
from cxr_triton.pixels.dicom import read_image
from cxr_triton.pixels.jpeg_scan import require_whole_scans
from cxr_triton.pixels.step import has_step

JPEG_2000, HTJ2K, LOSSY_JPEG_2000 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.91"
FLIP = "1 bit flipped"


def phantom(syntax: str) -> bytes:
    return write_dicom(draw(np.random.default_rng(1)), syntax=syntax, seed="damage")


def smooth(bits: int = 8) -> np.ndarray:
    """Structure that goes through the whole picture, and noise: (256, 256) unsigned."""
    row, column = np.mgrid[:256, :256] / 256
    values = 0.4 + 0.2 * np.sin(9 * column) * np.cos(3 * row) + np.random.default_rng(3).normal(0, 0.004, (256, 256))
    return (values * (2**bits - 1)).astype(np.uint8 if bits == 8 else np.uint16)


def jpeg(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def jpeg_2000(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG2000", no_jp2=True, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != FLIP])
@pytest.mark.parametrize("syntax", COMPRESSED)
def test_torn_stream_is_not_silent(syntax, kind):
    data = phantom(syntax)
    whole = read_image(data).stored
    found = [outcome(broken, whole) for broken in damaged(data, kind, np.random.default_rng(5))]
    allowed = {"refused", "flagged", "harmless"}
    if syntax == "rle" and kind == "64 bytes zeroed":  # literal bytes are pixels, which nothing protects
        assert max((wrong for name, wrong in found if name == "read"), default=0) < 0.001
        allowed |= {"read"}
    if syntax in ("jpeg_baseline", "jpeg_extended"):  # other codes of the table may fit by chance, as many and as long
        assert sum(name == "read" for name, _ in found) <= 1
        allowed |= {"read"}
    assert {name for name, _ in found} <= allowed


@pytest.mark.parametrize("syntax", ["deflated", "rle", "jpeg_lossless", "jpeg_ls", "jpeg_2000", "htj2k"])
def test_flipped_bit_that_is_not_noticed_changes_few_pixels(syntax):
    data = phantom(syntax)
    whole = read_image(data).stored
    found = [outcome(broken, whole) for broken in damaged(data, FLIP, np.random.default_rng(6))]
    assert max(wrong for name, wrong in found if name != "flagged") < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("syntax", COMPRESSED)
def test_whole_phantoms_are_not_suspected(syntax):
    for seed in range(12):
        data = write_dicom(draw(np.random.default_rng(seed)), syntax=syntax, seed=str(seed))
        assert "damage_suspected" not in read_image(data).flags


@pytest.mark.slow
def test_whole_radiographs_are_neither_refused_nor_suspected(shared_data):
    kept = 0
    for path in sorted([*shared_data.glob("dicom*/*.dcm"), *shared_data.glob("images/*")]):
        try:
            assert "damage_suspected" not in read_image(path.read_bytes()).flags, path.name
            kept += 1
        except errors.InvalidImage as error:
            assert "damaged" not in error.message, path.name
    assert kept >= 30


def test_rows_that_openjph_does_not_write_are_never_shown():
    stream = bytearray(encode(smooth(16), 16, "htj2k"))
    stream[len(stream) // 2 : len(stream) // 2 + 8192] = bytes(8192)
    header = inspect(HTJ2K, bytes(stream))
    with pytest.raises(errors.InvalidImage, match="does not decode"):
        decode(header, bytes(stream), (256, 256), np.dtype(np.uint16))


@pytest.mark.parametrize("syntax", [HTJ2K, "1.2.840.10008.1.2.4.203"])
def test_samples_that_wrap_in_openjph_are_not_silent(syntax):
    """Magnitudes of HTJ2K have no check; OpenJPEG clamps what OpenJPH wraps."""
    stream = encode(pattern(16), 16, "htj2k")
    start, wrapped = stream.index(b"\xff\x93") + 2, 0
    for at in np.random.default_rng(7).integers(start, len(stream) - 2, 200):
        broken = bytearray(stream)
        broken[at] ^= 0x80
        try:
            theirs = imagecodecs.jpeg2k_decode(broken)
            with contextlib.redirect_stderr(io.StringIO()):
                ours = imagecodecs.htj2k_decode(bytes(broken))
        except imagecodecs.Jpeg2kError:
            continue
        if np.array_equal(ours, theirs) or not ours.any():
            continue
        flags: set[str] = set()
        header = replace(inspect(syntax, bytes(broken)), lossy=False if syntax == HTJ2K else None)
        try:
            decode(header, bytes(broken), pattern(16).shape, np.dtype(np.uint16), flags)
            assert syntax != HTJ2K and flags == {"damage_suspected"}
        except errors.InvalidImage:
            pass
        wrapped += 1
    assert wrapped > 3


def test_what_other_threads_cannot_raise_is_not_this_picture(monkeypatch):
    stream = encode(smooth(16), 16, "htj2k")
    heard: list[str] = []
    monkeypatch.setattr("sys.unraisablehook", lambda unraised: heard.append(str(unraised.exc_value)))

    class Faulty:
        def __del__(self):
            raise ValueError("of another thread")

    def interrupted(*arguments, **options):
        thread = threading.Thread(target=Faulty)
        thread.start()
        thread.join()
        return whole(*arguments, **options)

    whole = imagecodecs.htj2k_decode
    monkeypatch.setattr(imagecodecs, "htj2k_decode", interrupted)
    np.testing.assert_array_equal(decode(inspect(HTJ2K, stream), stream, (256, 256), np.dtype(np.uint16)), smooth(16))
    assert heard == ["of another thread"]


@pytest.mark.parametrize("level", [0.0001, 0.001, 0.01])
def test_irreversible_htj2k_is_no_damage(level):
    stream = imagecodecs.htj2k_encode(smooth(16), reversible=False, level=level)
    flags: set[str] = set()
    decode(inspect("1.2.840.10008.1.2.4.203", stream), stream, (256, 256), np.dtype(np.uint16), flags)
    assert not flags


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"irreversible": True},
        {"quality_mode": "rates", "quality_layers": [40, 20, 10]},
        {"irreversible": True, "quality_mode": "rates", "quality_layers": [80, 40, 20]},
        {"tile_size": (100, 100)},
        {"codeblock_size": (16, 64), "progression": "RPCL", "precinct_size": (128, 128)},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 12])
def test_jpeg_2000_of_any_structure_is_no_damage(options, bits):
    stream = jpeg_2000(smooth(bits), **options)
    flags: set[str] = set()
    decode(inspect(LOSSY_JPEG_2000, stream), stream, (256, 256), np.dtype(np.uint16), flags)
    assert not flags


def test_harmless_warnings_are_no_damage():
    """A marker that OpenJPEG does not know, and markers of packets that are announced as possible and not there."""
    values = smooth(8)
    stream = bytearray(jpeg_2000(values))
    at = stream.index(b"\xff\x52")
    stream[at + 4] |= 2
    stream[at:at] = b"\xff\x70\0\4\0\0"
    np.testing.assert_array_equal(
        decode(replace(inspect(JPEG_2000, stream), lossy=False), bytes(stream), values.shape, values.dtype), values
    )


def test_damage_of_lossy_jpeg_2000_is_flagged():
    stream = jpeg_2000(smooth(8), irreversible=True)
    header = inspect(LOSSY_JPEG_2000, stream)
    for broken in damaged(stream, "64 bytes zeroed", np.random.default_rng(2)):
        flags: set[str] = set()
        decode(header, broken, (256, 256), np.dtype(np.uint8), flags)
        assert flags == {"damage_suspected"}


def test_what_openjpeg_says_is_not_printed(caplog):
    stream = jpeg_2000(smooth(8))
    broken = next(damaged(stream, "64 bytes zeroed", np.random.default_rng(2)))
    with caplog.at_level(logging.DEBUG):
        decode(inspect(LOSSY_JPEG_2000, broken), broken, (256, 256), np.dtype(np.uint8))
    assert not caplog.records


COLOUR = np.stack([smooth(), smooth()[::-1], smooth().T], axis=2)
JPEGS = {
    "gray": jpeg(smooth()),
    "optimized": jpeg(smooth(), optimize=True, quality=30),
    "restarts": jpeg(smooth(), restart_marker_blocks=7),
    "4:4:4": jpeg(COLOUR, subsampling=0),
    "4:2:0": jpeg(COLOUR[:250, :251], subsampling=2, restart_marker_rows=1),
    "progressive": jpeg(COLOUR, progressive=True),
    "odd": jpeg(smooth()[:123, :77]),
}


@pytest.mark.parametrize("name", JPEGS)
def test_whole_jpeg_is_walked_to_its_end(name):
    require_whole_scans(JPEGS[name])
    assert "damage_suspected" not in read_image(JPEGS[name]).flags


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_whole_lossless_jpeg_is_walked_to_its_end(predictor, bits):
    require_whole_scans(imagecodecs.jpeg8_encode(smooth(bits), lossless=True, predictor=predictor, bitspersample=bits))


def test_noise_of_megapixels_is_walked_across_chunks():
    noise = np.random.default_rng(0).integers(0, 65536, (900, 1000)).astype(np.uint16)
    stream = imagecodecs.jpeg8_encode(noise, lossless=True, bitspersample=16)
    assert len(stream) > 3 << 19
    require_whole_scans(stream)
    with pytest.raises(errors.InvalidImage, match="JPEG scan"):
        require_whole_scans(stream[:-100] + stream[-2:])


@pytest.mark.parametrize("lost", [-1, 1])
def test_one_sample_more_or_less_is_seen(lost):
    """Columns of the header against what the scan holds: a sample has fewer bits than a byte."""
    stream = bytearray(imagecodecs.jpeg8_encode(smooth()[:1], lossless=True))
    at = stream.index(b"\xff\xc3") + 7
    stream[at : at + 2] = (256 + lost).to_bytes(2, "big")
    with pytest.raises(errors.InvalidImage, match="JPEG scan"):
        require_whole_scans(bytes(stream))


def test_restart_intervals_are_counted_and_in_order():
    stream = JPEGS["restarts"]
    first, second = stream.index(b"\xff\xd1"), stream.index(b"\xff\xd2")
    for broken, message in (
        (stream[:first] + stream[second:], "out of order"),
        (stream[: first + 2] + stream[second + 2 :], "out of order"),
        (stream[:first] + stream[first:second][:-1] + stream[second:], "early|cannot be|more than"),
    ):
        with pytest.raises(errors.InvalidImage, match=message):
            require_whole_scans(broken)


def test_block_brighter_than_can_be_is_refused():
    stream = bytearray(jpeg(np.full((64, 64), 255, np.uint8), quality=90))
    at = stream.index(b"\xff\xdb") + 5
    stream[at] *= 2  # the DC step: every block's mean doubles
    with pytest.raises(errors.InvalidImage, match="brighter"):
        require_whole_scans(bytes(stream))


def test_more_blocks_than_a_unit_may_have_are_refused():
    stream = bytearray(JPEGS["4:4:4"])
    at = stream.index(b"\xff\xc0") + 11
    stream[at] = 0xFF
    with pytest.raises(errors.InvalidImage, match="allowed 10"):
        require_whole_scans(bytes(stream))


def test_sample_beyond_its_precision_is_refused():
    values = smooth(12)
    stream = bytearray(imagecodecs.jpeg8_encode(values, lossless=True, bitspersample=12))
    stream[stream.index(b"\xff\xc3") + 4] = 10
    header = inspect("1.2.840.10008.1.2.4.70", bytes(stream))
    with pytest.raises(errors.InvalidImage, match="10 bits"):
        decode(header, bytes(stream), values.shape, values.dtype)


def test_shifted_band_is_a_step_and_an_edge_is_none():
    values = smooth(12)
    shifted = values.copy()
    shifted[30:] += 300
    assert has_step(shifted) and has_step(shifted.T)
    assert not has_step(values)
    collimated = values.copy()
    collimated[:100] = 20
    assert not has_step(collimated)
    assert not has_step(pattern(12))


PADDING_ELEMENT = b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0"


@pytest.mark.parametrize("surplus", [b"\0\0\0\0\0\0\0\0", b"\xe0\x7f\x10\0\x07\x07\x07\x07"])
def test_deflated_data_set_ends_with_its_elements(surplus):
    data = phantom("deflated")
    start = 144 + int.from_bytes(data[140:144], "little")  # after the File Meta Information
    inflated = zlib.decompressobj(-15).decompress(data[start:])
    for inside, valid in ((inflated, True), (inflated + surplus, False), (inflated + PADDING_ELEMENT, True)):
        packer = zlib.compressobj(wbits=-15)
        file = data[:start] + packer.compress(inside) + packer.flush()
        if valid:
            read_image(file)
        else:
            with pytest.raises(errors.InvalidImage):
                read_image(file)
    with pytest.raises(errors.InvalidImage, match="before the file"):
        read_image(data + b"\1" * 100)
    read_image(data + b"\0")
