"""A service as a process: opened, told to stop, drained, closed."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from cxr_triton.client.door.guard import DoorGuard
from cxr_triton.client.listener import HttpListener
from cxr_triton.files import leave_no_core


class DoorService:
    """What listens, until it is told to stop.

    Attributes
    ----------
    port : int or None
        What is listened on, once it has started.
    """

    port: int | None = None

    async def serve(
        self, listener: HttpListener, guard: DoorGuard, stopping: asyncio.Event, started: Callable[[str], None]
    ) -> None:
        """Serve until `stopping` is set, then let what is under way end within `grace_s`; `started` gets the address.

        The listener is entered before.
        """
        self.port = listener.port
        started(listener.address)
        await stopping.wait()
        guard.is_draining = True
        listener.close()
        ends = time.monotonic() + guard.settings.grace_s
        while self.under_way and time.monotonic() < ends:
            await asyncio.sleep(0.05)

    @property
    def under_way(self) -> int:
        """Readings that are being written."""
        raise NotImplementedError


def run_until_told(run: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run what ends in order once the event is set, as by SIGTERM or SIGINT; leaves no core, and quotes no request."""

    async def running() -> None:
        stopping, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        await run(stopping)

    leave_no_core()
    logging.getLogger("aiohttp").setLevel(logging.CRITICAL + 1)  # it would quote requests
    asyncio.run(running())
