"""`doctor`: each planted fault is found, by its own check and with a remedy; of a healthy machine none is."""

import contextlib
import email.utils
import http.server
import io
import json
import os
import platform
import re
import resource
import shutil
import socket
import ssl
import subprocess
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

pytest.importorskip("grpc")
pytest.importorskip("sqlalchemy")
pytest.importorskip("pynetdicom")

import grpc
from bundles import passing
from fake_server import FakeServer
from front import EC
from openai_server import OpenAIServer
from ports import free_port
from served import write_paper_bundle
from tritonclient.grpc import service_pb2 as pb

from cxr_triton import cli
from cxr_triton.client.gateway.database import look
from cxr_triton.client.gateway.store import Store
from cxr_triton.client.limits import Access, Timeouts, Tls
from cxr_triton.client.openai.settings import Settings as OpenAISettings
from cxr_triton.doctor import certificates, gateway, machine, openai, packages, peers, run, server
from cxr_triton.doctor.check import Case, Check, ok
from cxr_triton.doctor.listening import ServerProcess, beyond_loopback
from cxr_triton.doctor.report import to_json
from cxr_triton.doctor.run import CHECKS, GROUPS, examine
from cxr_triton.engines import engine
from cxr_triton.engines.bundle import Bundle
from cxr_triton.engines.cpu import Cpu
from cxr_triton.engines.secret import SECRET
from cxr_triton.engines.verify.record import write_record
from cxr_triton.pixels.sandbox import OWN_INTERPRETER
from cxr_triton.triton_repo.guard import SHM_PREFIX, trace_flags
from cxr_triton.triton_repo.package import BUNDLE, Settings, write_repository
from cxr_triton.triton_repo.tuned import write_settings

ROOT = Path(__file__).resolve().parents[2]
REPORT = jsonschema.Draft202012Validator(json.loads((ROOT / "docs" / "doctor.schema.json").read_text()))
GIB = 1 << 30


def wrong(case: Case, group: str) -> dict[str, str]:
    """Remedies of what is wrong, by the check's id."""
    findings = examine(case, [check for check in CHECKS if check.id.startswith(f"{group}.")])
    REPORT.validate(to_json(findings))
    bad = [finding for finding in findings if finding.status in ("warn", "fail")]
    for finding in bad:
        assert re.match(r"[A-Z].+[.?]$", finding.remedy, re.DOTALL) and finding.wanted, finding
    return {finding.id: finding.remedy for finding in bad}


def finds(case: Case, *ids: str) -> None:
    assert set(wrong(case, ids[0].partition(".")[0])) == set(ids)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ----------------------------------------------------------------------------------------------------------- machine


@pytest.fixture
def system(tmp_path, monkeypatch) -> Path:
    """What a healthy machine tells of itself, as files to change; and a user that is not root."""
    root = tmp_path / "root"
    write(root / "proc/cpuinfo", "processor\t: 0\nflags\t\t: sse4_2 avx2 amx_bf16\n")
    write(root / "proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {32 << 20} kB\n")
    write(root / "proc/self/cgroup", "0::/unit\n")
    write(root / "proc/self/status", "Name:\tpython\nUmask:\t0022\n")
    write(root / "proc/mounts", "proc /proc proc rw,nosuid 0 0\n")
    write(root / "proc/sys/fs/protected_hardlinks", "1\n")
    write(root / "etc/passwd", "root:x:0:0::/root:/bin/sh\none:x:1000:1000::/home/one:/bin/sh\n")
    write(root / "sys/fs/cgroup/unit/memory.max", "max\n")
    write(root / "sys/fs/cgroup/unit/cpu.max", "max 100000\n")
    (root / "dev/shm").mkdir(parents=True)
    (root / "proc/net").symlink_to("/proc/net")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "isolation", lambda: {"landlock": "on", "seccomp": "on"})
    monkeypatch.delenv(SECRET, raising=False)
    return root


def on_disk(monkeypatch, free: dict[str, int]) -> None:
    """Free bytes of folders by what their path holds; 100 GiB elsewhere."""
    usage = lambda path: next((size for part, size in free.items() if str(path).endswith(part)), 100 * GIB)  # noqa: E731
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(total=GIB, used=0, free=usage(path)))


