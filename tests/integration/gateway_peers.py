"""What the gateway's tests talk to: Orthanc, PostgreSQL, a served phantom model, and the gateway as a process."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from ports import free_port

from cxr_triton.cli import main

PHANTOM = Path(__file__).resolve().parents[1] / "phantom"
DICOM_WEB = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
CLI = [sys.executable, "-c", "from cxr_triton.cli import main; main()"]
DEADLINE_S = 120


def wait_for(condition, what: str, timeout_s: float = DEADLINE_S):
    """The first true value of a condition."""
    ends = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < ends, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.05)


def require(program: str) -> str:
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/bin")
    if path is None:
        pytest.skip(f"no {program} here; install it with `make debian`")
    return path


class Process:
    """A program that runs until the `with` block ends."""

    def __init__(self, command: list, log: Path, **kwargs):
        self.log = log
        self._file = log.open("ab")
        self.process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.STDOUT, **kwargs)

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        self.stop()


class Orthanc(Process):
    """A PACS on loopback; `http` is its REST root, `stow` its DICOMweb root, `port` its DICOM port."""

    def __init__(self, folder: Path, gateway_port: int | None = None, dicom_port: int | None = None, **settings):
        self._program = require("Orthanc")
        if not DICOM_WEB.exists():
            pytest.skip("no orthanc-dicomweb here; install it with `make debian`")
        folder.mkdir(parents=True, exist_ok=True)
        self.port, http = dicom_port or free_port(), free_port()
        self.http = f"http://127.0.0.1:{http}"
        self.stow = f"{self.http}/dicom-web"
        config = {
            "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "DicomAet": "ORTHANC", "DicomPort": self.port, "HttpPort": http, "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False, "DicomAlwaysAllowStore": True, "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True, "UnknownSopClassAccepted": True, "StorageCompression": False,
            "DicomModalities": {"gateway": ["CXR_GATEWAY", "127.0.0.1", gateway_port or 1]},
            "DicomScuTimeout": 30, "TranscodeDicomProtocol": False,
            "Plugins": [str(DICOM_WEB)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "ConcurrentJobs": 4, **settings,
        }  # fmt: skip
        self._config = folder / "orthanc.json"
        self._config.write_text(json.dumps(config))
        self.start()

    def start(self) -> None:
        """Start, or start again on the same ports with what is stored."""
        super().__init__([self._program, str(self._config)], self._config.with_suffix(".log"))
        wait_for(lambda: self.process.poll() is not None or self._is_up(), "Orthanc's start")
        assert self.process.poll() is None, self.log.read_text(errors="replace")[-2000:]

    def _is_up(self) -> bool:
        try:
            return bool(self.get("/system"))
        except OSError:
            return False

    def get(self, path: str, raw: bool = False):
        with urllib.request.urlopen(self.http + path, timeout=30) as answer:
            data = answer.read()
        return data if raw else json.loads(data)

    def pages(self, path: str, size: int = 1000) -> Iterator[dict]:
        """All of a collection such as ``/series``, expanded, fetched page by page."""
        for since in itertools.count(0, size):
            page = self.get(f"{path}?expand&since={since}&limit={size}")
            yield from page
            if len(page) < size:
                return

    def post(self, path: str, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.http + path, data), timeout=60) as answer:
            return json.loads(answer.read())

    def upload(self, content: bytes) -> str:
        """Orthanc's identifier of a stored instance."""
        return self.post("/instances", content)["ID"]

    def instances(self, modality: str | None = None) -> dict[str, dict]:
        """Main tags of all stored instances, by SOP Instance UID."""
        found = {}
        for instance in self.get("/instances?expand"):
            tags = instance["MainDicomTags"]
            series = self.get(f"/series/{instance['ParentSeries']}")["MainDicomTags"]
            if modality in (None, series.get("Modality")):
                found[tags["SOPInstanceUID"]] = {**tags, **series, "ID": instance["ID"]}
        return found

    def file(self, identifier: str) -> bytes:
        return self.get(f"/instances/{identifier}/file", raw=True)


class GatewayProcess(Process):
    """`cxr-triton gateway` with a configuration of its own; `port` and `web` are what it says it listens on."""

    def __init__(self, folder: Path, config: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "gateway.yaml"
        self.config.write_text(yaml.safe_dump(config))
        log = folder / "gateway.log"
        start = log.stat().st_size if log.exists() else 0
        command = [*CLI, "gateway", "--config", str(self.config)]
        super().__init__(command, log)
        try:
            line = wait_for(lambda: self.process.poll() is not None or self._started(start), "the gateway's start")
        except AssertionError:
            self.kill()
            raise
        assert self.process.poll() is None, log.read_text()[-3000:]
        self.port, self.web = line["dicom_port"], f"http://127.0.0.1:{line['web_port']}"

    def _started(self, start: int) -> dict | None:
        return next((line for line in self.lines(start) if line["event"] == "started"), None)

    def lines(self, start: int = 0) -> list[dict]:
        text = self.log.read_bytes()[start:].decode(errors="replace")
        found = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    @functools.cached_property
    def queue(self):
        """The gateway's queue, to look into."""
        from cxr_triton.client.gateway.config import load_config
        from cxr_triton.client.gateway.store import Store

        return Store(load_config(self.config).queue_url, "watcher")

    def ask(self, *arguments: str, code: int = 0) -> dict:
        """What an operator's verb says."""
        done = CliRunner().invoke(main, ["gateway", *arguments, "--config", str(self.config), "--json", "-"])
        assert done.exit_code == code, done.output
        return json.loads(done.stdout)

    def kill(self) -> None:
        self.stop(signal.SIGKILL)


def gateway_config(storage: Path, triton: str, destinations: list[dict], **sections) -> dict:
    """A configuration that is quick in a test."""
    config = {
        "storage": str(storage),
        "dicom": {"port": 0},
        "web": {"port": 0, "stow": True},
        "intake": {"min_free_mib": 16},
        "group": {"quiet_s": 0.2, "max_wait_s": 2},
        "read": {"url": triton, "retry_s": [0.2, 0.5, 1.0], "lease_s": 15},
        "destinations": [{"retry_s": [0.2, 0.5, 1.0], "timeout_s": 10, **to} for to in destinations],
    }
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **section} if both else section
    return config


