"""The simulation of capacity against closed formulas, and the files and the command around it."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cxr_triton.config import build
from cxr_triton.errors import InvalidConfig, InvalidRequest, QueueFull, Unavailable
from cxr_triton.perf.capacity import served
from cxr_triton.perf.capacity.command import main
from cxr_triton.perf.capacity.compare import again, ratios, scattered, simulated
from cxr_triton.perf.capacity.compare import main as compare
from cxr_triton.perf.capacity.machine import chunk_tokens
from cxr_triton.perf.capacity.plan import Demand, busiest_hour, for_studies, saturated
from cxr_triton.perf.capacity.served import Offered, Served, stages_of
from cxr_triton.perf.capacity.simulate import share_beside, simulate
from cxr_triton.perf.capacity.stages import Cost, Curve, Machine, Stages, load_stages
from cxr_triton.perf.load import Load
from cxr_triton.perf.observer import Observer
from cxr_triton.perf.summary import Record
from cxr_triton.perf.workload import Image, Item, arrivals

FREE = {"ms": 0, "cpu_ms": 0}


def file_of(**changed):
    """Stage times of a server that does nothing but decode, a token a millisecond in every slot."""
    nothing = {"on": "cores", "points": [{"at": 1, **FREE}, {"at": 4096, **FREE}]}
    return {
        "schema_version": 1,
        "title": "a test's",
        "date": "2026-01-01",
        "command": "none",
        "environment": {"cpu": "paper"},
        "versions": {"paper": "1"},
        "machine": machine(),
        "readings": [kind()],
        "transport": FREE,
        "tower": nothing,
        "prefill": nothing,
        "step": curve(1, 1, (1, 4096)),
        "token": FREE,
        "chunk": FREE,
        "report": FREE,
        "kept": {"answer_bytes": 1000, "row_bytes": 2000, "gateway_bytes": 3000, "memory_mib": 512},
        **changed,
    }


def machine(**changed):
    wide = {"cores": 64, "slots": 1, "queue_size": 10**6, "vision_batch": 1, "preprocess_instances": 1000}
    return {**wide, **changed}


def kind(**changed):
    known = {"bytes": 1_000_000, "preprocess_ms": 0, "preprocess_cpu_ms": 0, "prompt_tokens": 1, "answer_tokens": 1001}
    return {**known, **changed}


def curve(first_ms, last_ms, sizes, on="cores", width=1.0):
    ends = zip(sizes, (first_ms, last_ms), strict=True)
    return {"on": on, "points": [{"at": at, "ms": ms, "cpu_ms": ms * width} for at, ms in ends]}


def busy_file(**changed):
    """Stage times of a server of which every stage takes something, on four cores and a card."""
    return file_of(
        **{
            "machine": machine(cores=4, cards=1, slots=8, queue_size=64, vision_batch=4, preprocess_instances=2),
            "readings": [
                kind(preprocess_ms=ms, preprocess_cpu_ms=ms, prompt_tokens=300, image_tokens=200, answer_tokens=tokens)
                for ms, tokens in ((40, 60), (90, 20), (25, 140))
            ],
            "transport": {"ms": 3, "cpu_ms": 0},
            "tower": curve(12, 40, (1, 4), "card", 0.5),
            "prefill": curve(1, 9, (1, 350), "card", 0.2),
            "step": curve(4, 6, (1, 8), "card", 0.5),
            "token": {"ms": 0.05, "cpu_ms": 0.05},
            "chunk": {"ms": 0.2, "cpu_ms": 1},
            "report": {"ms": 1, "cpu_ms": 1},
            **changed,
        }
    )


def stages(**changed) -> Stages:
    return build(Stages, file_of(**changed), "test")


def busy(**changed) -> Stages:
    return build(Stages, busy_file(**changed), "test")


def exponential(count=9000, mean_tokens=1000, seed=4711):
    """Readings whose decoding takes an exponential time, mean 1 s."""
    drawn = np.random.default_rng(seed).exponential(mean_tokens, count)
    return [kind(answer_tokens=1 + max(1, round(tokens * mean_tokens / drawn.mean()))) for tokens in drawn]


def open_loop(made, rate, readings=8000, seed=0, **options):
    due = arrivals("poisson", rate, [seed])
    return simulate(made, arrivals=due, readings=readings, warm_up=readings // 8, **options).summary()


def wait_s(made, rate, **options):
    return open_loop(made, rate, **options)["waiting_ms"]["mean"] / 1e3


def erlang_c(servers, load):
    """Probability that an arrival waits in M/M/c."""
    last = load**servers / math.factorial(servers) / (1 - load / servers)
    return last / (sum(load**n / math.factorial(n) for n in range(servers)) + last)


@pytest.mark.slow
def test_waits_of_one_slot_are_those_of_m_m_1_and_m_d_1():
    assert wait_s(stages(readings=exponential()), 0.5) == pytest.approx(0.5 / 0.5, rel=0.08)
    assert wait_s(stages(), 0.5) == pytest.approx(0.5 / 0.5 / 2, rel=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [2, 8])
def test_waits_of_several_slots_are_those_of_m_m_c(slots):
    load = 0.75 * slots
    expected = erlang_c(slots, load) / (slots - load)
    told = open_loop(stages(readings=exponential(), machine=machine(slots=slots)), load)
    assert told["waiting_ms"]["mean"] / 1e3 == pytest.approx(expected, rel=0.1)
    assert told["use"]["slots"] == pytest.approx(0.75, rel=0.03)


def test_servers_behind_a_door_wait_between_one_queue_and_queues_of_their_own():
    made, load = stages(readings=exponential()), 1.5
    one_queue, own = erlang_c(2, load) / (2 - load), 0.75 / 0.25
    assert one_queue < wait_s(made, load, replicas=2) < own


@pytest.mark.parametrize("is_fixed", [False, True])
def test_a_core_that_is_shared_keeps_readings_as_long_as_processor_sharing(is_fixed):
    """Whatever the work's distribution, the mean time is work / (1 - load)."""
    times = [1000] if is_fixed else [of["answer_tokens"] - 1 for of in exponential()]
    shared = [kind(preprocess_ms=ms, preprocess_cpu_ms=ms, answer_tokens=1) for ms in times]
    told = open_loop(stages(readings=shared, machine=machine(cores=1)), 0.5)
    assert told["latency_ms"]["mean"] / 1e3 == pytest.approx(1 / 0.5, rel=0.08)
    assert told["use"]["cores"] == pytest.approx(0.5, rel=0.05) and told["waiting_ms"]["max"] == 0


