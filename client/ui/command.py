"""`cxr-triton ui`: a reading room in the browser, in front of running servers."""

from __future__ import annotations

import threading
import webbrowser

import click

from cxr_triton.cli import access_options, json_option, printable, trace_option
from cxr_triton.client.address import leaves_machine
from cxr_triton.client.command import FILE
from cxr_triton.client.door.command import door_options, say_ready
from cxr_triton.extras import require

_MIB = click.IntRange(1, 65536)


@click.command(short_help="Read radiographs in the browser, through a running server.")
@click.option(
    "--url",
    "urls",
    metavar="HOST:PORT",
    multiple=True,
    default=("127.0.0.1:8001",),
    show_default=True,
    help="Triton's gRPC endpoint; a second one is for readings side by side.",
)
@click.option(
    "--timeout-s",
    type=click.FloatRange(0.1, 86400),
    default=600,
    show_default=True,
    metavar="S",
    help="Longest wait for a whole reading.",
)
@access_options
@door_options
@click.option(
    "--password-file",
    type=FILE,
    metavar="FILE",
    help="Let in who knows the password in it, 12 characters or more; needed off the loopback interface.",
)
@click.option("--max-sessions", type=click.IntRange(1, 1000), default=32, show_default=True, help="Browser tabs.")
@click.option("--session-mib", type=_MIB, default=256, show_default=True, help="What a session may hold in memory.")
@click.option("--sessions-mib", type=_MIB, default=2048, show_default=True, help="What all together may.")
@click.option(
    "--idle-s",
    type=click.FloatRange(1, 86400),
    default=1800,
    show_default=True,
    help="A session that nobody uses for so long ends, and what it holds is gone.",
)
@trace_option
@click.option("--open", "opens", is_flag=True, help="Open the page in this machine's browser.")
@json_option
def ui(*, urls, timeout_s, tls_ca, tls_cert, tls_key, token_file, trace_otlp, opens, json_path, **options):
    """Read radiographs in the browser: pictures in, reasoning and answer as they are written, boxes on the picture.

    Nothing is kept on a disk: what a tab holds ends with it. Readings are for research only and never for diagnosis;
    the page says so. Runs until SIGTERM or Ctrl-C; the log goes to standard error, one JSON object a line, without
    names, pictures and texts.
    """
    require("aiohttp")
    from cxr_triton.client.aio import AsyncReader
    from cxr_triton.client.limits import Access, Timeouts
    from cxr_triton.client.ui.service import serve
    from cxr_triton.client.ui.settings import Settings

    if len(set(urls)) < len(urls):
        raise click.BadParameter("the same server is given twice", param_hint="--url")
    settings = Settings(timeout_s=timeout_s, **options)
    access = Access.of(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    timeouts = Timeouts(first_delta_s=None, total_s=settings.timeout_s)
    for url in urls:
        if not access.tls and leaves_machine(url):
            click.echo(f"warning: the pictures travel unencrypted to {printable(url)}; use --tls-ca", err=True)

    def started(address: str) -> None:
        say_ready(address, urls, json_path, readers=list(urls))
        if opens:
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    def readers() -> list[AsyncReader]:
        return [AsyncReader(url, timeouts=timeouts, **vars(access)) for url in urls]

    serve(settings, readers, started, trace_otlp)
