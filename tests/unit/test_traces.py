"""One id from the client to the report, and spans of it at a collector that the test runs."""

import asyncio
import atexit
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from collector import collecting
from fake_server import FakeServer, failure, response
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cxr_triton.cli import main
from cxr_triton.client import AsyncReader, Reader, Timeouts, otlp
from cxr_triton.client.spans import ATTRIBUTES, Span
from cxr_triton.errors import InvalidRequest, NotAChest, Unavailable
from cxr_triton.reading import STAGES, Reading, parse
from cxr_triton.trace import TraceParent, trace_id_of, traces_url
from cxr_triton.triton_repo.guard import trace_flags, trace_flags_of

ROOT = Path(__file__).resolve().parents[2]
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PICTURE = b"MRN-4711"
PATIENT = ("DOE^JANE", "1.2.840.99.7", "MRN-4711", "Kardiomegalie", "Compare with 1957.")
TIMINGS = {stage: 10.0 * (number + 1) for number, stage in enumerate(STAGES)}
READING = Reading.of(
    parse("<think> DOE^JANE </think>\n<answer> Kardiomegalie </answer>", grammar="think_answer", answer="labels"),
    task="findings",
    prompt="Compare with 1957.",
    model={"profile": "nv-reason-cxr-3b", "engine": "onnxruntime", "precision": "int4"},
    images=({"identity": {"file_sha256": hashlib.sha256(PICTURE).hexdigest(), "study_instance_uid": "1.2.840.99.7"}},),
    usage={"prompt_tokens": 5, "completion_tokens": 7},
    timings_ms={**TIMINGS, "total": sum(TIMINGS.values())},
    notice="A test double answered.",
).to_json()


def answer(request, context):
    yield response("DOE^JANE")
    yield response("", READING, final=True)


def read(kind, server, **options):
    if kind is Reader:
        with Reader(server.url) as reader:
            return reader.read(PICTURE, **options).result()

    async def run():
        async with AsyncReader(server.url) as reader:
            return await reader.read(PICTURE, **options).result()

    return asyncio.run(run())


both = pytest.mark.parametrize("kind", [Reader, AsyncReader])


class Heard:
    """A server that keeps the metadata of its calls."""

    def __init__(self):
        self.headers = []

    def __call__(self, request, context):
        self.headers.append(dict(context.invocation_metadata()))
        yield from answer(request, context)


# ------------------------------------------------------------------------------------------------------------ ids


HEX = "0123456789abcdef"
NEAR = st.builds(
    "-".join,
    st.lists(st.text(HEX + "G-\n", min_size=0, max_size=34), min_size=1, max_size=6)
    | st.tuples(
        st.sampled_from(["00", "01", "cc", "ff", "0", "0A"]),
        st.text(HEX, min_size=31, max_size=33) | st.just("0" * 32),
        st.text(HEX, min_size=15, max_size=17) | st.just("0" * 16),
        st.text(HEX, min_size=1, max_size=3),
    )
    | st.tuples(st.sampled_from(["00", "01"]), st.just(TRACE), st.just("00f067aa0ba902b7"), st.just("01-x")),
)


@given(NEAR)
def test_what_is_a_traceparent_is_what_opentelemetry_takes(text):
    context = TraceContextTextMapPropagator().extract({"traceparent": text})
    theirs = trace.get_current_span(context).get_span_context()
    ours = TraceParent.from_text(text)
    assert (ours is not None) == theirs.is_valid
    if ours:
        flags = bool(theirs.trace_flags & 1)
        assert ours == TraceParent(f"{theirs.trace_id:032x}", f"{theirs.span_id:016x}", flags)
        assert TraceParent.from_text(str(ours)) == ours


@pytest.mark.parametrize(
    "text", [None, "", "x" * 10_000, GIVEN + "\n", GIVEN + '"}\n{"level": "error"', GIVEN.upper(), f" {GIVEN}"]
)
def test_what_is_none_gives_no_id(text):
    assert TraceParent.from_text(text) is None and trace_id_of(text) == ""


def test_new_ones_are_of_the_form_and_differ():
    made = {str(TraceParent.new()) for _ in range(100)}
    assert len(made) == 100 and all(str(TraceParent.from_text(each)) == each for each in made)


# --------------------------------------------------------------------------------------------------------- client


@both
def test_a_readings_id_is_the_requests_and_its_headers_and_every_one_has_its_own(kind):
    heard = Heard()
    with FakeServer(heard) as server:
        first, second = (read(kind, server) for _ in range(2))
    assert len({first.trace_id, second.trace_id}) == 2
    assert [trace_id_of(request.id) for request in server.requests] == [first.trace_id, second.trace_id]
    assert [headers["traceparent"] for headers in heard.headers] == [request.id for request in server.requests]
    assert json.loads(first.to_json())["trace_id"] == first.trace_id and first == second


