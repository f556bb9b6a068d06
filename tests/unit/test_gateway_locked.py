"""What the gateway keeps to itself, and what it does not let others do to it."""

import io
import json
import os
import stat
from pathlib import Path

import pytest
import yaml

pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")


from cxr_triton import phantom, phantom_file
from cxr_triton.client.gateway.config import Folder, load_config
from cxr_triton.client.gateway.intake import Intake
from cxr_triton.client.gateway.log import Log, Metrics
from cxr_triton.client.gateway.service import Gateway
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.gateway.watch import FolderWatcher

DESTINATION = "destinations: [{name: pacs, aet: PACS, host: 127.0.0.1}]\n"


@pytest.fixture(autouse=True)
def umask():
    """Of most systems, and again after a gateway has set its own."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def configured(folder, text="", **keys):
    """A configuration whose objects come by a folder."""
    path = folder / "gateway.yaml"
    own = {"storage": str(folder / "s"), "folder": {"path": str(folder / "in")}, "intake": {"min_free_mib": 0}, **keys}
    path.write_text(yaml.safe_dump(own) + ("" if "destinations" in keys else DESTINATION) + text)
    return load_config(path)


def phantom_dicom(seed: int = 1) -> bytes:
    import numpy as np

    return phantom_file.write_dicom(phantom.draw(np.random.default_rng(seed)))


class Site:
    """An intake with its queue and its log."""

    def __init__(self, folder, **keys):
        self.config = configured(folder, **keys)
        Path(self.config.storage).mkdir(exist_ok=True)
        self.stream = io.StringIO()
        self.store = Store(self.config.queue_url, "one")
        self.log = Log(self.config, self.stream)
        self.intake = Intake(self.config, self.store, self.log, Metrics(self.store.counts, lambda: 0), lambda: None)
        self.watcher = FolderWatcher(self.config.folder or Folder(path=str(folder / "in")), self.intake)
        self.inbox = folder / "in"

    def scan(self) -> int:
        """Two scans, since a file is taken at the second that sees it."""
        return self.watcher.scan() + self.watcher.scan()

    def events(self, name: str) -> list[dict]:
        return [line for line in map(json.loads, self.stream.getvalue().splitlines()) if line["event"] == name]


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.store.close()


# -------------------------------------------------------------------------------------------------------- at rest


def modes(folder: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"file": set(), "folder": set()}
    for path in (folder, *folder.rglob("*")):
        found["folder" if path.is_dir() else "file"].add(oct(stat.S_IMODE(path.stat().st_mode)))
    return found


@pytest.mark.parametrize("shared, expected", [(False, ("0o600", "0o700")), (True, ("0o660", "0o2770"))])
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_nobody_else_reads_what_the_gateway_writes(tmp_path, mask, shared, expected):
    os.umask(0o022)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "queue.sqlite").touch(0o644)  # of an earlier release
    os.umask(mask)
    config = configured(tmp_path, share_with_group=shared)
    gateway = Gateway(config, io.StringIO())
    with gateway.store._begin():
        beside = {path.name for path in (tmp_path / "s").glob("queue.sqlite-*")}
        with gateway.intake.new_file() as file:
            file.write(phantom_dicom())
            gateway.intake.take(file, "folder", "test")
        folder = tmp_path / "s" / "results" / "1"
        folder.mkdir(parents=True)
        send_file = folder / "0-sr.dcm"
        from cxr_triton.files import write

        write(send_file, b"result")
        found = modes(tmp_path / "s")
    gateway.store.close()
    gateway._lock.close()
    assert beside == {"queue.sqlite-wal", "queue.sqlite-shm"}
    assert found["file"] <= {expected[0], "0o600"} and expected[0] in found["file"]
    assert found["folder"] <= {expected[1], expected[1].replace("2", "")}
