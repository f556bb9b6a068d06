"""Speed and memory of a bundle's decoder on this CPU: `python -m cxr_triton.perf.decoder BUNDLE`.

Every engine runs in a process of its own, one after the other in every round, beside a copy that measures the
memory bandwidth. With `--genai` the text decoder as that library builds it by default runs in the same rounds.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.rewrite import step_bytes
from cxr_triton.engines.runtime.stream import Chunk
from cxr_triton.perf.environment import Stolen, cpu_name
from cxr_triton.perf.peers.genai import PACKAGES as GENAI_PACKAGES
from cxr_triton.perf.peers.genai import GenaiEngine, build_genai
from cxr_triton.perf.process import Process
from cxr_triton.perf.roofline import copy_bandwidth
from cxr_triton.triton_repo.serve import HUGE_PAGES

SCHEMA = 1
STREAMS = 4


class BundleEngine:
    """A bundle behind its own decoder runtime."""

    def __init__(self, folder: str, prompt: int, tokens: int):
        from cxr_triton.engines.runtime.scheduler import DecoderRuntime

        self.bundle = Bundle.open(folder, verify=False)
        self.prompt, self.tokens = prompt, tokens
        self.runtime = DecoderRuntime(self.bundle, slots=STREAMS)

    def _generate(self, streams: int) -> list[Receiver]:
        from cxr_triton.engines.runtime.stream import Generation
        from cxr_triton.sampling import Sampling

        geometry, rng = self.bundle.geometry, np.random.default_rng(0)
        images = min(geometry.token_budget, self.prompt - 1)
        ids = rng.integers(0, geometry.vocab // 2, self.prompt)
        index = np.full(self.prompt, -1, np.int64)
        index[1 : 1 + images] = np.arange(images)
        generation = Generation(
            input_ids=ids,
            position_ids=np.tile(np.arange(self.prompt), (3, 1)),
            image_index=index,
            image_embeddings=rng.standard_normal((images, geometry.hidden)).astype(np.float32),
            sampling=Sampling(max_new_tokens=self.tokens, repetition_penalty=1.05),
        )
        receivers = [Receiver() for _ in range(streams)]
        for receiver in receivers:
            self.runtime.submit(generation, receiver)
        for receiver in receivers:
            receiver.done.wait()
            if receiver.error:
                raise receiver.error
        return receivers

    def round(self) -> dict:
        """One stream alone: tokens per second of prefill and decode."""
        (receiver,) = self._generate(1)
        timings = receiver.timings_ms
        return {
            "prefill_tokens_per_s": self.prompt / timings["prefill"] * 1e3,
            "decode_tokens_per_s": (self.tokens - 1) / timings["decode"] * 1e3,
        }

    def crowd(self) -> dict:
        """`STREAMS` streams at once: their tokens per second together while all of them decode."""
        return {"streams": STREAMS, "decode_tokens_per_s": together(self._generate(STREAMS))}


class Receiver:
    """When how many tokens of a stream came, and how it ended."""

    def __init__(self):
        self.arrivals: list[tuple[float, int]] = []
        self.done = threading.Event()
        self.error: Exception | None = None
        self.timings_ms: dict[str, float] = {}

    def __call__(self, chunk: Chunk) -> None:
        """Take a chunk of the stream."""
        if len(chunk.token_ids):
            self.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
        if chunk.completion or chunk.error:
            self.error = chunk.error
            if chunk.completion:
                self.timings_ms = chunk.completion.timings_ms
            self.done.set()


def together(receivers: Sequence[Receiver]) -> float:
    """Tokens per second of all streams while all of them decode."""
    began_s = max(receiver.arrivals[0][0] for receiver in receivers)
    ended_s = min(receiver.arrivals[-1][0] for receiver in receivers)
    tokens = sum(count for r in receivers for at_s, count in r.arrivals if began_s < at_s <= ended_s)
    return tokens / max(ended_s - began_s, 1e-9)


def medians(rounds: list[dict]) -> dict:
    """Of each number over the rounds."""
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def measure(bundle: Path, genai: Path | None, *, prompt: int, tokens: int, rounds: int, threads: int) -> dict:
    """All numbers of one run, as `--json` writes them."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    opened = Bundle.open(bundle, verify=False)
    ours = engine(opened.engine)
    versions = {name: metadata.version(name) for name in (*ours.distributions, "numpy")}
    kinds: dict[str, tuple[type, Path, Path, int]] = {}
    data = bundle / ours.files("decoder")[-1]
    kinds["bundle"] = (BundleEngine, bundle, data, ours.run_bytes(opened, "decoder"))
    if genai:
        versions |= {name: metadata.version(name) for name in GENAI_PACKAGES[:1]}
        kinds["genai"] = (GenaiEngine, genai, genai / "model.onnx.data", step_bytes(genai / "model.onnx"))
    began, load, stolen = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0], Stolen()
    os.environ.update(HUGE_PAGES | os.environ)  # for every engine, as `serve` sets it
    processes = {name: Process(kind, cpus, str(path), prompt, tokens) for name, (kind, path, *_) in kinds.items()}
    for process in processes.values():
        process.call("round")  # warm up
    runs: dict[str, list[dict]] = {name: [] for name in processes}
    copies = []
    for index in range(rounds):
        copies.append(copy_bandwidth(len(cpus)))
        for name, process in processes.items():
            runs[name].append(process.call("round"))
            click.echo(f"round {index + 1}/{rounds} {name}: {_rates(runs[name][-1])}", err=True)
    copies.append(copy_bandwidth(len(cpus)))
    bandwidth, crowd = statistics.median(copies), processes["bundle"].call("crowd")
    engines = {
        name: _entry(runs[name], data.stat().st_size, size, bandwidth, processes[name].end())
        for name, (_, _, data, size) in kinds.items()
    }
    engines["bundle"]["crowd"] = crowd
    result = {
        "schema": SCHEMA,
        "engine": opened.engine,
        "date": began,
        "cpu": cpu_name(),
        "threads": len(cpus),
        "load_average_before": load,
        "versions": versions,
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "engines": engines,
        "copy_bytes_per_s": bandwidth,
        "load_average_after": os.getloadavg()[0],
        "stolen_share": stolen.share(),
    }
    if genai:
        pairs = zip(*runs.values(), strict=True)
        result["ratio_to_genai"] = medians([{key: mine[key] / theirs[key] for key in mine} for mine, theirs in pairs])
    return result


