"""Both clients and the `read` command against the real served ensemble."""

import asyncio
import json
import time

import pytest
from click.testing import CliRunner
from collector import collecting
from served import outputs, radiograph

from cxr_triton.cli import main
from cxr_triton.client import AsyncReader, Reader, Timeouts, otlp, wire
from cxr_triton.client.limits import NO_ACCESS
from cxr_triton.client.spans import Span
from cxr_triton.errors import DeadlineExceeded, InvalidImage, InvalidRequest, ServerMismatch, Unavailable
from cxr_triton.reading import STAGES, Reading

pytestmark = pytest.mark.triton
SHORT = {"max_new_tokens": 12, "temperature": 2.0, "seed": 7}  # random weights say one word for ever when greedy
LONG = {"max_new_tokens": 3500}
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def is_idle(raw, timeout_s: float = 60.0) -> bool:
    """Wait until the decoder has no stream."""
    deadline = time.monotonic() + timeout_s
    while raw.metric("cxr_decoder_streams"):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def reader(server):
    with Reader(server.grpc) as reader:
        yield reader


def test_both_clients_give_what_a_bare_client_gets(raw, reader, server):
    pair = [radiograph(1), radiograph(2, rows=160, columns=300)]
    bare = raw.read(pair, task="compare", **SHORT)
    stream = reader.read(pair, task="compare", **SHORT)
    deltas = list(stream)
    assert "" not in deltas and "".join(deltas) == stream.reading.text == bare["text"]
    assert [image["rows"] for image in stream.reading.images] == [240, 160]

    async def twin():
        async with AsyncReader(server.grpc) as reader:
            return await reader.read(pair, task="compare", **SHORT).result()

    reading = asyncio.run(twin())
    assert (reading.text, reading.model) == (bare["text"], bare["model"])


def test_an_archive_reads_in_the_process_what_it_reads_by_a_server(reader, served_bundle, server):
    from cxr_triton.archive.in_process import InProcess
    from cxr_triton.archive.served import Served

    asked = {"task": None, "prompt": None, "mode": None, "max_new_tokens": 12, "identifiers": "hashed"}
    here, there = InProcess(served_bundle, slots=2, threads=1), Served([server.grpc], 60.0, NO_ACCESS)
    try:
        for image in (radiograph(1), radiograph(2, rows=160, columns=300)):
            (mine, _), (theirs, _) = here.read(image, asked), there.read(image, asked)
            for name in ("text", "status", "prompt", "model", "images"):
                assert getattr(mine, name) == getattr(theirs, name)
            assert mine.usage["completion_tokens"] == theirs.usage["completion_tokens"] == 12
        with pytest.raises(InvalidImage, match="no DICOM, PNG or JPEG"):
            here.read(b"no picture", asked)
    finally:
        here.close()
        there.close()


def test_a_conversation_goes_on(reader):
    first = reader.read(radiograph(3), **SHORT).result()
    turns = [{"role": "user", "content": first.prompt}, {"role": "assistant", "content": first.text}]
    second = reader.read(radiograph(3), task="differentials", history=turns, **SHORT).result()
    assert second.task == "differentials"
    assert second.usage["prompt_tokens"] > first.usage["prompt_tokens"] + first.usage["completion_tokens"] - 1


def test_refusals_are_typed_and_the_next_reading_succeeds(reader):
    refusals = [
        (InvalidImage, "no DICOM, PNG or JPEG", {"images": b"no picture"}),
        (InvalidRequest, "did you mean 'findings'", {"images": radiograph(1), "task": "finding"}),
        (InvalidRequest, "0 given", {}),
    ]
    for error, message, request in refusals:
        with pytest.raises(error, match=message):
            reader.read(**request).result()
        assert reader.read(radiograph(1), **SHORT).result().usage["completion_tokens"] == 12


def test_another_model_and_another_port_are_told_apart(server):
    with Reader(server.grpc, model="decoder") as reader, pytest.raises(ServerMismatch, match="INPUT_IDS"):
        reader.read(b"").result()
    with Reader(server.grpc, model="nothing") as reader, pytest.raises(ServerMismatch, match="cxr-triton package"):
        reader.read(b"").result()
    with Reader(server.http, timeouts=Timeouts(connect_s=0.5)) as reader, pytest.raises(Unavailable):
        reader.read(b"").result()