def test_one_reading_takes_the_sum_of_its_stages():
    reading = kind(preprocess_ms=40, preprocess_cpu_ms=40, prompt_tokens=300, image_tokens=200, answer_tokens=60)
    told = simulate(busy(readings=[reading]), concurrency=1, readings=5).summary()
    chunked = 2 * (1 + 8 * 127 / 349) + (1 + 8 * 43 / 349)  # 300 tokens in pieces of 128, 128 and 44
    first_ms = 3 + 40 + 12 + chunked + 0.05
    assert told["ttft_ms"]["p50"] == pytest.approx(first_ms + 1)  # the text's way out is the report's
    assert told["latency_ms"]["p50"] == pytest.approx(first_ms + 59 * (4 + 0.05) + 1)
    two = simulate(busy(readings=[reading]), concurrency=1, readings=5, pictures=2).summary()
    pieces = 3 * (1 + 8 * 127 / 349) + (1 + 8 * 115 / 349)  # 500
    assert two["ttft_ms"]["p50"] == pytest.approx(3 + 80 + 12 + 28 / 3 + pieces + 0.05 + 1)


def scattering(share, cores=2, width=1.0):
    """Stage times of a server that only prepares pictures, a second each; as many of them as `share` stay on a core."""
    reading = kind(preprocess_ms=1000, preprocess_cpu_ms=1000 * width, answer_tokens=1)
    return stages(readings=[reading], machine=machine(cores=cores, scattered=share))


