"""The machine: processor, memory, disk, shared memory, kernel, clock, GPU, users."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cxr_triton.doctor.check import Absent, Case, Check, Finding, fail, ok, refused, skipped, warn
from cxr_triton.engines import ROOMS, engine
from cxr_triton.engines.secret import SECRET, secret_of
from cxr_triton.engines.serving import Settings
from cxr_triton.errors import CxrError
from cxr_triton.perf.environment import nvidia_smi
from cxr_triton.pixels import isolation as rights
from cxr_triton.pixels.sandbox import OWN_INTERPRETER, isolation
from cxr_triton.triton_repo.guard import SHM_PREFIX
from cxr_triton.triton_repo.serve import SHM, SHM_MIB, model_processes

GIB = 1 << 30
OTHER_PROCESSES = 3
"""Vision encoder, decoder and report, one each."""
LEAST_FREE_GIB = 1
LEAST_FILES = 1024
RELEASED_S = 1_795_000_000  # November 2026
"""No clock is right that says less."""
_LOGIN_UID = 1000


def system(case: Case) -> Iterator[Finding]:
    """Operating system and processor family are those that the sandbox and the wheels are for."""
    found, wanted = f"{platform.system()} {platform.machine()}", "Linux x86_64"
    if found == wanted:
        yield ok("operating system", found, wanted)
    elif found == "Linux aarch64":
        yield warn("operating system", found, wanted, "Expect gaps: nothing was tested on it; use an x86-64 host.")
    else:
        yield fail("operating system", found, wanted, "Use a Linux x86-64 host, or a container on one.")


def cpu(case: Case) -> Iterator[Finding]:
    """The processor has AVX2, and which engine gains by what it has besides."""
    flags = case.cpu.flags
    if not flags:
        yield skipped("processor", "/proc/cpuinfo lists no features")
        return
    gains = {each.name: [f for f in each.cpu_features if f in flags] for each in map(engine, ROOMS)}
    said = "; ".join(f"{name} gains by {', '.join(features)}" for name, features in gains.items() if features)
    if "avx2" not in flags:
        yield warn("processor", "no AVX2", "AVX2", "Use a processor of 2013 or later: readings here take minutes.")
    else:
        yield ok("processor", f"AVX2; {said}" if said else "AVX2", "AVX2")


def cores(case: Case) -> Iterator[Finding]:
    """No limit of a control group is below the cores that an engine's threads would take."""
    here = len(os.sched_getaffinity(0))
    quota = _cpu_quota(case)
    if quota is not None and quota < here:
        threads = max(1, int(quota))
        yield warn(
            "cores",
            f"{here} cores, of which a control group gives {quota:g}",
            "threads for as many as are given",
            f"Package with `--threads {threads}`, or raise the limit: more threads than cores wait for each other.",
        )
    else:
        yield ok("cores", f"{here} cores, no limit below them")


def memory(case: Case) -> Iterator[Finding]:
    """Memory of the machine, or of its control group, holds the bundle and what its recipe says."""
    total = _meminfo(case, "MemTotal")
    limit = control_group_limit(case, "self", "memory", "memory.max", "memory.limit_in_bytes")
    has = min(total, limit) if limit else total
    subject = "memory" if not limit or limit >= total else "memory of the control group"
    if has < (wanted := _bundle_bytes(case)):
        yield fail(
            subject,
            f"{has / GIB:.1f} GiB",
            f"{wanted / GIB:.1f} GiB for this bundle",
            "Use a larger machine, raise the limit, or build for less: int4, fewer slots, a shorter context.",
        )
        return
    available = _meminfo(case, "MemAvailable")
    if available < GIB:
        yield warn(
            "memory available",
            f"{available / GIB:.1f} GiB",
            "1 GiB",
            "End what else runs here: a process that is out of memory is killed by the kernel.",
        )
    else:
        yield ok(subject, f"{has / GIB:.1f} GiB, {available / GIB:.1f} GiB available")


