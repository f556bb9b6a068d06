"""`cxr-triton build`: an export folder becomes an engine bundle."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cxr_triton.cli import json_option, write_json


@click.command()
@click.argument("export_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the bundle; must be new.")
@click.option("--compiler", type=click.Choice(["onnxruntime"]), default="onnxruntime", show_default=True)
@json_option
def build(export_dir: Path, out: Path, compiler: str, json_path: str | None):
    """Compile the graphs in EXPORT_DIR into an engine bundle.

    The bundle is a folder that holds everything a server needs, and a manifest with the SHA-256 of each file.
    """
    from tqdm import tqdm

    from .bundle import build_bundle

    started_s = time.monotonic()
    total = sum(file.stat().st_size for file in export_dir.iterdir() if file.is_file())
    with tqdm(total=total, desc=out.name, unit="B", unit_scale=True, disable=None) as bar:
        bundle = build_bundle(export_dir, out, compiler=compiler, progress=lambda name, count: bar.update(count))
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    result = {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "engine": bundle.engine,
        "precision": bundle.precision,
        "profile": bundle.profile.name,
        "bytes": size,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    click.echo(
        f"{bundle.path}: {bundle.profile.name}, {bundle.precision} for {bundle.engine}, "
        f"{size / 2**30:.2f} GiB, digest {bundle.digest[:12]}",
        err=json_path == "-",
    )
    write_json(result, json_path)
