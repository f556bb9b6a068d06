"""The engine build by `trtllm-build`: flags, log, failures, interruption, what a bundle says of it.

The tool is a test double (`fake_trtllm_build.py`), TensorRT's plan a paper one: neither is here.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fake_trtllm_build
import numpy as np
import psutil
import pytest
import yaml
from bundles import TEMPLATE, write_tokenizer
from checkpoints import random_checkpoint
from click.testing import CliRunner
from PIL import Image

from cxr_triton import phantom as phantom_images
from cxr_triton.cli import main
from cxr_triton.engines import bundle as bundles
from cxr_triton.engines import engine
from cxr_triton.engines.build import Job, build_bundle, read_export
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.interface import Compiled
from cxr_triton.engines.recipe import RECIPES, load_recipe
from cxr_triton.engines.tensorrt.library import Target
from cxr_triton.engines.tensorrt_llm import build as trtllm_build
from cxr_triton.engines.tensorrt_llm.request import EngineConfig
from cxr_triton.errors import BuildFailed, DeviceUnavailable, InvalidBundle, InvalidRequest

PHANTOM = Path(__file__).resolve().parent.parent / "phantom"
FAKE = Path(fake_trtllm_build.__file__)
TENSORRT = "10.14.1.48"


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """What `cxr-triton export --format tensorrt-llm` leaves of a small model."""
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile

    folder = tmp_path_factory.mktemp("export")
    random_checkpoint(folder / "checkpoint", dtype="bfloat16", layers=1, hidden=64)
    (folder / "checkpoint" / "chat_template.jinja").write_text(TEMPLATE)
    write_tokenizer(folder / "checkpoint")
    options = {"precision": "bf16", "form": "tensorrt-llm", "max_sequence": 2560}
    export_checkpoint(
        str(folder / "checkpoint"),
        folder / "export",
        dataclasses.replace(load_profile("nv-reason-cxr-3b"), checkpoint=None),
        accept_licence=True,
        progress=False,
        **options,
    )
    return folder / "export"


def recipe_file(folder, change=lambda data: None):
    """A recipe of the small model: the H100's, in bf16, with a few slots."""
    data = yaml.safe_load((RECIPES / "h100-fp8-trtllm.yaml").read_text())
    data["decoder"]["precision"] = "bf16"
    data.update(name="small", slots=4, max_sequence=2560)
    change(data)
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(recipe_file(tmp_path))


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """The double on the path, on a Python of its own that knows the versions of the recipe's container."""
    return install(tmp_path / "tool", monkeypatch)


def install(folder, monkeypatch, tensorrt_llm="1.2.1", tensorrt=TENSORRT):
    binaries, site = folder / "bin", folder / "site"
    binaries.mkdir(parents=True)
    info = site / f"tensorrt_llm-{tensorrt_llm}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: {tensorrt_llm}\n")
    (site / "tensorrt.py").write_text(f"__version__ = {tensorrt!r}\n")
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = binaries / "trtllm-build"
    path.write_text(FAKE.read_text().replace("#!/usr/bin/env python3", f"#!/usr/bin/env {python}", 1))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    return path


@pytest.fixture
def gpu(monkeypatch):
    """The recipe's GPU, and a vision plan that is paper."""
    paper_gpu(monkeypatch)


def paper_gpu(monkeypatch):
    def plan(job, folder):
        (folder / f"{job.graph}.plan").write_bytes(b"paper")
        report = {
            "engine": "tensorrt",
            "version": TENSORRT,
            "compute_capability": "9.0",
            "gpu": "NVIDIA H100 80GB HBM3",
        }
        return Compiled({"tensorrt": TENSORRT}, report | {"seconds": 1.0, "bytes": 5, "weights_bytes": 5})

    monkeypatch.setattr(engine("tensorrt"), "compile", plan)
    monkeypatch.setattr(engine("tensorrt").library, "target", lambda recipe: Target("9.0", "NVIDIA H100 80GB HBM3"))
    monkeypatch.setattr(
        engine("tensorrt").library, "load", lambda graph="decoder": SimpleNamespace(__version__=TENSORRT)
    )