@pytest.mark.parametrize(("share", "cores"), [(0.0, 2), (0.5, 2), (1.0, 2), (1.0, 4)])
def test_two_pieces_meet_on_a_core_while_another_is_idle(share, cores):
    """Both stay with a probability of share², in one of `cores` cases on the same core, and then take twice as long."""
    outcome = simulate(scattering(share, cores), concurrency=2, readings=6000)
    told, mean_s = outcome.summary(), 1 + share**2 / cores
    assert told["readings_per_s"] == pytest.approx(2 / mean_s, rel=0.02)
    assert told["latency_ms"]["mean"] / 1e3 == pytest.approx(mean_s, rel=0.02)
    assert told["latency_ms"]["p95"] == pytest.approx(2000 if share else 1000)
    assert told["use"]["cores"] == pytest.approx(2 / mean_s / cores, rel=0.02)
    assert outcome.core_s / len(outcome.readings) == pytest.approx(1)  # waiting takes no processor time


@pytest.mark.parametrize("width", [1.0, 2.0])
def test_what_is_alone_waits_for_nothing_wherever_it_stays(width):
    told = simulate(scattering(1.0, width=width), concurrency=1, readings=50).summary()
    assert told["latency_ms"]["max"] == pytest.approx(1000)


def test_how_much_stays_is_found_from_a_process_beside_one_stream():
    """Both are as wide as a core, so the process gets 1 / (1 + share² / 2) of what it takes alone."""
    for share in (0.0, 0.8):
        got = 1 / (1 + share**2 / 2)
        assert share_beside(scattering(share), Cost(ms=1000, cpu_ms=1000), 2000) == pytest.approx(got, rel=0.02)
        assert scattered(scattering(0.0), 0.5, 0.5 * got) == pytest.approx(share, abs=0.06)


def test_the_stages_of_a_reading_are_told_one_by_one():
    reading = kind(preprocess_ms=40, preprocess_cpu_ms=40, prompt_tokens=300, image_tokens=200, answer_tokens=60)
    told = simulate(busy(readings=[reading]), concurrency=1, readings=5).stages_ms
    expected = {"preprocess": 43, "vision": 12, "prefill": 3 + 8 * 297 / 349 + 0.05, "decode": 59 * 4.05, "report": 1}
    assert {part: each["mean"] for part, each in told.items()} == pytest.approx(expected)


def test_a_closed_loop_keeps_the_bounds_of_operational_analysis():
    """At most a reading for each time of the scarcest resource, and at most what nobody waits for."""
    made = busy()
    alone = simulate(made, concurrency=1, readings=300).summary()
    cpu_s = alone["use"]["cores"] * 4 / alone["readings_per_s"]
    for concurrency in (2, 4, 8, 16):
        rate = simulate(made, concurrency=concurrency, readings=600, warm_up=60).summary()["readings_per_s"]
        assert rate <= min(concurrency * alone["readings_per_s"], 4 / cpu_s) * 1.02, concurrency
        assert rate >= alone["readings_per_s"]


def test_a_card_is_shared_and_what_runs_on_it_alone_is_not_slowed():
    reading = kind(prompt_tokens=1, answer_tokens=201)
    options = {"readings": [reading], "tower": curve(50, 50, (1, 4), "card", 0), "transport": FREE, "report": FREE}
    made = busy(**options)
    alone = simulate(made, concurrency=1, readings=20).summary()
    many = simulate(made, concurrency=8, readings=400, warm_up=40).summary()
    assert many["use"]["card"] > 0.9 > alone["use"]["card"] - 0.1
    assert many["use"]["card"] <= 1 + 1e-9 and many["use"]["cores"] <= 1 and many["use"]["report"] <= 1 + 1e-9


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_more_servers_never_wait_longer_and_a_seed_says_it_all(seed):
    made = busy()
    rate = 0.9 * saturated(made, 1)["readings_per_s"]
    told = [open_loop(made, rate, readings=800, seed=seed, replicas=replicas) for replicas in (1, 2, 3, 6)]
    for fewer, more in itertools.pairwise(told):
        for statistic in ("mean", "p50", "p95"):
            assert more["waiting_ms"][statistic] <= fewer["waiting_ms"][statistic] + 1e-6
        assert more["latency_ms"]["mean"] <= fewer["latency_ms"]["mean"]
    assert open_loop(made, rate, readings=800, seed=seed) == told[0]
    assert open_loop(made, rate, readings=800, seed=seed + 10) != told[0]


