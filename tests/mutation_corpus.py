"""What `mutator` starts from: small files of every transfer syntax, PNG, JPEG, requests, STOW bodies, associations."""

from __future__ import annotations

import io
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRBigEndian

from cxr_triton.phantom import draw
from cxr_triton.phantom_file import LOSSY_BITS, SYNTAXES, encode, store, write_dicom

ROWS, COLUMNS = 24, 32
_OTHERS = {
    "jpeg_lossless_57": "1.2.840.10008.1.2.4.57",
    "jpeg_ls_near": "1.2.840.10008.1.2.4.81",
    "jpeg_2000_91": "1.2.840.10008.1.2.4.91",
    "jpeg_2000_lossy": "1.2.840.10008.1.2.4.91",
    "htj2k_rpcl": "1.2.840.10008.1.2.4.202",
    "htj2k_203": "1.2.840.10008.1.2.4.203",
    "htj2k_lossy": "1.2.840.10008.1.2.4.203",
}


@dataclass
class Corpus:
    """Starting points by kind, each with its name."""

    dicom: dict[str, bytes] = field(default_factory=dict)
    png: dict[str, bytes] = field(default_factory=dict)
    jpeg: dict[str, bytes] = field(default_factory=dict)
    request: list[dict] = field(default_factory=list)


def corpus(shared: Path | None = None) -> Corpus:
    """All of them; `shared` is a folder of real radiographs: their headers are taken, and a part of each picture."""
    found = Corpus(request=requests())
    for name in (*SYNTAXES, "big_endian", *_OTHERS):
        found.dicom[name] = _in_syntax(_small(1), name)
    for name, dataset in _variants().items():
        found.dicom[name] = _bytes(dataset)
    if shared:
        for path in sorted(shared.glob("dicom*/*.dcm")):
            if real := _real(path):
                found.dicom[path.stem] = real
    found.png, found.jpeg = _pngs(), _jpegs()
    return found


def _small(seed: int) -> Dataset:
    """A phantom's data set with a small picture of its middle."""
    dataset = pydicom.dcmread(io.BytesIO(write_dicom(draw(np.random.default_rng(seed)), seed=f"mutated {seed}")))
    _shrink(dataset)
    return dataset


