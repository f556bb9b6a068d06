"""The gate on the trained phantom model: what is right passes, what is broken is refused by the part that has to see.

Engines are broken in their export folders, which are then built anew, so that no digest gives the damage away.
"""

import json
import math
import re
import shutil
from functools import partialmethod
from html import escape
from pathlib import Path

import evaluate
import numpy as np
import pytest
from chromium import Page, browser, chromium
from click.testing import CliRunner

from cxr_triton import phantom_file
from cxr_triton.cli import main
from cxr_triton.engines.build import build_bundle
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify import engine_under_test, gate
from cxr_triton.engines.verify.gate import verify_bundle
from cxr_triton.engines.verify.page import verification_page
from cxr_triton.engines.verify.record import PARTS, is_verified, require_verified, write_record
from cxr_triton.engines.verify.reference import Reference
from cxr_triton.engines.verify.statistics import kl_divergence
from cxr_triton.engines.verify.thresholds import THRESHOLDS, thresholds_of
from cxr_triton.errors import InvalidRequest, NotVerified
from cxr_triton.export.export import export_checkpoint
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"

COUNT = 12
CHECKPOINT = PHANTOM / "checkpoint"
LAYER = "language_model.layers.1"


@pytest.fixture(scope="module")
def profile():
    return load_profile(PHANTOM / "profile.yaml")


@pytest.fixture(scope="module")
def images():
    """Held-out phantoms as DICOM, both photometrics in turn."""
    return [
        phantom_file.write_dicom(p, photometric=evaluate.variant(i)[1]) for i, p in enumerate(evaluate.held_out(COUNT))
    ]


@pytest.fixture(scope="module")
def reference(profile):
    import torch

    torch.set_num_threads(1)
    with Reference(CHECKPOINT, profile, device="cpu") as reference:
        yield reference


@pytest.fixture(scope="module")
def exports(tmp_path_factory, profile):
    folder = tmp_path_factory.mktemp("exports")
    for precision in ("fp32", "int4"):
        export_checkpoint(str(CHECKPOINT), folder / precision, profile, precision=precision, progress=False)
    return folder


@pytest.fixture(scope="module")
def good(exports, tmp_path_factory):
    return build_bundle(exports / "fp32", tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture(scope="module")
def good_record(good, reference, images):
    return verify_bundle(good, reference, None, images, threads=1)


def refused_by(record):
    return {name for name, part in record["parts"].items() if not part["passed"]}


def failed_checks(record, part):
    return {check["name"] for check in record["parts"][part]["checks"] if not check["passed"]}


def values(record, part):
    return {check["name"]: check["value"] for check in record["parts"][part]["checks"]}


def test_an_exact_engine_passes(good_record):
    assert good_record["passed"] and refused_by(good_record) == set() and set(good_record["parts"]) == set(PARTS)
    assert values(good_record, "readings")["label_iou"] == 1.0
    decoder = values(good_record, "decoder")
    assert max(value for name, value in decoder.items() if name.startswith("kl")) < 1e-8
    assert values(good_record, "vision")["vision_cosine_min"] > 1 - 1e-6


def test_the_images_are_worth_something(good_record):
    """A gate whose images all read the same, or whose controls change nothing, would let anything pass."""
    details = good_record["details"]["images"]
    assert len({tuple(image["reference"]["says"]) for image in details}) > COUNT // 3
    controls = good_record["parts"]["controls"]["measured"]
    assert controls["occluded"]["change_reference"] > 0.25 and controls["blank"]["change_reference"] > 0.5


def test_every_kind_of_aspect_ratio_is_seen(good_record, profile):
    measured = good_record["parts"]["vision"]["measured"]
    grids = [tuple(value["grid"]) for value in measured.values() if isinstance(value, dict) and "grid" in value]
    assert any(rows > 2 * cols for rows, cols in grids) and any(cols > 2 * rows for rows, cols in grids)
    assert any(rows == cols for rows, cols in grids)
    assert any(rows % 4 and cols % 4 and rows > 4 and cols > 4 for rows, cols in grids), "edge windows on both sides"
    assert max(rows * cols for rows, cols in grids) == profile.token_budget
    assert min(rows * cols for rows, cols in grids) <= 4


def test_rounded_int4_is_measured_against_its_own_thresholds(exports, tmp_path, reference, images, record_property):
    record = verify_bundle(build_bundle(exports / "int4", tmp_path / "bundle"), reference, None, images, threads=1)
    assert {"files", "vision"}.isdisjoint(refused_by(record))
    decoder = values(record, "decoder")
    assert 1e-7 < decoder["kl, reference's embeddings"] < 0.05, "int4 differs, a little"
    assert 1e-4 < decoder["logit_error"] < 0.02, "and computes what it stores, but for activations in int8"
    record_property("int4", {part: values(record, part) for part in PARTS if part != "files"})
    assert record["thresholds"] == thresholds_of("int4", "fp32")


def weight(export: Path, name: str, graph: str = "decoder") -> np.ndarray:
    """A writable view of an initializer's bytes in an export's data file."""
    import onnx

    model = onnx.load(export / f"{graph}.onnx", load_external_data=False)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    where = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        export / f"{graph}.onnx.data", np.uint8, "r+", int(where.get("offset", 0)), (int(where["length"]),)
    )


