"""What a conversation saves by what was computed before: `python -m cxr_triton.perf.reuse BUNDLE`.

Turns about a picture, with and without reuse in alternating rounds of one process: the first turn, a second one that
goes on after its answer, and another task on the same picture. Each round has a picture of its own, so the first turn
never finds anything. The client's and Triton's parts and the decoding of files, which are the same each time, are left
out of the times: from the tower's input to the first token.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pictures import PictureCache
from cxr_triton.engines.pipeline import Preprocessor, StepTensors, sampling_of
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.perf.decoder import Receiver, medians
from cxr_triton.perf.environment import Stolen, cpu_name
from cxr_triton.phantom_file import write_dicom

SCHEMA = 1
TURNS = ("first", "follow_up", "other_task")
ASKED = (
    "Find abnormalities and support devices.",
    "Write a structured report",
    "Write a concise structured response with sections: image quality, support devices, findings, impression, and "
    "uncertainties.",
)
"""NV-Reason's own prompts, in the order of `TURNS`."""
STAND_IN = "X"  # one token in the place of an answer, whose tokens the prompt gets as they were generated


class TokenReceiver(Receiver):
    """Keeps the tokens of a stream, and when and after how much processor time the first one came."""

    def __init__(self):
        super().__init__()
        self.tokens: list[int] = []
        self.first = 0.0, 0.0
        self.usage: dict[str, int] = {}

    def __call__(self, chunk) -> None:
        """Take a chunk of the stream."""
        if not self.tokens and len(chunk.token_ids):
            self.first = time.perf_counter(), time.process_time()
        self.tokens.extend(chunk.token_ids.tolist())
        if chunk.completion:
            self.usage = chunk.completion.usage
        super().__call__(chunk)


