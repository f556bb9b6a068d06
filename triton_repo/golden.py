"""`cxr-triton golden`: a running server against the reference readings that `make-engine` left.

The gate cannot run an engine that only Triton opens: it judges the same weights in a stand-in. What is served is judged
here, against what transformers said of the same images, alone and among other requests.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, median

import click

from cxr_triton.cli import EXIT_FAILED, json_option, printable, write_json
from cxr_triton.client.command import connect, connection
from cxr_triton.client.reader import Reader
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.verify.answers import MEASURES, Answer, agreement_of
from cxr_triton.engines.verify.record import IN_ENGINE
from cxr_triton.errors import InvalidRequest, ServerMismatch
from cxr_triton.profile import ModelProfile
from cxr_triton.reading import Reading
from cxr_triton.request import ReadRequest

SCHEMA = 1


def hold(
    engine: Path, images: Path | None, reader: Reader, *, concurrency: int, progress: Callable[[], object]
) -> dict:
    """Read the images of a verification record through a server and compare with the reference.

    Parameters
    ----------
    engine : Path
        Folder of `cxr-triton make-engine`.
    images : Path, optional
        Folder with the images that it was verified on; its own phantoms by default.
    reader : Reader
    concurrency : int
        Readings at a time in the second of two rounds; in the first each is alone.
    progress : callable
        Called after each reading.

    Returns
    -------
    dict
        ``passed``, ``rounds`` (``alone`` and ``together``, each with ``images``, ``agreement`` by the measure that the
        recipe's threshold is about, ``identical`` texts, ``ok`` answers, ``median_tokens_per_s``, ``seconds``),
        ``limits``, ``reference``, ``bundle`` and ``server``.

    Raises
    ------
    InvalidRequest
        The folder holds no record, or an image of it is missing.
    ServerMismatch
        The server serves another bundle.
    CxrError
        A reading failed.
    """
    record, bundle = _record(engine), Bundle.open(engine / "bundle", verify=False)
    cases = record["details"]["images"]
    pictures = _pictures(images or engine / "phantoms", {case["sha256"] for case in cases})
    info = reader.server_info()

    def read(case: dict) -> Reading:
        reading = reader.read([pictures[case["sha256"]]], **case["request"]).result()
        if reading.model.get("bundle") != bundle.digest:
            raise ServerMismatch(
                f"the server serves bundle {str(reading.model.get('bundle'))[:12]}, {engine} holds "
                f"{bundle.digest[:12]}; serve the repository of this folder"
            )
        progress()
        return reading

    rounds = {}
    for name, workers in (("alone", 1), ("together", concurrency)):
        started_s = time.monotonic()
        with ThreadPoolExecutor(workers) as pool:
            readings = list(pool.map(read, cases))
        rounds[name] = _measured(cases, readings, bundle.profile) | {"seconds": round(time.monotonic() - started_s, 1)}
    limits = {kind: record["thresholds"][kind] for kind in set(MEASURES.values())}
    agreed = [item for measured in rounds.values() for item in measured["agreement"].items()]
    return {
        "schema": SCHEMA,
        "passed": all(agreement >= limits[kind] for kind, agreement in agreed),
        "rounds": rounds,
        "limits": limits,
        "reference": record["reference"],
        "bundle": {
            "digest": bundle.digest,
            "engine": bundle.engine,
            "precision": bundle.precision,
            "versions": bundle.manifest["versions"],
            "recipe": (bundle.manifest.get("recipe") or {}).get("name"),
        },
        "server": {"name": info.name, "version": info.version},
    }


def _record(engine: Path) -> dict:
    path = engine / IN_ENGINE
    try:
        record = json.loads(path.read_bytes())
        record["details"]["images"][0]["reference"]["text"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InvalidRequest(
            f"{path} is no record of readings ({type(error).__name__}); give the folder of a make-engine that verified"
        ) from None
    return record


def _pictures(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    """Files by their SHA-256."""
    found = {}
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.is_file():
            data = file.read_bytes()
            found[hashlib.sha256(data).hexdigest()] = data
    if missing := wanted - set(found):
        raise InvalidRequest(
            f"{len(missing)} of the {len(wanted)} images of the record are not in {folder}; give the folder that "
            "make-engine verified on with --images"
        )
    return found


def _measured(cases: Sequence[dict], readings: Sequence[Reading], profile: ModelProfile) -> dict:
    held: dict[str, list[float]] = {}
    for case, reading in zip(cases, readings, strict=True):
        asked = ReadRequest.from_json(json.dumps(case["request"]), profile)
        text, tokens, reason = (case["reference"][key] for key in ("text", "tokens", "finish_reason"))
        theirs = Answer.of(text, tokens, reason, asked, profile)
        held.setdefault(MEASURES[asked.answer], []).append(agreement_of(asked.answer, reading, theirs.parsed))
    speeds = [
        (reading.usage["completion_tokens"] - 1) / reading.timings_ms["decode"] * 1e3
        for reading in readings
        if reading.timings_ms.get("decode")
    ]
    return {
        "images": len(readings),
        "agreement": {kind: fmean(values) for kind, values in held.items()},
        "identical": fmean(r.text == c["reference"]["text"] for c, r in zip(cases, readings, strict=True)),
        "ok": fmean(reading.status == "ok" for reading in readings),
        "median_tokens_per_s": median(speeds) if speeds else None,
    }


@click.command()
@click.argument("engine", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--images",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The images that ENGINE was verified on.  [default: its phantoms]",
)
@click.option("--concurrency", type=click.IntRange(2, 256), default=16, show_default=True, help="Of the second round.")
@connection
@json_option
def golden(engine: Path, images: Path | None, concurrency: int, json_path: str | None, **where):
    """Hold a running server against the reference readings in ENGINE, a folder that `make-engine` wrote.

    Reads every image of the verification record twice, alone and among others, and compares with what transformers said
    of it. Exit status 1 where answers agree less than the recipe asks for, or another bundle is served.
    """
    from tqdm import tqdm

    with tqdm(unit="reading", disable=None, leave=False) as bar, connect(images or engine, **where) as reader:
        result = hold(engine, images, reader, concurrency=concurrency, progress=bar.update)
    for line in summary(result):
        click.echo(printable(line), err=json_path == "-")
    write_json(result, json_path)
    if not result["passed"]:
        raise SystemExit(EXIT_FAILED)


def summary(result: dict) -> list[str]:
    """A line for each round of `hold`, and the verdict."""
    lines = []
    for name, measured in result["rounds"].items():
        agreed = ", ".join(
            f"{kind} {value:.3f} (at least {result['limits'][kind]:g})" for kind, value in measured["agreement"].items()
        )
        speed = measured["median_tokens_per_s"]
        lines.append(
            f"{name:<9}{measured['images']} readings in {measured['seconds']} s: {agreed}; the same text in "
            f"{measured['identical']:.0%}; well-formed {measured['ok']:.0%}"
            + (f"; {speed:.1f} tokens/s each" if speed else "")
        )
    bundle, server = result["bundle"], result["server"]
    lines.append(
        f"{'passed' if result['passed'] else 'REFUSED'}: {bundle['engine']} {bundle['precision']}, bundle "
        f"{bundle['digest'][:12]}, {printable(server['name'])} {printable(server['version'])}, against "
        f"transformers {result['reference']['versions']['transformers']}"
    )
    return lines
