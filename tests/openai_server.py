"""The HTTP server of `cxr-triton openai` in a thread, in front of whatever answers gRPC."""

from http_server import HttpServer

from cxr_triton.client.aio import AsyncReader
from cxr_triton.client.limits import Timeouts
from cxr_triton.client.openai.service import Service
from cxr_triton.client.openai.settings import Settings


class OpenAIServer(HttpServer):
    """Runs on a free port until the `with` block ends; its log is `log`."""

    def __init__(self, url: str, *, timeouts: Timeouts | None = None, **settings):
        super().__init__(Settings(port=0, **settings))
        self.timeouts = timeouts or Timeouts(connect_s=60.0, first_delta_s=None, total_s=self.settings.timeout_s)
        self.reader_url = url

    def made(self) -> Service:
        return Service(self.settings, AsyncReader(self.reader_url, timeouts=self.timeouts), self.log)

    @property
    def base_url(self) -> str:
        return f"{self.origin}/v1"
