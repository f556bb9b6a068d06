"""The page and the CSV of a benchmark result: complete, harmless, and right when a browser draws them."""

import copy
import csv
import io
import json
import re
from html import escape, unescape
from pathlib import Path

import bench_results
import numpy as np
import pytest
from chromium import Page, browser, chromium, is_color, screenshot

from cxr_triton.numbers import change, duration, moment, number, percent, shortest
from cxr_triton.perf.compare import compare
from cxr_triton.perf.report import history_page, result_page, to_csv
from cxr_triton.perf.roofline import Ceilings, Work, row

CEILINGS = Ceilings("cpu", 20e9, {"fp32": 2e11, "int4": 1e12})


@pytest.fixture(scope="module")
def result():
    made = bench_results.result()
    made["roofline"] = [
        row("image_decode", Work(0, 1e7), 0.05, CEILINGS, "fp32"),
        row("vision", Work(4e9, 2e8), 0.04, CEILINGS, "fp32"),
        row("prefill", Work(8e11, 1e9), 1.0, CEILINGS, "int4"),
        row("decode", Work(4e9, 1.7e9), 0.17, CEILINGS, "int4"),
    ]
    made["baselines"] = [
        {"name": "transformers.generate", "ratio_output_tokens_per_s": 3.4, "rounds": [{"x": 1}]},
        {"name": "vLLM", "ratio_output_tokens_per_s": None, "why": "not installed"},
    ]
    made["cross_check"] = [
        {"concurrency": 2, "metric": "throughput", "a": "ours", "b": "printed", "a_value": 2.02, "b_value": 2.0,
         "relative_difference": 0.01}
    ]  # fmt: skip
    return made


def test_the_page_says_everything_a_benchmarker_needs(result):
    page = Page(result_page(result))
    for part in (
        "Not for diagnosis", result["notice"], "Phantom reader", "single_stream", "offline", "server", "interactive",
        "latency_ms.p90", "transformers.generate", "3.40 ×", "not installed", "50 % of the copy",
        "80 % of the gemm int4",
        "10 GB/s", "0.800 TFLOP/s", "adds up", "prefill", "transport", "Intel(R) Xeon(R) Processor, 2 cores",
        "0123456789ab", "onnxruntime 1.31.1", "1" * 64, "2500 × 2048", "jpeg_ls", "throughput", "+1.0 %",
        "cxr-triton bench run repository",
    ):  # fmt: skip
        assert part in page.text, part
    # curve, three bands, four timelines, roofline
    assert page.tags.count("svg") == 9


def test_every_number_of_every_repeat_is_in_the_csv(result):
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    points = [point for scenario in result["scenarios"] for point in scenario["points"]] + result["sweep"]
    assert len(rows) == sum(len(point["repeats"]) for point in points)
    first, summary = rows[0], result["scenarios"][0]["points"][0]["repeats"][0]["summary"]
    assert (first["scenario"], first["driver"], first["load_kind"], first["load"]) == (
        "single_stream", "open_loop", "concurrency", "1.0",
    )  # fmt: skip
    assert float(first["latency_ms.p99"]) == summary["latency_ms"]["p99"]
    assert float(first["output_tokens_per_s"]) == summary["output_tokens_per_s"]
    assert {row["scenario"] for row in rows} == {"single_stream", "offline", "server", "interactive", "sweep"}


HOSTILE = ("<script>alert(1)</script>", '"><img src=http://127.0.0.1:9/x onerror=alert(1)>', "</style><svg onload=a()>")


def poisoned(value, poison):
    """A copy in which every text that a server or a user could have written is `poison`."""
    if isinstance(value, dict):
        return {key: poisoned(item, poison) for key, item in value.items()}
    if isinstance(value, list):
        return [poisoned(item, poison) for item in value]
    return poison if isinstance(value, str) else value


def test_hostile_text_stays_text(result):
    for poison in HOSTILE:
        made = copy.deepcopy(result)
        for key in ("environment", "server", "workload", "model", "baselines", "notice", "command", "created"):
            made[key] = poisoned(made[key], poison)
        for scenario in made["scenarios"]:
            scenario["name"] = poison
        whole = result_page(made) + history_page([made])
        made = poisoned(made, "harmless")
        page, harmless = Page(whole), Page(result_page(made) + history_page([made]))
        assert not {"script", "img", "iframe", "link", "object", "form", "a"} & set(page.tags)
        assert not [name for _, name, *_ in page.attributes if name.startswith("on") or name in ("src", "href")]
        assert poison in page.text
        assert set(page.tags) == set(harmless.tags)


