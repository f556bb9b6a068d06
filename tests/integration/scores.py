"""What scores are worth on phantoms, where the truth is known: ``python tests/integration/scores.py --json RESULT``.

One served demonstration model in fp32. Every phantom is read with scores; a label's AUROC by its scores stands beside
that of a yes or no by whether the answer lists it. What scores cost is their time beside that of the answer, of single
readings, one at a time; and of each ``--bundle``, such as one of the 3B shape, a run of some tokens beside a step.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
sys.path[:0] = [str(PHANTOM)]

import evaluate  # noqa: E402

from cxr_triton import phantom, phantom_file  # noqa: E402
from cxr_triton.cli import Command, json_option, write_json  # noqa: E402
from cxr_triton.client import Reader  # noqa: E402
from cxr_triton.engines.build import build_bundle  # noqa: E402
from cxr_triton.engines.bundle import Bundle  # noqa: E402
from cxr_triton.evaluate.intervals import Resamples  # noqa: E402
from cxr_triton.evaluate.measures import ranking  # noqa: E402
from cxr_triton.export.export import export_checkpoint  # noqa: E402
from cxr_triton.perf.environment import environment  # noqa: E402
from cxr_triton.profile import load_profile  # noqa: E402
from cxr_triton.triton_repo.package import Settings, write_repository  # noqa: E402
from cxr_triton.triton_repo.serve import Server  # noqa: E402

RUN_TOKENS, RUN_ROUNDS, HELD = (5, 9, 13), 7, 300
LABELS = (*phantom.LABELS, "No Finding")
TIMED = 30


def repository(folder: Path) -> Path:
    """The demonstration model in fp32, ready to be served."""
    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    return folder / "repository"


def auroc(truth: np.ndarray, scores: np.ndarray) -> tuple[float, list[float]]:
    """AUROC and its interval of 95 %, by resampling phantoms."""
    resamples = Resamples([str(i) for i in range(len(truth))], count=2000, seed=0)
    values = ranking(truth, scores, np.arange(len(truth)), resamples)["auroc"]
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return round(float(values[0]), 5), [round(float(low), 5), round(float(high), 5)]


def by_label(phantoms, readings) -> dict[str, dict]:
    """AUROC of each label by its scores and by a yes or no, and in how many answers the label is wrong."""
    found = {}
    for label in LABELS:
        drawn = np.array([label in each.labels for each in phantoms])
        said = np.array([label in [finding.label for finding in reading.findings] for reading in readings])
        scores = np.array([reading.scores[label] for reading in readings])
        value, interval = auroc(drawn, scores)
        found[label] = {
            "drawn": int(drawn.sum()),
            "wrong": int((drawn != said).sum()),
            "auroc_scores": value,
            "auroc_scores_95": interval,
            "auroc_yes_no": auroc(drawn, said.astype(float))[0],
            "least_of_drawn": round(float(scores[drawn].min()), 2),
            "most_of_others": round(float(scores[~drawn].max()), 2),
        }
    return found


def run_cost(path: Path) -> dict:
    """Medians of a step of one stream and of runs of several tokens, in alternating rounds after one that warms up."""
    bundle = Bundle.open(path, verify=False)
    session, random = bundle.open_decoder(slots=1), np.random.default_rng(0)
    vocab, no_image = session.vocab, np.zeros((0, session.hidden), np.float32)
    prompt = random.integers(0, vocab, HELD), np.full(HELD, -1, np.int64), no_image, np.tile(np.arange(HELD), (3, 1))
    session.prefill(0, *prompt, is_last=True)
    took: dict[int, list[float]] = {tokens: [] for tokens in (1, *RUN_TOKENS)}
    for _ in range(1 + RUN_ROUNDS):
        for tokens, seconds in took.items():
            began_s = time.perf_counter()
            session.score(0, HELD, random.integers(0, vocab, tokens), np.arange(HELD, HELD + tokens))
            seconds.append(time.perf_counter() - began_s)
    medians = {tokens: statistics.median(seconds[1:]) for tokens, seconds in took.items()}
    return {
        "engine": bundle.engine,
        "precision": bundle.precision,
        "layers": bundle.geometry.layers,
        "hidden": bundle.geometry.hidden,
        "held_tokens": HELD,
        "rounds": RUN_ROUNDS,
        "step_ms": round(1e3 * medians[1], 2),
        "steps_that_a_run_takes": {str(tokens): round(medians[tokens] / medians[1], 2) for tokens in RUN_TOKENS},
    }


@click.command(cls=Command, extra="export")
@click.option("--count", default=300, show_default=True, help="Held-out phantoms.")
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Measure a run of its decoder too.",
)
@json_option
def main(count: int, bundles: tuple[Path, ...], json_path: str | None):
    """Scores of held-out phantoms, held against what was drawn."""
    phantoms = evaluate.held_out(count)
    syntaxes = list(phantom_file.SYNTAXES)
    files = [
        phantom_file.write_dicom(each, photometric=evaluate.variant(i)[1], syntax=syntaxes[i % len(syntaxes)])
        for i, each in enumerate(phantoms)
    ]
    with tempfile.TemporaryDirectory() as folder:
        with Server(repository(Path(folder)), grpc_port=0, metrics_port=0) as server:
            with Reader(server.grpc) as reader, ThreadPoolExecutor(8) as pool:
                readings = list(pool.map(lambda data: reader.read([data], scores=True).result(), files))
                alone = [reader.read([data], scores=True).result() for data in files[:TIMED]]
    result = {
        "schema": 1,
        "command": " ".join(
            ["python tests/integration/scores.py", *["--bundle BUNDLE"] * len(bundles), "--json RESULT"]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(),
        "engine": "onnxruntime",
        "precision": "fp32",
        "phantoms": count,
        "scored": sum(bool(reading.scores) for reading in readings),
        "labels": by_label(phantoms, readings),
        "same_alone_and_among_8": {
            "readings": len(alone),
            "equal": sum(a.scores == b.scores for a, b in zip(alone, readings, strict=False)),
            "largest_difference": max(
                abs(a.scores[name] - b.scores[name]) for a, b in zip(alone, readings, strict=False) for name in a.scores
            ),
        },
        "median_tokens": {
            name: statistics.median(reading.usage[name] for reading in readings)
            for name in ("prompt_tokens", "completion_tokens", "scored_tokens")
        },
        "median_ms_alone": {
            stage: round(statistics.median(reading.timings_ms[stage] for reading in alone), 2)
            for stage in ("prefill", "decode", "scores", "total")
        },
    }
    if bundles:
        result["runs"] = [run_cost(bundle) for bundle in bundles]
    for label, row in result["labels"].items():
        click.echo(f"{label:<20} scores {row['auroc_scores']:.4f}  yes or no {row['auroc_yes_no']:.4f}", err=True)
    write_json(result, json_path)


if __name__ == "__main__":
    main()
