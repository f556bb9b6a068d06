"""The worklist page over a queue with a job of every kind."""

import asyncio
import io
import re
import time

import aiohttp
import pytest
from axe import barriers, needs_axe
from browser import Browser
from chromium import CHROMIUM, browser
from chromium import Page as Html

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

from cxr_triton.client import login
from cxr_triton.client.gateway import worklist
from cxr_triton.client.gateway.config import load_config
from cxr_triton.client.gateway.log import Log
from cxr_triton.client.gateway.schema import Received, Result
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.worklist import Page
from cxr_triton.errors import InvalidConfig

PASSWORD = "correct horse battery"
STUDY, PATIENT = "1.2.826.0.1.99", "DOE-4711"


def received(number: int) -> Received:
    return Received(
        kind="image", sop_instance=f"1.2.3.{number}", digest=f"d{number}", sop_class="1.2", study=f"{STUDY}.{number}",
        series="1.8", transfer_syntax="1.2.840.10008.1.2.1", patient=PATIENT, view="PA", taken="2026", number=1,
        bytes=10, path=f"objects/{number}", source="tests",
    )  # fmt: skip


class Site:
    """A page on a free port with a queue: a job that is done, one dead (its text holds a UID), one grouped."""

    def __init__(self, folder, **section):
        (folder / "password").write_text(f"{section.pop('password', PASSWORD)}\n")
        lines = "".join(f", {key}: {value}" for key, value in section.items())
        (folder / "gateway.yaml").write_text(
            f"storage: {folder}\ndicom: {{}}\n"
            f"worklist: {{port: 0, password_file: {folder / 'password'}{lines}}}\n"
            "destinations: [{name: pacs, aet: PACS, host: 127.0.0.1}]\n"
        )
        config = load_config(folder / "gateway.yaml")
        self.log = io.StringIO()
        self.store = Store(config.queue_url, "operator")
        for number in range(3):
            self.store.add(received(number), 0, 0)
            self.store.group_due()
            if number == 2:
                break
            claim = self.store.claim_job(60)
            if number == 0:
                self.store.deliver(
                    claim, [Result(kind="k", sop_class="1", sop_instance="1.9", path="r")], {"pacs": {"k"}}, 1.0
                )
                (delivery,) = self.store.claim_deliveries("pacs", 60)
                self.store.delivered(delivery.id, final=True)
            else:
                self.store.bury(claim, f"INVALID_IMAGE: object {STUDY}.1 <b>is</b> empty")
        self.page = Page(config, self.store, Log(config, self.log))

    def run(self, visit):
        """What a visitor's coroutine gives, who has a client without cookies and the page's address."""

        async def go():
            async with (
                self.page.listener() as listener,
                aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as client,
            ):
                return await visit(client, listener.address)

        return asyncio.run(go())


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)


async def log_in(client, address, password=PASSWORD):
    async with client.post(f"{address}login", data={"password": password}) as answer:
        return answer.status, str(answer.url), await answer.text()


async def get(client, url, **more):
    async with client.get(url, **more) as answer:
        return answer.status, await answer.text()


async def post(client, url, data=None, **more):
    async with client.post(url, data=data, **more) as answer:
        return answer.status, await answer.text()


def token_of(html):
    return re.search(r'name="token" value="([0-9a-f]{64})"', html)[1]


def test_nothing_is_shown_or_done_before_the_login(site):
    async def visit(client, address):
        status, html = await get(client, address)
        assert status == 200 and "Password" in html and "job" not in Html(html).text
        for path in ("status.json", "jobs/2/retry"):
            assert (await get(client, address + path))[0] == 401
        assert (await post(client, f"{address}jobs/2/retry"))[0] == 401
        assert (await log_in(client, address, "wrong horse battery"))[0] == 403
        client.cookie_jar.update_cookies({"cxr_worklist": "made-up"})
        assert (await get(client, f"{address}status.json"))[0] == 401

    site.run(visit)
    assert site.store.counts()["jobs"]["dead"] == 1 and PASSWORD not in site.log.getvalue()


def test_the_page_says_what_came_where_it_is_and_what_failed_and_nothing_of_the_patient(site):
    async def visit(client, address):
        status, _, html = await log_in(client, address)
        return (
            status,
            html,
            (await get(client, f"{address}?state=failed"))[1],
            (await get(client, f"{address}?state=all"))[1],
        )

    status, opened, failed, everything = site.run(visit)
    assert status == 200 and "grouped" in Html(opened).text and "Research only. Not for diagnosis." in Html(opened).text
    assert "INVALID_IMAGE: object (UID) <b>is</b> empty" in Html(failed).text
    assert "pacs: 1 done" in Html(everything).text and "b" not in Html(failed).tags
    for html in (opened, failed, everything):
        assert STUDY not in html and PATIENT not in html


