"""One session on a GPU machine without internet: which engines run there, whether they agree, how fast they are.

    python -m cxr_triton.perf.gpu_session pack WHEELS -o LOADS    what travels, in loads, with one GPU's kernels only
    python -m cxr_triton.perf.gpu_session unpack LOAD TARGET      there
    python -m cxr_triton.perf.gpu_session run OUT                 checks, then every step in a process of its own
    python -m cxr_triton.perf.gpu_session run OUT --dry-run       the same on a CPU, with a small model

A step writes each row as it is measured, so that one that runs out of time leaves what it had; what a step leaves of
its seconds is not given to the others. docs/gpu-session.md has the plan.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton.cli import Group, json_option, write_json
from cxr_triton.errors import CxrError
from cxr_triton.files import write
from cxr_triton.perf.loads import pack, unpack

SCHEMA = 2
STEPS = {"prepare": 150, "providers": 60, "parity": 120, "speed": 240, "stack": 120}
"""Seconds that each step may take."""
PARTS = {  # distribution: (module, steps that need it, MiB of its wheel for Python 3.12)
    "torch": ("torch", "prepare providers parity speed stack", None),
    "transformers": ("transformers", "parity speed", None),
    "onnx": ("onnx", "prepare providers parity speed stack", None),
    "onnxruntime-gpu": ("onnxruntime", "providers parity speed stack", 243.7),
    "ml-dtypes": ("ml_dtypes", "prepare providers parity speed stack", None),
    "tokenizers": ("tokenizers", "prepare parity speed stack", None),
    "click": ("click", "prepare providers parity speed stack", None),
    "tqdm": ("tqdm", "prepare providers parity speed stack", None),
    "cuda-bindings": ("cuda.bindings.runtime", "providers parity speed stack", None),
    "imagecodecs": ("imagecodecs", "stack", 27.0),
    "pydicom": ("pydicom", "stack", 2.3),
    "tritonclient": ("tritonclient", "stack", 13.3),
    "nvidia-pytriton": ("pytriton", "stack", 52.8),
    "scipy": ("scipy", "stack", None),
}
"""Sizes are None where a machine with torch is expected to have it."""
OPTIONAL = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Engines that are tried where they are installed."""
PRECISIONS = ("bf16", "int4-awq")
STREAMS = (1, 8, 32, 64)
IMAGES = (1, 8, 32)
PROMPTS = (350, 1400)
CONTEXT = 350
MAX_SEQUENCE = 2560
ANSWER = 24
ROUNDS = 20


@dataclasses.dataclass(frozen=True)
class Scale:
    """A size of model, with random weights of the real layout."""

    name: str
    text: dict
    vision: dict


