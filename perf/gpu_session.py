"""One session on a GPU machine without internet: which engines run there, whether they agree, how fast they are.

    python -m cxr_triton.perf.gpu_session parts           what has to travel, and what is here already
    python -m cxr_triton.perf.gpu_session run OUT         checks, then every step in a process of its own
    python -m cxr_triton.perf.gpu_session run OUT --dry-run   the same on a CPU, with a small model

A step writes each row as it is measured, so that one that runs out of time leaves what it had. docs/gpu-session.md
has the plan.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton.cli import Group, json_option, write_json
from cxr_triton.errors import CxrError, InvalidRequest

SCHEMA = 1
STEPS = {"runtime": 300, "parity": 480, "speed": 540, "stack": 540}
"""Seconds that each step may take."""
PARTS = {  # distribution: (module, steps that need it, MiB of its wheel)
    "torch": ("torch", "runtime parity speed stack", None),
    "transformers": ("transformers", "parity speed", None),
    "onnx": ("onnx", "runtime parity speed stack", None),
    "onnxruntime": ("onnxruntime", "runtime parity speed stack", None),
    "ml-dtypes": ("ml_dtypes", "runtime parity speed stack", None),
    "tokenizers": ("tokenizers", "parity speed stack", None),
    "click": ("click", "runtime parity speed stack", None),
    "tqdm": ("tqdm", "runtime parity speed stack", None),
    "cuda-bindings": ("cuda.bindings.runtime", "runtime parity speed stack", None),
    "tensorrt-rtx-cu13": ("tensorrt_rtx", "runtime parity speed stack", 0.1),
    "tensorrt-rtx-cu13-bindings": ("tensorrt_rtx_bindings", "runtime parity speed stack", 1.2),
    "tensorrt-rtx-cu13-libs": ("tensorrt_rtx_libs", "runtime parity speed stack", 90.7),
    "imagecodecs": ("imagecodecs", "parity stack", 27.0),
    "pydicom": ("pydicom", "stack", 2.3),
    "tritonclient": ("tritonclient", "stack", 13.3),
    "nvidia-pytriton": ("pytriton", "stack", 52.8),
    "scipy": ("scipy", "stack", None),
}
"""Sizes are those of the wheels for Python 3.12; None where a machine with torch is expected to have it."""
OPTIONAL = ("tensorrt", "onnxruntime-gpu", "vllm")
STREAMS = (1, 8, 32, 128)
VISION_BATCHES = (1, 8, 32)
PROMPTS = (350, 1400)
CONTEXT = 350
MAX_SEQUENCE = 2560
ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of model, with random weights of the real layout."""

    name: str
    text: dict
    vision: dict


