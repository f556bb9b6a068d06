"""What guessing tokens from earlier answers gains and costs: `python -m cxr_triton.perf.drafts BUNDLE`.

Recorded texts are written again, with drafts and without, in alternating rounds of one process over one session. The
sampler is forced to them: the logits are those of the bundle, computed as always, but for the recorded token's, which
is raised above all others. So what is guessed rightly is that of real texts though the weights may be random.

Texts are measured twice: with the other ones known, and with their tokens in random order, which no text goes on as.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.runtime.drafts import WIDTHS, Drafts
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.perf.decoder import medians
from cxr_triton.perf.environment import Stolen, cpu_name
from cxr_triton.perf.reuse import TokenReceiver, prompt_of
from cxr_triton.phantom_file import write_dicom
from cxr_triton.sampling import Sampling

SCHEMA = 1
KINDS = ("earlier_known", "never_matching")
FORCED = (
    "the sampler is forced to recorded texts: the recorded token's logit is raised above all others, "
    "everything is computed as always"
)
PROMPT = 16  # tokens, of which the first two are the number of the text
INDEX_MIB = 16
_RAISED = np.float32(1e30)


class Forced:
    """A decoder session whose likeliest next token is that of a recorded text; all else is the session's.

    Parameters
    ----------
    session : DecoderSession
    text_of : callable
        Tokens that are said after a prompt, given the ids with which that begins; None: what the decoder would say.
    """

    def __init__(self, session, text_of: Callable[[np.ndarray], list[int] | None]):
        self._session, self._text_of = session, text_of
        self._said: dict[int, tuple[list[int] | None, int]] = {}  # by slot: a text, and tokens of its prompt

    def __getattr__(self, name):
        return getattr(self._session, name)

    def prefill(self, slot, input_ids, *inputs, is_last):
        """See `DecoderSession.prefill`."""
        if not self._session.lengths[slot]:
            self._said[slot] = self._text_of(input_ids), 0
        logits = self._session.prefill(slot, input_ids, *inputs, is_last=is_last)
        if is_last:
            self._said[slot] = self._said[slot][0], int(self._session.lengths[slot])
            self._raise(slot, logits[None])
        return logits

    def step(self, input_ids, positions):
        """See `DecoderSession.step`."""
        return self.check(input_ids[:, None], positions[:, None])[:, 0]

    def check(self, input_ids, positions):
        """See `DecoderSession.check`."""
        logits = self._session.check(input_ids, positions)
        for slot, rows in enumerate(logits):
            self._raise(slot, rows)
        return logits

    def move(self, source, target):
        """See `DecoderSession.move`."""
        self._session.move(source, target)
        self._said[target] = self._said[source]

    def _raise(self, slot: int, rows: np.ndarray) -> None:
        """Of the rows after a slot's last tokens."""
        text, prompt = self._said[slot]
        if text is not None:
            first = int(self._session.lengths[slot]) - len(rows) - prompt + 1
            for row, token in zip(rows, text[first : first + len(rows)], strict=False):
                row[token] = _RAISED


class Numbered(Forced):
    """One whose prompts begin with the number of their text, as `number_of` has it."""

    def __init__(self, session, texts: list[list[int]]):
        self.texts = texts
        super().__init__(session, lambda ids: texts[int(ids[0]) * 64 + int(ids[1])])