def test_a_result_with_nothing_in_it_still_gives_a_page(result):
    bare = copy.deepcopy(result) | {"scenarios": [], "sweep": [], "roofline": [], "baselines": [], "cross_check": []}
    page = Page(result_page(bare))
    assert "What was measured" in page.text and "svg" not in page.tags
    assert to_csv(bare) == ""


def test_failed_and_textless_requests_are_drawn(result):
    made = copy.deepcopy(result)
    requests = made["scenarios"][0]["points"][0]["repeats"][0]["requests"]
    requests["status"][0], requests["first_s"][0], requests["tokens"][0] = "QUEUE_FULL", None, None
    made["scenarios"][0]["points"][0]["repeats"][0]["summary"]["failed"] = {"QUEUE_FULL": 1}
    html = result_page(made)
    assert "QUEUE_FULL, None tokens" in html and 'class="area bad"' in html


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0, "0"), (12, "12"), (1234.5, "1,234"), (0.01234, "0.0123"), (3.4, "3.40"), (1e-9, "1.00 × 10⁻⁹"),
     (float("inf"), "inf"), ("ok", "ok"), (2.0, "2"), (100000.0, "100,000"), (-0.8703, "−0.870"), (0.99951, "1.00"),
     (999.7, "1,000"), (-6.644e-5, "−6.64 × 10⁻⁵")],
)  # fmt: skip
def test_numbers_keep_three_digits(value, text):
    assert number(value) == text


def test_units_signs_and_times():
    assert [shortest(v) for v in (0.1, 1e-5, 2e-5, 50000.0, 0.1 + 0.2)] == ["0.1", "10⁻⁵", "2 × 10⁻⁵", "50,000", "0.3"]
    assert [percent(v) for v in (0.1234, 0, 1e-5, -1e-5, -0.014)] == ["12.3 %", "0.0 %", "< 0.1 %", "0.0 %", "−1.4 %"]
    assert [change(v) for v in (0.25, -0.328, -1e-5)] == ["+25.0 %", "−32.8 %", "0.0 %"]
    times = [duration(ms) for ms in (0.27, 436.6, 9760, 104_580, -1617.7)]
    assert times == ["0.3 ms", "436.6 ms", "9.76 s", "104.6 s", "−1.62 s"]
    assert [moment(t) for t in ("2026-11-22T08:40:31+00:00", "2026-11-22T08:40:31Z")] == ["2026-11-22 08:40 UTC"] * 2
    assert moment("yesterday") == "yesterday"


