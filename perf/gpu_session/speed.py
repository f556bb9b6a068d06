"""Step `speed`: tower, prefill, decode steps and kernels beside the ceilings of the run, and transformers."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxr_triton.perf.gpu_session.machine import version
from cxr_triton.perf.gpu_session.session import IMAGES, Session, pictures

if TYPE_CHECKING:
    from cxr_triton.engines.bundle import Bundle
    from cxr_triton.perf.roofline import Ceilings, Work

STREAMS = (1, 8, 32, 64)
PROMPTS = (350, 1400)
CONTEXT = 350
ROUNDS = 20


def speed(session: Session) -> None:
    """Tower, prefill and decode steps beside the ceilings of this run, and transformers on the same weights."""
    from cxr_triton.perf import roofline

    ceilings = roofline.cpu_ceilings() if session.is_dry else roofline.gpu_ceilings()
    session.add("speed", what="ceilings", **ceilings.to_json())
    scale = list(session.scales.values())[-1]
    for precision in session.precisions:
        with session.noting("speed", what="engine", scale=scale.name, precision=precision):
            engine = _Engine(session, session.bundle(scale, precision), ceilings)
            engine.decoding()
            if precision in ("bf16", "fp32"):
                engine.seeing()
    with session.noting("speed", what="transformers", scale=scale.name, precision="bf16") as row:
        row.update(_transformers_speed(session.checkpoint(scale), *((4, 1) if session.is_dry else (64, 3))))


class _Engine:
    """Measures both sessions of a bundle, and keeps a row of each."""

    def __init__(self, session: Session, bundle: Bundle, ceilings: Ceilings):
        from cxr_triton.perf import roofline

        self.session, self.bundle, self.ceilings = session, bundle, ceilings
        self.work, self.rounds = roofline.ModelWork.of(bundle), 2 if session.is_dry else ROUNDS
        self.streams = STREAMS[:2] if session.is_dry else STREAMS
        self.rng, started_s = np.random.default_rng(3), time.perf_counter()
        self.decoder = session.decoder(bundle, max(self.streams))
        self.add("open decoder", seconds=time.perf_counter() - started_s)

    def add(self, what: str, **row) -> None:
        self.session.add("speed", what=what, precision=self.bundle.precision, **row)

    def measure(self, what: str, amount: Work, run: Callable[[], object], types: tuple[str, ...], **more) -> None:
        """Median time of a run that takes `amount`, beside the ceiling of the matrix products of these types."""
        from cxr_triton.perf import roofline

        seconds, kind = _median_s(run, self.rounds), roofline.gemm_kind(self.ceilings, *types)
        if "streams" in more:
            more["tokens_per_s"] = more["streams"] / seconds
        self.add(what, **roofline.row(what, amount, seconds, self.ceilings, kind, **more))

    def kernels(self, what: str, run: Callable[[], object], rounds: int, **more) -> None:
        if not self.session.is_dry:
            about = {"precision": self.bundle.precision, **more}
            with self.session.noting("speed", what=f"kernels of a {what}", **about) as row:
                row.update(_kernels(run, rounds))

    def prompt(self, slot: int, tokens: int) -> None:
        self.decoder.free(slot)
        ids, text = self.rng.integers(1000, 100_000, tokens), np.full(tokens, -1, np.int64)
        positions, nothing = np.tile(np.arange(tokens), (3, 1)), np.zeros((0, self.bundle.geometry.hidden), np.float32)
        self.decoder.prefill(slot, ids, text, nothing, positions, is_last=True)

    def decoding(self) -> None:
        """Prompts of several lengths, and steps of several streams."""
        types = (self.bundle.precision.removesuffix("-awq"), self.bundle.geometry.compute)
        for tokens in PROMPTS[:1] if self.session.is_dry else PROMPTS:
            self.measure("prefill", self.work.prefill(tokens), partial(self.prompt, 0, tokens), types, tokens=tokens)
        for streams in self.streams:
            for slot in range(streams):
                self.prompt(slot, CONTEXT)
            ids, at = self.rng.integers(1000, 100_000, streams), np.full(streams, CONTEXT)
            step = partial(self.decoder.step_top, ids, at)
            amount = self.work.decode(CONTEXT + self.rounds / 2, streams)
            self.measure("decode step", amount, step, types, streams=streams)
            self.kernels("decode step", step, 5, streams=streams)

    def seeing(self) -> None:
        """The tower at several pictures, and the first token of one."""
        from cxr_triton.perf.roofline import Work

        vision = self.session.vision(self.bundle)
        for images in IMAGES[:1] if self.session.is_dry else IMAGES:
            encode = partial(vision.encode, **pictures(self.bundle.geometry, images))
            one = self.work.vision((448 // 28) ** 2, 1)
            amount = Work(images * one.flops, one.bytes)
            self.measure("tower", amount, encode, (self.bundle.geometry.compute,), images=images)
        self.first_token(vision)

    def first_token(self, vision) -> None:
        """From a picture's patches to the first token of its reading: 476 x 476, so 289 tokens, and 61 of text."""
        encode, tokens = partial(vision.encode, **pictures(self.bundle.geometry, 1, 476)), CONTEXT
        ids, index = np.arange(tokens) + 2000, np.full(tokens, -1, np.int64)
        index[10:299] = np.arange(289)
        positions = np.tile(np.arange(tokens), (3, 1))
        stages: dict[str, list[float]] = {"tower_s": [], "prefill_s": []}
        for _ in range(self.rounds + 2):
            self.decoder.free(0)
            at = [time.perf_counter()]
            embeddings = encode()[0]
            at.append(time.perf_counter())
            self.decoder.prefill(0, ids, index, embeddings, positions, is_last=True).argmax()
            at.append(time.perf_counter())
            for name, (first, last) in zip(stages, itertools.pairwise(at), strict=True):
                stages[name].append(last - first)
        medians = {name: statistics.median(values[2:]) for name, values in stages.items()}
        self.add("first token", seconds=sum(medians.values()), **medians, image="476x476", tokens=tokens)
        self.kernels("tower", encode, 3)


def _kernels(run: Callable[[], object], rounds: int) -> dict:
    """The GPU's time by kernel, milliseconds and launches of one round, the largest first."""
    import torch

    activity = torch.profiler.ProfilerActivity.CUDA
    run()
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(rounds):
            run()
        torch.cuda.synchronize()
    total_us: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in profile.events():
        if event.device_type.name == "CUDA":
            total_us[event.name] += event.device_time
            launches[event.name] += 1
    best = sorted(total_us, key=total_us.__getitem__, reverse=True)
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

    from cxr_triton.export.checkpoint import torch_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch_model(checkpoint, torch.bfloat16).to(device)
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
        "version": version("transformers"), "time_to_first_token_s": first_s,
        "tokens_per_s": (tokens - 1) / (all_s - first_s),
    }  # fmt: skip
