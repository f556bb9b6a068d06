"""A running `cxr-triton openai`: whether it answers, and whom it lets in. Every call is a GET without a key."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from cxr_triton import __version__
from cxr_triton.client.address import is_loopback
from cxr_triton.doctor.certificates import dated, presented, untrusted
from cxr_triton.doctor.check import Case, Check, Finding, Unseen, fail, ok, refused, warn
from cxr_triton.doctor.listening import beyond_loopback, is_taken
from cxr_triton.doctor.peers import Answer, ask
from cxr_triton.errors import InvalidConfig

_MOST_BYTES = 1 << 20
_ELSEWHERE = "elsewhere.example"


def ready(case: Case) -> Iterator[Finding]:
    """A server of OpenAI's API answers at the address, and a reading could be made."""
    answer, wanted = _get(case, "health"), "HTTP 200 of `cxr-triton openai`"
    subject, body = f"{case.api.root}/health", _json(answer)
    failed = body.get("error")
    if not answer.status:
        yield fail(subject, answer.why, wanted, "Start it with `cxr-triton openai`, or correct --openai or --tls-ca.")
    elif answer.status == 200 and body == {"status": "ok"}:
        yield ok(subject, "ready", wanted)
    elif isinstance(failed, dict) and "code" in failed:
        remedy = "See its log, and look at the server that it reads from with `cxr-triton doctor --url`."
        yield fail(subject, f"HTTP {answer.status}, {failed['code']}: {failed.get('message', '')}", wanted, remedy)
    else:
        yield fail(subject, f"HTTP {answer.status} of something else", wanted, "Give its address as --openai.")


def version(case: Case) -> Iterator[Finding]:
    """It is of this release, as it says of itself."""
    info = _json(_get(case, "openapi.json")).get("info")
    said = str(info.get("version", "none")) if isinstance(info, dict) else "none"
    subject = f"release of {case.api.root}"
    if said == __version__:
        yield ok(subject, said, __version__)
    else:
        yield warn(subject, said, __version__, "Have both be of one release: what it takes may be other than is told.")


def keys(case: Case) -> Iterator[Finding]:
    """It asks for a key, or nobody but this machine reaches it."""
    status, subject, wanted = _get(case, "v1/models").status, f"keys of {case.api.root}", "a key, or loopback only"
    if status in (401, 403):
        yield ok(subject, "asked for", wanted)
    elif outside := _outside(case):
        remedy = "Give --api-keys-file, or let something before it ask who comes."
        yield fail(subject, f"none asked for, reached by {', '.join(outside)}", wanted, remedy)
    else:
        yield ok(subject, "none asked for, on loopback only", wanted)


def encryption(case: Case) -> Iterator[Finding]:
    """What leaves this machine for it is encrypted, by a certificate that is trusted here and valid for a month."""
    to, (scheme, host, port) = case.api, _place(case)
    if scheme == "https":
        subject = f"certificate of {to.root}"
        try:
            context = to.tls.client() if to.tls else ssl.create_default_context()
            yield dated(subject, presented(host, port, context, to.timeout_s))
        except InvalidConfig as error:
            yield refused(subject, error.message, "files that can be read")
        except OSError as error:
            yield untrusted(subject, error)
    elif outside := _outside(case):
        remedy = "Give --cert and --key, or let it listen on loopback behind a proxy that encrypts."
        yield fail(to.root, f"clear text, reached by {', '.join(outside)}", "TLS, or loopback only", remedy)
    else:
        yield ok(to.root, "loopback only", "TLS, or loopback only")


def browsers(case: Case) -> Iterator[Finding]:
    """No page of elsewhere in a browser reads from it: no CORS, and on loopback no other name in the Host header."""
    subject, origin = f"pages of elsewhere at {case.api.root}", f"https://{_ELSEWHERE}"
    if allowed := _get(case, "health", Origin=origin).headers.get("Access-Control-Allow-Origin", ""):
        remedy = "Have the proxy before it leave that header out: any page could ask through a visitor's browser."
        yield fail(subject, f"Access-Control-Allow-Origin: {allowed}", "no such header", remedy)
    elif not _outside(case) and _get(case, "health", Host=_ELSEWHERE).status == 200:
        remedy = "Have what stands before it refuse other names than its own: a page can lead its name to 127.0.0.1."
        yield fail(subject, f"answered to the name {_ELSEWHERE}", "HTTP 421", remedy)
    else:
        yield ok(subject, "refused", "refused")


def _get(case: Case, path: str, **headers: str) -> Answer:
    return ask(case.api, "GET", path, headers=headers, most=_MOST_BYTES)


def _json(answer: Answer) -> dict[str, Any]:
    """Of a body; empty where it is none."""
    try:
        body = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _place(case: Case) -> tuple[str, str, int]:
    """Scheme, host and port."""
    parts = urlsplit(case.api.root)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _outside(case: Case) -> list[str]:
    """Addresses by which others reach it."""
    _, host, port = _place(case)
    return beyond_loopback(case, port) if is_loopback(host) else [host]


def _row(name: str, run: Callable[[Case], Iterator[Finding]]) -> Check:
    def look(case: Case) -> Iterator[Finding]:
        if run is not ready and not is_taken(*_place(case)[1:]):
            raise Unseen(f"nothing listens at {case.api.root}, see openai.ready")
        yield from run(case)

    look.__doc__ = run.__doc__
    return Check(id=f"openai.{name}", run=look, needs="api", is_connecting=True, limit_s=45)


CHECKS = tuple(_row(run.__name__, run) for run in (ready, version, keys, encryption, browsers))
