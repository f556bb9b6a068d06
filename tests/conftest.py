"""Shared fixtures: where the real radiographs are; and which tests are quick."""

import gc
import signal
from pathlib import Path

import pytest

import cxr_triton  # noqa: F401  # first, as it keeps libraries from reporting to their makers

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_configure():
    """What a shell without job control starts in the background ignores Ctrl-C, and so would the tests' programs."""
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
def shared_data() -> Path:
    """Folder of real radiographs that is not part of the repository; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: real radiographs are not part of the repository")
    return SHARED_DATA


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if ROOT / "tests" / "unit" in item.path.parents and not item.get_closest_marker("slow"):
            item.add_marker("quick")
