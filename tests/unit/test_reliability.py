"""The record of reliability runs, and what kills and counts in the gateway's."""

import json
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

import gateway_faults
import gateway_kills
from gateway_kills import Outage, Progress, Reaper, Victim, overlapping, quantiles, recovery, schedule
from reliability import RECORD, REQUIRED, ROOT, provenance, set_section

from cxr_triton.client.gateway.schema import Received, Result
from cxr_triton.client.gateway.store import Store

OF_A_RUN = {"command": "python run.py", "date": "2026-11-28", "machine": {"cores": 2}}


def test_a_section_is_set_and_the_others_stay(tmp_path):
    path = tmp_path / "record.json"
    set_section("soak", {**OF_A_RUN, "hours": 1}, path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: set_section(f"run-{i}", OF_A_RUN, path), range(20)))
    set_section("soak", {**OF_A_RUN, "hours": 2}, path)
    expected = {"soak": {**OF_A_RUN, "hours": 2}} | {f"run-{i}": OF_A_RUN for i in range(20)}
    assert json.loads(path.read_text()) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("key", OF_A_RUN)
def test_a_section_that_does_not_say_how_it_came_to_be_is_not_set(tmp_path, key):
    with pytest.raises(ValueError, match=f"has no {key}; begin it with `provenance`"):
        set_section("soak", {**OF_A_RUN, key: None}, tmp_path / "record.json")
    assert not any(tmp_path.iterdir())


def test_what_a_run_says_of_itself_is_of_this_machine(tmp_path):
    said = provenance("python run.py", ["pydicom"])
    set_section("run", said, tmp_path / "record.json")
    assert said["command"] == "python run.py" and said["machine"]["cores"] > 0 and said["machine"]["pydicom"]


def test_the_record_keeps_the_gateways_promise_and_the_docs_say_what_it_says():
    """The page's figures are the record's."""
    record = json.loads(RECORD.read_text())["gateway"]
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert all(record[key] for key in REQUIRED) and record["command"] in page and record["commit"] in page
    assert record["lost"] == record["doubled"] == record["left_in_queue"] == record["dead_letters"] == 0
    assert record["objects"] >= 10_000 and sum(record["killed"].values()) == record["kills"] >= 100
    kinds = ("destination", "gateway", "decoder", "triton", "database")
    rows = {
        "objects acknowledged": f"{record['objects']:,}",
        "killed: destination, gateway, decoder, Triton, database": ", ".join(str(record["killed"][k]) for k in kinds),
        "of these while another victim was away": record["killed_while_another_was_away"],
        "stores that were not answered with success, and sent again": f"{record['sends_without_success']:,}",
        "acknowledged objects sent once more on purpose": record["acknowledged_objects_sent_again"],
        "connections and requests broken before a destination": (
            f"{sum(record['connections_and_requests_broken'].values()):,}"
        ),
        "readings that failed, and were made again": record["readings_failed"],
    }
    for what, figure in rows.items():
        assert f"| {what} | {figure} |" in page, what


class Life:
    """A victim without a process, which cannot be killed while it is dead."""

    def __init__(self, name: str, *kinds: str):
        self.alive, self.killed = True, Counter()
        ends = {kind: lambda kind=kind: self.end(kind) for kind in kinds}
        self.victim = Victim(name, ends, self.start, lambda: self.alive)

    def end(self, kind: str) -> None:
        assert self.alive, "killed twice"
        self.alive = False
        self.killed[kind] += 1

    def start(self) -> None:
        assert not self.alive, "started twice"
        self.alive = True


def test_all_kills_are_made_and_what_is_dead_is_started_again(monkeypatch):
    monkeypatch.setattr(gateway_kills, "AWAY_S", (0.0, 0.02))
    monkeypatch.setattr(gateway_kills, "PAUSE_S", (0.0, 0.01))
    lives = [Life("triton", "triton", "decoder"), Life("gateway-1", "gateway"), Life("gateway-2", "gateway")]
    rng = random.Random(1)
    due = schedule(rng, {"triton": 5, "decoder": 5, "gateway": 10})
    assert all(0.02 <= at <= 0.95 for at, _ in due) and len({at for at, _ in due}) < len(due), "none together"
    reaper = Reaper([life.victim for life in lives], due, rng, lambda what: None)
    lives[1].alive = False  # died by itself
    ends = time.monotonic() + 60
    for i in range(10_000):
        reaper.step(min(1.0, i / 100))
        if i >= 100 and reaper.is_quiet():
            break
        assert time.monotonic() < ends
        time.sleep(0.002)
    reaper.wait()
    assert all(life.alive for life in lives)
    assert lives[0].killed == {"triton": 5, "decoder": 5} and (lives[1].killed + lives[2].killed)["gateway"] == 10
    assert [one.victim for one in reaper.died] == ["gateway-1"]
    assert all(one.back_at >= one.at for one in reaper.outages + reaper.died)