RECORDS = Path(__file__).resolve().parents[2] / "docs" / "results"
MORE_AT_8 = 1.40
"""A step of 8 streams over one of 1: on the line through 1 and 4 of docs/results/decoder-3b-int4-openvino.json."""


def of_record(record: dict) -> Stages:
    """Stage times of one stream of a 3B on two cores, both busy in all that its graphs do."""
    took = record["scenarios"][0]["points"][0]["waterfall"]["stages_ms"]
    preprocess_ms, step_ms, tokens = took["image_decode"] + took["preprocess"], took["decode"] / 127, 297
    return stages(
        machine=machine(cores=2, slots=8, preprocess_instances=2, vision_batch=8, queue_size=64),
        readings=[
            kind(preprocess_ms=preprocess_ms, preprocess_cpu_ms=preprocess_ms, prompt_tokens=tokens, answer_tokens=128)
        ],
        transport={"ms": took["transport"], "cpu_ms": 0},
        tower=curve(took["vision"], 8 * took["vision"], (1, 8), width=2),
        prefill=curve(took["prefill"] / tokens, took["prefill"] / tokens * 128, (1, 128), width=2),
        step=curve(step_ms, MORE_AT_8 * step_ms, (1, 8), width=2),
        report={"ms": took["report"], "cpu_ms": took["report"]},
    )


@pytest.mark.parametrize("name", ["bench-3b", "bench-3b-streams"])
def test_of_what_one_stream_took_it_tells_what_eight_did(name):
    """Recorded on a machine that did nothing else; docs/scale.md says why it is a tenth too careful."""
    record = json.loads((RECORDS / f"{name}.json").read_text())
    made, measured = of_record(record), [scenario["points"][0]["summary"] for scenario in record["scenarios"][:2]]
    for summary, concurrency, low, high in zip(measured, (1, 8), (0.98, 0.85), (1.02, 1.0), strict=True):
        seconds = 20 if name == "bench-3b" else 100
        told = simulate(made, concurrency=concurrency, readings=2, min_seconds=seconds).summary()
        assert low < told["readings_per_s"] / summary["readings_per_s"]["mean"] < high
        assert 1 / high - 0.02 < told["latency_ms"]["p50"] / summary["latency_ms.p50"]["mean"] < 1 / low + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("-again", 1.1), ("", 1.11), ("-threads", 1.14)])
def test_of_one_stream_and_of_one_beside_a_process_it_tells_what_loads_did(name, most):
    """Recorded on a machine that did nothing else; docs/scale.md says what is not within a tenth."""
    record = json.loads((RECORDS / f"capacity{name}.json").read_text())
    has_stages = "stages" in record["rounds"][0]
    told = again(record, None if has_stages else load_stages(RECORDS / f"stages-phantom{name}.json"))
    for was, now in zip(record["ratio"], told["ratio"], strict=True):
        assert was["load"] == now["load"] and was.keys() == now.keys()
        for figure in now.keys() - {"load", "rounds", "refused"}:
            assert now[figure]["median"] == pytest.approx(was[figure]["median"], rel=1e-4), (now["load"], figure)
        for figure in ("readings_per_s", "latency_ms.p50"):
            assert 1 / most < now[figure]["median"] < most, (now["load"], figure)


