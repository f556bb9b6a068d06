"""HTTP as a client, in one way for what is fetched and what is sent: limits on time and size, and no detours."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp

from cxr_triton.client.gateway.config import Remote, Unreachable
from cxr_triton.errors import InvalidConfig


class Answer(NamedTuple):
    """Status, content type and body of an answer."""

    status: int
    kind: str
    body: bytes


class TooLarge(Unreachable):
    """An answer of more bytes than are taken."""


class WebClient:
    """Requests to one system, with its token.

    No redirect is followed, so that token, Patient ID and objects go nowhere else. A proxy is only used where the
    settings name one, whatever the environment says.
    """

    def __init__(self, to: Remote, name: str, session: aiohttp.ClientSession):
        self._to, self._name, self._session = to, name, session

    async def ask(self, method: str, path: str, *, limit: int, **request: Any) -> Answer:
        """One request and its whole answer.

        Raises
        ------
        Unreachable
            No answer in time, a redirect, or a body of more than `limit` bytes.
        """
        request |= {"allow_redirects": False, "proxy": self._to.proxy}
        async with self._session.request(method, f"{self._to.root}/{path}", **request) as answer:
            if 300 <= answer.status < 400:
                raise Unreachable(
                    f"{self._name} answers HTTP {answer.status}, a redirect, which is not followed; "
                    "give the address that it leads to"
                )
            body = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                body += chunk
                if len(body) > limit:
                    raise TooLarge(f"{self._name}: its answer is over {limit} bytes")
            return Answer(answer.status, answer.headers.get("Content-Type", ""), bytes(body))


@contextlib.asynccontextmanager
async def web_client(to: Remote, name: str, total_s: float) -> AsyncIterator[WebClient]:
    """Open connections to a system.

    Parameters
    ----------
    to : Destination or Priors
    name : str
        Of the system, for messages.
    total_s : float
        What a request may take from its begin to the last byte of its answer.

    Raises
    ------
    Unreachable
        Also where its token file cannot be read.
    """
    timeout = aiohttp.ClientTimeout(total=total_s, sock_connect=to.timeout_s, sock_read=to.timeout_s)
    try:
        connector = aiohttp.TCPConnector(ssl=to.tls.client() if to.tls else True)
        # A compressed answer may be small on the wire and without end in memory.
        headers = {"Accept-Encoding": "identity", **to.authorization()}
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers=headers, auto_decompress=False, trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:  # fmt: skip
            yield WebClient(to, name, session)
    except InvalidConfig as error:
        raise Unreachable(f"{name}: {error.message}") from None
    except (aiohttp.ClientError, TimeoutError) as error:
        raise Unreachable(f"{name}: {type(error).__name__}") from None


def first_part(kind: str, body: bytes) -> bytes:
    """The first part of a multipart/related answer, or the body where it is a bare object."""
    marker = next((p.split("=", 1)[1].strip('"') for p in kind.split(";") if p.strip().startswith("boundary=")), None)
    if marker is None:
        return body
    _, _, part = body.partition(b"\r\n\r\n")
    return part.partition(f"\r\n--{marker}".encode())[0]
