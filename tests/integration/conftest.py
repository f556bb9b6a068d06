"""One real server for all tests: pip-installed Triton, the served ensemble, a small random model."""

import importlib.util
from pathlib import Path

import pytest
from served import Raw, write_bundle


@pytest.fixture(scope="session")
def served_bundle(lasting) -> Path:
    """Engine bundle of a small random model."""
    return write_bundle(lasting / "served")


@pytest.fixture(scope="session")
def server(served_bundle, lasting):
    """A warm server on free ports: 4 slots, 2 preprocessing processes."""
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("no Triton server here; install it with pip install '.[local]'")
    from cxr_triton.triton_repo.package import Settings, write_repository
    from cxr_triton.triton_repo.serve import Server

    repository = lasting / "repository"
    write_repository(served_bundle, repository, Settings(threads=1), unverified=True)
    with Server(repository, grpc_port=0, http_port=0, metrics_port=0) as server:
        yield server
    # A request that Triton never counts as done is a leak, and keeps a server from ending in time.
    assert "in-flight inferences" not in server.log.read_text().replace("that have in-flight inferences", "")


@pytest.fixture
def raw(server) -> Raw:
    """A bare client of `server`; checks after each test that the server is whole."""
    yield Raw(server)
    server.check()