def test_what_one_stream_took_adds_up_again_in_time_and_in_processors():
    """Graphs by themselves, and the rest from the readings: the simulation of one stream is that stream."""
    curves = {
        "tower": curve(10, 70, (1, 8), width=1.5)["points"],
        "prefill": curve(6, 12, (60, 128), width=1.2)["points"],
        "step": curve(0.5, 0.9, (1, 4))["points"],
    }
    took = {"image_decode": 4, "preprocess": 6, "vision": 13, "queue": 0.2, "prefill": 9, "decode": 55, "report": 2}
    took |= {"transport": 4, "remainder": 0.8}
    records = [Record(i % 2, 0.0, 0.0, sum(took.values()) / 1e3, [0.036], "ok", 100, 51, took) for i in range(6)]
    processes = {"client": 5, "tritonserver": 5, "vision_encoder": 16, "report": 3, "decoder": 60}
    processes |= {"dicom_preprocess": 2, "decoding child": 7}
    triton = {"preprocess_compute": 11.5, "vision_compute": 11}
    offered = Offered(records, processes, triton, others_share=0.0, resident_mib=600)
    images = (Image("picture", b"1234567"),)
    workload = SimpleNamespace(items=(Item(images, {}), Item(images, {})))
    facts = {"machine": machine(cores=2, slots=4, vision_batch=8, prefill_chunk=128), "image_tokens": [50, 50]}
    made = stages(machine=facts["machine"], **stages_of(curves, offered, workload, facts))
    alone = simulate(made, concurrency=1, readings=6)
    assert alone.summary()["latency_ms"]["mean"] == pytest.approx(sum(took.values()), rel=0.001)
    assert 1e3 * alone.core_s / 6 == pytest.approx(sum(processes.values()), rel=0.001)
    assert made.readings[0].preprocess_ms == 11.5 and made.tower.points[0].ms == 11  # as long as the process was busy
    assert made.tower.points[0].cpu_ms == 16
    assert made.transport.cpu_ms and made.report.cpu_ms and made.chunk.cpu_ms
    assert made.readings[0].bytes == 7 and made.chunk.ms == pytest.approx(3 / (50 / 8), rel=0.001)


def test_the_loads_of_a_record_are_simulated_again_from_its_own_stage_times(tmp_path):
    load, made = Load("concurrency", 2), scattering(0.8)
    measured = {**simulated(made, load, 400.0, 1), "refused": 0, "others_share": 0.0}
    got = share_beside(made, Cost(ms=1000, cpu_ms=1000), 2000)
    each = {
        "alone_others_share": 0.0,
        "one_stream": {"others_share": 0.0},
        "one_stream_beside": {"wanted_share": 0.5, "others_share": 0.5 * got},
        "points": [{"load": load.as_json(), "measured": measured}],
        "stages": file_of(readings=[vars(made.readings[0])], machine=machine(cores=2)),
    }
    path, out = tmp_path / "record.json", tmp_path / "again.json"
    path.write_text(json.dumps({"seconds_each": 400.0, "rounds": [each]}))
    done = CliRunner().invoke(compare, [str(path), "--json", str(out)])
    assert done.exit_code == 0 and "concurrency 2, 1 rounds: simulated / measured readings_per_s" in done.output
    told = json.loads(out.read_text())
    assert told["rounds"][0]["scattered"] == pytest.approx(0.8, abs=0.05)
    for figure in ("readings_per_s", "latency_ms.p95", "processor_ms"):
        assert told["ratio"][0][figure]["median"] == pytest.approx(1, abs=0.02), figure
    path.write_text(json.dumps({"seconds_each": 400.0, "rounds": [{**each, "points": []}]}).replace('"stages"', '"x"'))
    done = CliRunner().invoke(compare, [str(path)])
    assert done.exit_code == 1 and "round 1 of the record has no stage times; give its file" in done.output


