"""How far a measured speed is from what the machine allows: work of each stage over ceilings measured in the same run.

Work is what the model needs, not what an engine happens to do: padding, copies and masked attention count as nothing.
A stage cannot take less than its bytes over the copy bandwidth, nor less than its operations over the speed of a large
matrix product; the longer of the two over the measured time is the share.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cxr_triton.engines import DEFAULT, engine
from cxr_triton.pixels.image import target_size

COPY_BYTES = 512 << 20
GEMM = (512, 2048, 11008)  # rows of activations, K, N: the 3B's MLP for a prompt
GPU_GEMM = 8192
ROUNDS = 5
MANY = 8  # streams
INT4_BLOCK = 128
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiply and an add are two) and bytes to and from memory."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What this machine did in this run.

    Attributes
    ----------
    device : str
        ``cpu``, or the name of the GPU.
    copy_bytes_per_s : float
        Read and written by a large copy.
    gemm_flops : dict
        Precision to floating-point operations per second of a large matrix product.
    """

    device: str
    copy_bytes_per_s: float
    gemm_flops: dict[str, float]

    def to_json(self) -> dict:
        """In GB/s and TFLOP/s."""
        return {
            "device": self.device,
            "copy_gb_per_s": self.copy_bytes_per_s / 1e9,
            "gemm_tflop_per_s": {name: flops / 1e12 for name, flops in self.gemm_flops.items()},
        }


def copy_bandwidth(threads: int) -> float:
    """Bytes read and written per second by a copy of `COPY_BYTES` on each thread."""
    pairs = [(np.ones(COPY_BYTES, np.uint8), np.ones(COPY_BYTES, np.uint8)) for _ in range(threads)]
    workers = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
    started_s = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 2 * COPY_BYTES * threads / (time.perf_counter() - started_s)


def peaks() -> dict:
    """What the cores that this process may use reach together, by `peaks.c`, which is compiled for them first.

    Returns
    -------
    dict
        ``read_bytes_per_s`` of memory, ``int8_ops_per_s`` of products by the ``int8_instruction`` that is the fastest;
        None with the reason in ``why``.
    """
    unknown = {"read_bytes_per_s": None, "int8_ops_per_s": None, "int8_instruction": None}
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        program, source = f"{folder}/peaks", str(Path(__file__).with_name("peaks.c"))
        for command in ([*compiler, "-O3", "-march=native", "-fopenmp", "-o", program, source], [program]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            except OSError as error:
                return unknown | {"why": f"{command[0]} does not run ({error.strerror}); install a C compiler"}
            except subprocess.CalledProcessError as error:
                return unknown | {"why": f"{command[0]} ends with {error.returncode}: {error.stderr[-500:]}"}
    told: dict = json.loads(done.stdout)
    return {key: told[key] for key in (*unknown, "why")}


def gemm_speed(precision: str, threads: int, shape: tuple[int, int, int] = GEMM, name: str = DEFAULT) -> float:
    """Operations per second of one large product, as an engine runs it on a CPU.

    Parameters
    ----------
    precision : str
        Type of the weights, one of the engine's `products`; int4 is computed in int8, like the decoder's layers.
    threads : int
    shape : (int, int, int)
        M, K and N.
    name : str
        Of the engine.
    """
    m, k, n = shape
    feeds = {"x": np.random.default_rng(0).standard_normal((m, k), np.float32)}
    run = engine(name).product(_product(precision, shape), feeds, precision, threads)
    run()
    return 2.0 * m * k * n / statistics.median(_timed(run))


def _product(precision: str, shape: tuple[int, int, int]) -> bytes:
    """An ONNX model of one product, of ``x`` with random weights."""
    from onnx import TensorProto, helper, numpy_helper

    (m, k, n), rng = shape, np.random.default_rng(0)
    if precision == "int4":
        blocks = k // INT4_BLOCK
        weights: dict[str, np.ndarray] = {
            "w": rng.integers(0, 256, (n, blocks, INT4_BLOCK // 2), np.uint8),
            "scales": rng.uniform(0.01, 0.02, n * blocks).astype(np.float32),
        }
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": INT4_BLOCK, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **sizes)
    elif precision == "int8":
        weights = {
            "w": rng.integers(-127, 128, (k, n), np.int8),
            "scales": rng.uniform(0.001, 0.002, n).astype(np.float32),
        }
        node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "scales"], ["y"], domain="com.microsoft")
    else:
        weights = {"w": rng.standard_normal((k, n), np.float32)}
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (m, k))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (m, n))],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def _timed(run) -> list[float]:
    seconds = []
    for _ in range(ROUNDS):
        started_s = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_s)
    return seconds