def exchange(export: Path, one: str, other: str) -> None:
    a, b = weight(export, one), weight(export, other)
    a[:], b[:] = b.copy(), a.copy()


def zero_first_window(export: Path) -> None:
    """The graph reads window 0 of every image as black."""
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(export / "vision.onnx", load_external_data=False)
    graph = model.graph
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "pixel_windows":
                node.input[i] = "seen_windows"
    constants = {"z0": [0], "z1": [1], "z_end": [2**31], "z_axis": [1]}
    graph.initializer.extend(numpy_helper.from_array(np.array(v, np.int64), k) for k, v in constants.items())
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.float32), "z_zero"))
    added = [
        helper.make_node("Slice", ["pixel_windows", "z0", "z1", "z_axis"], ["z_first"]),
        helper.make_node("Slice", ["pixel_windows", "z1", "z_end", "z_axis"], ["z_rest"]),
        helper.make_node("Cast", ["z_first"], ["z_float"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["z_float", "z_zero"], ["z_black"]),
        helper.make_node("Cast", ["z_black"], ["z_window"], to=onnx.TensorProto.UINT8),
        helper.make_node("Concat", ["z_window", "z_rest"], ["seen_windows"], axis=1),
    ]
    for node in reversed(added):
        graph.node.insert(0, node)
    onnx.save(model, export / "vision.onnx")


def another_tokenizer(export: Path) -> None:
    """Two words of the vocabulary change their ids, as after another training."""
    path = export / "tokenizer.json"
    data = json.loads(path.read_text("utf-8"))
    vocab = data["model"]["vocab"]
    by_length = sorted((token for token in vocab if token.isalpha()), key=len)
    a, b = by_length[-1], by_length[-2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(data, ensure_ascii=False), "utf-8")


def replace(name: str, old: str, new: str):
    def change(export: Path) -> None:
        text = (export / name).read_text("utf-8")
        assert old in text
        (export / name).write_text(text.replace(old, new), "utf-8")

    return change


def scaled(name: str, factor: float):
    def change(export: Path) -> None:
        values = weight(export, name).view(np.float32)
        values *= factor

    return change


BROKEN = {
    # what: precision, how, parts that have to refuse it, parts that have to be content
    "exchanged scales": (
        "int4",
        lambda e: exchange(e, *(f"language_model.layers.{i}.mlp.down_proj.weight.scale" for i in (0, 3))),
        {"decoder"},
        {"files", "vision"},
    ),
    "changed scale": (
        "int4",
        scaled(f"{LAYER}.self_attn.o_proj.weight.scale", 2.0),
        {"decoder"},
        {"files", "vision"},
    ),
    "wrong preset": (
        "fp32",
        replace("profile.yaml", "pixel_preset: mimic_jpg", "pixel_preset: voi_display"),
        {"files", "vision"},
        set(),
    ),
    "zeroed window": ("fp32", zero_first_window, {"vision"}, {"files"}),
    "gate and up exchanged": (
        "fp32",
        lambda e: exchange(e, f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
        {"decoder"},
        {"files", "vision"},
    ),
    "stale tokenizer": ("fp32", another_tokenizer, {"files"}, {"vision"}),
    "stale template": (
        "fp32",
        replace("chat_template.jinja", "{%", "\n{%"),
        {"files"},
        {"vision"},
    ),
    "weights that are no numbers": (
        "fp32",
        scaled(f"{LAYER}.self_attn.o_proj.weight", math.nan),
        {"decoder"},
        {"files", "vision"},
    ),
}


@pytest.fixture(params=BROKEN)
def broken(request, exports, tmp_path):
    precision, how, refused, content = BROKEN[request.param]
    export = tmp_path / "export"
    shutil.copytree(exports / precision, export)
    how(export)
    return build_bundle(export, tmp_path / "bundle"), refused, content


def test_a_broken_engine_is_refused_by_the_part_that_should_see_it(broken, reference, images, record_property):
    bundle, refused, content = broken
    record = verify_bundle(bundle, reference, None, images[:8], threads=1)
    found = refused_by(record)
    record_property("refused_by", sorted(found))
    print(sorted(found), {part: failed_checks(record, part) for part in found})
    assert not record["passed"]
    assert refused <= found
    assert content.isdisjoint(found)
    json.dumps(record, allow_nan=False)
    written = write_record(bundle, record)
    with pytest.raises(NotVerified, match="failed the gate"):
        require_verified(written)


def test_decoder_faults_show_with_the_reference_embeddings_and_vision_faults_do_not(
    exports, tmp_path, reference, images
):
    export = tmp_path / "export"
    shutil.copytree(exports / "fp32", export)
    zero_first_window(export)
    record = verify_bundle(build_bundle(export, tmp_path / "bundle"), reference, None, images[:8], threads=1)
    assert "kl, engine's embeddings" in failed_checks(record, "decoder")
    assert not failed_checks(record, "decoder") & {"kl, reference's embeddings", "logit_error"}


def test_a_fault_too_small_for_the_text_shows_in_the_logits(exports, tmp_path, reference, images):
    """Scales of gate and up are nearly equal here: no reading and no probability tells that they are exchanged."""
    record = {}
    for name in ("good", "broken"):
        export = tmp_path / name
        shutil.copytree(exports / "int4", export)
        if name == "broken":
            exchange(export, f"{LAYER}.mlp.gate_proj.weight.scale", f"{LAYER}.mlp.up_proj.weight.scale")
        bundle = build_bundle(export, tmp_path / f"{name}-bundle")
        record[name] = verify_bundle(bundle, reference, None, images[:8], threads=1, thresholds={"logit_error": 0.0075})
    assert "decoder" not in refused_by(record["good"])
    assert failed_checks(record["broken"], "decoder") == {"logit_error"}


def test_too_few_images_are_refused(good, reference, images):
    record = verify_bundle(good, reference, None, images, limit=4, seed=3, threads=1)
    assert refused_by(record) == {"readings"} and failed_checks(record, "readings") == {"images"}


def test_a_part_that_raises_has_failed(good, reference, images, monkeypatch):
    from cxr_triton.engines.onnxruntime.session import OrtDecoder

    def broken(*_, **__):
        raise RuntimeError("the engine is gone")

    monkeypatch.setattr(OrtDecoder, "step", broken)
    monkeypatch.setattr(gate, "PARTS", ("files", "vision", "decoder"))
    record = verify_bundle(good, reference, None, images[:8], threads=1)
    assert record["parts"]["decoder"]["error"] == "RuntimeError: the engine is gone"
    assert refused_by(record) == {"decoder"} and not record["passed"]


def test_steps_of_one_stream_and_of_several_are_both_judged(good, reference, images, monkeypatch):
    """An engine may run the two by other kernels, or by another library."""
    from cxr_triton.engines.onnxruntime.session import OrtDecoder

    step, rng = OrtDecoder.step, np.random.default_rng(0)

    def noisy(session, is_faulty, input_ids, positions):
        logits = step(session, input_ids, positions)
        return logits + rng.normal(0, 1, logits.shape) if is_faulty(len(input_ids)) else logits

    monkeypatch.setattr(gate, "PARTS", ("files", "decoder"))
    errors = []
    for is_faulty in (lambda rows: rows == 1, lambda rows: rows > 1, lambda rows: True):
        monkeypatch.setattr(OrtDecoder, "step", partialmethod(noisy, is_faulty))
        record = verify_bundle(good, reference, None, images[:8], threads=1)
        assert "logit_error" in failed_checks(record, "decoder")
        errors.append(record["parts"]["decoder"]["measured"]["stored weights"]["logit_error"])
    alone, together, both = errors
    assert alone > 0.15 * both and together > 0.5 * both


def test_a_record_passes_on_its_way_into_the_manifest(good, good_record, tmp_path):
    shutil.copytree(good.path, tmp_path / "bundle")
    before = Bundle.open(tmp_path / "bundle")
    assert not is_verified(before)
    written = write_record(before, good_record)
    assert is_verified(written) and written.digest != before.digest
    assert "details" not in written.manifest["verification"]
    assert Bundle.open(tmp_path / "bundle").manifest["files"] == before.manifest["files"]


def test_an_engine_that_cannot_run_here_needs_a_stand_in_of_its_own_source(
    good, exports, tmp_path, reference, images, monkeypatch
):
    monkeypatch.setattr(engine_under_test, "why_not_here", lambda bundle: "no GPU")
    with pytest.raises(InvalidRequest, match=r"cannot be run here \(no GPU\).*--standin"):
        verify_bundle(good, reference, None, images)
    other = build_bundle(exports / "int4", tmp_path / "other")
    with pytest.raises(InvalidRequest, match="another precision"):
        verify_bundle(good, reference, None, images, standin=other)
    record = verify_bundle(good, reference, None, images[:8], standin=good.path, threads=1)
    assert record["passed"] and record["runtime"]["standin"] and "cannot be run here" in record["runtime"]["said"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"label_iuo": 0.9}, "did you mean 'label_iou'"),
        ({"kl": math.nan}, "finite"),
        ({"kl": "low"}, "finite"),
        ({"kl": True}, "finite"),
    ],
)
def test_thresholds_are_checked(given, match):
    with pytest.raises(InvalidRequest, match=match):
        thresholds_of("int4", "fp32", given)