def test_only_rounds_in_which_nothing_else_ran_count():
    def a_round(ratio, others, alone=0.0):
        measured = {"others_share": others}
        point = {"load": {"kind": "concurrency", "value": 2}, "measured": measured, "ratio": {"readings_per_s": ratio}}
        return {"one_stream": measured, "alone_others_share": alone, "points": [point]}

    (told,) = ratios([a_round(0.9, 0.0), a_round(1.0, 0.04), a_round(5, 0.06), a_round(6, 0.0, alone=0.5)])
    assert told["rounds"] == 2 and told["readings_per_s"] == {"median": 0.95, "range": [0.9, 1.0]}
    (none,) = ratios([a_round(1.0, 0.9)])
    assert none["rounds"] == 0 and "readings_per_s" not in none
    refused = a_round(1.0, 0.0)
    refused["points"][0]["ratio"] = {}
    (told,) = ratios([refused, a_round(1.1, 0.0)])
    assert (told["rounds"], told["refused"]) == (1, 1) and told["readings_per_s"]["median"] == 1.1


class PaperObserver:
    url = "127.0.0.1:1"

    def processor_s(self):
        return {"client": 1.0}

    def resident_bytes(self):
        return {"tritonserver": 1 << 20}

    def triton(self):
        return {"cxr_reader": {"requests": 2, "failed": 0, "request_ms": 1.0}}

    def metrics(self):
        return {}


def test_a_full_queue_ends_a_load_and_not_the_run(monkeypatch):
    done, refused = Record(0, 0.0, 0.0, 1.0, [0.5], "ok", 10, 5), Record(1, 0.5, 0.5, 1.0, [], "QUEUE_FULL")
    under = Served(PaperObserver(), SimpleNamespace(items=()))
    monkeypatch.setattr(served, "Observed", lambda _: SimpleNamespace(counted=lambda _: {}))
    monkeypatch.setattr(served, "offer", lambda *_, **__: ([done, refused], QueueFull("full")))
    told = under.offer(Load("concurrency", 9), 1.0).as_json()
    assert told["refused"] == 1 and told["latency_ms.p50"] == 1000
    monkeypatch.setattr(served, "offer", lambda *_, **__: ([done], Unavailable("gone")))
    with pytest.raises(Unavailable):
        under.offer(Load("concurrency", 9), 1.0)


def test_children_that_ended_are_in_the_processor_time():
    burns = "import time\nwhile time.process_time() < 0.3: pass"
    waits = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burns!r}]); print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", waits], **pipes) as parent:
        parent.stdout.readline()
        assert Observer("", pids=lambda: [parent.pid]).processor_s()["decoding child"] >= 0.29
        parent.communicate(b"\n")


def test_a_chunk_holds_what_the_next_step_would_make_too_old():
    """As `Runtime._emit` decides it, token by token."""
    for step_ms in (0.5, 3.0, 3.75, 9.6, 10.0, 29.0, 40.0):
        waiting, chunk = 0, 0
        while not chunk:
            waiting += 1
            if waiting == 8 or (waiting - 1) * step_ms + step_ms > 30:
                chunk = waiting
        assert chunk_tokens(build(Machine, {"cores": 1}, "machine"), step_ms / 1e3) == chunk, step_ms


def test_a_full_queue_refuses_and_what_was_refused_took_nothing_more():
    made = stages(machine=machine(queue_size=2))
    told = open_loop(made, 3.0, readings=300)
    assert set(told["refused"]) == {"decoder"} and 0.5 < told["refused"]["decoder"] / 300 < 0.8
    assert told["waiting_ms"]["max"] <= 2000 + 1  # two before it, a second each
    with pytest.raises(InvalidRequest, match="more than the queues take"):
        simulate(made, concurrency=4, readings=10)


def test_what_a_server_reads_at_most_does_not_depend_on_its_queues():
    short, long = (saturated(busy(machine=busy_file()["machine"] | {"queue_size": size}), 1) for size in (1, 1000))
    assert short == long and short["use"]["slots"] > 0.95


