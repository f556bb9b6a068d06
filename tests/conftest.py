"""Shared fixtures: where the real radiographs are, and which optional tools this machine has."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real radiographs that is not part of the repository; tests that need it are skipped without it."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no {SHARED_DATA}: real radiographs are not part of the repository")
    return SHARED_DATA