def test_every_threshold_has_a_default():
    for precision in ("fp32", "fp16", "bf16", "fp8", "int4", "int4-awq"):
        for compute in ("fp32", "fp16", "bf16"):
            assert set(thresholds_of(precision, compute)) == set(THRESHOLDS)
    assert thresholds_of("fp8", "bf16")["label_iou"] >= 0.97 and thresholds_of("int4-awq", "bf16")["label_iou"] >= 0.95


def test_divergence_is_that_of_its_definition():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    expected = (p * np.log(p / q)).sum()
    assert kl_divergence(np.log(p).astype(np.float32) + 7, np.log(q).astype(np.float32)) == pytest.approx(expected)
    assert math.isnan(kl_divergence(np.log(p), np.array([0.0, math.inf, 0.0])))
    assert math.isnan(kl_divergence(np.log(p), np.array([0.0, math.nan, 0.0])))


def test_the_verb_writes_record_and_page(good, images, tmp_path, caplog):
    bundle, folder = tmp_path / "bundle", tmp_path / "images"
    shutil.copytree(good.path, bundle)
    folder.mkdir()
    for i, data in enumerate(images[:8]):
        (folder / f"DOE^JANE-{i}.dcm").write_bytes(data)
    (folder / "report.pdf").write_bytes(b"%PDF-1.7")
    args = ["verify", str(bundle), "--checkpoint", str(CHECKPOINT), "--images", str(folder)]
    args += ["--profile", str(PHANTOM / "profile.yaml"), "--html", str(tmp_path / "page.html"), "--json", "-"]
    ran = CliRunner().invoke(main, args)
    assert ran.exit_code == 0, ran.output
    assert "'report.pdf' is left out: [INVALID_IMAGE]" in caplog.text and "8 images (1 left out)" in ran.stderr
    result = json.loads(ran.stdout)
    assert (result["images"]["count"], result["images"]["refused"]) == (8, {"INVALID_IMAGE": 1})
    assert result["passed"] and result["digest"] == Bundle.open(bundle).digest and is_verified(Bundle.open(bundle))
    page = (tmp_path / "page.html").read_text()
    assert "Not for diagnosis" in page and "verification passed" in page and page.count("<details") == 8
    assert "DOE" not in page and "://" not in page and "<script" not in page

    ran = CliRunner().invoke(main, [*args, "--limit", "4"])
    assert ran.exit_code == 1 and not is_verified(Bundle.open(bundle))


