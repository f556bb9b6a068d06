"""Readings per second of a served bundle with drafts and without, in turn; no picture is read twice by a server.

    python tests/integration/drafts_served.py build/demo/bundle --json docs/results/drafts-served.json

Both servers are up all the time and are asked one after the other. Their texts are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import json_option, write_json
from cxr_triton.client import Reader
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.phantom_file import write_dicom
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.serve import Server

WAYS = ("with", "without")


def read(url: str, files: list[bytes], at_once: int) -> tuple[dict[str, float], list[str]]:
    """Every file once; readings per second, mean decoding time, and the texts."""
    with Reader(url) as reader, ThreadPoolExecutor(at_once) as pool:
        began_s = time.perf_counter()
        readings = list(pool.map(lambda file: reader.read(file).result(), files))
        seconds = time.perf_counter() - began_s
    decode_ms = statistics.fmean(reading.timings_ms["decode"] for reading in readings)
    return {"readings_per_s": len(files) / seconds, "decode_ms": decode_ms}, [reading.text for reading in readings]


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--readings", default=100, show_default=True, help="Of a turn.")
@click.option("--concurrency", "levels", multiple=True, type=int, default=(1, 8), show_default=True)
@click.option("--rounds", default=4, show_default=True, help="One more warms up.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of each graph.")
@json_option
def main(bundle, readings, levels, rounds, threads, json_path):
    rng, stolen = np.random.default_rng(17), Stolen()
    turns: dict[int, list[dict]] = {level: [] for level in levels}
    same = 0
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        urls = {}
        for way in WAYS:
            repository = Path(folder) / way
            write_repository(bundle, repository, Settings(threads=threads, drafts=way == "with"), unverified=True)
            server = Server(repository, grpc_port=0, metrics_port=0, ready_timeout_s=600)
            urls[way] = stack.enter_context(server).grpc
        for number in range(rounds + 1):
            for level in levels:
                files = [write_dicom(phantom.draw(rng)) for _ in range(readings)]
                told, texts = {}, {}
                for way in sorted(WAYS, reverse=number % 2 == 1):
                    told[way], texts[way] = read(urls[way], files, level)
                gain = told["with"]["readings_per_s"] / told["without"]["readings_per_s"]
                decode_gain = told["without"]["decode_ms"] / told["with"]["decode_ms"]
                click.echo(
                    f"round {number}/{rounds}, {level} at once: {gain:.3f} x, decoding {decode_gain:.3f} x", err=True
                )
                if number:
                    turns[level].append({**told, "gain": gain, "decode_gain": decode_gain})
                    same += sum(map(str.__eq__, texts["with"], texts["without"]))
    result = {
        "schema": 1,
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {**environment(), "stolen_share": stolen.share()},
        "readings": readings,
        "same_texts": same,
        "compared_texts": rounds * len(levels) * readings,
        "levels": {
            str(level): {
                "gain": statistics.median(turn["gain"] for turn in each),
                "decode_gain": statistics.median(turn["decode_gain"] for turn in each),
                "rounds": each,
            }
            for level, each in turns.items()
        },
    }
    for level, each in result["levels"].items():
        click.echo(
            f"{level} at once: {each['gain']:.3f} x the readings per second, decoding {each['decode_gain']:.3f} x"
        )
    click.echo(f"the same text in {same} of {result['compared_texts']}")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
