"""What one would use instead, in the same run: same images, prompts and numbers of tokens, round by round in turn.

A round is one reading through the served ensemble and then the same by each peer, which runs in a process of its own on
the same cores. Speeds of a machine drift, so the medians of the rounds' ratios are what counts.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from cxr_triton.errors import InvalidRequest, unknown_key
from cxr_triton.perf.peers.peer import Peer, plain
from cxr_triton.perf.process import Process
from cxr_triton.profile import ModelProfile

PEERS = ("transformers", "genai", "vllm")
"""Modules of this package, as `bench run --baseline` takes them."""

KINDS = {
    **{name: f"{name}.PEER" for name in PEERS},
    "llama-cpp-q4-0": "llama_cpp.Q4_0",
    "llama-cpp-q4-k-m": "llama_cpp.Q4KM",
    "openvino-genai": "openvino_genai.PEER",
}
"""All peers, as `perf.beside` takes them."""


def kind_of(name: str) -> type[Peer]:
    """The class of one of `KINDS`."""
    module, _, attribute = KINDS[name].partition(".")
    kind: type[Peer] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return kind


def peer(name: str) -> type[Peer]:
    """The class of one of `PEERS`."""
    return kind_of(name)


def start(kind: type[Peer], folder: Path, profile: ModelProfile, items: Sequence) -> Process:
    """A peer in a process of its own, on the cores that this one has."""
    cpus = sorted(os.sched_getaffinity(0))
    if not kind.elsewhere:
        return Process(kind, cpus, str(folder), profile, list(items))
    given = [plain(folder, profile, items)] if kind.scope == "reading" else []
    return Process(kind, cpus, str(folder), *given, python=os.environ.get(kind.variable))


def parse(values: Sequence[str], option: str = "--baseline") -> dict[str, Path]:
    """Values ``NAME=CHECKPOINT`` of an option.

    Raises
    ------
    InvalidRequest
        An unknown name, or a folder that is not there.
    """
    found = {}
    for value in values:
        name, _, folder = value.partition("=")
        if name not in PEERS:
            raise InvalidRequest(unknown_key(name, PEERS, option).replace("key", "baseline", 1))
        if not Path(folder, "config.json").is_file() and not Path(folder, "genai_config.json").is_file():
            raise InvalidRequest(f"{option} {value}: {folder or 'nothing'} is no checkpoint folder; give {name}=FOLDER")
        found[name] = Path(folder).resolve()
    return found


def measure(
    url: str,
    items: Sequence[tuple[list[bytes], dict]],
    profile: ModelProfile,
    baselines: Mapping[str, Path],
    *,
    rounds: int = 3,
    on_round: Callable[[str], None] = lambda what: None,
) -> list[dict]:
    """`baselines` of docs/bench.schema.json.

    Parameters
    ----------
    url : str
        gRPC endpoint of the served ensemble.
    items : sequence of (list of bytes, dict)
        Image files and REQUEST of each request; a round takes the next one.
    profile : ModelProfile
        Of the bundle that is served.
    baselines : mapping
        Name of a peer to the checkpoint's folder, or to what the peer's own builder wrote.
    rounds : int
        Counted ones; one more warms up.
    on_round : callable
        Told about each round before it begins.

    Returns
    -------
    list of dict
        An entry for each; one that is not installed says so in ``why``.
    """
    from cxr_triton.client import Reader

    entries: list[dict] = []
    running: dict[str, Process] = {}
    with ExitStack() as stack:
        # First those that have to be built, while no other model takes the memory that this needs.
        prepared = {}
        for name, folder in baselines.items():
            if why := peer(name).missing():
                entries.append({"name": peer(name).title, "ratio_output_tokens_per_s": None, "why": why})
                continue
            prepared[name] = peer(name).prepare(folder, Path(stack.enter_context(TemporaryDirectory(prefix=name))))
        for name, folder in prepared.items():
            on_round(f"start {name}")
            running[name] = start(peer(name), folder, profile, items)
            stack.callback(running[name].kill)
        reader = stack.enter_context(Reader(url))
        told: dict[str, list[dict]] = {name: [] for name in running}
        for index in range(rounds + 1):
            item = index % len(items)
            on_round(f"baselines, {'warm-up' if not index else f'round {index}'}")
            ours = _ours(reader, *items[item])
            for name, process in running.items():
                theirs = process.call("read", item, ours["prompt_tokens"], ours["tokens"])
                if index:
                    told[name].append({"item": item, "ours": ours, "theirs": theirs})
        for name, process in running.items():
            entries.append(_entry(peer(name), told[name], process.end()))
    return entries


def _ours(reader, images: list[bytes], request: dict) -> dict:
    """One reading through the server, as a client sees it."""
    started_s, first_s = time.perf_counter(), None
    stream = reader.read(images, **request)
    for delta in stream:
        if delta and first_s is None:
            first_s = time.perf_counter() - started_s
    reading = stream.result()
    seconds = time.perf_counter() - started_s
    return {
        "prompt_tokens": reading.usage["prompt_tokens"],
        "tokens": reading.usage["completion_tokens"],
        "first_s": first_s,
        "seconds": seconds,
        "text": reading.text,
        "decoder_s": (reading.timings_ms["prefill"] + reading.timings_ms["decode"]) / 1e3,
        "decode_s": reading.timings_ms["decode"] / 1e3,
    }


def _entry(kind: type[Peer], rounds: Sequence[Mapping], facts: Mapping) -> dict:
    """Medians over the rounds; of a peer that only decodes, our prefill and decoding stand beside its own."""
    ours_s = [each["ours"]["decoder_s" if kind.scope == "decoder" else "seconds"] for each in rounds]
    theirs_s = [each["theirs"]["seconds"] for each in rounds]
    pairs = [(each["ours"], each["theirs"]) for each in rounds]
    rates = [(o["tokens"] / a, t["tokens"] / b) for (o, t), a, b in zip(pairs, ours_s, theirs_s, strict=True)]
    entry = {
        "name": kind.title,
        "scope": kind.scope,
        "ratio_output_tokens_per_s": statistics.median(a / b for a, b in rates),
        "ours_output_tokens_per_s": statistics.median(a for a, _ in rates),
        "theirs_output_tokens_per_s": statistics.median(b for _, b in rates),
        "ratio_decode_tokens_per_s": None,
        "ratio_time_to_first_token": None,
        "same_prompt_tokens": all(o["prompt_tokens"] == t["prompt_tokens"] for o, t in pairs),
        "same_output_tokens": all(o["tokens"] == t["tokens"] for o, t in pairs),
        "versions": kind.versions(),
        "peak_resident_bytes": facts["peak_resident_bytes"],
        "load_s": facts["load_s"],
        "rounds": list(rounds),
    }
    if all(t["first_s"] for _, t in pairs) and all(o["tokens"] > 1 and o["decode_s"] for o, _ in pairs):
        entry["ratio_decode_tokens_per_s"] = statistics.median(
            (t["seconds"] - t["first_s"]) / o["decode_s"] for o, t in pairs
        )
        if kind.scope == "reading":  # what a user waits for: theirs over ours
            entry["ratio_time_to_first_token"] = statistics.median(t["first_s"] / o["first_s"] for o, t in pairs)
    if all("text" in t for _, t in pairs):
        entry["same_text"] = statistics.median(_common(o["text"], t["text"]) for o, t in pairs)
    return entry


def _common(ours: str, theirs: str) -> float:
    """Share of our text that both begin with; more may follow, as peers end by the number of tokens alone."""
    same = next(
        (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return same / len(ours) if ours else 1.0