def disk(case: Case) -> Iterator[Finding]:
    """There is room for temporary files, and where the repository lies for the server's log."""
    folders = {"temporary files": Path(tempfile.gettempdir())}
    if case.path:
        folders["the repository's disk"] = case.path.resolve().parent
    for what, folder in folders.items():
        free = shutil.disk_usage(folder).free / GIB
        if free < LEAST_FREE_GIB:
            yield fail(
                f"{what}, {folder}", f"{free:.2f} GiB free", f"{LEAST_FREE_GIB} GiB", "Free some space on that disk."
            )
        else:
            yield ok(f"{what}, {folder}", f"{free:.1f} GiB free", f"{LEAST_FREE_GIB} GiB")


def shared_memory(case: Case) -> Iterator[Finding]:
    """Shared memory (/dev/shm) holds the tensors of all model processes."""
    folder = case.root / "dev" / "shm"
    if not folder.is_dir():
        yield fail(SHM, "not there", "a tmpfs", "Mount a tmpfs there: Triton's Python backend works in it.")
        return
    processes = _processes(case)
    wanted, usage = processes * SHM_MIB, shutil.disk_usage(folder)
    if usage.free >> 20 < wanted:
        yield fail(
            SHM,
            f"{usage.free >> 20} MiB free of {usage.total >> 20}",
            f"{wanted} MiB for {processes} processes",
            "Make it larger (`docker run --shm-size=1g`), or serve with a smaller `--shm-mib`.",
        )
    else:
        yield ok(SHM, f"{usage.free >> 20} MiB free", f"{wanted} MiB for {processes} processes")


def shared_memory_modes(case: Case) -> Iterator[Finding]:
    """Nobody but a server's user may open the memory in which its models exchange pictures."""
    folder = case.root / "dev" / "shm"
    segments = sorted(folder.glob(f"{SHM_PREFIX}*")) if folder.is_dir() else []
    open_ = [path for path in segments if _mode(path) & 0o077]
    if open_:
        yield fail(
            SHM / open_[0].name,
            f"{len(open_)} of {len(segments)} segments readable by other users",
            "mode 0600",
            "Serve with `cxr-triton serve`, or in a container with a /dev/shm of its own; remove a dead server's.",
        )
    else:
        yield ok("shared memory of servers", f"{len(segments)} segments, none readable by other users", "mode 0600")


def open_files(case: Case) -> Iterator[Finding]:
    """A process may have enough files and connections open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        yield warn(
            "open files a process", soft, f"{LEAST_FILES}", f"Raise it: `ulimit -n {LEAST_FILES}`, or LimitNOFILE=."
        )
    else:
        yield ok("open files a process", soft if soft != resource.RLIM_INFINITY else "no limit", f"{LEAST_FILES}")


def sandbox(case: Case) -> Iterator[Finding]:
    """The kernel gives the decoding process what takes its rights away: no new privileges, Landlock, seccomp."""
    own = os.environ.get(OWN_INTERPRETER)
    where = f"decoding process of {own}" if own else "decoding process"
    try:
        held = isolation()
    except CxrError as error:
        yield refused(where, error.message, "a process that starts")
        return
    remedies = {
        "landlock": "Run a kernel of 5.13 or later with Landlock among its `lsm=`.",
        "seccomp": "Run a kernel with seccomp, and do not take seccomp away from the container.",
        "no_new_privileges": "Run a Linux kernel that has it, 3.5 or later.",
    }
    for name, state in held.items():
        if state == rights.ON:
            yield ok(f"{name} of the {where}", state, rights.ON)
        else:
            remedy = remedies.get(name, "See docs/security.md.")
            yield warn(f"{name} of the {where}", state, rights.ON, remedy)


def clock(case: Case) -> Iterator[Finding]:
    """The clock is not before this release, nor before the installed files."""
    now, newest = time.time(), Path(__file__).stat().st_mtime
    said = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    if now < RELEASED_S or now < newest - 86400:
        yield fail(
            "clock",
            said,
            f"after {time.strftime('%Y-%m-%d', time.gmtime(max(RELEASED_S, newest)))}",
            "Set it, and keep it right by NTP: certificates, due times and the dates of results go by it.",
        )
    else:
        yield ok("clock", said)


def user(case: Case) -> Iterator[Finding]:
    """It is not root that runs server and gateway."""
    if os.geteuid() == 0:
        yield warn("user", "root", "a user of its own", "Run server and gateway as a user that owns nothing else.")
    else:
        yield ok("user", f"user {os.geteuid()}", "not root")


def umask(case: Case) -> Iterator[Finding]:
    """What is made here is not others' to write."""
    said = _status(case, "self").get("Umask", "")
    if not said:
        yield skipped("umask", "/proc/self/status does not tell it")
    elif not int(said, 8) & 0o020 or not int(said, 8) & 0o002:
        yield warn("umask", said, "0022 or stricter", "Set `umask 022`, or 077: a repository's model.py is code.")
    else:
        yield ok("umask", said, "0022 or stricter")


