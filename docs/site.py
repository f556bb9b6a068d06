"""What mkdocs takes from outside docs/: other documents, files that pages link to, the packages, the CLI's help.

A page keeps the path that it has in the repository, without docs/ in front, and links are written for the repository.
So one rule makes each of them right on the site.
"""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from cxr_triton import cli

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("*.md", "deploy/README.md", "examples/**/README.md", "tests/phantom/README.md")
PACKAGES = ROOT / "build" / "packages"
CLI_PAGE = "reference/cli.md"
LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_startup(command: str, dirty: bool) -> None:
    """Copy the packages as they are imported to where mkdocstrings reads them (`paths` in mkdocs.yml)."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(PACKAGES, ignore_errors=True)
    for name, folder in folders.items():
        for path in (ROOT / folder).rglob("*.py"):
            copy = PACKAGES / name.replace(".", "/") / path.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents outside docs/, the command line's page, and every file that a page links to."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            _add(files, config, path)
    for page in [*files.documentation_pages()]:
        for target in _linked(page.src_uri, page.content_string):
            _add(files, config, target)
    files.append(File.generated(config, CLI_PAGE, content=_cli_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between places in the repository into links between places on the site."""
    here = os.path.dirname(page.file.src_uri)

    def moved(link: re.Match[str]) -> str:
        if "://" in link[1] or not (target := _target(page.file.src_uri, link[1])).exists():
            return link[1]
        return os.path.relpath(_uri(target), here or ".")

    return LINK.sub(moved, markdown)


def _add(files: Files, config: MkDocsConfig, path: Path) -> None:
    if path.is_file() and files.get_file_from_path(_uri(path)) is None:
        files.append(File.generated(config, _uri(path), abs_src_path=str(path)))


def _uri(path: Path) -> str:
    """The place on the site of a file of the repository."""
    return path.relative_to(ROOT).as_posix().removeprefix("docs/")


def _target(uri: str, link: str) -> Path:
    """The file of the repository that a page's link leads to."""
    inside = ROOT / "docs" / uri
    return Path(os.path.normpath((inside if inside.exists() else ROOT / uri).parent / link))


def _linked(uri: str, markdown: str) -> Iterator[Path]:
    for link in LINK.findall(markdown):
        target = _target(uri, link)
        if "://" not in link and target.is_relative_to(ROOT):
            yield target


def _cli_page() -> str:
    context = click.Context(cli.main, info_name="cxr-triton", **cli.main.context_settings)
    parts = ["# Command line", "What each command says with `-h`. Exit statuses: [install](../install.md#exit-status)."]
    return "\n\n".join([*parts, *_help(cli.main, context)])


def _help(command: click.Command, context: click.Context) -> Iterator[str]:
    if isinstance(command, cli.NotInstalled):
        raise PluginError(f"{context.command_path}: {command.help}")
    yield f"## {context.command_path}"
    yield f"```text\n{command.get_help(context)}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            yield from _help(inner, click.Context(inner, info_name=name, parent=context))
