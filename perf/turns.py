"""What each turn of a conversation takes: `python -m cxr_triton.perf.turns REPOSITORY... --peer NAME=CHECKPOINT`.

Packaged repositories, and what one would serve with instead, are asked the same in alternating rounds: about a new
picture, then a second question after the answer, then another task on the picture; by one client, and by several at
once. One server is up at a time and takes no memory or processor time from another; each is loaded anew in every round.

Our servers are asked over gRPC, a peer over its chat API. Decoding of the file is free for a peer, which gets the
picture as PNG. Caches are on, as they come.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.errors import InternalError
from cxr_triton.perf.decoder import medians
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.perf.peers import parse, peer
from cxr_triton.perf.peers.peer import Peer
from cxr_triton.perf.reuse import ASKED, TURNS
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import write_dicom
from cxr_triton.profile import ModelProfile, load_profile

SCHEMA = 1
LIMIT_S = 3600.0
ROWS, COLUMNS = 2500, 2048

Ask = Callable[[int, dict[str, Any]], dict[str, Any]]
"""Of a picture's number and a REQUEST: the ``prompt`` as the model got it, which a history has to repeat, and ``text``,
``tokens``, ``prompt_tokens``, ``first_s`` and ``seconds``."""
Open = Callable[[Sequence[bytes]], contextlib.AbstractContextManager[Ask]]
"""A server of its own for these pictures."""


@contextlib.contextmanager
def ours(repository: Path, pictures: Sequence[bytes]) -> Iterator[Ask]:
    """A packaged repository, served."""
    from cxr_triton.client import Reader, Timeouts
    from cxr_triton.triton_repo.serve import Server

    limits = Timeouts(first_delta_s=LIMIT_S, idle_s=LIMIT_S, total_s=LIMIT_S)
    with (
        Server(repository, grpc_port=0, metrics_port=0, ready_timeout_s=LIMIT_S) as server,
        Reader(server.grpc, timeouts=limits) as reader,
    ):

        def ask(picture: int, request: dict[str, Any]) -> dict[str, Any]:
            started_s, first_s = time.perf_counter(), None
            stream = reader.read(pictures[picture], **request)
            for delta in stream:
                if delta and first_s is None:
                    first_s = time.perf_counter() - started_s
            reading = stream.result()
            return {
                "prompt": reading.prompt,
                "text": reading.text,
                "tokens": reading.usage["completion_tokens"],
                "prompt_tokens": reading.usage["prompt_tokens"],
                "first_s": first_s,
                "seconds": time.perf_counter() - started_s,
            }

        yield ask


@contextlib.contextmanager
def theirs(kind: type[Peer], checkpoint: Path, profile: ModelProfile, pictures: Sequence[bytes]) -> Iterator[Ask]:
    """A peer; nothing that it remembers of a picture is of another one's turns."""
    running = kind(str(checkpoint), profile, [([picture], {"prompt": ASKED[0]}) for picture in pictures])  # type: ignore[call-arg]
    try:
        yield running.ask
    finally:
        running.close()


def conversations(ask: Ask, chosen: Sequence[int], tokens: int) -> dict[str, dict[str, Any]]:
    """A conversation about each chosen picture, a turn of all at once; of each turn the medians and the rate."""
    histories: list[list[dict[str, str]]] = [[] for _ in chosen]
    turns: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(chosen)) as pool:
        for turn, prompt in zip(TURNS, ASKED, strict=True):
            known = [[] if turn == "other_task" else history for history in histories]
            requests = [
                {"prompt": prompt, "temperature": 0, "max_new_tokens": tokens}
                | ({"history": list(each)} if each else {})
                for each in known
            ]
            started_s = time.perf_counter()
            answers = list(pool.map(ask, chosen, requests))
            seconds = time.perf_counter() - started_s
            for history, answer in zip(histories, answers, strict=True):
                history += [
                    {"role": "user", "content": answer["prompt"]},
                    {"role": "assistant", "content": answer["text"]},
                ]
            first_s = [answer["first_s"] for answer in answers if answer["first_s"] is not None]
            if not first_s:
                raise InternalError(f"no answer to {prompt!r} had a text; nothing of this run counts")
            turns[turn] = {
                "first_s": statistics.median(first_s),
                "seconds": seconds,
                "tokens": sum(answer["tokens"] for answer in answers),
                "prompt_tokens": sum(answer["prompt_tokens"] for answer in answers),
                "tokens_per_s": sum(answer["tokens"] for answer in answers) / seconds,
            }
    return turns