def scales(is_dry: bool) -> dict[str, Scale]:
    from cxr_triton.engines.recipe import TEXT_3B, VISION_3B

    head = {"rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]}}
    text = TEXT_3B | head | {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    vision = VISION_3B | {
        "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "depth": 2, "out_hidden_size": 256,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    small = Scale("small", text, vision)
    return {"small": small} if is_dry else {"small": small, "3b": Scale("3b", TEXT_3B, VISION_3B)}


class Session:
    """What the steps share: folders, the machine, and rows that are kept as they come.

    Parameters
    ----------
    out : Path
        Results.
    work : Path
        Checkpoints, exports and bundles; kept between steps.
    tokenizer : Path
        Folder with ``tokenizer.json`` and ``chat_template.jinja`` of the real vocabulary.
    plans : Path, optional
        Bundles that were built elsewhere, for the first step.
    is_dry : bool
        Small shapes on a CPU with ONNX Runtime in the engines' place.
    """

    def __init__(self, out: Path, work: Path, tokenizer: Path, plans: Path | None, is_dry: bool):
        self.out, self.work, self.tokenizer, self.plans, self.is_dry = out, work, tokenizer, plans, is_dry
        self.scales = scales(is_dry)
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, **row) -> None:
        """Keep a row of a step."""
        rows = [*self.rows(step), row]
        partial = self.out / f".{step}.json"
        partial.write_text(json.dumps(rows, indent=1))
        os.replace(partial, self.out / f"{step}.json")
        click.echo(f"{step}: {_line(row)}", err=True)

    def rows(self, step: str) -> list[dict]:
        path = self.out / f"{step}.json"
        return json.loads(path.read_text()) if path.exists() else []

    @contextmanager
    def noting(self, step: str, **about) -> Iterator[dict]:
        """Keep a row with how long the block took and what it found; an error becomes its exact message."""
        row, started_s = dict(about), time.perf_counter()
        try:
            yield row
            row["ok"] = row.get("ok", True)
        except (Exception, SystemExit) as error:
            message = error.wire() if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
            row |= {"ok": False, "error": message[:2000]}
        row["seconds"] = round(time.perf_counter() - started_s, 2)
        self.add(step, **row)

    # ------------------------------------------------------------------------------------------------------- models

    def checkpoint(self, scale: Scale, scheme: str | None = None) -> Path:
        """Random weights, written once."""
        from cxr_triton.perf.shape import write_shape

        folder = self.work / f"{scale.name}-{scheme or 'bf16'}"
        if not (folder / "model.safetensors.index.json").exists():
            write_shape(folder, self.tokenizer, scheme=scheme, text_values=scale.text, vision_values=scale.vision)
        return folder

    def export(self, scale: Scale, precision: str, compute: str) -> Path:
        """An export folder, written once."""
        from cxr_triton.export.command import export_checkpoint
        from cxr_triton.profile import load_profile

        folder = self.work / f"export-{scale.name}-{precision}-{compute}"
        if not folder.exists():
            source = self.checkpoint(scale, "fp8" if precision == "fp8" else None)
            export_checkpoint(
                str(source), folder, load_profile("nv-reason-cxr-3b"), precision=precision, compute=compute,
                max_sequence=MAX_SEQUENCE, accept_licence=True, progress=False,
            )  # fmt: skip
        return folder

    def bundle(self, scale: Scale, engine: str, precision: str, capability: str | None):
        """A bundle for an engine, built once; plans of another target than this GPU are let through."""
        from cxr_triton.engines.bundle import Bundle, build_bundle

        name = f"bundle-{scale.name}-{engine}-{precision}-{capability}"
        if engine == "onnxruntime":
            precision = "fp32" if precision == "bf16" else precision
        compute = "fp32" if engine == "onnxruntime" else "bf16"
        folder, export = self.work / name, self.export(scale, precision, compute)
        if folder.exists():
            bundle = Bundle.open(folder, verify=False)
        elif engine == "onnxruntime":
            bundle = build_bundle(export, folder)
        else:
            bundle = build_bundle(export, folder, recipe=self.recipe(engine, export, capability))
            if capability == "current":
                bundle = self._recompile(bundle, export)
        return self.adopted(bundle)

    def recipe(self, engine: str, export: Path, capability: str | None):
        """Recipe of the H100 with another compiler and target; TensorRT-RTX has no name for compute capability 9.0."""
        from cxr_triton.engines.recipe import load_recipe

        base, held = load_recipe("h100-fp8"), json.loads((export / "export.json").read_bytes())
        types = {
            "compiler": engine,
            "precision": held["precision"],
            "compute": "bf16",
            "head": held["head"],
            "kv": "bf16",
        }
        if engine == "tensorrt-rtx" and (held["precision"] == "fp8" or capability in (None, "current")):
            capability = "8.9" if held["precision"] == "fp8" else "8.0"
        return dataclasses.replace(
            base,
            compute_capability=capability,
            vision=dataclasses.replace(base.vision, compiler=engine, precision="bf16"),
            decoder=dataclasses.replace(base.decoder, **types),
            slots=max(STREAMS),
            max_sequence=MAX_SEQUENCE,
            image_budget=max(VISION_BATCHES),
            thresholds={},
        )

    def _recompile(self, bundle, export: Path):
        """Plans for the GPU that is here, in the place of those for a named capability."""
        from cxr_triton.engines.tensorrt import Target, compile_graph, shape_ranges

        recipe = self.recipe(bundle.engine, export, None)
        for graph in ("vision", "decoder"):
            plan = bundle.path / f"{graph}.plan"
            plan.unlink()
            ranges = shape_ranges(graph, bundle.geometry, recipe, bundle.profile.max_images)
            bundle.manifest["plans"][graph] = compile_graph(
                bundle.engine, export / f"{graph}.onnx", plan, ranges,
                max_sequence=bundle.geometry.max_sequence, target=Target("current", None), progress=False,
            )  # fmt: skip
        return bundle

    @staticmethod
    def adopted(bundle):
        """The bundle as one for this GPU, so that sessions try to load what was built for another."""
        if bundle.engine == "onnxruntime":
            return bundle
        from cxr_triton.engines.cuda import device

        here, manifest = device().compute_capability, json.loads(json.dumps(bundle.manifest))
        for plan in manifest["plans"].values():
            plan["built_for"], plan["compute_capability"] = plan["compute_capability"], here
        return dataclasses.replace(bundle, manifest=manifest)

    @property
    def chosen(self) -> tuple[str, str | None]:
        """Engine and target that the first step found to run.

        Raises
        ------
        InvalidRequest
            None ran.
        """
        for row in self.rows("runtime"):
            if row["ok"] and row.get("agrees"):
                return row["engine"], row.get("target")
        raise InvalidRequest("no engine ran in step runtime; the speed of transformers is all that can be measured")


def _line(row: dict) -> str:
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    return ", ".join(shown)[:300]


# -------------------------------------------------------------------------------------------------------------- checks


def check(is_dry: bool) -> dict:
    """What this machine has, and which steps it is ready for."""
    present, missing = {}, {}
    for name, (module, steps, _) in PARTS.items():
        found, why = _importable(module)
        if found:
            present[name] = _version(name)
            continue
        needed = not (is_dry and name.startswith(("tensorrt-rtx", "cuda")))
        for step in steps.split() if needed else ():
            missing.setdefault(step, []).append(f"{name} ({why})")
    gpu = _gpu()
    if gpu is None and not is_dry:
        for step in STEPS:
            missing.setdefault(step, []).append("an NVIDIA GPU that torch can use")
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": gpu},
        "free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "present": present,
        "optional": {name: _version(name) for name in OPTIONAL},
        "providers": _providers(),
        "missing": missing,
    }


def _importable(module: str) -> tuple[bool, str]:
    try:
        importlib.import_module(module)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return True, ""


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu() -> dict | None:
    if not _importable("torch")[0]:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def _providers() -> list[str]:
    if not _importable("onnxruntime")[0]:
        return []
    import onnxruntime

    return onnxruntime.get_available_providers()


# --------------------------------------------------------------------------------------------------------------- steps


def step_runtime(session: Session) -> None:
    """Does a small engine load, run and agree with the same weights in ONNX Runtime in fp32?"""
    small = session.scales["small"]
    expected = _probe(session.bundle(small, "onnxruntime", "bf16", None))
    if session.is_dry:
        candidates = [("onnxruntime", None, "here")]
    else:
        here = _gpu()["compute_capability"]
        candidates = [("tensorrt-rtx", capability, "here") for capability in ("8.0", "8.9", "current")]
        candidates.append(("tensorrt", here, "here"))
    for folder in sorted(session.plans.iterdir()) if session.plans else ():
        with session.noting("runtime", engine="tensorrt-rtx", target=folder.name, built="elsewhere") as row:
            from cxr_triton.engines.bundle import Bundle

            row |= _agreement(expected, _probe(session.adopted(Bundle.open(folder, verify=False))))
    for engine, target, built in candidates:
        with session.noting("runtime", engine=engine, target=target, built=built) as row:
            row |= _agreement(expected, _probe(session.bundle(small, engine, "bf16", target)))


def _probe(bundle) -> dict[str, np.ndarray]:
    """Vision embeddings of two pictures, logits of a prompt and of three steps after it."""
    from cxr_triton.engines.session import open_decoder, open_vision

    geometry, rng = bundle.geometry, np.random.default_rng(0)
    embeddings = open_vision(bundle).encode(**_pictures(geometry, 2))
    decoder, logits = open_decoder(bundle, slots=2), []
    ids = rng.integers(1000, 100_000, 24)
    index = np.full(24, -1, np.int64)
    index[4:20] = np.arange(16)
    positions = np.tile(np.arange(24), (3, 1))
    logits.append(decoder.prefill(0, ids, index, embeddings[0], positions, is_last=True).copy())
    for step in range(3):
        logits.append(decoder.step(ids[step : step + 1], np.array([24 + step]))[0].copy())
    return {"embeddings": embeddings[:, :16], "logits": np.stack(logits)}


def _pictures(geometry, count: int) -> dict[str, np.ndarray]:
    from cxr_triton import image

    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 256, (448, 448), np.uint8) for _ in range(count)]
    budgets = {"window_budget": geometry.window_budget, "token_budget": geometry.token_budget}
    return image.stack([image.windows(picture, **budgets) for picture in drawn])