def scales(is_dry: bool) -> dict[str, Scale]:
    from cxr_triton.engines.recipe import TEXT_3B, VISION_3B

    text = TEXT_3B | {
        "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
    }  # fmt: skip
    vision = VISION_3B | {
        "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "depth": 2, "out_hidden_size": 512,
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
    is_dry : bool
        Small shapes on a CPU, in fp32 and int4.
    """

    def __init__(self, out: Path, work: Path, tokenizer: Path, is_dry: bool):
        self.out, self.work, self.tokenizer, self.is_dry = out, work, tokenizer, is_dry
        self.scales = scales(is_dry)
        self.precisions = ("fp32", "int4") if is_dry else PRECISIONS
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)

    def add(self, step: str, **row) -> None:
        """Keep a row of a step."""
        rows = [*self.rows(step), row]
        write(self.out / f"{step}.json", json.dumps(rows, indent=1))
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

    @contextmanager
    def _making(self, name: str) -> Iterator[Path | None]:
        """A new folder's path while nobody else makes it, or None if it is there already."""
        folder = self.work / name
        with open(self.work / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield None if folder.exists() else folder

    def checkpoint(self, scale: Scale, scheme: str | None = None) -> Path:
        """Random weights, written once."""
        from cxr_triton.perf.shape import write_shape

        name = f"{scale.name}-{scheme or 'bf16'}"
        with self._making(name) as folder:
            if folder:
                partial = folder.with_name(f".{name}")
                write_shape(
                    partial, self.tokenizer, scheme=scheme, text_values=scale.text, vision_values=scale.vision,
                    normal=None if self.is_dry else _gpu_normal,
                )  # fmt: skip
                os.replace(partial, folder)
        return self.work / name

    def export(self, scale: Scale, precision: str, compute: str) -> Path:
        """An export folder, written once."""
        from cxr_triton.export.command import export_checkpoint
        from cxr_triton.profile import load_profile

        source = self.checkpoint(scale, precision if precision == "int4-awq" else None)
        name = f"export-{scale.name}-{precision}-{compute}"
        with self._making(name) as folder:
            if folder:
                profile = dataclasses.replace(load_profile("nv-reason-cxr-3b"), checkpoint=None)  # of any scale
                export_checkpoint(
                    str(source), folder, profile, precision=precision, compute=compute,
                    head="int4" if precision == "int4-awq" else None, max_sequence=MAX_SEQUENCE, accept_licence=True,
                    progress=False,
                )  # fmt: skip
        return self.work / name

    def bundle(self, scale: Scale, precision: str, engine: str = "onnxruntime-cuda"):
        """A bundle for an engine, built once."""
        from cxr_triton.engines.build import build_bundle
        from cxr_triton.engines.bundle import Bundle

        compute = "fp32" if self.is_dry or engine == "onnxruntime" else "bf16"
        if engine == "onnxruntime" and precision == "bf16":
            precision = "fp32"
        name = f"bundle-{scale.name}-{engine}-{precision}"
        export = self.export(scale, precision, compute)
        with self._making(name) as folder:
            if folder and self.is_dry and engine != "onnxruntime":
                self._host_bundle(scale, precision, export, folder)
            elif folder:
                build_bundle(export, folder, recipe=None if engine == "onnxruntime" else self._recipe(engine, export))
        if self.is_dry and engine != "onnxruntime":
            return dataclasses.replace(self.bundle(scale, precision, "onnxruntime"), path=self.work / name)
        return Bundle.open(self.work / name, verify=False)

    def _host_bundle(self, scale: Scale, precision: str, export: Path, folder: Path) -> None:
        """The GPU's graphs in fp32, which a CPU runs; no recipe has them."""
        from cxr_triton.engines.onnxruntime_cuda.compiler import compile_graph

        plain, partial = self.bundle(scale, precision, "onnxruntime"), folder.with_name(f".{folder.name}")
        shutil.copytree(plain.path, partial)
        for graph in ("vision", "decoder"):
            compile_graph(export / f"{graph}.onnx", partial, plain.geometry.max_sequence)
        os.replace(partial, folder)

    def _recipe(self, engine: str, export: Path):
        """Recipe of the H100 with another compiler, for the GPU that is here."""
        from cxr_triton.engines.recipe import load_recipe

        base, held = load_recipe("h100-int4-ort"), json.loads((export / "export.json").read_bytes())
        return dataclasses.replace(
            base,
            compute_capability=_gpu()["compute_capability"],
            vision=dataclasses.replace(base.vision, compiler=engine),
            decoder=dataclasses.replace(base.decoder, compiler=engine, precision=held["precision"], head=held["head"]),
            max_sequence=MAX_SEQUENCE,
            image_budget=max(IMAGES),
            thresholds={},
        )

    def decoder(self, bundle, slots: int):
        """A decoder session; in a dry run that of the GPU's graph has the host's memory."""
        from cxr_triton.engines.onnxruntime_cuda.session import CudaDecoder, Host

        if self.is_dry and "onnxruntime-cuda" in bundle.path.name:
            return CudaDecoder(bundle, slots=slots, memory=Host())
        return bundle.open_decoder(slots=slots)

    def vision(self, bundle):
        """A vision session, likewise."""
        from cxr_triton.engines.onnxruntime_cuda.session import CudaVision, Host

        if self.is_dry and "onnxruntime-cuda" in bundle.path.name:
            return CudaVision(bundle, memory=Host())
        return bundle.open_vision()

    @property
    def arguments(self) -> list[str]:
        """Of a command that works on the same folders."""
        folders = ["--out", str(self.out), "--work", str(self.work), "--tokenizer", str(self.tokenizer)]
        return folders + ["--dry-run"] * self.is_dry


def _gpu_normal(rows: int, columns: int, scale: float):
    """Values drawn on the GPU, bf16 [rows, columns]."""
    import ml_dtypes
    import torch

    drawn = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16).mul_(scale)
    return drawn.view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def _line(row: dict) -> str:
    shown = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    return ", ".join(shown)[:300]


# -------------------------------------------------------------------------------------------------------------- checks


def check(is_dry: bool) -> dict:
    """What this machine has, and which steps it is ready for."""
    present, missing = {}, {}
    for name, (module, steps, _) in PARTS.items():
        # Of Triton only the server is used, not its module, which needs more packages.
        found, why = (_installed if name == "nvidia-pytriton" else _importable)(module)
        if found:
            present[name] = _version(name)
            continue
        for step in steps.split() if not (is_dry and name.startswith("cuda")) else ():
            missing.setdefault(step, []).append(f"{name} ({why})")
    gpu = _gpu()
    if gpu is None and not is_dry:
        for step in STEPS:
            missing.setdefault(step, []).append("an NVIDIA GPU that torch can use")
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": gpu},
        "free_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        "present": present,
        "optional": {name: _version(f"{name}-cu13") or _version(name) for name in OPTIONAL},
        "providers": _providers(),
        "missing": missing,
    }