def nvidia_smi(folder: Path, monkeypatch, line: str) -> None:
    program = write(folder / "bin/nvidia-smi", f"#!/bin/sh\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


MACHINE = {
    "another system": (lambda s, m: m.setattr(platform, "system", lambda: "Darwin"), "machine.system"),
    "no AVX2": (lambda s, m: write(s / "proc/cpuinfo", "flags : sse4_2"), "machine.cpu"),
    "fewer cores by cgroup v2": (
        lambda s, m: write(s / "sys/fs/cgroup/unit/cpu.max", "150000 100000"), "machine.cores"
    ),
    "little memory left": (
        lambda s, m: write(s / "proc/meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: 1000 kB\n"), "machine.memory"
    ),
    "a full disk": (lambda s, m: on_disk(m, {"/tmp": 1 << 20}), "machine.disk"),
    "no /dev/shm": (lambda s, m: (s / "dev/shm").rmdir(), "machine.shm"),
    "a small /dev/shm": (lambda s, m: on_disk(m, {"dev/shm": 64 << 20}), "machine.shm"),
    "memory that others may read": (
        lambda s, m: write(s / f"dev/shm/{SHM_PREFIX}1", "").chmod(0o644), "machine.shm_modes"
    ),
    "no Landlock": (
        lambda s, m: m.setattr(machine, "isolation", lambda: {"landlock": "off: Function not implemented"}),
        "machine.sandbox",
    ),
    "a clock of 1970": (lambda s, m: m.setattr(machine.time, "time", lambda: 86400.0), "machine.clock"),
    "root": (lambda s, m: m.setattr(os, "geteuid", lambda: 0), "machine.user"),
    "an open umask": (lambda s, m: write(s / "proc/self/status", "Umask:\t0002\n"), "machine.umask"),
    "other people's accounts": (
        lambda s, m: (s / "etc/passwd").open("a").write("two:x:1001:1001::/home/two:/bin/bash\n"), "machine.proc"
    ),
    "hard links to anything": (lambda s, m: write(s / "proc/sys/fs/protected_hardlinks", "0\n"), "machine.hardlinks"),
    "a short secret": (lambda s, m: m.setenv(SECRET, "hunter2"), "machine.secret"),
    "a driver without a GPU": (lambda s, m: write(s / "proc/driver/nvidia/version", "NVRM version"), "machine.gpu"),
}  # fmt: skip


def test_nothing_is_wrong_with_a_healthy_machine(system):
    assert wrong(Case(root=system), "machine") == {}


@pytest.mark.parametrize("fault", MACHINE)
def test_a_fault_of_the_machine_is_found(system, monkeypatch, fault):
    plant, found = MACHINE[fault]
    plant(system, monkeypatch)
    finds(Case(root=system), found)


def test_limits_of_cgroup_v1_count_too(system):
    write(system / "proc/self/cgroup", "4:memory:/box\n3:cpu,cpuacct:/box\n")
    write(system / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")
    write(system / "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    finds(Case(root=system), "machine.cores")


def test_few_open_files_are_found(system):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        finds(Case(root=system), "machine.open_files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_interpreter_that_decodes_nothing_is_found(system, monkeypatch):
    from cxr_triton.pixels.sandbox import isolation

    monkeypatch.setattr(machine, "isolation", isolation)
    assert wrong(Case(root=system), "machine") == {}
    monkeypatch.setenv(OWN_INTERPRETER, "/bin/false")
    finds(Case(root=system), "machine.sandbox")


def test_a_clear_hidepid_is_enough_among_others(system):
    (system / "etc/passwd").open("a").write("two:x:1001:1001::/home/two:/bin/bash\n")
    write(system / "proc/mounts", "proc /proc proc rw,hidepid=invisible 0 0\n")
    assert wrong(Case(root=system), "machine") == {}


# ---------------------------------------------------------------------------------------------------------- packages


def other_version(monkeypatch, **versions: str | None) -> None:
    """Of installed distributions; None is not installed."""
    real = metadata.version

    def version(name: str) -> str:
        if (found := versions.get(name.replace("-", "_"), "")) is None:
            raise metadata.PackageNotFoundError(name)
        return found or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_nothing_is_wrong_with_the_packages_of_the_tests():
    assert wrong(Case(), "packages") == {}


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"jinja2": "3.1.5"}, ["packages.required"]),
        ({"tokenizers": None}, ["packages.required"]),
        ({"pydicom": "4.0.0"}, ["packages.tested"]),
        ({"onnx": "1.19.1"}, ["packages.bounds"]),
    ],
)
def test_a_package_of_another_version_is_found(monkeypatch, versions, found):
    other_version(monkeypatch, **versions)
    finds(Case(), *found)


def test_a_numpy_that_the_local_server_misreads_is_found(monkeypatch):
    pytest.importorskip("pytriton")
    other_version(monkeypatch, numpy="2.3.1")
    finds(Case(), "packages.bounds", "packages.tested", "packages.local_server")


@pytest.mark.parametrize(("version", "status"), [((3, 10, 1), "fail"), ((3, 13, 0), "ok"), ((3, 15, 0), "warn")])
def test_an_untested_python_is_found(monkeypatch, version, status):
    monkeypatch.setattr(packages.sys, "version_info", version)
    (finding,) = packages.python(Case())
    assert finding.status == status and bool(finding.remedy) == (status != "ok")


def test_packages_that_others_may_write_are_found(monkeypatch, tmp_path):
    tmp_path.chmod(0o777)
    monkeypatch.setattr(packages.site, "getsitepackages", lambda: [str(tmp_path)])
    finds(Case(), "packages.permissions")


def test_what_was_tested_is_what_these_tests_run_with_and_what_the_documents_say():
    said = dict(re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([\d., ]+) \|$", (ROOT / "docs/supported.md").read_text(), re.M))
    assert packages.TESTED["onnxruntime"] == said["ONNX Runtime"] and packages.TESTED["openvino"] == said["OpenVINO"]
    assert (packages.TESTED["transformers"], packages.TESTED["torch"]) == tuple(said["transformers, torch"].split(", "))
    assert packages.TESTED["nvidia-modelopt"] == said["nvidia-modelopt"]
    assert {each.name for extra, each in packages.requirements() if not extra} <= set(packages.TESTED)


# -------------------------------------------------------------------------------------------------------- repository


@pytest.fixture
def made(tmp_path) -> Path:
    """A folder as `make-engine` leaves it, around a bundle of empty graphs."""
    umask = os.umask(0o022)
    folder = tmp_path / "engine"
    record = passing(Bundle.open(write_paper_bundle(folder / "bundle")))
    write_record(folder / "bundle", record)
    write_repository(folder / "bundle", folder / "repository", Settings())
    write(folder / "verification/record.json", json.dumps({**record, "details": {"images": [{}]}}))
    os.umask(umask)
    return folder


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def chown(path: Path) -> None:
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 12345, -1)


def fails_the_gate(folder: Path) -> None:
    record = {**passing(Bundle.open(folder / "bundle")), "passed": False}
    write_record(folder / "bundle", record)
    shutil.rmtree(folder / "repository")


def without_record(folder: Path) -> None:
    edit(folder / "bundle/manifest.json", lambda manifest: manifest.pop("verification"))
    write_repository(folder / "bundle", folder / "repository", Settings(), force=True, unverified=True)