def test_a_bundle_holds_what_the_tool_wrote_and_how(export, recipe, tool, gpu, tmp_path):
    bundle = build_bundle(export, tmp_path / "bundle", recipe=recipe)
    assert Bundle.open(bundle.path) == bundle
    assert (bundle.engine, bundle.vision_engine, bundle.precision) == ("tensorrt-llm", "tensorrt", "bf16")
    names = {str(path.relative_to(bundle.path)) for path in bundle.path.rglob("*") if path.is_file()}
    assert names == {*bundles.SIDE_FILES, "manifest.json", "vision.plan"} | {
        "tensorrt_llm/config.json",
        "tensorrt_llm/rank0.engine",
    }
    assert names - {"manifest.json"} == set(bundle.manifest["files"])
    plan = bundle.manifest["plans"]["decoder"]
    assert bundle.manifest["versions"]["tensorrt-llm"] == plan["version"] == "1.2.1"
    assert bundle.manifest["versions"]["tensorrt"] == plan["tensorrt"] == TENSORRT
    assert bundle.manifest["container"]["matches"] is True
    assert bundle.manifest["compute_capabilities"] == ["9.0"]
    assert bundle.manifest["recipe"]["decoder"]["compiler"] == "tensorrt-llm"
    engine = (bundle.path / "tensorrt_llm" / "rank0.engine").read_bytes().decode()
    given = engine.partition(": ")[2].split()
    assert given[given.index("--max_batch_size") : -2] == plan["command"][plan["command"].index("--max_batch_size") :]
    assert plan["command"][:5] == ["trtllm-build", "--checkpoint_dir", "decoder", "--output_dir", "tensorrt_llm"]
    assert str(tmp_path) not in json.dumps(bundle.manifest), "a manifest says nothing of the machine that built it"
    assert set(plan["phases_s"]) == {name for name, _ in trtllm_build.PHASES[:-1]}
    log = (tmp_path / "bundle.trtllm-build.log").read_text()
    assert log.startswith(f"{tool} --checkpoint_dir") and "Total time of building all engines" in log
    assert not list(tmp_path.glob(".bundle.*"))


def test_the_engine_is_one_that_our_front_end_reads(export, recipe, tool, gpu, tmp_path):
    bundle = build_bundle(export, tmp_path / "bundle", recipe=recipe)
    config = EngineConfig.read(bundle.path / "tensorrt_llm")
    assert (config.max_sequence, config.max_positions, config.dtype) == (2560, 2560, "bfloat16")
    assert config.max_prompt_rows == bundle.profile.max_images * bundle.geometry.token_budget


@pytest.mark.parametrize("name", ["tensorrt_llm/rank0.engine", "tensorrt_llm/config.json"])
def test_a_changed_a_missing_and_a_foreign_file_of_the_engine_are_named(export, recipe, tool, gpu, tmp_path, name):
    path = build_bundle(export, tmp_path / "bundle", recipe=recipe).path
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[:-1] + b"#")
    with pytest.raises(InvalidBundle, match=f"^{name} has SHA-256"):
        Bundle.open(path)
    (path / name).unlink()
    with pytest.raises(InvalidBundle, match=name):
        Bundle.open(path)
    (path / name).write_bytes(content)
    (path / "tensorrt_llm" / "model.cache").write_text("")
    with pytest.raises(InvalidBundle, match=r"tensorrt_llm/model\.cache.*not in the manifest"):
        Bundle.open(path)


# The table of docs/decoder-engines.md: what each flag is for these three recipes.
FLAGS = {
    "bf16": {"gemm_plugin": "auto", "use_fp8_context_fmha": "disable", "use_fused_mlp": "enable"},
    "int4-awq": {"gemm_plugin": "auto", "use_fp8_context_fmha": "disable", "use_fused_mlp": "enable"},
    "fp8": {"gemm_plugin": "disable", "use_fp8_context_fmha": "disable", "use_fused_mlp": "disable"},
    "fp8 with an fp8 cache": {"gemm_plugin": "disable", "use_fp8_context_fmha": "enable", "use_fused_mlp": "disable"},
}