def _importable(module: str) -> tuple[bool, str]:
    try:
        importlib.import_module(module)
    except Exception as error:
        return False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    return True, ""


def _installed(module: str) -> tuple[bool, str]:
    return bool(importlib.util.find_spec(module)), "not installed"


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
        "driver": _driver(),
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _providers() -> list[str]:
    if not _importable("onnxruntime")[0]:
        return []
    import onnxruntime

    return onnxruntime.get_available_providers()


# --------------------------------------------------------------------------------------------------------------- steps


def step_prepare(session: Session) -> None:
    """Checkpoints, exports and bundles, those of each scale and precision in a process of their own."""
    makers = {}
    for scale in session.scales:
        for precision in session.precisions:
            command = [sys.executable, "-m", "cxr_triton.perf.gpu_session", "bundle", scale, precision]
            makers[scale, precision] = subprocess.Popen([*command, *session.arguments])
    started_s = time.perf_counter()
    for (scale, precision), maker in makers.items():
        with session.noting("prepare", scale=scale, precision=precision) as row:
            row["ok"] = maker.wait() == 0
            row["since_start_s"] = round(time.perf_counter() - started_s, 2)


def step_providers(session: Session) -> None:
    """Does a small engine load, run and agree with the same weights in ONNX Runtime on a CPU in fp32?"""
    small = session.scales["small"]
    others = [engine for engine, module in OPTIONAL.items() if not session.is_dry and _importable(module)[0]]
    for precision in session.precisions:
        expected = _probe(session, session.bundle(small, precision, "onnxruntime"))
        for engine in ("onnxruntime-cuda", *others):
            with session.noting("providers", engine=engine, precision=precision) as row:
                row |= _agreement(expected, _probe(session, session.bundle(small, precision, engine)))


