"""How a command of cxr-triton is run in the container of a recipe."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from cxr_triton.engines.recipe import Recipe, recipe_names


def in_container(recipe: Recipe, arguments: list, *, read: Iterable[Path], write: Path, env: dict | None = None) -> str:
    """`docker run` of cxr-triton in the recipe's container, as one line for a shell.

    The image is that of ``deploy/Dockerfile``, target ``engine``: the recipe's container with cxr-triton in it.

    Parameters
    ----------
    recipe : Recipe
    arguments : list
        Of `cxr-triton`; paths are the host's, which the container has too.
    read : iterable of Path
        Files and folders that it reads.
    write : Path
        Folder that it writes in; made by the user, or Docker would make it root's.
    env : dict, optional
        Variables of its environment.
    """
    parts = ["docker", "run", "--rm", "--gpus", "all", "--ipc", "host", "--ulimit", "memlock=-1"]
    parts += ["--user", f"{os.getuid()}:{os.getgid()}", "--volume", f"{write}:{write}"]
    for path in dict.fromkeys(read):
        parts += ["--volume", f"{path}:{path}:ro"]
    for name, value in (env or {}).items():
        parts += ["--env", f"{name}={value}"]
    image = f"cxr-triton-engine:{recipe.tag}"
    return f"{shlex.join(['mkdir', '-p', str(write)])} && {shlex.join([*parts, image, *map(str, arguments)])}"


def located_recipe(named: str) -> str | Path:
    """A recipe as a command can name it anywhere: a bundled one's name, or the whole path of a file."""
    return named if named in recipe_names() else Path(named).resolve()
