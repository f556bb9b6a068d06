"""Shared fixtures: where the real radiographs are; and which tests are quick."""

import collections
import gc
import shutil
import signal
from pathlib import Path

import pytest

import cxr_triton  # noqa: F401  # first, as it keeps libraries from reporting to their makers
from cxr_triton.pixels import sandbox

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure():
    """What a shell without job control starts in the background ignores Ctrl-C, and so would the tests' programs.

    The garbage collector passes less often: a twentieth of the tests' time went into it.
    """
    gc.set_threshold(20_000, 20, 100)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: no pass of the garbage collector through it frees anything."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """The passes in a file's tests go through that file's objects alone: one through all libraries takes 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def lasting(tmp_path_factory) -> Path:
    """Folder of what outlives a file's tests."""
    return tmp_path_factory.mktemp("lasting")


@pytest.fixture(scope="module", autouse=True)
def _disk(lasting, tmp_path_factory):
    """What a file's fixtures wrote goes with them, as engines of all files together would fill a small disk."""
    base = tmp_path_factory.getbasetemp()
    before = set(base.iterdir())
    yield
    for folder in set(base.iterdir()) - before:
        if not folder.name.startswith("test_"):  # a test's own `tmp_path`, which stays where it fails
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def idle_decoders():
    """Decoding processes that wait for a sandbox to take them, by interpreter and limits."""
    idle = collections.defaultdict(list)
    yield idle
    for children in idle.values():
        for child in children:
            child.stop()


@pytest.fixture(scope="module", autouse=True)
def decoders(idle_decoders):
    """Decoding processes go from one sandbox to the next: to start one takes 0.15 s of a core."""
    made = sandbox._Child

    def taken(*key):
        while idle_decoders[key]:
            if (child := idle_decoders[key].pop()).process.poll() is None:
                return child
        child = made(*key)
        child.key = key
        return child

    def close(self):
        with self._lock:
            self._closed, child, self._child = True, self._child, None
        if child is not None:
            idle_decoders[child.key].append(child)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_Child", taken)
        patch.setattr(sandbox.Sandbox, "close", close)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real radiographs that is not part of the repository; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: real radiographs are not part of the repository")
    return SHARED_DATA


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Files that take minutes come first, so that at the end no process has one left while another has none."""
    unit = ROOT / "tests" / "unit"
    for item in items:
        if unit in item.path.parents and not item.get_closest_marker("slow"):
            item.add_marker("quick")
    items.sort(key=lambda item: unit in item.path.parents)