def _agreement(expected: dict, found: dict) -> dict:
    """Least cosine of any row; bf16 of random weights stays over 0.99."""
    told = {}
    for name, values in expected.items():
        a, b = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (values, found[name]))
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        told[f"{name}_cosine"] = float(cosine.min())
    return told | {"agrees": all(np.isfinite(v) and v > 0.99 for v in told.values())}


def step_parity(session: Session) -> None:
    """The gate's own comparison with transformers, which runs on the GPU, for each size and precision."""
    import io

    from PIL import Image

    from cxr_triton.engines.reference import Reference
    from cxr_triton.engines.verify import verify_bundle
    from cxr_triton.profile import load_profile

    engine, target = session.chosen
    rng, images = np.random.default_rng(2), []
    for size in ((448, 448), (420, 504))[: 1 if session.is_dry else 2]:
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, size, np.uint8)).save(out, "PNG")
        images.append(out.getvalue())
    profile = load_profile("nv-reason-cxr-3b")
    for scale in session.scales.values():
        with Reference(session.checkpoint(scale), profile) as reference:
            for precision in ("bf16", "int4") if session.is_dry else ("bf16", "fp8", "int4"):
                with session.noting("parity", scale=scale.name, precision=precision, engine=engine) as row:
                    bundle = session.bundle(scale, engine, precision, target)
                    quantized = session.checkpoint(scale, "fp8") if precision == "fp8" else None
                    record = verify_bundle(
                        bundle, reference, profile, images, requests=({"max_new_tokens": 8},), quantized=quantized
                    )
                    for part in ("vision", "decoder"):
                        row |= _scalars(record["parts"][part], part)