def test_patients_are_shown_where_the_file_says_so(tmp_path):
    async def visit(client, address):
        await log_in(client, address)
        return (await get(client, f"{address}?state=all"))[1]

    html = Site(tmp_path, patients="true").run(visit)
    assert PATIENT in html and f"{STUDY}.1" in html


def test_retry_and_drop_ask_first_and_happen_once(site):
    async def visit(client, address):
        await log_in(client, address)
        status, html = await get(client, f"{address}jobs/2/retry")
        assert status == 200 and "tried again" in html and site.store.job(2)["state"] == "dead"
        form = {"token": token_of(html)}
        assert (await post(client, f"{address}jobs/2/retry", form))[0] == 200
        assert site.store.job(2)["state"] == "grouped"
        assert (await post(client, f"{address}jobs/2/retry", form))[0] == 409
        assert (await post(client, f"{address}jobs/3/drop", form))[0] == 200
        assert site.store.job(3)["state"] == "dropped"
        assert (await post(client, f"{address}jobs/1/drop", form))[0] == 409, "it was done"
        assert (await get(client, f"{address}jobs/77/drop"))[0] == 404

    site.run(visit)
    assert '"worklist_retry"' in site.log.getvalue() and '"worklist_drop"' in site.log.getvalue()


def test_another_site_can_ask_for_nothing(site):
    async def visit(client, address):
        await log_in(client, address)
        form = {"token": token_of((await get(client, address))[1])}
        assert (await post(client, f"{address}jobs/2/retry", {"token": "0" * 64}))[0] == 403
        assert (await post(client, f"{address}jobs/2/retry"))[0] == 403
        assert (await post(client, f"{address}jobs/2/retry", form, headers={"Origin": "http://evil.example"}))[0] == 403
        assert (await get(client, address, headers={"Host": "evil.example"}))[0] == 421  # its name leads here
        async with client.get(address) as answer:
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
            assert answer.headers["Cache-Control"] == "no-store"

    site.run(visit)
    assert site.store.job(2)["state"] == "dead"


def test_the_cookie_is_kept_from_scripts_and_ends_with_the_session(site, monkeypatch):
    async def visit(client, address):
        async with client.post(f"{address}login", data={"password": PASSWORD}, allow_redirects=False) as answer:
            said = answer.headers["Set-Cookie"]
        assert "HttpOnly" in said and "SameSite=Strict" in said
        html = (await get(client, address))[1]
        (cookie,) = client.cookie_jar
        assert (await post(client, f"{address}logout", {"token": token_of(html)}))[0] == 200
        client.cookie_jar.update_cookies({cookie.key: cookie.value})
        assert (await get(client, f"{address}status.json"))[0] == 401
        monkeypatch.setattr(login, "SESSION_S", -1.0)
        await log_in(client, address)
        assert (await get(client, f"{address}status.json"))[0] == 401

    site.run(visit)


def test_guessing_is_slow(site, monkeypatch):
    async def visit(client, address):
        tried = [(await log_in(client, address, f"guess {number} of many"))[0] for number in range(login.TRIES + 2)]
        assert tried == [403] * login.TRIES + [429] * 2
        assert (await log_in(client, address))[0] == 429, "the right one tells nothing either"
        monkeypatch.setattr(login, "TRIES_S", 0.0)
        assert (await log_in(client, address))[0] == 200

    site.run(visit)


def test_the_numbers_are_those_of_the_queue(site):
    async def visit(client, address):
        await log_in(client, address)
        async with client.get(f"{address}status.json") as answer:
            return await answer.json()

    status = site.run(visit)
    assert status["jobs"]["done"] == status["jobs"]["dead"] == status["jobs"]["grouped"] == 1
    assert status["done_within"] == {"hour": 1, "day": 1} and "dead" not in status
    assert site.store.done_since(time.time() + 60) == 0


def test_long_lists_come_in_pieces(site, monkeypatch):
    monkeypatch.setattr(worklist, "ROWS", 2)

    async def visit(client, address):
        await log_in(client, address)
        first = (await get(client, f"{address}?state=all"))[1]
        older = re.search(r'href="(/\?state=all&amp;before=\d+)"', first)[1].replace("&amp;", "&")
        return first, (await get(client, address.rstrip("/") + older))[1]

    pages = [re.findall(r'<th scope="row">(\d+)</th>', html) for html in site.run(visit)]
    assert pages == [["3", "2"], ["1"]]


