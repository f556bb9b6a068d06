"""DICOMweb as a source: QIDO-RS finds instances a page at a time, WADO-RS brings one."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from cxr_triton.archive.item import Item
from cxr_triton.client.gateway.config import Remote, Unreachable
from cxr_triton.client.gateway.http import Answer, TooLarge, first_part, web_client
from cxr_triton.errors import (
    AccessDenied,
    InternalError,
    InvalidImage,
    InvalidRequest,
    LimitExceeded,
    QueueFull,
    Unavailable,
)

PAGE = 500
"""Matches that are asked for at once."""
MOST_ANSWERED = 1 << 24
"""Bytes of an answer to a query."""
TOTAL_S = 300.0
"""What one answer may take to its end."""
TRIES = 5
"""Times that an instance is asked for."""
LEVELS = ("studies", "instances")
_UID = re.compile(r"[0-9]+(\.[0-9]+)*")
_TAGS = {
    "study_instance_uid": "0020000D",
    "series_instance_uid": "0020000E",
    "sop_instance_uid": "00080018",
}
_INSTANCE = 'multipart/related; type="application/dicom"; transfer-syntax=*'
_JSON = "application/dicom+json"
_NAME = "DICOMweb"


def root_and_query(address: str) -> tuple[str, str]:
    """The DICOMweb root of a query's address, and the query below it.

    Raises
    ------
    InvalidRequest
        It asks neither for studies nor for instances.
    """
    parts = urllib.parse.urlsplit(address)
    path, _, level = parts.path.rstrip("/").rpartition("/")
    if level not in LEVELS:
        raise InvalidRequest(
            f"{address!r:.120} is no query for {' or '.join(LEVELS)}; write it as "
            "https://HOST/ROOT/studies?StudyDate=20260101-20261231&ModalitiesInStudy=DX"
        )
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", "")), f"{level}?{parts.query}"


def instances(root: Remote, query: str) -> Iterator[Item]:
    """Instances that a query finds; of a query for studies all that these hold.

    Raises
    ------
    Unavailable
        The server is out of reach, or answers what is none.
    LimitExceeded
        A page has over `MOST_ANSWERED` bytes.
    """
    level, _, asked = query.partition("?")
    for match in _pages(root, level, asked):
        if level == "instances":
            yield from _item(match)
        elif study := _uid(match, "study_instance_uid"):
            for instance in _pages(root, f"studies/{study}/instances", ""):
                yield from _item({_TAGS["study_instance_uid"]: {"Value": [study]}, **instance})


def _pages(root: Remote, path: str, asked: str) -> Iterator[dict[str, Any]]:
    """Matches of all pages; a server that knows no pages gives the first one again."""
    offset, first = 0, None
    while True:
        paged = f"limit={PAGE}&offset={offset}"
        answer = _ask(root, f"{path}?{asked}&{paged}" if asked else f"{path}?{paged}", _JSON)
        matches = _matches(answer)
        if not matches or matches[0] == first:
            return
        first = matches[0]
        yield from matches
        offset += len(matches)  # a server may give fewer than it was asked for


def _matches(answer: Answer) -> list[dict[str, Any]]:
    if answer.status == 204:
        return []
    if answer.status != 200:
        raise Unavailable(f"{_NAME} answers a query with HTTP {answer.status}; look at its address, token and query")
    try:
        found = json.loads(answer.body or b"[]")
        if isinstance(found, list) and all(isinstance(match, dict) for match in found):
            return found
    except (ValueError, RecursionError):
        pass
    raise Unavailable(f"{_NAME} answers a query with what is no DICOM JSON; look at its address")


def _item(match: dict[str, Any]) -> Iterator[Item]:
    uids = {key: _uid(match, key) for key in _TAGS}
    if all(uids.values()):
        study, series, instance = uids.values()
        yield Item(instance, f"studies/{study}/series/{series}/instances/{instance}", uids)


def _uid(match: dict[str, Any], key: str) -> str:
    """A UID of a match, empty where it is none: it becomes part of an address."""
    try:
        value = match[_TAGS[key]]["Value"][0]
    except (KeyError, IndexError, TypeError):
        return ""
    return value if isinstance(value, str) and len(value) <= 64 and _UID.fullmatch(value) else ""


def fetch(root: Remote, place: str, limit: int) -> bytes:
    """An instance's file; asks `TRIES` times, and blocks, in a thread without an event loop.

    Raises
    ------
    InvalidImage
        The server says that it has none, or it has over `limit` bytes.
    InternalError
        The server fails at this instance, while it answers a query.
    Unavailable, QueueFull
        The server is away, or busy.
    AccessDenied
        It gives no instance to who asks.
    """
    pauses_s = [2.0**n for n in range(TRIES - 1)]
    while True:
        try:
            return _instance(root, place, limit)
        except (Unavailable, QueueFull) as error:
            if pauses_s:
                time.sleep(pauses_s.pop(0))
            elif isinstance(error, QueueFull) or not _answers(root):
                raise
            else:
                raise InternalError(
                    f"{error.message}, {TRIES} times, though it answers queries; look into its log for what it has"
                ) from None


def _answers(root: Remote) -> bool:
    """Whether the server is there for others than one instance."""
    try:
        _matches(_ask(root, "studies?limit=1&offset=0", _JSON))
    except (Unavailable, LimitExceeded):
        return False
    return True


def _instance(root: Remote, place: str, limit: int) -> bytes:
    answer = _ask(root, place, _INSTANCE, limit)
    if answer.status in (429, 503):
        raise QueueFull(f"{_NAME} answers HTTP {answer.status}; the same command goes on when it has time")
    if 400 <= answer.status < 500 and answer.status not in (401, 403, 408):
        raise InvalidImage(f"{_NAME} answers HTTP {answer.status} for the instance; see whether the archive has it")
    if answer.status in (401, 403):
        raise AccessDenied(f"{_NAME} answers HTTP {answer.status} for an instance; give a token that may retrieve")
    if answer.status != 200:
        raise Unavailable(f"{_NAME} answers HTTP {answer.status} for an instance")
    return first_part(answer.kind, answer.body)


def _ask(root: Remote, path: str, accept: str, limit: int = MOST_ANSWERED) -> Answer:
    async def ask() -> Answer:
        async with web_client(root, _NAME, TOTAL_S) as client:
            return await client.ask("GET", path, limit=limit, headers={"Accept": accept})

    try:
        return asyncio.run(ask())
    except TooLarge as error:
        raise LimitExceeded(f"{error}, which are all that is taken") from None
    except Unreachable as error:
        raise Unavailable(f"{error}; the same command goes on when it answers again") from None
