"""The listener that every HTTP service of ours is behind."""

import asyncio
import contextlib
import fcntl
import io
import socket

import aiohttp
import pytest
from aiohttp import web

from cxr_triton.client import listener
from cxr_triton.client.endpoint import Http, TlsFiles
from cxr_triton.client.limits import LEAST_PASSWORD, read_password
from cxr_triton.client.listener import HttpListener
from cxr_triton.errors import InvalidConfig, Unavailable

SECRET = "of a patient"


class Service:
    """Answers, fails, or hangs; keeps what its listener told."""

    def __init__(self, **settings):
        self.told, self.may_end = [], asyncio.Event()
        app = web.Application()
        app.router.add_get("/", self.answer)
        app.router.add_get("/fail", self.fail)
        app.router.add_get("/hang", self.hang)
        self.listener = HttpListener(app, Http(**settings), lambda *event: self.told.append(event), name="mine")

    async def answer(self, request):
        return web.Response(text="here")

    async def fail(self, request):
        raise RuntimeError(SECRET)

    async def hang(self, request):
        await self.may_end.wait()
        return web.Response(text="over")


def get(visit, **settings):
    """What `visit` gives, of a service, a client without limits of its own, and the address."""

    async def go():
        service = Service(**settings)
        async with aiohttp.ClientSession() as client, service.listener as listener:
            return await visit(service, client, listener.address)

    return asyncio.run(go())


def test_a_request_is_answered_and_one_that_fails_says_nothing_of_why():
    async def visit(service, client, address):
        assert address == f"http://127.0.0.1:{service.listener.port}/" and service.listener.port
        async with client.get(address) as answer:
            assert (answer.status, await answer.text()) == (200, "here")
        async with client.get(f"{address}fail") as answer:
            assert answer.status == 500 and SECRET not in await answer.text()
        assert service.told == [("request_failed", {"error": "RuntimeError"})]

    get(visit)


def test_a_request_has_its_time_and_an_address_its_connections():
    async def visit(service, client, address):
        async with asyncio.TaskGroup() as group:
            hangs = group.create_task(client.get(f"{address}hang"))
            while not service.listener._keeper.open.total():
                await asyncio.sleep(0.01)
            async with client.get(address) as answer:
                assert answer.status == 503
        assert hangs.result().status == 408
        assert service.told == [("connection_refused", {"why": "too_many_of_address", "address": "127.0.0.1"})]

    get(visit, max_per_address=1, total_s=2.0)


def refusing(service):
    """Its keeper, which counts a connection that nobody has, so that it refuses every other one; and its port."""
    service.listener._keeper.open["held"] += 1
    return service.listener._keeper, service.listener.port


def test_a_refusal_reaches_who_sends_a_request_before_reading():
    """It is longer than the sockets between the two hold: some is sent after the connection was refused."""
    request = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 33554432\r\n\r\n" + bytes(32 << 20)

    async def visit(service, client, address):
        keeper, port = refusing(service)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        await writer.drain()
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        assert len(keeper.lingering) == 1 == keeper.open.total()
        writer.close()
        while keeper.lingering:
            await asyncio.sleep(0.01)

    get(visit, max_connections=1, idle_s=600.0)


def test_who_is_refused_is_let_go_after_a_time():
    async def visit(service, client, address):
        keeper, port = refusing(service)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        while keeper.lingering:
            await asyncio.sleep(0.01)
        writer.close()

    get(visit, max_connections=1, idle_s=0.1)


def test_few_who_are_refused_stay_connected(monkeypatch):
    monkeypatch.setattr(listener, "_LINGERING", 2)

    async def visit(service, client, address):
        keeper, port = refusing(service)
        peers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        for reader, _ in peers:
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        assert len(keeper.lingering) == 2 and len(service.told) == 4
        for _, writer in peers:
            writer.close()

    get(visit, max_connections=1, idle_s=600.0)


def test_who_is_refused_is_let_go_when_it_closes():
    async def go():
        service = Service(max_connections=1)
        async with service.listener:
            _, port = refusing(service)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            await reader.read()
            (refused,) = service.listener._keeper.lingering
        assert refused._transport.is_closing()
        writer.close()

    asyncio.run(go())


def test_what_is_open_when_it_closes_is_answered_and_nothing_else():
    async def visit(service, client, address):
        async with asyncio.TaskGroup() as group:
            hangs = group.create_task(client.get(f"{address}hang"))
            while not service.listener._keeper.open.total():
                await asyncio.sleep(0.01)
            service.listener.close()
            with pytest.raises(aiohttp.ClientConnectorError):
                await client.get(address)
            service.may_end.set()
        assert (hangs.result().status, await hangs.result().text()) == (200, "over")

    get(visit)


def test_a_taken_port_and_a_certificate_that_is_none_are_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unavailable, match=f"mine: cannot listen on 127.0.0.1 port {port} .*stop what"):
            get(None, port=port)
    (tmp_path / "cert.pem").write_text("none")
    with pytest.raises(InvalidConfig, match=r"tls: .*cert\.pem"):
        get(None, tls=TlsFiles(cert=str(tmp_path / "cert.pem")))


def test_a_secret_off_the_machine_needs_encryption_or_a_word():
    for settings in ({}, {"host": "0.0.0.0", "clear_text": True}, {"host": "0.0.0.0", "tls": TlsFiles(cert="c")}):
        Http(**settings).require_private("the password")
    with pytest.raises(InvalidConfig, match=r"clear_text: .*0\.0\.0\.0 without tls, where the password"):
        Http(host="0.0.0.0").require_private("the password")


def test_a_password_is_read_without_blanks_and_has_to_be_long(tmp_path):
    file = tmp_path / "password"
    file.write_text(f"  {'ü' * LEAST_PASSWORD}\n")
    assert read_password(file, "ui.password_file") == "ü" * LEAST_PASSWORD
    file.write_text("short\n")
    with pytest.raises(InvalidConfig, match=r"ui\.password_file: .* holds 5 characters") as error:
        read_password(file, "ui.password_file")
    assert "short" not in str(error.value)
    with pytest.raises(InvalidConfig, match=r"ui\.password_file: .*gone cannot be read \(No such file"):
        read_password(tmp_path / "gone", "ui.password_file")


def test_a_gateway_whose_port_is_taken_gives_its_storage_back(tmp_path):
    pytest.importorskip("pynetdicom")
    from cxr_triton.client.gateway.config import load_config
    from cxr_triton.client.gateway.service import Gateway

    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "gateway.yaml").write_text(
            f"storage: {tmp_path / 'storage'}\nread: {{max_images: 2}}\nweb: {{port: {taken.getsockname()[1]}}}\n"
            f"folder: {{path: {tmp_path / 'in'}}}\ndestinations: [{{name: pacs, aet: PACS, host: 127.0.0.1}}]\n"
        )
        config = load_config(tmp_path / "gateway.yaml")
        with pytest.raises(Unavailable, match="web: cannot listen"):
            asyncio.run(Gateway(config, io.StringIO()).run(asyncio.Event()))
    with contextlib.closing(open(tmp_path / "storage" / f"{config.name}.lock", "w")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
