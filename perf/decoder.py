"""Speed and memory of a bundle's decoder on this CPU: `python -m cxr_triton.perf.decoder BUNDLE`.

Every engine runs in a process of its own, one after the other in every round, beside a copy that measures the
memory bandwidth. With `--genai` the text decoder as that library builds it by default runs in the same rounds.
"""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.rewrite import step_bytes
from cxr_triton.perf.environment import Stolen
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
        from cxr_triton.engines.runtime.scheduler import Generation
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
            if receiver.last.error:
                raise receiver.last.error
        return receivers

    def round(self) -> dict:
        """One stream alone: tokens per second of prefill and decode."""
        (receiver,) = self._generate(1)
        timings = receiver.last.completion.timings_ms
        return {
            "prefill_tokens_per_s": self.prompt / timings["prefill"] * 1e3,
            "decode_tokens_per_s": (self.tokens - 1) / timings["decode"] * 1e3,
        }

    def crowd(self) -> dict:
        """`STREAMS` streams at once: their tokens per second together while all of them decode."""
        receivers = self._generate(STREAMS)
        began_s = max(receiver.arrivals[0][0] for receiver in receivers)
        ended_s = min(receiver.arrivals[-1][0] for receiver in receivers)
        tokens = sum(count for r in receivers for at_s, count in r.arrivals if began_s < at_s <= ended_s)
        return {"streams": STREAMS, "decode_tokens_per_s": tokens / (ended_s - began_s)}


class Receiver:
    """When how many tokens of a stream came."""

    def __init__(self):
        self.arrivals, self.done, self.last = [], threading.Event(), None

    def __call__(self, chunk):
        if len(chunk.token_ids):
            self.arrivals.append((time.perf_counter(), len(chunk.token_ids)))
        if chunk.completion or chunk.error:
            self.last = chunk
            self.done.set()


def medians(rounds: list[dict]) -> dict:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def measure(bundle: Path, genai: Path | None, prompt: int, tokens: int, rounds: int, threads: int) -> dict:
    """All numbers of one run, as `--json` writes them."""
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cpus)
    opened = Bundle.open(bundle, verify=False)
    ours = engine(opened.engine)
    result = {
        "schema": SCHEMA,
        "engine": opened.engine,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "threads": len(cpus),
        "load_average_before": os.getloadavg()[0],
        "versions": {name: metadata.version(name) for name in (*ours.distributions, "numpy")},
        "prompt_tokens": prompt,
        "new_tokens": tokens,
        "engines": {},
    }
    data = bundle / ours.files("decoder")[-1]
    engines = {"bundle": (BundleEngine, bundle, data, ours.run_bytes(opened, "decoder"))}
    if genai:
        result["versions"] |= {name: metadata.version(name) for name in GENAI_PACKAGES[:1]}
        engines["genai"] = (GenaiEngine, genai, genai / "model.onnx.data", step_bytes(genai / "model.onnx"))
    os.environ.update(HUGE_PAGES | os.environ)  # for every engine, as `serve` sets it
    processes = {name: Process(kind, cpus, str(path), prompt, tokens) for name, (kind, path, *_) in engines.items()}
    for process in processes.values():
        process.call("round")  # warm up
    runs: dict[str, list[dict]] = {name: [] for name in processes}
    copies, stolen = [], Stolen()
    for index in range(rounds):
        copies.append(copy_bandwidth(len(cpus)))
        for name, process in processes.items():
            runs[name].append(process.call("round"))
            click.echo(f"round {index + 1}/{rounds} {name}: {_rates(runs[name][-1])}", err=True)
    copies.append(copy_bandwidth(len(cpus)))
    bandwidth = statistics.median(copies)
    crowd = processes["bundle"].call("crowd")
    for name, (_, _, data, size) in engines.items():
        rates = medians(runs[name])
        weights = data.stat().st_size
        facts = processes[name].end()
        result["engines"][name] = {
            **rates,
            "weights_bytes": weights,
            "step_weights_bytes": size,
            "decode_bytes_per_s": size * rates["decode_tokens_per_s"],
            "share_of_copy_bandwidth": size * rates["decode_tokens_per_s"] / bandwidth,
            **facts,
            "peak_resident_to_weights": facts["peak_resident_bytes"] / weights,
            "rounds": runs[name],
        }
    result["engines"]["bundle"]["crowd"] = crowd
    result["copy_bytes_per_s"] = bandwidth
    if genai:
        result["ratio_to_genai"] = medians(
            [{key: mine[key] / theirs[key] for key in mine} for mine, theirs in zip(*runs.values(), strict=True)]
        )
    result |= {"load_average_after": os.getloadavg()[0], "stolen_share": stolen.share()}
    return result


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


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
def main(bundle, genai, checkpoint, prompt, tokens, rounds, threads, json_path):
    """Decode and prefill speed, bandwidth and memory of BUNDLE's decoder."""
    if genai and not genai.exists():
        if not checkpoint:
            raise click.UsageError(f"{genai} does not exist: give --checkpoint to build it from")
        build_genai(checkpoint, genai)
    result = measure(bundle, genai, prompt, tokens, rounds, threads)
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