def cpu_ceilings(name: str = DEFAULT) -> Ceilings:
    """Medians of `ROUNDS` on all cores that this process may use; products as the engine runs them, if it says how."""
    threads, name = len(os.sched_getaffinity(0)), name if engine(name).products else DEFAULT
    copies = [copy_bandwidth(threads) for _ in range(ROUNDS)]
    gemm = {precision: gemm_speed(precision, threads, name=name) for precision in engine(name).products}
    return Ceilings("cpu", statistics.median(copies), gemm)


def gpu_ceilings() -> Ceilings:
    """The same of the current CUDA device, with torch: bf16, and fp8 where the device has it."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_s = gpu_seconds(lambda: target.copy_(source))
    n, gemm = GPU_GEMM, {}
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gemm["bf16"] = 2 * n**3 / gpu_seconds(lambda: a @ b)
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        gemm["fp8"] = (
            2 * n**3 / gpu_seconds(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
        )
    return Ceilings(torch.cuda.get_device_name(), 2 * source.numel() / copy_s, gemm)


def gpu_seconds(run, rounds: int = 20) -> float:
    """Median seconds of what `run` enqueues, by the device's own clock."""
    import torch

    for _ in range(3):
        run()
    seconds = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        ended.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(seconds)


class ModelWork:
    """Work of the stages of one model.

    Parameters
    ----------
    config : dict
        ``config.json`` of the checkpoint, flat or nested.
    vision_bytes, step_bytes, crowd_bytes : int
        Weights of the vision tower, and those that a decode step reads of one stream and of many.
    cache_item : int
        Bytes of a value in the KV cache.
    """

    def __init__(self, config: dict, *, vision_bytes: int, step_bytes: int, crowd_bytes: int, cache_item: int):
        from cxr_triton.export.geometry import read_config, tensor_shapes

        self.text, self.tower = read_config(config)
        self.vision_bytes, self.step_bytes, self.crowd_bytes = vision_bytes, step_bytes, crowd_bytes
        matrices = {n: math.prod(s) for n, s in tensor_shapes(self.text, self.tower, True).items() if len(s) > 1}
        self._linear = sum(size for name, size in matrices.items() if name.endswith("_proj.weight") and name[0] == "l")
        self._head = matrices["language_model.embed_tokens.weight"]
        self._merger = sum(size for name, size in matrices.items() if "merger" in name)
        # Both frames of a still are one: half of the patch kernel is used.
        frames = matrices["visual.patch_embed.proj.weight"]
        self._patch = sum(size for name, size in matrices.items() if name.startswith("visual.")) - self._merger
        self._patch -= frames // 2
        text = self.text
        self._row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * cache_item
        self._attention = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim

    @classmethod
    def of(cls, bundle) -> ModelWork:
        """Of an engine bundle.

        Raises
        ------
        InvalidBundle
            The manifest does not say how large the weights of a plan are.
        """
        config = json.loads((bundle.path / "config.json").read_text("utf-8"))
        item = ITEM_BYTES[bundle.geometry.compute]
        vision = engine(bundle.vision_engine).run_bytes(bundle, "vision")
        decoder = engine(bundle.engine)
        return cls(
            config,
            vision_bytes=vision,
            step_bytes=decoder.run_bytes(bundle, "decoder"),
            crowd_bytes=decoder.crowd_bytes(bundle, MANY),
            cache_item=item,
        )

    def vision(self, tokens: int, images: int = 1) -> Work:
        """Images with so many merged tokens together, in one run."""
        if not images:
            return Work()
        tower = self.tower
        patches = tokens * tower.spatial_merge_size**2 / images
        window = (tower.window_size // tower.patch_size) ** 2
        full = len(tower.fullatt_block_indexes)
        attended = full * patches + (tower.depth - full) * min(window, patches)
        flops = patches * (2 * self._patch + 4 * attended * tower.hidden_size) + 2 * tokens / images * self._merger
        moved = patches * 3 * tower.patch_size**2 + tokens / images * tower.out_hidden_size * 4
        return Work(images * flops, self.vision_bytes + images * moved)

    def prefill(self, tokens: int) -> Work:
        """A prompt; logits of its last token only."""
        flops = 2 * (tokens * self._linear + self._head) + self._attention * tokens * (tokens + 1) / 2
        return Work(flops, self.crowd_bytes + tokens * self._row)

    def decode(self, context: float, streams: int = 1) -> Work:
        """One step of so many streams, each after `context` tokens."""
        flops = streams * (2 * (self._linear + self._head) + self._attention * (context + 1))
        return Work(flops, self.step_bytes + streams * (context + 1) * self._row)


def row(stage: str, work: Work, seconds: float, ceilings: Ceilings, precision: str, **more) -> dict:
    """An entry of `roofline` in docs/bench.schema.json.

    Parameters
    ----------
    stage : str
    work : Work
    seconds : float
        Measured.
    ceilings : Ceilings
    precision : str
        Of the matrix product that bounds the stage, a key of `Ceilings.gemm_flops`.
    """
    memory_s, compute_s = work.bytes / ceilings.copy_bytes_per_s, work.flops / ceilings.gemm_flops[precision]
    if memory_s >= compute_s:
        ceiling = {"kind": "copy", "gb_per_s": ceilings.copy_bytes_per_s / 1e9}
    else:
        ceiling = {"kind": f"gemm {precision}", "tflop_per_s": ceilings.gemm_flops[precision] / 1e12}
    return {
        "stage": stage,
        "flops": work.flops,
        "bytes": work.bytes,
        "seconds": seconds,
        "gb_per_s": work.bytes / seconds / 1e9,
        "tflop_per_s": work.flops / seconds / 1e12,
        "ceiling": ceiling | {"seconds": max(memory_s, compute_s)},
        "share": max(memory_s, compute_s) / seconds,
        **more,
    }


def gemm_kind(ceilings: Ceilings, *wanted: str) -> str:
    """The first of the wanted precisions of which a product was measured."""
    return next((name for name in wanted if name in ceilings.gemm_flops), next(iter(ceilings.gemm_flops)))


def rows(result: Mapping, bundle, ceilings: Ceilings) -> list[dict]:
    """`roofline` of a benchmark result: the stages of its single stream, and decoding at its highest throughput.

    Parameters
    ----------
    result : mapping
        As docs/bench.schema.json describes it.
    bundle : Bundle
        That was served.
    ceilings : Ceilings

    Returns
    -------
    list of dict
        Empty without a scenario ``single_stream``.
    """
    model = ModelWork.of(bundle)
    compute = bundle.geometry.compute
    vision_type, decoder_type, prompt_type = (
        gemm_kind(ceilings, kind, compute)
        for kind in (
            bundle.vision_precision,
            bundle.precision.removesuffix("-awq"),
            engine(bundle.engine).prompt_precision(bundle),
        )
    )
    items = result["workload"]["items"]
    points = {scenario["name"]: scenario["points"] for scenario in result["scenarios"]}
    found = []
    if "single_stream" in points:
        work: dict[str, Work] = {}
        seconds: dict[str, float] = {}
        for repeat in points["single_stream"][0]["repeats"]:
            for request in _done(repeat):
                item = items[request["item"]] if request["item"] is not None else items[0]
                for stage, part in _stages(model, bundle.profile, item, request).items():
                    if request["stages_ms"].get(stage):
                        work[stage] = work.get(stage, Work()) + part
                        seconds[stage] = seconds.get(stage, 0.0) + request["stages_ms"][stage] / 1e3
        kinds = {"vision": vision_type, "prefill": prompt_type, "decode": decoder_type}
        found += [
            row(stage, work[stage], seconds[stage], ceilings, kinds.get(stage, vision_type), streams=1)
            for stage in ("image_decode", "preprocess", "vision", "prefill", "decode")
            if stage in work
        ]
    if "offline" in points:
        found += _crowd(model, points["offline"], ceilings, prompt_type)
    return found


def measure(result: Mapping, bundle) -> list[dict]:
    """`rows` of a result, against ceilings measured now on what the bundle runs on."""
    return rows(result, bundle, cpu_ceilings(bundle.engine) if bundle.is_on_cpu else gpu_ceilings())


def _done(repeat: Mapping):
    """Requests of a repeat that succeeded, one dict each."""
    requests = repeat["requests"]
    for i, status in enumerate(requests["status"]):
        if not status.isupper() and requests["tokens"][i]:
            yield {
                "item": requests["item"][i],
                "prompt_tokens": requests["prompt_tokens"][i],
                "tokens": requests["tokens"][i],
                "stages_ms": {stage: values[i] for stage, values in requests["stages_ms"].items()},
            }


def _stages(model: ModelWork, profile, item: Mapping, request: Mapping) -> dict[str, Work]:
    images, tokens = item["images"], request["tokens"]
    prompt = request["prompt_tokens"] or 0
    stages = {}
    if images and all(image.get("rows") for image in images):
        limits = {"min_pixels": profile.min_pixels, "max_pixels": profile.max_pixels}
        resized = [math.prod(target_size(image["rows"], image["columns"], **limits)) for image in images]
        stored = sum(image["rows"] * image["columns"] * (1 + ((image.get("bits_stored") or 8) > 8)) for image in images)
        # A picture is stored once and read once; a file is read, and what the tower takes is written.
        stages["image_decode"] = Work(0, sum(image["bytes"] for image in images) + stored)
        stages["preprocess"] = Work(0, stored + 3 * sum(resized))
        side = model.tower.patch_size * model.tower.spatial_merge_size
        stages["vision"] = model.vision(sum(resized) // side**2, len(images))
    if prompt:
        stages["prefill"] = model.prefill(prompt)
        if tokens > 1:
            step = model.decode(prompt + tokens / 2)
            stages["decode"] = Work(step.flops * (tokens - 1), step.bytes * (tokens - 1))
    return stages


def _crowd(model: ModelWork, points: list, ceilings: Ceilings, precision: str) -> list[dict]:
    """Decoding of many streams: the steps that the server counted, over the whole time, other stages included."""
    best = max(points, key=lambda point: point["summary"]["output_tokens_per_s"]["mean"] or 0.0)
    work, seconds, steps, tokens = Work(), 0.0, 0.0, 0
    for repeat in best["repeats"]:
        counted = repeat["metrics"].get("cxr_decoder_steps_total")
        if not counted or counted[1] <= counted[0]:
            return []
        steps += counted[1] - counted[0]
        seconds += repeat["summary"]["seconds"]
        work += Work(0, (counted[1] - counted[0]) * model.crowd_bytes)
        for request in _done(repeat):
            tokens += request["tokens"]
            step = model.decode((request["prompt_tokens"] or 0) + request["tokens"] / 2)
            count = request["tokens"] - 1
            work += Work(step.flops * count, (step.bytes - model.step_bytes) * count)
    streams = tokens / steps
    return [row("decode, whole run", work, seconds, ceilings, precision, streams=round(streams, 2))]
