"""What a server says of its profile, remembered for a while."""

from __future__ import annotations

import asyncio
import time

from cxr_triton.client.aio import AsyncReader
from cxr_triton.errors import CxrError
from cxr_triton.profile import ModelProfile

PROFILE_S = 10.0
"""How long what the server said of its profile is taken for true."""
FAILURE_S = 1.0
"""How long a failure to say it is."""


class ServedProfile:
    """Called, it gives the served profile; whoever asks meanwhile waits for the same answer."""

    def __init__(self, reader: AsyncReader):
        self._reader = reader
        self._asking = asyncio.Lock()
        self._known: tuple[float, ModelProfile | CxrError] | None = None

    async def __call__(self) -> ModelProfile:
        """The profile; raises what `AsyncReader.profile` does."""
        async with self._asking:
            if self._known is None or time.monotonic() > self._known[0]:
                found: ModelProfile | CxrError
                try:
                    found, holds_s = await self._reader.profile(), PROFILE_S
                except CxrError as error:  # whoever waits meanwhile need not ask again, one after the other
                    found, holds_s = error, FAILURE_S
                self._known = (time.monotonic() + holds_s, found)
            if isinstance(found := self._known[1], CxrError):
                raise found.reworded(found.message)
            return found
