"""`cxr-triton openai`: OpenAI's chat completions in front of a running server."""

from __future__ import annotations

import click

from cxr_triton.cli import json_option
from cxr_triton.client.command import FILE, connection
from cxr_triton.client.door.command import door_options, say_ready
from cxr_triton.extras import require

_SECONDS, _COUNT = click.FloatRange(0.1, 600), click.IntRange(1, 10_000)


@click.command(short_help="Answer OpenAI's chat completions through a running server.")
@connection
@door_options
@click.option(
    "--api-keys-file",
    type=FILE,
    metavar="FILE",
    envvar="CXR_API_KEYS_FILE",
    show_envvar=True,
    help="One key a line, of which each request has to bring one; read again when it changes.",
)
@click.option("--without-keys", is_flag=True, help="Let everybody ask who reaches --host.")
@click.option("--max-requests", type=_COUNT, default=64, show_default=True, help="Completions under way.")
@click.option("--max-connections", type=_COUNT, default=256, show_default=True)
@click.option("--max-per-address", type=_COUNT, default=256, show_default=True, help="Of these, from one address.")
@click.option("--max-body-mib", type=click.IntRange(1, 1024), default=64, show_default=True, help="Pictures in base64.")
@click.option(
    "--max-bodies-mib",
    type=click.IntRange(1, 65536),
    default=256,
    show_default=True,
    help="Of all bodies on their way in; in memory it is some four times as much.",
)
@click.option("--body-s", type=_SECONDS, default=60.0, show_default=True, help="For the body of a request to come.")
@click.option("--write-s", type=_SECONDS, default=30.0, show_default=True, help="For a client to take an event.")
@click.option(
    "--grace-s",
    type=click.FloatRange(0, 3600),
    default=30.0,
    show_default=True,
    help="For what is under way to end after SIGTERM or Ctrl-C.",
)
@json_option
def openai(*, url, tls_ca, tls_cert, tls_key, token_file, trace_otlp, json_path, **options):
    """Answer OpenAI's chat completions, so that its clients, benchmarks and chat pages can ask the reader at --url.

    Pictures come as data URIs in the first message: PNG, JPEG or DICOM. Readings are for research only and never for
    diagnosis; every answer says so. Runs until SIGTERM or Ctrl-C; the log goes to standard error, one JSON object a
    line, without anything of a request's contents.
    """
    require("aiohttp", "prometheus_client")
    from cxr_triton.client.aio import AsyncReader
    from cxr_triton.client.limits import Access, Timeouts
    from cxr_triton.client.openai.service import serve
    from cxr_triton.client.openai.settings import Settings

    settings = Settings(**options)
    access = Access.of(tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, token_file=token_file)
    timeouts = Timeouts(first_delta_s=None, total_s=settings.timeout_s)

    def started(address: str) -> None:
        say_ready(f"{address}v1", [url], json_path, reader=url)

    serve(settings, lambda: AsyncReader(url, timeouts=timeouts, **vars(access)), started, trace_otlp)