def _entry(rounds: list[dict], weights: int, step_weights: int, bandwidth: float, facts: dict) -> dict:
    """Medians of the rounds, held against the weights' bytes and the bandwidth of a copy."""
    rates = medians(rounds)
    read = step_weights * rates["decode_tokens_per_s"]
    return {
        **rates,
        "weights_bytes": weights,
        "step_weights_bytes": step_weights,
        "decode_bytes_per_s": read,
        "share_of_copy_bandwidth": read / bandwidth,
        **facts,
        "peak_resident_to_weights": facts["peak_resident_bytes"] / weights,
        "rounds": rounds,
    }


def _rates(rates: dict) -> str:
    return f"prefill {rates['prefill_tokens_per_s']:.1f} tok/s, decode {rates['decode_tokens_per_s']:.2f} tok/s"


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--genai", type=click.Path(path_type=Path), help="The build of genai; made if it does not exist.")
@click.option("--checkpoint", type=click.Path(exists=True, file_okay=False, path_type=Path), help="To make it from.")
@click.option("--prompt", default=320, show_default=True, help="Prompt tokens; an image's worth of them from an image.")
@click.option("--tokens", default=64, show_default=True, help="Tokens to generate.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="CPU cores for everything.")
@json_option
def main(bundle, genai, checkpoint, json_path, **sizes):
    """Decode and prefill speed, bandwidth and memory of BUNDLE's decoder."""
    if genai and not genai.exists():
        if not checkpoint:
            raise click.UsageError(f"{genai} does not exist: give --checkpoint to build it from")
        build_genai(checkpoint, genai)
    result = measure(bundle, genai, **sizes)
    click.echo(f"{result['cpu']}, {result['threads']} cores, load {result['load_average_before']:.1f} before")
    click.echo(f"the hypervisor gave {result['stolen_share']:.1%} of the cores' time to others")
    click.echo(f"copy: {result['copy_bytes_per_s'] / 1e9:.1f} GB/s read and written")
    for name, measured in result["engines"].items():
        click.echo(
            f"{name}: {_rates(measured)}; {measured['decode_bytes_per_s'] / 1e9:.1f} GB/s of weights, "
            f"{measured['share_of_copy_bandwidth']:.0%} of the copy; load {measured['load_s']:.1f} s; peak resident "
            f"{measured['peak_resident_bytes'] / 2**30:.2f} GiB = {measured['peak_resident_to_weights']:.2f} x weights"
        )
    crowd = result["engines"]["bundle"]["crowd"]
    click.echo(f"bundle, {crowd['streams']} streams: decode {crowd['decode_tokens_per_s']:.2f} tok/s together")
    if "ratio_to_genai" in result:
        ratio = result["ratio_to_genai"]
        click.echo(
            f"bundle / genai: prefill {ratio['prefill_tokens_per_s']:.2f}, decode {ratio['decode_tokens_per_s']:.2f}"
        )
    write_json(result, json_path)


if __name__ == "__main__":
    main()