def _scalars(part: dict, name: str) -> dict:
    """Measured values and whether the part passed."""
    told = {f"{name}_passed": part["passed"]}
    if part.get("error"):
        told[f"{name}_error"] = str(part["error"])[:300]
    for entry in part.get("checks", ()):
        told[f"{name}_{entry['name']}"] = entry.get("value")
    return told


def step_speed(session: Session) -> None:
    """Vision, prefill and decode steps beside the ceilings of this run, and transformers on the same weights."""
    from cxr_triton.perf import roofline

    ceilings = roofline.cpu_ceilings() if session.is_dry else roofline.gpu_ceilings()
    session.add("speed", what="ceilings", **ceilings.to_json())
    scale = list(session.scales.values())[-1]
    try:
        engine, target = session.chosen
    except InvalidRequest as error:
        session.add("speed", what="engine", ok=False, error=error.message)
    else:
        for precision in ("bf16", "int4") if session.is_dry else ("bf16", "fp8", "int4"):
            with session.noting("speed", what="engine", scale=scale.name, precision=precision, engine=engine):
                bundle = session.bundle(scale, engine, precision, target)
                _speed_of(session, bundle, ceilings, with_vision=precision == "bf16")
    for mode in ("eager",) if session.is_dry else ("eager", "compiled"):
        with session.noting("speed", what=f"transformers {mode}", scale=scale.name, precision="bf16") as row:
            row |= _transformers_speed(session.checkpoint(scale), mode, *((4, 1) if session.is_dry else (64, 3)))