@pytest.mark.parametrize(
    ("files", "said"), [({}, "no image to verify on"), ({"notes.txt": b"hello", "empty.dcm": b""}, "2 INVALID_IMAGE")]
)
def test_a_folder_without_any_image_is_told_and_no_record_written(good, reference, tmp_path, files, said):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=said):
        verify_bundle(good, reference, None, sorted(tmp_path.iterdir()), threads=1)


@pytest.mark.parametrize(
    ("value", "at_least", "limit", "told"),
    [
        (0.992771, True, 0.95, "0.9928 ≥ 0.95"),
        (6.64422e-05, False, 0.05, "6.64 × 10⁻⁵ ≤ 0.05"),
        (0.00586272, False, 1e-5, "0.00586 ≤ 10⁻⁵"),
        (1 - 4e-14, True, 0.99999, "1 − 4.0 × 10⁻¹⁴ ≥ 0.99999"),
        (0.020004, False, 0.02, "0.020004 ≤ 0.02"),
        (0.94999, True, 0.95, "0.94999 ≥ 0.95"),
        (1.0, True, 0.95, "1 ≥ 0.95"),
        (8, True, 8, "8 ≥ 8"),
        (None, True, 0.95, "not finite ≥ 0.95"),
    ],
)
def test_the_page_says_a_measurement_in_the_digits_that_its_limit_needs(good_record, value, at_least, limit, told):
    record = json.loads(json.dumps(good_record))
    record["parts"]["decoder"]["checks"] = [
        {"name": "kl, mine", "value": value, "limit": limit, "at_least": at_least, "passed": False}
    ]
    assert f"kl, mine {told}" in Page(verification_page(record)).text


