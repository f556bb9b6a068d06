"""Headless Chromium, driven by its DevTools protocol; what its tabs ask for and write to the console is kept.

Ours, because it takes nothing but aiohttp, NumPy and Pillow, which the page's server has too: Playwright's wheel has 53
MB, Node.js in it, and Selenium needs a second program that fits the browser. Files that are dragged, fingers, colour
schemes and the console would be commands of this protocol with them too.
"""

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import numpy as np
from chromium import CHROMIUM
from PIL import Image

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-default-apps", "--disable-sync", "--no-first-run", "--force-device-scale-factor=1", "--hide-scrollbars",
    "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip


class Refused(AssertionError):
    """The protocol's answer to a command that it could not do; `code` is its number."""

    def __init__(self, method: str, error: dict):
        super().__init__(method, error)
        self.code = error.get("code")


BETWEEN_PAGES = -32000
"""A command met no document, as one page went and the next had not come."""


class Tab:
    """One page.

    Attributes
    ----------
    asked : list of str
        Addresses of its requests.
    complaints : list of str
        Its console's errors and warnings, and exceptions that nobody caught.
    """

    def __init__(self, devtools: aiohttp.ClientWebSocketResponse):
        self._devtools, self._answers, self._count = devtools, {}, 0
        self.asked: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Takes what Chromium tells, until it ends."""
        async for message in self._devtools:
            told = json.loads(message.data)
            if waiting := self._answers.pop(told.get("id"), None):
                waiting.set_result(told)
            else:
                self._heard(told.get("method"), told.get("params", {}))

    def _heard(self, method: str | None, facts: dict) -> None:
        if method == "Network.requestWillBeSent":
            self.asked.append(facts["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(facts["exceptionDetails"]))
        elif method == "Log.entryAdded" and facts["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{facts['entry']['text']} {facts['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and facts["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(facts["args"]))

    async def call(self, method: str, **facts) -> dict:
        """One command of the protocol."""
        self._count += 1
        waiting = self._answers[self._count] = asyncio.get_running_loop().create_future()
        await self._devtools.send_json({"id": self._count, "method": method, "params": facts})
        told = await waiting
        if error := told.get("error"):
            raise Refused(method, error)
        return told["result"]

    async def evaluate(self, expression: str) -> object:
        """What an expression of JavaScript gives, awaited."""
        facts = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        told = await self.call("Runtime.evaluate", **facts)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, expression: str) -> None:
        """Returns once an expression holds, on this page or the next one, and the page and its scripts are loaded."""
        while not await self._holds(expression):
            await asyncio.sleep(0.03)

    async def _holds(self, expression: str) -> bool:
        try:
            return await self.evaluate(f"document.readyState === 'complete' && !!({expression})")
        except Refused as refused:
            if refused.code != BETWEEN_PAGES:
                raise
            return False

    async def go(self, address: str, until: str = "true") -> None:
        await self.call("Page.navigate", url=address)
        await self.until(f"location.href !== 'about:blank' && ({until})")

    async def size(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def choose(self, selector: str, *files: Path) -> None:
        """Files in an input for files."""
        node = await self.call("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")
        await self.call(
            "DOM.setFileInputFiles", files=[str(file) for file in files], objectId=node["result"]["objectId"]
        )

    async def press(self, key: str) -> None:
        """A key, as a keyboard sends it."""
        text = {"Enter": "\r", " ": " "}.get(key, key if len(key) == 1 else "")
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        facts = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    async def mouse(self, kind: str, x: float, y: float, **facts) -> None:
        await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **facts)

    async def pixels(self, path: Path | None = None) -> np.ndarray:
        """What is in sight, once what was changed is drawn; [height, width, 3] int."""
        await self.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        png = base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])
        if path:
            path.write_bytes(png)
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


class Browser:
    """Chromium, open within its ``async with``; what its tabs save goes into `folder`/saved."""

    def __init__(self, folder: Path):
        self.saved, self._profile = folder / "saved", folder / "profile"

    async def __aenter__(self) -> "Browser":
        quiet = asyncio.subprocess.DEVNULL
        command = [CHROMIUM, *OPTIONS, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        port = self._profile / "DevToolsActivePort"
        async with asyncio.timeout(120):
            while not (port.exists() and port.read_text().count("\n")):
                await asyncio.sleep(0.03)
        number, path = port.read_text().split()
        self._devtools, self._client = f"ws://127.0.0.1:{number}", aiohttp.ClientSession()
        self._socket = await self._client.ws_connect(self._devtools + path)
        self._whole, self._listening = _listened(self._socket)
        await self._whole.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.saved))
        return self

    async def __aexit__(self, *exception) -> None:
        self._listening.cancel()
        await self._client.close()
        self._process.kill()
        await self._process.wait()

    @contextlib.asynccontextmanager
    async def tab(self, limit_s: float = 300) -> AsyncIterator[Tab]:
        """A tab at 1280 × 900, for so long."""
        target = (await self._whole.call("Target.createTarget", url="about:blank"))["targetId"]
        async with (
            asyncio.timeout(limit_s),
            self._client.ws_connect(f"{self._devtools}/devtools/page/{target}", max_msg_size=0) as socket,
        ):
            page, listening = _listened(socket)
            for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
                await page.call(f"{domain}.enable")
            await page.size(1280, 900)
            yield page
            listening.cancel()
        await self._whole.call("Target.closeTarget", targetId=target)


def _listened(socket: aiohttp.ClientWebSocketResponse) -> tuple[Tab, asyncio.Task]:
    page = Tab(socket)
    return page, asyncio.create_task(page.listen())