def number_of(text: int) -> list[int]:
    """First tokens of the prompt of a text."""
    return [text // 64, text % 64]


def request(number: int, tokens: int, hidden: int) -> Generation:
    """A prompt of text alone, answered by a text's first tokens."""
    ids = np.array([*number_of(number), *range(PROMPT - 2)], np.int64)
    return Generation(
        input_ids=ids,
        position_ids=np.tile(np.arange(PROMPT), (3, 1)),
        image_index=np.full(PROMPT, -1, np.int64),
        image_embeddings=np.zeros((0, hidden), np.float32),
        sampling=Sampling(max_new_tokens=tokens, repetition_penalty=1.05),
    )


def write(runtime: DecoderRuntime, session: Numbered, numbers: Sequence[int]) -> dict[str, float]:
    """Texts written at once, as long as the shortest: tokens and seconds while all are written; processor and steps."""
    length = min(len(session.texts[number]) for number in numbers)
    steps, receivers = runtime.steps, [TokenReceiver() for _ in numbers]
    processor_s = time.process_time()
    for number, receiver in zip(numbers, receivers, strict=True):
        runtime.submit(request(number, length, session.hidden), receiver)
    for number, receiver in zip(numbers, receivers, strict=True):
        receiver.done.wait()
        if receiver.error:
            raise receiver.error
        if receiver.tokens != session.texts[number][:length]:
            raise RuntimeError("a stream did not write its text; nothing was measured")
    processor_s = time.process_time() - processor_s
    began_s, ended_s = (max(r.arrivals[end][0] for r in receivers) for end in (0, -1))
    tokens = sum(count for r in receivers for at_s, count in r.arrivals if at_s > began_s)
    return {"tokens": tokens, "seconds": ended_s - began_s, "processor_s": processor_s, "steps": runtime.steps - steps}


def round_of(ways: dict, session: Numbered, groups: list[list[int]], known: list[list[int]], is_odd: bool) -> dict:
    """All groups of texts written by each of the ways, in turn.

    Parameters
    ----------
    ways : dict of str to DecoderRuntime
    session : Numbered
    groups : list of list of int
        Numbers of the texts that are written at once.
    known : list of list of int
        Texts that were written before, of which those that are written now are left out.
    is_odd : bool
        The second way comes first.
    """
    counted: dict[str, dict[str, float]] = {name: defaultdict(float) for name in ways}
    drafts = ways["with"].drafts
    before = drafts.counts()
    for group in groups:
        drafts.forget()
        for number, text in enumerate(known):
            if number not in group:
                drafts.texts.add(text)
        for name in sorted(ways, reverse=is_odd):
            for key, value in write(ways[name], session, group).items():
                counted[name][key] += value
    rates = {name: each["tokens"] / each["seconds"] for name, each in counted.items()}
    checked = {name: count - before[name] for name, count in drafts.counts().items()}
    return {
        "tokens_per_s_without": rates["without"],
        "tokens_per_s_with": rates["with"],
        "gain": rates["with"] / rates["without"],
        "processor_gain": counted["without"]["processor_s"] / counted["with"]["processor_s"],
        "fewer_steps": counted["without"]["steps"] / counted["with"]["steps"],
        **checked,
    }


def recorded(bundle: Path, opened: Bundle, count: int) -> list[list[int]]:
    """What a bundle says of phantoms, by its tokens."""
    preprocessor, vision = Preprocessor(bundle), opened.open_vision()
    texts = []
    with DecoderRuntime(opened, slots=1) as runtime:
        for number in range(count):
            step = preprocessor.prepare([write_dicom(phantom.draw(np.random.default_rng(number)))], "{}")
            rows = vision.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
            receiver = TokenReceiver()
            rows = rows.reshape(-1, rows.shape[-1])
            runtime.submit(
                Generation(**prompt_of(step), image_embeddings=rows, sampling=sampling_of(step.context)), receiver
            )
            receiver.done.wait()
            texts.append(receiver.tokens)
    preprocessor.close()
    return texts


def measure(bundle: Path, texts: list[list[int]], *, measured: int, streams, rounds: int, threads: int) -> dict:
    """All numbers of one run, as `--json` writes them; `texts` are tokens."""
    opened = Bundle.open(bundle, verify=False)
    began, load, stolen = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0], Stolen()
    rng = random.Random(0)  # noqa: S311 -- no secret
    mixed = [rng.sample(text, len(text)) for text in texts]
    session = Numbered(opened.open_decoder(slots=max(streams), threads=threads), [*texts, *mixed])
    drafts = Drafts(INDEX_MIB << 20)
    ways = {
        "without": DecoderRuntime(opened, session=session),
        "with": DecoderRuntime(opened, session=session, drafts=drafts),
    }
    results: dict[str, dict] = {}
    for number in range(rounds + 1):
        for kind, first in zip(KINDS, (0, len(texts)), strict=True):
            for at_once in streams:
                count = max(measured, at_once)
                start = first + number * count % (len(texts) - count + 1)
                chosen = range(start, start + count)
                groups = [list(chosen[i : i + at_once]) for i in range(0, len(chosen), at_once)]
                run = round_of(ways, session, groups, texts, is_odd=number % 2 == 1)
                name = f"{kind}_{at_once}"
                said = json.dumps({key: round(value, 3) for key, value in run.items()})
                click.echo(f"round {number}/{rounds} {name}: {said}", err=True)
                if number:  # round 0 warms up
                    results.setdefault(name, {"rounds": []})["rounds"].append(run)
    for way in ways.values():
        way.close()
    for result in results.values():
        result["median"] = medians(result["rounds"])
    return {
        "schema": SCHEMA,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "forced": FORCED,
        "engine": opened.engine,
        "precision": opened.precision,
        "date": began,
        "cpu": cpu_name(),
        "threads": threads,
        "versions": {name: metadata.version(name) for name in (*engine(opened.engine).distributions, "numpy")},
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "stolen_share": stolen.share(),
        "texts": len(texts),
        "text_tokens": sum(map(len, texts)),
        "steps": step_costs(drafts, max(streams)),
        "results": results,
    }


