"""Processor time of an evaluation's measures: `python tests/bench/measures.py`. Not part of the test suite.

Rows are made up: CheXpert's 14 labels, a score of each, and five groupings. Intervals have 1,000 resamples, a
comparison 2,000.
"""

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluations

from cxr_triton.cli import json_option, write_json
from cxr_triton.evaluate.compare import compare
from cxr_triton.evaluate.kinds import Columns
from cxr_triton.evaluate.summary import summarize
from cxr_triton.evaluate.vocabulary import CHEXPERT
from cxr_triton.perf.environment import environment


def columns(studies: int, *, engine: int, scores: bool) -> Columns:
    """A result of so many studies."""
    header, rows = evaluations.result(studies=studies, engine=engine, scores=scores)
    sources = itertools.cycle("ABC")
    return Columns(header, [replace(row, groups={**row.groups, "source": next(sources)}) for row in rows])


@click.command(help=__doc__)
@click.option("--studies", default=20_000, show_default=True)
@json_option
def main(studies, json_path):
    evaluations.LABELS = (*sorted(set(CHEXPERT) - {"No Finding"}), "No Finding")
    plain, other = (columns(studies, engine=engine, scores=False) for engine in (0, 1))
    scored = columns(studies, engine=0, scores=True)
    ways = {
        "summary": lambda: summarize(plain),
        "summary_with_scores": lambda: summarize(scored),
        "comparison": lambda: compare(plain, other),
    }
    result = {"command": ["python", *sys.argv], "environment": environment(), "studies": studies}
    for name, run in ways.items():
        wall_s, processor_s = time.perf_counter(), time.process_time()
        run()
        result[name] = {
            "processor_s": round(time.process_time() - processor_s, 1),
            "wall_s": round(time.perf_counter() - wall_s, 1),
        }
        click.echo(f"{name}: {result[name]}")
    write_json(result, json_path)


if __name__ == "__main__":
    main()
