"""Put a radiograph into Orthanc, have Orthanc send it to the gateway, and print the reports that come back."""

import io
import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click
import pydicom

T = TypeVar("T")
REPORTS = 2  # findings for machines, text for people
LIMIT_S = 120


def call(url: str, body: bytes | None = None) -> bytes:
    """What Orthanc's REST interface answers; with a body it is a POST."""
    request = urllib.request.Request(url, body)  # noqa: S310  the address is the user's own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return answer.read()


def is_up(orthanc: str) -> bool:
    """Whether Orthanc answers."""
    try:
        return bool(call(f"{orthanc}/system"))
    except OSError:
        return False


def wait_for(what: str, found: Callable[[], T | None]) -> T:
    """The first true value of a question that is asked again and again."""
    ends = time.monotonic() + LIMIT_S
    while not (value := found()):
        if time.monotonic() > ends:
            raise click.ClickException(f"no {what} after {LIMIT_S} s; look at `cxr-triton gateway status`")
        time.sleep(0.5)
    return value


def reports_of(orthanc: str, study: str) -> list[str] | None:
    """Orthanc's identifiers of a study's structured reports, once all are there."""
    found = []
    for series in json.loads(call(f"{orthanc}/studies/{study}/series")):
        if series["MainDicomTags"]["Modality"] == "SR":
            found += series["Instances"]
    return found if len(found) >= REPORTS else None


def texts(item: pydicom.Dataset) -> list[str]:
    """What a report says, from its content tree."""
    own = [item.TextValue] if "TextValue" in item else []
    return own + [text for inner in item.get("ContentSequence", []) for text in texts(inner)]


@click.command()
@click.argument("image", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--orthanc", default="http://127.0.0.1:8052", show_default=True)
def main(image: Path, orthanc: str) -> None:
    """Send IMAGE once round. Research only, never for diagnosis."""
    wait_for("Orthanc", lambda: is_up(orthanc))
    stored = json.loads(call(f"{orthanc}/instances", image.read_bytes()))
    call(f"{orthanc}/modalities/gateway/store", json.dumps(stored["ID"]).encode())
    for instance in wait_for("reports", lambda: reports_of(orthanc, stored["ParentStudy"])):
        report = pydicom.dcmread(io.BytesIO(call(f"{orthanc}/instances/{instance}/file")))
        print(f"\n== {report.SeriesDescription}, {report.PreliminaryFlag}, {report.VerificationFlag}")
        print("\n".join(texts(report)))


if __name__ == "__main__":
    main()
