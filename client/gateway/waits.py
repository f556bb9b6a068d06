"""How the gateway's parts wait."""

from __future__ import annotations

import asyncio
import random

POLL_S = 0.25
"""Between two looks into the queue while nothing is due."""


def spread(wait_s: float) -> float:
    """A wait changed by up to a third, so that those who failed together do not come back together."""
    return wait_s * random.uniform(2 / 3, 4 / 3)  # noqa: S311  # spreads callers, keeps no secret


async def either(stopping: asyncio.Event, wake: asyncio.Event, timeout_s: float) -> None:
    """Wait for either event, or the time."""
    waits = [asyncio.create_task(event.wait()) for event in (stopping, wake)]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
