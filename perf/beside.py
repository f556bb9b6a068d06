"""Bundles beside what one would use instead, without a server: `python -m cxr_triton.perf.peers BUNDLE...`.

In every round each of them is loaded anew, in a process of its own that has ended before the next begins: so they share
neither memory nor cores, and each round has its time to load. What one cannot do is null, with the reason.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import OUT_FILE, Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.pipeline import Preprocessor, sampling_of
from cxr_triton.engines.runtime.drafts import Drafts
from cxr_triton.engines.runtime.scheduler import DecoderRuntime
from cxr_triton.engines.runtime.stream import Generation
from cxr_triton.errors import CxrError, InternalError, InvalidRequest
from cxr_triton.files import write
from cxr_triton.perf.beside_page import page, table
from cxr_triton.perf.decoder import Receiver
from cxr_triton.perf.drafts import FORCED, INDEX_MIB, Forced, texts_of
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.perf.peers import KINDS, kind_of, start
from cxr_triton.perf.peers.peer import Peer, told
from cxr_triton.perf.reuse import prompt_of
from cxr_triton.perf.roofline import ModelWork, peaks
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import write_dicom
from cxr_triton.profile import ModelProfile
from cxr_triton.sampling import Sampling
from cxr_triton.triton_repo.serve import HUGE_PAGES

SCHEMA = 1
STREAMS = (1, 4, 8)
PICTURE = 2500, 2048, 12
"""Rows, columns and bits of the radiograph."""
TURNS = (
    "in every round each is loaded anew, in a process of its own that has ended before the next begins; prompts are "
    "random token ids, answers greedy and of a fixed length; a first prompt and a first picture of each are not counted"
)
NO_CROWD = "some of its answers were whole before others began: ask for more --tokens"
NO_PICTURE = "only its text decoder is measured: it gets no picture"
NO_GUESSES = "it guesses no tokens here"
REPORTS = (
    "a report is a whole reading, from the file to the last of `report_tokens`; with guesses, the answer is a recorded "
    "report, a new one in every round, while the others are known: " + FORCED
)


class Ours(Peer):
    """A bundle without a server, from file to tokens; nothing is kept of earlier prompts, and only `guess` guesses."""

    packages = ()
    guesses = True

    @classmethod
    def step_bytes(cls, folder: Path, streams: int = 1) -> int:
        """See `Peer.step_bytes`."""
        opened = Bundle.open(folder, verify=False)
        return engine(opened.engine).crowd_bytes(opened, streams)

    def __init__(self, folder: str, profile, items: Sequence[tuple[list[bytes], dict]]):
        opened = Bundle.open(folder, verify=False)
        self.items, self.hidden = items, opened.geometry.hidden
        self.preprocessor, self.vision = Preprocessor(folder), opened.open_vision()
        session = opened.open_decoder(slots=max(STREAMS))
        self.runtime = DecoderRuntime(opened, session=session)
        self.text: list[int] = []
        self.drafts = Drafts(INDEX_MIB << 20)
        forced = Forced(session, lambda ids: self.text)
        self.guessing = DecoderRuntime(opened, session=forced, drafts=self.drafts)

    def write(self, prompts: Sequence[Sequence[int]], tokens: int) -> dict:
        """See `Peer.write`."""
        started_s = time.perf_counter()
        receivers = self._answered([self._text(ids, tokens) for ids in prompts], self.runtime)
        return told(started_s, [[at_s for at_s, count in each.arrivals for _ in range(count)] for each in receivers])

    def read(self, index: int, prompt_tokens: int, tokens: int) -> dict:
        """See `Peer.read`."""
        return self._read(index, tokens, self.runtime)

    def guess(self, index: int, texts: Sequence[list[int]], chosen: int) -> dict:
        """See `Peer.guess`."""
        self.drafts.forget()
        for number, text in enumerate(texts):
            if number != chosen:
                self.drafts.texts.add(text)
        self.text, before = texts[chosen], self.drafts.counts()
        took = self._read(index, len(self.text), self.guessing)
        return took | {name: count - before[name] for name, count in self.drafts.counts().items()}

    def _read(self, index: int, tokens: int, runtime: DecoderRuntime) -> dict:
        images, request = self.items[index]
        started_s = time.perf_counter()
        step = self.preprocessor.prepare(images, json.dumps(request | {"max_new_tokens": tokens}))
        rows = self.vision.encode(step.pixel_windows, step.patch_rows_cols, step.valid, step.merge_order)
        asked = Generation(
            **prompt_of(step), image_embeddings=rows.reshape(-1, rows.shape[-1]), sampling=sampling_of(step.context)
        )
        (receiver,) = self._answered([asked], runtime)
        seconds = time.perf_counter() - started_s
        if (written := sum(count for _, count in receiver.arrivals)) != tokens:
            raise InternalError(f"it wrote {written} of {tokens} tokens")
        first_s = receiver.arrivals[0][0] - started_s
        return {"prompt_tokens": len(step.input_ids), "tokens": tokens, "first_s": first_s, "seconds": seconds}

    def _text(self, ids: Sequence[int], tokens: int) -> Generation:
        return Generation(
            input_ids=np.array(ids, np.int64),
            position_ids=np.tile(np.arange(len(ids)), (3, 1)),
            image_index=np.full(len(ids), -1, np.int64),
            image_embeddings=np.zeros((0, self.hidden), np.float32),
            sampling=Sampling(max_new_tokens=tokens),
        )

    def _answered(self, asked: Sequence[Generation], runtime: DecoderRuntime) -> list[Receiver]:
        receivers = [Receiver() for _ in asked]
        for generation, receiver in zip(asked, receivers, strict=True):
            runtime.submit(generation, receiver)
        for receiver in receivers:
            receiver.done.wait()
            if receiver.error:
                raise receiver.error
        return receivers

    def close(self) -> None:
        """See `Peer.close`."""
        self.guessing.close()
        self.runtime.close()
        self.preprocessor.close()


@dataclass(frozen=True)
class Entrant:
    """One that is measured.

    Attributes
    ----------
    name, title : str
    kind : type of Peer
    folder : Path
        That it opens; empty where it cannot run.
    step_bytes : mapping of int to int
        Weights that a step of its decoder reads, by streams; empty where that is not known.
    why : str
        It cannot run; empty if it can.
    """

    name: str
    title: str
    kind: type[Peer]
    folder: Path = Path()
    step_bytes: Mapping[int, int] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each of them is asked in a round.

    Attributes
    ----------
    prompt, tokens : int
        Of each stream.
    streams : tuple of int
        At once; 1 first.
    flops : float
        Operations of a prompt.
    vocab : int
        Token ids of prompts are from its second quarter, where no control tokens are.
    profile, items
        The reading whose first word is waited for.
    report : int
        Tokens of a whole reading; 0: none is asked for.
    texts : list of list of int
        Recorded ones for who guesses, of so many tokens or shorter, the longest first.
    """

    prompt: int
    tokens: int
    streams: tuple[int, ...]
    flops: float
    vocab: int
    profile: ModelProfile
    items: Sequence
    report: int = 0
    texts: Sequence[list[int]] = ()

    def prompts(self, streams: int, seed: int) -> list[list[int]]:
        """Of `streams` answers, the same for each entrant and of no two streams."""
        ids = np.random.default_rng((seed, streams)).integers(self.vocab // 4, self.vocab // 2, (streams, self.prompt))
        return ids.tolist()


def plan_of(folder: Path, *, prompt: int, tokens: int, report: int = 0, **recorded: Path | None) -> Plan:
    """For the model of a bundle, with a phantom of a radiograph's size.

    Parameters
    ----------
    folder : Path
        Of the bundle.
    prompt, tokens, report : int
        See `Plan`.
    **recorded : Path, optional
        ``texts``, a JSON list of reports, and ``tokenizer`` for them, the bundle's by default.

    Raises
    ------
    InvalidRequest
        There is no text of `report` tokens, or no other.
    """
    bundle, texts = Bundle.open(folder, verify=False), list[list[int]]()
    if file := recorded.get("texts"):
        known = texts_of(folder, bundle, file, recorded.get("tokenizer"), 0)
        texts = sorted((ids[:report] for ids in known), key=len, reverse=True)
        if len(texts) < 2 or len(texts[0]) < report:
            raise InvalidRequest(f"{file}: two texts are needed, one of them of the {report} tokens of --report")
    rng = np.random.default_rng(0)
    picture = write_dicom(enlarge(phantom.draw(rng), *PICTURE, rng))
    return Plan(
        prompt=prompt,
        tokens=tokens,
        streams=STREAMS,
        flops=ModelWork.of(bundle).prefill(prompt).flops,
        vocab=bundle.geometry.vocab,
        profile=bundle.profile,
        items=[([picture], {"temperature": 0})],
        report=report,
        texts=texts,
    )


def entrants(bundles: Sequence[Path], checkpoint: Path, names: Iterable[str], work: Path) -> list[Entrant]:
    """Bundles, then peers, what those need made of the checkpoint."""
    found = []
    for folder in bundles:
        opened = Bundle.open(folder, verify=False)
        title = f"{(opened.manifest['recipe'] or {}).get('name') or opened.precision} ({opened.engine})"
        found.append(Entrant(folder.name, title, Ours, folder, _step_bytes(Ours, folder)))
    for name in names:
        kind = kind_of(name)
        why, folder, step = kind.missing(), Path(), dict[int, int]()
        if not why:
            click.echo(f"prepare {name}", err=True)
            try:
                folder = kind.prepare(checkpoint, work)
                step = _step_bytes(kind, folder)
            except (CxrError, OSError) as error:
                why = f"it takes nothing of this checkpoint: {error}"
        found.append(Entrant(name, kind.title, kind, folder, step, why))
    return found


def _step_bytes(kind: type[Peer], folder: Path) -> dict[int, int]:
    return {streams: kind.step_bytes(folder, streams) for streams in STREAMS}


def turn(entrant: Entrant, plan: Plan, seed: int) -> dict:
    """Everything about one of them, in a process of its own: how much of it was told, and what ended it early."""
    result: dict = {"load_s": None, "streams": {}, "first_word_s": None, "peak_resident_bytes": None}
    stolen, process = Stolen(), None
    try:
        process = start(entrant.kind, entrant.folder, plan.profile, plan.items)
        result["load_s"] = process.facts["ready_s"]
        process.call("write", plan.prompts(1, 0), 2)
        for streams in plan.streams:
            result["streams"][str(streams)] = process.call("write", plan.prompts(streams, seed), plan.tokens)
        if entrant.kind.scope == "reading":
            process.call("read", 0, 0, 1)
            first = process.call("read", 0, 0, 1)
            result |= {"first_word_s": first["seconds"], "first_word_prompt_tokens": first["prompt_tokens"]}
            if plan.report:
                result["report_s"] = process.call("read", 0, 0, plan.report)["seconds"]
            if plan.texts and entrant.kind.guesses:
                whole = sum(len(text) == plan.report for text in plan.texts)
                result["guessed"] = process.call("guess", 0, plan.texts, seed % whole)
        result["peak_resident_bytes"] = process.end()["peak_resident_bytes"]
    except Exception as error:  # whatever a library of others raises is a row's reason, and no end of the run
        result["why"] = str(error) if isinstance(error, CxrError) else f"{type(error).__name__}: {error}"
    finally:
        if process:
            process.kill()
    return result | {"stolen_share": stolen.share()}


def measure(chosen: Sequence[Entrant], plan: Plan, *, rounds: int, on_round: Callable[[dict], None]) -> dict:
    """All numbers of one run, as `--json` writes them; `on_round` gets them after each round, so that none is lost."""
    began, stolen, machine = datetime.now(UTC).isoformat(timespec="seconds"), Stolen(), environment()
    ceilings: list[dict] = []
    turns: list[list[dict]] = [[] for _ in chosen]
    result: dict = {}
    for index in range(rounds):
        ceilings.append(peaks())
        for each, before in zip(chosen, turns, strict=True):
            if not each.why and not any("why" in one for one in before):
                before.append(turn(each, plan, index + 1))
                click.echo(f"round {index + 1}/{rounds} {each.name}: {json.dumps(before[-1])}", err=True)
        limits = {key: _median(one[key] for one in ceilings) for key in ("read_bytes_per_s", "int8_ops_per_s")}
        result = {
            "schema": SCHEMA,
            "command": ["python -m cxr_triton.perf.peers", *sys.argv[1:]],
            "date": began,
            "turns": TURNS,
            "prompt_tokens": plan.prompt,
            "new_tokens": plan.tokens,
            **({"report_tokens": plan.report, "reports": REPORTS} if plan.report else {}),
            "rounds": index + 1,
            "prompt_operations": plan.flops,
            "ceilings": limits | {key: ceilings[-1][key] for key in ("int8_instruction", "why")} | {"rounds": ceilings},
            "peers": [_entry(each, theirs, turns[0], plan, limits) for each, theirs in zip(chosen, turns, strict=True)],
            "stolen_share": stolen.share(),
            "environment": machine,
        }
        on_round(result)
    return result


def _rate(streams: str, each: dict) -> float:
    """Of one turn, with so many streams."""
    return each["streams"][streams]["tokens_per_s"]


def _entry(
    entrant: Entrant, turns: list[dict], first: list[dict], plan: Plan, limits: Mapping[str, float | None]
) -> dict:
    """Medians over the rounds, and of each round's ratio to the first entrant."""
    why = entrant.why or next((each["why"] for each in turns if "why" in each), "")

    def median(pick: Callable[[dict], float], reason: str = why) -> dict:
        values = [value for each in turns if (value := _told(pick, each))]
        if not values:
            return {"value": None, "why": reason}
        pairs = [(_told(pick, ours), _told(pick, theirs)) for ours, theirs in zip(first, turns, strict=False)]
        ratios = [theirs / ours for ours, theirs in pairs if ours and theirs]
        return {"value": statistics.median(values), "of_first": _median(ratios), "rounds": values}

    prompt = median(lambda each: plan.prompt / each["streams"]["1"]["first_s"])
    rows = {"load_s": median(lambda each: each["load_s"]), "prompt_tokens_per_s": prompt}
    if prompt["value"]:
        ops = plan.flops * prompt["value"] / plan.prompt
        prompt |= {"top_per_s": ops / 1e12, "share_of_int8_peak": _share(ops, limits["int8_ops_per_s"])}
    for streams in plan.streams:
        row = median(functools.partial(_rate, str(streams)), why or NO_CROWD)
        if row["value"] and streams in entrant.step_bytes:
            read = entrant.step_bytes[streams] * row["value"] / streams
            row |= {"gb_per_s": read / 1e9, "share_of_read_bandwidth": _share(read, limits["read_bytes_per_s"])}
        rows[f"decode_tokens_per_s_{streams}"] = row
    rows["first_word_s"] = median(
        lambda each: each["first_word_s"], why or (NO_PICTURE if entrant.kind.scope == "decoder" else "")
    )
    if plan.report:
        rows["report_s"] = median(lambda each: each["report_s"], rows["first_word_s"].get("why", ""))
    if plan.texts:
        rows["guessed_report_s"] = median(lambda each: each["guessed"]["seconds"], why or NO_GUESSES)
    rows["peak_resident_bytes"] = median(lambda each: each["peak_resident_bytes"])
    return {
        "name": entrant.name,
        "title": entrant.title,
        "scope": entrant.kind.scope,
        "versions": entrant.kind.versions(),
        "step_weights_bytes": {str(streams): size for streams, size in entrant.step_bytes.items()},
        "rows": rows,
        "turns": turns,
    }


def _told(pick: Callable[[dict], float], each: dict) -> float | None:
    try:
        return pick(each)
    except KeyError:  # it ended before
        return None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _share(speed: float, limit: float | None) -> float | None:
    return speed / limit if limit else None


@click.command(cls=Command, extra="local")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--checkpoint", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--peer", "names", multiple=True, type=click.Choice(list(KINDS)), help="Of these alone.  [default: all]")
@click.option("--work", type=click.Path(path_type=Path), help="Keeps what peers make of the checkpoint.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--prompt", default=320, show_default=True, help="Tokens of each prompt.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of each answer.")
@click.option("--report", default=0, show_default=True, help="Tokens of a whole reading; 0: none is measured.")
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON list of recorded reports: BUNDLES write them too, guessing tokens.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="tokenizer.json for them.  [default: the first BUNDLE's]",
)
@click.option("--html", type=OUT_FILE, help="The same as bars on a page.")
@json_option
def main(bundles, checkpoint, names, json_path, **options):
    """Loading, prompts, decoding, first word and memory of BUNDLES and of what one would use instead, round by round.

    The Python that has a peer's packages is named by CXR_GENAI_PYTHON, CXR_VLLM_PYTHON, CXR_LLAMA_CPP_PYTHON and
    CXR_OPENVINO_GENAI_PYTHON, where it is not this one.
    """
    if options["texts"] and not options["report"]:
        raise click.UsageError("--texts needs --report, the tokens that are written of them")
    to_file = None if json_path == "-" else json_path
    os.environ.update(HUGE_PAGES | os.environ)  # for all of them, as `serve` sets it
    with ExitStack() as stack:
        work = options["work"]
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers")))
        named = {name: options[name] for name in ("prompt", "tokens", "report", "texts", "tokenizer")}
        plan = plan_of(bundles[0], **named)
        chosen = entrants(bundles, checkpoint.resolve(), names or KINDS, work)
        result = measure(chosen, plan, rounds=options["rounds"], on_round=lambda so_far: write_json(so_far, to_file))
    click.echo(table(result), err=json_path == "-")
    if options["html"]:
        write(options["html"], page(result))
    if json_path == "-":
        write_json(result, json_path)
