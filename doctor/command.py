"""`cxr-triton doctor`: what a deployment needs, looked at in one go."""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import click

from cxr_triton.cli import EXIT_NOT_AS_ASKED, Waiting, access_options, json_option, printable, write_json
from cxr_triton.client.address import require_endpoint
from cxr_triton.client.limits import Access
from cxr_triton.doctor.check import FAIL, WARN, Case
from cxr_triton.errors import InvalidRequest

DEFAULT_URL = "127.0.0.1:8001"
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument(
    "folder",
    metavar="[REPOSITORY|BUNDLE]",
    required=False,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--url", metavar="HOST:PORT", help=f"Triton's gRPC endpoint, which has to answer.  [default: {DEFAULT_URL}]"
)
@click.option("--openai", "openai_url", metavar="URL", help="A running `cxr-triton openai`, http://127.0.0.1:8080.")
@click.option("--gateway", "config_path", metavar="YAML", type=FILE, help="The gateway's configuration.")
@access_options
@click.option("--offline", is_flag=True, help="Open no connection: look at files and the machine only.")
@click.option("--strict", is_flag=True, help="Warnings end with status 3, too.")
@json_option
def doctor(
    folder: Path | None,
    *,
    url: str | None,
    openai_url: str | None,
    config_path: Path | None,
    offline: bool,
    strict: bool,
    json_path: str | None,
    **access: Path | None,
):
    """Look at everything that a deployment needs, and say what is wrong and what to do.

    The machine, Python and its packages; with REPOSITORY or BUNDLE its files; with --url a server (else one that runs
    here); with --openai a server of OpenAI's API; with --gateway a gateway's settings, queue and peers. Changes
    nothing, and sends nothing of a patient.

    Exit status 3 when something failed.
    """
    from cxr_triton.doctor.report import lines, to_json
    from cxr_triton.doctor.run import CHECKS, examine

    case = Case(
        path=folder,
        url=_address(url) if url else DEFAULT_URL,
        is_asked=url is not None,
        access=Access.of(**access),
        config_path=config_path,
        openai_url=_web_address(openai_url) if openai_url else "",
        offline=offline,
    )
    left = {check.id for check in CHECKS}
    with Waiting(f"{len(left)} checks") as waiting:

        def tell(check) -> None:
            left.discard(check.id)
            waiting.what = f"{len(CHECKS) - len(left)} of {len(CHECKS)} checks"

        findings = examine(case, CHECKS, tell)
    for line, colour in lines(findings):
        click.secho(printable(line), fg=colour, err=json_path == "-")
    write_json(to_json(findings), json_path)
    bad = (FAIL, WARN) if strict else (FAIL,)
    if any(finding.status in bad for finding in findings):
        sys.exit(EXIT_NOT_AS_ASKED)


def _web_address(url: str) -> str:
    """Scheme, host and port, without the path that clients are given; raises `InvalidRequest` where there are none."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
    except ValueError:  # of a port
        pass
    raise InvalidRequest(f"{url!r} is no web address; give it as http://127.0.0.1:8080")


def _address(url: str) -> str:
    """Host and port; raises `InvalidRequest` for anything else, also for what gRPC alone would take."""
    host, _, port = require_endpoint(url).rpartition(":")
    if (
        not host
        or not port.isdigit()
        or "/" in url
        or host.partition(":")[0] in ("dns", "unix", "ipv4", "ipv6", "vsock", "xds")
    ):
        raise InvalidRequest(f"{url!r} is no host and port; give them as 127.0.0.1:8001")
    return url