def orthanc_dicom(orthanc: Orthanc, **more) -> dict:
    return {"name": "pacs", "kind": "dicom", "aet": "ORTHANC", "host": "127.0.0.1", "port": orthanc.port, **more}


class Postgres(Process):
    """A PostgreSQL server of an unprivileged user in a folder of its own; `url` is SQLAlchemy's."""

    def __init__(self, folder: Path):
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) if Path("/usr/lib/postgresql").is_dir() else []
        if not programs:
            pytest.skip("no PostgreSQL here; install it with `make debian`")
        folder.mkdir(parents=True, exist_ok=True)
        port, as_user = free_port(), {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            import pwd

            try:
                user = pwd.getpwnam("postgres")
            except KeyError:
                pytest.skip("no user postgres here; install PostgreSQL with `make debian`")
            folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/cxr-pg-XXXXXX"], text=True).strip())
            os.chown(folder, user.pw_uid, user.pw_gid)
            as_user = {"user": user.pw_uid, "group": user.pw_gid, "cwd": str(folder), "extra_groups": []}
        self.folder = folder
        init = [str(programs[-1] / "initdb"), "-D", str(folder / "data"), "-U", "gateway", "-A", "trust", "-E", "UTF8"]
        subprocess.run(init, check=True, capture_output=True, **as_user)
        settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}"]
        command = [str(programs[-1] / "postgres"), "-D", str(folder / "data")]
        self._command, self._as_user = command + [x for s in settings for x in ("-c", s)], as_user
        self.url = f"postgresql+psycopg://gateway@127.0.0.1:{port}/postgres"
        self.start()

    def start(self) -> None:
        super().__init__(self._command, self.folder / "postgres.log", **self._as_user)
        wait_for(self._is_up, "PostgreSQL's start")

    def crash(self) -> None:
        """End at once, as from a loss of power: the next start recovers from the log."""
        for pid in (self.process.pid, *self._children()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        super().stop(signal.SIGKILL)

    def kill_backend(self, rng: random.Random) -> None:
        """Kill one process that serves a client: the server ends all the others, and recovers by itself."""
        serving = [pid for pid in self._children() if b"127.0.0.1" in _command_line(pid)]
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(serving or [self.process.pid]), signal.SIGKILL)

    def _children(self) -> list[int]:
        pid = self.process.pid
        try:
            return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except OSError:
            return []

    def _is_up(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=5).close()
            return True
        except psycopg.OperationalError:
            return False

    def stop(self, number: int = signal.SIGINT, timeout_s: float = 60) -> int:  # fast shutdown
        try:
            return super().stop(number, timeout_s)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def phantom_repository(folder: Path) -> Path:
    """The demonstration model as a Triton model repository."""
    from cxr_triton.engines.build import build_bundle
    from cxr_triton.export.export import export_checkpoint
    from cxr_triton.profile import load_profile
    from cxr_triton.triton_repo.package import Settings, write_repository

    profile = load_profile(PHANTOM / "profile.yaml")
    export_checkpoint(str(PHANTOM / "checkpoint"), folder / "export", profile, precision="fp32", progress=False)
    build_bundle(folder / "export", folder / "bundle")
    settings = Settings(preprocess_instances=1, threads=1)
    write_repository(folder / "bundle", folder / "repository", settings, unverified=True)
    return folder / "repository"


def renamed(file: bytes | Path, study: str | None = None, number: int = 0, patient: str | None = None) -> bytes:
    """A DICOM file under UIDs of its own, otherwise byte for byte as it was read."""
    import io

    import pydicom
    from pydicom.uid import generate_uid

    dataset = pydicom.dcmread(io.BytesIO(file) if isinstance(file, bytes) else file)
    dataset.StudyInstanceUID = study or generate_uid()
    dataset.SeriesInstanceUID, dataset.SOPInstanceUID = generate_uid(), generate_uid()
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    if number:
        dataset.InstanceNumber = number
    if patient is not None:
        dataset.PatientID = patient
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def phantom_dicom(seed: int, **kwargs) -> bytes:
    """A phantom radiograph as a DICOM file under UIDs of its own."""
    import numpy as np

    from cxr_triton import phantom, phantom_file

    return renamed(phantom_file.write_dicom(phantom.draw(np.random.default_rng(seed))), **kwargs)


def send(
    port: int, files: list[bytes], aet: str = "MODALITY", called: str = "CXR_GATEWAY", timeout_s: float = 60
) -> list[int]:
    """C-STORE files over one association; the status of each, -1 for none."""
    import io

    import pydicom
    from pynetdicom import AE

    datasets = [pydicom.dcmread(io.BytesIO(file)) for file in files]
    ae = AE(aet)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = timeout_s
    for sop_class, syntax in {(d.SOPClassUID, d.file_meta.TransferSyntaxUID) for d in datasets}:
        ae.add_requested_context(sop_class, syntax)
    association = ae.associate("127.0.0.1", port, ae_title=called)
    if not association.is_established:
        return [-1] * len(files)
    statuses = []
    for dataset in datasets:
        try:
            statuses.append(association.send_c_store(dataset).get("Status", -1))
        except (RuntimeError, ValueError):
            statuses.append(-1)
    if association.is_established:
        association.release()
    return statuses
