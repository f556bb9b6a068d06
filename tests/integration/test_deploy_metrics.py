"""The dashboard asks for metrics that a real server has, or that the documentation of a part that is not here names."""

import json
import re
import urllib.request
from pathlib import Path

from served import radiograph

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
NAME = re.compile(r"\b(?:nv|cxr_decoder|cxr_vision)_[a-z_]+\b")


def test_every_metric_of_the_dashboard_exists(server, raw):
    raw.read([radiograph(1)], prompt="Say something.", max_new_tokens=4)
    with urllib.request.urlopen(f"http://{server.metrics}/metrics") as page:
        scraped = set(re.findall(r"^# TYPE (\S+)", page.read().decode(), re.MULTILINE))
    asked, labels = set(), []
    for panel in json.loads((DEPLOY / "grafana" / "cxr-triton.json").read_text())["panels"]:
        for target in panel["targets"]:
            asked |= set(NAME.findall(target["expr"]))
            labels += re.findall(r'model="([^"]+)"', target["expr"])
    here, elsewhere = set(), set()
    for row in re.findall(r"^\| (`.*`) \| (.*) \|$", (DEPLOY / "README.md").read_text(), re.MULTILINE):
        is_here = row[1] in ("Triton", "our `decoder`", "our `vision_encoder`")
        (here if is_here else elsewhere).update(NAME.findall(row[0]))
    assert here <= scraped, f"the server has no {sorted(here - scraped)}"
    assert not elsewhere & scraped, "these are here after all: say so in deploy/README.md"
    assert asked == here | elsewhere, "the dashboard and the table of deploy/README.md differ"
    assert (
        set(labels)
        <= {"cxr_reader", "vision_encoder"}
        <= {path.parent.name for path in server.repository.glob("*/config.pbtxt")}
    )
