"""Phantoms as DICOM DX files in any of the usual transfer syntaxes; needs pydicom."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, generate_uid

from cxr_triton.phantom import Phantom

DX_FOR_PRESENTATION = UID("1.2.840.10008.5.1.4.1.1.1.1")
SYNTAXES = {
    "implicit": UID("1.2.840.10008.1.2"),
    "explicit": UID("1.2.840.10008.1.2.1"),
    "deflated": UID("1.2.840.10008.1.2.1.99"),
    "rle": UID("1.2.840.10008.1.2.5"),
    "jpeg_lossless": UID("1.2.840.10008.1.2.4.70"),
    "jpeg_ls": UID("1.2.840.10008.1.2.4.80"),
    "jpeg_2000": UID("1.2.840.10008.1.2.4.90"),
    "htj2k": UID("1.2.840.10008.1.2.4.201"),
    "jpeg_baseline": UID("1.2.840.10008.1.2.4.50"),
    "jpeg_extended": UID("1.2.840.10008.1.2.4.51"),
}
LOSSY_BITS = {"jpeg_baseline": 8, "jpeg_extended": 12}  # all that a lossy JPEG process can hold


def encode(stored: np.ndarray, bits: int, syntax: str) -> bytes:
    """Codestream of [rows, cols] stored values; lossless unless the syntax is in `LOSSY_BITS`."""
    match syntax:
        case "jpeg_baseline":
            stream = imagecodecs.jpeg8_encode(stored.astype(np.uint8), level=90)
        case "jpeg_extended":
            stream = imagecodecs.jpeg8_encode(stored, level=90, bitspersample=12)
        case "jpeg_lossless":
            stream = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=1, bitspersample=bits)
        case "jpeg_ls":
            stream = imagecodecs.jpegls_encode(stored)
        case "jpeg_2000":
            stream = imagecodecs.jpeg2k_encode(stored, codecformat="J2K", bitspersample=bits, reversible=True, level=0)
        case "htj2k":
            stream = imagecodecs.htj2k_encode(stored, reversible=True)
        case _:
            raise ValueError(f"no encoder for {syntax}")
    return bytes(stream)


def store(dataset: FileDataset, stored: np.ndarray, syntax: str) -> None:
    """Give a data set its [rows, cols] unsigned stored values in a syntax of `SYNTAXES`; the other elements stay."""
    dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax]
    if syntax in ("implicit", "explicit", "deflated"):
        dataset.PixelData = stored.astype(f"<u{dataset.BitsAllocated // 8}").tobytes()
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OW", False
    elif syntax == "rle":
        dataset.compress(SYNTAXES["rle"], stored, generate_instance_uid=False)
    else:
        dataset.PixelData = encapsulate([encode(stored, dataset.BitsStored, syntax)])
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True


def write_dicom(
    phantom: Phantom, *, photometric: str = "MONOCHROME2", syntax: str = "explicit", seed: str | None = None
) -> bytes:
    """A DX image for presentation with the phantom's VOI window, if it has one.

    Parameters
    ----------
    phantom : Phantom
    photometric : {"MONOCHROME1", "MONOCHROME2"}
        MONOCHROME1 is the exact inverted twin.
    syntax : str
        One of `SYNTAXES`. Those in `LOSSY_BITS` drop the bits that they cannot hold.
    seed : str, optional
        What the UIDs are made from, so that the same phantom gives the same bytes; random if None.
    """
    stored, window = phantom.encoded(photometric)
    bits = min(phantom.bits_stored, LOSSY_BITS.get(syntax, 16))
    dropped = phantom.bits_stored - bits
    stored = stored >> dropped
    if window and dropped:
        window = (window[0] / 2**dropped, window[1] / 2**dropped)

    def uid(of: str) -> UID:
        return generate_uid(entropy_srcs=[seed, of] if seed else None)

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DX_FOR_PRESENTATION
    meta.MediaStorageSOPInstanceUID = uid("instance")
    dataset = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = uid("study"), uid("series")
    dataset.Modality, dataset.PresentationIntentType, dataset.BodyPartExamined = "DX", "FOR PRESENTATION", "CHEST"
    dataset.PatientName, dataset.PatientID = "PHANTOM^SYNTHETIC", "PHANTOM"
    dataset.ViewPosition, dataset.PatientOrientation = "PA", ["L", "F"]
    dataset.BurnedInAnnotation = "NO"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8 if bits == 8 else 16, bits, bits - 1
    dataset.PixelRepresentation = 0
    dataset.PresentationLUTShape = "INVERSE" if photometric == "MONOCHROME1" else "IDENTITY"
    if window:
        dataset.WindowCenter, dataset.WindowWidth = window
    if syntax in LOSSY_BITS:
        dataset.LossyImageCompression, dataset.LossyImageCompressionMethod = "01", "ISO_10918_1"
    store(dataset, stored, syntax)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