def _probe(session: Session, bundle) -> dict[str, np.ndarray]:
    """Image embeddings of two pictures, logits of a prompt in two pieces and of three steps after it."""
    vision, decoder = session.vision(bundle), session.decoder(bundle, 3)
    rng = np.random.default_rng(0)
    embeddings = vision.encode(**_pictures(bundle.geometry, 2))
    ids, index = rng.integers(1000, 100_000, 24), np.full(24, -1, np.int64)
    index[4:20] = np.arange(16)
    positions = np.tile(np.arange(24), (3, 1))
    positions[1:, 4:20] = 4 + np.stack([np.arange(16) // 4, np.arange(16) % 4])
    logits = []
    for slot in range(3):
        for piece in (slice(0, 10), slice(10, 24)):
            found = decoder.prefill(
                slot, ids[piece], index[piece], embeddings[0], positions[:, piece], is_last=piece.stop == 24
            )
        logits.append(found.copy())
    for streams in (1, 3, 2):
        tokens, at = np.arange(streams) + 2000, decoder.lengths[:streams].copy()
        logits += [row.copy() for row in decoder.step(tokens, at)]
    return {"embeddings": embeddings[:, :16], "logits": np.stack(logits)}


def _pictures(geometry, count: int, side: int = 448) -> dict[str, np.ndarray]:
    from cxr_triton.pixels import image

    rng = np.random.default_rng(1)
    drawn = [rng.integers(0, 256, (side, side), np.uint8) for _ in range(count)]
    budgets = {"window_budget": geometry.window_budget, "token_budget": geometry.token_budget}
    return image.stack([image.windows(picture, **budgets) for picture in drawn])


def _agreement(expected: dict, found: dict) -> dict:
    """Least cosine of any row; bf16 of random weights stays over 0.99."""
    told = {f"{name}_cosine": float(_cosines(values, found[name]).min()) for name, values in expected.items()}
    return told | {"agrees": all(np.isfinite(v) and v > 0.99 for v in told.values())}


def _cosines(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    a, b = (part.reshape(-1, part.shape[-1]).astype(np.float64) for part in (expected, found))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def step_parity(session: Session) -> None:
    """Both graphs against transformers on the same weights, on the GPU, for each size and precision."""
    from cxr_triton.engines.verify.reference import Reference
    from cxr_triton.export.checkpoint import Checkpoint
    from cxr_triton.profile import load_profile

    for scale in session.scales.values():
        with Reference(session.checkpoint(scale), load_profile("nv-reason-cxr-3b")) as reference:
            for precision in session.precisions:
                with session.noting("parity", scale=scale.name, precision=precision) as row:
                    bundle, weights = session.bundle(scale, precision), reference.source
                    if precision == "int4-awq":
                        weights = Checkpoint(session.checkpoint(scale, precision))
                    head = "int4" if precision.startswith("int4") else "compute"
                    with reference.storing(weights, precision, head):
                        # Of a quantized checkpoint, which is drawn anew, the reference has the decoder only.
                        row |= _parity(session, bundle, reference, with_picture=precision != "int4-awq")


def _parity(session: Session, bundle, reference, *, with_picture: bool) -> dict:
    """Cosines of image embeddings and of logits after a prompt and each token of a given answer."""
    from cxr_triton.chat import ChatTokenizer
    from cxr_triton.pixels import image

    geometry, rng, told = bundle.geometry, np.random.default_rng(3), {}
    picture, embeddings = None, np.zeros((0, geometry.hidden), np.float32)
    parts = [{"type": "text", "text": "Is there a pneumothorax? " * 40}]
    if with_picture:
        picture = rng.integers(0, 256, (448, 476), np.uint8)
        windows = image.windows(picture, window_budget=geometry.window_budget, token_budget=geometry.token_budget)
        embeddings = session.vision(bundle).encode(**image.stack([windows]))[0]
        expected = reference.encode(picture, resize=False)
        told["embeddings_cosine"] = float(_cosines(expected, embeddings[: len(expected)]).min())
        parts.insert(0, {"type": "image"})
    grids = [(448 // 14, 476 // 14)] * with_picture
    prompt = ChatTokenizer(bundle.path).encode([{"role": "user", "content": parts}], grids)
    answer = rng.integers(1000, 100_000, ANSWER)
    tokens = len(prompt.input_ids)
    decoder, index = session.decoder(bundle, 1), prompt.image_index(geometry.token_budget)
    for start in range(0, tokens, 200):
        piece, is_last = slice(start, start + 200), start + 200 >= tokens
        rows = decoder.prefill(
            0, prompt.input_ids[piece], index[piece], embeddings, prompt.position_ids[:, piece], is_last=is_last
        )
    found = [rows.copy()]
    for number, token in enumerate(answer):
        found.append(decoder.step(np.array([token]), np.array([tokens + prompt.delta + number]))[0].copy())
    expected = reference.forced(np.concatenate([prompt.input_ids, answer]), picture, ANSWER + 1)
    cosines, same = _cosines(expected, np.stack(found)), expected.argmax(1) == np.stack(found).argmax(1)
    told |= {
        "prompt_tokens": tokens,
        "logits_cosine": float(cosines.min()),
        "logits_cosine_mean": float(cosines.mean()),
    }
    return told | {"same_token_share": float(same.mean()), "ok": bool(cosines.min() > 0.99)}


def step_speed(session: Session) -> None:
    """Tower, prefill and decode steps beside the ceilings of this run, and transformers on the same weights."""
    from cxr_triton.perf import roofline

    ceilings = roofline.cpu_ceilings() if session.is_dry else roofline.gpu_ceilings()
    session.add("speed", what="ceilings", **ceilings.to_json())
    scale = list(session.scales.values())[-1]
    for precision in session.precisions:
        with session.noting("speed", what="engine", scale=scale.name, precision=precision):
            _speed_of(session, session.bundle(scale, precision), ceilings, with_vision=precision in ("bf16", "fp32"))
    with session.noting("speed", what="transformers", scale=scale.name, precision="bf16") as row:
        row |= _transformers_speed(session.checkpoint(scale), *((4, 1) if session.is_dry else (64, 3)))


def _speed_of(session: Session, bundle, ceilings, *, with_vision: bool) -> None:
    from cxr_triton.perf import roofline

    work, compute = roofline.ModelWork.of(bundle), bundle.geometry.compute
    weights = bundle.precision.removesuffix("-awq")
    kinds = [roofline.gemm_kind(ceilings, compute), roofline.gemm_kind(ceilings, weights, compute)]
    rounds, about = 2 if session.is_dry else ROUNDS, {"precision": bundle.precision}

    def told(what: str, amount, seconds: float, kind: str, **more) -> None:
        session.add("speed", what=what, **about, **roofline.row(what, amount, seconds, ceilings, kind, **more))

    started_s = time.perf_counter()
    slots = STREAMS[:2] if session.is_dry else STREAMS
    decoder, rng = session.decoder(bundle, max(slots)), np.random.default_rng(3)
    session.add("speed", what="open decoder", **about, seconds=time.perf_counter() - started_s)

    def prompt(slot: int, tokens: int) -> None:
        decoder.free(slot)
        ids, text = rng.integers(1000, 100_000, tokens), np.full(tokens, -1, np.int64)
        positions, nothing = np.tile(np.arange(tokens), (3, 1)), np.zeros((0, bundle.geometry.hidden), np.float32)
        decoder.prefill(slot, ids, text, nothing, positions, is_last=True)

    for tokens in PROMPTS[:1] if session.is_dry else PROMPTS:
        seconds = _median_s(lambda tokens=tokens: prompt(0, tokens), rounds)
        told("prefill", work.prefill(tokens), seconds, kinds[1], tokens=tokens)
    for streams in slots:
        for slot in range(streams):
            prompt(slot, CONTEXT)
        ids, at = rng.integers(1000, 100_000, streams), np.full(streams, CONTEXT)
        seconds = _median_s(lambda ids=ids, at=at: decoder.step_top(ids, at), rounds)
        step = work.decode(CONTEXT + rounds / 2, streams)
        told("decode step", step, seconds, kinds[1], streams=streams, tokens_per_s=streams / seconds)
        if not session.is_dry:
            with session.noting("speed", what="kernels of a decode step", **about, streams=streams) as row:
                row |= _kernels(lambda ids=ids, at=at: decoder.step_top(ids, at), 5)
    if not with_vision:
        return
    vision = session.vision(bundle)
    for images in IMAGES[:1] if session.is_dry else IMAGES:
        feeds = _pictures(bundle.geometry, images)
        seconds = _median_s(lambda feeds=feeds: vision.encode(**feeds), rounds)
        amount = work.vision((448 // 28) ** 2, 1)
        amount = roofline.Work(images * amount.flops, amount.bytes)
        told("tower", amount, seconds, kinds[0], images=images)
    _first_token(session, bundle, vision, decoder, rounds, told=lambda **row: session.add("speed", **about, **row))


def _first_token(session: Session, bundle, vision, decoder, rounds: int, told) -> None:
    """From a picture's patches to the first token of its reading: 476 x 476, so 289 tokens, and 61 of text."""
    feeds, tokens = _pictures(bundle.geometry, 1, 476), CONTEXT
    ids, index = np.arange(tokens) + 2000, np.full(tokens, -1, np.int64)
    index[10:299] = np.arange(289)
    positions = np.tile(np.arange(tokens), (3, 1))
    stages: dict[str, list[float]] = {"tower_s": [], "prefill_s": []}
    for _ in range(rounds + 2):
        decoder.free(0)
        at = [time.perf_counter()]
        embeddings = vision.encode(**feeds)[0]
        at.append(time.perf_counter())
        decoder.prefill(0, ids, index, embeddings, positions, is_last=True).argmax()
        at.append(time.perf_counter())
        for name, first, last in zip(stages, at, at[1:], strict=False):
            stages[name].append(last - first)
    medians = {name: statistics.median(values[2:]) for name, values in stages.items()}
    told(what="first token", seconds=sum(medians.values()), **medians, image="476x476", tokens=tokens)
    if not session.is_dry:
        with session.noting("speed", what="kernels of a tower", precision=bundle.precision) as row:
            row |= _kernels(lambda: vision.encode(**feeds), 3)


def _kernels(run: Callable[[], object], rounds: int) -> dict:
    """The GPU's time by kernel, milliseconds and launches of one round, the largest first."""
    import torch

    activity = torch.profiler.ProfilerActivity.CUDA
    run()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    total_us, launches = defaultdict(float), defaultdict(int)
    for event in profile.events():
        if event.device_type.name == "CUDA":
            total_us[event.name] += event.device_time
            launches[event.name] += 1
    best = sorted(total_us, key=total_us.get, reverse=True)
    return {
        "kernels_ms": sum(total_us.values()) / rounds / 1e3,
        "launches": sum(launches.values()) / rounds,
        "kernels": [
            [name[:110], round(total_us[name] / rounds / 1e3, 4), launches[name] / rounds] for name in best[:24]
        ],
    }


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


def _transformers_speed(checkpoint: Path, tokens: int, rounds: int) -> dict:
    """`generate` of one stream in bf16: time to the first token, and tokens per second after it."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval().to(device)
    ids = torch.randint(1000, 100_000, (1, CONTEXT), device=device)

    def generate(count: int) -> None:
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
            max_new_tokens=count,
        )  # fmt: skip
        if device == "cuda":
            torch.cuda.synchronize()

    first_s, all_s = _median_s(lambda: generate(1), rounds), _median_s(lambda: generate(tokens), rounds)
    return {
        "version": _version("transformers"), "time_to_first_token_s": first_s,
        "tokens_per_s": (tokens - 1) / (all_s - first_s),
    }  # fmt: skip


def step_stack(session: Session) -> None:
    """DICOM in, text out, through Triton: one stream and a sweep, by the project's own benchmark."""
    scale, precision = list(session.scales.values())[-1], session.precisions[-1]
    with session.noting("stack", scale=scale.name, precision=precision) as row:
        # A CPU serves the bundle of the CPU's engine: the GPU's has no session that the server could open.
        bundle = session.bundle(scale, precision, "onnxruntime" if session.is_dry else "onnxruntime-cuda")
        repository, result = session.work / "repository", session.out / "bench.json"
        slots = "2" if session.is_dry else "32"
        _cxr_triton("package", str(bundle.path), "-o", str(repository), "--unverified", "--force", "--slots", slots)
        sizes = ["--seconds", "1", "--requests", "2", "--repeats", "1", "--warm-up", "1", "--sweep", "2"]
        full = ["--seconds", "8", "--repeats", "1", "--sweep", "1,8,32"]
        _cxr_triton(
            "bench", "run", str(repository), "--workload", "short" if session.is_dry else "nv-reason",
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


def _cxr_triton(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from cxr_triton.cli import main; main()", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"cxr-triton {arguments[0]} ended with {done.returncode}: {done.stderr[-1500:]}")


FUNCTIONS = {
    "prepare": step_prepare,
    "providers": step_providers,
    "parity": step_parity,
    "speed": step_speed,
    "stack": step_stack,
}


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
@click.option("--step", "steps", multiple=True, type=click.Choice(list(STEPS)), help="Only this; may be repeated.")
@click.option("--limit-s", type=click.IntRange(1), help="For each step.  [default: its own]")
@click.option("--dry-run", "is_dry", is_flag=True, help="On a CPU, with a small model.")
@json_option
def run(out, work, tokenizer, steps, limit_s, is_dry, json_path):
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
    session = Session(out, work or out / "work", tokenizer, is_dry)
    for step in steps or STEPS:
        (out / f"{step}.json").unlink(missing_ok=True)
        started_s, missing = time.perf_counter(), checked["missing"].get(step)
        status = f"not run: {', '.join(missing)}" if missing else _child(step, session, limit_s or STEPS[step])
        rows = json.loads((out / f"{step}.json").read_text()) if (out / f"{step}.json").exists() else []
        if status == "done" and not all(row.get("ok", True) for row in rows):
            status = "done, with errors"
        seconds = time.perf_counter() - started_s
        result["steps"][step] = {"status": status, "seconds": seconds, "rows": rows}
        write(out / "session.json", json.dumps(result, indent=1))
        write(out / "session.md", markdown(result))
        click.echo(f"{step}: {status}, {seconds:.0f} s", err=True)
    write_json(result, json_path)
    if any(told["status"] != "done" for told in result["steps"].values()):
        click.get_current_context().exit(3)


def _child(step: str, session: Session, limit_s: float) -> str:
    """Run a step in a process group of its own; what is left of it is ended."""
    command = [sys.executable, "-m", "cxr_triton.perf.gpu_session", "step", step, *session.arguments]
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


def _session_options(function):
    """Folders of a session that runs already."""
    for name in ("out", "work", "tokenizer"):
        function = click.option(f"--{name}", type=click.Path(path_type=Path), required=True)(function)
    return click.option("--dry-run", "is_dry", is_flag=True)(function)


@main.command(hidden=True)
@click.argument("name", type=click.Choice(list(STEPS)))
@_session_options
def step(name, out, work, tokenizer, is_dry):
    """One step, in this process."""
    try:
        FUNCTIONS[name](Session(out, work, tokenizer, is_dry))
    except CxrError as error:
        raise click.ClickException(error.wire()) from None


@main.command(hidden=True)
@click.argument("scale")
@click.argument("precision")
@_session_options
def bundle(scale, precision, out, work, tokenizer, is_dry):
    """Make what the steps need of one model."""
    session = Session(out, work, tokenizer, is_dry)
    session.bundle(session.scales[scale], precision)


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


main.add_command(pack)
main.add_command(unpack)


if __name__ == "__main__":
    main()
