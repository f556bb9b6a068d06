"""The reading room of `cxr-triton ui` in a thread, and a visitor who does what its page does."""

import contextlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from unittest import mock
from urllib.parse import quote

from http_server import HttpServer

from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.limits import Timeouts
from cxr_triton.client.ui import servers, service
from cxr_triton.client.ui.settings import Settings

PATIENT_S = 60.0


class UiServer(HttpServer):
    """Runs on a free port until the `with` block ends; its log is `log`. What is `away` is not waited for.

    Other servers have `known_s` to say their profile, as a busy machine takes more than a second now and then.
    """

    def __init__(self, *urls: str, away: str = "", page: Path = service.PAGE, known_s: float = PATIENT_S, **settings):
        super().__init__(Settings(port=0, **{"decoders": 1, **settings}))
        self._known = mock.patch.object(servers, "KNOWN_S", known_s)
        self._limits = {
            url: Timeouts(connect_s=0.5 if url == away else PATIENT_S, first_delta_s=None, idle_s=5 * PATIENT_S)
            for url in urls
        }
        self._page = page

    def __enter__(self):
        self._known.start()
        return super().__enter__()

    def __exit__(self, *exc) -> None:
        super().__exit__(*exc)
        self._known.stop()

    def made(self) -> service.Service:
        readers = [AsyncReader(url, timeouts=limits) for url, limits in self._limits.items()]
        return service.Service(self.settings, readers, self.log, self._page)


class Visitor:
    """A tab: a session of its own, and names of its pictures and readings; `headers` go along with every request."""

    def __init__(self, server: UiServer, **headers: str):
        self.server, self.headers = server, headers
        status, _, told = self.ask("POST", "/api/sessions")
        assert status == 201, told
        self.session = told["session"]
        self.path = f"/api/sessions/{self.session}"
        self.pictures: list[str] = []
        self.readings: list[str] = []

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict, object]:
        """As `HttpServer.ask`; underscores in the names of headers are dashes."""
        given = {name.replace("_", "-"): value for name, value in {**self.headers, **headers}.items()}
        return self.server.ask(method, path, body, given)

    def give(self, data: bytes, name: str = "chest.dcm") -> tuple[int, dict]:
        """Status and what is told of an upload."""
        kind = {"Content_Type": "application/octet-stream", "X_File_Name": quote(name)}
        status, _, told = self.ask("POST", f"{self.path}/pictures", data, **kind)
        self.pictures += [told["picture"]] if status == 201 else []
        return status, told

    def picture(self, data: bytes, name: str = "chest.dcm") -> str:
        """The name of a picture that was taken."""
        status, told = self.give(data, name)
        assert status == 201, told
        return told["picture"]

    @contextlib.contextmanager
    def asking(self, **body) -> Iterator[Iterator[dict]]:
        """The lines of a reading as they come; leaving the block leaves the reading."""
        connection = http.client.HTTPConnection(*self.server.address, timeout=60)
        headers = {"Content-Type": "application/json", **self.headers}
        connection.request("POST", f"{self.path}/readings", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        assert answer.headers["Content-Type"] == "application/x-ndjson; charset=utf-8"
        try:
            yield (self._heard(json.loads(line)) for line in iter(answer.readline, b""))
        finally:
            answer.close()
            connection.close()

    def _heard(self, line: dict) -> dict:
        self.readings += [line["reading"]] if line["type"] == "started" else []
        return line

    def read(self, **body) -> list[dict]:
        """All lines of a reading."""
        with self.asking(**body) as lines:
            return list(lines)

    def refused(self, **body) -> tuple[int, dict]:
        """Status and error of a reading that is refused before its first line."""
        status, _, told = self.ask("POST", f"{self.path}/readings", body)
        return status, told["error"]

    def export(self, reading: str, kind: str) -> tuple[int, dict, object]:
        return self.ask("GET", f"{self.path}/readings/{reading}/export?as={kind}")


def said(lines: list[dict], part: str) -> str:
    """The text of a part, as it came."""
    return "".join(line["text"] for line in lines if line["type"] == "text" and line["part"] == part)