@both
def test_a_given_one_is_kept_and_a_malformed_one_replaced(kind):
    with FakeServer(answer) as server:
        assert read(kind, server, traceparent=GIVEN).trace_id == TRACE
        replaced = read(kind, server, traceparent='"}\n' * 1000)
    assert re.fullmatch("[0-9a-f]{32}", replaced.trace_id)
    assert len(server.requests[-1].id) == len(GIVEN)


@both
def test_an_error_names_its_trace(kind):
    with FakeServer(lambda request, context: iter([failure("[NOT_A_CHEST] a leg")])) as server:
        with pytest.raises(NotAChest) as error:
            read(kind, server, traceparent=GIVEN)
    assert error.value.trace_id == TRACE and error.value.__notes__ == [f"trace {TRACE}"]
    assert error.value.message == "a leg"
    with pytest.raises(Unavailable) as error:
        with Reader("127.0.0.1:1", timeouts=Timeouts(connect_s=0.01)) as reader:
            reader.read(traceparent=GIVEN).result()
    assert error.value.trace_id == "", "nobody else has heard of it"


def test_the_command_names_the_trace_of_a_failure(tmp_path):
    (tmp_path / "leg.dcm").write_bytes(b"leg")
    with FakeServer(lambda request, context: iter([failure("[NOT_A_CHEST] a leg")])) as server:
        done = CliRunner().invoke(main, ["read", str(tmp_path / "leg.dcm"), "--url", server.url])
    trace_id = trace_id_of(server.requests[0].id)
    assert done.exit_code == 1 and done.stderr == f"error: [NOT_A_CHEST] a leg (trace {trace_id})\n"


LEAN = """
import sys
from cxr_triton.client import Reader
with Reader(sys.argv[1]) as reader:
    print(reader.read(b"MRN-4711").result().trace_id)
assert not [name for name in sys.modules if name.startswith("opentelemetry")]
"""


