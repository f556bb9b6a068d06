"""`cxr-triton quantize`: what calibrates, what is written down, what is refused; then readings by quantized models."""

import dataclasses
import hashlib
import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cxr_triton import phantom, phantom_file
from cxr_triton.cli import main
from cxr_triton.engines.build import build_bundle
from cxr_triton.errors import InvalidRequest, LicenceNotAccepted, UnsupportedCheckpoint
from cxr_triton.export import calibration, quantize
from cxr_triton.export.checkpoint import Checkpoint
from cxr_triton.export.export import export_checkpoint
from cxr_triton.pixels import image
from cxr_triton.profile import load_profile

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"

pytest.importorskip("modelopt")

COUNT = calibration.MINIMUM_IMAGES
PROFILE = PHANTOM / "profile.yaml"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small take longer on several threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def profile():
    return load_profile(PROFILE)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Phantoms as DICOM, PNG and JPEG in turn and in subfolders, one file twice, and two that are no radiographs."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(7)
    (folder / "more").mkdir()
    for i in range(COUNT):
        drawn, path = phantom.draw(rng), folder / ("more" if i % 2 else ".") / f"{i}"
        if i % 3 == 0:
            path.write_bytes(phantom_file.write_dicom(drawn, photometric=phantom.PHOTOMETRICS[i % 2]))
        else:
            Image.fromarray(drawn.picture("mimic_jpg")).save(path, ("PNG", "JPEG")[i % 3 - 1])
    (folder / "copy").write_bytes((folder / "0").read_bytes())
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "cut.png").write_bytes((folder / "more" / "1").read_bytes()[:200])
    (folder / ".hidden").write_text("not even counted")
    return folder


@pytest.fixture(scope="module")
def fp8(images, tmp_path_factory):
    """Folder and JSON of the command, with images and float8 KV scales."""
    folder = tmp_path_factory.mktemp("fp8")
    arguments = ["--scheme", "fp8", "--kv-fp8", "--images", images, "--reasoning-tokens", 12, "--seed", 3]
    arguments += ["-o", folder / "out", "--profile", PROFILE, "--json", folder / "result.json", "--no-progress"]
    result = CliRunner().invoke(main, ["quantize", *map(str, [PHANTOM / "checkpoint", *arguments])])
    assert result.exit_code == 0, result.output
    return folder / "out", json.loads((folder / "result.json").read_text()), result


@pytest.fixture(scope="module")
def awq(profile, tmp_path_factory):
    """Calibrated on the phantoms that stand in for images, without reasoning text."""
    folder = tmp_path_factory.mktemp("awq")
    with pytest.warns(UserWarning, match="synthetic phantoms"):
        record = quantize.quantize_checkpoint(
            str(PHANTOM / "checkpoint"),
            folder / "out",
            profile,
            scheme="int4-awq",
            limit=COUNT,
            reasoning_tokens=0,
            progress=False,
        )
    return folder / "out", record


@pytest.mark.slow
def test_record_says_what_calibrated(fp8, images):
    out, result, _ = fp8
    record = json.loads((out / "calibration.json").read_text())
    assert record == {key: result[key] for key in record}
    assert set(result) - set(record) == {"path", "bytes", "seconds"}
    files = {hashlib.sha256(path.read_bytes()).hexdigest() for path in images.rglob("*") if path.is_file()}
    seen = record["images"]
    assert seen["kind"] == "files" and seen["count"] == len(seen["sha256"]) == COUNT
    assert set(seen["sha256"]) < files
    # The folder's order decides how many of the doubtful files come before the set is full; no name is kept.
    assert not any(path.name in json.dumps(seen) for path in images.iterdir() if len(path.name) > 2)
    assert sum(record["tasks"].values()) == COUNT and set(record["tasks"]) == set(load_profile(PROFILE).tasks)
    assert record["generated_tokens"] > COUNT and record["tokens"] > 64 * COUNT
    assert record["seed"] == 3 and record["scheme"] == "fp8" and record["kv"] == "fp8"
    assert record["source"]["files"] == Checkpoint(PHANTOM / "checkpoint").digests()
    assert set(record["versions"]) == {"cxr_triton", "nvidia-modelopt", "torch", "transformers"}


@pytest.mark.slow
def test_phantoms_are_named_for_what_they_are(awq):
    record = awq[1]
    assert record["images"]["kind"] == "phantoms"
    assert "not those of radiographs" in record["images"]["warning"]
    assert record["generated_tokens"] == 0
    assert set(record["tasks"]) == {"findings"}  # the others continue an answer, and there is none


