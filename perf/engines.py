"""Engines of the real 3B shape, built and weighed: `python -m cxr_triton.perf.engines RECIPE EXPORT...`.

Each plan is built in a process of its own, whose peak memory is noted; what the compiler reports for weights is held
against what the recipe computes, and a plan against the bytes of its graph's weights.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import click

from cxr_triton.cli import Command, json_option, write_json
from cxr_triton.engines import engine
from cxr_triton.engines.build import EXPORT, Job
from cxr_triton.engines.geometry import Geometry
from cxr_triton.engines.recipe import Recipe, load_recipe

SCHEMA = 1


def recipe_of(export: dict, recipe: Recipe) -> Recipe:
    """The recipe with the types that an export has."""
    compute = export["geometry"]["compute"]
    types = {"precision": export["precision"], "compute": compute, "head": export["head"], "kv": compute}
    return dataclasses.replace(
        recipe,
        vision=dataclasses.replace(recipe.vision, precision=compute),
        decoder=dataclasses.replace(recipe.decoder, **types),
        thresholds={},
    )


def measure(folder: Path, graph: str, recipe: Recipe, queue) -> None:
    """Build one plan, in a process of its own."""
    geometry = Geometry.from_json(json.loads((folder / EXPORT).read_bytes())["geometry"], EXPORT)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        job = Job(graph=graph, source=folder, geometry=geometry, chosen=recipe, out=Path(scratch))
        compiled = engine(getattr(recipe, graph).compiler).compile(job, Path(scratch))
    queue.put(
        (compiled.plan or {}) | {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    )


def compare(report: dict, graph: str, recipe: Recipe) -> dict:
    """A build report with its ratios: plan to weights, and what the recipe computes to what the compiler reports."""
    memory = recipe.memory()
    parts = ("vision_tower",) if graph == "vision" else ("decoder_layers", "embedding", "head")
    computed = sum(memory[part] for part in parts)
    ratios = {"recipe_cache_bytes": memory["kv_cache"]} if graph == "decoder" else {}
    return report | {
        **ratios,
        "bytes_to_weights": round(report["bytes"] / report["weights_bytes"], 4),
        "recipe_weights_bytes": computed,
        "recipe_to_reported": round(computed / report["reported"]["weights_bytes"], 4),
    }


@click.command(cls=Command, extra="rtx")
@click.argument("recipe")
@click.argument("exports", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def main(recipe: str, exports: tuple[Path, ...], json_path: str | None):
    """Build vision and decoder of each folder in EXPORTS for the card of RECIPE, with the types of the export.

    The vision plan, which depends on the compute type only, is built once for each of them.
    """
    base, done, rows, load = load_recipe(recipe), set(), [], os.getloadavg()[0]
    context = multiprocessing.get_context("spawn")
    for folder in exports:
        export = json.loads((folder / EXPORT).read_bytes())
        chosen = recipe_of(export, base)
        for graph in ("vision", "decoder"):
            kind = export["geometry"]["compute"] if graph == "vision" else export["precision"]
            if (graph, kind) in done:
                continue
            done.add((graph, kind))
            queue = context.SimpleQueue()
            process = context.Process(target=measure, args=(folder, graph, chosen, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise click.ClickException(f"{graph} {kind}: the build ended with {process.exitcode}")
            row = {"graph": graph, "precision": kind, "recipe": base.name} | compare(queue.get(), graph, chosen)
            rows.append(row)
            click.echo(
                f"{graph} {kind}: {row['seconds']} s, {row['bytes'] / 2**30:.2f} GiB, {row['bytes_to_weights']} of its "
                f"weights, recipe to reported {row['recipe_to_reported']}, "
                f"peak {row['peak_resident_bytes'] / 2**30:.1f} GiB",
                err=json_path == "-",
            )
    result = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average_before": load,
        "gpu": None,
        "plans": rows,
    }
    write_json(result, json_path)


if __name__ == "__main__":
    main()