@pytest.mark.parametrize("kind", FLAGS)
def test_every_flag_comes_from_the_recipe_and_the_tool_takes_it(tmp_path, kind):
    def typed(data):
        data.update(slots=6, max_sequence=1024)
        data["decoder"].update(precision=kind.split()[0], kv="fp8" if "cache" in kind else "bf16")

    recipe = load_recipe(recipe_file(tmp_path, typed))
    chosen = trtllm_build.flags(recipe, max_sequence=1000, image_rows=289)
    assert chosen == FLAGS[kind] | {
        "max_batch_size": "6",
        "max_num_tokens": "1030",  # a prompt of 1024 tokens, and one token for each stream
        "max_input_len": "999",
        "max_seq_len": "1000",
        "max_beam_width": "1",
        "max_multimodal_len": str(6 * 289),
        "kv_cache_type": "paged",
        "tokens_per_block": "32",
        "remove_input_padding": "enable",
        "gpt_attention_plugin": "auto",
        "context_fmha": "enable",
        "use_paged_context_fmha": "enable",
        "multiple_profiles": "enable",
        "workers": "1",
        "log_level": "info",
    }
    timing = {"output_timing_cache": Path("/t")}
    line = trtllm_build.command("trtllm-build", Path("/c"), Path("/o"), chosen, timing)
    asked = vars(fake_trtllm_build.parser().parse_args(line[1:]))
    assert (asked["checkpoint_dir"], asked["output_dir"], asked["output_timing_cache"]) == ("/c", "/o", "/t")
    assert asked["max_prompt_embedding_table_size"] == 6 * 289
    assert {name: asked[name] for name in FLAGS[kind]} == FLAGS[kind]


def test_one_slot_does_not_ask_for_more_tokens_than_it_can_have(tmp_path):
    recipe = load_recipe(recipe_file(tmp_path, lambda data: data.update(slots=1)))
    assert trtllm_build.flags(recipe, max_sequence=2560, image_rows=289)["max_num_tokens"] == "2560"


def test_the_bar_says_what_the_tool_does(export, recipe, tool, gpu, tmp_path, capfd):
    geometry = read_export(export, recipe)[1]
    job = Job(graph="decoder", source=export, geometry=geometry, chosen=recipe, out=tmp_path / "bundle")
    build = trtllm_build.DecoderBuild.prepare(job)
    trtllm_build.build_engine(build.tool, build.checkpoint, tmp_path / "e", build.flags, log=build.log, progress=True)
    shown = capfd.readouterr().err
    assert all(f"trtllm-build {name}" in shown for name, _ in trtllm_build.PHASES)
    assert f"{len(trtllm_build.PHASES)}/{len(trtllm_build.PHASES)}" in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "failure, error, words",
    [
        ("gpu_memory", BuildFailed, "OutOfMemory.*lower slots or max_sequence"),
        ("host_memory", BuildFailed, "host's memory is full"),
        ("killed", BuildFailed, "was killed.*host's memory"),
        ("plugin", BuildFailed, "GPTAttention.*recipe's container"),
        ("library", BuildFailed, "libnvinfer.*recipe's container"),
        ("sm", BuildFailed, "SM>=100.*another precision"),
        ("checkpoint", BuildFailed, "qkv.bias.*export again"),
        ("shape", BuildFailed, "not the same shape.*export again"),
        ("gpu", DeviceUnavailable, "--gpus all"),
        ("disk", BuildFailed, "disk is full"),
        ("kernel", BuildFailed, "layers/0/ln_2.*no kernel"),
        ("unknown", BuildFailed, "status 1: RuntimeError: something that nobody has seen; see"),
        ("no_engine", BuildFailed, "left no rank0.engine"),
        ("other_limits", BuildFailed, "max_batch_size 2, not 4"),
        ("no_mrope", BuildFailed, "without M-RoPE"),
        ("other_version", BuildFailed, "TensorRT-LLM 1.2.0"),
    ],
)
def test_a_failure_has_its_remedy_names_the_log_and_leaves_nothing(
    export, recipe, tool, gpu, tmp_path, monkeypatch, failure, error, words
):
    monkeypatch.setenv("FAKE_TRTLLM_BUILD", failure)
    with pytest.raises(error, match=words) as caught:
        build_bundle(export, tmp_path / "bundle", recipe=recipe)
    assert "bundle.trtllm-build.log" in str(caught.value) and len(str(caught.value)) < 700
    assert (tmp_path / "bundle.trtllm-build.log").stat().st_size
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle.*"))


def test_an_unknown_flag_is_a_tool_of_another_version(recipe, export, tool, gpu, tmp_path, monkeypatch):
    taught = trtllm_build.flags
    monkeypatch.setattr(trtllm_build, "flags", lambda *a, **k: {**taught(*a, **k), "paged_state": "enable"})
    with pytest.raises(BuildFailed, match=r"unrecognized arguments: --paged_state.*another version"):
        build_bundle(export, tmp_path / "bundle", recipe=recipe)