def test_the_command_says_what_phantoms_are_worth():
    result = CliRunner().invoke(
        main, ["quantize", "nowhere/nothing", "--profile", "chexone", "--scheme", "fp8", "-o", "x"]
    )
    assert result.exit_code == 1 and "LICENCE_NOT_ACCEPTED" in result.output
    assert calibration.PHANTOM_WARNING in result.output


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "awq"])
def test_everything_but_weights_stays_byte_for_byte(scheme, request):
    out = request.getfixturevalue(scheme)[0]
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (PHANTOM / "checkpoint" / name).read_bytes()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["fp8", "awq"])
def test_tower_embedding_and_norms_are_not_quantized(scheme, request):
    source, made = Checkpoint(PHANTOM / "checkpoint"), Checkpoint(request.getfixturevalue(scheme)[0])
    names = [name for name in source._entries if name.startswith("visual.")]
    for name in [*names, "language_model.embed_tokens.weight", "language_model.norm.weight"]:
        np.testing.assert_array_equal(made.array(name), source.array(name))
    assert not any("visual" in name and "scale" in name for name in made._file_names)
    assert made.tied and made.head_input_scale() > 0


@pytest.mark.slow
def test_head_range_is_what_the_head_gets(awq, profile):
    """The largest input of the language head over the calibration set, as transformers computes it."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(PHANTOM / "checkpoint", dtype="auto").eval()
    source = Checkpoint(PHANTOM / "checkpoint")
    files, _ = calibration.phantoms(COUNT, 0, profile)
    pictures, _ = calibration.pictures(files, profile, COUNT, progress=False)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max().item()))
    with torch.no_grad():
        for sample in calibration.samples(model, source, profile, pictures, reasoning_tokens=0, progress=False):
            model(**calibration.inputs(model, source, sample.input_ids, sample.pictures))
    assert awq[1]["head_input_amax"] == max(seen)


@pytest.mark.parametrize("shape", [(56, 84), (84, 56, 3), (28, 28)])
def test_patches_are_those_of_transformers(shape):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(PHANTOM / "checkpoint")
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    preprocessor = Checkpoint(PHANTOM / "checkpoint").preprocessor
    expected = processor(Image.fromarray(pixels), do_resize=False, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(calibration.pixel_values(pixels, preprocessor), expected, atol=2e-6)


class Untold:
    """Stands where a model would; nothing may be asked of it."""


def test_prompts_of_a_profile_with_placeholders_and_several_images():
    """CheXOne: every task that shows an image, in turn; two images where a task needs them; placeholders filled."""
    chexone = load_profile("chexone")
    tasks = calibration.image_tasks(chexone, follow_ups=False)
    names = [name for name, _ in tasks]
    assert "findings_summary" not in names and {"vqa", "progression", "phrase_grounding"} < set(names)
    assert all(word in calibration.EXAMPLES for _, task in tasks for word in task.placeholders)
    source = Checkpoint(PHANTOM / "checkpoint")
    pictures = [np.zeros((28, 28 * (1 + i % 3)), np.uint8) for i in range(len(tasks))]
    samples = calibration.samples(Untold(), source, chexone, pictures, reasoning_tokens=0, progress=False)
    assert [sample.task for sample in samples] == names
    by_task = {sample.task: sample for sample in samples}
    assert len(by_task["progression"].pictures) == 2 and len(by_task["vqa"].pictures) == 1
    for sample in samples:
        shown = sum(image.grid(*picture.shape)[0] * image.grid(*picture.shape)[1] // 4 for picture in sample.pictures)
        assert (sample.input_ids == source.image_token_id).sum() == shown


@pytest.mark.slow
def test_what_must_stay_is_switched_off_last():
    entries = quantize.Config("fp8", kv="fp8").of_modelopt()["quant_cfg"]
    assert [entry["quantizer_name"] for entry in entries[-3:]] == ["*[kv]_bmm_quantizer", "*lm_head*", "*visual*"]
    assert all(entry["enable"] is False for entry in entries[-2:])
    blocks = {group: quantize.Config("int4-awq", group).of_modelopt() for group in (64, 128)}
    for group, config in blocks.items():  # and the preset itself is not changed
        (entry,) = (e for e in config["quant_cfg"] if e["quantizer_name"] == "*weight_quantizer")
        assert entry["cfg"]["block_sizes"][-1] == group


def refused(tmp_path, profile, error, match, **changes):
    arguments = {"scheme": "fp8", "progress": False, **changes}
    source = arguments.pop("source", str(PHANTOM / "checkpoint"))
    with pytest.raises(error, match=match):
        quantize.quantize_checkpoint(source, tmp_path / "out", profile, **arguments)
    assert not (tmp_path / "out").exists()


def test_a_tiny_or_empty_set_is_refused(tmp_path, profile, images):
    few = tmp_path / "few"
    few.mkdir()
    refused(tmp_path, profile, InvalidRequest, f"0 different readable images .* at least {COUNT}", images=few)
    for i, path in enumerate(sorted(path for path in images.iterdir() if path.is_file())[:6]):
        for copy in range(4):
            (few / f"{i}-{copy}").write_bytes(path.read_bytes())
    match = rf"different readable images .* at least {COUNT} .*DUPLICATE"
    refused(tmp_path, profile, InvalidRequest, match, images=few)
    refused(tmp_path, profile, InvalidRequest, f"limit is 4 images, at least {COUNT}", limit=4)


def test_unreadable_files_are_counted_by_their_error(profile, images):
    files, facts = calibration.files(images, 0)
    pictures, seen = calibration.pictures(files, profile, COUNT + 1, progress=False)
    assert facts["found"] == COUNT + 3
    assert len(pictures) == seen["count"] == COUNT
    assert seen["refused"].pop("DUPLICATE") == 1
    assert sum(seen["refused"].values()) == 2


def test_the_seed_chooses_the_images(images):
    def order(seed):
        return [len(data) for data in calibration.files(images, seed)[0]]

    assert order(1) == order(1) != order(2)


@pytest.mark.slow
def test_what_makes_no_sense_is_refused(tmp_path, profile, awq):
    refused(tmp_path, profile, InvalidRequest, "scheme 'int8' is unknown; choose fp8 or int4-awq", scheme="int8")
    refused(tmp_path, profile, InvalidRequest, "device 'tpu'", device="tpu")
    refused(tmp_path, profile, UnsupportedCheckpoint, "is quantized already .int4-awq", source=str(awq[0]))
    paid = dataclasses.replace(profile, licence=dataclasses.replace(profile.licence, non_commercial=True))
    refused(tmp_path, paid, LicenceNotAccepted, "--accept-licence")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("")
    with pytest.raises(InvalidRequest, match="not an empty folder"):
        quantize.quantize_checkpoint(str(PHANTOM / "checkpoint"), tmp_path / "used", profile, scheme="fp8")


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(tmp_path, profile, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    import modelopt.torch.export

    monkeypatch.setattr(modelopt.torch.export, "export_hf_checkpoint", stop)
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning):
        quantize.quantize_checkpoint(
            str(PHANTOM / "checkpoint"),
            tmp_path / "out",
            profile,
            scheme="fp8",
            limit=COUNT,
            reasoning_tokens=0,
            progress=False,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme, head", [("fp8", "fp8"), ("awq", "compute"), ("awq", "int4")])
def test_a_quantized_model_reads_a_phantom(scheme, head, request, profile, tmp_path):
    """quantize → export → build → a reading by the engines, from a DICOM file to the labels that are drawn in it."""
    folder = request.getfixturevalue(scheme)[0]
    export = export_checkpoint(str(folder), tmp_path / "export", profile, head=head, progress=False)
    bundle = build_bundle(tmp_path / "export", tmp_path / "bundle")
    assert export["precision"] == bundle.precision == {"fp8": "fp8", "awq": "int4-awq"}[scheme]
    assert export["head"] == head
    calibration = json.loads((folder / "calibration.json").read_text())
    assert bundle.manifest["source"]["calibration"] == calibration
    assert len(export["quantization"]["kv_scales"]) == (4 if scheme == "fp8" else 0)
    right = sum(
        labels(bundle, phantom_file.write_dicom(drawn)) == frozenset(drawn.labels) for drawn in evaluate.held_out(4)
    )
    assert right >= 3


def labels(bundle, data):
    """Labels that the bundle reads from a file, greedily, through preprocessing and both sessions."""
    from cxr_triton.chat import ChatTokenizer
    from cxr_triton.engines.onnxruntime.session import OrtDecoder, OrtVision
    from cxr_triton.engines.pipeline import Preprocessor

    preprocessor = Preprocessor(bundle.path)
    try:
        step = preprocessor.prepare([data], b"")
    finally:
        preprocessor.close()
    rows = {name: getattr(step, name) for name in ("pixel_windows", "patch_rows_cols", "valid", "merge_order")}
    embeddings = OrtVision(bundle, threads=1).encode(**rows)[0]
    decoder = OrtDecoder(bundle, slots=1, threads=1)
    logits = decoder.prefill(0, step.input_ids, step.image_index, embeddings, step.position_ids, is_last=True)
    position, said = int(step.position_ids.max()) + 1, []
    while (token := int(logits.argmax())) not in bundle.geometry.eos_token_ids and len(said) < 256:
        said.append(token)
        logits = decoder.step(np.array([token]), np.array([position]))[0]
        position += 1
    stream = ChatTokenizer(bundle.path).stream()
    return evaluate.labels_of(stream.push(said) + stream.finish(), bundle.profile)