@dataclasses.dataclass
class Way:
    """A tower and a decoder, with or without reuse, over the same sessions."""

    pictures: PictureCache
    runtime: DecoderRuntime

    def read(self, step: StepTensors, prompt: dict[str, Any], tokens: int) -> tuple[dict, list[int]]:
        """Seconds of wall and of processor to the first token, and the answer's tokens."""
        wall_s, processor_s = time.perf_counter(), time.process_time()
        windows = (step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        embeddings = self.pictures.encode(*windows)
        sampling = dataclasses.replace(sampling_of(step.context), max_new_tokens=tokens, eos_token_ids=())
        receiver = TokenReceiver()
        self.runtime.submit(
            Generation(**prompt, image_embeddings=embeddings.reshape(-1, embeddings.shape[-1]), sampling=sampling),
            receiver,
        )
        receiver.done.wait()
        if receiver.error:
            raise receiver.error
        return {
            "first_token_s": receiver.first[0] - wall_s,
            "processor_s": receiver.first[1] - processor_s,
            "prompt_tokens": receiver.usage["prompt_tokens"],
            "cached_tokens": receiver.usage.get("cached_tokens", 0),
        }, receiver.tokens


def prompt_of(step: StepTensors, answer: list[int] | None = None, before: StepTensors | None = None) -> dict:
    """A prompt's arrays; with `answer` in the place of the `STAND_IN` that follows the prompt of `before`."""
    ids, index, positions = step.input_ids, step.image_index, step.position_ids
    if before is not None:
        at = len(before.input_ids)
        if not np.array_equal(ids[:at], before.input_ids):
            raise RuntimeError("the second turn does not begin as the first one; measure with another profile")
        ids = np.concatenate([ids[:at], answer, ids[at + 1 :]])
        index = np.concatenate([index[:at], np.full(len(ids) - at, -1)])
        next_position = int(before.position_ids.max()) + 1
        new = np.tile(np.arange(next_position, next_position + len(ids) - at), (3, 1))
        positions = np.concatenate([positions[:, :at], new], axis=1)
    return {"input_ids": ids, "image_index": index, "position_ids": positions}


def conversation(way: Way, preprocessor: Preprocessor, image: bytes, tokens: int) -> dict:
    """The three turns of a round; answers by their tokens too."""
    first, follow_up, other = ASKED

    def step(**request) -> StepTensors:
        return preprocessor.prepare([image], json.dumps({"temperature": 0, **request}))

    opening = step(prompt=first)
    asked = json.loads(opening.context)["prompt"]  # as the model got it
    history = [{"role": "user", "content": asked}, {"role": "assistant", "content": STAND_IN}]
    second = step(prompt=follow_up, history=history)
    result, answers = {}, []
    result["first"], answer = way.read(opening, prompt_of(opening), tokens)
    answers.append(answer)
    result["follow_up"], answer = way.read(second, prompt_of(second, answer, opening), tokens)
    answers.append(answer)
    task = step(prompt=other)
    result["other_task"], answer = way.read(task, prompt_of(task), tokens)
    return result | {"answers": [*answers, answer]}


def measure(bundle: Path, *, rounds: int, tokens: int, threads: int, limits_mib: tuple[int, int]) -> dict:
    """All numbers of one run, as `--json` writes them."""
    opened, preprocessor = Bundle.open(bundle, verify=False), Preprocessor(bundle)
    began, load, stolen = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0], Stolen()
    vision, session = opened.open_vision(threads=threads), opened.open_decoder(slots=1, threads=threads)
    prefix_mib, picture_mib = limits_mib
    prefix = PrefixCache(prefix_mib << 20)
    ways = {
        "without": Way(PictureCache(vision, 0), DecoderRuntime(opened, session=session)),
        "with": Way(
            PictureCache(vision, picture_mib << 20),
            DecoderRuntime(opened, session=session, prefix=prefix),
        ),
    }
    runs = []
    conversation(ways["with"], preprocessor, _picture(0), 2)  # warms up; its picture is not seen again
    for number in range(1, rounds + 1):
        run = {name: conversation(way, preprocessor, _picture(number), tokens) for name, way in ways.items()}
        runs.append(_compared(run))
        said = json.dumps(runs[-1]["share_of_first_turn"])
        click.echo(f"round {number}/{rounds}: {said}, same tokens {runs[-1]['same_greedy_tokens']}", err=True)
    for way in ways.values():
        way.runtime.close()
    preprocessor.close()
    names = {name for graph in (opened.engine, opened.vision_engine) for name in engine(graph).distributions}
    return {
        "schema": SCHEMA,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "engine": opened.engine,
        "precision": opened.precision,
        "date": began,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: metadata.version(name) for name in (*sorted(names), "numpy")},
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "stolen_share": stolen.share(),
        "answer_tokens": tokens,
        "prefix_cache_mib": prefix_mib,
        "picture_cache_mib": picture_mib,
        "prefix_bytes": prefix.nbytes,
        "picture_bytes": ways["with"].pictures.nbytes,
        "share_of_first_turn": medians([run["share_of_first_turn"] for run in runs]),
        "rounds": runs,
    }


def _picture(number: int) -> bytes:
    return write_dicom(phantom.draw(np.random.default_rng(number)))


def _compared(run: dict) -> dict:
    """A round, with times as shares of the first turn's, and whether each answer is the same with reuse as without."""
    answers = [each.pop("answers") for each in run.values()]
    shares = {
        f"{turn}_{key.removesuffix('_s')}": run["with"][turn][key] / run["with"]["first"][key]
        for turn in TURNS[1:]
        for key in ("first_token_s", "processor_s")
    }
    same = [ours == theirs for ours, theirs in zip(*answers, strict=True)]
    return {**run, "share_of_first_turn": shares, "same_greedy_tokens": same}


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3, show_default=True)
@click.option("--tokens", default=32, show_default=True, help="Tokens of each answer.")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="CPU threads of each graph.")
@click.option("--prefix-cache-mib", default=512, show_default=True)
@click.option("--picture-cache-mib", default=256, show_default=True)
@json_option
def main(bundle, prefix_cache_mib, picture_cache_mib, json_path, **sizes):
    """Time to the first token of a first turn, a follow-up and another task on the same picture, with BUNDLE."""
    result = measure(bundle, limits_mib=(prefix_cache_mib, picture_cache_mib), **sizes)
    click.echo(f"{result['cpu']}, {result['threads']} threads, load {result['load_average_before']:.1f} before")
    for name, share in result["share_of_first_turn"].items():
        click.echo(f"{name}: {share:.1%} of the first turn's")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