def hidden_processes(case: Case) -> Iterator[Finding]:
    """Where other people have accounts, /proc hides processes from them."""
    people = [
        row.split(":")[0]
        for row in case.read("etc/passwd").splitlines()
        if len(row.split(":")) > 6
        and row.split(":")[2].isdigit()
        and _LOGIN_UID <= int(row.split(":")[2]) < 65534
        and not row.split(":")[6].endswith(("nologin", "false"))
    ]
    mounts = [row.split() for row in case.read("proc/mounts").splitlines()]
    options = next((row[3] for row in mounts if len(row) > 3 and row[1] == "/proc"), "")
    is_hidden = any(f"hidepid={value}" in options.split(",") for value in ("2", "invisible", "4", "ptraceable"))
    if len(people) > 1 and not is_hidden:
        yield warn(
            "/proc",
            f"{len(people)} accounts, processes shown to all",
            "hidepid=2",
            "Mount /proc with `hidepid=2`: a server's arguments open its statistics.",
        )
    else:
        yield ok(
            "/proc", f"{len(people)} accounts{', hidden' if is_hidden else ''}", "hidepid=2 where there are several"
        )


def hard_links(case: Case) -> Iterator[Finding]:
    """Nobody may make a hard link to a file that is not theirs."""
    found = case.read("proc/sys/fs/protected_hardlinks").strip()
    if found == "0":
        yield fail(
            "fs.protected_hardlinks",
            "0",
            "1",
            "Set `sysctl fs.protected_hardlinks=1`: a link in a watched folder would have any file read.",
        )
    elif found:
        yield ok("fs.protected_hardlinks", found, "1")
    else:
        yield skipped("fs.protected_hardlinks", "the kernel does not tell it")


def secret(case: Case) -> Iterator[Finding]:
    """The server's secret in this environment, where there is one, is long enough."""
    if SECRET not in os.environ:
        yield ok(SECRET, "not set: a server makes one at each start")
        return
    try:
        secret_of(os.environ)
    except CxrError as error:
        yield refused(SECRET, error.message, "32 characters and more")
    else:
        yield ok(SECRET, "set, long enough", "32 characters and more")


def gpu(case: Case) -> Iterator[Finding]:
    """NVIDIA's driver and GPUs, and that each is of the kind and size that the bundle's recipe is for."""
    driver = case.read("proc/driver/nvidia/version").splitlines()
    gpus = nvidia_smi("name", "memory.total", "driver_version", "compute_cap")
    if driver and not gpus:
        yield fail(
            "GPU",
            "a driver is loaded, `nvidia-smi` names no GPU",
            "a GPU that answers",
            "Install `nvidia-smi` of the loaded driver, or start the container with `--gpus all`.",
        )
        return
    recipe = case.recipe
    wanted = recipe.get("compute_capability")
    if not gpus:
        if wanted:
            yield fail(
                "GPU", "none", f"{recipe.get('gpu')} ({wanted})", "Serve on a host with that GPU and its driver."
            )
        else:
            yield ok("GPU", "none, and none is needed")
    for found in gpus:
        said = f"{found['name']}, {found['compute_cap']}, {found['memory.total']} MiB, driver {found['driver_version']}"
        room_mib = float(found["memory.total"]) if found["memory.total"].replace(".", "").isdigit() else None
        if wanted and found["compute_cap"] != wanted:
            yield fail(
                "GPU", said, f"compute capability {wanted}", f"Build the bundle for this GPU, or use {recipe['gpu']}."
            )
        elif wanted and room_mib and room_mib < 0.98 * 1024 * recipe["memory_gib"]:
            wants = f"{recipe['memory_gib']:g} GiB"
            yield fail("GPU", said, wants, "Take a recipe of a smaller card, or one with fewer slots.")
        else:
            yield ok("GPU", said, f"compute capability {wanted}" if wanted else "")


