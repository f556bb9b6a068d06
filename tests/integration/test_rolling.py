"""Servers that are ended and started while readings go on behind the front door; `rolling.py` does it many times."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from front import nginx
from rolling import roll

from cxr_triton.client import Reader
from cxr_triton.errors import QueueFull
from cxr_triton.triton_repo.drain import under_way
from cxr_triton.triton_repo.package import Settings, write_repository
from cxr_triton.triton_repo.serve import Server

pytestmark = [pytest.mark.triton, pytest.mark.slow]


def test_what_is_under_way_ends_and_nothing_new_is_taken(served_bundle, tmp_path):
    pytest.importorskip("pytriton")
    write_repository(served_bundle, tmp_path / "repository", Settings(threads=1), unverified=True)
    with (
        Server(tmp_path / "repository", grpc_port=0, metrics_port=0) as server,
        ThreadPoolExecutor() as pool,
        Reader(server.grpc) as reader,
    ):
        streams = [reader.read((), prompt=f"{i}", max_new_tokens=2000, temperature=0.0) for i in range(6)]
        for stream in streams:
            next(stream)
        ended = [pool.submit(stream.result) for stream in streams]
        draining = pool.submit(server.drain, 300)
        with pytest.raises(QueueFull, match="is ending"):
            while not draining.done():
                reader.read((), prompt="late", max_new_tokens=8).result()
        assert draining.result(310)
        assert [reading.result(60).status is None for reading in ended] == [False] * 6
        assert under_way(server.metrics) == 0


def test_no_reading_that_was_accepted_is_lost(served_bundle, tmp_path):
    pytest.importorskip("pytriton")
    nginx()
    write_repository(served_bundle, tmp_path / "repository", Settings(threads=1), unverified=True)
    result = roll(tmp_path, tmp_path / "repository", restarts=2, clients=3)
    assert result["lost"] == 0, result["how_lost"]
    assert result["exit_status"] == {"0": 2} and result["readings"]["done"] > 0