def step_costs(drafts: Drafts, streams: int) -> dict[str, dict]:
    """What steps took at last, by their streams: seconds of one token each, and shares of that for more."""
    costs, result = drafts.costs, {}
    for count in range(1, streams + 1):
        if seconds := costs.step_s(count):
            shares = {str(width): share for width in WIDTHS if (share := costs.share(count, width))}
            result[str(count)] = {"seconds": seconds, "share_by_tokens": shares}
    return result


def texts_of(bundle: Path, opened: Bundle, file: Path | None, tokenizer: Path | None, count: int) -> list[list[int]]:
    """Tokens of recorded texts, or of what a bundle says of phantoms."""
    if file is None:
        return recorded(bundle, opened, count)
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer or bundle / "tokenizer.json"))
    return [encoder.encode(text, add_special_tokens=False).ids for text in json.loads(file.read_text("utf-8"))]


@click.command(cls=Command, extra="local")
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--texts",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON list of recorded answers.  [default: what BUNDLE says of phantoms]",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="tokenizer.json for them.  [default: BUNDLE's]",
)
@click.option("--phantoms", "count", default=21, show_default=True, help="Answers to record where no texts are given.")
@click.option("--tokens", default=256, show_default=True, help="First tokens of a text that are written.")
@click.option("--measured", default=8, show_default=True, help="Texts that are written in a round.")
@click.option("--streams", default=(1, 8), show_default=True, multiple=True, help="Texts that are written at once.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="CPU threads of the decoder.")
@json_option
def main(bundle, json_path, **options):
    """Tokens a second of BUNDLE's decoder with drafts and without, on texts that it is made to write."""
    began_s, tokens = time.monotonic(), options.pop("tokens")
    named = {name: options.pop(name) for name in ("file", "tokenizer", "count")}
    texts = texts_of(bundle, Bundle.open(bundle, verify=False), **named)
    most = max(*options["streams"], options["measured"])
    if len(texts) <= most:
        raise click.UsageError(
            f"there are {len(texts)} texts; {most} are written in a round, and more have to be known"
        )
    result = measure(bundle, [text[:tokens] for text in texts], **options)
    click.echo(f"{result['cpu']}, {result['threads']} threads, load {result['load_average_before']:.1f} before")
    click.echo(FORCED)
    for name, each in result["results"].items():
        median = each["median"]
        click.echo(
            f"{name}: {median['tokens_per_s_without']:.2f} tok/s without, {median['tokens_per_s_with']:.2f} with, "
            f"{median['gain']:.3f} x, by processor time {median['processor_gain']:.3f} x; "
            f"{median['fewer_steps']:.2f} x fewer steps"
        )
    click.echo(f"took {time.monotonic() - began_s:.0f} s")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