def _speed_of(session: Session, bundle, ceilings, *, with_vision: bool) -> None:
    from cxr_triton.engines.session import open_decoder, open_vision
    from cxr_triton.perf import roofline

    work, compute = roofline.ModelWork.of(bundle), bundle.geometry.compute
    weights = bundle.precision.removesuffix("-awq")
    kinds = [roofline.gemm_kind(ceilings, compute), roofline.gemm_kind(ceilings, weights, compute)]
    rounds, about = 2 if session.is_dry else ROUNDS, {"precision": bundle.precision, "engine": bundle.engine}

    def told(what: str, amount, seconds: float, kind: str, **more) -> None:
        session.add("speed", what=what, **about, **roofline.row(what, amount, seconds, ceilings, kind, **more))

    if with_vision:
        vision, grid = open_vision(bundle), (448 // 28) ** 2
        for batch in VISION_BATCHES[:1] if session.is_dry else VISION_BATCHES:
            feeds = _pictures(bundle.geometry, batch)
            seconds = _median_s(lambda feeds=feeds: vision.encode(**feeds), rounds)
            images = roofline.Work(batch * work.vision(grid).flops, work.vision(grid, 1).bytes)
            told("vision", images, seconds, kinds[0], images=batch)
        del vision
    slots = (1, 2) if session.is_dry else STREAMS
    decoder, rng = open_decoder(bundle, slots=max(slots)), np.random.default_rng(3)

    def prompt(slot: int, tokens: int) -> None:
        decoder.free(slot)
        ids, text = rng.integers(1000, 100_000, tokens), np.full(tokens, -1, np.int64)
        positions = np.tile(np.arange(tokens), (3, 1))
        nothing = np.zeros((0, bundle.geometry.hidden), np.float32)
        decoder.prefill(slot, ids, text, nothing, positions, is_last=True)

    for tokens in PROMPTS[:1] if session.is_dry else PROMPTS:
        seconds = _median_s(lambda tokens=tokens: prompt(0, tokens), rounds)
        told("prefill", work.prefill(tokens), seconds, kinds[1], tokens=tokens)
    for streams in slots:
        for slot in range(streams):
            prompt(slot, CONTEXT)
        ids, at = rng.integers(1000, 100_000, streams), np.full(streams, CONTEXT)
        seconds = _median_s(lambda ids=ids, at=at: decoder.step(ids, at), rounds)
        step = work.decode(CONTEXT + rounds / 2, streams)
        told("decode step", step, seconds, kinds[1], streams=streams, tokens_per_s=streams / seconds)
        if not session.is_dry:
            device_s = _device_step_s(decoder, streams, rounds)
            told("decode step, device alone", step, device_s, kinds[1], streams=streams)


def _device_step_s(decoder, streams: int, rounds: int) -> float:
    """A captured step by itself: no upload, no download of the logits."""
    from cxr_triton.engines.cuda import call

    plan, graph = decoder._plan, decoder._graphs[streams]
    started_s = time.perf_counter()
    for _ in range(rounds):
        call("cudaGraphLaunch", graph, plan.stream)
    plan.synchronize()
    return (time.perf_counter() - started_s) / rounds


def _median_s(run: Callable[[], object], rounds: int) -> float:
    """Median wall time; sessions return when the device is done."""
    for _ in range(2):
        run()
    seconds = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return statistics.median(seconds)


def _transformers_speed(checkpoint: Path, mode: str, tokens: int, rounds: int) -> dict:
    """`generate` of one stream in bf16: time to the first token, and tokens per second after it."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)
    ids = torch.randint(1000, 100_000, (1, CONTEXT), device=device)
    # A static cache makes `generate` compile the decoding forward, with CUDA graphs.
    cache = {"cache_implementation": "static"} if mode == "compiled" else {}

    def generate(count: int) -> None:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
            max_new_tokens=count, **cache,
        )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()

    first_s, all_s = _median_s(lambda: generate(1), rounds), _median_s(lambda: generate(tokens), rounds)
    return {"time_to_first_token_s": first_s, "tokens_per_s": (tokens - 1) / (all_s - first_s)}


def step_stack(session: Session) -> None:
    """DICOM in, text out, through Triton: one stream and a sweep, by the project's own benchmark."""
    engine, target = session.chosen
    scale = list(session.scales.values())[-1]
    precision = "bf16" if session.is_dry else "fp8"
    with session.noting("stack", scale=scale.name, precision=precision, engine=engine) as row:
        bundle = session.bundle(scale, engine, precision, target)
        if engine != "onnxruntime" and bundle.manifest["plans"]["decoder"].get("built_for"):
            _write_manifest(bundle)
        repository, result = session.work / "repository", session.out / "bench.json"
        slots = "2" if session.is_dry else "32"
        _cxr_triton("package", str(bundle.path), "-o", str(repository), "--unverified", "--force", "--slots", slots)
        sizes = ["--seconds", "1", "--requests", "2", "--repeats", "1", "--warm-up", "1", "--sweep", "2"]
        full = ["--seconds", "15", "--repeats", "3", "--sweep", "1,8,32"]
        _cxr_triton(
            "bench", "run", str(repository), "--workload", "short" if session.is_dry else "chexone",
            "--scenario", "single_stream", "--perf-analyzer", "none", *(sizes if session.is_dry else full),
            "--json", str(result), "--html", str(session.out / "bench.html"),
        )  # fmt: skip
        measured = json.loads(result.read_text())
        (point,) = measured["scenarios"][0]["points"]
        for name in ("ttft_ms.p50", "ttft_ms.p99", "itl_ms.p50", "latency_ms.p90", "output_tokens_per_s"):
            row[name] = point["summary"][name]["mean"]
        row["stages_ms"] = point["waterfall"]["stages_ms"]
        row["sweep"] = {
            f"{each['load']['value']:g}": each["summary"]["output_tokens_per_s"]["mean"] for each in measured["sweep"]
        }


def _write_manifest(bundle) -> None:
    """The served sessions read the manifest from disk: let it name this GPU."""
    (bundle.path / "manifest.json").write_text(json.dumps(bundle.manifest))


def _cxr_triton(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cxr_triton.cli import main; main()", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"cxr-triton {arguments[0]} ended with {done.returncode}: {done.stderr[-1500:]}")


FUNCTIONS = {"runtime": step_runtime, "parity": step_parity, "speed": step_speed, "stack": step_stack}


# -------------------------------------------------------------------------------------------------------------- report


def markdown(result: dict) -> str:
    """Tables of a session, to paste where results are kept."""
    gpu = result["check"]["machine"]["gpu"]
    title = "GPU session" if gpu else "Dry run of the GPU session, on a CPU with a small random model"
    lines = [f"# {title}", "", f"{result['created']}, {gpu['name'] if gpu else 'no GPU'}", ""]
    for step, told in result["steps"].items():
        lines += [f"## {step}: {told['status']}, {told['seconds']:.0f} s", ""]
        groups: dict[tuple, list[dict]] = {}
        for row in told["rows"]:
            flat = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
            groups.setdefault(tuple(flat), []).append(flat)
        for names, rows in groups.items():
            lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
            lines += [f"| {' | '.join(_cell(value) for value in row.values())} |" for row in rows] + [""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


# ------------------------------------------------------------------------------------------------------------ commands


@click.group(cls=Group, extra="rtx")
def main():
    """Run and prepare a session on a GPU machine."""


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Models.  [default: OUT/work]")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with tokenizer.json and chat_template.jinja of the models.",
)
@click.option(
    "--plans", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Bundles that were built elsewhere."
)
@click.option("--step", "steps", multiple=True, type=click.Choice(list(STEPS)), help="Only this; may be repeated.")
@click.option("--limit-s", type=click.IntRange(1), help="For each step.  [default: its own]")
@click.option("--dry-run", "is_dry", is_flag=True, help="On a CPU, with a small model.")
@json_option
def run(out, work, tokenizer, plans, steps, limit_s, is_dry, json_path):
    """Check the machine, run the steps, and write OUT/session.json and OUT/session.md.

    A step whose parts are missing is left out, and the result says which. Exit status 3 if a step did not succeed.
    """
    checked = check(is_dry)
    result = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": is_dry,
        "check": checked,
        "steps": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    common = ["--out", str(out), "--work", str(work or out / "work"), "--tokenizer", str(tokenizer)]
    common += ["--plans", str(plans)] * bool(plans) + ["--dry-run"] * is_dry
    for step in steps or STEPS:
        (out / f"{step}.json").unlink(missing_ok=True)
        started_s, missing = time.perf_counter(), checked["missing"].get(step)
        status = f"not run: {', '.join(missing)}" if missing else _child(step, common, limit_s or STEPS[step])
        rows = json.loads((out / f"{step}.json").read_text()) if (out / f"{step}.json").exists() else []
        if status == "done" and not all(row.get("ok", True) for row in rows):
            status = "done, with errors"
        seconds = time.perf_counter() - started_s
        result["steps"][step] = {"status": status, "seconds": seconds, "rows": rows}
        (out / "session.json").write_text(json.dumps(result, indent=1))
        (out / "session.md").write_text(markdown(result))
        click.echo(f"{step}: {status}, {seconds:.0f} s", err=True)
    write_json(result, json_path)
    if any(told["status"] != "done" for told in result["steps"].values()):
        click.get_current_context().exit(3)


def _child(step: str, common: list[str], limit_s: float) -> str:
    """Run a step in a process group of its own; what is left of it is ended."""
    command = [sys.executable, "-m", "cxr_triton.perf.gpu_session", "step", step, *common]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return "done" if code == 0 else f"ended with {code}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@main.command(hidden=True)
@click.argument("name", type=click.Choice(list(STEPS)))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--plans", type=click.Path(path_type=Path))
@click.option("--dry-run", "is_dry", is_flag=True)
def step(name, out, work, tokenizer, plans, is_dry):
    """One step, in this process."""
    try:
        FUNCTIONS[name](Session(out, work, tokenizer, plans, is_dry))
    except CxrError as error:
        raise click.ClickException(error.wire()) from None


@main.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
def plans(out, tokenizer):
    """Build the small model's TensorRT-RTX plans without a GPU, for --plans of a session elsewhere."""
    from cxr_triton.engines.bundle import build_bundle

    session = Session(out / "work", out / "work", tokenizer, None, is_dry=False)
    export = session.export(session.scales["small"], "bf16", "bf16")
    for capability in ("8.0", "8.9"):
        build_bundle(export, out / "plans" / capability, recipe=session.recipe("tensorrt-rtx", export, capability))
        click.echo(out / "plans" / capability)


@main.command()
@json_option
def parts(json_path):
    """What the steps need, with sizes, and what is here."""
    checked = check(is_dry=False)
    rows = []
    for name, (_, steps, mib) in PARTS.items():
        here = checked["present"].get(name)
        rows.append(
            {"part": name, "mib": mib, "steps": steps.split(), "present": here if name in checked["present"] else None}
        )
        size = "on such machines" if mib is None else f"{mib} MiB"
        state = f"present, {here}" if name in checked["present"] else "missing"
        click.echo(f"{name:<28}{size:<18}{state:<24}{steps}", err=json_path == "-")
    write_json({"schema": SCHEMA, "parts": rows}, json_path)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--limit-mib", default=48, show_default=True, help="Largest load.")
@json_option
def pack(files, out, limit_mib, json_path):
    """Split FILES into loads of a least size that travel one by one: OUT/load-N, each with a list of its pieces."""
    loads = _loads(files, limit_mib << 20)
    for number, pieces in enumerate(loads):
        folder = out / f"load-{number}"
        folder.mkdir(parents=True)
        for piece in pieces:
            with open(piece["source"], "rb") as source:
                source.seek(piece["offset"])
                (folder / piece["piece"]).write_bytes(source.read(piece["bytes"]))
        listed = [{key: value for key, value in piece.items() if key != "source"} for piece in pieces]
        (folder / "pieces.json").write_text(json.dumps(listed, indent=1))
        click.echo(f"load-{number}: {sum(piece['bytes'] for piece in pieces) / 2**20:.1f} MiB", err=json_path == "-")
    write_json({"schema": SCHEMA, "loads": [[piece["piece"] for piece in pieces] for pieces in loads]}, json_path)


def _loads(files, limit: int) -> list[list[dict]]:
    loads: list[list[dict]] = [[]]
    room = limit
    for path in files:
        digest, size, offset = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size, 0
        while offset < size:
            if not room:
                loads.append([])
                room = limit
            take = min(room, size - offset)
            loads[-1].append(
                {
                    "file": path.name, "file_bytes": size, "sha256": digest, "offset": offset, "bytes": take,
                    "piece": f"{path.name}.{offset}", "source": str(path),
                }
            )  # fmt: skip
            offset, room = offset + take, room - take
    return loads


@main.command()
@click.argument("load", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("target", type=click.Path(file_okay=False, path_type=Path))
def unpack(load, target):
    """Put the pieces of LOAD where they belong in TARGET; a file that is complete is checked."""
    target.mkdir(parents=True, exist_ok=True)
    for piece in json.loads((load / "pieces.json").read_text()):
        path = target / f"{piece['file']}.partial"
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.seek(piece["offset"])
            file.write((load / piece["piece"]).read_bytes())
        if hashlib.sha256(path.read_bytes()).hexdigest() == piece["sha256"]:
            path.rename(target / piece["file"])
            click.echo(f"{piece['file']}: complete")
        else:
            click.echo(f"{piece['file']}: not whole yet")


if __name__ == "__main__":
    main()
