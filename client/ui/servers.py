"""The servers that readings are asked of, and what each says that it can be asked."""

from __future__ import annotations

import asyncio
from typing import Any

from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.served import ServedProfile
from cxr_triton.client.ui.refusal import Refusal
from cxr_triton.errors import CxrError, Unavailable
from cxr_triton.profile import ModelProfile

KNOWN_S = 1.0
"""How long the page waits for what a server says of itself."""


class Server:
    """One of them.

    Attributes
    ----------
    name : str
        Its address, as the command was given it.
    profile : ServedProfile
    """

    def __init__(self, reader: AsyncReader):
        self.name, self.reader = reader.url, reader
        self.profile = ServedProfile(reader)

    async def known(self) -> ModelProfile | None:
        """The profile; None where the server does not say it within `KNOWN_S`."""
        found = await self._asked()
        return None if isinstance(found, CxrError) else found

    async def _asked(self) -> ModelProfile | CxrError:
        try:
            async with asyncio.timeout(KNOWN_S):
                return await self.profile()
        except TimeoutError:
            return Unavailable(f"no ready server at {self.name} within {KNOWN_S:g} s")
        except CxrError as error:
            return error

    async def told(self) -> dict[str, Any]:
        """What the page is told of it."""
        profile = await self._asked()
        if isinstance(profile, CxrError):
            away = {"model": "", "profile": "", "up": False, "tasks": [], "modes": []}
            return {"name": self.name, **away, "error": Refusal(profile).told}
        tasks = [
            {
                "name": name,
                "title": task.description,
                "prompt": task.prompt,
                "answer": task.answer,
                "images": [task.min_images, task.max_images],
                "variables": list(task.placeholders),
                "follow_up": task.follow_up,
            }
            for name, task in profile.tasks.items()
        ]
        modes = [
            {"name": name, "title": mode.description, "answers": list(mode.answers)}
            for name, mode in profile.modes.items()
        ]
        return {
            "name": self.name,
            "model": profile.title,
            "profile": profile.name,
            "up": True,
            "tasks": tasks,
            "default_task": profile.default_task,
            "modes": modes,
            "default_mode": profile.default_mode,
            "max_images": profile.max_images,
            "terms": profile.notice,
        }


async def told(servers: dict[str, Server]) -> list[dict[str, Any]]:
    """What the page is told of all, asked at the same time."""
    return list(await asyncio.gather(*(server.told() for server in servers.values())))