def tuned_elsewhere(folder: Path, **change) -> None:
    record = {"schema": 1, "date": "2026-11-28T00:00:00+00:00", "cpu": Cpu.here().to_json(), "versions": {}}
    write_settings(folder / "repository", {"threads": 3}, record | change)


REPOSITORY = {
    "settings of another CPU": (
        lambda f: tuned_elsewhere(f, cpu={"model": "Z80", "flags": [], "cores": 1}), ["repository.tuned"]
    ),
    "a record of settings that is none": (
        lambda f: tuned_elsewhere(f, cpu=None), ["repository.tuned"]
    ),
    "settings of another version": (
        lambda f: tuned_elsewhere(f, versions={"onnxruntime": "1.0"}), ["repository.tuned"]
    ),
    "an edited model": (lambda f: (f / "repository/report/1/model.py").open("a").write("#"), ["repository.record"]),
    "a module beside a model": (lambda f: write(f / "repository/report/1/numpy.py", ""), ["repository.record"]),
    "a model that is gone": (lambda f: (f / "repository/report/1/model.py").unlink(), ["repository.record"]),
    "a file of the bundle": (
        lambda f: edit(f / "repository" / BUNDLE / "tokenizer.json", lambda t: t.update(version="9.0")),
        ["repository.files", "repository.needs", "repository.verified", "repository.golden"],
    ),
    "a failed gate": (fails_the_gate, ["repository.verified"]),
    "no gate": (without_record, ["repository.verified", "repository.packaged"]),
    "a model that others may write": (
        lambda f: (f / "repository/report/1/model.py").chmod(0o664), ["repository.permissions"]
    ),
    "another owner": (lambda f: chown(f / "repository/report/1/model.py"), ["repository.ownership"]),
    "an open log": (lambda f: write(f / "repository.log", "I0000 said").chmod(0o644), ["repository.log"]),
    "readings of another bundle": (
        lambda f: edit(f / "verification/record.json", lambda r: r.update(subject="0" * 64)), ["repository.golden"]
    ),
    "no readings": (lambda f: (f / "verification/record.json").unlink(), ["repository.golden"]),
}  # fmt: skip


def test_nothing_is_wrong_with_what_make_engine_wrote(made):
    for path in (made, made / "repository", made / "bundle"):
        assert wrong(Case(path=path), "repository") == {}


@pytest.mark.parametrize("fault", REPOSITORY)
def test_a_fault_of_the_repository_is_found(made, fault):
    plant, found = REPOSITORY[fault]
    plant(made)
    case = Case(path=made)
    missed = {each.id for each in examine(case, run.repository.CHECKS) if each.status == "skipped"}
    assert set(wrong(case, "repository")) == set(found) - missed and set(wrong(case, "repository"))


def test_nothing_is_wrong_with_a_repository_that_was_tuned_here(made):
    tuned_elsewhere(made)
    assert wrong(Case(path=made), "repository") == {}


def test_a_bundle_alone_that_others_may_change_is_found(made):
    (made / "bundle/tokenizer.json").chmod(0o666)
    finds(Case(path=made / "bundle"), "repository.permissions")


def test_a_bundle_alone_of_another_owner_is_found(made):
    chown(made / "bundle/tokenizer.json")
    finds(Case(path=made / "bundle"), "repository.ownership")


def test_a_folder_that_is_neither_is_found(tmp_path):
    finds(Case(path=tmp_path), "repository.files")


def test_a_missing_library_of_the_engine_is_found(made, monkeypatch):
    other_version(monkeypatch, onnxruntime=None)
    finds(Case(path=made), "repository.needs")


