"""Each stage by itself, beside what it replaces: `make bench`. Not part of the test suite.

Rounds of ours and of others alternate, on the same bytes: a machine whose speed drifts is fair to both. `ratios.py`
makes a record of the result.
"""

import io
import json
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cxr_triton import dicom, display, image, phantom
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import SYNTAXES, write_dicom
from cxr_triton.profile import load_profile
from cxr_triton.reading import parse

ROWS, COLUMNS, BITS = 2500, 2048, 12
PROFILE = load_profile("nv-reason-cxr-3b")
LIMITS = {"min_pixels": PROFILE.min_pixels, "max_pixels": PROFILE.max_pixels}
REAL = {  # of the folder of real radiographs, where there is one
    "jpeg_lossless": "dicom_derived/RG1_JPEG_lossless_SV1.dcm",
    "jpeg_ls": "dicom_derived/RG1_JPEGLS_lossless.dcm",
    "jpeg_2000": "dicom/RG1_J2K_lossless.dcm",
    "htj2k": "dicom_derived/RG1_HTJ2K_lossless.dcm",
    "rle": "dicom/RG2_RLE.dcm",
    "explicit": "dicom/RG1_UNC_explicitLE.dcm",
}


@pytest.fixture(scope="session")
def large():
    """A phantom at the size and depth of a detector, with its noise."""
    rng = np.random.default_rng(0)
    return enlarge(phantom.draw(rng), ROWS, COLUMNS, BITS, rng)


@pytest.fixture(scope="session")
def radiograph(large):
    return dicom.read_image(write_dicom(large))


WARM_UP = 2


def measure(benchmark, group: str, ours: Callable, others: dict[str, Callable] | None = None, rounds: int = 11):
    """Rounds of each in turn; the seconds of the others go to the result's ``extra_info``."""
    benchmark.group = group
    seconds = {name: [] for name in others or {}}

    def run_others():
        for name, run in (others or {}).items():
            began_s = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began_s)

    benchmark.pedantic(ours, setup=run_others, rounds=rounds, warmup_rounds=WARM_UP)
    benchmark.extra_info["others_s"] = {name: taken[WARM_UP:] for name, taken in seconds.items()}


def decode(benchmark, group: str, data: bytes):
    import pydicom

    def pydicom_default():
        return pydicom.dcmread(io.BytesIO(data)).pixel_array

    others = {"pydicom": pydicom_default}
    try:
        pydicom_default()
    except Exception as error:
        others, benchmark.extra_info["pydicom"] = {}, f"does not decode it: {error}"[:200]
    measure(benchmark, group, lambda: dicom.read_image(data), others)


@pytest.mark.parametrize("syntax", list(SYNTAXES))
def test_decode_phantom(benchmark, large, syntax):
    decode(benchmark, f"decode {syntax}, phantom {ROWS} x {COLUMNS}", write_dicom(large, syntax=syntax))


@pytest.mark.parametrize("syntax", list(REAL))
def test_decode_radiograph(benchmark, shared_data, syntax):
    decode(benchmark, f"decode {syntax}, radiograph", (shared_data / REAL[syntax]).read_bytes())


def prepare(picture: np.ndarray):
    small = image.resize(picture, image.target_size(*picture.shape, **LIMITS))
    return image.windows(small, window_budget=PROFILE.window_budget, token_budget=PROFILE.token_budget)


@pytest.fixture(scope="session")
def processor():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**LIMITS)


def test_patches(benchmark, radiograph, processor):
    pixels = display.render(radiograph, "mimic_jpg").pixels
    picture = Image.fromarray(pixels).convert("RGB")
    others = {"transformers": lambda: processor(images=picture, return_tensors="np")}
    measure(benchmark, f"8-bit picture {ROWS} x {COLUMNS} to patches", lambda: prepare(pixels), others)


@pytest.mark.parametrize("preset", display.PRESETS)
def test_stored_values_to_patches(benchmark, radiograph, processor, preset):
    """Of `mimic_jpg` beside the recipe as its authors published it, in numpy and OpenCV, and then the processor."""
    import cv2

    stored = radiograph.stored

    def published():
        values = stored - stored.min()
        values = (values / values.max() * 255).astype(np.uint8)
        return processor(images=Image.fromarray(cv2.equalizeHist(values)).convert("RGB"), return_tensors="np")

    group = f"stored values {ROWS} x {COLUMNS} to patches, {preset}"
    others = {"OpenCV and transformers": published} if preset == "mimic_jpg" else {}
    measure(benchmark, group, lambda: prepare(display.render(radiograph, preset).pixels), others)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """The models' own vocabulary."""
    import qwen

    return qwen.write_chat_files(tmp_path_factory.mktemp("qwen"))


def test_prompt_ours(benchmark, tokenizer_folder):
    from cxr_triton.chat import ChatTokenizer

    tokenizer = ChatTokenizer(tokenizer_folder)
    content = [{"type": "image"}, {"type": "text", "text": "Find abnormalities and support devices."}]
    messages = [{"role": "user", "content": content}]
    measure(benchmark, "prompt of one image", lambda: tokenizer.encode(messages, [(36, 30)]), rounds=200)


ANSWER = "The heart is enlarged. " * 110


@pytest.mark.parametrize("kind", ["tags", "boxed"])
def test_report(benchmark, kind):
    """An answer of 2,700 characters, as long as NV-Reason's usually are."""
    if kind == "tags":
        text = f"<think> {ANSWER}</think>\n<answer> Cardiomegaly, Pleural Effusion </answer>"
        arguments = {"grammar": "think_answer", "answer": "labels", "labels": list(PROFILE.labels)}
    else:
        text = f"**Thinking Process:** {ANSWER} $$ \\boxed{{C}} $$"
        arguments = {"grammar": "boxed", "answer": "option", "labels": []}
    run = lambda: parse(text, **arguments, finish_reason="stop", image_sizes=[(ROWS, COLUMNS)])  # noqa: E731
    measure(benchmark, f"answer to reading, {kind}", run, rounds=200)


def test_request(benchmark):
    from cxr_triton.request import ReadRequest

    text = json.dumps({"task": "findings"})
    measure(benchmark, "request", lambda: ReadRequest.from_json(text, PROFILE), rounds=200)
