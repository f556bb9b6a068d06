"""Bodies of requests, bounded while they are read."""

from __future__ import annotations

import asyncio

from aiohttp import web

from cxr_triton.client.door.refusal import Late
from cxr_triton.errors import Cancelled, InvalidRequest, LimitExceeded


async def read(request: web.Request, most: int, within_s: float, too_large: str = "") -> bytearray:
    """A body; raises `LimitExceeded` with `too_large` beyond `most` bytes, which are not read, and `Late`.

    One that ends too early, or is in no form of HTTP, is an `InvalidRequest`; a sender who leaves is `Cancelled`.
    """
    body = bytearray()
    limit = LimitExceeded(too_large or f"it has more than the {most} bytes allowed; send a smaller one")
    if (request.content_length or 0) > most:
        raise limit
    try:
        async with asyncio.timeout(within_s):
            async for part in request.content.iter_any():  # aiohttp would keep what it reads as a whole
                body += part
                if len(body) > most:
                    raise limit
        return body
    except TimeoutError:
        said = f"what was sent did not come within {within_s:g} s; send it over a faster connection"
        raise Late(said) from None
    except web.RequestPayloadError:
        raise InvalidRequest("what was sent broke off on its way; send it again") from None
    except ConnectionResetError:
        raise Cancelled("whoever sent it has left; send it again") from None


def is_plain(request: web.Request, *kinds: str) -> bool:
    """Whether its body is of one of these types and not compressed.

    A page of another site can send no others than those of forms without asking first.
    """
    return request.content_type in kinds and request.headers.get("Content-Encoding", "identity") == "identity"
