"""Which extra of the distribution brings which module, and the pip command that adds one."""

from __future__ import annotations

import importlib.util
import json
import shlex
import tomllib
import urllib.parse
from importlib import metadata
from pathlib import Path

EXTRAS = tomllib.loads(Path(__file__).with_name("extras.toml").read_text("utf-8"))
"""extra: ``takes``, the extras that it takes in, and ``modules``, which it adds"""


def _modules(extra: str) -> set[str]:
    return set(EXTRAS[extra]["modules"]).union(*map(_modules, EXTRAS[extra].get("takes", ())))


def missing_modules(extra: str) -> set[str]:
    """Modules of an extra, and of those that it takes in, that are not here."""
    return {module for module in _modules(extra) if importlib.util.find_spec(module) is None}


def extra_of(module: str, asked: str | None = None) -> str | None:
    """The extra that brings a module: `asked` where it does, or where none is known to; else the first that adds it."""
    top = module.split(".", maxsplit=1)[0]
    if asked and top in _modules(asked):
        return asked
    return next((extra for extra, facts in EXTRAS.items() if top in facts["modules"]), asked)


def remedy(extra: str | None) -> str:
    """The pip command that adds an extra to this installation, which came from a clone or from a wheel on disk."""
    wanted = f"[{extra}]" if extra else ""
    # In the folder of a clone what its build left there comes first, which says nothing of an installation.
    for found in metadata.distributions(name="cxr-triton"):
        origin = json.loads(found.read_text("direct_url.json") or "{}")
        url = urllib.parse.urlsplit(origin.get("url", ""))
        path = Path(urllib.parse.unquote(url.path))
        if url.scheme == "file" and path.exists():
            editable = "-e " if origin.get("dir_info", {}).get("editable") else ""
            return f"run `pip install {editable}{shlex.quote(f'{path}{wanted}')}`"
    return f"run `pip install -e '.{wanted}'` in a clone of cxr-triton"


def require(*modules: str) -> None:
    """Raise now the `ModuleNotFoundError` that a later import would end in."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
