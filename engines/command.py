"""`cxr-triton build`: an export folder becomes an engine bundle; `cxr-triton recipes`: what it can be built for."""

from __future__ import annotations

import time
from pathlib import Path

import click

from cxr_triton.cli import OUT_FOLDER, RECIPES, json_option, printable, say_next, write_json
from cxr_triton.engines import DEFAULT

GIB = 1 << 30


@click.command()
@click.argument("export_dir", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("-o", "--out", required=True, type=OUT_FOLDER, help="Folder of the bundle; must be new.")
@click.option(
    "--recipe",
    shell_complete=RECIPES,
    metavar="NAME|YAML",
    help=f"Target; see `recipes`.  [default: cpu for int4, which is that of this processor; else {DEFAULT}]",
)
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), help="Folder of compiled plans.")
@click.option("--no-cache", is_flag=True, help="Compile, whatever was compiled before.")
@click.option(
    "--print", "only_print", is_flag=True, help="Of a recipe that builds in a container: show how, build nothing."
)
@json_option
def build(export_dir: Path, out: Path, *, recipe, cache, no_cache, only_print, json_path):
    """Compile the graphs in EXPORT_DIR into an engine bundle.

    The bundle is a folder that holds everything a server needs, and a manifest with the SHA-256 of each file. Some
    recipes have it built in their container, on their GPU.
    """
    from tqdm import tqdm

    from cxr_triton.engines.build import build_bundle, recipe_for
    from cxr_triton.engines.plan_cache import default_folder
    from cxr_triton.engines.recipe import CPU, load_recipe

    if cache and no_cache:
        raise click.UsageError("--cache and --no-cache exclude each other")
    started_s = time.monotonic()
    if only_print:
        _print_commands(export_dir, out, recipe, json_path)
        return
    chosen = load_recipe(recipe) if recipe else recipe_for(export_dir)
    if chosen and recipe in (None, CPU):
        click.echo(f"recipe {chosen.name}, which is this processor's; --recipe takes another one", err=True)
    total = sum(file.stat().st_size for file in export_dir.rglob("*") if file.is_file())
    with tqdm(total=total, desc=out.name, unit="B", unit_scale=True, disable=None) as bar:
        bundle = build_bundle(
            export_dir,
            out,
            recipe=chosen,
            cache=None if no_cache else cache or default_folder(),
            progress=lambda name, count: bar.update(count),
        )
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    result = {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "engine": bundle.engine,
        "vision_engine": bundle.vision_engine,
        "precision": bundle.precision,
        "profile": bundle.profile.name,
        "recipe": chosen.name if chosen else None,
        "plans": bundle.manifest.get("plans", {}),
        "container": bundle.manifest.get("container"),
        "bytes": size,
        "seconds": round(time.monotonic() - started_s, 1),
    }
    click.echo(
        printable(
            f"{bundle.path}: {bundle.profile.name}, {bundle.precision} for {bundle.engine}, "
            f"{size / GIB:.2f} GiB, digest {bundle.digest[:12]}"
        ),
        err=json_path == "-",
    )
    for graph, plan in result["plans"].items():
        click.echo(
            printable(
                f"{graph}: {plan['engine']} {plan['version']} for {plan['gpu'] or plan['compute_capability']}, "
                f"{plan['bytes'] / GIB:.2f} GiB, {plan['bytes'] / plan['weights_bytes']:.3f} of its weights, "
                f"compiled in {plan['seconds']} s"
            ),
            err=json_path == "-",
        )
        for setting in plan.get("changed", ()):
            click.echo(
                f"{graph}: {setting['name']} {setting['built']}, not {setting['asked']}: the compiler's choice",
                err=True,
            )
    if result["container"]:
        click.echo(printable(result["container"]["said"]), err=True)
    write_json(result, json_path)
    say_next("verify", out, "--checkpoint", "CHECKPOINT", "--images", "RADIOGRAPHS")


def _print_commands(export_dir: Path, out: Path, named: str | None, json_path: str | None) -> None:
    """Show how a bundle is built in a container, with what and where."""
    import shlex

    from cxr_triton.engines import ROOMS, engine
    from cxr_triton.engines.build import Job, read_export
    from cxr_triton.engines.recipe import load_recipe

    recipe = load_recipe(named) if named else None
    if named is None or recipe is None or not engine(recipe.decoder.compiler).in_container:
        known = " or ".join(name for name in ROOMS if engine(name).in_container)
        raise click.UsageError(f"--print needs a recipe whose decoder is for {known}, see `cxr-triton recipes`")
    _, geometry = read_export(export_dir, recipe)
    export_dir, out = export_dir.resolve(), out.resolve()
    job = Job(graph="decoder", source=export_dir, geometry=geometry, chosen=recipe, out=out)
    commands = engine(recipe.decoder.compiler).commands(job, named)
    if json_path != "-":
        for said, line in commands.values():
            click.echo(printable(f"# {said}\n{line if isinstance(line, str) else shlex.join(line)}"))
    write_json({"recipe": recipe.name} | {key: line for key, (_, line) in commands.items()}, json_path)


@click.command()
@click.argument("name", required=False, shell_complete=RECIPES)
@json_option
def recipes(name: str | None, json_path: str | None):
    """List the targets that bundles are built for, or show one: NAME, or your own YAML file.

    Memory is computed for the published 3B: weights and KV cache exactly, activations and CUDA as an allowance.
    """
    from cxr_triton.engines.cpu import Cpu
    from cxr_triton.engines.recipe import CPU, load_recipe, recipe_names, recipe_of

    chosen = [load_recipe(one) for one in ([name] if name else recipe_names())]
    result = [recipe.to_json() | {"memory": recipe.memory()} for recipe in chosen]
    if json_path != "-":
        click.echo(
            f"{'recipe':18}{'target':26}{'decoder':10}{'engine':14}{'slots':>6}{'weights':>9}{'KV':>7}{'total':>7}"
            f"{'card':>7}  GiB"
        )
        for recipe, row in zip(chosen, result, strict=True):
            memory = row["memory"]
            weights = sum(memory[part] for part in ("decoder_layers", "embedding", "head", "vision_tower"))
            sizes = (weights, memory["kv_cache"], memory["total"], memory["card"])
            click.echo(
                printable(f"{recipe.name:18}{recipe.gpu or 'CPU':26}{recipe.decoder.precision:10}")
                + f"{recipe.decoder.compiler:14}{recipe.slots:6}{sizes[0] / GIB:9.2f}"
                + "".join(f"{size / GIB:7.2f}" for size in sizes[1:])
            )
        if not name:
            click.echo(f"{CPU} is {recipe_of(Cpu.here()).name} on this processor")
    if name and json_path != "-":
        import yaml

        click.echo("\n" + yaml.safe_dump(result[0] | {"memory": result[0]["memory"]}, sort_keys=False).rstrip())
    write_json(result[0] if name else {"recipes": result}, json_path)
