"""perf_analyzer: what is made of its export, and what is said when it is missing."""

import json
import sys
from pathlib import Path

import pytest

from cxr_triton.errors import InternalError, InvalidRequest, Unavailable
from cxr_triton.perf import perf_analyzer
from cxr_triton.perf.perf_analyzer import PerfAnalyzer
from cxr_triton.perf.workload import Image, Item

STAGES = ("image_decode", "preprocess", "vision", "queue", "prefill", "decode", "report", "first_token", "total")
READING = {
    "status": "ok",
    "text": 'Größe: "12 µm" ≥ 3\\4',
    "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    "timings_ms": dict.fromkeys(STAGES, 1.0),
}
ITEMS = [Item((Image("a", b"\x00\x80\xff"),), {"seed": 0}), Item((Image("b", b"b"),), {"seed": 1, "prompt": 'say "ä"'})]


def export(tmp_path: Path) -> Path:
    """A profile export as perf_analyzer 2.51 writes it: bytes of tensors as they are, only quotes, backslashes and
    control characters escaped."""

    def text(value: bytes) -> bytes:
        escaped = (
            value.replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\x00", b"\\u0000").replace(b"\n", b"\\n")
        )
        return b'"' + escaped + b'"'

    def request(at_ns: int, item: Item, arrived_ns: list[int], outputs: list[tuple[str, str]]) -> bytes:
        image = item.images[0].data + b'"},"response_times\x80\xfe\n'
        asked = json.dumps(item.request).encode()
        inputs = b'{"IMAGES":' + text(image) + b',"REQUEST":' + text(asked) + b"}"
        said = b",".join(
            b'{"READING":' + text(reading.encode()) + b',"DELTA":' + text(delta.encode()) + b"}"
            for reading, delta in outputs
        )
        times = json.dumps(arrived_ns).encode()
        return b'{"timestamp":%d,"request_inputs":%b,"response_timestamps":%b,"response_outputs":[%b]}' % (
            at_ns,
            inputs,
            times,
            said,
        )

    reading = json.dumps(READING, ensure_ascii=False)
    second = request(2_500_000_000, ITEMS[0], [2_600_000_000, 2_900_000_000], [("", "x"), (reading, "")])
    first = request(
        2_000_000_000,
        ITEMS[1],
        [2_010_000_000, 2_200_000_000, 2_400_000_000, 2_450_000_000],
        [("", ""), ("", "Grö"), ("", 'ße "'), (reading, "")],
    )
    path = tmp_path / "export.json"
    path.write_bytes(
        b'{"experiments":[{"experiment":{"mode":"concurrency","value":2},"requests":['
        + second
        + b","
        + first
        + b'],"window_boundaries":[2000000000,5000000000]}],"version":"2.51.0","service_kind":"triton","endpoint":""}'
    )
    return path


def test_an_export_becomes_records(tmp_path):
    (first, second), window_s = perf_analyzer.read_export(export(tmp_path), ITEMS)
    assert window_s == 3.0
    assert (first.item, second.item) == (1, 0)
    assert (first.sent_s, first.end_s, first.deltas_s) == (0.0, 0.45, [0.2, 0.4])  # not the heartbeat at 0.01 s
    assert (first.status, first.prompt_tokens, first.tokens) == ("ok", 7, 5)
    assert first.itl_ms == pytest.approx(200 / 4) and first.ttft_ms == pytest.approx(200)
    assert (second.scheduled_s, second.sent_s, second.end_s) == (0.5, 0.5, 0.9)
    assert first.stages_ms["decode"] == 1.0


def test_a_request_without_a_reading_has_failed(tmp_path):
    path = export(tmp_path)
    path.write_bytes(path.read_bytes().replace(b'"status', b'"other', 1).replace(b'{"READING":"{', b'{"NOTHING":"{', 1))
    records, _ = perf_analyzer.read_export(path, ITEMS)
    assert [record.failed for record in records] == [False, True]


def test_the_report_is_read_by_its_columns(tmp_path):
    heads = "Concurrency,Inferences/Second,Response Throughput,Client Send,p50 latency,p90 latency,p95 latency"
    path = tmp_path / "report.csv"
    path.write_text(
        f"{heads},p99 latency,Avg latency,request/response\n2,7.99471,1,0,196458,272991,279009,312128,203783,0\n"
    )
    assert perf_analyzer.read_report(path) == {
        "throughput_per_s": 7.99471,
        "latency_ms": {"mean": 203.783, "p50": 196.458, "p90": 272.991, "p95": 279.009, "p99": 312.128},
    }


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(perf_analyzer, "VERSION", "0.0.0")  # there is none
    with pytest.raises(Unavailable, match=r"could not be downloaded .*--perf-analyzer PATH; or leave it out"):
        perf_analyzer.find(tmp_path / "cache")
    assert not (tmp_path / "cache" / "0.0.0").exists()


def test_a_binary_that_does_not_run_says_what_is_missing(tmp_path):
    path = tmp_path / "perf_analyzer"
    path.write_text("#!/bin/sh\necho 'error while loading shared libraries: libb64.so.0d: cannot open' >&2; exit 127\n")
    path.chmod(0o755)
    with pytest.raises(Unavailable, match=r"libb64.so.0d: cannot open; install libb64"):
        PerfAnalyzer.at(path)
    path.chmod(0o644)
    with pytest.raises(Unavailable, match="does not start"):
        PerfAnalyzer.at(path)


def fake(tmp_path, script: str) -> PerfAnalyzer:
    path = tmp_path / "perf_analyzer"
    path.write_text(f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: sys.exit('Version 9.9')\n{script}\n")
    path.chmod(0o755)
    return PerfAnalyzer.at(path)


def test_a_run_that_fails_is_quoted(tmp_path):
    tool = fake(tmp_path, "sys.exit('Failed to init manager inputs: unexpected error')")
    assert tool.version == "9.9"
    with pytest.raises(InternalError, match="status 1: Failed to init manager inputs"):
        perf_analyzer.run(tool, "127.0.0.1:1", ITEMS, concurrency=1, requests=1, timeout_s=60)


def test_more_requests_than_it_can_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(perf_analyzer, "EXPORT_BYTES", 20)
    assert perf_analyzer.request_limit(ITEMS) == 10
    tool = fake(tmp_path, "")
    with pytest.raises(InvalidRequest, match=r"11 requests .* allowed 10"):
        perf_analyzer.run(tool, "127.0.0.1:1", ITEMS, concurrency=1, requests=11, timeout_s=60)


def test_what_it_needs_comes_from_the_servers_wheel():
    """The binary's libraries are those that the pip-installed Triton brings under other names."""
    pytest.importorskip("pytriton")
    libraries = perf_analyzer._libraries()
    assert set(libraries) == set(perf_analyzer.LIBRARIES)
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in libraries.values())
