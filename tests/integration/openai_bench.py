"""The same tool at both doors: AIPerf and vLLM's own bench beside our clients, on the demonstration server.

    CXR_VLLM_PYTHON=python python tests/integration/openai_bench.py --aiperf aiperf --json docs/results/openai.json

Turn by turn, with the same pictures, prompt and lengths, in a closed loop: our client over gRPC, OpenAI's over HTTP,
and the tools that are given: AIPerf (its program) and vLLM's ``bench serve`` (a Python that has vLLM). With `--stock`
these also ask stock vLLM's own server on the same machine. Of a tool is said its median turn over that of OpenAI's
client; of HTTP, the median turn of OpenAI's client over that of gRPC. Each picture was asked about before, so that a
server that keeps prompts answers all tools alike.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from cores import apart, cores_options
from PIL import Image

from cxr_triton import phantom
from cxr_triton.cli import json_option, write_json
from cxr_triton.client import AsyncReader
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.serve import Server

MODEL = Path(__file__).resolve().parents[1] / "phantom"
PROMPT = "Find abnormalities and support devices."
PORTS = {"grpc_port": 0, "metrics_port": 0}
# vLLM's CPU wheel is of another name than its command line looks for.
VLLM = """
import argparse, vllm.benchmarks.serve as bench
parser = argparse.ArgumentParser()
bench.add_cli_args(parser)
bench.main(parser.parse_args())
"""
STOCK = "stock_"
"""Before the name of a tool that asks stock vLLM."""
NUMBERS = ("first_text_ms", "latency_ms", "requests_per_s", "tokens_per_s", "tokens_per_request")


class Door(NamedTuple):
    """What every tool is told of the HTTP server."""

    address: str
    model: str
    tokenizer: Path
    tokens: int
    """Limit of an answer."""
    key: str = "none"


def repository(folder: Path) -> Path:
    """The demonstration model, packaged."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile

    profile = load_profile(MODEL / "profile.yaml")
    export_checkpoint(str(MODEL / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    return folder / "repository"


def pictures(count: int) -> list[bytes]:
    """PNG files of phantoms, which every tool can send."""
    rng = np.random.default_rng(21)
    files = []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(phantom.draw(rng).picture("voi_display")).save(file, "PNG")
        files.append(file.getvalue())
    return files


@contextlib.contextmanager
def stock_server(checkpoint: Path | None, profile: str) -> Iterator[Door | None]:
    """VLLM's own server, with its own tower and processor; None without a checkpoint."""
    if checkpoint is None:
        yield None
        return
    from cxr_triton.perf.peers.vllm import Vllm
    from cxr_triton.profile import load_profile

    running = Vllm(str(checkpoint), load_profile(profile), [])
    try:
        yield Door(f"http://127.0.0.1:{running.server.port}", "model", checkpoint, 0, running.server.key)
    finally:
        running.close()


@contextlib.contextmanager
def http_server(url: str) -> Iterator[str]:
    """`cxr-triton openai` as a process; its address without ``/v1``."""
    code = "from cxr_triton.cli import main; main()"
    command = [sys.executable, "-c", code, "openai", "--url", url, "--port", "0", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            lines = iter(process.stdout.readline, "}\n")
            yield json.loads("".join(lines) + "}")["address"].removesuffix("/v1")
        finally:
            process.terminate()


def summary(times: list[tuple[float, float, int]], wall_s: float) -> dict:
    """Of requests, each the seconds to its first text and to its end, and its tokens."""
    return {
        "requests": len(times),
        "first_text_ms": 1e3 * statistics.median(first for first, _, _ in times),
        "latency_ms": 1e3 * statistics.median(end for _, end, _ in times),
        "requests_per_s": len(times) / wall_s,
        "tokens_per_s": sum(tokens for _, _, tokens in times) / wall_s,
    }


async def closed_loop(ask: Callable, requests: int, concurrency: int) -> dict:
    """`ask` gives, of the request of a number, the time of its first text and its tokens."""
    numbers, times = iter(range(requests)), []

    async def worker() -> None:
        for number in numbers:
            begun = time.perf_counter()
            first, tokens = await ask(number)
            times.append((first - begun, time.perf_counter() - begun, tokens))

    begun = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return summary(times, time.perf_counter() - begun)


async def over_grpc(url: str, tokens: int, files: list[bytes], *load: int) -> dict:
    """Our own client."""
    async with AsyncReader(url) as reader:

        async def ask(number: int) -> tuple[float, int]:
            first = None
            stream = reader.read(files[number % len(files)], prompt=PROMPT, max_new_tokens=tokens)
            async for _ in stream:
                first = first or time.perf_counter()
            return first, stream.reading.usage["completion_tokens"]

        return await closed_loop(ask, *load)


async def over_http(door: Door, files: list[bytes], *load: int) -> dict:
    """OpenAI's client."""
    import openai

    options = {"max_completion_tokens": door.tokens, "stream": True, "stream_options": {"include_usage": True}}
    images = [{"type": "image_url", "image_url": {"url": uri(file)}} for file in files]
    async with openai.AsyncOpenAI(base_url=f"{door.address}/v1", api_key="none", max_retries=0, timeout=3600) as client:

        async def ask(number: int) -> tuple[float, int]:
            first = tokens = None
            content = [{"type": "text", "text": PROMPT}, images[number % len(images)]]
            messages = [{"role": "user", "content": content}]
            async for chunk in await client.chat.completions.create(model=door.model, messages=messages, **options):
                first = first or time.perf_counter()
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            return first, tokens

        return await closed_loop(ask, *load)


def by_aiperf(program: str, door: Door, files: list[bytes], requests: int, concurrency: int) -> dict:
    """NVIDIA AIPerf."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.jsonl"
        inputs.write_text("".join(json.dumps({"text": PROMPT, "image": uri(file)}) + "\n" for file in files))
        command = [program, "profile", "-m", door.model, "-u", door.address, "--endpoint-type", "chat", "--streaming"]
        command += ["--input-file", str(inputs), "--custom-dataset-type", "single_turn"]
        command += ["--request-count", str(requests), "--concurrency", str(concurrency)]
        command += ["--extra-inputs", f"max_completion_tokens:{door.tokens}", "--extra-inputs", "temperature:0"]
        command += ["--use-server-token-count", "--api-key", door.key]
        command += ["--tokenizer", str(door.tokenizer), "--artifact-dir", folder]
        run([*command, "--no-server-metrics", "--no-gpu-telemetry", "--ui", "simple"])
        result = json.loads((Path(folder) / "profile_export_aiperf.json").read_text())
    return {
        "requests": int(result["request_count"]["avg"]),
        "first_text_ms": result["time_to_first_token"]["p50"],
        "latency_ms": result["request_latency"]["p50"],
        "requests_per_s": result["request_throughput"]["avg"],
        "tokens_per_s": result["output_token_throughput"]["avg"],
    }


def by_vllm(python: str, door: Door, files: list[bytes], requests: int, concurrency: int) -> dict:
    """vLLM's ``bench serve``."""
    with tempfile.TemporaryDirectory() as folder:
        inputs, output = Path(folder) / "inputs.jsonl", Path(folder) / "result.json"
        rows = [{"prompt": PROMPT, "image_files": [uri(file)]} for file in files]
        inputs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = [python, "-c", VLLM, "--backend", "openai-chat", "--base-url", door.address, "--model", door.model]
        command += ["--endpoint", "/v1/chat/completions", "--tokenizer", str(door.tokenizer)]
        command += ["--dataset-name", "custom_image", "--dataset-path", str(inputs), "--num-prompts", str(requests)]
        command += ["--custom-output-len", str(door.tokens), "--max-concurrency", str(concurrency)]
        command += ["--temperature", "0"]
        command += ["--percentile-metrics", "ttft,e2el", "--save-result", "--result-filename", str(output)]
        run(command, OPENAI_API_KEY=door.key)
        result = json.loads(output.read_text())
    return {
        "requests": result["completed"],
        "first_text_ms": result["median_ttft_ms"],
        "latency_ms": result["median_e2el_ms"],
        "requests_per_s": result["request_throughput"],
        "tokens_per_s": result["output_throughput"],
    }


def uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    if done.returncode:
        raise click.ClickException(
            f"{command[0]} ended with status {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done.stdout.strip()


def medians(turns: list[dict]) -> dict:
    return {name: statistics.median(turn[name] for turn in turns) for name in NUMBERS}


def over(measured: dict, other: dict) -> dict:
    return {name: round(measured[name] / other[name], 4) for name in NUMBERS}


def compare(tools: dict[str, Callable], levels: tuple[int, ...], rounds: int, requests: int) -> list[dict]:
    """Each load by all tools, turn by turn."""
    found = []
    for concurrency in levels:
        turns = {name: [] for name in tools}
        for number in range(rounds):
            for name, ask in tools.items():
                turn = ask(requests, concurrency)
                turns[name].append({**turn, "tokens_per_request": turn["tokens_per_s"] / turn["requests_per_s"]})
                said = ", ".join(f"{key} {value:.2f}" for key, value in turns[name][-1].items())
                click.echo(f"{concurrency} at once, turn {number + 1}/{rounds}, {name}: {said}", err=True)
        middle = {name: medians(each) for name, each in turns.items()}
        lengths = {name: each["tokens_per_request"] for name, each in middle.items()}
        if max(lengths.values()) > 1.01 * min(lengths.values()):
            click.echo(f"answers of unlike lengths, which a lower --tokens makes alike: {lengths}", err=True)
        found.append({
            "concurrency": concurrency, "median": middle, "turns": turns,
            "http_over_grpc": over(middle["openai"], middle["grpc"]),
            "ours_over_stock": {
                name: over(middle[name], middle[STOCK + name]) for name in tools if STOCK + name in tools
            },
            "tool_over_openai": {
                name: over(middle[name], middle["openai"]) for name in ("aiperf", "vllm") if name in tools
            },
        })  # fmt: skip
    return found


@click.command()
@click.option("--aiperf", metavar="PROGRAM", help="AIPerf; left out without it.")
@click.option("--vllm", metavar="PYTHON", envvar="CXR_VLLM_PYTHON", help="A Python that has vLLM; left out without it.")
@click.option("--repository", "served", type=click.Path(path_type=Path), help="[default: the demonstration model]")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path), default=MODEL / "checkpoint", help="Folder, for the tools."
)
@click.option("--stock", type=click.Path(path_type=Path), help="Checkpoint for stock vLLM's own server.")
@click.option("--profile", default=str(MODEL / "profile.yaml"), help="Of that checkpoint.")
@click.option("--tokens", default=200, show_default=True, help="Limit of an answer.")
@click.option("--pictures", "count", default=16, show_default=True)
@click.option("--requests", default=64, show_default=True, help="Of a turn.")
@click.option("--concurrency", "levels", multiple=True, type=int, default=(1, 4), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@cores_options
@json_option
def main(
    stock,
    profile,
    aiperf,
    vllm,
    served,
    tokenizer,
    tokens,
    count,
    requests,
    levels,
    rounds,
    server_cores,
    client_cores,
    json_path,
):
    """Measure one server through its two doors."""
    result = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
        "environment": environment(),
        "tools": {"openai": metadata.version("openai"), "aiohttp": metadata.version("aiohttp")},
    }
    files, stolen = pictures(count), Stolen()
    with (
        tempfile.TemporaryDirectory() as folder,
        apart(server_cores, client_cores) as begin,
        Server(served or repository(Path(folder)), **PORTS, ready_timeout_s=600) as server,
        http_server(server.grpc) as address,
        stock_server(stock, profile) as other,
    ):
        begin()
        with urllib.request.urlopen(f"{address}/v1/models") as answer:
            model = json.load(answer)["data"][0]["id"]
        door = Door(address, model, tokenizer, tokens)
        tools = {
            "grpc": lambda *load: asyncio.run(over_grpc(server.grpc, tokens, files, *load)),
            "openai": lambda *load: asyncio.run(over_http(door, files, *load)),
        }
        doors = {"": door} | ({STOCK: other._replace(tokens=tokens, tokenizer=tokenizer)} if other else {})
        if aiperf:
            result["tools"]["aiperf"] = run([aiperf, "--version"])
            for prefix, each in doors.items():
                tools[f"{prefix}aiperf"] = functools.partial(by_aiperf, aiperf, each, files)
        if vllm:
            result["tools"]["vllm"] = run([vllm, "-c", "import vllm; print(vllm.__version__)"])
            for prefix, each in doors.items():
                tools[f"{prefix}vllm"] = functools.partial(by_vllm, vllm, each, files)
        for name in ("grpc", "openai", f"{STOCK}vllm"):  # warm up, also what remembers pictures
            if name in tools:
                tools[name](len(files), 2)
        cores = {name: sorted(each or ()) for name, each in (("server", server_cores), ("clients", client_cores))}
        result |= {"model": model, "cores": cores, "levels": compare(tools, levels, rounds, requests)}
    result["environment"]["stolen_share"] = stolen.share()
    write_json(result, json_path)


if __name__ == "__main__":
    main()
