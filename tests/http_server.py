"""One of the client's HTTP servers in a thread."""

import asyncio
import contextlib
import http.client
import io
import json
import threading


class HttpServer:
    """Runs the service that `made` gives on a free port until the `with` block ends; its log is `log`."""

    def __init__(self, settings):
        self.settings, self.log = settings, io.StringIO()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._failure: BaseException | None = None

    def made(self):
        """The service, in the loop that runs it."""
        raise NotImplementedError

    async def _run(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        try:
            self.service = self.made()
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
        return self

    def __exit__(self, *exc) -> None:
        self.stop()
        self._thread.join()

    @property
    def origin(self) -> str:
        return f"http{'s' * bool(self.settings.cert)}://{self.settings.host}:{self.service.port}"

    def stop(self) -> None:
        """Tell it to end; what is under way may."""
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stopping.set)

    def ask(self, method: str, path: str, body: object = None, headers: dict | None = None) -> tuple[int, dict, object]:
        """Status, headers in lower case and JSON (else text) of an answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=60)
        given = body if isinstance(body, bytes | None) else json.dumps(body)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, given, {**kind, **(headers or {})})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        told = {k.lower(): v for k, v in answer.headers.items()}
        if told.get("content-type", "").startswith("application/json"):
            return answer.status, told, json.loads(data)
        return answer.status, told, data.decode() if self.is_text(told) else data

    @staticmethod
    def is_text(headers: dict) -> bool:
        return not headers.get("content-type", "").startswith(("image/", "application/dicom"))

    @property
    def events(self) -> list[dict]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]
