"""DICOM files of arrays, for tests: native, compressed, deflated."""

import io
import struct
import zlib

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)

ROWS, COLUMNS = 45, 67  # odd, so that 8-bit data need padding


def pattern(bits: int, signed: bool = False, rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """Smooth ramp with noise over the whole range of `bits`, both ends included."""
    span = 2**bits - 1
    ramp = np.add.outer(np.linspace(0, 0.6, rows), np.linspace(0, 0.3, columns))
    noise = np.random.default_rng(bits).random((rows, columns)) * 0.1
    values = np.rint((ramp + noise) * span).astype(np.int64)
    values[0, 0], values[-1, -1] = 0, span
    if signed:
        return (values - 2 ** (bits - 1)).astype(np.int8 if bits <= 8 else np.int16)
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def dataset_of(values: np.ndarray, bits: int, **elements) -> Dataset:
    """A minimal DX-like data set with native pixels; `elements` override or add."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = DigitalXRayImageStorageForPresentation
    ds.SOPInstanceUID = "1.2.3.4"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Secret^Name", "ID-4711", "19700101"
    ds.Modality = "DX"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated = values.dtype.itemsize * 8
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    raw = values.tobytes()
    ds.PixelData = raw + b"\0" * (len(raw) % 2)
    ds["PixelData"].VR = "OW" if values.dtype.itemsize == 2 else "OB"
    for name, value in elements.items():
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    return ds


def file_bytes(ds: Dataset) -> bytes:
    ds.file_meta.MediaStorageSOPClassUID = ds.get("SOPClassUID", "1.2")
    ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def compressed_bytes(values: np.ndarray, bits: int, syntax: str, codestream: bytes, **elements) -> bytes:
    ds = dataset_of(values, bits)
    ds.PixelData = encapsulate([codestream], has_bot=False)
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.file_meta.TransferSyntaxUID = syntax
    for name, value in elements.items():
        setattr(ds, name, value)
    return file_bytes(ds)


def deflated(data_set: bytes) -> bytes:
    """Part 10 file of transfer syntax 1.2.840.10008.1.2.1.99 around an encoded data set."""
    uid = b"1.2.840.10008.1.2.1.99"
    meta = b"\x02\0\x10\0UI" + struct.pack("<H", len(uid)) + uid
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"\0" * 128 + b"DICM" + meta + packer.compress(data_set) + packer.flush()