def test_a_machine_without_the_memory_or_the_gpu_of_a_bundle_is_found(made, system, monkeypatch):
    case = Case(root=system, path=made / "bundle")
    assert wrong(case, "machine") == {}
    write(system / "sys/fs/cgroup/memory.max", str(GIB // 2))
    finds(case, "machine.memory")
    write(system / "sys/fs/cgroup/memory.max", "max")
    recipe = {"gpu": "L4", "compute_capability": "8.9", "memory_gib": 22}
    edit(made / "bundle/manifest.json", lambda manifest: manifest.update(recipe=recipe))
    for line, found in (
        ("NVIDIA L4, 23034, 590.44, 8.9", []),
        ("NVIDIA A10, 23028, 590.44, 8.6", ["machine.gpu"]),
        ("NVIDIA L4, 11000, 590.44, 8.9", ["machine.gpu"]),
    ):
        nvidia_smi(system, monkeypatch, line)
        assert set(wrong(Case(root=system, path=made / "bundle"), "machine")) == set(found)


def test_a_driver_that_is_too_old_for_the_container_is_found(monkeypatch, tmp_path):
    import cxr_triton.engines.tensorrt_llm as room

    bundle = SimpleNamespace(manifest={"recipe": {"container": "nvcr.io/x:26.07-trtllm-python-py3"}})
    for said, is_met in (("590.44.01", True), ("600.1", True), ("580.95.05", False), ("", False)):
        text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {said}  Thu\n" if said else ""
        monkeypatch.setattr(room, "DRIVER_VERSION", write(tmp_path / "version", text))
        needs = {need.what: need for need in engine("tensorrt-llm").needs(bundle, "decoder")}
        assert needs["NVIDIA driver"].is_met is is_met and needs["NVIDIA driver"].remedy
        assert needs["Triton with this engine's backends"].is_met is None


def test_a_plan_of_another_version_is_found(monkeypatch):
    library = engine("tensorrt").library
    monkeypatch.setattr(type(library), "load", lambda self, graph: SimpleNamespace(__version__="10.16.1"))
    for written, is_met in (("10.16.1", True), ("10.15.0", False)):
        bundle = SimpleNamespace(manifest={"plans": {"decoder": {"version": written}}})
        (need,) = [n for n in engine("tensorrt").needs(bundle, "decoder") if n.what.endswith("of the plan")]
        assert need.is_met is is_met and bool(need.remedy) != is_met


# ------------------------------------------------------------------------------------------------------------ server


class Triton(FakeServer):
    """Of version 2.51, whose closed doors say so; `open` are calls that answer."""

    def __init__(self, version: str = "2.51.0", open_: tuple[str, ...] = (), **options):
        self.version = version
        for call in open_:
            setattr(self, call, self._answers(call))
        super().__init__(lambda request, context: iter(()), **options)

    def ServerMetadata(self, request, context):
        return pb.ServerMetadataResponse(name="triton", version=self.version)

    @staticmethod
    def _answers(call: str):
        kinds = {"TraceSetting": "TraceSettingResponse", "LogSettings": "LogSettingsResponse"}
        kind = getattr(pb, kinds.get(call, f"{call}Response"))
        return lambda request, context: kind()

    def RepositoryIndex(self, request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "This protocol is restricted, expecting header 'x'")


@pytest.fixture
def process(system):
    """Writes what /proc tells of a server's process: its arguments, user and limits."""

    def of(triton: FakeServer, *arguments: str, uid: int = 998, umask: str = "0077", limit: str = str(8 * GIB)) -> Case:
        port = triton.url.rpartition(":")[2]
        given = [f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false", *arguments]
        write(system / "proc/4242/cmdline", "\0".join(["/opt/tritonserver/bin/tritonserver", *given, ""]))
        write(system / "proc/4242/status", f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}\nUmask:\t{umask}\n")
        write(system / "proc/4242/cgroup", "0::/served\n")
        write(system / "sys/fs/cgroup/served/memory.max", limit)
        return Case(root=system, url=f"127.0.0.1:{port}", is_asked=True)

    return of


SPANS = trace_flags("http://127.0.0.1:4318")


def test_nothing_is_wrong_with_a_guarded_server(process):
    with Triton() as triton:
        assert wrong(process(triton), "server") == {}
        assert wrong(process(triton, *SPANS), "server") == {}


SERVER = {
    "an old version": ({"version": "2.40.0"}, {}, [], ["server.version"]),
    "an old version that faces a network": ({"host": "0.0.0.0"}, {}, [], ["server.version", "server.loopback"]),
    "a new version that listens to all": (
        {"host": "0.0.0.0", "version": "2.71.0"}, {}, [], ["server.loopback"]
    ),
    "open shared memory": ({"open_": ("SystemSharedMemoryStatus",)}, {}, [], ["server.shared_memory"]),
    "open CUDA memory": ({"open_": ("CudaSharedMemoryStatus",)}, {}, [], ["server.shared_memory"]),
    "an open model repository": ({"open_": ("RepositoryIndex",)}, {}, [], ["server.repository"]),
    "open trace": ({"open_": ("TraceSetting",)}, {}, [], ["server.trace"]),
    "open logging": ({"open_": ("LogSettings",)}, {}, [], ["server.logging"]),
    "open statistics": ({"open_": ("ModelStatistics",)}, {}, [], ["server.statistics"]),
    "model control": ({}, {}, ["--model-control-mode=explicit"], ["server.flags"]),
    "tensors in a trace": ({}, {}, [*SPANS, "--trace-config=level=TENSORS"], ["server.flags"]),
    "requests in the log": ({}, {}, ["--log-verbose", "1"], ["server.flags"]),
    "a server of root": ({}, {"uid": 0}, [], ["server.user"]),
    "files for all": ({}, {"umask": "0022"}, [], ["server.user"]),
    "memory without limit": ({}, {"limit": "max"}, [], ["server.memory"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", SERVER)
def test_a_fault_of_the_server_is_found(process, fault):
    options, facts, arguments, found = SERVER[fault]
    with Triton(**options) as triton:
        finds(process(triton, *arguments, **facts), *found)


def test_a_server_that_is_not_there_or_none_of_ours_is_found():
    finds(Case(url=f"127.0.0.1:{free_port()}", is_asked=True), "server.ready")
    assert wrong(Case(url=f"127.0.0.1:{free_port()}"), "server").keys() <= {"server.metrics_port"}
    with Triton() as triton:
        triton.outputs = ("SOMETHING",)
        assert "server.ready" in wrong(Case(url=triton.url, is_asked=True), "server")


def test_a_server_elsewhere_has_to_be_encrypted_new_and_behind_a_proxy(process, monkeypatch):
    """As from another host: what is asked is the same, and this machine's name stands for the other's."""
    monkeypatch.setattr(server, "is_loopback", lambda host: False)
    with Triton() as triton:
        finds(process(triton), "server.encryption", "server.version")
    with Triton(version="2.71.0", open_=("ModelMetadata",)) as triton:
        assert {"server.encryption", "server.inner_models"} <= set(wrong(process(triton), "server"))


class Page(http.server.BaseHTTPRequestHandler):
    """Answers everything with the status, date and body of its server."""

    def do_GET(self):
        web = self.server
        self.send_response_only(web.status if web.only in ("", self.path) else 403)
        for name, value in {"Date": web.date or email.utils.formatdate(usegmt=True), "Location": "/elsewhere"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
        web.asked.append((self.command, self.path, self.headers.get("Authorization")))

    do_POST = do_OPTIONS = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def page(status: int = 200, date: str = "", tls: dict | None = None):
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    web.status, web.date, web.asked, web.only = status, date, [], ""
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls["cert"], tls["key"])
        web.socket = context.wrap_socket(web.socket, server_side=True)
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()


def test_an_open_door_of_http_is_found(process):
    with Triton() as triton, page() as web:
        http_port = f"--http-port={web.server_port}"
        finds(process(triton, "--allow-http=true", http_port), "server.http")
        web.only = "/v2"
        assert wrong(process(triton, "--allow-http=true", http_port), "server") == {}


def test_a_taken_port_of_metrics_is_found(tmp_path):
    row = "  0: 0100007F:1F42 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1 1 0 100 0 0 10 0"
    write(tmp_path / "proc/net/tcp", f"  sl local_address\n{row}\n")
    assert [f.id for f in examine(Case(root=tmp_path), server.CHECKS[1:2]) if f.status == "warn"] == [
        "server.metrics_port"
    ]
    assert beyond_loopback(Case(root=tmp_path), 8002) == []


def test_addresses_are_read_as_the_kernel_writes_them():
    for host in ("0.0.0.0", "127.0.0.1", "::1", "::"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listening = socket.create_server((host, 0), family=family)
        except OSError:
            continue  # a machine without IPv6
        with listening:
            outside = beyond_loopback(Case(), listening.getsockname()[1])
            assert outside == ([] if host in ("127.0.0.1", "::1") else [host])


def test_flags_are_read_as_triton_reads_them():
    process = ServerProcess(1, ("--grpc-port", "9001", "--allow-http=false", "--log-verbose=1", "--exit-on-error"))
    assert (process.grpc_port, process.http_port, process.metrics_port) == (9001, None, 8002)
    assert (process.flag("log-verbose"), process.flag("exit-on-error"), process.flag("trace-config")) == (
        "1",
        "true",
        "",
    )


# ------------------------------------------------------------------------------------------------------------ openai


@contextlib.contextmanager
def api(system: Path, *, url: str | None = None, scheme: str = "http", ca: str | None = None, **settings):
    """A running `cxr-triton openai` before a double of Triton, and the case that looks at it."""
    limits = Timeouts(connect_s=0.3 if url else 60.0)
    with Triton() as triton, OpenAIServer(url or triton.url, timeouts=limits, **settings) as running:
        address = f"{scheme}://127.0.0.1:{running.service.port}"
        yield Case(root=system, openai_url=address, access=Access(Tls(ca=ca) if ca else None))


def nowhere(system, folder, monkeypatch):
    return contextlib.nullcontext(Case(root=system, openai_url=f"http://127.0.0.1:{free_port()}"))


@contextlib.contextmanager
def something_else(system, folder, monkeypatch):
    with page() as web:
        yield Case(root=system, openai_url=f"http://127.0.0.1:{web.server_port}")


def another_release(system, folder, monkeypatch):
    monkeypatch.setattr("cxr_triton.client.openai.description.__version__", "0.0.1")
    return api(system)


def any_name(system, folder, monkeypatch):
    monkeypatch.setattr(OpenAISettings, "serves", lambda settings, hosts: True)
    return api(system)


def open_to_pages(system, folder, monkeypatch):
    async def allow(guard, request, response):
        response.headers["Access-Control-Allow-Origin"] = "*"

    monkeypatch.setattr("cxr_triton.client.openai.guard.Guard._harden", allow)
    return api(system)


def encrypted(days: int, *, is_trusted: bool = True):
    def run(system, folder, monkeypatch):
        pair = certificate(folder, days=days)
        return api(system, scheme="https", ca=pair["cert"] if is_trusted else None, **pair)

    return run


OPENAI = {
    "no API at all": (nowhere, ["ready"]),
    "another program at the API's port": (something_else, ["ready", "version", "browsers"]),
    "an API whose server is away": (lambda s, f, m: api(s, url=f"127.0.0.1:{free_port()}"), ["ready"]),
    "an API of another release": (another_release, ["version"]),
    "an API for everybody": (
        lambda s, f, m: api(s, host="0.0.0.0", without_keys=True, clear_text=True), ["keys", "encryption"]
    ),
    "an API with keys in clear text": (
        lambda s, f, m: api(s, host="0.0.0.0", api_keys_file=write(f / "keys", f"{'k' * 16}\n"), clear_text=True),
        ["encryption"],
    ),
    "an API whose certificate ends soon": (encrypted(5), ["encryption"]),
    "an API that nobody vouches for": (encrypted(365, is_trusted=False), ["ready", "version", "encryption"]),
    "an API for any name": (any_name, ["browsers"]),
    "an API behind a proxy with CORS": (open_to_pages, ["browsers"]),
}  # fmt: skip


def test_nothing_is_wrong_with_a_healthy_api(system, tmp_path):
    with api(system) as case:
        assert wrong(case, "openai") == {}
        assert len(examine(case, openai.CHECKS)) == len(openai.CHECKS)
    keys = write(tmp_path / "keys", f"{'k' * 16}\n")
    pair = certificate(tmp_path)
    with api(system, scheme="https", ca=pair["cert"], host="0.0.0.0", api_keys_file=keys, **pair) as case:
        assert wrong(case, "openai") == {}
    assert examine(Case(root=system), openai.CHECKS) == []


@pytest.mark.parametrize("fault", OPENAI)
def test_a_fault_of_the_api_is_found(system, tmp_path, monkeypatch, fault):
    plant, found = OPENAI[fault]
    with plant(system, tmp_path, monkeypatch) as case:
        finds(case, *(f"openai.{name}" for name in found))


def test_the_api_is_named_as_clients_name_it(monkeypatch):
    seen = []
    monkeypatch.setattr(run, "CHECKS", (row("one", lambda case: iter([seen.append(case) or ok("one", "seen")])),))
    for url, address in (
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:8080"),
        ("https://user:pass@cxr.example", "https://cxr.example"),
    ):
        assert CliRunner().invoke(cli.main, ["doctor", "--openai", url]).exit_code == 0
        assert seen.pop().openai_url == address
    for url in ("127.0.0.1:8080", "grpc://127.0.0.1:8080", "http://", "http://x:99999"):
        result = CliRunner().invoke(cli.main, ["doctor", "--openai", url])
        assert result.exit_code == 1 and "http://127.0.0.1:8080" in result.output


# ----------------------------------------------------------------------------------------------------------- gateway


def certificate(folder: Path, name: str = "web", days: int = 365, alternative: str = "IP:127.0.0.1") -> dict:
    """A pair in PEM, made by OpenSSL."""
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    request = ["openssl", "req", *EC, "-keyout", key, "-subj", f"/CN={name}"]
    asked = subprocess.run(request, check=True, capture_output=True).stdout
    extension = write(folder / "extension", f"subjectAltName={alternative}\n")
    sign = ["openssl", "x509", "-req", "-signkey", key, "-days", str(days), "-extfile", extension, "-out", cert]
    subprocess.run(sign, input=asked, check=True, capture_output=True)
    key.chmod(0o600)
    return {"cert": str(cert), "key": str(key)}


@pytest.fixture(scope="module")
def pacs():
    """A PACS that answers C-ECHO to its own AE title."""
    from pynetdicom import AE
    from pynetdicom.sop_class import Verification

    ae = AE("PACS")
    ae.require_called_aet = True
    ae.add_supported_context(Verification)
    started = ae.start_server(("127.0.0.1", 0), block=False)
    yield started.socket.getsockname()[1]
    started.shutdown()


@pytest.fixture
def site(tmp_path, system, pacs):
    """A healthy gateway's configuration; `site.case()` writes it."""
    storage = tmp_path / "storage"
    storage.mkdir(mode=0o700)
    token = write(tmp_path / "token", "s3cret-token\n")
    token.chmod(0o600)
    with Triton() as triton, page() as web:
        config = {
            "storage": str(storage),
            "dicom": {"port": free_port(), "peers": [{"aet": "PACS", "addresses": ["127.0.0.1"]}]},
            "web": {"port": free_port()},
            "intake": {"min_free_mib": 1},
            "read": {"url": triton.url},
            "destinations": [
                {"name": "pacs", "aet": "PACS", "host": "127.0.0.1", "port": pacs, "timeout_s": 5},
                {
                    "name": "archive", "kind": "stow", "url": f"http://127.0.0.1:{web.server_port}/dicom-web",
                    "token_file": str(token), "timeout_s": 5,
                },
            ],
        }  # fmt: skip

        def case() -> Case:
            path = write(tmp_path / "gateway.yaml", yaml.safe_dump(config))
            return Case(root=system, config_path=path)

        yield SimpleNamespace(
            config=config, case=case, storage=storage, token=token, web=web, folder=tmp_path, triton=triton
        )


def test_nothing_is_wrong_with_a_healthy_gateway(site):
    before = sorted((path, path.stat().st_mode) for path in site.storage.rglob("*"))
    assert wrong(site.case(), "gateway") == {}
    assert {(method, path) for method, path, _ in site.web.asked} == {
        ("OPTIONS", "/dicom-web/studies"),
        ("OPTIONS", "/dicom-web"),
    }
    assert sorted((path, path.stat().st_mode) for path in site.storage.rglob("*")) == before, "it changes nothing"


def listens(site) -> None:
    site.listening = socket.create_server(("127.0.0.1", site.config["web"]["port"]))


def tls(site, **options) -> None:
    site.config["web"]["tls"] = certificate(site.folder, **options)


def expired(site) -> None:
    tls(site, days=-1)


def wrong_key(site) -> None:
    pair, other = certificate(site.folder), certificate(site.folder, "other")
    site.config["web"]["tls"] = {"cert": pair["cert"], "key": other["key"]}


def lost_column(site) -> None:
    import sqlite3

    Store(f"sqlite:///{site.storage}/queue.sqlite", "one").close()
    with contextlib.closing(sqlite3.connect(site.storage / "queue.sqlite")) as queue:
        queue.execute("ALTER TABLE jobs DROP COLUMN generation")
        queue.commit()


def dead_letter(site) -> None:
    import sqlite3

    Store(f"sqlite:///{site.storage}/queue.sqlite", "one").close()
    with contextlib.closing(sqlite3.connect(site.storage / "queue.sqlite")) as queue:
        columns = "study, state, first_at, due_at, changed_at, attempts"
        queue.execute(f"INSERT INTO jobs ({columns}) VALUES ('1.2', 'dead', 0, 0, 0, 20)")
        queue.commit()


def watched(site, mode: int | None) -> None:
    path = site.folder / "in"
    if mode is not None:
        path.mkdir()
        path.chmod(mode)
    site.config["folder"] = {"path": str(path)}


def no_server(site) -> None:
    site.config["read"]["url"] = f"127.0.0.1:{free_port()}"


def encrypted_peer(site) -> None:
    """An archive whose certificate nobody signed."""
    pair = certificate(site.folder)
    site.peer = page(tls=pair)
    web = site.peer.__enter__()
    site.config["destinations"][1]["url"] = f"https://127.0.0.1:{web.server_port}/dicom-web"


def in_config(site, **sections) -> None:
    for name, section in sections.items():
        site.config[name] = {**site.config.get(name, {}), **section} if isinstance(section, dict) else section


def destination(site, index: int, **changes) -> None:
    site.config["destinations"][index].update(changes)


GATEWAY = {
    "an unknown key": (lambda s: in_config(s, dicmo={}), ["config"]),
    "a storage folder for all": (lambda s: s.storage.chmod(0o755), ["storage"]),
    "an open file in it": (lambda s: write(s.storage / "queue", "").chmod(0o644), ["storage"]),
    "storage that is a file": (
        lambda s: in_config(s, storage=str(write(s.folder / "file", ""))), ["storage", "log_key"]
    ),
    "less room than has to stay": (lambda s: in_config(s, intake={"min_free_mib": 1 << 24}), ["disk"]),
    "a short key": (lambda s: write(s.storage / "log.key", "123456").chmod(0o600), ["log_key"]),
    "a missing key": (lambda s: in_config(s, log={"key_file": "/nowhere/log.key"}), ["log_key", "secrets"]),
    "a token for all to read": (lambda s: s.token.chmod(0o644), ["secrets"]),
    "an empty token": (lambda s: s.token.write_text("\n"), ["tokens", "endpoints"]),
    "clear text for all": (lambda s: in_config(s, web={"host": "0.0.0.0"}), ["clear_text", "exposed"]),
    "an expired certificate": (expired, ["certificates"]),
    "a certificate that ends soon": (lambda s: tls(s, days=5), ["certificates"]),
    "another host's certificate": (lambda s: tls(s, alternative="DNS:elsewhere.example"), ["certificates"]),
    "another certificate's key": (wrong_key, ["certificates"]),
    "a certificate that is none": (
        lambda s: in_config(s, web={"tls": {"cert": str(s.token), "key": str(s.token)}}), ["certificates"]
    ),
    "a port that another has": (listens, ["ports"]),
    "senders of the whole world": (
        lambda s: in_config(s, dicom={"peers": [{"aet": "ANY", "addresses": ["0.0.0.0/0"]}]}), ["senders"]
    ),
    "no watched folder": (lambda s: watched(s, None), ["folder"]),
    "a watched folder for all": (lambda s: watched(s, 0o777), ["folder"]),
    "a password, and no database": (
        lambda s: in_config(s, queue=f"postgresql+psycopg://u:hunter2@127.0.0.1:{free_port()}/q"),
        ["queue_password", "queue"],
    ),
    "a damaged queue": (lambda s: write(s.storage / "queue.sqlite", "x" * 4096).chmod(0o600), ["queue"]),
    "a queue of another release": (lost_column, ["queue"]),
    "a dead letter": (dead_letter, ["dead_letters"]),
    "a PACS that is away": (lambda s: destination(s, 0, port=free_port()), ["echo"]),
    "a PACS of another AE title": (lambda s: destination(s, 0, aet="OTHER"), ["echo"]),
    "an archive that is away": (
        lambda s: destination(s, 1, url=f"http://127.0.0.1:{free_port()}/dicom-web"), ["endpoints"]
    ),
    "a token that is not taken": (lambda s: setattr(s.web, "status", 401), ["endpoints"]),
    "a redirect": (lambda s: setattr(s.web, "status", 302), ["endpoints"]),
    "an archive in trouble": (lambda s: setattr(s.web, "status", 503), ["endpoints"]),
    "another path": (lambda s: setattr(s.web, "status", 404), ["endpoints"]),
    "a clock that is behind": (
        lambda s: setattr(s.web, "date", email.utils.formatdate(time.time() - 3600, usegmt=True)), ["peer_clocks"]
    ),
    "a peer that nobody vouches for": (encrypted_peer, ["peer_certificates", "endpoints"]),
    "no server to read": (no_server, ["reader"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", GATEWAY)
def test_a_fault_of_the_gateway_is_found(site, fault):
    plant, found = GATEWAY[fault]
    plant(site)
    try:
        finds(site.case(), *(f"gateway.{name}" for name in found))
    finally:
        for opened in ("listening", "peer"):
            if one := getattr(site, opened, None):
                one.__exit__(None, None, None)


def test_the_gateway_itself_may_have_its_ports(site):
    from cxr_triton.client.gateway.config import load_config
    from cxr_triton.client.gateway.service import Gateway

    running = Gateway(load_config(site.case().config_path), io.StringIO())
    listens(site)
    try:
        assert wrong(site.case(), "gateway") == {}
    finally:
        site.listening.close()
        running.store.close()
        running._lock.close()


def test_a_trusted_peer_is_taken_and_one_that_ends_soon_is_named(site):
    for days, found in ((365, []), (5, ["gateway.peer_certificates"])):
        pair = certificate(site.folder, days=days)
        with page(tls=pair) as web:
            url = f"https://127.0.0.1:{web.server_port}/dicom-web"
            destination(site, 1, url=url, tls={"ca": pair["cert"]})
            assert set(wrong(site.case(), "gateway")) == set(found)


def test_a_look_at_the_queue_makes_no_file(site):
    url = f"sqlite:///{site.storage}/queue.sqlite"
    assert look(url) is None and list(site.storage.iterdir()) == []
    Store(url, "one").close()
    before = sorted(site.storage.iterdir())
    seen = look(url)
    assert sorted(site.storage.iterdir()) == before and not seen.missing and not seen.is_new
    store = Store(url, "one")  # its log lies beside it now
    assert look(url).dead == 0
    store.close()


def test_a_disk_below_dm_crypt_is_encrypted(tmp_path):
    plain, crypt = tmp_path / "vda", tmp_path / "dm-0"
    write(crypt / "dm/uuid", "CRYPT-LUKS2-0123")
    lvm = tmp_path / "dm-1"
    write(lvm / "dm/uuid", "LVM-0123")
    (lvm / "slaves").mkdir()
    (lvm / "slaves" / "dm-0").symlink_to(crypt)
    plain.mkdir()
    assert [gateway._is_encrypted(each) for each in (plain, crypt, lvm)] == [False, True, True]


def test_names_of_certificates_are_matched_as_tls_does():
    for name, pattern, expected in (
        ("pacs.example", "*.example", True), ("a.b.example", "*.example", False), ("PACS", "pacs", True),
        ("10.0.0.1", "10.0.0.1", True), ("10.0.0.1", "*.0.0.1", False), ("example", "*.example", False),
    ):  # fmt: skip
        assert certificates._matches(name, pattern) == expected, (name, pattern)


# --------------------------------------------------------------------------------------------------- the examination


def row(name: str, look) -> Check:
    return Check(id=f"machine.{name}", run=look, limit_s=0.3)


def test_a_check_that_hangs_or_breaks_is_a_finding_and_the_others_go_on():
    hangs, release = threading.Event(), threading.Event()

    def hanging(case):
        """A peer that never answers."""
        hangs.set()
        release.wait(60)
        yield ok("late", "late")

    def breaking(case):
        """A check with a bug."""
        raise ValueError("password=hunter2")

    def good(case):
        """A good one."""
        yield ok("good", "good")

    rows = [row("hanging", hanging), row("breaking", breaking), *(row(f"good{i}", good) for i in range(20))]
    began = time.monotonic()
    found = {finding.id: finding for finding in examine(Case(), rows)}
    assert hangs.is_set() and time.monotonic() - began < 30
    release.set()
    assert list(found) == [each.id for each in rows]
    assert found["machine.hanging"].status == "fail" and "0.3 s" in found["machine.hanging"].found
    assert found["machine.breaking"].status == "fail" and "hunter2" not in str(found["machine.breaking"])
    assert "ValueError at test_doctor.py:" in found["machine.breaking"].found
    assert all(finding.status == "ok" for name, finding in found.items() if "good" in name)


def test_a_peer_that_accepts_and_says_nothing_is_given_up(site, monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        destination(site, 0, port=port)
        destination(site, 1, url=f"http://127.0.0.1:{port}/dicom-web")
        finds(site.case(), "gateway.echo", "gateway.endpoints")


def test_nothing_is_connected_to_where_that_is_asked(site, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("it connects"))
    case = site.case()
    api = f"http://127.0.0.1:{free_port()}"
    case = Case(root=case.root, config_path=case.config_path, is_asked=True, openai_url=api, offline=True)
    findings = examine(case, [c for c in CHECKS if c.id.startswith(("gateway.", "server.", "openai."))])
    asking = {check.id for check in CHECKS if check.is_connecting}
    assert {f.id for f in findings if f.status == "skipped" and "offline" in f.found} == asking
    assert not any(f.status == "fail" for f in findings)


def test_no_secret_is_printed(site, monkeypatch):
    monkeypatch.setenv(SECRET, "hunter2-secret")
    in_config(site, queue=f"postgresql+psycopg://someone:hunter2-queue@127.0.0.1:{free_port()}/q")
    destination(site, 1, url=f"http://someone:hunter2-url@127.0.0.1:{free_port()}/dicom-web")
    write(site.storage / "log.key", "hunter2-key")
    site.token.write_text("hunter2 token\n")
    done = CliRunner().invoke(cli.main, ["doctor", "--gateway", str(site.case().config_path), "--json", "-"])
    assert done.exit_code == 3, done.output
    result = json.loads(done.stdout)
    failed = {finding["id"] for finding in result["findings"] if finding["status"] == "fail"}
    assert {"machine.secret", "gateway.queue_password", "gateway.tokens", "gateway.log_key"} <= failed
    assert "hunter2" not in done.stdout + done.stderr and "someone" not in done.stdout + done.stderr


@pytest.fixture
def only(monkeypatch):
    """Has the command run one check, with this outcome."""

    def check(finding):
        monkeypatch.setattr(run, "CHECKS", (row("one", lambda case: iter([finding])),))

    return check


def test_the_exit_status_says_how_it_went(only, tmp_path):
    from cxr_triton.doctor.check import fail, skipped, warn

    healthy, ill = [ok("a", "b", "c"), skipped("a", "b", "Do.")], fail("a", "found", "wanted", "Do this.")
    for finding, options, status in (
        (healthy[0], [], 0), (healthy[1], ["--strict"], 0), (ill, [], 3),
        (warn("a", "b", "c", "Do."), [], 0), (warn("a", "b", "c", "Do."), ["--strict"], 3),
    ):  # fmt: skip
        only(finding)
        done = CliRunner().invoke(cli.main, ["doctor", *options])
        assert done.exit_code == status, done.output
    only(ill)
    done = CliRunner().invoke(cli.main, ["doctor", "--json", str(tmp_path / "out.json")])
    assert done.stdout.splitlines() == [
        "Machine", "  ✗ machine.one  a: found (wanted: wanted)", "      Do this.", "0 ok, 0 warn, 1 fail, 0 skipped",
    ]  # fmt: skip
    REPORT.check_schema(REPORT.schema)
    REPORT.validate(json.loads((tmp_path / "out.json").read_text()))
    for wrong_usage in (["--url", "http://x"], ["--url", "dns:x:1"], ["nowhere"]):
        assert CliRunner().invoke(cli.main, ["doctor", *wrong_usage]).exit_code in (1, 2)


# --------------------------------------------------------------------------------------------------------- documents


def test_the_table_of_checks_is_that_of_the_code():
    text = (ROOT / "docs" / "doctor.md").read_text("utf-8")
    told = re.findall(
        r"^\| `((?:machine|packages|repository|server|openai|gateway)\.\w+)` \| (.+?) \|$", text, re.MULTILINE
    )
    assert told == [(check.id, check.text) for check in CHECKS]
    assert len({check.id for check in CHECKS}) == len(CHECKS) and {c.id.split(".")[0] for c in CHECKS} == set(GROUPS)


def test_every_duty_of_an_installation_names_its_check_or_says_why_there_is_none():
    text = (ROOT / "docs" / "security.md").read_text("utf-8").partition("## What you have to do yourself")[2]
    items = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
    known = {check.id for check in CHECKS}
    assert len(items) > 20
    for item in items:
        told = re.search(r"\*Doctor(?: cannot see (?:it|this)|:).*\*$", item, re.DOTALL | re.MULTILINE)
        assert told, item
        named = set(re.findall(r"`((?:machine|packages|repository|server|openai|gateway)\.[a-z_]+)`", told[0]))
        assert named <= known and (named or "cannot see" in told[0]), item


def test_at_least_twenty_five_faults_are_planted():
    planted = [f"machine {name}" for name in MACHINE] + [*REPOSITORY, *SERVER, *OPENAI, *GATEWAY]
    assert len(planted) == len(set(planted)) >= 60