def test_what_does_not_come_back_ends_the_run():
    dead = Life("triton")
    dead.alive, dead.victim.start = False, lambda: 1 / 0
    reaper = Reaper([dead.victim], [], random.Random(0), lambda what: None)
    reaper.step(0.0)
    reaper.wait()
    with pytest.raises(ZeroDivisionError):
        reaper.step(0.0)


def test_recovery_is_told_from_the_queue(tmp_path):
    """One study that is read and delivered after all outages began: the times run until then."""
    url = f"sqlite:///{tmp_path}/queue.sqlite"
    store = Store(url, "gateway-1")
    began = time.time()
    outages = [Outage("triton", "triton", began - 5, began), Outage("destination", "pacs", began - 9, began - 8)]
    outages.append(Outage("gateway", "gateway-2", began - 7, began - 4))  # which never worked again
    received = Received(
        kind="image", sop_instance="1.2", digest="d", sop_class="1.2", study="1.1", series="1.8", transfer_syntax="1.2",
        patient="p", view="PA", taken="2026", number=1, bytes=10, path="objects/d", source="test",
    )  # fmt: skip
    store.add(received, 0, 60)
    store.group_due()
    result = Result(kind="k", sop_class="1.2", sop_instance="2.25.1", path="r")
    store.deliver(store.claim_job(60), [result], {"pacs": {"k"}}, 1.0)
    (row,) = store.claim_deliveries("pacs", 60)
    store.delivered(row.id, final=True)
    store.close()
    took = recovery(outages, Progress(url))
    stood = took["kill_to_first_work_of_the_killed_s"]
    assert took["kill_to_next_stored_result_s"]["n"] == 3 and stood["gateway"] == {"n": 0}
    assert 5 <= stood["triton"]["p50"] < 15 and 9 <= stood["destination"]["max"] < 19
    assert overlapping(outages) == 1


def test_quantiles_are_of_the_nearest_rank():
    assert quantiles([float(i) for i in range(1, 101)]) == {"n": 100, "p50": 50.0, "p99": 99.0, "max": 100.0}
    assert quantiles([3.0, None]) == {"n": 1, "p50": 3.0, "p99": 3.0, "max": 3.0}


SR, TEXT = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.88.22"
WHOLE = {"1.1": ("study-1", SR), "1.2": ("study-1", TEXT), "2.1": ("study-2", SR), "2.2": ("study-2", TEXT)}
"""SOP instances of two studies' results: study and SOP class."""


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, {"lost": 0, "doubled": 0}),
        ({"2.2": None}, {"lost": 1, "doubled": 0}),
        ({"2.1": None, "2.2": None}, {"lost": 1, "doubled": 0}),
        ({"1.3": ("study-1", SR)}, {"lost": 0, "doubled": 1}),
    ],
)
def test_a_lost_and_a_doubled_result_are_counted(monkeypatch, change, expected):
    held = {sop: one for sop, one in {**WHOLE, **change}.items() if one}
    orthancs = {"pacs": WHOLE, "archive": held}
    monkeypatch.setattr(gateway_faults, "results_in", lambda of: {sop: study for sop, (study, _) in of.items()})
    assert gateway_faults.count(of_destinations(orthancs, WHOLE), {"study-1", "study-2"}) == expected


@pytest.mark.parametrize(
    "flaky, different, acknowledged, message",
    [
        ({**WHOLE, "2.2": ("study-2", SR)}, 0, 2, "lacks one kind"),
        (WHOLE, 1, 2, "other bytes"),
        (WHOLE, 0, 1, "never acknowledged"),
    ],
)
def test_other_results_than_those_of_the_acknowledged_studies_end_the_run(
    monkeypatch, flaky, different, acknowledged, message
):
    monkeypatch.setattr(gateway_faults, "results_in", lambda of: {sop: study for sop, (study, _) in of.items()})
    site = of_destinations({"pacs": WHOLE, "archive": WHOLE}, flaky, different)
    with pytest.raises(AssertionError, match=message):
        gateway_faults.count(site, {f"study-{i + 1}" for i in range(acknowledged)})


def of_destinations(orthancs: dict, flaky: dict, different: int = 0) -> SimpleNamespace:
    stored = {sop: (study, "digest") for sop, (study, _) in flaky.items()}
    classes = {sop: sop_class for sop, (_, sop_class) in flaky.items()}
    pacs = SimpleNamespace(stored=stored, classes=classes, different=different)
    return SimpleNamespace(orthancs=orthancs, flaky=pacs)
