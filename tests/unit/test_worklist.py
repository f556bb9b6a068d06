"""The worklist page over a queue with a job of every kind."""

import asyncio
import dataclasses
import io
import json
import re
import threading
import time

import aiohttp
import pytest
from axe import barriers, needs_axe
from browser import Browser
from chromium import Page as Html
from chromium import browser

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

import sqlalchemy as sa

from cxr_triton.client import login
from cxr_triton.client.gateway import watch, worklist
from cxr_triton.client.gateway.config import load_config
from cxr_triton.client.gateway.doors import Folder
from cxr_triton.client.gateway.log import Log
from cxr_triton.client.gateway.schema import Received, Result, jobs
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.watch import RejectedFiles, rejected_files
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
        self.folder = folder / "watched"
        (folder / "password").write_text(f"{section.pop('password', PASSWORD)}\n")
        lines = "".join(f", {key}: {value}" for key, value in section.items())
        (folder / "gateway.yaml").write_text(
            f"storage: {folder}\ndicom: {{}}\nfolder: {{path: {self.folder}}}\n"
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


def form_of(html):
    """The hidden fields of a page's form."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', html))


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
        form = form_of(html)
        assert (await post(client, f"{address}jobs/2/retry", form))[0] == 200
        assert site.store.job(2)["state"] == "grouped"
        assert (await post(client, f"{address}jobs/2/retry", form))[0] == 409
        form = form_of((await get(client, f"{address}jobs/3/drop"))[1])
        assert (await post(client, f"{address}jobs/3/drop", form))[0] == 200
        assert site.store.job(3)["state"] == "dropped"
        form = form_of((await get(client, f"{address}jobs/1/drop"))[1])
        assert (await post(client, f"{address}jobs/1/drop", form))[0] == 409, "it was done"
        assert (await get(client, f"{address}jobs/77/drop"))[0] == 404

    site.run(visit)
    assert '"worklist_retry"' in site.log.getvalue() and '"worklist_drop"' in site.log.getvalue()


@pytest.mark.parametrize("patients", [True, False])
def test_what_is_asked_about_is_shown(tmp_path, patients):
    """The row's facts, the patient's only where the file says so."""
    site = Site(tmp_path, patients=str(patients).lower())

    async def visit(client, address):
        await log_in(client, address)
        return (await get(client, f"{address}jobs/2/drop"))[1]

    html = site.run(visit)
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    about = {"patient": PATIENT, "study": f"{STUDY}.1"} if patients else {}
    assert re.fullmatch(r"\d+ s ago", facts.pop("came")) and facts == {"images": "1", "state": "dead", **about}
    assert (STUDY in html) == (PATIENT in html) == patients


@pytest.mark.parametrize("action", ["retry", "drop"])
@pytest.mark.parametrize("change", [{"state": "reading"}, {"first_at": 1.5}], ids=["moved on", "another job"])
def test_what_was_confirmed_happens_to_that_job_as_it_was_shown_only(site, action, change):
    async def visit(client, address):
        await log_in(client, address)
        form = form_of((await get(client, f"{address}jobs/2/{action}"))[1])
        with site.store._begin() as c:
            before = dict(c.execute(sa.select(jobs).where(jobs.c.id == 2)).one()._mapping)
            c.execute(sa.update(jobs).where(jobs.c.id == 2).values(change))
        status, said = await post(client, f"{address}jobs/2/{action}", form)
        assert (status, said) == (409, "Job 2 has moved on, or is another one now. Load the page again.\n")
        with site.store._begin() as c:
            assert dict(c.execute(sa.select(jobs).where(jobs.c.id == 2)).one()._mapping) == before | change
            c.execute(sa.update(jobs).where(jobs.c.id == 2).values(before))
        assert (await post(client, f"{address}jobs/2/{action}", form))[0] == 200, "it is that job again"

    site.run(visit)
    assert '"changed": false' in site.log.getvalue()


def test_a_form_is_good_for_what_it_asked_about_only(site):
    """Another job, another step, another time or state than were shown."""

    async def visit(client, address):
        await log_in(client, address)
        form = form_of((await get(client, f"{address}jobs/2/retry"))[1])
        for path in ("jobs/3/retry", "jobs/2/drop"):
            assert (await post(client, address + path, form))[0] == 403
        for change in ({"first_at": "1.5"}, {"first_at": "x"}, {"first_at": ""}, {"state": "grouped"}):
            assert (await post(client, f"{address}jobs/2/retry", form | change))[0] == 403

    site.run(visit)
    assert site.store.job(2)["state"] == "dead" and site.store.job(3)["state"] == "grouped"


def test_another_site_can_ask_for_nothing(site):
    async def visit(client, address):
        await log_in(client, address)
        form = form_of((await get(client, f"{address}jobs/2/retry"))[1])
        assert (await post(client, f"{address}jobs/2/retry", form | {"token": "0" * 64}))[0] == 403
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
        assert (await post(client, f"{address}logout", form_of(html)))[0] == 200
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

    least = site.store.counts()["oldest_open_s"]
    status = site.run(visit)
    assert 0 <= least <= status["oldest_open_s"] <= site.store.counts()["oldest_open_s"]
    assert status["rejected_files"] == 0 and set(status["objects"]) == {"image", "prior", "other", "conflict"}
    assert status["jobs"]["done"] == status["jobs"]["dead"] == status["jobs"]["grouped"] == 1
    assert status["done_within"] == {"hour": 1, "day": 1} and "dead" not in status
    assert site.store.done_since(time.time() + 60) == 0


def test_rejected_files_are_counted_where_they_can_be_seen(tmp_path):
    watched = Folder(path=str(tmp_path / "watched"))
    assert rejected_files(watched) == 0
    rejected = tmp_path / "watched" / "rejected"
    rejected.mkdir(parents=True)
    (rejected / "a.dcm").write_bytes(b"a")
    (rejected / "inner").mkdir()
    assert rejected_files(watched) == 1
    (rejected / "inner").rmdir()
    (rejected / "a.dcm").unlink()
    rejected.rmdir()
    rejected.write_bytes(b"no folder")
    assert rejected_files(watched) is None


def test_the_folder_of_rejected_files_is_not_looked_for_behind_a_link(tmp_path):
    (tmp_path / "watched").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.dcm").write_bytes(b"a")
    (tmp_path / "watched" / "rejected").symlink_to(tmp_path / "elsewhere")
    assert rejected_files(Folder(path=str(tmp_path / "watched"))) is None


def test_rejected_files_are_counted_now_and_then_for_all_who_ask(tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(watch, "rejected_files", lambda config: looks.append(config) or len(looks))
    monkeypatch.setattr(watch, "LOOK_S", 600.0)
    rejected = RejectedFiles(Folder(path=str(tmp_path)))
    monkeypatch.setattr(watch, "KEPT_S", 3600.0)
    assert [rejected.count() for _ in range(3)] == [1, 1, 1] and len(looks) == 1
    monkeypatch.setattr(watch, "KEPT_S", 0.0)
    assert rejected.count() == 2


def test_a_file_system_that_hangs_is_looked_at_once_and_holds_up_no_page(site, monkeypatch):
    answered, looks = threading.Event(), []
    monkeypatch.setattr(watch, "rejected_files", lambda config: looks.append(config) or (answered.wait() and 4))
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    monkeypatch.setattr(watch, "KEPT_S", 3600.0)

    async def visit(client, address):
        await log_in(client, address)
        pages = [(await get(client, address))[1] for _ in range(2)]
        answered.set()
        while (count := json.loads((await get(client, f"{address}status.json"))[1])["rejected_files"]) is None:
            await asyncio.sleep(0.01)
        return pages, count

    pages, count = site.run(visit)
    assert all("<dt>rejected files</dt><dd>unknown</dd>" in html for html in pages)
    assert count == 4 and len(looks) == 1


def test_long_lists_come_in_pieces(site, monkeypatch):
    monkeypatch.setattr(worklist, "ROWS", 2)

    async def visit(client, address):
        await log_in(client, address)
        first = (await get(client, f"{address}?state=all"))[1]
        older = re.search(r'href="(/\?state=all&amp;before=\d+)"', first)[1].replace("&amp;", "&")
        return first, (await get(client, address.rstrip("/") + older))[1]

    pages = [re.findall(r'<th scope="row">(\d+)</th>', html) for html in site.run(visit)]
    assert pages == [["3", "2"], ["1"]]


NUMBERS = """Object.fromEntries([...document.querySelectorAll(".numbers div")].map(
    (each) => [each.querySelector("dt").textContent, each.querySelector("dd").textContent]))"""
CELL = "document.querySelector('#job-3 td').textContent"


@pytest.fixture
def quickly(monkeypatch, tmp_path):
    """The page renews itself more often."""
    script = worklist._SCRIPT.read_text("utf-8")
    assert "EVERY_MS = 3000;" in script
    script = script.replace("EVERY_MS = 3000;", "EVERY_MS = 100;").replace("LIMIT_MS = 10_000;", "LIMIT_MS = 2000;")
    (tmp_path / "quick.js").write_text(script)
    monkeypatch.setattr(worklist, "_SCRIPT", tmp_path / "quick.js")


def in_a_browser(site, folder, visit):
    """What a coroutine gives that has a tab, logged in, and the page's address."""

    async def go(client, address):
        async with Browser(folder / "browser") as chromium, chromium.tab() as tab:
            await tab.go(address, "document.querySelector('[name=password]')")
            await tab.evaluate(f"document.querySelector('[name=password]').value = '{PASSWORD}'")
            await tab.evaluate("document.querySelector('button').click()")
            await tab.until("document.querySelector('#live')")
            found = await visit(tab, address)
            assert tab.complaints == [] and all(each.startswith(address) for each in tab.asked)
            return found

    return site.run(go)


async def click(tab, selector):
    """A press of the mouse in the middle of what is in sight of an element."""
    x, y = await tab.evaluate(
        f"(({{left, top, right, bottom}}) => [(left + right) / 2, (top + bottom) / 2])"
        f"(document.querySelector({selector!r}).getBoundingClientRect())"
    )
    await tab.mouse("mousePressed", x, y, button="left", clickCount=1)
    await tab.mouse("mouseReleased", x, y, button="left", clickCount=1)


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
def test_who_is_at_the_table_sees_it_renewed_and_stays_where_they_are(site, tmp_path, quickly):
    active = "document.activeElement.id"

    async def visit(tab, address):
        await tab.size(375, 700)
        await tab.go(f"{address}?state=all", "document.querySelector('#live')")
        await tab.evaluate("window.table = document.querySelector('#jobs'); table.scrollLeft = 40")
        await tab.evaluate("table.scrollIntoView()")
        await click(tab, "#jobs")
        assert await tab.evaluate(active) == "jobs"
        site.store.drop([3])
        await tab.until(f"{CELL} === 'dropped'")
        site.store.add(received(9), 0, 0)
        await tab.until("document.querySelector('#job-4')")
        assert await tab.evaluate(f"[{active}, document.querySelector('#jobs') === table, table.scrollLeft]") == [
            "jobs", True, 40,
        ]  # fmt: skip
        rows = "[...document.querySelectorAll('tbody tr')].map((each) => each.id)"
        assert await tab.evaluate(rows) == [f"job-{number}" for number in (4, 3, 2, 1)]
        await tab.evaluate("document.querySelector('#drop-2').focus()")
        site.store.retry([2])  # its other link goes, and this one is no other's
        await tab.until("!document.querySelector('#retry-2')")
        assert await tab.evaluate(f"[{active}, document.activeElement.pathname]") == ["drop-2", "/jobs/2/drop"]
        site.store.drop([2])
        await tab.until("!document.querySelector('#drop-2')")
        assert await tab.evaluate(active) == "jobs", "a keyboard goes on from there"

    in_a_browser(site, tmp_path, visit)


@browser
@pytest.mark.slow
def test_retry_and_drop_in_a_browser(site, tmp_path, quickly):
    """Links by mouse and keyboard, the question after them, and forms whose Origin the page's own policy decides."""

    async def visit(tab, address):
        await click(tab, 'nav a[href="/?state=failed"]')
        await tab.until("document.querySelector('#retry-2')")
        tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        links = [node["name"]["value"] for node in tree if node.get("role", {}).get("value") == "link"]
        assert [name for name in links if "job" in name] == ["retry job 2", "drop job 2"]
        await click(tab, "#retry-2")
        await tab.until("document.title === 'retry job 2?'")
        assert "tried again" in await tab.evaluate("document.body.innerText")
        await click(tab, "main a")  # keep it as it is
        await tab.until("document.querySelector('#live')")
        assert site.store.job(2)["state"] == "dead"
        await tab.go(f"{address}?state=failed", "document.querySelector('#retry-2')")
        await click(tab, "#retry-2")
        await tab.until("document.title === 'retry job 2?'")
        assert site.store.job(2)["state"] == "dead", "a link changes nothing"
        await click(tab, "main button")
        await tab.until("document.querySelector('#job-2')")
        assert site.store.job(2)["state"] == "grouped"
        assert await tab.evaluate("document.querySelector('#job-2 td').textContent") == "grouped"
        await tab.evaluate("document.querySelector('#drop-3').focus()")
        await tab.press("Enter")
        await tab.until("document.title === 'drop job 3?'")
        assert "cannot be undone" in await tab.evaluate("document.body.innerText")
        assert site.store.job(3)["state"] == "grouped"
        await tab.evaluate("document.querySelector('main button').focus()")
        await tab.press("Enter")
        await tab.until("document.querySelector('#live') && location.search === '?state=failed'")
        assert site.store.job(3)["state"] == "dropped"

    in_a_browser(site, tmp_path, visit)
    told = site.log.getvalue()
    assert told.count('"worklist_retry"') == told.count('"worklist_drop"') == 1


@browser
@pytest.mark.slow
def test_the_numbers_in_a_browser_are_the_queues_and_live(site, tmp_path, quickly, monkeypatch):
    monkeypatch.setattr(watch, "KEPT_S", 0.0)

    def since(seconds):
        """All jobs came so long ago."""
        with site.store._begin() as c:
            c.execute(sa.update(jobs).values(first_at=time.time() - seconds))

    async def shown(tab):
        """What the page says, of which the second renewal began and ended within two looks at the queue."""
        before = site.store.counts()["oldest_open_s"]
        for _ in range(2):
            await tab.evaluate("new Promise((renewed) => new MutationObserver(renewed).observe(live, {subtree: true, "
                               "childList: true, characterData: true}))")  # fmt: skip
        numbers = await tab.evaluate(NUMBERS)
        age_s = int(numbers["oldest open"].removesuffix(" s"))
        return numbers, age_s, before - 1 <= age_s <= site.store.counts()["oldest_open_s"] + 1

    async def visit(tab, address):
        await tab.evaluate("window.first = true")
        since(5000)
        await tab.until(f"parseInt(({NUMBERS})['oldest open']) >= 5000")
        numbers, age_s, is_of_the_queue = await shown(tab)
        assert is_of_the_queue and age_s < 5600
        assert (numbers["open"], numbers["failed"]) == ("1", "1")
        assert (numbers["done in an hour"], numbers["done in a day"]) == ("1", "1")
        await tab.until(f"parseInt(({NUMBERS})['oldest open']) > {age_s}")
        claim = site.store.claim_job(60)
        site.store.deliver(claim, [Result(kind="k", sop_class="1", sop_instance="1.10", path="r")], {"pacs": {"k"}}, 1)
        (delivery,) = site.store.claim_deliveries("pacs", 60)
        site.store.delivered(delivery.id, final=True)
        await tab.until(f"({NUMBERS})['done in an hour'] === '2'")
        numbers = await tab.evaluate(NUMBERS)
        done = str(site.store.done_since(time.time() - 3600))
        assert (numbers["open"], numbers["oldest open"], numbers["done in a day"]) == ("0", "0 s", done) and done == "2"
        assert (numbers["no radiographs"], numbers["conflicts"]) == ("0", "0")
        site.store.add(dataclasses.replace(received(20), kind="other"), 0, 0)
        site.store.add(dataclasses.replace(received(0), digest="another"), 0, 0)
        (site.folder / "rejected").mkdir(parents=True)
        (site.folder / "rejected" / "no.dcm").write_bytes(b"no")
        await tab.until(f"({NUMBERS})['rejected files'] === '1'")
        numbers, kept = await tab.evaluate(NUMBERS), site.store.counts()["objects"]
        assert (numbers["no radiographs"], numbers["conflicts"]) == ("1", "1")
        assert (kept["other"], kept["conflict"]) == (1, 1) and numbers["open"] == "0"
        assert await tab.evaluate("window.first"), "it is the page that was loaded first"

    in_a_browser(site, tmp_path, visit)


@browser
@pytest.mark.slow
def test_the_page_says_that_it_is_old_while_no_answer_comes(site, tmp_path, quickly, monkeypatch):
    """A renewal that nobody answers ends by itself, and the page goes on once somebody does."""
    answered, listed = threading.Event(), site.store.listed
    answered.set()

    def slow(*args, **kwargs):
        answered.wait()
        return listed(*args, **kwargs)

    monkeypatch.setattr(site.store, "listed", slow)

    async def visit(tab, address):
        answered.clear()
        try:
            await tab.until("said.textContent.includes('old')")
        finally:
            answered.set()
        await tab.until("said.textContent === ''")
        site.store.drop([3])
        await tab.go(f"{address}?state=all", f"{CELL} === 'dropped'")

    in_a_browser(site, tmp_path, visit)


@browser
@pytest.mark.slow
def test_a_pause_that_is_ticked_during_a_renewal_holds(site, tmp_path, quickly):
    """The tick comes between the answer's arrival and its use."""

    async def visit(tab, address):
        await tab.evaluate("""window.answers = fetch; window.fetch = async (...asked) => {
            const answer = await answers(...asked);
            const text = answer.text.bind(answer);
            answer.text = async () => {
                const page = (await text()).replaceAll("grouped", "changed");
                document.querySelector("#pause").checked = true;
                setTimeout(() => { window.ended = true; });
                return page;
            };
            return answer;
        }""")
        await tab.until("window.ended")
        assert await tab.evaluate(CELL) == "grouped"
        await tab.evaluate("window.fetch = answers; document.querySelector('#pause').checked = false")
        site.store.group_due()
        site.store.claim_job(60)
        await tab.until(f"{CELL} === 'reading'")

    in_a_browser(site, tmp_path, visit)


@browser
@pytest.mark.slow
def test_rows_that_change_their_order_are_all_kept(site, tmp_path):
    """Every list of three rows renewed by every other, in its order."""

    async def visit(tab, address):
        return await tab.evaluate("""(() => {
            const lists = [""], wrong = [];
            for (const list of lists)
                for (const row of "ABC") if (!list.includes(row)) lists.push(list + row);
            const made = (list) => {
                const body = document.createElement("div");
                body.innerHTML = [...list].map((row) => `<p id="row-${row}">${row}</p>`).join(" ");
                return body;
            };
            for (const before of lists)
                for (const after of lists) {
                    const body = made(before);
                    update(body, made(after));
                    if (body.textContent !== [...after].join(" ")) wrong.push([before, after, body.textContent]);
                }
            return [lists.length, wrong];
        })()""")

    assert in_a_browser(site, tmp_path, visit) == [16, []]


@browser
@pytest.mark.slow
def test_the_table_stays_where_it_is_when_draining_begins_and_ends(site, tmp_path, quickly):
    async def visit(tab, address):
        await tab.size(375, 700)
        await tab.go(f"{address}?state=all", "document.querySelector('#live')")
        await tab.evaluate("window.table = document.querySelector('#jobs'); table.scrollLeft = 40")
        await tab.evaluate("document.querySelector('#drop-3').focus({preventScroll: true})")
        stays = "[document.activeElement.id, document.querySelector('#jobs') === table, table.scrollLeft]"
        before = await tab.evaluate(stays)
        assert before == ["drop-3", True, 40]
        for on in (True, False):
            site.store.set_draining(on)
            await tab.until(f"live.textContent.includes('Draining') === {str(on).lower()}")
            assert await tab.evaluate(stays) == before

    in_a_browser(site, tmp_path, visit)


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
