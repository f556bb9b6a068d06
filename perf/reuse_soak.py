"""Many readings and follow-ups over small caches: `python -m cxr_triton.perf.reuse_soak BUNDLE`.

Conversations about a few pictures run together, some are cancelled, and the caches are too small for them. Held to:
memory within the limits, nothing left in the engine's slots, greedy tokens as without reuse.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.chat import ChatTokenizer
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pictures import PictureCache
from cxr_triton.engines.pipeline import Preprocessor, StepTensors
from cxr_triton.engines.runtime.prefix import PrefixCache
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.perf.decoder import Receiver
from cxr_triton.perf.environment import cpu_name
from cxr_triton.perf.process import resident_bytes
from cxr_triton.phantom_file import write_dicom
from cxr_triton.sampling import Sampling

PICTURES, IN_FLIGHT, TURNS = 24, 8, 3
QUESTIONS = ("Find abnormalities.", "Describe the heart.", "Write a structured report", "Provide differentials", "Why?")


class Reading(Receiver):
    """A turn of a conversation: what was asked, and what came of it."""

    def __init__(self, picture: int, messages: list[dict], generation: Generation, cancel_after: int | None):
        super().__init__()
        self.picture, self.messages, self.generation = picture, messages, generation
        self.tokens: list[int] = []
        self.text = self.finish_reason = ""
        self._cancel_after = cancel_after

    def is_cancelled(self) -> bool:
        """Whether its caller has gone."""
        return self._cancel_after is not None and len(self.tokens) >= self._cancel_after

    def __call__(self, chunk) -> None:
        """Take a chunk of the stream."""
        self.tokens.extend(chunk.token_ids.tolist())
        if done := chunk.completion:
            self.text, self.finish_reason = done.text, done.finish_reason
        super().__call__(chunk)


class Desk:
    """Makes readings: new ones, and turns that go on after an answer's text."""

    def __init__(self, bundle: Path, opened: Bundle, pictures: PictureCache, tokens: int, seed: int):
        preprocessor = Preprocessor(bundle)
        self._steps: list[StepTensors] = [
            preprocessor.prepare([write_dicom(phantom.draw(np.random.default_rng(i)))], "{}") for i in range(PICTURES)
        ]
        preprocessor.close()
        self._tokenizer, self._geometry = ChatTokenizer(opened.path), opened.geometry
        self._pictures, self._tokens, self._rng = pictures, tokens, random.Random(seed)  # noqa: S311 -- no secret

    def next(self, ended: list[Reading]) -> Reading:
        """A turn after one that ended, or the first one about a picture."""
        rng = self._rng
        picture, messages = rng.randrange(PICTURES), []
        going_on = [each for each in ended[-40:] if len(each.messages) < 2 * TURNS - 1]
        if going_on and rng.random() < 0.6:
            before = rng.choice(going_on)
            answer = {"role": "assistant", "content": [{"type": "text", "text": before.text}]}
            picture, messages = before.picture, [*before.messages, answer]
        image = [] if messages else [{"type": "image"}]
        text = {"type": "text", "text": rng.choice(QUESTIONS)}
        messages = [*messages, {"role": "user", "content": [*image, text]}]
        generation = self._generation(self._steps[picture], messages)
        return Reading(picture, messages, generation, rng.randint(1, 12) if rng.random() < 0.15 else None)

    def _generation(self, step: StepTensors, messages: list[dict]) -> Generation:
        grid = json.loads(step.context)["images"][0]["grid"]
        prompt = self._tokenizer.encode(messages, [tuple(grid)])
        embeddings = self._pictures.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        return Generation(
            input_ids=prompt.input_ids,
            position_ids=prompt.position_ids,
            image_index=prompt.image_index(self._geometry.token_budget),
            image_embeddings=embeddings.reshape(-1, embeddings.shape[-1]),
            sampling=Sampling(max_new_tokens=self._tokens, eos_token_ids=tuple(self._geometry.eos_token_ids)),
        )


@dataclasses.dataclass
class Seen:
    """What a soak has seen so far."""

    ended: list[Reading] = dataclasses.field(default_factory=list)
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)
    prefix_bytes: int = 0
    picture_bytes: int = 0
    resident_mib: list[float] = dataclasses.field(default_factory=list)
    checked: int = 0
    differed: int = 0


