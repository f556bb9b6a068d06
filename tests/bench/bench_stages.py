"""Each stage by itself, beside what it replaces: `make bench`. Not part of the test suite.

Rounds of ours and of others alternate, on the same bytes: a machine whose speed drifts is fair to both. Files are
decoded by ours in the child that servers decode in and by pydicom in a process of its own, each by its own clock: what
one does to its heap is no help to the other. `ratios.py` makes a record of the result.
"""

import io
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pydicom
import pytest
from PIL import Image

from cxr_triton import phantom
from cxr_triton.perf.environment import Stolen
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import LOSSY_BITS, SYNTAXES, store, write_dicom
from cxr_triton.pixels import dicom, display, image
from cxr_triton.pixels.sandbox import Sandbox
from cxr_triton.profile import load_profile
from cxr_triton.reading import parse

ROWS, COLUMNS, BITS = 2500, 2048, 12
PROFILE = load_profile("nv-reason-cxr-3b")
LIMITS = {"min_pixels": PROFILE.min_pixels, "max_pixels": PROFILE.max_pixels}
RADIOGRAPHS = {  # of the folder of real radiographs, where there is one: every one of depth and size of its own
    "RG1, 1955 x 1841, 15 bits": "dicom/RG1_UNC_explicitLE.dcm",
    "RG2, 2140 x 1760, 10 bits": "dicom/RG2_UNC_explicitLE.dcm",
    "dental, 1576 x 1976, 10 bits": "dicom/Dental_CR_ModalityLUTsequence_MONO1_JPLL.dcm",
    "NIH, 1024 x 1024, 8 bits": "dicom/NIH_DX_SC_8bit_implicitLE.dcm",
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
ROUNDS_S = 8.0


class Clock:
    """Time as the timed functions tell it, in seconds."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


TOLD = Clock()


def measure(
    benchmark, group: str, ours: Callable, others: dict[str, Callable] | None = None, rounds: int | None = None
):
    """Rounds of each in turn, as many as fit into some seconds unless told.

    The seconds of the others, told or measured, go to the result's ``extra_info``, with what was stolen meanwhile.
    """
    benchmark.group = group
    seconds = {name: [] for name in others or {}}

    def run_others():
        for name, run in (others or {}).items():
            began_s = time.perf_counter()
            told_s = run()
            seconds[name].append(told_s if isinstance(told_s, float) else time.perf_counter() - began_s)

    for _ in range(WARM_UP):
        began_s = time.perf_counter()
        run_others()
        ours()
        round_s = time.perf_counter() - began_s
    for taken in seconds.values():
        taken.clear()
    stolen = Stolen()
    benchmark.pedantic(ours, setup=run_others, rounds=rounds or round(min(max(ROUNDS_S / round_s, 11), 51)))
    benchmark.extra_info["others_s"], benchmark.extra_info["stolen_share"] = seconds, stolen.share()


@pytest.fixture(scope="session")
def child():
    """The decoding process of a server."""
    with Sandbox(recycle_after=1_000_000) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def pydicom_process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def pydicom_seconds(data: bytes) -> float:
    """Of reading a file with pydicom and its default plugins."""
    began_s = time.perf_counter()
    pydicom.dcmread(io.BytesIO(data)).pixel_array  # noqa: B018
    return time.perf_counter() - began_s


def decode(benchmark, child, process, syntax: str, picture: str, data: bytes):
    def ours():
        TOLD.now_s += child.prepare(data, preset="mimic_jpg", **LIMITS).decode_ms / 1e3

    others = {"pydicom": lambda: process.submit(pydicom_seconds, data).result()}
    try:
        others["pydicom"]()
    except Exception as error:
        others, benchmark.extra_info["pydicom"] = {}, f"does not decode it: {error}"[:200]
    benchmark.extra_info["syntax"] = syntax
    measure(benchmark, f"decode {syntax}, {picture}", ours, others)


@pytest.mark.parametrize("syntax", list(SYNTAXES))
@pytest.mark.benchmark(timer=TOLD)
def test_decode_phantom(benchmark, child, pydicom_process, large, syntax):
    data = write_dicom(large, syntax=syntax)
    decode(benchmark, child, pydicom_process, syntax, f"phantom, {ROWS} x {COLUMNS}, {BITS} bits", data)


@pytest.mark.parametrize("syntax", [syntax for syntax in SYNTAXES if syntax not in LOSSY_BITS])
@pytest.mark.parametrize("name", list(RADIOGRAPHS))
@pytest.mark.benchmark(timer=TOLD)
def test_decode_radiograph(benchmark, child, pydicom_process, shared_data, name, syntax):
    """Written in each lossless syntax; the rest of the file stays as it came."""
    dataset = pydicom.dcmread(shared_data / RADIOGRAPHS[name])
    store(dataset, dataset.pixel_array, syntax)
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    decode(benchmark, child, pydicom_process, syntax, name, file.getvalue())


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