RESULTS = sorted((Path(__file__).resolve().parents[2] / "docs" / "results").glob("bench-[3p]*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_real_result_s_page_writes_numbers_as_people_do(path):
    """No power as 1e-05, no Python list, no hyphen for a minus, no signed nought, no stamp, one space before %."""
    made = json.loads(path.read_text())
    if "scenarios" not in made:
        pytest.skip("not what `bench run` writes")
    text = Page(result_page(made)).text.replace(" ".join(" ".join(made["command"]).split()), "")
    for fault in (r"\d[eE][-+]\d", r"\['", r"(?<![\w.])-\d", r"[-−+]0\.0 %", r"\dT\d\d:", r"\d%", r"\b1 streams",
                  r"(?<![\w.-])\d+\.\d{6}", r"(?<![\w.,-])\d{5,}(?![\w.-])", r"\b0\.\d?00 ?/s"):  # fmt: skip
        assert not (found := re.search(f".{{0,30}}{fault}.{{0,20}}", text)), found[0]


@pytest.mark.slow
@browser
def test_no_label_of_a_chart_runs_into_another(tmp_path, pages):
    """Eight loads of long names under one axis, and stages whose dots are close together."""
    made = bench_results.result(repeats=1) | {"sweep": []}
    for i, scenario in enumerate(made["scenarios"]):
        scenario["points"] = [{**point, "load": {"kind": "rate_per_s", "value": 0.0349 + 0.0101 * i + 0.001 * j}}
                              for j, point in enumerate(2 * scenario["points"][:1])]  # fmt: skip
    made["roofline"] = [
        row(name, Work(8e11, 1e9), 1.0 + 0.02 * i, CEILINGS, "int4") for i, name in enumerate(("a", "b"))
    ]
    script = """
        const boxes = [...document.querySelectorAll('svg')].map(s => [...s.querySelectorAll('text')].map(t =>
            [t.textContent, t.getBoundingClientRect()]));
        const meet = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
        document.body.dataset.found = JSON.stringify(boxes.flatMap(all => all.flatMap(([a, p], i) =>
            all.slice(i + 1).filter(([, q]) => meet(p, q)).map(([b]) => [a, b]))));
    """
    html = result_page(made).replace("default-src 'none'", "script-src 'unsafe-inline'")
    dom = chromium(tmp_path, html.replace("</body>", f"<script>{script}</script></body>"), "--dump-dom").stdout
    assert json.loads(unescape(re.search(r'data-found="([^"]*)"', dom)[1])) == []


@pytest.fixture(scope="module")
def pages(result):
    """Every page, by name."""
    slower = bench_results.result(speed=0.8)
    slower["workload"] = result["workload"]
    for scenario, other in zip(slower["scenarios"], result["scenarios"], strict=True):
        for point, like in zip(scenario["points"], other["points"], strict=True):
            point["load"] = like["load"]
    told = compare(result, slower)
    return {
        "result": result_page(result),
        "compared": result_page(slower, result, told),
        "history": history_page([result, slower, result]),
    }


@pytest.mark.slow
@browser
@pytest.mark.parametrize("name", ["result", "compared", "history"])
def test_a_browser_finds_no_fault_and_asks_nobody(tmp_path, pages, name):
    log, asked = tmp_path / "net.json", "http://127.0.0.1:9/x"
    hostile = pages[name].replace("Phantom reader", escape(f"<img src={asked}>"))
    out = chromium(tmp_path, hostile, f"--log-net-log={log}", "--dump-dom")
    assert "<svg" in out.stdout and "CONSOLE" not in out.stderr
    requested = set(re.findall(r'"url":"(https?:[^"]*)"', log.read_text()))
    assert f'"url":"{asked}"' not in log.read_text()
    # The browser itself may look for updates; the page asks for nothing.
    assert not [url for url in requested if "127.0.0.1" in url]
    if name == "result":  # the same checks see a page that does err and does ask
        out = chromium(tmp_path, f"<script>x</script><img src={asked}>", f"--log-net-log={log}", "--dump-dom")
        assert "CONSOLE" in out.stderr and f'"url":"{asked}"' in log.read_text()


@pytest.mark.slow
@browser
def test_bars_have_the_lengths_of_their_numbers(tmp_path, result):
    blue, made = (47, 116, 181), copy.deepcopy(result) | {"scenarios": [], "sweep": [], "roofline": []}
    made["baselines"][1]["ratio_output_tokens_per_s"] = 1.7
    pixels = is_color(screenshot(tmp_path, result_page(made)), blue, tolerance=6)
    widths = [int(line.sum()) for line in pixels if line.sum() > 30]
    assert min(widths) / max(widths) == pytest.approx(0.5, abs=0.02)


@pytest.mark.slow
@browser
def test_pages_fit_a_phone_and_follow_light_and_dark(tmp_path, pages):
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{escape(html)}"></iframe>'
        for html in pages.values()
        for width in (360, 1280)
    )
    script = """
        const hidden = s => s.scrollWidth - s.clientWidth;
        const shown = d => (d.querySelectorAll('details').forEach(e => e.open = true), d);
        d.textContent = [...document.querySelectorAll('iframe')].map(f => shown(f.contentDocument).body.scrollWidth +
            Math.max(0, ...[...f.contentDocument.querySelectorAll('.scroll')].map(hidden)));
    """
    wrapper = f'{frames}<p id="d"></p><script>onload = () => {{ {script} }}</script>'
    dom = chromium(tmp_path, wrapper, "--dump-dom").stdout
    found = [int(width) for width in re.search(r'<p id="d">([\d,]+)</p>', dom)[1].split(",")]
    assert all(0 < width <= frame for width, frame in zip(found, (360, 1280) * 3, strict=True)), found
    light = screenshot(tmp_path, pages["result"])
    dark = screenshot(tmp_path, pages["result"].replace("(prefers-color-scheme: dark)", "all"))
    assert np.mean(light) > 200 and np.mean(dark) < 60