def test_the_fewest_servers_that_keep_a_target_are_found():
    made = busy()
    most = saturated(made, 1)["readings_per_s"]
    demand = Demand(studies_per_day=86_400 * most * 1.7, target_p95_s=2.0, hours=(1.0,) * 24, readings=2000)
    result = for_studies(made, demand)
    assert result["servers"] >= 2 and result["cards"] == result["servers"] and result["cores"] == 4 * result["servers"]
    assert result["busiest_hour"]["latency_ms"]["p95"] <= 2000
    fewer = result["one_server_fewer"]
    assert fewer["latency_ms"]["p95"] > 2000 or fewer["refused"]
    assert result["network"]["in_mbit_per_s"] == pytest.approx(most * 1.7 * 8)
    assert result["storage"]["rows_bytes_per_day"] == pytest.approx(demand.studies_per_day * 2000)
    with pytest.raises(InvalidRequest, match="one reading alone takes"):
        for_studies(made, Demand(studies_per_day=10, target_p95_s=0.1))


def test_a_server_of_a_group_gets_its_share():
    made, demand = stages(), Demand(studies_per_day=86_400 * 8.5, hours=(1.0,) * 24, readings=8000)
    use = [busiest_hour(made, demand, replicas).use["slots"] for replicas in (16, 17, 34)]
    assert use == pytest.approx([8.5 / 16, 8.5 / 17, 8.5 / 34], rel=0.03)


@pytest.mark.slow
def test_many_servers_are_groups_of_few():
    made = stages(machine=machine(slots=4))
    demand = Demand(studies_per_day=86_400 * 400, target_p95_s=3.0, hours=(1.0,) * 24, readings=500)
    assert 100 <= for_studies(made, demand)["servers"] <= 120  # a server reads four a second


def test_a_curve_is_straight_between_points_and_ends_with_the_last():
    made = build(Curve, curve(4, 8, (2, 6)), "curve")
    assert [made.cost(size)[0] for size in (1, 2, 4, 6)] == pytest.approx([0.004, 0.004, 0.006, 0.008])
    with pytest.raises(InvalidConfig, match="a size of 7 was not measured, 6 is the largest"):
        made.cost(7)


def hostile():
    whole = file_of()
    yield "[]", "expected a mapping"
    yield "{", "not readable as JSON"
    yield "[" * 100_000, "not readable as JSON"
    yield '{"title": "a", "title": "b"}', "given twice"
    yield "\ud800".encode("utf-8", "surrogatepass"), "not readable as JSON"
    yield json.dumps({**whole, "tokne": FREE}), "did you mean 'token'"
    yield json.dumps({key: value for key, value in whole.items() if key != "step"}), "step: is missing"
    yield json.dumps(whole | {"schema_version": 2}), "schema_version: 2 is outside"
    yield json.dumps(whole | {"readings": []}), "name at least one kind"
    yield json.dumps(whole | {"readings": [kind(answer_tokens=0)]}), "answer_tokens: 0 is outside"
    yield json.dumps(whole | {"readings": [kind(preprocess_ms=-1)]}), "preprocess_ms"
    yield json.dumps(whole | {"token": {"ms": math.nan, "cpu_ms": 0}}), "token.ms"
    yield json.dumps(whole | {"token": {"ms": 1e300, "cpu_ms": 0}}), "token.ms: 1e+300 is outside"
    yield json.dumps(whole | {"token": {"ms": 0, "cpu_ms": 1}}), "work takes time"
    yield json.dumps(whole | {"token": {"ms": True, "cpu_ms": 0}}), "token.ms"
    yield json.dumps(whole | {"step": curve(1, 1, (8, 1))}), "have to ascend"
    yield json.dumps(whole | {"step": {"on": "cores", "points": []}}), "have to ascend"
    yield json.dumps(whole | {"step": curve(1, 1, (1, 2), on="gpu")}), "'gpu' is none of cores, card"
    yield json.dumps(whole | {"machine": machine(slots=4097)}), "slots: 4097 is outside"
    yield json.dumps(whole | {"step": curve(1, 1, (1, 2)), "machine": machine(slots=4)}), "measured up to 2"
    yield json.dumps(whole | {"step": curve(1, 1, (1, 4), on="card")}), "a stage runs on a card"
    yield json.dumps(whole | {"kept": {**whole["kept"], "memory_mib": -1}}), "memory_mib: -1 is outside"
    yield json.dumps(whole | {"title": "x" * (9 << 20)}), "bytes, allowed"


