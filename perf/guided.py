"""What a guide does to answers, and costs: `python -m cxr_triton.perf.guided BUNDLE`.

Answers about phantoms, drawn at a high temperature with and without a guide, and greedy ones token by token. The bundle
is of a model that was trained on phantoms; another's answers are measured alike, but say nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
from tokenizers import Tokenizer

from cxr_triton import phantom
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.runtime.drafts import Drafts
from cxr_triton.engines.runtime.guide import Guide, Guides
from cxr_triton.engines.runtime.sampler import Sampler
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Chunk, Completion, Generation
from cxr_triton.guide import answer_grammar
from cxr_triton.perf.decoder import Receiver, medians
from cxr_triton.perf.environment import Stolen, cpu_name
from cxr_triton.phantom_file import write_dicom
from cxr_triton.profile import load_profile
from cxr_triton.reading import Parsed, parse
from cxr_triton.sampling import Sampling

SCHEMA = 1
TEMPERATURE, MOST_TOKENS = 1.5, 600
HELD_OUT_SEED = 20_000
"""Of phantoms that the demonstration model was not trained on."""
REPORT = {
    "type": "object",
    "properties": {
        "impression": {"type": "string", "maxLength": 80},
        "severity": {"enum": ["none", "mild", "severe"]},
        "labels": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 4},
        "confidence": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["impression", "severity", "labels", "confidence"],
    "additionalProperties": False,
}
"""The JSON schema that answers are held to."""
WAYS: dict[str, dict] = {
    "none": {},
    "answer": {"guide": "answer"},
    "labels": {"mode": "labels"},
    "json_schema": {"guide": {"json_schema": REPORT}},
}

DRAWN = {"temperature": TEMPERATURE, "max_new_tokens": MOST_TOKENS}


class Answer(Receiver):
    """Tokens of a stream, and how it ended."""

    def __init__(self):
        super().__init__()
        self.tokens: list[int] = []
        self.completion: Completion | None = None

    def __call__(self, chunk: Chunk) -> None:
        """Take a chunk of the stream."""
        self.tokens.extend(chunk.token_ids.tolist())
        self.completion = chunk.completion
        super().__call__(chunk)


class Asked:
    """A decoder, a tower, and pictures that both are asked about.

    Parameters
    ----------
    bundle : Bundle
    pictures : int
    threads : int, optional
    drafts : Drafts, optional
        Of the decoder; without, none are made.
    """

    def __init__(self, bundle: Bundle, pictures: int, threads: int | None = None, drafts: Drafts | None = None):
        rng = np.random.default_rng(HELD_OUT_SEED)
        self.phantoms = [phantom.draw(rng) for _ in range(pictures)]
        self.profile = bundle.profile
        self._files = [write_dicom(each) for each in self.phantoms]
        self._vision = bundle.open_vision(threads=threads)
        self._preprocessor = Preprocessor(bundle.path, not_a_chest="flag")
        session = bundle.open_decoder(slots=8, threads=threads)
        self.runtime = DecoderRuntime(bundle, session=session, guides=Guides(bundle), drafts=drafts, queue_size=1 << 16)
        self._embeddings: dict[int, np.ndarray] = {}

    def close(self) -> None:
        """End both."""
        self.runtime.close()
        self._preprocessor.close()

    def answers(self, requests: Sequence[tuple[int, dict]]) -> list[tuple[Parsed, list[int]]]:
        """Answers to requests about pictures, by their numbers, and their tokens; all run at once."""
        running = []
        for number, request in requests:
            step = self._preprocessor.prepare([self._files[number]], json.dumps(request))
            if number not in self._embeddings:
                windows = (step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
                self._embeddings[number] = self._vision.encode(*windows)[0]
            generation = Generation(
                input_ids=step.input_ids,
                position_ids=step.position_ids,
                image_index=step.image_index,
                image_embeddings=self._embeddings[number],
                sampling=sampling_of(step.context),
            )
            running.append((step.context, Answer()))
            self.runtime.submit(generation, running[-1][1])
        found = []
        for context, receiver in running:
            receiver.done.wait()
            if receiver.error:
                raise receiver.error
            form = {key: json.loads(context)[key] for key in ("grammar", "answer", "labels")}
            if completion := receiver.completion:
                found.append((parse(completion.text, finish_reason=completion.finish_reason, **form), receiver.tokens))
        return found


def drawn(asked: Asked, way: dict, count: int) -> dict:
    """How answers at `TEMPERATURE` end; those in the vocabulary are whole and name labels of it only, or are JSON."""
    pictures = len(asked.phantoms)
    requests = [(i % pictures, {**way, **DRAWN, "seed": i}) for i in range(count)]
    began = time.perf_counter()
    answers = asked.answers(requests)
    seconds = time.perf_counter() - began
    vocabulary = set(asked.profile.labels)
    exact = [
        {finding.label for finding in parsed.findings} == set(asked.phantoms[i % pictures].labels)
        for i, (parsed, _) in enumerate(answers)
    ]
    tokens = [len(ids) for _, ids in answers]
    return {
        "answers": count,
        "statuses": dict(Counter(parsed.status for parsed, _ in answers)),
        "in_vocabulary": sum(
            parsed.status == "ok" and {finding.label for finding in parsed.findings} <= vocabulary
            for parsed, _ in answers
        ),
        "exact_label_sets": sum(exact),
        "tokens_median": float(np.median(tokens)),
        "tokens_s": sum(tokens) / seconds,
    }


def greedy(asked: Asked) -> dict:
    """Likeliest answers with a guide beside those without."""
    numbers = range(len(asked.phantoms))
    plain, held, at_once = (
        asked.answers([(i, {**WAYS[way], "temperature": 0}) for i in numbers]) for way in ("none", "answer", "labels")
    )
    legal = [i for i in numbers if plain[i][0].status == "ok" and not plain[i][0].flags]

    def exact(answers) -> int:
        return sum(
            {finding.label for finding in parsed.findings} == set(asked.phantoms[i].labels)
            for i, (parsed, _) in enumerate(answers)
        )

    return {
        "pictures": len(numbers),
        "legal_without": len(legal),
        "same_tokens": sum(plain[i][1] == held[i][1] for i in legal),
        "exact_label_sets": {"none": exact(plain), "answer": exact(held), "labels": exact(at_once)},
        "tokens_median": {
            name: float(np.median([len(ids) for _, ids in answers]))
            for name, answers in (("none", plain), ("answer", held), ("labels", at_once))
        },
    }


@contextlib.contextmanager
def timed() -> Iterator[dict[str, list[float]]]:
    """Seconds of each call of a guide while it lasts, by its name."""
    calls: dict[str, list[float]] = {name: [] for name in ("allows", "allowed", "accept")}
    kept = {name: getattr(Guide, name) for name in calls}

    def around(name: str):
        def call(*args):
            began = time.perf_counter()
            result = kept[name](*args)
            calls[name].append(time.perf_counter() - began)
            return result

        return call

    for name in calls:
        setattr(Guide, name, around(name))
    try:
        yield calls
    finally:
        for name, method in kept.items():
            setattr(Guide, name, method)


def cost(asked: Asked, rounds: int, count: int) -> dict:
    """Tokens a second with a guide as a share of those without, in alternating rounds, and what its calls take."""
    shares = []
    for number in range(rounds):
        rates = {}
        for name in ("none", "answer") if number % 2 else ("answer", "none"):
            rates[name] = _rate(asked, [(i, {**WAYS[name], "temperature": 0}) for i in range(count)])
        shares.append({"rate": rates["answer"] / rates["none"]})
    with timed() as calls:
        asked.answers([(i, {**WAYS["answer"], **DRAWN, "seed": i}) for i in range(count)])
    return {
        "greedy_rate_with_as_share_of_without": medians(shares)["rate"],
        "microseconds": {
            name: {"mean": 1e6 * float(np.mean(each)), "p99": 1e6 * float(np.quantile(each, 0.99)), "calls": len(each)}
            for name, each in calls.items()
            if each
        },
    }


def of_vocabulary(folder: Path, readings: int = 8) -> dict:
    """Microseconds that a token takes to be sampled over a checkpoint's vocabulary, with and without a guide.

    Logits are random, and lean to the next token of a reading as phantoms have them.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    geometry = SimpleNamespace(vocab=tokenizer.get_vocab_size(), eos_token_ids=[tokenizer.token_to_id("<|im_end|>")])
    began = time.perf_counter()
    guides = Guides(SimpleNamespace(path=folder, geometry=geometry))
    result: dict = {"tokens": geometry.vocab, "tokenizer_s": time.perf_counter() - began}
    profile = load_profile("nv-reason-cxr-3b")
    grammar = answer_grammar(grammar="think_answer", answer="labels", labels=profile.labels)
    rng = np.random.default_rng(1)
    texts = [tokenizer.encode(phantom.reading(phantom.draw(rng))).ids for _ in range(readings)]
    row = rng.standard_normal(geometry.vocab).astype(np.float32)
    for name, temperature in (("greedy", 0.0), ("drawn", TEMPERATURE)):
        for way in ("without", "with"):
            times = []
            for ids in texts:
                sampling = Sampling(max_new_tokens=len(ids), temperature=temperature, seed=0)
                began = time.perf_counter()
                guide = guides.guide(grammar) if grammar and way == "with" else None
                sampler = Sampler(sampling, np.array([0]), guide)
                if way == "with":
                    result["start_us"] = 1e6 * (time.perf_counter() - began)
                for token in ids:
                    logits = row.copy()
                    logits[token] += 60
                    began = time.perf_counter()
                    if sampler.sample(logits) != token:
                        raise RuntimeError("the guide does not allow a reading of its own grammar")
                    times.append(1e6 * (time.perf_counter() - began))
            result[f"{name}_{way}_us"] = {"mean": float(np.mean(times)), "p99": float(np.quantile(times, 0.99))}
    return result