def soak(bundle: Path, *, readings: int, tokens: int, threads: int, limits_kib: tuple[int, int], seed: int) -> dict:
    """All numbers of one run, as `--json` writes them."""
    opened, began = Bundle.open(bundle, verify=False), time.monotonic()
    date, load = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
    prefix = PrefixCache(limits_kib[0] << 10)
    pictures = PictureCache(opened.open_vision(threads=threads), limits_kib[1] << 10)
    session = opened.open_decoder(slots=4, threads=threads)
    plain = DecoderRuntime(opened, session=opened.open_decoder(slots=1, threads=threads))
    desk, seen, running = Desk(bundle, opened, pictures, tokens, seed), Seen(), []
    with DecoderRuntime(opened, session=session, prefix=prefix) as runtime, plain:
        for number in range(readings):
            running.append(desk.next(seen.ended))
            runtime.submit(running[-1].generation, running[-1], running[-1].is_cancelled)
            if len(running) == IN_FLIGHT or number == readings - 1:
                _end(running, seen, plain, every=20)
            seen.prefix_bytes = max(seen.prefix_bytes, prefix.nbytes)
            seen.picture_bytes = max(seen.picture_bytes, pictures.nbytes)
            if (number + 1) % max(1, readings // 20) == 0:
                seen.resident_mib.append(round(resident_bytes("VmRSS") / 2**20, 1))
                click.echo(f"{number + 1}/{readings} readings, {seen.resident_mib[-1]} MiB resident", err=True)
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "engine": opened.engine,
        "precision": opened.precision,
        "profile": opened.profile.name,
        "date": date,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: metadata.version(name) for name in (*engine(opened.engine).distributions, "numpy")},
        "load_average_before": load,
        "seconds": round(time.monotonic() - began, 1),
        "readings": readings,
        "finish_reasons": seen.reasons,
        "prefix": {**prefix.counts(), "limit_bytes": limits_kib[0] << 10, "most_bytes": seen.prefix_bytes},
        "pictures": {
            "asked_for": pictures.pictures,
            "hits": pictures.hits,
            "limit_bytes": limits_kib[1] << 10,
            "most_bytes": seen.picture_bytes,
        },
        "slots_left_in_use": int((session.lengths != 0).sum()),
        "greedy_tokens": {"compared": seen.checked, "differed": seen.differed},
        "resident_mib": seen.resident_mib,
    }


def _end(running: list[Reading], seen: Seen, plain: DecoderRuntime, *, every: int) -> None:
    """Wait for readings, and read some of those that came to their end again without reuse."""
    for reading in running:
        reading.done.wait()
        if reading.error:
            raise reading.error
        seen.reasons[reading.finish_reason] = seen.reasons.get(reading.finish_reason, 0) + 1
        if reading.finish_reason == "cancelled":
            continue
        seen.ended.append(reading)
        if sum(seen.reasons.values()) % every == 0:
            again = Reading(reading.picture, reading.messages, reading.generation, None)
            plain.submit(again.generation, again)
            again.done.wait()
            seen.checked += 1
            seen.differed += again.tokens != reading.tokens
    running.clear()
    del seen.ended[:-40]


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readings", default=2000, show_default=True)
@click.option("--tokens", default=24, show_default=True, help="Most tokens of an answer.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of each graph.")
@click.option("--prefix-cache-kib", default=4096, show_default=True)
@click.option("--picture-cache-kib", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
def main(bundle, prefix_cache_kib, picture_cache_kib, json_path, **options):
    """Readings with follow-ups over small caches, with BUNDLE; status 1 where a limit or a token was not kept."""
    result = soak(bundle, limits_kib=(prefix_cache_kib, picture_cache_kib), **options)
    click.echo(f"{result['readings']} readings in {result['seconds']} s: {result['prefix']}, {result['greedy_tokens']}")
    write_json(result, json_path)
    kept = [result[part]["most_bytes"] <= result[part]["limit_bytes"] for part in ("prefix", "pictures")]
    if result["slots_left_in_use"] or result["greedy_tokens"]["differed"] or not all(kept):
        sys.exit(1)


if __name__ == "__main__":
    main()
