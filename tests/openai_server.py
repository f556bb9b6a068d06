"""The HTTP server of `cxr-triton openai` in a thread, in front of whatever answers gRPC."""

import asyncio
import contextlib
import http.client
import io
import json
import threading

from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.limits import Timeouts
from cxr_triton.client.openai.service import Service
from cxr_triton.client.openai.settings import Settings


class OpenAIServer:
    """Runs on a free port until the `with` block ends; its log is `log`."""

    def __init__(self, url: str, *, timeouts: Timeouts | None = None, **settings):
        self.settings = Settings(port=0, **settings)
        self.timeouts = timeouts or Timeouts(connect_s=2.0, first_delta_s=None, total_s=self.settings.timeout_s)
        self.reader_url, self.log = url, io.StringIO()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._failure: BaseException | None = None

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.service = Service(self.settings, AsyncReader(self.reader_url, timeouts=self.timeouts), self.log)
            await self.service.run(self._stopping, lambda port: self._started.set())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()

    def __enter__(self):
        self._thread.start()
        self._started.wait()
        if self._failure:
            raise self._failure
        self.address = (self.settings.host, self.service.port)
        self.base_url = f"http{'s' * bool(self.settings.cert)}://{self.settings.host}:{self.service.port}/v1"
        return self

    def __exit__(self, *exc) -> None:
        self.stop()
        self._thread.join()

    def stop(self) -> None:
        """Tell it to end; what is under way may."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    def ask(self, method: str, path: str, body: object = None, headers: dict | None = None) -> tuple[int, dict, object]:
        """Status, headers in lower case and JSON (else text) of an answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=20)
        given = body if isinstance(body, bytes | None) else json.dumps(body)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, given, {**kind, **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers.get("Content-Type", "").startswith("application/json")
        return answer.status, {k.lower(): v for k, v in answer.headers.items()}, json.loads(text) if is_json else text

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]
