"""Engines of one model beside each other: ``python tests/integration/evaluation_engines.py --json RESULT``.

The demonstration model in fp32, int4, int4-awq and fp8 (as this host computes it, the stand-in of a GPU's engine), and
in fp32 with one layer damaged, reads the same held-out phantoms; each is compared with fp32.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click
import yaml

ROOT = Path(__file__).resolve().parents[2]
PHANTOM = ROOT / "tests" / "phantom"
sys.path[:0] = [str(PHANTOM)]

import evaluate  # noqa: E402
import layouts  # noqa: E402

from cxr_triton.cli import json_option, write_json  # noqa: E402
from cxr_triton.evaluate import compare, rows  # noqa: E402
from cxr_triton.evaluate.config import load_data  # noqa: E402
from cxr_triton.evaluate.kinds import Columns  # noqa: E402
from cxr_triton.evaluate.run import Server as Asked  # noqa: E402
from cxr_triton.evaluate.run import opened  # noqa: E402
from cxr_triton.evaluate.summary import summarize  # noqa: E402
from cxr_triton.perf.environment import environment  # noqa: E402
from cxr_triton.profile import load_profile  # noqa: E402
from cxr_triton.triton_repo.serve import Server  # noqa: E402

DAMAGED = "layers.3.self_attn.o_proj.weight"
"""Of the decoder's last layer: without it no token sees another there. Answers stay well formed."""
ENGINES = ("fp32", "int4", "int4-awq", "fp8", "damaged")


def weights(name: str, folder: Path) -> Path:
    """The checkpoint that an engine is exported from."""
    profile, plain = load_profile(PHANTOM / "profile.yaml"), PHANTOM / "checkpoint"
    if name in ("int4-awq", "fp8"):
        from cxr_triton.export.quantize import quantize_checkpoint

        out = folder / "weights"
        quantize_checkpoint(str(plain), out, profile, scheme=name, limit=16, device="cpu", progress=False)
        return out
    if name == "damaged":
        return damaged(plain, folder / "weights")
    return plain


def damaged(checkpoint: Path, out: Path) -> Path:
    """A copy in which the weights `DAMAGED` are 0."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    (key,) = [key for key in tensors if key.endswith(DAMAGED) and "visual" not in key]
    save_file(tensors | {key: 0 * tensors[key]}, path, metadata={"format": "pt"})
    return out


def repository(name: str, folder: Path) -> Path:
    """An engine, packaged."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.triton_repo.package import Settings, write_repository

    profile, precision = load_profile(PHANTOM / "profile.yaml"), "fp32" if name == "damaged" else name
    export_checkpoint(str(weights(name, folder)), folder / "export", profile, precision=precision, progress=False)
    bundle = build_bundle(folder / "export", folder / "bundle")
    write_repository(bundle.path, folder / "repository", Settings(threads=1), unverified=True)
    return folder / "repository"


@click.command()
@click.option("--count", default=300, show_default=True, help="Phantoms.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(ENGINES), help="Beside fp32.  [default: all]")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the results of the engines.")
@json_option
def main(count: int, engines: tuple[str, ...], keep: Path | None, json_path: str | None):
    """Compare engines of the demonstration model."""
    told: dict = {
        "schema": 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.argv],
    }
    told |= {
        "environment": environment(),
        "phantoms": count,
        "damaged": DAMAGED,
        "engines": {},
        "against_fp32": {},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = keep or Path(name)
        keys = layouts.write(folder / "data", "chexpert", "png", evaluate.held_out(count))
        (folder / "data.yaml").write_text(yaml.safe_dump({"path": "data", **keys}))
        results = {}
        for engine in dict.fromkeys(["fp32", *(engines or ENGINES)]):
            out = folder / f"{engine}.jsonl"
            if not out.exists():
                (folder / engine).mkdir(exist_ok=True)
                with (
                    Server(repository(engine, folder / engine), grpc_port=0, metrics_port=0, ready_timeout_s=600) as up,
                    opened(load_data(folder / "data.yaml", format=None), out) as evaluation,
                ):
                    evaluation.run(Asked(url=up.grpc, concurrency=4))
            read = rows.read(out)
            results[engine] = Columns(read.header, read)
            summary = summarize(results[engine])
            told["engines"][engine] = {key: summary[key] for key in ("measures", "codes", "studies")}
            if engine != "fp32":
                found = compare.compare(results["fp32"], results[engine])
                parted = {key: value for key, value in found["parted"].items() if key != "cases"}
                kept = {key: found[key] for key in ("verdict", "margin", "labels", "bootstrap")} | {"parted": parted}
                kept["measures"] = [entry for entry in found["measures"] if entry["decides"]]
                kept["packaged"] = compare.judge(summary, {}, found)["passed"]
                told["against_fp32"][engine] = kept
            click.echo(json.dumps({engine: told["against_fp32"].get(engine, {}).get("verdict")}), err=True)
    write_json(told, json_path)


if __name__ == "__main__":
    main()