def test_one_trace_shows_every_stage(reader, monkeypatch):
    with collecting(monkeypatch) as collector:
        otlp.start(collector.url, "test", collector.said.append)
        with Span("study") as study:
            reading = reader.read(radiograph(1), traceparent=str(study.place), **SHORT).result()
        collector.flush()
        spans = {span.name: span for span in collector.spans(study.place.trace_id)}
    assert reading.trace_id == study.place.trace_id and collector.said == []
    ran = {*STAGES} - {"scores"}
    assert spans.keys() == {"study", "read", *ran} and spans["read"].parent == spans["study"].span_id
    assert {spans[stage].parent for stage in ran} == {spans["read"].span_id}
    assert all((spans[stage].end - spans[stage].start) / 1e6 == pytest.approx(reading.timings_ms[stage], abs=0.01)
               for stage in ran)  # fmt: skip
    assert spans["read"].start <= spans["image_decode"].start and spans["report"].end <= spans["read"].end


def test_the_id_of_a_request_is_that_of_its_reading(raw):
    assert json.loads(_last(raw, GIVEN))["trace_id"] == GIVEN.split("-")[1]
    for wrong in ("", "4711", GIVEN.upper(), GIVEN + '"}'):
        assert "trace_id" not in json.loads(_last(raw, wrong))


def _last(raw, name: str) -> str:
    """READING of a request with an id, as any client of KServe v2 may send it."""
    request = wire.infer_request("cxr_reader", [], {"task": "quiz", **SHORT}, 1)
    request.id = name
    return [outputs(message)[1] for message in raw.stub.ModelStreamInfer(iter([request]), timeout=60)][-1]


def test_server_info(reader):
    info = reader.server_info()
    assert (info.name, info.model, info.model_versions) == ("triton", "cxr_reader", ("1",))


@pytest.mark.parametrize("how", ["close", "drop"])
def test_leaving_a_stream_frees_the_decoder(raw, reader, how):
    stream = reader.read(radiograph(4), **LONG)
    next(stream)
    assert raw.metric("cxr_decoder_streams") == 1
    if how == "close":
        stream.close()
    del stream
    assert is_idle(raw)


def test_the_time_limit_frees_the_decoder(raw, server):
    # a fast CPU decodes all tokens in a second
    with (
        Reader(server.grpc, timeouts=Timeouts(total_s=0.3)) as reader,
        pytest.raises(DeadlineExceeded, match="total_s"),
    ):
        reader.read(radiograph(4), **LONG).result()
    assert is_idle(raw)


def test_a_cancelled_task_frees_the_decoder(raw, server):
    async def run():
        async with AsyncReader(server.grpc) as reader:
            tasks = [asyncio.create_task(reader.read(radiograph(i), **LONG).result()) for i in range(3)]
            while raw.metric("cxr_decoder_streams") < 3:
                await asyncio.sleep(0.02)
            for task in tasks:
                task.cancel()
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(result, asyncio.CancelledError) for result in asyncio.run(run()))
    assert is_idle(raw)


def test_sixteen_at_once(server):
    async def run():
        async with AsyncReader(server.grpc) as reader:
            return await asyncio.gather(*(reader.read(radiograph(i % 4), **SHORT).result() for i in range(16)))

    readings = asyncio.run(run())
    assert [reading.text for reading in readings] == [reading.text for reading in readings[:4]] * 4


def test_the_command_reads_a_file_to_the_end(server, tmp_path):
    for name, seed in (("prior", 1), ("current", 2)):
        (tmp_path / f"{name}.dcm").write_bytes(radiograph(seed))
    files = [str(tmp_path / "prior.dcm"), str(tmp_path / "current.dcm")]
    out = ["--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    options = ["--task", "compare", "--max-new-tokens", "12", "--temperature", "2", "--seed", "7"]
    result = CliRunner().invoke(main, ["read", *files, "--url", server.grpc, *options, *out])
    reading = Reading.from_json((tmp_path / "r.json").read_text())
    # Twelve tokens of random weights are cut off: the reading says so, and so does the exit status.
    assert result.exit_code == 3 and reading.status == "truncated" and "truncated" in result.stdout
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "Image 1, prior: prior.dcm" in page and "Image 2, current: current.dcm" in page
    assert page.count("200\u00a0×\u00a0240\u00a0px") == 4  # under each picture, and among its facts