def _rate(asked: Asked, requests) -> float:
    began = time.perf_counter()
    answers = asked.answers(requests)
    return sum(len(ids) for _, ids in answers) / (time.perf_counter() - began)


def measure(
    bundle: Path, *, count: int, pictures: int, rounds: int, threads: int, tokenizer: Path | None = None
) -> dict:
    """All numbers of one run, as `--json` writes them."""
    opened = Bundle.open(bundle, verify=False)
    began, load, stolen = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0], Stolen()
    asked = Asked(opened, pictures, threads)
    try:
        result: dict = {"drawn": {}}
        for name, way in WAYS.items():
            result["drawn"][name] = drawn(asked, way, count)
            click.echo(f"{name}: {json.dumps(result['drawn'][name])}", err=True)
        result["greedy"] = greedy(asked)
        result["cost"] = cost(asked, rounds, min(pictures, 16))
    finally:
        asked.close()
    if tokenizer:
        result["vocabulary"] = of_vocabulary(tokenizer)
    names = {name for graph in (opened.engine, opened.vision_engine) for name in engine(graph).distributions}
    return {
        "schema": SCHEMA,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "model": asked.profile.name,
        "engine": opened.engine,
        "precision": opened.precision,
        "date": began,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: metadata.version(name) for name in (*sorted(names), "llguidance", "numpy")},
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "stolen_share": stolen.share(),
        "temperature": TEMPERATURE,
        "max_new_tokens": MOST_TOKENS,
        **result,
    }


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--count", default=500, show_default=True, help="Answers of each kind that are drawn.")
@click.option("--pictures", default=100, show_default=True, help="Phantoms that they are about.")
@click.option("--rounds", default=5, show_default=True, help="Of the comparison of speed.")
@click.option("--threads", default=os.cpu_count(), show_default=True, help="CPU threads of each graph.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a larger tokenizer.json, over whose vocabulary a token's time is measured too.",
)
@json_option
def main(bundle: Path, json_path: str | None, **sizes):
    """Measure what a guide does to the answers of BUNDLE, and what it costs."""
    result = measure(bundle, **sizes)
    click.echo(
        json.dumps({key: result[key] for key in ("greedy", "cost", "vocabulary") if key in result}, indent=1), err=True
    )
    write_json(result, json_path)


if __name__ == "__main__":
    main()
