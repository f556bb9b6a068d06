"""What the tests of the real server share: a small random model as an engine bundle, a bare client, DICOM files."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import urllib.request
from pathlib import Path

import numpy as np
from bundles import write_tokenizer
from checkpoints import END, IMAGE_TOKEN, VISION_START, random_checkpoint

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}assistant:"
)
PROFILE = """\
extends: nv-reason-cxr-3b
name: random
checkpoint: null
title: Random weights
min_pixels: 12544
max_pixels: 50176
max_aspect_ratio: 2.0
max_images: 2
max_sequence: 4096
decoding:
  max_new_tokens: 256
tasks:
  compare:
    prompt: Compare the two radiographs.
    answer: text
    description: Two images.
    min_images: 2
    max_images: 2
  quiz:
    prompt: Name the lobes of the right lung.
    answer: text
    description: No image.
    min_images: 0
    max_images: 0
"""


def write_bundle(folder: Path) -> Path:
    """Checkpoint, export and bundle in a folder; the path of the bundle."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile

    checkpoint, export = folder / "checkpoint", folder / "export"
    random_checkpoint(checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    write_tokenizer(checkpoint)
    (folder / "profile.yaml").write_text(PROFILE)
    profile = load_profile(folder / "profile.yaml")
    export_checkpoint(str(checkpoint), export, profile, precision="fp32", accept_licence=True, progress=False)
    return build_bundle(export, folder / "bundle").path


def write_paper_bundle(folder: Path, *, penalty: float = 1.05, max_sequence: int = 4096, more: str = "") -> Path:
    """A bundle for stages that open no graph: the graphs' files are empty; `more` are lines for its profile."""
    from cxr_triton.profile import load_profile

    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(PROFILE.replace("max_sequence: 4096", f"max_sequence: {max_sequence}") + more)
    profile = load_profile(folder / "mine.yaml")
    (folder / "mine.yaml").unlink()
    write_tokenizer(folder)
    config = {"image_token_id": IMAGE_TOKEN, "vision_config": {"spatial_merge_size": 2}}
    files = {
        "profile.yaml": profile.to_yaml(),
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"repetition_penalty": penalty}),
        "preprocessor_config.json": "{}",
        "chat_template.jinja": TEMPLATE,
        **dict.fromkeys(("vision.onnx", "vision.onnx.data", "decoder.onnx", "decoder.onnx.data"), ""),
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    geometry = {
        **dict.fromkeys(("layers", "kv_heads", "head_dim"), 1),
        "hidden": 64,
        "vocab": 320,
        "compute": "fp32",
        "merge_size": 2,
        "window_budget": profile.window_budget,
        "token_budget": profile.token_budget,
        "max_sequence": max_sequence,
        "eos_token_ids": [END],
        "image_token_id": IMAGE_TOKEN,
        "vision_start_token_id": VISION_START,
    }
    manifest = {
        "schema": 1,
        "engine": "onnxruntime",
        "vision_engine": "onnxruntime",
        "precision": "int4",
        "geometry": geometry,
        "source": {"name": "paper", "revision": "r1"},
        "versions": {"onnxruntime": "1.0"},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in folder.iterdir()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


DATATYPES = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "uint8": "UINT8", "bool": "BOOL"}


class Raw:
    """The served ensemble through bare gRPC stubs: what any KServe v2 client sees."""

    def __init__(self, server):
        import grpc
        from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

        self.server = server
        self._channel = grpc.insecure_channel(server.grpc, [("grpc.max_send_message_length", -1)])
        self.stub = GRPCInferenceServiceStub(self._channel)

    def call(self, images=(), raw_images: bytes | None = None, timeout_s: float = 60, **asked):
        """A running `ModelStreamInfer` call; `raw_images` is sent in place of the packed `images`."""
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        request = ModelInferRequest(model_name="cxr_reader")
        for name, elements in (("IMAGES", images), ("REQUEST", [json.dumps(asked).encode()])):
            request.inputs.add(name=name, datatype="BYTES", shape=[len(elements)])
            request.raw_input_contents.append(b"".join(struct.pack("<I", len(e)) + e for e in elements))
        if raw_images is not None:
            request.raw_input_contents[0] = raw_images
        return self.stub.ModelStreamInfer(iter([request]), timeout=timeout_s)

    def read(self, images=(), raw_images: bytes | None = None, **asked) -> dict:
        """READING of a whole request, with the ``deltas`` that led to it; the error text as ``RuntimeError``."""
        deltas, reading = [], ""
        for message in self.call(images, raw_images, **asked):
            assert not reading, "READING is not in the last response"
            delta, reading = outputs(message)
            deltas.append(delta)
        return {**json.loads(reading), "deltas": deltas}

    def infer(self, model: str, **tensors):
        """A running `ModelStreamInfer` call of a model alone; a tensor is an array or the bytes of its one element."""
        from tritonclient.grpc.service_pb2 import ModelInferRequest

        request = ModelInferRequest(model_name=model)
        for name, value in tensors.items():
            if isinstance(value, bytes):
                request.inputs.add(name=name, datatype="BYTES", shape=[1])
                request.raw_input_contents.append(struct.pack("<I", len(value)) + value)
            else:
                request.inputs.add(name=name, datatype=DATATYPES[value.dtype.name], shape=value.shape)
                request.raw_input_contents.append(value.tobytes())
        return self.stub.ModelStreamInfer(iter([request]), timeout=60)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        with urllib.request.urlopen(f"http://{self.server.metrics}/metrics") as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} ")))


def outputs(message) -> tuple[str, str]:
    """DELTA and READING of a response; an error as ``RuntimeError``."""
    if message.error_message:
        raise RuntimeError(message.error_message)
    response = message.infer_response
    names = [output.name for output in response.outputs]
    values = dict(zip(names, response.raw_output_contents, strict=True))
    return values["DELTA"][4:].decode(), values["READING"][4:].decode()


def radiograph(seed: int, rows: int = 240, columns: int = 200, photometric: str = "MONOCHROME2") -> bytes:
    """A 12-bit CR file of smooth random densities; MONOCHROME1 gives the inverted twin of the same seed."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    coarse = np.random.default_rng(seed).random((9, 9))
    stored = zoom(coarse, rows, columns) * 4095
    stored = stored.astype(np.uint16)
    if photometric == "MONOCHROME1":
        stored = 4095 - stored
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[str(seed), photometric])
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "CR", "CHEST", "PA"
    dataset.Rows, dataset.Columns = rows, columns
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, photometric
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 12, 11, 0
    dataset.PixelData = stored.tobytes()
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def zoom(coarse: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Bilinear enlargement."""
    y, x = np.linspace(0, len(coarse) - 1, rows), np.linspace(0, coarse.shape[1] - 1, columns)
    along = np.array([np.interp(x, np.arange(coarse.shape[1]), row) for row in coarse])
    return np.array([np.interp(y, np.arange(len(coarse)), column) for column in along.T]).T