def test_nothing_of_opentelemetry_is_imported_where_nobody_asks_for_it():
    with FakeServer(answer) as server:
        done = subprocess.run([sys.executable, "-c", LEAN, server.url], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == trace_id_of(server.requests[0].id)


# ---------------------------------------------------------------------------------------------------------- spans


@pytest.fixture
def started(monkeypatch):
    with collecting(monkeypatch) as collector:
        yield collector


@both
def test_a_reading_is_a_part_of_the_callers_span_and_has_one_for_each_stage(started, kind):
    otlp.start(started.url, "test", started.said.append)
    with FakeServer(answer) as server:
        with trace.get_tracer("app").start_as_current_span("app") as app:
            reading = read(kind, server)
    started.flush()
    spans = {span.name: span for span in started.spans(reading.trace_id)}
    assert len(started.spans(reading.trace_id)) == len(spans) and spans.keys() == {"app", "read", *STAGES}
    assert started.paths[0] == "/v1/traces" and {span.service for span in spans.values()} == {"cxr-triton-test"}
    assert f"{app.get_span_context().trace_id:032x}" == reading.trace_id
    assert spans["app"].parent == "" and spans["read"].parent == spans["app"].span_id
    assert trace_id_of(server.requests[0].id) == reading.trace_id
    assert server.requests[0].id.split("-")[2:] == [spans["read"].span_id, "01"]
    stages = [spans[stage] for stage in STAGES]
    assert {stage.parent for stage in stages} == {spans["read"].span_id}
    assert [round((stage.end - stage.start) / 1e6) for stage in stages] == list(TIMINGS.values())
    assert all(abs(before.end - after.start) < 2000 for before, after in itertools.pairwise(stages))
    assert stages[-1].end <= spans["read"].end and started.said == []
    said = spans["read"].attributes
    assert said["gen_ai.usage.output_tokens"] == 7 and said["cxr.status"] == reading.status
    assert said["server.address"] == server.url


def test_no_span_says_anything_of_a_patient(started):
    otlp.start(started.url, "test", started.said.append)

    def refuse(request, context):
        yield failure("[NOT_A_CHEST] IMAGES[0] of DOE^JANE, MRN-4711, 1.2.840.99.7")

    with FakeServer(answer) as server:
        read(Reader, server, prompt="Compare with 1957.", traceparent=GIVEN)
        server.answer = refuse
        with pytest.raises(NotAChest):
            read(Reader, server, prompt="Compare with 1957.", traceparent=GIVEN)
    started.flush()
    spans = started.spans(TRACE)
    assert [span.attributes["error.type"] for span in spans if span.failed] == ["NOT_A_CHEST"]
    assert {name for span in spans for name in span.attributes} <= ATTRIBUTES.keys()
    assert {"cxr.task", "gen_ai.response.model"} <= {name for span in spans for name in span.attributes}
    assert all(mark.encode() not in body for mark in PATIENT for body in started.bodies)
    with pytest.raises(KeyError, match=r"cxr\.patient"):
        Span("x", attributes={"cxr.patient": "DOE^JANE"})


def test_a_study_is_one_trace_from_its_first_image_to_its_delivery(started, tmp_path, monkeypatch):
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("pynetdicom")
    from cxr_triton import phantom, phantom_file
    from cxr_triton.client.gateway.config import load_config
    from cxr_triton.client.gateway.deliver import Deliverer
    from cxr_triton.client.gateway.intake import Intake
    from cxr_triton.client.gateway.log import Log, Metrics
    from cxr_triton.client.gateway.read import ReadWorker
    from cxr_triton.client.gateway.schema import Result
    from cxr_triton.client.gateway.store import Store

    otlp.start(started.url, "gateway", started.said.append)
    file = phantom_file.write_dicom(phantom.draw(np.random.default_rng(1)))
    result = Result(kind="findings_sr", sop_class="1.2", sop_instance="2.25.1", path="results/1/0.dcm")

    def answer_of(request, context):
        reading = json.loads(READING)
        reading["images"][0]["identity"] = {"file_sha256": hashlib.sha256(file).hexdigest(), "pixels_sha256": ""}
        yield response("", json.dumps(reading), final=True)

    async def send(batch, report):
        for row in batch:
            report(row, "stored", "")

    async def run(*parts):
        stopping = asyncio.Event()
        tasks = [asyncio.create_task(part.run(stopping)) for part in parts]
        ends = time.monotonic() + 60
        while not store.counts()["jobs"]["done"]:
            assert time.monotonic() < ends, stream.getvalue()
            await asyncio.sleep(0.02)
        stopping.set()
        await asyncio.gather(*tasks)

    with FakeServer(answer_of) as server:
        own = {"storage": str(tmp_path), "folder": {"path": str(tmp_path / "in")}, "group": {"quiet_s": 0}}
        own |= {"read": {"url": server.url}, "destinations": [{"name": "pacs", "aet": "PACS", "host": "127.0.0.1"}]}
        (tmp_path / "gateway.yaml").write_text(json.dumps(own | {"intake": {"min_free_mib": 0}}))
        config, stream = load_config(tmp_path / "gateway.yaml"), io.StringIO()
        store, log = Store(config.queue_url, config.name), Log(config, stream)
        metrics = Metrics(store.counts, lambda: 0)
        intake = Intake(config, store, log, metrics, lambda: None)
        with intake.new_file() as incoming:
            incoming.write(file)
            identity = intake.take(incoming, "stow", "test", traceparent=GIVEN)
        intake.close()
        worker = ReadWorker(config, store, log, metrics, lambda: None)
        monkeypatch.setattr(worker, "_file", lambda image: file)
        monkeypatch.setattr(worker, "_write", lambda *args: [result])
        deliverer = Deliverer(config.destinations[0], config, store, log, metrics)
        monkeypatch.setattr(deliverer, "_sender", SimpleNamespace(send=send))
        asyncio.run(run(worker, deliverer))
    lines = {line["event"]: line for line in map(json.loads, stream.getvalue().splitlines())}
    assert {lines[event]["trace"] for event in ("received", "read", "stored")} == {TRACE}
    assert store.job(1)["trace"] == TRACE
    store.close()
    started.flush()
    spans = {span.name: span for span in started.spans(TRACE)}
    assert spans.keys() == {"receive", "wait", "job", "read", "deliver", *STAGES}
    assert spans["receive"].parent == GIVEN.split("-")[2]
    assert {spans[name].parent for name in ("wait", "job", "deliver")} == {spans["receive"].span_id}
    assert spans["read"].parent == spans["job"].span_id and spans["decode"].parent == spans["read"].span_id
    assert spans["deliver"].attributes["cxr.destination"] == "pacs" and not any(span.failed for span in spans.values())
    for secret in (identity.patient_id, identity.study, identity.sop_instance, "DOE^JANE"):
        assert secret and not any(secret.encode() in body for body in started.bodies)


def test_a_stream_that_is_left_ends_its_span(started):
    otlp.start(started.url, "test", started.said.append)
    with FakeServer(answer) as server, Reader(server.url) as reader:
        stream = reader.read(traceparent=GIVEN)
        next(stream)
        stream.close()
        started.flush()
        [span] = started.spans(TRACE)
    assert span.failed and span.attributes["error.type"] == "CANCELLED"


def test_a_collector_that_is_away_is_said_and_keeps_no_reading(started, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    otlp.start("http://127.0.0.1:9", "test", started.said.append)
    with FakeServer(answer) as server:
        assert read(Reader, server).trace_id
    started.flush()
    assert started.said and all(said.startswith("spans: ") and "\n" not in said for said in started.said)


def test_the_end_of_a_process_waits_for_no_collector_that_says_nothing(started, monkeypatch):
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    hooks, answers = [], threading.Event()
    monkeypatch.setattr(atexit, "register", hooks.append)
    monkeypatch.setattr(otlp, "EXIT_S", 0.05)
    monkeypatch.setattr(OTLPSpanExporter, "export", lambda *_: (answers.wait(60), SpanExportResult.SUCCESS)[1])
    otlp.start(started.url, "test", started.said.append)
    Span("x", GIVEN).end()
    hooks[-1]()
    assert started.said == ["spans: those that could not be sent within 0.05 s are lost"]
    answers.set()


def test_the_environment_names_a_collector_and_without_the_extra_that_is_said(started, monkeypatch):
    monkeypatch.setattr(otlp, "_is_here", lambda: False)
    otlp.start(None, "test", started.said.append)
    assert started.said == []
    monkeypatch.setattr(otlp, "_is_started", threading.Event())
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", started.url)
    otlp.start(None, "test", started.said.append)
    assert len(started.said) == 1 and "[trace]" in started.said[0] and started.providers == []


@pytest.mark.parametrize("path", ["", "/v1/traces"])
def test_the_environments_collector_is_taken(started, monkeypatch, path):
    """With the path of traces too, which a server takes as it is and the SDK would add once more."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", started.url + path)
    otlp.start(None, "test", started.said.append)
    Span("x", GIVEN).end()
    started.flush()
    assert [span.name for span in started.spans(TRACE)] == ["x"] and started.paths == ["/v1/traces"]


def test_the_command_sends_its_spans_before_it_ends(started, tmp_path):
    """It lives for less than the time between two batches."""
    (tmp_path / "a.png").write_bytes(PICTURE)
    with FakeServer(answer) as server:
        words = ["read", str(tmp_path / "a.png"), "--url", server.url, "--trace-otlp", started.url]
        command = [sys.executable, "-c", "from cxr_triton.cli import main; main()", *words]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and "spans" not in done.stderr, done.stderr  # malformed
    spans = {span.name: span for span in started.spans(trace_id_of(server.requests[0].id))}
    assert spans.keys() == {"read", *STAGES} and spans["read"].service == "cxr-triton-read"
    assert b"a.png" not in b"".join(started.bodies)


@pytest.mark.parametrize("url", ["collector:4318", "ftp://x", "http://a b", "http://a,mode=triton", "http://", "\n"])
def test_what_is_no_address_of_a_collector_is_refused(url):
    with pytest.raises(InvalidRequest, match="http://HOST:4318"):
        traces_url(url)


def test_the_flags_that_triton_gets():
    assert trace_flags(None) == trace_flags("") == []
    flags = trace_flags("http://127.0.0.1:4318/")
    assert "--trace-config=opentelemetry,url=http://127.0.0.1:4318/v1/traces" in flags
    assert "--trace-config=mode=opentelemetry" in flags and traces_url("http://a/v1/traces") == "http://a/v1/traces"


@pytest.mark.parametrize(
    ("given", "endpoint", "wanted"),
    [
        ([], "http://127.0.0.1:4318", trace_flags("http://127.0.0.1:4318")),
        ([], "", []),
        (["--trace-config=level=OFF"], "http://127.0.0.1:4318", ["--trace-config=level=OFF"]),
    ],
)
def test_a_containers_server_sends_spans_where_its_environment_says(given, endpoint, wanted):
    command = [sys.executable, "-m", "cxr_triton.triton_repo.guard", "echo", *given]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"--trace-config\S+", said) == wanted


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector:4317", "http://one,two"])
def test_an_environment_that_names_no_collector_costs_no_server(endpoint):
    command = [sys.executable, "-m", "cxr_triton.triton_repo.guard", "echo"]
    environment = {**os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "--trace-config" not in ended.stdout and "warning: OTEL_EXPORTER_OTLP_ENDPOINT: " in ended.stderr


@pytest.mark.parametrize("no", [{"OTEL_SDK_DISABLED": "true"}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_an_environment_that_wants_no_spans_gets_none(no):
    assert trace_flags_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"})
    assert trace_flags_of({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", **no}) == []


def test_the_page_lists_what_a_span_may_say():
    page = (ROOT / "docs" / "traces.md").read_text().partition("## What a span says")[2]
    assert dict(re.findall(r"^\| `([a-z_.]+)` \| (.*) \|$", page, re.MULTILINE)) == ATTRIBUTES
