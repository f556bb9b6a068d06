"""Servers that are ended and started while readings go on behind the front door; `rolling.py` does it many times."""

import pytest
from front import nginx
from rolling import roll

from cxr_triton.triton_repo.package import Settings, write_repository

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def test_no_reading_that_was_accepted_is_lost(served_bundle, tmp_path):
    pytest.importorskip("pytriton")
    nginx()
    write_repository(served_bundle, tmp_path / "repository", Settings(threads=1), unverified=True)
    result = roll(tmp_path, tmp_path / "repository", restarts=2, clients=3)
    assert result["lost"] == 0, result["how_lost"]
    assert result["exit_status"] == {"0": 2} and result["under_way_at_sigterm"]["sum"] > 0
