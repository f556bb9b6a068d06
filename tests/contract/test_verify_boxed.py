r"""The gate on CheXOne's grammar: options, boxes and prose in ``\boxed{}``, from a checkpoint that was taught them.

The trained phantom model learns by heart what to say of twelve phantoms; nothing else of it changes.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import evaluate
import numpy as np
import pytest
import yaml
from test_verify import weight

from cxr_triton import phantom, phantom_file
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.verify.gate import verify_bundle
from cxr_triton.engines.verify.page import verification_page
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.export.export import export_checkpoint
from cxr_triton.pixels import image
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"

COUNT, STEPS = 12, 300
SURE = 0.1
"""Loss of the worst token at which the answers are learned: each is likelier than 0.9, on any make of CPU."""
MAX_PIXELS = 112 * 112
TASKS = ("diseases", "detection", "findings")
PROMPTS = {"diseases": "Find", "detection": "devices", "findings": "support"}
ANSWERS = {"diseases": "option", "detection": "boxes", "findings": "prose"}


def answer(source: phantom.Phantom, task: str) -> str:
    """What CheXOne would say: options by the place in `phantom.LABELS`, the box of the first finding, or a sentence."""
    if task == "diseases":
        said = ", ".join(f"({'ABCDE'[phantom.LABELS.index(label)]})" for label in source.findings) or "(F)"
    elif task == "findings":
        said = " ".join(source.labels)
    else:
        label, mask = next(iter(source.masks.items()), ("Heart", np.ones((2, 2), bool)))
        corners = [(span.min() * 100 // size, (span.max() + 1) * 100 // size) for span, size in spans(mask)]
        (y1, y2), (x1, x2) = corners
        said = f"<|ref|>{label}<|/ref|><|box|>({x1},{y1}),({x2},{y2})<|/box|>"
    return f"Lungs clear \\boxed{{{said}}}"


def spans(mask: np.ndarray):
    return [(np.flatnonzero(mask.any(1 - axis)), mask.shape[axis]) for axis in (0, 1)]


@dataclass
class Taught:
    """A checkpoint folder, its profile, and the images and requests that it was taught."""

    checkpoint: Path
    profile: Path
    images: list[bytes]
    requests: list[dict]
    answers: list[str]


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Taught:
    import torch
    import training
    from tokenizers import Tokenizer
    from torch.nn.functional import cross_entropy
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("boxed")
    phantoms = [p for p in evaluate.held_out(40) if p.findings][:COUNT]
    tokenizer = Tokenizer.from_file(str(PHANTOM / "checkpoint" / "tokenizer.json"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(PHANTOM / "checkpoint", dtype=torch.float32)
    ids = {token: tokenizer.token_to_id(token) for token in training.SPECIAL}
    limits = {"min_pixels": training.MIN_PIXELS, "max_pixels": MAX_PIXELS}
    rows, labels, pixels, grids, answers = [], [], [], [], []
    for i, source in enumerate(phantoms):
        task = TASKS[i % 3]
        picture = source.picture("mimic_jpg")
        picture = image.resize(picture, image.target_size(*picture.shape, **limits))
        pixels.append(torch.from_numpy(training.patches(picture)))
        grids.append([1, *image.grid(*picture.shape)])
        pads = "<|image_pad|>" * (grids[-1][1] * grids[-1][2] // 4)
        question = (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            f"<|vision_start|>{pads}<|vision_end|>{PROMPTS[task]}<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt = tokenizer.encode(question).ids
        answers.append(answer(source, task))
        said = [*tokenizer.encode(answers[-1]).ids, ids["<|im_end|>"]]
        rows.append(prompt + said)
        labels.append([-100] * len(prompt) + said)
    longest = max(map(len, rows))
    padded = torch.tensor([row + [ids["<|endoftext|>"]] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    batch = {
        "input_ids": padded,
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "mm_token_type_ids": (padded == ids["<|image_pad|>"]).int(),
        "pixel_values": torch.cat(pixels),
        "image_grid_thw": torch.tensor(grids),
    }
    tower = model.model.visual.requires_grad_(False)
    seen = tower(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
    tower.forward = lambda *_, **__: type(seen)(**seen)  # the tower stays as it is
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(STEPS):
        losses = cross_entropy(model(**batch).logits[:, :-1].transpose(1, 2), targets[:, 1:], reduction="none")
        if losses.max() < SURE:
            break
        (losses.sum() / (targets[:, 1:] >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    else:
        pytest.fail(f"the checkpoint has not learned its answers in {STEPS} steps")
    training.save_checkpoint(model, tokenizer, folder / "checkpoint")

    profile = yaml.safe_load((PHANTOM / "profile.yaml").read_text())
    profile |= {
        "name": "boxed-phantom",
        "default_task": "findings",
        "tasks": {t: {"prompt": PROMPTS[t], "answer": ANSWERS[t], "description": t} for t in TASKS},
        "modes": {"reasoning": {"description": "Boxes the answer, as CheXOne does.", "grammar": "boxed"}},
        "max_pixels": MAX_PIXELS,
        "decoding": {"max_new_tokens": 96},
        "labels": [],
    }
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile))
    images = [phantom_file.write_dicom(source, photometric="MONOCHROME2") for source in phantoms]
    return Taught(folder / "checkpoint", folder / "profile.yaml", images, [{"task": t} for t in TASKS], answers)


@pytest.fixture(scope="module")
def reference(taught):
    with Reference(taught.checkpoint, load_profile(taught.profile), device="cpu") as reference:
        yield reference


@pytest.fixture(scope="module")
def export(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("boxed-export") / "fp32"
    export_checkpoint(str(taught.checkpoint), folder, load_profile(taught.profile), precision="fp32", progress=False)
    return folder


@pytest.fixture(scope="module")
def record(taught, reference, export, tmp_path_factory):
    bundle = build_bundle(export, tmp_path_factory.mktemp("boxed-bundle") / "bundle")
    return verify_bundle(bundle, reference, None, taught.images, requests=taught.requests, threads=1)


def test_an_exact_engine_passes_with_options_boxes_and_prose(taught, record):
    assert record["passed"], {name: part for name, part in record["parts"].items() if not part["passed"]}
    checks = {check["name"]: check["value"] for check in record["parts"]["readings"]["checks"]}
    assert checks["label_iou"] == checks["prose_f1"] == 1.0 and checks["reward_drop"] == 0.0
    details = record["details"]["images"]
    assert [entry["reference"]["text"] for entry in details] == taught.answers, "the checkpoint has learned its answers"
    assert all(entry["reference"]["status"] == "ok" for entry in details)
    assert len({tuple(entry["reference"]["says"]) for entry in details}) > COUNT // 2


def test_each_kind_of_answer_has_its_rewards(record):
    expected = {
        "diseases": {"format_boxed": 1.0, "option_iou": 1.0},
        "detection": {"format_boxed": 1.0, "grounding_iou": 1.0},
        "findings": {"format_boxed": 1.0},
    }
    for entry in record["details"]["images"]:
        rewards = entry["rewards"]
        assert {name: pair[1] for name, pair in rewards.items()} == pytest.approx(expected[entry["request"]["task"]])
    assert set(record["parts"]["readings"]["measured"]["rewards"]) == {"format_boxed", "option_iou", "grounding_iou"}


def test_the_page_shows_options_and_boxes(taught, record):
    html = verification_page(record)
    assert "boxed{" in html and "grounding_iou" in html and "option_iou" in html


def test_a_broken_engine_loses_agreement_and_rewards(taught, reference, export, tmp_path):
    """Rows of the tied embedding are exchanged: the engine means what the model means, and writes other tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(taught.checkpoint / "tokenizer.json"))
    order = np.arange(reference.source.text.vocab_size)
    for pair in (("C", "F"), ("1", "3"), ("Pleural", "Cardiomegaly")):  # options, corners, prose; in no prompt
        ids = [tokenizer.token_to_id(token) for token in pair]
        order[ids] = ids[::-1]
    broken = tmp_path / "export"
    shutil.copytree(export, broken)
    table = weight(broken, "language_model.embed_tokens.weight").view(np.float32).reshape(len(order), -1)
    table[:] = table[order]
    record = verify_bundle(
        build_bundle(broken, tmp_path / "bundle"), reference, None, taught.images, requests=taught.requests, threads=1
    )
    written = [tokenizer.decode(order[tokenizer.encode(answer).ids]) for answer in taught.answers]
    assert [entry["engine"]["text"] for entry in record["details"]["images"]] == written
    failed = {check["name"] for check in record["parts"]["readings"]["checks"] if not check["passed"]}
    assert failed == {"label_iou", "prose_f1", "reward_drop"}
    assert not record["passed"]
