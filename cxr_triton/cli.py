"""Root of the `cxr-triton` command line; each verb imports its own world only when it is called."""

from __future__ import annotations

import importlib

import click

from cxr_triton import __version__

VERBS = {
    "export": ("cxr_triton.export.command:export", "Write the vision and decoder graphs of a checkpoint."),
    "build": ("cxr_triton.engines.command:build", "Compile graphs into an engine bundle."),
    "package": ("cxr_triton.triton_repo.command:package", "Write a Triton model repository from a bundle."),
    "serve": ("cxr_triton.triton_repo.command:serve", "Run the pip-installed Triton on a model repository."),
    "read": ("cxr_triton.client.command:read", "Read radiographs through a running server."),
    "demo": ("cxr_triton.triton_repo.command:demo", "Export, build, package, serve and read on this CPU."),
}


class LazyGroup(click.Group):
    """A group whose commands are named in `VERBS` and imported on use."""

    def list_commands(self, ctx):
        return list(VERBS)

    def get_command(self, ctx, name):
        if name not in VERBS:
            return None
        module, attribute = VERBS[name][0].split(":")
        return getattr(importlib.import_module(module), attribute)

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in VERBS.items()])


@click.command(cls=LazyGroup)
@click.version_option(__version__, prog_name="cxr-triton")
def main():
    """Chest X-ray reasoning models: checkpoint to a served, measured Triton ensemble.

    The models' weights are for non-commercial research only and never for diagnosis.
    """
