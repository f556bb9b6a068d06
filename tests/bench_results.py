"""A benchmark result made by hand, whole and consistent, for tests of what reads results."""

from __future__ import annotations

import random

from cxr_triton.perf.stages import stages_of, waterfall
from cxr_triton.perf.summary import Record, columns, over_repeats, summarize

TRITON = {
    "cxr_reader": (1000.0, 0.0, 0.0, 1000.0, 0.0),
    "dicom_preprocess": (50.0, 5.0, 1.0, 40.0, 4.0),
    "vision_encoder": (30.0, 4.0, 1.0, 24.0, 1.0),
}


def record(rng: random.Random, item: int, scheduled_s: float, speed: float) -> Record:
    """A request of about 1 / `speed` seconds."""
    tokens, scale = rng.randrange(40, 80), rng.uniform(0.95, 1.05) / speed
    timings_ms = {name: ms * scale for name, ms in (("image_decode", 20.0), ("preprocess", 15.0), ("vision", 40.0))}
    timings_ms |= {
        "queue": 2.0 * scale,
        "prefill": 90.0 * scale,
        "decode": 12.0 * tokens * scale,
        "report": 3.0 * scale,
    }
    timings_ms["first_token"] = sum(ms for name, ms in timings_ms.items() if name not in ("decode", "report"))
    sent_s, transport_s = scheduled_s + 0.0002, 0.006 * scale
    first_s = sent_s + (timings_ms["first_token"] + timings_ms["report"]) / 1e3 + transport_s
    steps = range(0, tokens, 8)
    deltas_s = [first_s + step * 0.012 * scale for step in steps]
    end_s = first_s + timings_ms["decode"] / 1e3 + 0.001 * scale
    stages = stages_of(timings_ms, sent_s, deltas_s, end_s)
    return Record(item, scheduled_s, sent_s, end_s, deltas_s, "ok", 310, tokens, stages)


def point(rng, kind: str, value: float, bounds: dict, speed: float, repeats: int, driver: str = "open_loop") -> dict:
    runs = []
    for _ in range(repeats):
        records, at_s = [], 0.0
        for index in range(24):
            records.append(record(rng, index % 4, at_s, speed))
            at_s += rng.expovariate(value) if kind == "rate_per_s" else 1.0 / speed / value
        runs.append(records)
    counts = ("request_ms", "queue_ms", "compute_input_ms", "compute_infer_ms", "compute_output_ms")
    triton = {
        model: {
            "requests": 24,
            "executions": 24,
            "failed": 0,
            **dict(zip(counts, (24 * v / speed for v in ms), strict=True)),
        }
        for model, ms in TRITON.items()
    }
    made = {
        "driver": driver,
        "load": {"kind": kind, "value": value} | ({"arrival": "poisson"} if kind == "rate_per_s" else {}),
        "repeats": [
            {
                "started": f"2026-11-22T08:4{i}:00+00:00",
                "summary": summarize(records, bounds),
                "requests": columns(records),
                "triton": triton,
                "metrics": {"cxr_decoder_steps_total": [100.0, 900.0]},
                "resident_bytes": {"tritonserver": 90 << 20, "decoder": 400 << 20, "client": 80 << 20},
            }
            for i, records in enumerate(runs)
        ],
    }
    made["summary"] = over_repeats([run["summary"] for run in made["repeats"]])
    made["waterfall"] = waterfall([record for run in runs for record in run], triton)
    if driver == "perf_analyzer":
        latency = made["repeats"][0]["summary"]["latency_ms"]
        made["perf_analyzer"] = {
            "command": ["perf_analyzer", "-m", "cxr_reader"],
            "version": "2.51.0",
            "window_s": made["repeats"][0]["summary"]["seconds"],
            "throughput_per_s": made["repeats"][0]["summary"]["readings_per_s"],
            "requests_per_window_s": made["repeats"][0]["summary"]["readings_per_s"],
            "latency_ms": {name: latency[name] for name in ("mean", "p50", "p90", "p95", "p99")},
        }
    return made


def result(speed: float = 1.0, seed: int = 0, repeats: int = 3) -> dict:
    """A result as `cxr-triton bench run --json` writes it; a server of twice the `speed` takes half the time."""
    rng = random.Random(seed)
    scenarios = []
    for name, metric, bounds, loads in (
        ("single_stream", "latency_ms.p90", {}, [("concurrency", 1)]),
        ("offline", "readings_per_s", {}, [("concurrency", 8)]),
        ("server", "rate_per_s", {"latency_ms": 12000.0}, [("rate_per_s", 0.5), ("rate_per_s", 0.8)]),
        ("interactive", "rate_per_s", {"ttft_ms": 2000.0, "itl_ms": 100.0}, [("rate_per_s", 0.5)]),
    ):
        points = [point(rng, kind, value * speed, bounds, speed, repeats) for kind, value in loads]
        told = points[-1]["summary"].get(metric) or {"mean": points[-1]["load"]["value"], "low": None, "high": None}
        outcome = {"value": told["mean"], "low": told["low"], "high": told["high"], "valid": True, "why": ""}
        scenarios.append(
            {
                "name": name,
                "driver": "open_loop",
                "bounds": bounds,
                "metric": metric,
                "points": points,
                "result": outcome,
            }
        )
    sweep = [point(rng, "concurrency", n, {}, speed, 1, "perf_analyzer") for n in (1, 2, 4)]
    image = {
        "name": "phantom-0",
        "bytes": 123456,
        "sha256": "0" * 64,
        "syntax": "jpeg_ls",
        "rows": 2500,
        "columns": 2048,
    }
    return {
        "schema_version": 1,
        "created": "2026-11-22T08:40:00+00:00",
        "command": ["cxr-triton", "bench", "run", "repository"],
        "environment": {
            "cpu": "Intel(R) Xeon(R) Processor",
            "cores": 2,
            "memory_bytes": 24 << 30,
            "os": "Debian GNU/Linux 12 (bookworm)",
            "python": "3.11.2",
            "package": "0.1.0",
            "revision": "0123456789ab",
            "versions": {"onnxruntime": "1.31.1", "numpy": "1.26.4"},
            "gpus": [],
            "load_average": 0.1,
            "client_priority": "real-time",
            "stolen_share": 0.012,
        },
        "server": {
            "name": "triton",
            "version": "2.51.0",
            "url": "127.0.0.1:8001",
            "models": {"decoder": {"slots": "4"}},
        },
        "workload": {
            "name": "example",
            "version": 1,
            "description": "Made by hand.",
            "seed": seed,
            "digest": "1" * 64,
            "arrival": "poisson",
            "items": [
                {
                    "images": [{**image, "name": f"phantom-{i}", "bits_stored": 12}],
                    "request": {"task": "findings", "max_new_tokens": 80},
                    "prompt_tokens": 310,
                    "image_tokens": 270,
                }
                for i in range(4)
            ],
        },
        "model": {
            "profile": "phantom",
            "title": "Phantom reader",
            "revision": None,
            "engine": "onnxruntime",
            "precision": "fp32",
            "bundle": "2" * 64,
            "verification": "none",
        },
        "scenarios": scenarios,
        "sweep": sweep,
        "cross_check": [],
        "roofline": [],
        "baselines": [],
        "notice": "Made by hand for tests. Research only; never for diagnosis.",
    }
