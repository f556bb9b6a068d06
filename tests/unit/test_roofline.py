"""Work of the stages against what torch counts while transformers runs them, and shares against measured ceilings."""

import json

import bench_results
import numpy as np
import pytest
from bundles import write_export
from checkpoints import random_checkpoint
from jsonschema import Draft202012Validator

from cxr_triton import phantom
from cxr_triton.engines.build import build_bundle
from cxr_triton.perf.beside import Ours
from cxr_triton.perf.peers.transformers import Transformers
from cxr_triton.perf.roofline import Ceilings, ModelWork, Work, copy_bandwidth, gemm_speed, row, rows
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import write_dicom


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roofline")
    reference = random_checkpoint(folder / "checkpoint")
    reference.set_attn_implementation("eager")  # torch does not count what its fused attention does on a CPU
    (folder / "export").mkdir()
    write_export(folder / "export", folder / "checkpoint")
    template = "{% for message in messages %}<|vision_start|><|image_pad|><|vision_end|>{% endfor %}:"
    (folder / "export" / "chat_template.jinja").write_text(template)
    return reference, build_bundle(folder / "export", folder / "bundle")


def counted(run) -> dict:
    """Operations by kind, as torch counts them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        run()
    return {str(kind): flops for kind, flops in counter.get_flop_counts()["Global"].items()}


def test_operations_of_prefill_and_decode_are_those_that_torch_counts(model):
    import torch

    reference, bundle = model
    work, text = ModelWork.of(bundle), reference.config.text_config
    ids = torch.randint(0, 300, (1, 96))
    flops = counted(lambda: reference(input_ids=ids, logits_to_keep=1, use_cache=False))
    attention = sum(count for kind, count in flops.items() if "attention" in kind or "bmm" in kind)
    linear = sum(flops.values()) - attention
    whole = 4 * text.num_hidden_layers * text.hidden_size * 96 * 96
    assert attention == whole  # with the masked half
    assert work.prefill(96).flops == pytest.approx(linear + whole * 97 / 192, rel=1e-3)
    # A token after 95 others does the difference of two prompts, and its logits.
    step = work.prefill(96).flops - work.prefill(95).flops + 2 * text.hidden_size * text.vocab_size
    assert work.decode(95).flops == pytest.approx(step)
    assert work.decode(95, streams=4).flops == pytest.approx(4 * step)


def test_a_bundle_is_measured_without_a_server(model):
    """What `perf.beside` asks of us: answers of so many tokens, a first word, a report, and the weights of a step."""
    _, bundle = model
    rng = np.random.default_rng(0)
    picture = write_dicom(enlarge(phantom.draw(rng), 196, 224, 12, rng))
    ours = Ours(str(bundle.path), bundle.profile, [([picture], {"temperature": 0})])
    try:
        # Short answers may end one before the other begins, which has no speed of both.
        told = ours.write([[70, 71, 72, 73], [80, 81, 82, 83]], 200)
        assert 0 < told["first_s"] < 60 and told["tokens_per_s"] > 0
        first = ours.read(0, 0, 1)
        assert 0 < first["first_s"] <= first["seconds"] and first["prompt_tokens"] > 4
        report = list(range(70, 110))  # one that another has begun as
        guessed = ours.guess(0, [report, report[:39]], 0)
        assert guessed["tokens"] == 40 and 0 < guessed["accepted"] <= guessed["drafted"]
    finally:
        ours.close()
    assert Ours.step_bytes(bundle.path) == ModelWork.of(bundle).step_bytes


def test_what_a_step_of_a_checkpoint_reads_is_all_of_its_text_decoder(model):
    reference, bundle = model
    text = reference.model.language_model.parameters()
    assert Transformers.step_bytes(bundle.path) == 2 * sum(each.numel() for each in text)


def test_operations_of_the_vision_tower_are_those_that_torch_counts(model):
    import torch

    reference, bundle = model
    rows_, cols = 16, 16  # four whole windows, so that windows are not padded
    pixels = torch.randn(rows_ * cols, 3 * 2 * 14 * 14)
    flops = counted(lambda: reference.model.visual(pixels, torch.tensor([[1, rows_, cols]])))
    counted_flops = sum(flops.values())
    work = ModelWork.of(bundle)
    vision = reference.config.vision_config
    # transformers multiplies both equal frames of a still
    frame = 2 * rows_ * cols * vision.hidden_size * 3 * 14 * 14
    assert work.vision(rows_ * cols // 4).flops == pytest.approx(counted_flops - frame, rel=2e-3)
    assert work.vision(2 * rows_ * cols // 4, images=2).flops == pytest.approx(2 * work.vision(64).flops)
    assert work.vision(0, images=0) == Work()


def test_bytes_of_a_step_are_the_weights_and_the_cache(model):
    reference, bundle = model
    work, text = ModelWork.of(bundle), reference.config.text_config
    weights = sum(p.numel() for p in reference.model.language_model.parameters()) * 4
    assert work.decode(0).bytes == pytest.approx(weights, rel=0.01)
    kept = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    assert work.decode(100).bytes - work.decode(0).bytes == 100 * kept
    assert work.decode(100, streams=3).bytes - work.decode(100).bytes == 2 * 101 * kept


def test_a_share_is_the_least_possible_time_over_the_measured_one():
    ceilings = Ceilings("cpu", 10e9, {"fp32": 1e12})
    memory = row("decode", Work(flops=1e9, bytes=5e9), 1.0, ceilings, "fp32")
    assert memory["ceiling"] == {"kind": "copy", "gb_per_s": 10.0, "seconds": 0.5}
    assert (memory["share"], memory["gb_per_s"], memory["tflop_per_s"]) == (0.5, 5.0, 0.001)
    compute = row("prefill", Work(flops=8e11, bytes=1e9), 1.0, ceilings, "fp32")
    assert compute["ceiling"]["kind"] == "gemm fp32" and compute["share"] == pytest.approx(0.8)


def test_a_result_gets_a_row_for_each_stage(model):
    result = bench_results.result()
    ceilings = Ceilings("cpu", 20e9, {"fp32": 2e11, "int4": 1e12})
    result["roofline"] = rows(result, model[1], ceilings)
    Draft202012Validator(schema()).validate(result)
    stages = {entry["stage"]: entry for entry in result["roofline"]}
    assert set(stages) == {"image_decode", "preprocess", "vision", "prefill", "decode", "decode, whole run"}
    done = [repeat["requests"] for repeat in result["scenarios"][0]["points"][0]["repeats"]]
    decode_s = sum(sum(requests["stages_ms"]["decode"]) for requests in done) / 1e3
    assert stages["decode"]["seconds"] == pytest.approx(decode_s)
    steps = sum(sum(requests["tokens"]) - len(requests["tokens"]) for requests in done)
    assert stages["decode"]["bytes"] > steps * ModelWork.of(model[1]).step_bytes
    vision = ModelWork.of(model[1]).vision(18 * 15)  # 2500 x 2048 becomes 504 x 420
    requests = sum(len(each["tokens"]) for each in done)
    assert stages["vision"]["flops"] == pytest.approx(requests * vision.flops)
    assert all(entry["share"] > 0 for entry in result["roofline"])


@pytest.mark.slow
def test_ceilings_are_measured():
    assert copy_bandwidth(1) > 1e8
    measured = [("onnxruntime", "fp32"), ("onnxruntime", "int4")]
    measured += [("openvino", precision) for precision in ("fp32", "bf16", "int4")]
    measured += [
        (engine, precision) for engine in ("onnxruntime-openvino", "onnxruntime-int8") for precision in ("int8", "int4")
    ]
    speeds = [gemm_speed(precision, 1, (64, 256, 512), engine) for engine, precision in measured]
    assert all(np.isfinite(speed) and speed > 1e7 for speed in speeds)


def schema() -> dict:
    from pathlib import Path

    return json.loads((Path(__file__).parents[2] / "docs/bench.schema.json").read_text())