@browser
@pytest.mark.slow
def test_the_page_follows_the_queue_in_a_browser(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site.page._login, "is_in", lambda request: True)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--enable-logging=stderr", "--virtual-time-budget=9000", "--dump-dom"]  # fmt: skip

    async def visit(client, address):
        pipe = asyncio.subprocess.PIPE
        chromium = await asyncio.create_subprocess_exec(*command, address, stdout=pipe, stderr=pipe)
        asked, show = asyncio.Event(), site.page._status_now

        def seen():
            asked_before = asked.is_set()
            asyncio.run_coroutine_threadsafe(_set(asked), loop).result()
            if asked_before:
                site.store.drop([3])
            return show()

        loop = asyncio.get_running_loop()
        monkeypatch.setattr(site.page, "_status_now", seen)
        async with asyncio.timeout(300):
            return [part.decode() for part in await chromium.communicate()]

    html, errors = site.run(visit)
    assert "Worklist" in Html(html).text and "grouped" not in Html(html).text, "as it was at first"
    assert not re.findall("CONSOLE.*", errors)


@browser
@needs_axe
@pytest.mark.slow
def test_the_page_keeps_nobody_from_using_it(site, tmp_path):
    """axe-core finds no barrier in the login, the list and what asks before a job is dropped."""

    async def visit(client, address):
        found = {}
        async with Browser(tmp_path) as chromium, chromium.tab() as page:
            await page.go(f"{address}login", "document.querySelector('#password')")
            found["login"] = await barriers(page)
            await page.evaluate("document.querySelector('#password').focus()")
            await page.call("Input.insertText", text=PASSWORD)
            await page.press("Enter")
            await page.until("document.querySelector('#live')")
            for width, scheme in ((375, "light"), (1280, "dark")):
                await page.size(width, 900)
                found[f"list, {width} px"] = await barriers(page, [scheme])
            await page.go(f"{address}jobs/2/drop", "document.querySelector('form')")
            found["asked again"] = await barriers(page)
        return {state: told for state, told in found.items() if told}

    assert site.run(visit) == {}


@browser
@pytest.mark.slow
def test_a_browser_logs_in_and_retries(site, tmp_path):
    """Forms of a real browser, whose Origin the page's own policy decides."""
    profile = tmp_path / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
               "--remote-debugging-port=0", "--remote-allow-origins=*", "about:blank"]  # fmt: skip

    async def visit(client, address):
        quiet = asyncio.subprocess.DEVNULL
        chromium = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        try:
            async with asyncio.timeout(300):
                port = profile / "DevToolsActivePort"
                while not (port.exists() and port.read_text().count("\n")):
                    await asyncio.sleep(0.05)
                async with client.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json/list") as answer:
                    (tab,) = [each for each in await answer.json(content_type=None) if each["type"] == "page"]
                async with client.ws_connect(tab["webSocketDebuggerUrl"]) as devtools:
                    await go(devtools, f"location = '{address}'", "!!document.querySelector('[name=password]')")
                    fill = f"document.querySelector('[name=password]').value = '{PASSWORD}'; "
                    await go(
                        devtools, fill + "document.querySelector('button').click()", "!!document.querySelector('#live')"
                    )
                    await go(devtools, f"location = '{address}jobs/2/retry'", "document.title.startsWith('retry')")
                    await go(
                        devtools, "document.querySelector('main button').click()", "!!document.querySelector('#live')"
                    )
        finally:
            chromium.kill()
            await chromium.wait()

    site.run(visit)
    assert site.store.job(2)["state"] == "grouped"


async def go(devtools, script, until):
    """Run a script in the page, and wait until an expression holds in what it leads to."""
    await evaluate(devtools, script)
    while not await evaluate(devtools, until):
        await asyncio.sleep(0.05)


async def evaluate(devtools, expression):
    await devtools.send_json({"id": 1, "method": "Runtime.evaluate", "params": {"expression": expression}})
    while (answer := await devtools.receive_json()).get("id") != 1:
        pass
    return answer["result"]["result"].get("value")


async def _set(event):
    event.set()


@pytest.mark.parametrize("query", ["state=nothing", "before=x", "before=1%00"])
def test_a_wrong_question_is_refused(site, query):
    async def visit(client, address):
        await log_in(client, address)
        return (await get(client, f"{address}?{query}"))[0]

    assert site.run(visit) == 400


@pytest.mark.parametrize(
    "section, message",
    [
        ({"password": "short"}, "12 or more"),
        ({"host": "0.0.0.0"}, "the password could be read on its way"),
        ({"stow": "true"}, "unknown key 'stow' in gateway.yaml.worklist"),
    ],
)
def test_what_is_not_safe_is_refused(tmp_path, section, message):
    with pytest.raises(InvalidConfig, match=message):
        Site(tmp_path, **section)


def test_without_a_section_the_command_says_what_is_missing(tmp_path):
    from click.testing import CliRunner

    from cxr_triton.cli import main

    (tmp_path / "gateway.yaml").write_text(
        f"storage: {tmp_path}\ndicom: {{}}\ndestinations: [{{name: pacs, aet: PACS, host: 127.0.0.1}}]\n"
    )
    result = CliRunner().invoke(main, ["gateway", "worklist", "--config", str(tmp_path / "gateway.yaml")])
    assert result.exit_code != 0 and "worklist: is missing" in result.output
