"""The whole way on this CPU with the demonstration model: export, build, package, serve, read, stop, write objects."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from cxr_triton import phantom
from cxr_triton.errors import InvalidRequest
from cxr_triton.extras import remedy
from cxr_triton.files import write

PHANTOM = Path(__file__).with_name("phantom")  # in a clone a link to tests/phantom
RADIOGRAPH = "RG1_J2KR.dcm"  # a public chest radiograph, JPEG 2000 lossless, in the package pydicom-data
PHANTOM_SEED = 30_000  # training draws from seeds below 10,000
NOTICE = (
    "This model is a test fixture: 4 million weights trained on synthetic phantoms. It knows nothing about people, and "
    "its reading of a real radiograph is meaningless.\n"
    "Research only; never for diagnosis."
)


def run(folder: Path, model: Path = PHANTOM) -> dict:
    """Run the demonstration in a folder and leave a reading, its page and its objects for each radiograph there.

    Parameters
    ----------
    folder : Path
        Made if absent; ``export``, ``bundle`` and ``repository`` in it are written anew.
    model : Path
        Folder of the demonstration model: ``checkpoint``, ``profile.yaml``.

    Returns
    -------
    dict
        Seconds of each step, and of each radiograph its files, objects, labels, status and time to the first text.

    Raises
    ------
    InvalidRequest
        The demonstration model or the public radiograph is not on this machine.
    ServerMismatch
        This Python cannot run the server.
    """
    from cxr_triton.triton_repo.serve import Server, installation

    if not (model / "checkpoint").is_dir():
        raise InvalidRequest(f"no demonstration model in {model}; run the demo from a clone of the repository")
    installation()
    started, seconds = time.monotonic(), {}

    def done(step: str, what: str) -> None:
        nonlocal started
        seconds[step] = round(time.monotonic() - started, 1)
        click.echo(f"{step:<8} {what}  ({seconds[step]} s)")
        started = time.monotonic()

    click.secho(NOTICE, bold=True)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"rg1": _radiograph(), "phantom": folder / "phantom.dcm"}
    drawn = _draw_phantom(files["phantom"])
    _package(folder, model, done)
    with Server(folder / "repository", grpc_port=0, metrics_port=0) as server:
        done("serve", f"Triton ready at {server.grpc}, log {server.log}")
        readings = {name: _read(name, file, folder, server.grpc) for name, file in files.items()}
        done("read", f"{len(readings)} radiographs")
    done("stop", "server and all its processes ended")
    if importlib.util.find_spec("highdicom"):
        for name, file in files.items():
            readings[name]["objects"] = _objects(name, file, folder)
        done("sr", f"DICOM and FHIR objects in {folder}")
    else:
        click.echo(f"sr       not run: no highdicom here; {remedy('objects')}")
    readings["phantom"]["drawn"] = drawn
    click.echo(f"The phantom was drawn with: {', '.join(drawn)}. Read: {', '.join(readings['phantom']['labels'])}.")
    for name in files:
        click.echo(f"{folder / name}.html")
    return {"seconds": seconds, "readings": readings}


def _package(folder: Path, model: Path, done: Callable[[str, str], None]) -> None:
    """Export, build and package."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile
    from cxr_triton.triton_repo.package import Settings, write_repository

    for name in ("export", "bundle"):
        shutil.rmtree(folder / name, ignore_errors=True)
    profile = load_profile(model / "profile.yaml")
    export_checkpoint(str(model / "checkpoint"), folder / "export", profile, precision="fp32")
    done("export", f"checkpoint to two graphs in {folder / 'export'}")
    bundle = build_bundle(folder / "export", folder / "bundle")
    done("build", f"engine bundle {bundle.digest[:12]} in {folder / 'bundle'}")
    settings = Settings(preprocess_instances=1)
    write_repository(folder / "bundle", folder / "repository", settings, force=True, unverified=True)
    done("package", f"Triton model repository in {folder / 'repository'}, unverified: the demo runs no `verify`")


def _radiograph() -> Path:
    """The public radiograph on this disk; nothing is downloaded."""
    from pydicom.data import get_testdata_file

    path = get_testdata_file(RADIOGRAPH, download=False)
    if path is None:
        raise InvalidRequest(f"no {RADIOGRAPH} here, which the package pydicom-data holds; {remedy('local')}")
    return Path(path)


def _draw_phantom(path: Path) -> list[str]:
    """Write a phantom as a DICOM file; the labels of its findings."""
    from cxr_triton.phantom_file import write_dicom

    drawn = phantom.draw(np.random.default_rng(PHANTOM_SEED))
    write(path, write_dicom(drawn, photometric="MONOCHROME1", syntax="jpeg_ls"))
    return list(drawn.labels)


def _read(name: str, file: Path, folder: Path, url: str) -> dict:
    """`cxr-triton read` on a file; what its reading says."""
    from cxr_triton.client.command import read
    from cxr_triton.reading import Reading

    out, page = folder / f"{name}.json", folder / f"{name}.html"
    _invoke(read, ["--url", url, "--json", str(out), "--html", str(page), str(file)])
    reading = Reading.from_json(out.read_bytes())
    return {
        "json": str(out),
        "html": str(page),
        "status": reading.status,
        "labels": [finding.label for finding in reading.findings],
        "first_token_ms": reading.timings_ms["first_token"],
        "total_ms": reading.timings_ms["total"],
    }


def _objects(name: str, file: Path, folder: Path) -> list[dict]:
    """`cxr-triton sr` on a file and its reading; the objects that it wrote."""
    from cxr_triton.client.objects.command import sr

    written = folder / f"{name}-objects.json"
    words = ["--reading", str(folder / f"{name}.json"), "--kinds", "findings_sr,text_sr,pdf,fhir"]
    _invoke(sr, [*words, "--out", str(folder), "--json", str(written), str(file)])
    return json.loads(written.read_text("utf-8"))["objects"]


def _invoke(verb: click.Command, words: list[str]) -> None:
    """Run a verb as a user would; what it has to say it says, and an answer that is not well formed is no failure."""
    click.secho(f"\n$ cxr-triton {verb.name} {' '.join(words)}", bold=True)
    with contextlib.suppress(SystemExit):
        verb.main(words, standalone_mode=False)