def test_a_setting_that_the_tool_changed_is_in_the_manifest(export, recipe, tool, gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TRTLLM_BUILD", "override")
    plan = build_bundle(export, tmp_path / "bundle", recipe=recipe).manifest["plans"]["decoder"]
    assert plan["changed"] == [{"name": "use_paged_context_fmha", "asked": "enable", "built": "disable"}]


@pytest.mark.slow
def test_no_tool_and_tools_of_other_versions_are_refused_before_anything_is_built(
    export, recipe, gpu, tmp_path, monkeypatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceUnavailable, match=r"trtllm-build is not on the path; run this in nvcr.*--print"):
        build_bundle(export, tmp_path / "bundle", recipe=recipe)
    monkeypatch.setenv("PATH", os.defpath)
    for i, (versions, words) in enumerate(
        (
            ({"tensorrt_llm": "1.3.0"}, r"TensorRT-LLM 1\.3\.0, 26\.07-trtllm-python-py3 has 1\.2\.1"),
            ({"tensorrt": "10.15.1.29"}, r"TensorRT 10\.15\.1\.29, 26\.07-trtllm-python-py3 has 10\.14\.1\.48"),
        )
    ):
        install(tmp_path / str(i), monkeypatch, **versions)
        with pytest.raises(DeviceUnavailable, match=words):
            build_bundle(export, tmp_path / "bundle", recipe=recipe)
    (tmp_path / "1" / "site" / "tensorrt.py").unlink()
    with pytest.raises(DeviceUnavailable, match=r"No module named 'tensorrt'"):
        build_bundle(export, tmp_path / "bundle", recipe=recipe)
    assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob("*.log"))


def test_how_a_version_was_packed_does_not_matter(export, recipe, gpu, tmp_path, monkeypatch):
    install(tmp_path / "tool", monkeypatch, tensorrt_llm="1.2.1+cu13", tensorrt=f"{TENSORRT}.post1")
    bundle = build_bundle(export, tmp_path / "bundle", recipe=recipe)
    assert bundle.manifest["versions"]["tensorrt-llm"] == "1.2.1+cu13"


@pytest.mark.slow
def test_a_second_build_takes_the_engine_from_the_cache(export, recipe, tool, gpu, tmp_path):
    first = build_bundle(export, tmp_path / "first", recipe=recipe, cache=tmp_path / "cache")
    again = build_bundle(export, tmp_path / "second", recipe=recipe, cache=tmp_path / "cache")
    assert again.digest == first.digest
    assert not (tmp_path / "second.trtllm-build.log").exists()
    other = build_bundle(
        export, tmp_path / "third", recipe=dataclasses.replace(recipe, slots=5), cache=tmp_path / "cache"
    )
    assert other.digest != first.digest
    log = (tmp_path / "third.trtllm-build.log").read_text()
    assert "Timing cache of 'kernel times'" in log, "kernel times of the first build were not handed on"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda data: data.update(max_sequence=2400), "2560 positions, recipe small 2400.*--max-sequence 2400"),
        (lambda data: data["decoder"].update(precision="fp8"), "precision bf16.*asks for precision fp8"),
    ],
)
def test_an_export_that_the_recipe_does_not_build_is_refused(export, tool, gpu, tmp_path, change, words):
    with pytest.raises(InvalidRequest, match=words):
        build_bundle(export, tmp_path / "bundle", recipe=load_recipe(recipe_file(tmp_path, change)))