def _bundle_bytes(case: Case) -> int:
    """Memory of the host that a bundle takes: its recipe's, or its files and as much as the server itself."""
    try:
        bundle = case.bundle
    except (Absent, CxrError):  # said by repository.files
        return 0
    weights = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    return max(int(case.recipe.get("memory_gib") or 0) * GIB, weights + GIB) if bundle.is_on_cpu else GIB


def _mode(path: Path) -> int:
    """Permissions of a file; none of one that is gone."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return 0


def _processes(case: Case) -> int:
    """Model processes of the repository; of one with the usual settings where none can be read."""
    usual = Settings().preprocess_instances + OTHER_PROCESSES
    if case.has_repository:
        try:
            return model_processes(case.repository) or usual
        except (ImportError, OSError, ValueError):
            return usual
    return usual


def _meminfo(case: Case, name: str) -> int:
    """Bytes."""
    for line in case.read("proc/meminfo").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    return 0


def _status(case: Case, pid: int | str) -> dict[str, str]:
    """Fields of a process's status, proc(5)."""
    rows = (line.partition(":") for line in case.read(f"proc/{pid}/status").splitlines())
    return {key: value.strip() for key, _, value in rows}


def control_group_limit(case: Case, pid: int | str, controller: str, file: str, old_file: str) -> int | None:
    """The least limit of a process's control group and those above it, of cgroup v2 or v1; None without one."""
    limits = []
    for folder in _control_groups(case, pid, controller):
        for name in (file, old_file):
            said = case.read(f"{folder}/{name}").split()
            if said and said[0].isdigit() and int(said[0]) < 1 << 60:
                limits.append(int(said[0]))
    return min(limits, default=None)


def _cpu_quota(case: Case) -> float | None:
    """Cores that control groups give this process."""
    quotas = []
    for folder in _control_groups(case, "self", "cpu"):
        said = case.read(f"{folder}/cpu.max").split()
        if len(said) == 1 or not said:
            said = [case.read(f"{folder}/cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(part.isdigit() for part in said) and int(said[1]):
            quotas.append(int(said[0]) / int(said[1]))
    return min(quotas, default=None)


def _control_groups(case: Case, pid: int | str, controller: str) -> Iterator[str]:
    """Folders of a process's control group and of those above it."""
    for row in case.read(f"proc/{pid}/cgroup").splitlines():
        number, controllers, path = row.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        top = "sys/fs/cgroup" if number == "0" else f"sys/fs/cgroup/{controller}"
        parts = [part for part in path.split("/") if part and part != ".."]
        for count in range(len(parts), -1, -1):
            yield "/".join([top, *parts[:count]])


CHECKS = (
    Check(id="machine.system", run=system),
    Check(id="machine.cpu", run=cpu),
    Check(id="machine.cores", run=cores),
    Check(id="machine.memory", run=memory),
    Check(id="machine.disk", run=disk),
    Check(id="machine.shm", run=shared_memory),
    Check(id="machine.shm_modes", run=shared_memory_modes),
    Check(id="machine.open_files", run=open_files),
    Check(id="machine.sandbox", run=sandbox, limit_s=45),
    Check(id="machine.clock", run=clock),
    Check(id="machine.user", run=user),
    Check(id="machine.umask", run=umask),
    Check(id="machine.proc", run=hidden_processes),
    Check(id="machine.hardlinks", run=hard_links),
    Check(id="machine.secret", run=secret),
    Check(id="machine.gpu", run=gpu, limit_s=30),
)
