"""Towers side by side: `python -m cxr_triton.perf.tower BUNDLE BUNDLE...`, of one export, the first as reference."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.session import VisionSession
from cxr_triton.perf.environment import Stolen, environment
from cxr_triton.perf.workload import enlarge
from cxr_triton.phantom_file import write_dicom

if TYPE_CHECKING:
    from cxr_triton.engines.pipeline import StepTensors

SCHEMA = 1


def prepared(bundle: Bundle, size: tuple[int, int] | None = None) -> StepTensors:
    """A phantom and the prompt of the profile's default task, as the server prepares them.

    `size` are rows and columns that it is enlarged to.
    """
    from cxr_triton.engines.pipeline import Preprocessor

    rng = np.random.default_rng(0)
    drawn = phantom.draw(rng)
    if size:
        drawn = enlarge(drawn, *size, drawn.bits_stored, rng)
    with contextlib.closing(Preprocessor(bundle.path)) as preprocessor:
        return preprocessor.prepare([write_dicom(drawn)], "")


def inputs(step: StepTensors) -> tuple[dict[str, np.ndarray], int]:
    """Inputs of the tower, and the image's tokens."""
    names = ("pixel_windows", "patch_rows_cols", "valid", "merge_order")
    return {name: getattr(step, name) for name in names}, int((step.image_index >= 0).sum())


def measure(sessions: dict[str, VisionSession], feeds: dict[str, np.ndarray], tokens: int, rounds: int) -> dict:
    """Each tower once a round, after a round that does not count; embeddings beside those of the first."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    embeddings = {}
    for turn in range(rounds + 1):
        for name, session in sessions.items():
            started_s = time.perf_counter()
            embeddings[name] = session.encode(**feeds)[0, :tokens]
            if turn:
                seconds[name].append(time.perf_counter() - started_s)
    first = next(iter(sessions))
    ratios = {name: [a / b for a, b in zip(taken, seconds[first], strict=True)] for name, taken in seconds.items()}
    return {
        name: {
            "seconds": statistics.median(seconds[name]),
            "of_first": statistics.median(ratios[name]),
            "of_first_range": [min(ratios[name]), max(ratios[name])],
            **_cosine(embeddings[name], embeddings[first]),
        }
        for name in sessions
    }


def _cosine(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return {"cosine": float(cosine.mean()), "cosine_min": float(cosine.min())}


@click.command(cls=Command)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=5, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True, help="CPU cores of each.")
@click.option("--size", nargs=2, type=click.IntRange(1, 10_000), help="Rows and columns of the image.")
@json_option
def main(bundles: tuple[Path, ...], rounds: int, threads: int, size: tuple[int, int] | None, json_path: str | None):
    """Seconds that the towers of BUNDLES take for an image, in alternating rounds, and how far they agree."""
    opened = [Bundle.open(path, verify=False) for path in bundles]
    feeds, tokens = inputs(prepared(opened[0], size))
    stolen = Stolen()
    sessions = {
        f"{path.name}: {bundle.vision_engine} {bundle.vision_precision}": bundle.open_vision(threads=threads)
        for path, bundle in zip(bundles, opened, strict=True)
    }
    towers = measure(sessions, feeds, tokens, rounds)
    result = {
        "schema": SCHEMA,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m cxr_triton.perf.tower BUNDLE... --rounds {rounds} --threads {threads}"
        + (" --size {} {}".format(*size) if size else ""),
        "image_tokens": tokens,
        "towers": towers,
        "stolen": stolen.share(),
        "environment": environment(),
    }
    write_json(result, json_path)
    for name, tower in towers.items():
        click.echo(
            f"{name:40} {tower['seconds']:6.2f} s  {tower['of_first']:5.2f} of the first  "
            f"cosine {tower['cosine']:.5f}, worst token {tower['cosine_min']:.5f}",
            err=json_path == "-",
        )


if __name__ == "__main__":
    main()