def test_a_vision_engine_that_is_too_small_for_a_request_is_refused(export, tool, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(trtllm_build, "load_profile", lambda path: SimpleNamespace(max_images=17))
    with pytest.raises(InvalidRequest, match="image_budget of 16, the profile allows 17 images"):
        build_bundle(export, tmp_path / "bundle", recipe=load_recipe(recipe_file(tmp_path)))


def test_a_cache_type_that_was_not_calibrated_is_refused(export, tool, gpu, tmp_path):
    own = Path(shutil.copytree(export, tmp_path / "export"))
    config = json.loads((own / "decoder" / "config.json").read_text())
    config["quantization"]["kv_cache_quant_algo"] = "FP8"
    (own / "decoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidRequest, match="KV cache in fp8, recipe small for bf16"):
        build_bundle(own, tmp_path / "bundle", recipe=load_recipe(recipe_file(tmp_path)))
    os.truncate(own / "decoder" / "rank0.safetensors", 5000)
    with pytest.raises(InvalidBundle, match=r"rank0\.safetensors is not a sound .* export again"):
        build_bundle(own, tmp_path / "bundle", recipe=load_recipe(recipe_file(tmp_path)))
    (own / "decoder" / "rank0.safetensors").unlink()
    with pytest.raises(InvalidBundle, match=r"rank0\.safetensors is missing"):
        build_bundle(own, tmp_path / "bundle", recipe=load_recipe(recipe_file(tmp_path)))


def test_an_export_in_the_other_form_names_the_form(export, recipe, tmp_path):
    graphs = load_recipe("h100-fp8")
    with pytest.raises(InvalidRequest, match="format tensorrt-llm, tensorrt takes onnx"):
        build_bundle(export, tmp_path / "bundle", recipe=graphs)
    with pytest.raises(InvalidRequest, match=r"format tensorrt-llm, onnxruntime takes onnx.*--format onnx"):
        build_bundle(export, tmp_path / "bundle")


def test_print_shows_both_commands_and_needs_neither_tool_nor_gpu(export, tmp_path):
    path = recipe_file(tmp_path)
    arguments = ["build", str(export), "-o", str(tmp_path / "bundle"), "--recipe", str(path), "--print"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    lines = [line for line in shown.stdout.splitlines() if not line.startswith("#")]
    assert lines[0].startswith(f"trtllm-build --checkpoint_dir {export}/decoder --output_dir {tmp_path}/bundle/")
    assert lines[1].startswith(f"mkdir -p {tmp_path} && docker run --rm --gpus all")
    assert f"--volume {tmp_path}:{tmp_path} --volume {export}:{export}:ro --volume {path}:{path}:ro" in lines[1]
    assert lines[1].endswith(
        f"cxr-triton-engine:26.07-trtllm-python-py3 build {export} -o {tmp_path}/bundle --recipe {path} --no-cache"
    )
    result = json.loads(CliRunner().invoke(main, [*arguments, "--json", "-"]).stdout)
    assert result["trtllm_build"][0] == "trtllm-build" and result["docker"] == lines[1]
    assert not (tmp_path / "bundle").exists()
    wrong = CliRunner().invoke(main, ["build", str(export), "-o", "b", "--recipe", "h100-fp8", "--print"])
    assert wrong.exit_code == 2 and "tensorrt-llm" in wrong.output


RUN = """
import sys
from pathlib import Path
import pytest
sys.path[:0] = [{tests!r}, {unit!r}]
from test_tensorrt_llm_build import paper_gpu
paper_gpu(pytest.MonkeyPatch())
from cxr_triton.cli import main
main(["build", {export!r}, "-o", {out!r}, "--recipe", {recipe!r}, "--no-cache"])
"""


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_an_interrupted_build_leaves_no_process_and_no_half_built_file(
    export, tool, tmp_path, monkeypatch, number, status
):
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAKE_TRTLLM_PIDS", str(pids))
    unit = Path(__file__).parent
    places = {"tests": str(unit.parent), "unit": str(unit), "export": str(export)}
    code = RUN.format(**places, out=str(tmp_path / "bundle"), recipe=str(recipe_file(tmp_path)))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2, process)
    build, child = map(int, pids.read_text().split())
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    try:
        until(lambda: not psutil.pid_exists(build))
        if number != signal.SIGKILL:
            until(lambda: not psutil.pid_exists(child))
            assert not (tmp_path / "bundle").exists() and not list(tmp_path.glob(".bundle.*"))
    finally:
        if psutil.pid_exists(child):
            os.kill(child, signal.SIGKILL)


def until(holds, process=None):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def test_make_engine_refuses_before_the_first_stage_where_the_tool_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["make-engine", str(PHANTOM / "checkpoint"), "--profile", str(PHANTOM / "profile.yaml")]
    arguments += ["-o", str(tmp_path / "out"), "--recipe", "h100-fp8-trtllm"]
    refused = CliRunner().invoke(main, arguments)
    assert (
        refused.exit_code == 1 and "trtllm-build is not on the path" in refused.stderr and "--print" in refused.stderr
    )
    assert not (tmp_path / "out").exists()
    bf16 = CliRunner().invoke(main, [*arguments[:-1], str(recipe_file(tmp_path))])
    assert bf16.exit_code == 1 and "no stand-in" in bf16.stderr and "--unverified" in bf16.stderr


def test_make_engine_calibrates_the_cache_that_the_recipe_asks_for(tool, gpu, tmp_path, monkeypatch):
    pytest.importorskip("modelopt")
    from cxr_triton.export import quantize
    from cxr_triton.triton_repo import make_engine

    def seen(*arguments, **options):
        raise KeyboardInterrupt(options["scheme"], options["kv_fp8"])

    monkeypatch.setattr(quantize, "quantize_checkpoint", seen)
    for kv in ("bf16", "fp8"):
        recipe = recipe_file(tmp_path, lambda data, kv=kv: data["decoder"].update(precision="fp8", kv=kv))
        with pytest.raises(KeyboardInterrupt) as caught:
            make_engine.make_engine(
                str(PHANTOM / "checkpoint"), tmp_path / kv, str(recipe), profile=str(PHANTOM / "profile.yaml")
            )
        assert caught.value.args == ("fp8", kv == "fp8")


def test_make_engine_prints_the_container_that_makes_it(tmp_path):
    recipe = recipe_file(tmp_path)
    arguments = ["make-engine", "org/model", "--profile", "chexone", "--recipe", str(recipe), "-o", str(tmp_path / "o")]
    arguments += ["--images", str(tmp_path), "--limit", "7", "--unverified", "--print", "--json", "-"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    line = json.loads(shown.stdout)["docker"]
    out = tmp_path / "o"
    assert line.startswith(f"mkdir -p {out} && docker run --rm --gpus all --ipc host")
    assert f"--volume {out}:{out} --volume {recipe}:{recipe}:ro --volume {tmp_path}:{tmp_path}:ro" in line
    assert line.endswith(
        f"--env HF_HOME={out}/hub cxr-triton-engine:26.07-trtllm-python-py3 make-engine org/model --recipe {recipe} "
        f"--profile chexone -o {out} --cache {out}/plans --images {tmp_path} --limit 7 --unverified"
    )
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_make_engine_goes_on_behind_a_failed_build_and_is_verified_by_its_stand_in(
    tool, gpu, tmp_path, monkeypatch, request
):
    """The demonstration model in fp8: a build that fails costs neither the calibration nor the export."""
    pytest.importorskip("modelopt")
    import torch

    from cxr_triton.triton_repo.make_engine import make_engine

    threads = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    torch.set_num_threads(1)  # two cores are shared with other tests

    # Four phantoms decide nothing.
    loose = {"images": 4, "label_iou": 0.3, "label_flips": 1, "kl": 5, "top1_agreement": 0.5, "control_iou": 0.3}
    loose |= {"control_reaction": 1, "reward_drop": 1, "length_drift": 1, "prose_f1": 0.1}
    pictures, random = tmp_path / "pictures", np.random.default_rng(3)
    pictures.mkdir()
    for i, photometric in enumerate(phantom_images.PHOTOMETRICS * 2):
        Image.fromarray(phantom_images.draw(random).picture("mimic_jpg", photometric)).save(pictures / f"{i}.png")

    def phantom(data):
        data["decoder"]["precision"] = "fp8"
        data.update(thresholds=loose, max_sequence=1024)

    said = []
    options = {"profile": str(PHANTOM / "profile.yaml"), "verify_images": pictures, "limit": 16, "device": "cpu"}
    options |= {"cache": tmp_path / "cache"}
    arguments = (str(PHANTOM / "checkpoint"), tmp_path / "out", str(recipe_file(tmp_path, phantom)))
    monkeypatch.setenv("FAKE_TRTLLM_BUILD", "gpu_memory")
    with pytest.raises(BuildFailed, match="OutOfMemory"):
        make_engine(*arguments, **options, say=said.append)
    assert not (tmp_path / "out" / "bundle").exists()
    assert "OutOfMemory" in (tmp_path / "out" / "bundle.trtllm-build.log").read_text()
    monkeypatch.delenv("FAKE_TRTLLM_BUILD")
    made = make_engine(*arguments, **options, say=said.append)
    assert [stage["stage"] for stage in made["stages"] if stage["cached"]] == ["quantized", "export"]
    assert "standin" in [stage["stage"] for stage in made["stages"]] and made["verified"]
    bundle = Bundle.open(made["bundle"])
    assert (bundle.engine, bundle.precision) == ("tensorrt-llm", "fp8")
    assert "run in onnxruntime in its place" in bundle.manifest["verification"]["runtime"]["said"]
    assert (tmp_path / "out" / "verification.html").is_file()
    again = make_engine(*arguments, **options)
    assert all(stage["cached"] for stage in again["stages"]) and again["digest"] == made["digest"]
