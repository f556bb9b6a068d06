"""Bodies of requests, bounded while they are read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.errors import DeadlineExceeded, InvalidRequest, LimitExceeded

MOST_JSON = 256 * 1024


async def read(request: web.Request, most: int, within_s: float) -> bytearray:
    """A body.

    Raises
    ------
    LimitExceeded
        It has more than `most` bytes; what comes beyond is not read.
    Refusal
        It does not come in time.
    """
    if (request.content_length or 0) > most:
        raise _too_large(most)
    body = bytearray()
    try:
        async with asyncio.timeout(within_s):
            async for part in request.content.iter_any():
                body += part
                if len(body) > most:
                    raise _too_large(most)
        return body
    except TimeoutError:
        error = DeadlineExceeded(f"the file did not come within {within_s:g} s; send it over a faster connection")
        raise Refusal(error, status=408) from None


async def read_json(request: web.Request, within_s: float) -> dict[str, Any]:
    """A body that is one JSON object, without what is null in it; raises as `read` does, and `InvalidRequest`."""
    body = await read(request, MOST_JSON, within_s)
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise InvalidRequest("the body is no JSON object; load the page again")
    return {key: value for key, value in data.items() if value is not None}


def _too_large(most: int) -> LimitExceeded:
    return LimitExceeded(f"it has more than the {most} bytes allowed; send a smaller one")