@pytest.mark.parametrize(
    ("text", "said"), list(hostile()), ids=lambda value: value[:30] if isinstance(value, str) else ""
)
def test_a_file_that_is_wrong_is_refused_in_words(text, said, tmp_path):
    path = tmp_path / "stages.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidConfig) as refused:
        load_stages(path)
    assert said in refused.value.message and "stages.json" in refused.value.message
    assert len(refused.value.message) < 1000


def asked(tmp_path, *options, **changed):
    (tmp_path / "stages.json").write_text(json.dumps(busy_file(assumed=["the card: of another one"], **changed)))
    return CliRunner().invoke(main, [str(tmp_path / "stages.json"), *options])


def test_the_command_says_what_it_takes_and_what_was_not_measured(tmp_path):
    out = tmp_path / "out.json"
    done = asked(tmp_path, "--studies-per-day", "20000", "--readings", "500", "--json", str(out))
    assert done.exit_code == 0, done.output
    assert "not measured: the card: of another one" in done.output and "to the first word" in done.output
    result = json.loads(out.read_text())
    assert result["servers"] >= 1 and result["assumed"] == ["the card: of another one"]
    assert result["asked"]["studies_per_day"] == 20_000
    done = asked(tmp_path, "--archive", "1e8", "--days", "30", "--json", "-")
    result = json.loads(done.stdout)
    assert result["days"] <= 30 < result["days"] * result["servers"] / (result["servers"] - 1)
    assert result["storage"]["rows_bytes"] == 2000 * 1e8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give one of"),
        (["--studies-per-day", "10", "--archive", "10"], "give one of"),
        (["--studies-per-day", "-1"], "not in the range"),
        (["--studies-per-day", "nan"], "finite numbers"),
        (["--archive", "nan"], "finite numbers"),
        (["--studies-per-day", "10", "--hours", "1,2"], "give 24 weights"),
        (["--studies-per-day", "10", "--hours", "a"], "no list of 24 numbers"),
        (["--studies-per-day", "10", "--hours", ",".join(["nan"] * 24)], "finite numbers"),
        (["--studies-per-day", "10", "--target-p95-s", "0.01"], "one reading alone takes"),
        (["--archive", "1e12", "--days", "0.001"], "give it more --days"),
        (["--studies-per-day", "1e12"], "servers or more"),
    ],
)
def test_wrong_usage_is_said(options, said, tmp_path):
    done = asked(tmp_path, *options)
    assert done.exit_code and said in done.output, done.output


def test_stage_times_of_nothing_are_refused_and_a_study_a_day_is_not(tmp_path):
    nothing = {"step": curve(0, 0, (1, 64)), "tower": curve(0, 0, (1, 4)), "prefill": curve(0, 0, (1, 350))}
    nothing |= dict.fromkeys(("transport", "token", "chunk", "report"), FREE)
    for options in (["--archive", "5"], ["--studies-per-day", "5"]):
        done = asked(tmp_path, *options, readings=[kind()], **nothing)
        assert done.exit_code == 1 and "takes no time" in done.output
    assert asked(tmp_path, "--studies-per-day", "1", "--readings", "100").exit_code == 0


def test_it_runs_as_a_module(tmp_path):
    (tmp_path / "stages.json").write_text("{}")
    command = [sys.executable, "-m", "cxr_triton.perf.capacity", str(tmp_path / "stages.json"), "--archive", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "[INVALID_CONFIG]" in done.stderr
