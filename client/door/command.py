"""What the commands of such services have in common: options, and the line that says where it listens."""

from __future__ import annotations

from collections.abc import Sequence

import click

from cxr_triton.cli import printable, write_json
from cxr_triton.client.command import FILE


def door_options(command):
    """Where a service listens and how; `DoorSettings` takes them."""
    options = (
        click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen."),
        click.option(
            "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one."
        ),
        click.option("--cert", type=FILE, metavar="PEM", help="Encrypt, with this certificate."),
        click.option("--key", type=FILE, metavar="PEM", help="The key of --cert."),
        click.option(
            "--clear-text", is_flag=True, help="Listen unencrypted off the loopback interface, as behind a proxy."
        ),
        click.option(
            "--allow-host",
            "allowed_hosts",
            metavar="NAME",
            multiple=True,
            help="A name that requests may come for, besides localhost; off the loopback interface any may, if left "
            "out.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def say_ready(address: str, urls: Sequence[str], json_path: str | None, **facts: object) -> None:
    """Say where it listens, in front of which servers, and as JSON with more `facts` where that is asked for."""
    write_json({"status": "ready", "address": address, **facts}, json_path)
    click.echo(printable(f"ready: {address}, in front of {', '.join(urls)}"), err=json_path == "-")
