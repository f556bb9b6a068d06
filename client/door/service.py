"""A service as a process: told to stop, drained, ended."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable

from cxr_triton.client.door.guard import DoorGuard
from cxr_triton.client.listener import HttpListener
from cxr_triton.files import leave_no_core


async def serve_until(
    stopping: asyncio.Event, listener: HttpListener, guard: DoorGuard, under_way: Callable[[], int]
) -> None:
    """Serve until the event is set, then let what is under way end within the guard's `grace_s`."""
    await stopping.wait()
    guard.is_draining = True
    listener.close()
    ends = time.monotonic() + guard.settings.grace_s
    while under_way() and time.monotonic() < ends:
        await asyncio.sleep(0.05)


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