def measure(
    servers: dict[str, Open],
    *,
    streams: Sequence[int],
    rounds: int,
    tokens: int,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Of each server and number of streams, the rounds and what they have in the middle.

    Parameters
    ----------
    servers : dict of str to Open
    streams : sequence of int
        Conversations at once.
    rounds : int
    tokens : int
        Longest answer.
    say : callable
        Takes a line of progress.
    keep : callable
        Takes what there is after each round, so that a later one that fails loses nothing.
    """
    found: dict[str, Any] = {
        name: {"load_s": [], **{f"streams_{count}": {"rounds": []} for count in streams}} for name in servers
    }
    number = 0
    for turn in range(1, rounds + 1):
        need = 1 + sum(streams)
        pictures = [_picture(number + i) for i in range(need)]
        number += need
        for name, opened in servers.items():
            say(f"round {turn}/{rounds}: {name} loads")
            started_s = time.perf_counter()
            with opened(pictures) as ask:
                found[name]["load_s"].append(time.perf_counter() - started_s)
                conversations(ask, [0], 2)  # warms up
                first = 1
                for count in streams:
                    told = conversations(ask, range(first, first + count), tokens)
                    first += count
                    found[name][f"streams_{count}"]["rounds"].append(told)
                    said = ", ".join(
                        f"{key} {each['first_s']:.2f} s, {each['tokens_per_s']:.2f} tok/s" for key, each in told.items()
                    )
                    say(f"round {turn}/{rounds}: {name}, {count} at once: {said}")
        _summarize(found, streams)
        keep(found)
    return found


def _picture(number: int) -> bytes:
    """A phantom of a radiograph's size, lossless."""
    rng = np.random.default_rng(number)
    return write_dicom(enlarge(phantom.draw(rng), ROWS, COLUMNS, 12, rng), syntax="jpeg_ls")


def _summarize(found: dict[str, Any], streams: Sequence[int]) -> None:
    for each in found.values():
        for count in streams:
            of = each[f"streams_{count}"]
            of["median"] = {turn: medians([told[turn] for told in of["rounds"]]) for turn in TURNS}
            first_s = of["median"][TURNS[0]]["first_s"]
            of["share_of_first_turn"] = {turn: of["median"][turn]["first_s"] / first_s for turn in TURNS[1:]}


@click.command(cls=Command, extra="local")
@click.argument("repositories", nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--peer", "peers", metavar="NAME=CHECKPOINT", multiple=True, help="Beside them; may be repeated.")
@click.option("--profile", default="chexone", show_default=True, help="Of the checkpoints.")
@click.option("--streams", multiple=True, type=click.IntRange(1), default=(1, 4), show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=32, show_default=True, help="Longest answer.")
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@json_option
def main(repositories, peers, profile, json_path, **sizes):
    """First words and speed of a first turn, a follow-up and another task on a picture, of servers in turn."""
    servers: dict[str, Open] = {path.name: functools.partial(ours, path) for path in repositories}
    if len(servers) < len(repositories):
        raise click.UsageError("two repositories are folders of one name; a result tells them apart by it")
    versions: dict[str, dict[str, str]] = {}
    for name, checkpoint in parse(peers, "--peer").items():
        kind = peer(name)
        if why := kind.missing() or ("" if kind.talks else "it holds no conversations"):
            raise click.UsageError(f"--peer {name}: {why}")
        if name in servers:
            raise click.UsageError(f"--peer {name}: a repository has that name too")
        servers[name] = functools.partial(theirs, kind, checkpoint, load_profile(profile))
        versions[name] = kind.versions()
    if not servers:
        raise click.UsageError("name a repository, or a --peer")
    began, stolen, machine = datetime.now(UTC).isoformat(timespec="seconds"), Stolen(), environment()

    def keep(found: dict[str, Any]) -> None:
        result = {
            "schema": SCHEMA,
            "command": ["python", "-m", "cxr_triton.perf.turns", *sys.argv[1:]],
            "date": began,
            "environment": {**machine, "stolen_share": stolen.share()},
            "peers": versions,
            "options": {name: value for name, value in os.environ.items() if re.fullmatch(r"CXR_\w+_OPTIONS", name)},
            "tokens": sizes["tokens"],
            "servers": found,
        }
        if json_path != "-" or len(found[next(iter(found))]["load_s"]) == sizes["rounds"]:
            write_json(result, json_path)

    found = measure(servers, say=functools.partial(click.echo, err=True), keep=keep, **sizes)
    for name, each in found.items():
        for count in sizes["streams"]:
            of = each[f"streams_{count}"]
            shares = ", ".join(f"{turn} {share:.1%}" for turn, share in of["share_of_first_turn"].items())
            first = of["median"][TURNS[0]]
            told = f"first word after {first['first_s']:.2f} s, {first['tokens_per_s']:.2f} tok/s"
            click.echo(f"{name}, {count} at once: {told}; of that time {shares}", err=json_path == "-")


if __name__ == "__main__":
    main()