def _shrink(dataset: Dataset) -> None:
    values = dataset.pixel_array
    step = max(1, min(values.shape[0] // ROWS, values.shape[1] // COLUMNS))
    small = np.ascontiguousarray(values[::step, ::step][:ROWS, :COLUMNS])
    dataset.Rows, dataset.Columns = small.shape
    store(dataset, small, "explicit")


def _bytes(dataset: Dataset) -> bytes:
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _in_syntax(dataset: Dataset, name: str) -> bytes:
    values, bits = dataset.pixel_array, int(dataset.BitsStored)
    if name in SYNTAXES:
        dropped = max(0, bits - LOSSY_BITS.get(name, 16))
        if dropped:
            dataset.BitsStored = LOSSY_BITS[name]
            dataset.HighBit, dataset.BitsAllocated = dataset.BitsStored - 1, 8 if dataset.BitsStored == 8 else 16
        store(dataset, (values >> dropped).astype(f"u{dataset.BitsAllocated // 8}"), name)
        return _bytes(dataset)
    if name == "big_endian":
        out = io.BytesIO()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        dataset.PixelData = values.astype(">u2").tobytes()
        pydicom.dcmwrite(out, dataset, implicit_vr=False, little_endian=False, enforce_file_format=True)
        return out.getvalue()
    streams = {
        "jpeg_lossless_57": lambda: imagecodecs.jpeg8_encode(values, lossless=True, predictor=6, bitspersample=bits),
        "jpeg_ls_near": lambda: imagecodecs.jpegls_encode(values, level=2),
        "jpeg_2000_91": lambda: encode(values, bits, "jpeg_2000"),
        "jpeg_2000_lossy": lambda: imagecodecs.jpeg2k_encode(values, codecformat="J2K", bitspersample=bits, level=50),
        "htj2k_rpcl": lambda: encode(values, bits, "htj2k"),
        "htj2k_203": lambda: encode(values, bits, "htj2k"),
        "htj2k_lossy": lambda: imagecodecs.htj2k_encode(values, reversible=False, level=0.001),
    }
    dataset.file_meta.TransferSyntaxUID = _OTHERS[name]
    stream = bytes(streams[name]())
    fragments = 3 if name in ("jpeg_lossless_57", "jpeg_2000_91") else 1
    dataset.PixelData = encapsulate([stream], fragments_per_frame=fragments)
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return _bytes(dataset)


def _lut(bits: int, entries: int) -> Dataset:
    lut = Dataset()
    lut.LUTDescriptor, lut["LUTDescriptor"].VR = [entries, 0, bits], "US"
    lut.LUTData = np.linspace(0, 2**bits - 1, entries).astype("<u2").tobytes()
    lut["LUTData"].VR = "OW"
    return lut


def _variants() -> dict[str, Dataset]:
    """Explicit files whose headers differ in what is read of them."""
    made = {name: _small(seed) for seed, name in enumerate(("inverted", "signed", "odd_8_bit", "luts", "spoken"), 2)}
    inverted, signed, odd, luts, spoken = made.values()
    inverted.PhotometricInterpretation, inverted.PresentationLUTShape = "MONOCHROME1", "INVERSE"
    signed.PixelData = (signed.pixel_array.astype(np.int32) - (1 << signed.BitsStored - 1)).astype("<i2").tobytes()
    signed.PixelRepresentation, signed.RescaleIntercept, signed.RescaleSlope = 1, "-1024", "1.5"
    signed.PixelPaddingValue, signed["PixelPaddingValue"].VR = -5, "SS"
    values = (odd.pixel_array >> max(0, odd.BitsStored - 8))[:23, :31].astype(np.uint8)
    odd.BitsAllocated, odd.BitsStored, odd.HighBit = 8, 8, 7
    odd.Rows, odd.Columns = values.shape
    odd.PixelData = values.tobytes() + b"\0"
    odd.NumberOfFrames = 1
    luts.ModalityLUTSequence, luts.VOILUTSequence = [_lut(16, 256)], [_lut(12, 256), _lut(8, 64)]
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = "36554-4", "LN", "Chest X-ray"
    outer = Dataset()
    outer.RequestedProcedureCodeSequence = [code]
    spoken.ProcedureCodeSequence, spoken.RequestAttributesSequence = [code], [outer]
    spoken.StudyDescription, spoken.WindowCenter, spoken.WindowWidth = "Thorax pa", ["2048", "900"], ["4096", "300"]
    spoken.ImagerPixelSpacing, spoken.PixelAspectRatio = ["0.14", "0.14"], ["1", "1"]
    for element in (spoken["ProcedureCodeSequence"], spoken["RequestAttributesSequence"]):
        element.is_undefined_length = True
    return made


def _real(path: Path) -> bytes | None:
    """The header of a real file with a small part of its picture, in its syntax where there is an encoder for it."""
    dataset = pydicom.dcmread(path)
    if dataset.Modality not in ("CR", "DX") or "PixelData" not in dataset:
        return None
    syntax = next((name for name, uid in SYNTAXES.items() if uid == dataset.file_meta.TransferSyntaxUID), "explicit")
    if dataset.PixelRepresentation or syntax in LOSSY_BITS:
        return None
    try:
        _shrink(dataset)
        store(dataset, dataset.pixel_array, syntax)
        whole = _bytes(dataset)
    except Exception:  # the reference does not decode or write it
        return None
    return whole if len(whole) < 1 << 15 else None


def _levels() -> np.ndarray:
    rows, columns = np.mgrid[:ROWS, :COLUMNS]
    noise = np.random.default_rng(3).integers(0, 12, (ROWS, COLUMNS))
    return (rows * 3 + columns * 2 + noise).astype(np.uint8)


def _pngs() -> dict[str, bytes]:
    gray = _levels()
    colour = np.stack([gray, gray[::-1], gray[:, ::-1]], -1)
    made = {
        "gray": imagecodecs.png_encode(gray),
        "gray16": imagecodecs.png_encode(gray.astype(np.uint16) * 257 + np.arange(COLUMNS, dtype=np.uint16)),
        "colour": imagecodecs.png_encode(colour),
        "alpha": imagecodecs.png_encode(np.dstack([colour, gray])),
        "gray_alpha": imagecodecs.png_encode(np.dstack([gray, gray[::-1]])),
    }
    for name, mode in (("palette", "P"), ("bits", "1")):
        out = io.BytesIO()
        Image.fromarray(gray).convert(mode).save(out, "PNG", dpi=(300, 150))
        made[name] = out.getvalue()
    return {name: bytes(data) for name, data in made.items()}


def _jpegs() -> dict[str, bytes]:
    gray, made = Image.fromarray(_levels()), {}
    turned = Image.Exif()
    turned[0x0112] = 6
    colour = Image.merge("RGB", [gray, gray.transpose(Image.Transpose.FLIP_TOP_BOTTOM), gray])
    for name, picture, options in (
        ("gray", gray, {}),
        ("colour", colour, {}),
        ("progressive", gray, {"progressive": True}),
        ("turned", gray, {"exif": turned, "dpi": (300, 200), "comment": b"a chest"}),
        ("restarts", gray, {"restart_marker_rows": 1}),
        ("colour_444", colour, {"subsampling": 0, "optimize": True}),
    ):
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=85, **options)
        made[name] = out.getvalue()
    return made


def requests() -> list[dict]:
    """REQUEST objects that are taken."""
    turns = [{"role": "user", "content": "Find abnormalities."}, {"role": "assistant", "content": "None seen."}]
    return [
        {},
        {"task": "findings"},
        {"prompt": "Is the heart enlarged? Größe?", "max_new_tokens": 64, "temperature": 0.5, "seed": 7},
        {"prompt": "And now?", "history": turns, "top_p": 0.9, "repetition_penalty": 1.1},
        {"prompt": "x", "history": turns * 4, "stop": ["</answer>", "\n\n"], "identifiers": "hashed"},
        {"task": "findings", "mode": None, "seed": 2**62, "max_new_tokens": 1},
    ]


def multipart(parts: list[bytes], boundary: bytes = b"xyz") -> bytes:
    """multipart/related of application/dicom."""
    each = (b"--" + boundary + b"\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts)
    return b"".join(each) + b"--" + boundary + b"--"


# -------------------------------------------------------------------------------------------------------- PS3.7, PS3.8


def item(kind: int, data: bytes) -> bytes:
    """An item of an A-ASSOCIATE-RQ (PS3.8 9.3.2)."""
    return struct.pack(">BBH", kind, 0, len(data)) + data


def pdu(kind: int, body: bytes) -> bytes:
    """A PDU (PS3.8 9.3)."""
    return struct.pack(">BBI", kind, 0, len(body)) + body


def associate(contexts: list[tuple[str, str]], *, aet: bytes = b"MODALITY") -> bytes:
    """An A-ASSOCIATE-RQ for abstract and transfer syntaxes; context ids are 1, 3, 5."""
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4") + item(0x55, b"MUTATED")
    body = struct.pack(">HH16s16s32x", 1, 0, b"CXR_GATEWAY".ljust(16), aet.ljust(16))
    body += item(0x10, b"1.2.840.10008.3.1.1.1")
    for i, (abstract, transfer) in enumerate(contexts):
        inner = item(0x30, abstract.encode()) + item(0x40, transfer.encode())
        body += item(0x20, bytes([2 * i + 1, 0, 0, 0]) + inner)
    return pdu(1, body + item(0x50, user))


def pdv(context: int, flags: int, data: bytes) -> bytes:
    """A P-DATA-TF of one value; `flags` has 1 for a command, 2 for the last fragment."""
    return pdu(4, struct.pack(">IBB", len(data) + 2, context, flags) + data)


def command(**elements: int | str) -> bytes:
    """A command set (PS3.7 6.3.1), whose names are g0000_EEEE."""
    body = b""
    for name, value in sorted(elements.items()):
        number = int(name[1:], 16)
        data = struct.pack("<H", value) if isinstance(value, int) else value.encode() + b"\0" * (len(value) % 2)
        body += struct.pack("<HHI", 0, number, len(data)) + data
    return struct.pack("<HHII", 0, 0, 4, len(body)) + body


RELEASE = pdu(5, bytes(4))


def associations(files: dict[str, bytes]) -> dict[str, list[bytes]]:
    """PDU sequences by name: echo, one store a file, a commitment's report."""
    verification = ("1.2.840.10008.1.1", "1.2.840.10008.1.2")
    echo = command(e0002="1.2.840.10008.1.1", e0100=0x30, e0110=1, e0800=0x101)
    made = {"echo": [associate([verification]), pdv(1, 3, echo), RELEASE]}
    for name, data in files.items():
        dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True)
        start = 144 + struct.unpack_from("<I", data, 140)[0]
        sop_class, instance = str(dataset.SOPClassUID), str(dataset.SOPInstanceUID)
        context = (sop_class, str(dataset.file_meta.TransferSyntaxUID))
        store_rq = command(e0002=sop_class, e0100=1, e0110=2, e0700=0, e0800=1, e1000=instance)
        body = data[start:]
        half = len(body) // 4 * 2
        fragments = [pdv(3, 0, body[:half]), pdv(3, 2, body[half:])]
        made[name] = [associate([verification, context]), pdv(1, 3, echo), pdv(3, 3, store_rq), *fragments, RELEASE]
    push, instance = "1.2.840.10008.1.20.1", "1.2.840.10008.1.20.1.1"
    report = command(e0002=push, e0100=0x100, e0110=3, e0800=1, e1000=instance, e1002=1)
    result = Dataset()
    result.ReferencedSOPClassUID, result.ReferencedSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.22", "1.2.3"
    result.FailureReason = 0x110
    information = Dataset()
    information.TransactionUID, information.ReferencedSOPSequence = "1.2.3.4", [result]
    information.FailedSOPSequence = [result]
    out = io.BytesIO()
    pydicom.dcmwrite(out, information, implicit_vr=True, little_endian=True)
    request = associate([(push, "1.2.840.10008.1.2")])
    made["report"] = [request, pdv(1, 3, report), pdv(1, 2, out.getvalue()), RELEASE]
    return made


def as_json(request: dict) -> bytes:
    """REQUEST's text."""
    return json.dumps(request, ensure_ascii=False).encode()
