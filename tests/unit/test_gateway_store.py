"""The gateway's parts without a network: its file, its queue, its choices."""

import asyncio
import contextlib
import io
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

import sqlalchemy.exc
import sr_case

from cxr_triton import phantom, phantom_file
from cxr_triton.cli import main
from cxr_triton.client.gateway import deliver, read
from cxr_triton.client.gateway.config import EXAMPLE, Config, load_config
from cxr_triton.client.gateway.database import CommitInDoubt, LeaseLost
from cxr_triton.client.gateway.deliver import Deliverer
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.read import ReadWorker, choose
from cxr_triton.client.gateway.schema import Received, Result
from cxr_triton.client.gateway.send import judge, judge_stow
from cxr_triton.client.gateway.store import JobSeen, Store
from cxr_triton.errors import InvalidConfig, InvalidImage, LimitExceeded
from cxr_triton.pixels.dicom import read_identity
from cxr_triton.reading import Reading

DESTINATION = "destinations: [{name: pacs, aet: PACS, host: 127.0.0.1}]\n"


def write(folder, text):
    path = folder / "gateway.yaml"
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------------------- file


def test_the_example_is_valid_and_says_the_defaults(tmp_path):
    example = load_config(EXAMPLE)
    least = load_config(write(tmp_path, f"storage: {tmp_path}\ndicom: {{}}\n{DESTINATION}"))
    assert example.group == least.group and example.read == least.read and example.intake == least.intake
    # Every commented value is the default: with the comment signs taken away the file means the same.
    for section, line in (("dicom", "max_associations: 32"), ("read", "max_attempts: 20")):
        assert f"# {line}" in EXAMPLE.read_text()
        key, value = line.split(": ")
        assert getattr(getattr(least, section), key) == int(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("storag: x", "did you mean 'storage'"),
        (f"storage: /tmp/x\ndicom: {{prt: 1}}\n{DESTINATION}", "gateway.yaml.dicom.*did you mean 'port'"),
        (f"storage: /tmp/x\n{DESTINATION}", "nothing would come in"),
        (f"storage: /tmp/x\ndicom: {{host: 0.0.0.0}}\n{DESTINATION}", "peers: is empty"),
        (f"storage: /tmp/x\ndicom: {{aet: THIS_TITLE_IS_TOO_LONG}}\n{DESTINATION}", "no AE title"),
        (f"storage: /tmp/x\ndicom: {{port: 70000}}\n{DESTINATION}", "outside 0 to 65535"),
        (f"storage: /tmp/x\ndicom: {{peers: [{{aet: A, addresses: [10.0.0.300]}}]}}\n{DESTINATION}", "addresses"),
        ("storage: /tmp/x\ndicom: {}\ndestinations: []\n", "at least one"),
        ("storage: /tmp/x\ndicom: {}\ndestinations: [{name: a, kind: stow, url: ftp://x}]\n", "http"),
        (f"storage: /tmp/x\ndicom: {{}}\nresults: {{kinds: [sr]}}\n{DESTINATION}", "'sr' is none of findings_sr"),
        (
            f"storage: /tmp/x\ndicom: {{}}\nread: {{identifiers: hash}}\n{DESTINATION}",
            "'hash' is none of plain, hashed",
        ),
        (f"storage: /tmp/x\nweb: {{tls: {{ca: x.pem}}}}\n{DESTINATION}", "tls.cert: is missing"),
        (f"storage: /tmp/x\ndicom: {{}}\nread: {{retry_s: []}}\n{DESTINATION}", "waits over 0"),
        (f"storage: /tmp/x\ndicom: {{}}\npriors: {{url: http://x}}\n{DESTINATION}", "no room for a prior"),
        (f"storage: /tmp/x\nweb: {{stow: true, host: 0.0.0.0}}\n{DESTINATION}", "needs a token"),
        (
            "storage: /tmp/x\nfolder: {path: x}\ndestinations: [{name: a, aet: A, host: h, commitment: true}]",
            "listener",
        ),
        ("- a list", "is list"),
        (":\n\t", "not readable as YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_the_key(tmp_path, text, message):
    with pytest.raises(InvalidConfig, match=message):
        load_config(write(tmp_path, text))


def test_the_verb_says_what_is_wrong_with_the_file(tmp_path):
    done = CliRunner().invoke(main, ["gateway", "--config", str(write(tmp_path, "storag: x"))])
    assert done.exit_code == 1 and "[INVALID_CONFIG]" in done.stderr and "storage" in done.stderr


# ---------------------------------------------------------------------------------------------------------- queue


@pytest.fixture
def store(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/queue.sqlite", "one")
    yield store
    store.close()


def received(sop="1.2.3", digest="d", study="1.9", kind="image", **more):
    return Received(
        **{
            "kind": kind,
            "sop_instance": sop,
            "digest": digest,
            "sop_class": "1.2",
            "study": study,
            "series": "1.8",
            "transfer_syntax": "1.2.840.10008.1.2.1",
            "patient": "p",
            "view": "PA",
            "taken": "2026",
            "number": 1,
            "bytes": 10,
            "path": f"objects/{digest}",
            "source": "test",
            **more,
        }
    )


def states(store):
    return {state: count for state, count in store.counts()["jobs"].items() if count}


def ready_job(store, **kwargs):
    store.add(received(**kwargs), quiet_s=0, max_wait_s=0)
    store.group_due()
    return store.claim_job(60)


def result(kind="findings_sr", sop="2.25.1"):
    return Result(kind=kind, sop_class="1.2.840.10008.5.1.4.1.1.88.34", sop_instance=sop, path=f"results/1/{kind}")


def test_a_study_is_grouped_after_quiet_and_at_the_latest_after_the_wait(store):
    store.add(received("1.1"), quiet_s=3600, max_wait_s=3600)
    assert store.group_due() == 0 and states(store) == {"received": 1}
    store.add(received("1.2", digest="e"), quiet_s=3600, max_wait_s=0.2)
    ends = time.monotonic() + 60
    while not store.group_due() and time.monotonic() < ends:
        time.sleep(0.02)
    job = store.claim_job(60)
    assert len(store.inputs(job.id)) == 2 and states(store) == {"reading": 1}


def test_the_same_bytes_again_change_nothing_and_other_bytes_are_kept_beside(store):
    assert store.add(received(), 0, 0) == "image"
    assert store.add(received(), 0, 0) == "duplicate"
    assert store.add(received(digest="other"), 0, 0) == "conflict"
    assert store.add(received(digest="other"), 0, 0) == "duplicate"
    store.group_due()
    assert [image.digest for image in store.inputs(store.claim_job(60).id)] == ["d"]
    assert store.counts()["objects"] == {"image": 1, "prior": 0, "other": 0, "conflict": 1}


def test_a_late_image_makes_a_new_job_of_all_images(store):
    first = ready_job(store)
    store.add(received("1.2.4", digest="late"), 0, 0)
    store.group_due()
    second = store.claim_job(60)
    assert second.id != first.id and len(store.inputs(second.id)) == 2 and len(store.inputs(first.id)) == 1


def test_what_is_no_radiograph_is_kept_and_makes_no_job(store):
    assert store.add(received(kind="other"), 0, 0) == "other"
    assert states(store) == {} and store.counts()["objects"]["other"] == 1


def test_a_job_that_reads_the_same_images_as_an_earlier_one_is_told_so(store):
    first = ready_job(store)
    assert store.start_reading(first, [1]) is None
    store.deliver(first, [result()], {"pacs": {"findings_sr"}}, 1.0)
    second = ready_job(store, sop="1.2.4", digest="late")
    assert store.start_reading(second, [1, 2]) is None
    assert store.start_reading(second, [1]) == first.id


def test_a_job_is_read_by_one_and_taken_over_when_its_lease_has_run_out(store, tmp_path):
    other = Store(f"sqlite:///{tmp_path}/queue.sqlite", "two")
    job = ready_job(store)
    assert other.claim_job(60) is None
    assert store.renew(job, 0.0)
    time.sleep(0.01)
    taken = other.claim_job(60)
    assert taken.id == job.id
    assert not store.renew(job, 60)
    with pytest.raises(LeaseLost):  # too late: it is the other's
        store.deliver(job, [result()], {"pacs": {"findings_sr"}}, 1.0)
    other.deliver(taken, [result()], {"pacs": {"findings_sr"}}, 1.0)
    assert len(other.claim_deliveries("pacs", 60)) == 1
    other.close()


def run_out(store):
    """Let all leases have run out."""
    with store._begin() as c:
        c.exec_driver_sql("UPDATE jobs SET lease_until = 1 WHERE lease_until IS NOT NULL")
        c.exec_driver_sql("UPDATE deliveries SET lease_until = 1 WHERE lease_until IS NOT NULL")


def leases(store):
    with store._begin() as c:
        return c.exec_driver_sql("SELECT lease_until FROM deliveries WHERE state = 'pending'").scalars().all()


def test_a_gateway_does_not_take_what_it_still_works_on(store, tmp_path):
    job = ready_job(store)
    run_out(store)
    assert store.claim_job(60, [job.id]) is None
    assert store.renew(job, 60), "nobody took it meanwhile"
    run_out(store)
    other = Store(f"sqlite:///{tmp_path}/queue.sqlite", "two")
    assert other.claim_job(60).id == job.id
    other.close()


def test_an_earlier_claim_changes_nothing_even_if_the_same_gateway_has_the_job_again(store):
    earlier = ready_job(store)
    run_out(store)
    later = store.claim_job(60)
    assert later.id == earlier.id and later.generation > earlier.generation
    assert not store.renew(earlier, 60)
    store.put_back(earlier, 0, "late")
    store.bury(earlier, "late")
    store.finish(earlier, "late")
    with pytest.raises(LeaseLost):
        store.start_reading(earlier, [1])
    with pytest.raises(LeaseLost):
        store.deliver(earlier, [result()], {"pacs": {"findings_sr"}}, 1.0)
    assert states(store) == {"reading": 1} and store.claim_deliveries("pacs", 60) == []
    store.put_back(later, 0, "an attempt that does not count", counts=False)
    again = store.claim_job(60)
    assert again.generation > later.generation and not store.renew(later, 60)
    store.deliver(again, [result()], {"pacs": {"findings_sr"}}, 1.0)
    with pytest.raises(LeaseLost):
        store.deliver(again, [result()], {"pacs": {"findings_sr"}}, 1.0)
    assert len(store.claim_deliveries("pacs", 60)) == 1


def test_an_earlier_holder_of_a_result_does_not_give_it_back(store, tmp_path):
    store.deliver(ready_job(store), [result()], {"a": {"findings_sr"}}, 1.0)
    (row,) = store.claim_deliveries("a", 60)
    run_out(store)
    other = Store(f"sqlite:///{tmp_path}/queue.sqlite", "two")
    assert [taken.id for taken in other.claim_deliveries("a", 60)] == [row.id]
    store.postpone(row.id, 0, "late")
    store.undeliverable(row.id, "late")
    assert states(store) == {"sending": 1} and store.claim_deliveries("a", 60) == []
    store.delivered(row.id, final=True)  # it was sent all the same
    assert states(store) == {"done": 1}
    other.close()


def test_a_queue_of_an_earlier_release_is_taken_over(store, tmp_path):
    ready_job(store)
    with store._begin() as c:
        for column in ("generation", "traceparent"):
            c.exec_driver_sql(f"ALTER TABLE jobs DROP COLUMN {column}")
    run_out(store)
    again = Store(f"sqlite:///{tmp_path}/queue.sqlite", "one")
    claim = again.claim_job(60)
    assert claim.generation == 1 and claim.traceparent == ""
    again.close()


def test_a_restart_takes_back_what_its_own_name_held(store, tmp_path):
    job = ready_job(store)
    again = Store(f"sqlite:///{tmp_path}/queue.sqlite", "one")
    again.start()
    taken = again.claim_job(60)
    assert taken.id == job.id and taken.attempts == 1  # the interrupted attempt does not count
    with pytest.raises(LeaseLost):
        store.deliver(job, [result()], {"pacs": {"findings_sr"}}, 1.0)  # of the earlier process
    again.deliver(taken, [result()], {"pacs": {"findings_sr"}}, 1.0)
    assert again.claim_deliveries("pacs", 60) and not again.claim_deliveries("pacs", 60)
    again.start()
    assert len(again.claim_deliveries("pacs", 60)) == 1
    again.close()


def test_a_job_is_done_when_every_destination_has_everything(store):
    job = ready_job(store)
    results = [result("findings_sr", "2.25.1"), result("text_sr", "2.25.2")]
    kinds = {"findings_sr", "text_sr"}
    store.deliver(job, results, {"a": kinds, "b": kinds}, 1.0)
    for destination in ("a", "b"):
        for row in store.claim_deliveries(destination, 60):
            assert states(store) == {"sending": 1}
            store.delivered(row.id, final=True)
    assert states(store) == {"done": 1}
    assert [step["state"] for step in store.job(job.id)["history"]] == [
        "received", "grouped", "reading", "sending", "done",
    ]  # fmt: skip


def test_a_postponed_result_comes_back_when_it_is_due(store):
    job = ready_job(store)
    store.deliver(job, [result()], {"a": {"findings_sr"}}, 1.0)
    (row,) = store.claim_deliveries("a", 60)
    store.postpone(row.id, time.time() + 3600, "status 0xA700")
    assert store.claim_deliveries("a", 60) == []
    store.postpone(row.id, time.time() - 1, "status 0xA700")
    (row,) = store.claim_deliveries("a", 60)
    assert row.attempts == 2 and row.error == "status 0xA700"


def test_dead_letters_are_brought_back_where_they_stopped(store):
    unread, unsent = ready_job(store), None
    store.bury(unread, "[INVALID_IMAGE] no")
    unsent = ready_job(store, sop="1.5", study="1.5", digest="e")
    store.deliver(unsent, [result()], {"a": {"findings_sr"}}, 1.0)
    store.undeliverable(store.claim_deliveries("a", 60)[0].id, "status 0xC000")
    assert states(store) == {"dead": 2} and store.status()["dead"][0]["error"] == "[INVALID_IMAGE] no"
    assert store.retry([unread.id]) == [unread.id] and states(store) == {"grouped": 1, "dead": 1}
    assert store.retry() == [unsent.id] and states(store) == {"grouped": 1, "sending": 1}
    assert len(store.claim_deliveries("a", 60)) == 1


def test_a_dropped_job_is_neither_read_nor_sent(store):
    job = ready_job(store)
    assert store.drop([job.id]) == [job.id] and store.drop([job.id]) == []
    with pytest.raises(LeaseLost):
        store.deliver(job, [result()], {"a": {"findings_sr"}}, 1.0)
    sending = ready_job(store, sop="1.5", study="1.5", digest="e")
    store.deliver(sending, [result()], {"a": {"findings_sr"}}, 1.0)
    store.drop([sending.id])
    assert store.claim_deliveries("a", 60) == [] and states(store) == {"dropped": 2}


def test_the_number_of_a_job_that_was_forgotten_is_not_given_again(store):
    first = ready_job(store)
    store.drop([first.id])
    store.purge(time.time() + 60, time.time() + 60)
    assert store.job(first.id) is None
    assert ready_job(store, sop="1.5", study="1.5", digest="e").id > first.id


def test_a_queue_of_an_earlier_release_whose_numbers_can_come_again_is_taken_as_it_is(store, tmp_path):
    """What was seen keeps an operator's word from another job of the same number."""
    with store._begin() as c:
        made = c.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = 'jobs'").scalar()
        c.exec_driver_sql("DROP TABLE jobs")
        c.exec_driver_sql(made.replace("AUTOINCREMENT", ""))
    earlier = Store(f"sqlite:///{tmp_path}/queue.sqlite", "one")
    first = ready_job(earlier)
    seen = JobSeen(first.first_at, "reading")
    earlier.drop([first.id])
    earlier.purge(time.time() + 60, time.time() + 60)
    second = ready_job(earlier, sop="1.5", study="1.5", digest="e")
    assert second.id == first.id and earlier.drop([second.id], seen=seen) == []
    assert earlier.drop([second.id], seen=JobSeen(second.first_at, "reading")) == [second.id]
    earlier.close()


def test_commitment_is_awaited_and_a_lost_result_is_sent_again(store):
    job = ready_job(store)
    results = [result("findings_sr", "2.25.1"), result("text_sr", "2.25.2")]
    store.deliver(job, results, {"a": {"findings_sr", "text_sr"}}, 1.0)
    for row in store.claim_deliveries("a", 60):
        store.delivered(row.id, final=False)
    waiting = store.uncommitted("a", older_than=0)
    assert len(waiting) == 2 and states(store) == {"sending": 1}
    store.asked_commitment([row.id for row in waiting], "2.25.9")
    assert store.uncommitted("a", older_than=0) == []
    assert store.committed("2.25.8", {"2.25.1"}, {}) == (0, 0)  # of another transaction
    assert store.committed("2.25.9", {"2.25.1"}, {"2.25.2": "commitment failed with 0x0112"}) == (1, 1)
    (again,) = store.claim_deliveries("a", 60)
    assert again.sop_instance == "2.25.2" and again.attempts == 1
    store.delivered(again.id, final=False)
    store.asked_commitment([again.id], "2.25.10")
    store.committed("2.25.10", {"2.25.2"}, {})
    assert states(store) == {"done": 1}


def test_retention_forgets_what_ended_and_keeps_what_is_open(store):
    done = ready_job(store)
    store.deliver(done, [result()], {"a": {"findings_sr"}}, 1.0)
    store.delivered(store.claim_deliveries("a", 60)[0].id, final=True)
    ready_job(store, sop="1.5", study="1.5", digest="open")
    now = time.time()
    assert store.purge(now - 3600, now - 3600) == []
    assert sorted(store.purge(now + 1, now + 1)) == ["objects/d", "results/1/findings_sr"]
    assert states(store) == {"reading": 1} and store.known(["objects/d", "objects/open"]) == {"objects/open"}


def test_many_threads_add_and_claim_without_losing_or_doubling(store):
    taken, lock = [], threading.Lock()

    def work(i):
        for j in range(10):
            store.add(received(f"1.{i}.{j}", digest=f"{i}-{j}", study=f"1.{i}.{j}"), 0, 0)
            store.group_due()
            if job := store.claim_job(60):
                with lock:
                    taken.append(job.id)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while store.group_due() or (job := store.claim_job(60)):
        if job:
            taken.append(job.id)
    assert len(taken) == len(set(taken)) == 60


def test_another_database_is_refused(tmp_path):
    with pytest.raises(InvalidConfig, match="none of sqlite, postgresql"):
        Store("mysql://x", "one")
    with pytest.raises(InvalidConfig, match="check the URL"):
        Store(f"sqlite:///{tmp_path}/no/such/folder/queue.sqlite", "one")


# ------------------------------------------------------------------------------------------------------- failures


@pytest.mark.slow
def test_outcomes_that_the_queue_could_not_take_are_told_later_and_nothing_is_sent_again(tmp_path, monkeypatch):
    """The queue fails, twice, as the first of two results was sent; both are in one batch under a lease of minutes."""
    config = load_config(write(tmp_path, f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\n{DESTINATION}"))
    store = Store(config.queue_url, config.name)
    job = ready_job(store)
    results = [result("findings_sr", "2.25.1"), result("text_sr", "2.25.2")]
    store.deliver(job, results, {"pacs": {"findings_sr", "text_sr"}}, 1.0)
    failures, sent = iter("ab"), []

    class FailingStore(Store):
        def delivered(self, *args, **kwargs):
            if next(failures, None):
                raise sqlalchemy.exc.OperationalError("UPDATE", None, Exception("the database is away"))
            super().delivered(*args, **kwargs)

    async def send(batch, report):
        for row in batch:
            sent.append(row.sop_instance)
            report(row, "stored", "")

    failing = FailingStore(config.queue_url, config.name)
    metrics = Metrics(store.counts, lambda: 0)
    deliverer = Deliverer(config.destinations[0], config, failing, Log(config, io.StringIO()), metrics)
    monkeypatch.setattr(deliverer, "_sender", SimpleNamespace(send=send))

    async def run():
        stopping = asyncio.Event()
        task = asyncio.create_task(deliverer.run(stopping))
        ends = time.monotonic() + 60
        while states(store) != {"done": 1} and time.monotonic() < ends:
            await asyncio.sleep(0.05)
        stopping.set()
        await task

    asyncio.run(run())
    assert states(store) == {"done": 1} and sent == ["2.25.1", "2.25.2"]
    store.close()
    failing.close()


def test_a_result_keeps_its_lease_as_long_as_its_destination_takes(tmp_path, monkeypatch):
    """The lease runs out while it is sent; another gateway of the queue gets it only if it was not renewed."""
    config = load_config(write(tmp_path, f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\n{DESTINATION}"))
    store, other = Store(config.queue_url, config.name), Store(config.queue_url, "two")
    store.deliver(ready_job(store), [result()], {"pacs": {"findings_sr"}}, 1.0)
    monkeypatch.setattr(deliver, "RENEW_S", 0.01, raising=False)
    metrics = Metrics(store.counts, lambda: 0)
    deliverer = Deliverer(config.destinations[0], config, store, Log(config, io.StringIO()), metrics)
    stopping = asyncio.Event()

    async def send(batch, report):
        try:
            run_out(store)
            ends = time.monotonic() + 60
            while leases(store) == [1] and time.monotonic() < ends:
                await asyncio.sleep(0.01)
            assert other.claim_deliveries("pacs", 60) == []
            report(*batch, "stored", "")
        finally:
            stopping.set()

    monkeypatch.setattr(deliverer, "_sender", SimpleNamespace(send=send))
    asyncio.run(deliverer.run(stopping))
    assert states(store) == {"done": 1}
    store.close()
    other.close()


class Server:
    """Stands for a reader server: each reading waits for `gate`; counts those that began and that were cancelled."""

    def __init__(self, monkeypatch, config, store):
        self.began = self.cancelled = 0
        self.gate = asyncio.Event()
        self.reader = SimpleNamespace(read=self.read, server_info=self.info)
        self.log = io.StringIO()
        monkeypatch.setattr(read, "AsyncReader", lambda *args, **kwargs: contextlib.nullcontext(self.reader))
        self.worker = ReadWorker(config, store, Log(config, self.log), Metrics(store.counts, lambda: 0), lambda: None)
        monkeypatch.setattr(self.worker, "_file", lambda image: b"picture")
        monkeypatch.setattr(self.worker, "_write", lambda *args: [result()])
        monkeypatch.setattr(self.worker, "_file", lambda image: b"picture")
        self.stopping = asyncio.Event()
        self.task = asyncio.create_task(self.worker.run(self.stopping))

    def read(self, images, **request):
        self.asked = request
        return self

    async def info(self):
        return None

    async def __aiter__(self):
        for text in ():
            yield text

    async def close(self):
        """Of a stream."""

    async def result(self):
        self.began += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return SimpleNamespace(status="ok")

    async def stop(self):
        self.stopping.set()
        await self.task


async def eventually(holds):
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends, "timed out"
        await asyncio.sleep(0.02)


class FaultyStore(Store):
    """A queue whose `broken` methods fail; counts all calls of these and of `claim_job`."""

    broken, calls = frozenset(), 0

    def _try(self, name, *args):
        self.calls += 1
        if name in self.broken:
            raise sqlalchemy.exc.OperationalError("UPDATE", None, Exception("the database is away"))
        return getattr(super(), name)(*args)

    def claim_job(self, *args):
        return self._try("claim_job", *args)

    def renew(self, *args):
        return self._try("renew", *args)

    def deliver(self, *args):
        return self._try("deliver", *args)


@pytest.fixture
def gateway(tmp_path):
    """Its configuration, whose leases last a second, and its queue of one study."""
    text = f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\nread: {{lease_s: 1, concurrency: 2}}\n{DESTINATION}"
    config = load_config(write(tmp_path, text))
    store = FaultyStore(config.queue_url, config.name)
    store.add(received(), 0, 0)
    yield config, store
    store.close()


@pytest.mark.slow
def test_a_job_whose_lease_ran_out_in_an_outage_is_read_once(gateway, monkeypatch):
    config, store = gateway

    async def run():
        server = Server(monkeypatch, config, store)
        await eventually(lambda: server.began)
        store.broken = {"renew"}  # as it is when the database is away; it is back before the lease is prolonged
        run_out(store)
        asked = store.calls
        await eventually(lambda: store.calls > asked + 8)
        assert server.began == 1
        store.broken = frozenset()
        server.gate.set()
        await eventually(lambda: states(store) == {"sending": 1})
        await server.stop()
        assert server.began == 1 and not server.cancelled
        assert len(store.claim_deliveries("pacs", 60)) == 1

    asyncio.run(run())


@pytest.mark.parametrize(("drain_s", "state"), [(20, "sending"), (0, "grouped")])
def test_a_reading_under_way_has_time_to_end_when_the_gateway_is_stopped(tmp_path, monkeypatch, drain_s, state):
    """Nothing new is begun meanwhile; one that takes longer is given back, and lost is none."""
    text = f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\nread: {{drain_s: {drain_s}}}\n{DESTINATION}"
    config = load_config(write(tmp_path, text))
    store = Store(config.queue_url, config.name)
    store.add(received(), 0, 0)

    async def run():
        server = Server(monkeypatch, config, store)
        await eventually(lambda: server.began)
        if drain_s:
            asyncio.get_running_loop().call_later(0.3, server.gate.set)
        await server.stop()
        assert (server.began, server.cancelled) == (1, int(drain_s == 0))

    asyncio.run(run())
    assert states(store) == {state: 1}
    store.close()


def test_a_site_may_have_every_reading_name_hashes_in_place_of_uids(tmp_path, monkeypatch):
    text = f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\nread: {{identifiers: hashed}}\n{DESTINATION}"
    config = load_config(write(tmp_path, text))
    store = Store(config.queue_url, config.name)
    store.add(received(), 0, 0)

    async def run():
        server = Server(monkeypatch, config, store)
        server.gate.set()
        await eventually(lambda: states(store) == {"sending": 1})
        await server.stop()
        return server.asked

    assert asyncio.run(run())["identifiers"] == "hashed"
    store.close()


def test_a_worker_ends_an_attempt_whose_job_another_one_took(gateway, monkeypatch):
    config, store = gateway
    other = Store(config.queue_url, "two")

    async def run():
        server = Server(monkeypatch, config, store)
        await eventually(lambda: server.began)
        taken = None
        while taken is None:  # the lease may be prolonged in between
            run_out(store)
            taken = other.claim_job(60)
        await eventually(lambda: server.cancelled)
        await server.stop()
        assert "lost_lease" in server.log.getvalue() and states(store) == {"reading": 1}
        other.deliver(taken, [result()], {"pacs": {"findings_sr"}}, 1.0)

    asyncio.run(run())
    other.close()


@pytest.mark.slow
def test_a_reading_that_the_queue_could_not_take_is_handed_over_later_and_not_made_again(gateway, monkeypatch):
    config, store = gateway
    store.broken = {"deliver"}

    async def run():
        server = Server(monkeypatch, config, store)
        server.gate.set()
        await eventually(lambda: server.began)
        asked = store.calls
        await eventually(lambda: store.calls > asked + 4)
        store.broken = frozenset()
        await eventually(lambda: states(store) == {"sending": 1})
        await server.stop()
        assert server.began == 1

    asyncio.run(run())


def test_a_pdf_has_the_pictures_and_one_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch):
    text = f"storage: {tmp_path}\nfolder: {{path: {tmp_path}/in}}\nresults: {{kinds: [pdf]}}\n{DESTINATION}"
    config = load_config(write(tmp_path, text))
    data = sr_case.file()
    (tmp_path / "objects").mkdir()
    (tmp_path / "objects" / "d").write_bytes(data)
    found, log = read_identity(data), io.StringIO()
    row = SimpleNamespace(path="objects/d", digest="d", study=found.study, series=found.series)
    row.sop_instance = found.sop_instance
    worker = ReadWorker(config, None, Log(config, log), None, lambda: None)
    job = SimpleNamespace(id=1, first_at=1e9)
    reading = Reading.from_json(json.dumps(sr_case.reading(sr_case.header())))

    def pictures() -> int:
        (made,) = worker._write(job, [row], reading)
        document = pydicom.dcmread(tmp_path / made.path).EncapsulatedDocument
        return document.count(b"/Subtype /Image")

    assert pictures() == 1 and not log.getvalue()

    def fail(*args, **kwargs):
        raise LimitExceeded("too large for here")

    monkeypatch.setattr(read, "draw", fail)
    assert pictures() == 0 and json.loads(log.getvalue())["event"] == "no_pictures"


def test_a_commit_that_broke_off_is_in_doubt_and_a_statement_is_not(store, monkeypatch):
    def failing(what):
        def fail(*args):
            raise sqlalchemy.exc.OperationalError(what, None, Exception("server closed the connection"))

        return fail

    dialect = store._engine.dialect
    monkeypatch.setattr(dialect, "do_commit", failing("COMMIT"))
    with pytest.raises(CommitInDoubt):
        store.add(received(), 0, 0)
    monkeypatch.undo()
    monkeypatch.setattr(dialect, "do_execute", failing("INSERT"))
    with pytest.raises(sqlalchemy.exc.OperationalError):
        store.add(received(), 0, 0)


# -------------------------------------------------------------------------------------------------------- choices


def test_the_last_frontal_view_stands_last():
    images = [
        SimpleNamespace(view=view, name=name)
        for name, view in (("ap", "AP"), ("pa", "PA"), ("side", "lateral"), ("any", "unknown"))
    ]
    assert [image.name for image in choose(images, 1)] == ["pa"]
    assert [image.name for image in choose(images, 3)] == ["any", "ap", "pa"]
    assert [image.name for image in choose(images[2:3], 1)] == ["side"]


def test_a_leg_beside_a_chest_is_left_out_and_alone_is_sent_to_be_refused():
    images = [SimpleNamespace(view=view, name=name) for name, view in (("side", "lateral"), ("leg", "elsewhere"))]
    assert [image.name for image in choose(images, 4)] == ["side"]
    assert [image.name for image in choose(images[1:], 4)] == ["leg"]


@pytest.mark.parametrize(
    "status, outcome",
    [(0x0000, "stored"), (0xB000, "stored"), (0xB007, "stored"), (0x0111, "stored"), (0xA700, "again"),
     (0x0110, "again"), (0x0124, "again"), (0xA900, "refused"), (0xC000, "refused"), (0x0122, "refused")],
)  # fmt: skip
def test_each_status_means_stored_again_or_refused(status, outcome):
    assert judge(status)[0] == outcome


@pytest.mark.parametrize(
    "status, answer, outcome",
    [
        (200, '{"00081199": {"vr": "SQ", "Value": [{}]}}', "stored"),
        (202, '{"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [42752]}}]}}', "again"),
        (409, '{"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [49152]}}]}}', "refused"),
        (409, '{"00081198": {"vr": "SQ", "Value": [{"00081197": {"vr": "US", "Value": [273]}}]}}', "stored"),
        (409, "<xml/>", "again"),
        (200, "", "stored"),
    ],
)
def test_a_stow_answer_is_read_for_its_instance(status, answer, outcome):
    assert judge_stow(status, answer)[0] == outcome


def test_a_log_names_a_study_by_a_keyed_hash_that_lasts(tmp_path):
    config = load_config(write(tmp_path, f"storage: {tmp_path}\ndicom: {{}}\n{DESTINATION}"))
    assert isinstance(config, Config)
    stream = io.StringIO()
    first, again = Log(config, stream), Log(config, stream)
    assert first.uid("1.2.3") == again.uid("1.2.3") != first.uid("1.2.4")
    (tmp_path / "log.key").unlink()
    assert Log(config, stream).uid("1.2.3") != first.uid("1.2.3")
    first("info", "received", study=first.uid("1.2.3"))
    first("debug", "not shown")
    (line,) = stream.getvalue().splitlines()
    assert json.loads(line)["event"] == "received" and "1.2.3" not in line


# ------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("name, written", [("explicit", "DX"), ("jpeg_ls", "DX"), ("deflated", "DX")])
def test_an_object_is_named_without_decoding_it(name, written):
    data = phantom_file.write_dicom(phantom.draw(np.random.default_rng(1)), syntax=name)
    dataset = pydicom.dcmread(io.BytesIO(data))
    identity = read_identity(data)
    assert identity.sop_instance == dataset.SOPInstanceUID and identity.study == dataset.StudyInstanceUID
    assert identity.transfer_syntax == dataset.file_meta.TransferSyntaxUID and identity.modality == written
    assert identity.is_radiograph and identity.view == "PA" and identity.patient_id == "PHANTOM"


def test_an_object_is_filed_under_its_uids_byte_for_byte():
    dataset = pydicom.dcmread(io.BytesIO(phantom_file.write_dicom(phantom.draw(np.random.default_rng(1)))))
    out = io.BytesIO()
    with pydicom.config.disable_value_validation():
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.826.0.1.03.4", "1.2.00"
        dataset.save_as(out)
    identity = read_identity(out.getvalue())
    assert (identity.study, identity.series) == ("1.2.826.0.1.03.4", "1.2.00")


def test_what_cannot_be_filed_is_refused():
    data = phantom_file.write_dicom(phantom.draw(np.random.default_rng(1)))
    dataset = pydicom.dcmread(io.BytesIO(data))
    for keyword in ("SOPInstanceUID", "StudyInstanceUID"):
        changed = pydicom.dcmread(io.BytesIO(data))
        delattr(changed, keyword)
        out = io.BytesIO()
        pydicom.dcmwrite(out, changed, enforce_file_format=False)
        with pytest.raises(InvalidImage, match="UID is missing"):
            read_identity(out.getvalue())
    for broken, message in ((data[:-100], "remain"), (b"#!" + data[2:], "program"), (b"x" * 200, "no DICOM")):
        with pytest.raises(InvalidImage, match=message):
            read_identity(broken)
    dataset.Modality = "CT"
    out = io.BytesIO()
    dataset.save_as(out)
    assert not read_identity(out.getvalue()).is_radiograph