def test_the_page_of_a_real_record_writes_numbers_as_people_do(exports, tmp_path, good_record, reference, images):
    int4 = verify_bundle(build_bundle(exports / "int4", tmp_path / "bundle"), reference, None, images[:8], threads=1)
    for record in (good_record, int4):
        text = Page(verification_page(record)).text
        for fault in (r"\d[eE][-+]\d", r"(?<![\w.])-\d", r"\dT\d\d:", r"(?<![\w.-])\d+\.\d{6}"):
            assert not (found := re.search(f".{{0,30}}{fault}.{{0,20}}", text)), found[0]
        assert f"{record['made'][:10]} {record['made'][11:16]} UTC" in text


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_its_cards_stand_apart(tmp_path, good_record, width):
    script = """
        const d = document.querySelector('iframe').contentDocument;
        const all = [...d.querySelectorAll('section')].map(s => s.getBoundingClientRect());
        const gap = (a, b) => Math.max(b.top - a.bottom, a.top - b.bottom, b.left - a.right, a.left - b.right);
        document.body.dataset.found = JSON.stringify([d.body.scrollWidth,
            Math.max(...[...d.querySelectorAll('.scroll')].map(s => s.scrollWidth - s.clientWidth)),
            Math.min(...all.flatMap((a, i) => all.slice(i + 1).map(b => gap(a, b)))),
            ...[...d.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width / s.viewBox.baseVal.width)]);
    """
    frame = f'<iframe width="{width}" height="900" srcdoc="{escape(verification_page(good_record))}"></iframe>'
    dom = chromium(tmp_path, f"{frame}<script>onload = () => {{ {script} }}</script>", "--dump-dom").stdout
    wide, hidden, gap, *scales = json.loads(re.search(r'data-found="([^"]+)"', dom)[1])
    assert wide <= width and hidden == 0 and gap >= 12
    assert min(scales) > 0.75 and max(scales) - min(scales) < 0.01  # letters of all charts are of one legible size


def test_the_page_escapes_what_a_model_says(good_record):
    record = json.loads(json.dumps(good_record))
    record["details"]["images"][0]["engine"]["text"] = "<script>alert(1)</script> \x1b[2J"
    record["parts"]["vision"] = {"passed": False, "error": "<img src=x>", "checks": [], "measured": {}}
    page = verification_page(record)
    assert "<script>" not in page and "<img" not in page and "\x1b" not in page and "&lt;script&gt;" in page
    assert "<mark>" in page
