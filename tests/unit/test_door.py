"""What the HTTP services of the client share: names that are served, requests that break off."""

import asyncio

import pytest
from fake_server import FakeServer

pytest.importorskip("aiohttp")
pytest.importorskip("highdicom")
pytest.importorskip("prometheus_client")

from aiohttp import StreamReader, web
from openai_server import OpenAIServer
from ui_server import UiServer, Visitor

from cxr_triton.client.address import is_served
from cxr_triton.client.endpoint import Http
from cxr_triton.client.listener import HttpListener
from cxr_triton.client.openai.settings import Settings
from cxr_triton.errors import InvalidConfig
from cxr_triton.profile import load_profile

LOOPBACK, EVERYWHERE, NAME = "127.0.0.1", "0.0.0.0", ("Reader.example.org", "[2001:db8::1]")


@pytest.mark.parametrize(
    ("listener", "allowed", "hosts", "served"),
    [
        *((LOOPBACK, (), [host], True) for host in ("localhost", "LOCALHOST:8080", "127.0.0.1", "[::1]", "[::1]:8080")),
        ("127.0.0.2", (), ["127.0.0.2:8080"], True),
        ("::1", (), ["[0:0:0:0:0:0:0:1]"], True),
        *((LOOPBACK, (), [host], False) for host in ("", "evil.example", "localhost.evil.example", "localhost:x")),
        *((LOOPBACK, (), [host], False) for host in ("::1", "evil@localhost", "localhost/x", "localhost?x", "[::1")),
        (LOOPBACK, (), [], False),
        (LOOPBACK, (), ["localhost", "evil.example"], False),
        *((LOOPBACK, NAME, [host], True) for host in ("reader.example.org:443", "[2001:DB8::1]:80", "localhost")),
        (LOOPBACK, ("2001:db8::1",), ["[2001:db8::1]"], True),
        (EVERYWHERE, (), ["anything.example"], True),
        (EVERYWHERE, NAME, ["reader.example.org"], True),
        (EVERYWHERE, NAME, ["anything.example"], False),
    ],
)
def test_which_names_are_served(listener, allowed, hosts, served):
    assert is_served(listener, hosts, allowed) == served


def test_a_key_without_its_certificate_is_refused():
    with pytest.raises(InvalidConfig, match="--cert"):
        Settings(key="key.pem")


@pytest.mark.parametrize(("host", "said"), [("::1", "[::1]"), ("127.0.0.1", "127.0.0.1")])
def test_the_address_is_one_that_a_browser_takes(host, said):
    listener = HttpListener(web.Application(), Http(host=host, port=8080), lambda event, facts: None)
    assert listener.address == f"http://{said}:8080/"


ENDS = [(web.RequestPayloadError("broken"), 400, "INVALID_REQUEST"), (ConnectionResetError("gone"), 503, "CANCELLED")]


@pytest.mark.parametrize(("error", "status", "code"), ENDS)
def test_a_body_that_breaks_off_is_no_failure_of_the_server(tmp_path, monkeypatch, error, status, code):
    def fail(stream):
        raise error

    (tmp_path / "password").write_text("a password of this test")
    with FakeServer(lambda request, context: iter(())) as triton:
        triton.profile = load_profile("nv-reason-cxr-3b").to_json()
        with UiServer(triton.url) as ui, OpenAIServer(triton.url) as openai:
            path = Visitor(ui).path
            monkeypatch.setattr(StreamReader, "iter_any", fail)
            for server, asked, event in (
                (ui, f"{path}/pictures", "picture"),
                (ui, f"{path}/readings", "reading"),
                (openai, "/v1/chat/completions", "completion"),
            ):
                answer = server.ask("POST", asked, b"{}")
                assert (answer[0], answer[2]["error"]["code"]) == (status, code)
                assert [(each["event"], each["outcome"]) for each in server.events][-1] == (event, code)
                assert "request_failed" not in server.log.getvalue()
        monkeypatch.setattr(StreamReader, "readany", fail)
        with UiServer(triton.url, password_file=tmp_path / "password") as ui:
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            assert ui.ask("POST", "/login", b"password=x", form)[0] == 400
            assert "request_failed" not in ui.log.getvalue()


def test_a_peer_that_leaves_its_body_is_no_failure_of_a_handler():
    told = []

    async def tried() -> None:
        over = asyncio.Event()

        async def take(request):
            try:
                return web.Response(body=await request.read())
            finally:
                asyncio.get_running_loop().call_later(0.01, over.set)

        app = web.Application()
        app.router.add_post("/", take)
        async with HttpListener(app, Http(), lambda event, facts: told.append(event)) as listener:
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nbegin")
            await asyncio.sleep(0.05)
            writer.close()
            await asyncio.wait_for(over.wait(), 60)

    asyncio.run(tried())
    assert told == []
